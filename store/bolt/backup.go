package bolt

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"strings"

	"go.etcd.io/bbolt"

	"github.com/mayfly-security/mayfly/store"
)

// maxFindings is how much damage Check tells of.
const maxFindings = 10

// WriteTo writes a snapshot of the whole store to w while others go on, and
// returns the number of bytes. What it wrote is a store that Open opens. It is
// a View as long as it runs: see DB about what a slow w costs.
//
// A backup holds no secret, but whoever can change it before it is restored
// can make grants.
func (db *DB) WriteTo(w io.Writer) (int64, error) {
	if err := db.enter(); err != nil {
		return 0, err
	}
	defer db.leave()
	tx, err := db.bolt.Begin(false)
	if err != nil {
		return 0, fmt.Errorf("%w: beginning a snapshot of %s: %w", store.ErrUnavailable, db.path, err)
	}
	defer tx.Rollback()
	n, err := tx.WriteTo(w)
	if err != nil {
		return n, fmt.Errorf("backing up %s: %w", db.path, err)
	}
	return n, nil
}

// CopyTo writes a snapshot of the store in the file at path to w, as DB.WriteTo
// does, without changing anything: for a store that no broker has open. The
// error is store.ErrInUse if one has.
func CopyTo(path string, w io.Writer) (int64, error) {
	if err := checkFile(path); err != nil {
		return 0, fmt.Errorf("copying store %s: %w", path, err)
	}
	if _, err := os.Stat(path); err != nil {
		return 0, fmt.Errorf("copying store %s: %w", path, err)
	}
	opts := options(Config{})
	opts.ReadOnly = true
	opts.InitialMmapSize = 0 // nothing is written, so it does not grow
	bolt, err := openBoltWith(path, opts)
	if err != nil {
		return 0, fmt.Errorf("copying store %s: %w", path, err)
	}
	db := &DB{path: path, bolt: bolt, closed: make(chan struct{})}
	n, err := db.copyTo(w)
	return n, errors.Join(err, db.Close())
}

func (db *DB) copyTo(w io.Writer) (n int64, err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("copying store %s: %w", db.path, damaged(p))
		}
	}()
	empty, err := db.inspect()
	switch {
	case err != nil:
		return 0, fmt.Errorf("copying store %s: %w", db.path, err)
	case empty:
		return 0, fmt.Errorf("copying store %s: nothing is in it", db.path)
	}
	return db.WriteTo(w)
}

// Check reads the whole file and reports damage to its structure. Every Update
// waits meanwhile. ctx bounds only the wait for its own turn.
func (db *DB) Check(ctx context.Context) (err error) {
	if err := db.enter(); err != nil {
		return err
	}
	defer db.leave()
	b, err := db.takeTurn(ctx)
	if err != nil {
		return err
	}
	// What others of the batch wrote is not in pages before the commit, so it
	// does not matter here.
	defer db.passTurn(b)
	defer guard(db.path, debug.SetPanicOnFault(true), &err)
	return verify(b.tx)
}

func check(tx *bbolt.Tx) error {
	var found []error
	for err := range tx.Check() { // to the end, or its goroutine stays
		if len(found) < maxFindings {
			found = append(found, err)
		}
	}
	err := tx.ForEach(func(name []byte, b *bbolt.Bucket) error {
		log, ok := strings.CutPrefix(string(name), logPrefix)
		if !ok {
			return nil
		}
		last, _ := b.Cursor().Last()
		if len(last) != 8 || binary.BigEndian.Uint64(last) > b.Sequence() {
			return fmt.Errorf("log %q ends with %x, past its sequence %d", log, last, b.Sequence())
		}
		return nil
	})
	return errors.Join(append(found, err)...)
}
