package lease

import (
	"context"
	"errors"
	"maps"
	"sync"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/policy"
	"github.com/mayfly-security/mayfly/store"
)

// limbo has the ends of incidents and grants that somebody decided and the
// store could not be told. From then on nothing of them is given, whatever the
// store says; the housekeeper commits them when it can. docs/decisions/0014 has
// the whole picture.
type limbo struct {
	mu        sync.Mutex
	incidents map[broker.IncidentID]sweepRecord
	grants    map[broker.GrantID]sweepRecord
	access    map[string]begunEnding // kill switches, by their IDs
	cuts      map[string]begunCutOff // by cutOffID
}

// begunCutOff is a cut-off that the store could not be told of.
type begunCutOff struct {
	rec     cutOffRecord
	verdict policy.Verdict
}

// cutsOff adds a cut-off. Of those of one role the first decision is told, and
// reaches as far as the last.
func (l *limbo) cutsOff(id string, b begunCutOff) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if was, is := l.cuts[id]; is {
		was.rec.Cut = further(was.rec.Cut, b.rec.Cut)
		b = was
	}
	l.cuts[id] = b
}

func (l *limbo) cutOff(id string) (b begunCutOff, is bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	b, is = l.cuts[id]
	return b, is
}

func (l *limbo) allCuts() map[string]begunCutOff {
	l.mu.Lock()
	defer l.mu.Unlock()
	return maps.Clone(l.cuts)
}

// begunEnding is a kill switch that the store could not be told of.
type begunEnding struct {
	why     sweepRecord
	verdict policy.Verdict
}

func newLimbo() *limbo {
	return &limbo{incidents: map[broker.IncidentID]sweepRecord{}, grants: map[broker.GrantID]sweepRecord{},
		access: map[string]begunEnding{}, cuts: map[string]begunCutOff{}}
}

func (l *limbo) closes(id broker.IncidentID, why sweepRecord) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.incidents[id] = why
}

func (l *limbo) withdraws(id broker.GrantID, why sweepRecord) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.grants[id] = why
}

// over tells why a grant gives nothing, if it is in limbo or its incident is.
func (l *limbo) over(g broker.Grant) (why sweepRecord, is bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if why, is = l.grants[g.ID]; !is && g.Incident != "" {
		why, is = l.incidents[g.Incident]
	}
	return why, is
}

// closed reports whether an incident is in limbo: it takes no more requests and votes.
func (l *limbo) closed(id broker.IncidentID) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	_, is := l.incidents[id]
	return is
}

func (l *limbo) endsAccess(id string, b begunEnding) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.access[id] = b
}

// withdrawn reports whether a request was pending when a kill switch in limbo
// was pulled that matches it.
func (l *limbo) withdrawn(ep *epoch, rec requestRecord) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, b := range l.access {
		if a := b.why.Access; !rec.CreatedAt.After(a.At) && a.Selector.request(ep, rec) {
			return true
		}
	}
	return false
}

func (l *limbo) allAccess() map[string]begunEnding {
	l.mu.Lock()
	defer l.mu.Unlock()
	return maps.Clone(l.access)
}

func (l *limbo) all() (map[broker.IncidentID]sweepRecord, map[broker.GrantID]sweepRecord) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return maps.Clone(l.incidents), maps.Clone(l.grants)
}

// holds is GrantFacts.Holds, with what the store could not be told.
func (e *Engine) holds(f policy.GrantFacts, now time.Time) (broker.Cause, bool) {
	if why, over := e.limbo.over(f.Grant); over {
		return why.Cause, false
	}
	return f.Holds(now)
}

// untellable reports whether err means that the store could not be told of an
// end, so that the end is to go on without it.
func untellable(err error) bool {
	return broker.ReasonOf(err) == broker.ReasonStore && !errors.Is(err, store.ErrClosed)
}

// underWay is what whoever ended something is told then.
func underWay(err error) error {
	return broker.Refuse(broker.ReasonStore,
		"the end is under way, but it is not durable yet: the broker cannot write its store",
		"ask again until it is confirmed; operators see the cause in the log").Because(err)
}

// closeAnyway closes an incident that the store could not be told of.
func (e *Engine) closeAnyway(ctx context.Context, caller broker.Caller, ep *epoch, sees bool, id broker.IncidentID, why sweepRecord, cause error) error {
	var in broker.Incident
	err := e.store.View(context.WithoutCancel(ctx), func(r store.Reader) error {
		var ok bool
		var err error
		if in, ok, err = get[broker.Incident](r, keyIncident(id)); err != nil {
			return err
		}
		if !ok {
			return policy.NotFound("incident", string(id))
		}
		return policy.CloseIncident(caller.ID, in, ep.isCloser(caller.ID, in), sees || ep.sees(caller, in)).Err()
	})
	if err != nil {
		return storeRefusal(err)
	}
	if in.State != broker.IncidentOpen {
		return cause // it is durable that it is over
	}
	e.limbo.closes(id, why)
	return e.endAnyway(ctx, in.Grants, why, cause)
}

