package bolt

import (
	"fmt"
	"runtime/debug"

	"go.etcd.io/bbolt"

	"github.com/mayfly-security/mayfly/store"
)

// begin opens a batch.
func (db *DB) begin() (b *batch, err error) {
	defer func() {
		if p := recover(); p != nil {
			b, err = nil, fmt.Errorf("%w: %w", store.ErrUnavailable, db.panicked(p))
		}
	}()
	if cause := db.brokenBy(); cause != nil {
		return nil, fmt.Errorf("%w: %w", store.ErrUnavailable, cause)
	}
	tx, err := db.bolt.Begin(true)
	if err != nil {
		return nil, fmt.Errorf("%w: beginning a transaction in %s: %w", store.ErrUnavailable, db.path, err)
	}
	return &batch{tx: tx, done: make(chan struct{})}, nil
}

// finish commits the batch and sets its err.
func (db *DB) finish(b *batch) {
	// bbolt panics on damage. The turn must go on all the same, or everybody
	// would wait for ever behind a panic that an HTTP server swallows.
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			b.err = &commitError{path: db.path, unknown: true, cause: db.panicked(p)}
			db.abandon(b.tx)
		}
	}()
	switch {
	case b.apply != nil:
		b.err = &commitError{path: db.path, cause: b.apply}
		fallthrough
	case !b.dirty:
		b.tx.Rollback() // fails only on a transaction that has ended
	default:
		id := b.tx.ID() // gone after the commit
		if err := db.commit(b.tx); err != nil {
			b.err = db.commitFailed(id, err)
		}
	}
}

// commitFailed finds out what became of transaction id, whose commit returned
// cause. bbolt writes and syncs the data, and then writes and syncs the meta
// page that makes it count, into which we look:
//
//   - It does not show id: it was not written, so nothing happened. bbolt has
//     rolled back, what it wrote are free pages, and it can go on.
//   - It shows id: the sync failed, and the disk may have it or not. bbolt now
//     builds upon it, and would soon write over pages that the older meta page
//     needs. If that is the one on the disk, a power cut then would take
//     everything, so nothing more may be done.
//   - It cannot be seen: the file could not be mapped again.
func (db *DB) commitFailed(id int, cause error) *commitError {
	tx, err := db.bolt.Begin(false)
	if err != nil {
		db.breakDown(fmt.Errorf("%w, and then: %w", cause, err))
		return &commitError{path: db.path, unknown: true, cause: cause}
	}
	seen := tx.ID()
	tx.Rollback() // fails only on a transaction that has ended
	if seen < id {
		return &commitError{path: db.path, cause: cause}
	}
	db.breakDown(cause)
	return &commitError{path: db.path, unknown: true, cause: cause}
}

// panicked breaks the store after a panic of bbolt.
func (db *DB) panicked(p any) error {
	err := fmt.Errorf("bbolt panicked, so the file may be damaged: %v", p)
	db.breakDown(err)
	return err
}

// abandon lets go of the locks of a transaction that panicked, so that Close
// does not wait for it.
func (db *DB) abandon(tx *bbolt.Tx) {
	defer func() { _ = recover() }() // it is as broken as it was
	tx.Rollback()
}
