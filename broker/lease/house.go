package lease

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/audit"
	"github.com/mayfly-security/mayfly/store"
)

// The kinds of housekeeping, as they stand in the store's keys.
const (
	houseGrant    = "grant"    // a grant's NotAfter has come
	houseIncident = "incident" // an incident's hard end has come
	houseLease    = "lease"    // an ended lease's record has been kept long enough
	houseRequest  = "request"  // a request that is pending has expired
	// A user's token has expired, and need be bound to nobody any more.
	houseUserToken = "usertoken"
	houseRecovery  = "recovery" // the end of a recovery has come
	houseCutOff    = "cutoff"   // whatever a cut-off was to end is dead by itself
)

// houseEvery is how often the housekeeper looks when nothing tells it to: it
// marks the time in the store, which also shows that the store can be written.
const houseEvery = 10 * time.Second

// housekeeper ends grants and incidents whose time has come, finishes sweeps,
// ends leases whose ending could not be written at once, and keeps the clock's
// mark. It belongs to one engine.
type housekeeper struct {
	e     *Engine
	poked chan struct{} // has room for one

	mu       sync.Mutex
	sleep    time.Time // until when it sleeps
	storeErr error
	orphans  map[broker.LeaseID]*orphan
}

// orphan is a lease that must end, and of which the store could not be told yet.
type orphan struct {
	handle []byte
	cause  broker.Cause
	refund bool // the use of the grant is given back
}

func newHousekeeper(e *Engine) *housekeeper {
	return &housekeeper{e: e, poked: make(chan struct{}, 1), orphans: map[broker.LeaseID]*orphan{}}
}

func (h *housekeeper) poke() {
	select {
	case h.poked <- struct{}{}:
	default:
	}
}

// dueAt pokes the housekeeper if it would sleep past at.
func (h *housekeeper) dueAt(at time.Time) {
	h.mu.Lock()
	sooner := at.Before(h.sleep)
	h.mu.Unlock()
	if sooner {
		h.poke()
	}
}

func (h *housekeeper) storeError() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.storeErr
}

// endLater ends a lease as soon as the store can be told. The handle, if not
// nil, replaces the one in the store.
//
// The use of the grant is given back unless spent: a secret that can be made
// again from the lease may be, before the store is told.
func (e *Engine) endLater(id broker.LeaseID, handle []byte, cause broker.Cause, spent bool) {
	e.house.mu.Lock()
	if was := e.house.orphans[id]; was != nil && handle == nil {
		handle = was.handle // one that is known is the better one
	}
	e.house.orphans[id] = &orphan{handle: handle, cause: cause, refund: !spent}
	e.house.mu.Unlock()
	e.house.poke()
}

