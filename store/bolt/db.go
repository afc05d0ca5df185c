// Package bolt is the embedded store: one file, on bbolt.
//
// Concurrent Updates share a commit, and with it the two fsyncs that a commit
// of bbolt costs. It does not use bbolt's own Batch, which lets a lone caller
// wait 10 ms for company and runs everybody again when one fails.
//
// A commit can fail in two ways. If it fails before bbolt has written its meta
// page, nothing has happened and the store goes on: it recovers by itself when
// the disk has room again. If it fails after that, the kernel's copy of the
// file shows the commit and the disk may not: the outcome is unknown, and the
// DB refuses all further use, reads too, until it is opened again.
package bolt

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"go.etcd.io/bbolt"

	"github.com/mayfly-security/mayfly/store"
)

// Config is how to open a DB. Its zero value is right for nearly everybody.
type Config struct {
	// LockWait is how long Open waits for another process to let go of the
	// file; a restart may overlap with the end of the process before. Zero
	// means one second, a negative value means not to wait.
	LockWait time.Duration

	// MmapSize is how many bytes of address space to reserve for the file. It
	// costs no memory. A file that outgrows it is mapped anew, and that waits
	// for every running View while it keeps new ones and every Update waiting.
	// Zero means 16 GiB, or nothing in advance on 32-bit systems and Windows.
	MmapSize int
}

// DB is a store.Store in one file. Its methods may be called from many
// goroutines.
//
// A View that runs for long keeps the pages that it may still read from being
// used again, so the file grows while others write.
type DB struct {
	path string
	bolt *bbolt.DB

	commit func(*bbolt.Tx) error // (*bbolt.Tx).Commit; tests let it fail

	closed chan struct{} // closed when Close is done

	mu     sync.Mutex
	broken error         // why nothing may be done any more; nil while all is well
	busy   bool          // somebody has the turn
	queue  []*waiter     // those who wait for the turn, first come first
	calls  int           // how many run
	idle   chan struct{} // nil until Close is called; then closed when no call runs
}

var _ store.Store = (*DB)(nil)

// Close waits for running calls, refuses new ones with store.ErrClosed, and
// lets go of the file. It may be called more than once.
func (db *DB) Close() error {
	db.mu.Lock()
	if db.idle != nil {
		db.mu.Unlock()
		<-db.closed
		return nil
	}
	db.idle = make(chan struct{})
	if db.calls == 0 {
		close(db.idle)
	}
	db.mu.Unlock()
	defer close(db.closed)
	<-db.idle
	if err := db.bolt.Close(); err != nil {
		return fmt.Errorf("closing store %s: %w", db.path, err)
	}
	return nil
}

// enter begins a call, which ends with leave.
func (db *DB) enter() error {
	db.mu.Lock()
	defer db.mu.Unlock()
	if db.idle != nil {
		return store.ErrClosed
	}
	if db.broken != nil {
		return fmt.Errorf("%w: an earlier failure has left %s in doubt (%w); restart to open it again", store.ErrUnavailable, db.path, db.broken)
	}
	db.calls++
	return nil
}

func (db *DB) leave() {
	db.mu.Lock()
	defer db.mu.Unlock()
	if db.calls--; db.calls == 0 && db.idle != nil {
		close(db.idle)
	}
}

// breakDown refuses every call from now on.
func (db *DB) breakDown(cause error) {
	db.mu.Lock()
	defer db.mu.Unlock()
	if db.broken == nil {
		db.broken = cause
	}
}

// brokenBy returns what broke the store, or nil. Whoever waited for its turn
// while that happened asks again.
func (db *DB) brokenBy() error {
	db.mu.Lock()
	defer db.mu.Unlock()
	return db.broken
}

var errDone = errors.New("used after its function returned")

func checkKey(kind, key string) error {
	if len(key) == 0 || len(key) > store.MaxKey {
		return fmt.Errorf("%w: %s of %d bytes; it must have 1 to %d", store.ErrLimit, kind, len(key), store.MaxKey)
	}
	return nil
}

// syncDir makes the file's name in its directory durable, which the sync of
// the file itself need not do.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
