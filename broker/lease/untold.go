package lease

import (
	"slices"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/store"
)

// While the store cannot be written, giving stops by itself, for it needs a
// commit. Ending goes on: leases whose end could not be committed are doomed,
// and ended at the provider all the same; what the provider says of them is
// kept here, and told when the store can be written again. A stop in between
// loses no more than the work: the store still says that they must end, or, of
// those that somebody ended and was told so, that they live until their end.

// told is what the provider said of a lease.
type told struct {
	lease     broker.LeaseID
	death     providers.Death
	unsettled bool      // when it was asked
	early     time.Time // when it was asked
}

// over reports whether nothing is left to ask.
func (s told) over() bool {
	return !s.unsettled && (s.death.Lapsed || s.death.Progress == broker.ProgressVerified)
}

// farOff is when a lease of which nothing is left to ask is asked about again.
const farOff = 100 * 365 * 24 * time.Hour

// begin moves a doomed lease to revoking in the store. A better handle than the
// store's goes with it.
func (why ending) begin(t store.Txn, l *leaseRecord, now time.Time) error {
	if why.handle != "" {
		l.Handle = providers.Handle(why.handle)
		if l.State == broker.LeaseRevoking {
			return put(t, keyLease(l.ID), l)
		}
	}
	return startRevoking(t, l, now, why)
}

// doomLater has a lease ended at the provider although the store could not be
// told that it must end; it is told as soon as it can be.
func (w *worker) doomLater(id broker.LeaseID, why ending) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.doomed[id] = why
	if _, busy := w.busy[id]; !busy {
		if s, ok := w.untold[id]; !ok || !s.over() {
			w.soon[id] = struct{}{}
		}
	}
}

// doom tells why a lease is doomed, if it is.
func (w *worker) doom(id broker.LeaseID) (why ending, is bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	why, is = w.doomed[id]
	return why, is
}

// overlay adds to a lease of the store what the store could not be told.
func (w *worker) overlay(l *leaseRecord) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if why, ok := w.doomed[l.ID]; ok && why.handle != "" {
		l.Handle = providers.Handle(why.handle)
	}
	if s, ok := w.untold[l.ID]; ok && s.death.Progress != broker.ProgressVerified {
		l.Progress = s.death.Progress
	}
}

// postpone leaves a lease alone for a while.
func (w *worker) postpone(id broker.LeaseID, d time.Duration) {
	at := w.e.clock.now().Add(d)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.later[id] = at
}

// keep keeps what the store could not be told, until it can be. The pauses
// between tries are kept here, too.
func (w *worker) keep(said []told) {
	now := w.e.clock.now()
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, s := range said {
		w.untold[s.lease] = s
		switch {
		case s.over():
			w.later[s.lease] = now.Add(farOff)
		case s.death.RetryAt.After(now) && s.death.Err == nil:
			w.later[s.lease] = s.death.RetryAt
		default:
			w.later[s.lease] = now.Add(w.e.retryAfter(w.failing[s.lease].attempts))
		}
		if _, doomed := w.doomed[s.lease]; doomed && !s.over() {
			w.soon[s.lease] = struct{}{} // its due key may lie in the future
		}
	}
}

// written forgets what the store was told.
func (w *worker) written(said []told) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, s := range said {
		if _, was := w.untold[s.lease]; was {
			delete(w.untold, s.lease)
			delete(w.later, s.lease)
		}
		delete(w.doomed, s.lease)
	}
}

// unlearn has the provider's worker forget a lease that ended without it.
func (e *Engine) unlearn(l *leaseRecord) {
	if w := e.worker(l.Provider); w != nil {
		w.forget(l.ID)
	}
}

// forget drops everything that is known of a lease.
func (w *worker) forget(id broker.LeaseID) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.untold, id)
	delete(w.doomed, id)
	delete(w.later, id)
	delete(w.failing, id)
	delete(w.soon, id)
}

// mustTell reports whether there is something that the store was not told.
func (w *worker) mustTell() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.untold)+len(w.doomed) > 0
}

// tellStore tells the store what it could not be told.
func (w *worker) tellStore() (o outcome) {
	w.mu.Lock()
	var said []told
	var only []broker.LeaseID // doomed, and nothing was said of them yet
	for id := range w.doomed {
		if _, ok := w.untold[id]; !ok {
			only = append(only, id)
		}
	}
	for id, s := range w.untold {
		if _, busy := w.busy[id]; !busy {
			said = append(said, s)
		}
	}
	w.mu.Unlock()
	for part := range slices.Chunk(said, tellChunk) {
		if err := w.write(part); err != nil {
			return outcome{store: err}
		}
		w.e.watch.signal()
	}
	for part := range slices.Chunk(only, chunk) {
		if err := w.tellEnds(part); err != nil {
			return outcome{store: err}
		}
	}
	return o
}

// tellEnds moves doomed leases to revoking.
func (w *worker) tellEnds(ids []broker.LeaseID) error {
	why := make([]ending, len(ids))
	doomed := make([]bool, len(ids))
	for i, id := range ids {
		why[i], doomed[i] = w.doom(id)
	}
	now := w.e.clock.now()
	err := w.e.update(w.e.ctx, now, func(t store.Txn) error {
		for i, id := range ids {
			l, ok, err := get[leaseRecord](t, keyLease(id))
			if err != nil {
				return err
			}
			if !ok || !doomed[i] || l.State.Ended() {
				continue
			}
			if err := why[i].begin(t, &l, now); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, id := range ids {
		delete(w.doomed, id)
	}
	return nil
}
