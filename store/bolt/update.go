package bolt

import (
	"context"
	"fmt"
	"runtime/debug"
	"slices"

	"go.etcd.io/bbolt"

	"github.com/mayfly-security/mayfly/store"
)

// What one commit holds at most. Callers beyond it are in the next one.
const (
	maxBatchCalls = 512
	maxBatchBytes = 8 << 20 // a single Update may have more, and then is the last of its batch
)

// batch is one bbolt transaction that many callers share. Only the caller that
// has the turn uses it, except for done and, after done, err.
//
// There is no goroutine that works for all. The turn goes from caller to
// caller: each runs its own fn in its own goroutine, so that a panic or a
// runtime.Goexit stays where it belongs, and gives the turn to the next who
// waits. The last one commits. Those who come meanwhile wait, and are the next
// batch.
type batch struct {
	tx    *bbolt.Tx
	calls int
	bytes int
	dirty bool          // somebody wrote
	apply error         // the transaction is half changed and must not be committed
	done  chan struct{} // closed when the outcome is known
	err   *commitError  // nil if all is well
}

// commitError is a batch that was not, or may not have been, committed.
type commitError struct {
	path    string
	unknown bool
	cause   error
}

// For returns the error for one caller: who wrote nothing has nothing whose
// outcome could be unknown.
func (e *commitError) For(wrote bool) error {
	if e.unknown && wrote {
		return fmt.Errorf("%w: %w: committing to %s: %w", store.ErrUnavailable, store.ErrUnknown, e.path, e.cause)
	}
	return fmt.Errorf("%w: committing to %s: %w", store.ErrUnavailable, e.path, e.cause)
}

// waiter is a caller that waits for its turn.
type waiter struct {
	turn chan *batch // gets the batch that is open, or nil: begin one. Has room for one
}

// Update implements store.Store. fn runs once, in the caller's goroutine.
//
// An error of fn that may rest on what a neighbour of the same batch wrote is
// returned after that was committed: a refusal is never told for a reason that
// did not come to be.
func (db *DB) Update(ctx context.Context, fn func(store.Txn) error) error {
	if err := db.enter(); err != nil {
		return err
	}
	defer db.leave()
	b, err := db.takeTurn(ctx)
	if err != nil {
		return err
	}
	t := &txn{tx: b.tx, path: db.path}
	before := b.dirty
	err = db.runInTurn(b, t, fn)
	if !before && (err != nil || !t.wrote()) {
		return err // it rests on nothing but what is committed
	}
	<-b.done
	if b.err != nil {
		return b.err.For(err == nil && t.wrote())
	}
	return err
}

// runInTurn runs fn and passes the turn on, however fn ends.
func (db *DB) runInTurn(b *batch, t *txn, fn func(store.Txn) error) error {
	defer db.passTurn(b)
	b.calls++
	err := t.run(fn)
	if err != nil || !t.wrote() {
		return err
	}
	b.dirty = true
	b.bytes += t.bytes
	b.apply = db.apply(t)
	return nil
}

// apply brings a caller's writes into the batch. A panic of bbolt, which finds
// damage, must not look like a success: the batch would be committed half
// changed.
func (db *DB) apply(t *txn) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = db.panicked(p)
		}
	}()
	return t.apply()
}

// takeTurn waits until nobody else has the turn, or ctx is done, and returns
// the batch to work in.
func (db *DB) takeTurn(ctx context.Context) (*batch, error) {
	b, err := db.awaitTurn(ctx)
	if err != nil || b != nil {
		return b, err
	}
	b, err = db.begin()
	if err != nil {
		db.releaseTurn()
		return nil, err
	}
	return b, nil
}

func (db *DB) awaitTurn(ctx context.Context) (*batch, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("waiting for the store: %w", err)
	}
	db.mu.Lock()
	if !db.busy {
		db.busy = true
		db.mu.Unlock()
		return nil, nil
	}
	w := &waiter{turn: make(chan *batch, 1)}
	db.queue = append(db.queue, w)
	db.mu.Unlock()

	select {
	case b := <-w.turn:
		return b, nil
	case <-ctx.Done():
	}
	db.mu.Lock()
	i := slices.Index(db.queue, w)
	if i >= 0 {
		db.queue = slices.Delete(db.queue, i, i+1)
	}
	db.mu.Unlock()
	if i < 0 { // the turn came at the same time, and somebody must take it
		return <-w.turn, nil
	}
	return nil, fmt.Errorf("waiting for the store: %w", ctx.Err())
}

// passTurn gives the turn to the next caller of the batch. If there is none, or
// the batch is full, it commits the batch and lets the next one begin.
func (db *DB) passTurn(b *batch) {
	if b.apply == nil && b.calls < maxBatchCalls && b.bytes < maxBatchBytes && db.handOver(b) {
		return
	}
	db.finish(b)
	close(b.done)
	db.releaseTurn()
}

// handOver gives the turn to the first in the queue, if there is one.
func (db *DB) handOver(b *batch) bool {
	db.mu.Lock()
	defer db.mu.Unlock()
	return db.handOverLocked(b)
}

func (db *DB) handOverLocked(b *batch) bool {
	if len(db.queue) == 0 {
		return false
	}
	db.queue[0].turn <- b
	db.queue = slices.Delete(db.queue, 0, 1)
	return true
}

// releaseTurn lets the first in the queue begin a batch.
func (db *DB) releaseTurn() {
	db.mu.Lock()
	defer db.mu.Unlock()
	if !db.handOverLocked(nil) {
		db.busy = false
	}
}