func (h *housekeeper) run() {
	e := h.e
	for {
		ctx := e.ctx
		err := h.work(ctx)
		h.mu.Lock()
		was := h.storeErr
		h.storeErr = storeRefusal(err)
		h.mu.Unlock()
		if err != nil && ctx.Err() == nil {
			e.log.Error("keeping house", "error", err)
		} else if was != nil && err == nil {
			e.log.Info("the store can be written again")
		}
		now := e.clock.late()
		next := now.Add(houseEvery)
		if err != nil {
			next = now.Add(time.Second)
		} else if at, ok := h.next(ctx); ok && at.Before(next) {
			next = at
			if !at.After(now) {
				next = now.Add(time.Second) // it waits for the earlier clock
			}
		}
		h.mu.Lock()
		h.sleep = next
		h.mu.Unlock()
		timer := time.NewTimer(max(next.Sub(now), 0))
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-h.poked:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// work does everything that is due, a page at a time: what must end never waits
// behind a long page of what is only to be forgotten.
func (h *housekeeper) work(ctx context.Context) error {
	e := h.e
	for more := true; more; {
		if err := h.endOrphans(ctx); err != nil {
			return err
		}
		if err := e.tellLimbo(ctx); err != nil {
			return err
		}
		if err := e.resumeSweeps(ctx); err != nil {
			return err
		}
		keys, err := h.due(ctx)
		if err != nil {
			return err
		}
		var old []string
		for _, key := range keys {
			if strings.Contains(key, "|"+houseLease+"|") {
				old = append(old, key)
			} else if err := h.one(ctx, key); err != nil {
				return err
			}
		}
		if err := h.forget(ctx, old); err != nil {
			return err
		}
		if more = len(keys) > 0; !more {
			if more, err = e.retire(ctx); err != nil {
				return err
			}
		}
	}
	e.replays.forget(e.clock.now())
	e.paces.forget(e.clock.now())
	e.refusals.flush(ctx)
	e.watchClock()
	now := e.clock.now()
	return e.update(ctx, now, func(t store.Txn) error { return nil })
}

// forget removes the records of leases that ended long ago.
func (h *housekeeper) forget(ctx context.Context, keys []string) error {
	const each = 20 // one takes up to five operations
	for part := range slices.Chunk(keys, each) {
		err := h.e.update(ctx, h.e.clock.now(), func(t store.Txn) error {
			for _, key := range part {
				if err := t.Delete(key); err != nil {
					return err
				}
				if err := forget(t, broker.LeaseID(lastPart(key))); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// due lists keys whose time has come. What is to be forgotten is judged by the
// earlier clock: a jump forward must not cost records, and with them the
// idempotency keys that keep a second lease from being made, nor the binding
// of a user's token, nor bring back to life what was cut off.
func (h *housekeeper) due(ctx context.Context) (keys []string, err error) {
	early := h.e.clock.early()
	err = h.e.store.View(ctx, func(r store.Reader) error {
		keys = keys[:0]
		for entry, err := range r.Scan(prefixHouse, prefixHouse+keyTime(h.e.clock.late())+"~") {
			if err != nil {
				return err
			}
			if forgets(entry.Key) {
				if at, err := timeOfKey(entry.Key, 1); err != nil || at.After(early) {
					if err != nil {
						return err
					}
					continue
				}
			}
			if keys = append(keys, entry.Key); len(keys) == 256 {
				return nil
			}
		}
		return nil
	})
	return keys, err
}

// forgets reports whether a key is for something to be forgotten.
func forgets(key string) bool {
	return slices.ContainsFunc([]string{houseLease, houseUserToken, houseCutOff}, func(kind string) bool {
		return strings.Contains(key, "|"+kind+"|")
	})
}

// next is when the next thing is due.
func (h *housekeeper) next(ctx context.Context) (at time.Time, ok bool) {
	err := h.e.store.View(ctx, func(r store.Reader) error {
		for entry, err := range r.Scan(store.Prefix(prefixHouse)) {
			if err != nil {
				return err
			}
			at, err = timeOfKey(entry.Key, 1)
			ok = err == nil
			return err
		}
		return nil
	})
	return at, ok && err == nil
}

// one does what one key asks for, and removes the key.
func (h *housekeeper) one(ctx context.Context, key string) error {
	e := h.e
	parts := strings.Split(key, "|")
	if len(parts) != 4 {
		return fmt.Errorf("housekeeping key %q is malformed", key)
	}
	now := e.clock.now()
	switch kind, id := parts[2], parts[3]; kind {
	case houseGrant:
		// Its leases end no later than it does, and need not be told.
		return e.update(ctx, now, func(t store.Txn) error {
			if err := t.Delete(key); err != nil {
				return err
			}
			return endGrant(t, broker.GrantID(id), now, broker.GrantExpired,
				sweepRecord{Cause: broker.CauseGrantExpired, Actor: audit.Broker})
		})
	case houseIncident:
		why := sweepRecord{Cause: broker.CauseIncidentExpired, Actor: audit.Broker}
		err := e.update(ctx, now, func(t store.Txn) error {
			if err := t.Delete(key); err != nil {
				return err
			}
			_, err := closeIncident(t, broker.IncidentID(id), now, why)
			return err
		})
		if err != nil {
			return err
		}
		_, err = e.sweepIncident(ctx, broker.IncidentID(id), why)
		return err
	case houseRequest:
		return e.expireRequest(ctx, key, broker.RequestID(id), now)
	case houseUserToken:
		return e.update(ctx, now, func(t store.Txn) error {
			if err := t.Delete(key); err != nil {
				return err
			}
			return t.Delete(keyUserToken(id))
		})
	case houseRecovery:
		return e.endRecovery(ctx, key, now)
	case houseCutOff:
		return e.endCutOff(ctx, key, id, now)
	default:
		return fmt.Errorf("there is no housekeeping of kind %q", kind)
	}
}

// forget removes the record of a lease that ended long ago. Its evidence stays.
func forget(t store.Txn, id broker.LeaseID) error {
	l, ok, err := get[leaseRecord](t, keyLease(id))
	if err != nil || !ok || !l.State.Ended() {
		return err
	}
	keys := []string{keyLease(id), keyLeaseOf(l.Agent, id)}
	if l.Key != "" {
		keys = append(keys, keyIdem(broker.WorkloadPrincipal(l.Agent), l.Key))
	}
	for _, key := range keys {
		if err := t.Delete(key); err != nil {
			return err
		}
	}
	return nil
}

// endOrphans tells the store of leases that must end.
func (h *housekeeper) endOrphans(ctx context.Context) error {
	e := h.e
	h.mu.Lock()
	todo := make(map[broker.LeaseID]*orphan, len(h.orphans))
	for id, o := range h.orphans {
		todo[id] = o
	}
	h.mu.Unlock()
	for id, o := range todo {
		now := e.clock.now()
		provider := ""
		err := e.update(ctx, now, func(t store.Txn) error {
			l, ok, err := get[leaseRecord](t, keyLease(id))
			if err != nil || !ok || l.State.Ended() {
				return err // not there: the commit that would have made it did not happen
			}
			provider = l.Provider
			if o.handle != nil {
				l.Handle = o.handle
			}
			if l.State == broker.LeaseRevoking {
				return moveDue(t, &l, now)
			}
			return startRevoking(t, &l, now, ending{cause: o.cause, actor: audit.Broker, refund: o.refund})
		})
		if err != nil {
			if untellable(err) {
				for id, o := range todo {
					e.doom([]broker.LeaseID{id}, ending{cause: o.cause, actor: audit.Broker, refund: o.refund, handle: string(o.handle)})
				}
			}
			return err
		}
		h.mu.Lock()
		if h.orphans[id] == o { // nothing was learnt meanwhile
			delete(h.orphans, id)
		}
		h.mu.Unlock()
		if provider != "" {
			e.wake(provider)
		}
	}
	return nil
}

// watchClock tells operators when the clock stops or begins to be trusted.
func (e *Engine) watchClock() {
	err := e.clock.trusted()
	if was := e.clockBad.Swap(err != nil); was == (err != nil) {
		return
	}
	now := e.clock.now()
	ev := audit.Event{Time: now, Type: audit.ClockTrusted, Actor: audit.Broker}
	if err != nil {
		ev.Type, ev.Reason = audit.ClockUntrusted, err.Error()
		e.log.Error("the clock is not trusted: giving stops, ending goes on", "error", err)
	} else {
		e.log.Info("the clock is trusted again")
	}
	if err := e.update(e.ctx, now, func(t store.Txn) error { return appendEvent(t, ev) }); err != nil {
		e.log.Error("recording the state of the clock", "error", err)
	}
}
