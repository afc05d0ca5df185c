// Package store is the contract for where the broker keeps its state: an
// ordered key-value store with serializable transactions and ordered logs.
//
// It is small on purpose, so that the same engine runs on an embedded file
// (store/bolt) and on etcd. Update works on single keys and never scans, so
// that conflicts are made on guard keys that both sides name: closing an
// incident writes one key, and every delivery of the incident reads it.
// storetest is the contract as a test suite; every implementation passes it.
package store

import (
	"context"
	"errors"
	"iter"
)

// Limits that every implementation keeps, so that what works on one works on
// the other.
const (
	MaxKey   = 1 << 10 // bytes of a key, or of a log's name; neither may be empty
	MaxValue = 1 << 20 // bytes of a value
	MaxOps   = 128     // reads, writes and appends of one Update together
)

// Errors that callers tell apart with errors.Is.
var (
	// ErrUnavailable means that the store cannot be used now: the disk is full
	// or read-only, or the server is away. Nothing was committed, unless the
	// error is also ErrUnknown.
	ErrUnavailable = errors.New("store unavailable")
	// ErrUnknown means that a commit's outcome is not known: it may have
	// happened. Read before doing it again.
	ErrUnknown = errors.New("commit outcome unknown")
	// ErrClosed means that Close was called.
	ErrClosed = errors.New("store closed")
	// ErrLimit means that a key, a value or a transaction exceeds its limit.
	ErrLimit = errors.New("store limit exceeded")
	// ErrInUse means that another process has the store open.
	ErrInUse = errors.New("store in use by another process")
	// ErrNewer means that a newer Mayfly wrote the store.
	ErrNewer = errors.New("store written by a newer version")
)

// Store is an ordered key-value store. Keys are compared byte by byte. All
// methods may be called from many goroutines.
type Store interface {
	// View calls fn with a snapshot: everything that fn reads is of one
	// instant, no earlier than the return of any Update that had returned when
	// View was called. fn must not call Update, and must not keep r. If ctx is
	// over when View is called, View returns its error.
	View(ctx context.Context, fn func(r Reader) error) error

	// Update runs fn in a serializable transaction and commits durably what it
	// wrote, all or nothing; it returns after the commit. If fn returns an
	// error nothing is written, and Update returns that error. fn may run more
	// than once and must have no other effect; the last run is the one that
	// counts. Concurrent callers share the cost of a commit, and none waits
	// for another's error. fn must not call View or Update. An error of one of
	// Txn's methods is final: Update returns it even if fn does not. A panic
	// in fn leaves Update in its caller, and nothing is written.
	//
	// ctx bounds the wait for the transaction's turn. Once fn has run for the
	// last time the commit is awaited, whatever ctx says.
	Update(ctx context.Context, fn func(t Txn) error) error

	// Close waits for running calls, refuses new ones with ErrClosed, and
	// releases the store. It may be called more than once.
	Close() error
}

// Txn is what an Update may do. It sees its own writes.
type Txn interface {
	// Get returns a copy of the key's value; ok is false if there is none.
	Get(key string) (value []byte, ok bool, err error)
	// Put sets the key's value.
	Put(key string, value []byte) error
	// Delete removes the key. Removing what is not there is no error.
	Delete(key string) error
	// Append adds value at the end of the named log. The order of a log is the
	// order of commits and, within one transaction, of calls. An entry never
	// changes and is never removed.
	Append(log string, value []byte) error
}

// Reader is a snapshot.
type Reader interface {
	// Get is as in Txn.
	Get(key string) (value []byte, ok bool, err error)
	// Scan yields the keys from (inclusive) to (exclusive) in order, with
	// their values. An empty to means no upper bound. A value is valid until
	// fn of View returns, and must not be changed. A failure is yielded last, with an empty Entry.
	Scan(from, to string) iter.Seq2[Entry, error]
	// Log yields the log's entries whose sequence number is greater than
	// after, in order; 0 begins at the first. Numbers grow with each entry and
	// may leave gaps. Values are as in Scan.
	Log(log string, after uint64) iter.Seq2[LogEntry, error]
}

// Entry is one key and its value.
type Entry struct {
	Key   string
	Value []byte
}

// LogEntry is one entry of a log.
type LogEntry struct {
	Seq   uint64
	Value []byte
}

// Prefix returns the bounds for Scan that hold exactly the keys that begin
// with p. An empty p means every key.
func Prefix(p string) (from, to string) {
	b := []byte(p)
	for i := len(b) - 1; i >= 0; i-- {
		if b[i] < 0xff {
			b[i]++
			return p, string(b[:i+1])
		}
	}
	return p, ""
}