// withdrawAnyway ends a grant that the store could not be told of.
func (e *Engine) withdrawAnyway(ctx context.Context, id broker.GrantID, why sweepRecord, cause error) error {
	var g broker.Grant
	err := e.store.View(context.WithoutCancel(ctx), func(r store.Reader) error {
		var ok bool
		var err error
		if g, ok, err = get[broker.Grant](r, keyGrant(id)); err == nil && !ok {
			err = policy.NotFound("grant", string(id))
		}
		return err
	})
	if err != nil {
		return storeRefusal(err)
	}
	if g.State != broker.GrantOpen {
		return cause
	}
	e.limbo.withdraws(id, why)
	return e.endAnyway(ctx, []broker.GrantID{id}, why, cause)
}

// endAnyway has the leases of grants ended that can no longer give, waits for
// the deliveries under way, and says how it stands.
func (e *Engine) endAnyway(ctx context.Context, grants []broker.GrantID, why sweepRecord, cause error) error {
	e.log.Error("an end cannot be written, and goes on without the store", "cause", why.Cause, "actor", why.Actor, "correlation", why.Correlation, "error", cause)
	var ids []broker.LeaseID
	err := e.store.View(context.WithoutCancel(ctx), func(r store.Reader) error {
		ids = ids[:0]
		for _, g := range grants {
			for entry, err := range r.Scan(store.Prefix(prefixOpen(g))) {
				if err != nil {
					return err
				}
				ids = append(ids, broker.LeaseID(lastPart(entry.Key)))
			}
		}
		return nil
	})
	if err != nil {
		return storeRefusal(err)
	}
	e.doom(ids, why.ending())
	e.house.poke()
	if err := e.awaitDeliveries(ctx, grants...); err != nil {
		return err
	}
	return underWay(cause)
}

// doom has leases ended at their providers although the store cannot be told.
func (e *Engine) doom(ids []broker.LeaseID, why ending) {
	byProvider := map[string][]broker.LeaseID{}
	err := e.store.View(e.ctx, func(r store.Reader) error {
		clear(byProvider)
		for _, id := range ids {
			l, ok, err := get[leaseRecord](r, keyLease(id))
			if err != nil {
				return err
			}
			if ok && !l.State.Ended() {
				byProvider[l.Provider] = append(byProvider[l.Provider], id)
			}
		}
		return nil
	})
	if err != nil {
		e.log.Error("reading leases that are to be ended without the store", "leases", len(ids), "error", err)
		return
	}
	for provider, ids := range byProvider {
		w := e.worker(provider)
		if w == nil {
			continue // the broker is only starting
		}
		for _, id := range ids {
			w.doomLater(id, why)
		}
		w.poke()
	}
}

// doomed reports whether a lease is being ended without the store.
func (e *Engine) doomed(l *leaseRecord) bool {
	w := e.worker(l.Provider)
	if w == nil {
		return false
	}
	_, is := w.doom(l.ID)
	return is
}

// tellLimbo commits the ends that the store could not be told.
func (e *Engine) tellLimbo(ctx context.Context) error {
	for id, b := range e.limbo.allAccess() {
		now := e.clock.now()
		if err := e.update(ctx, now, func(t store.Txn) error { return beginAccess(t, id, b.why, b.verdict, now) }); err != nil {
			return err
		}
		// The sweep key stands for it now; its requests are withdrawn before
		// anybody may decide them.
		if err := e.withdrawRequests(ctx, b.why.Access.Selector, b.why); err != nil {
			return err
		}
		e.limbo.mu.Lock()
		delete(e.limbo.access, id)
		e.limbo.mu.Unlock()
	}
	for id, b := range e.limbo.allCuts() {
		if err := e.update(ctx, e.clock.now(), func(t store.Txn) error { return beginCutOff(t, id, b.rec, b.verdict) }); err != nil {
			return err
		}
		e.limbo.mu.Lock()
		if e.limbo.cuts[id].rec.Cut == b.rec.Cut {
			delete(e.limbo.cuts, id)
		}
		e.limbo.mu.Unlock()
		e.carryOutNow(id)
	}
	incidents, grants := e.limbo.all()
	for id, why := range incidents {
		now := e.clock.now()
		err := e.update(ctx, now, func(t store.Txn) error { _, err := closeIncident(t, id, now, why); return err })
		if err == nil {
			_, err = e.sweepIncident(ctx, id, why)
		}
		if err != nil {
			return err
		}
		e.limbo.mu.Lock()
		delete(e.limbo.incidents, id)
		e.limbo.mu.Unlock()
	}
	for id, why := range grants {
		now := e.clock.now()
		err := e.update(ctx, now, func(t store.Txn) error { return withdraw(t, id, now, why) })
		if err == nil {
			_, err = e.sweepGrant(ctx, id, why)
		}
		if err != nil {
			return err
		}
		e.limbo.mu.Lock()
		delete(e.limbo.grants, id)
		e.limbo.mu.Unlock()
	}
	return nil
}
