package lease

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/audit"
	"github.com/mayfly-security/mayfly/broker/failpoint"
	"github.com/mayfly-security/mayfly/broker/policy"
	"github.com/mayfly-security/mayfly/store"
)

// The kill switch ends what there is at one instant. The decision is one commit
// of a sweep key that holds the selector; from there on it is carried through
// whatever becomes of the caller or the broker, and the key goes when all that
// it matched is dead, or has lapsed. It forbids nothing for later: that is for
// catalog and policies.

// accessEnding is what the sweep key of a kill switch holds.
type accessEnding struct {
	Selector Selector
	At       time.Time
	// Told is when everything that it matched had been told, zero before: what
	// is left is to see dead what was made until then.
	Told time.Time `json:",omitzero"`
}

// endings are the kill switches that a call carries through in this process,
// so that the housekeeper leaves them alone. The zero value is ready.
type endings struct {
	mu  sync.Mutex
	now map[string]struct{}
	// alive is a lease of each kill switch that was not dead when last looked at.
	alive map[string]broker.LeaseID
}

func (d *endings) begin(id string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.now == nil {
		d.now, d.alive = map[string]struct{}{}, map[string]broker.LeaseID{}
	}
	d.now[id] = struct{}{}
}

func (d *endings) done(id string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.now, id)
}

func (d *endings) has(id string) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	_, is := d.now[id]
	return is
}

func (d *endings) lastAlive(id string) broker.LeaseID {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.alive[id]
}

func (d *endings) setAlive(id string, l broker.LeaseID) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if l == "" {
		delete(d.alive, id)
		return
	}
	if d.alive == nil {
		d.now, d.alive = map[string]struct{}{}, map[string]broker.LeaseID{}
	}
	d.alive[id] = l
}

// EndAccess withdraws every grant and request, and ends every lease, that the
// selector matches. It calls told with what there is, and again whenever that
// changes, until none is left or ctx ends; an error of told ends the telling
// alone, and is returned. With dry it only counts, and calls told once.
//
// What was begun is carried through without the caller, and after a crash.
func (e *Engine) EndAccess(ctx context.Context, caller broker.Caller, s Selector, dry bool, reason string, told func(Radius) error) error {
	err := e.endAccess(ctx, caller, s, dry, reason, told)
	if _, refused := err.(*broker.Error); refused {
		e.Refused(ctx, caller, "end_access", s.Tool, err)
	}
	return err
}

func (e *Engine) endAccess(ctx context.Context, caller broker.Caller, s Selector, dry bool, reason string, told func(Radius) error) error {
	if e.closed.Load() {
		return broker.Refuse(broker.ReasonShuttingDown, "the broker is stopping", "try again")
	}
	ep := e.current.Load() // ending does not wait for a reload
	verdict, err := e.administer(ctx, ep, caller, policy.VerbEndAccess)
	if err != nil {
		return err
	}
	if err := s.check(); err != nil {
		return err
	}
	if !dry {
		err = requireReason(reason, "ending access")
	} else {
		err = broker.CheckText("reason", reason, broker.MaxReason)
	}
	if err != nil {
		return err
	}
	if dry {
		rad, _, err := e.radius(ctx, s, e.clock.now())
		if err != nil {
			return err
		}
		return told(rad)
	}
	now := e.clock.now()
	id := string(broker.NewCorrelationID(now))
	why := sweepRecord{Cause: broker.CauseRevoked, Actor: caller.Principal().String(), Reason: reason, Correlation: caller.Correlation,
		By: permissionOf(verdict), Access: &accessEnding{Selector: s, At: now}}
	e.ending.begin(id)
	err = e.update(ctx, now, func(t store.Txn) error { return beginAccess(t, id, why, verdict, now) })
	if err != nil {
		e.ending.done(id)
		if untellable(err) {
			e.limbo.endsAccess(id, begunEnding{why, verdict})
			err = e.endAccessAnyway(ctx, s, why, err)
		}
		return err
	}
	e.log.Warn("KILL SWITCH: access is being ended", "selector", s.String(), "actor", why.Actor, "reason", reason, "correlation", why.Correlation)
	rad, ids, err := e.radius(context.WithoutCancel(ctx), s, now)
	if err != nil {
		e.ending.done(id)
		e.house.poke() // it goes on
		return err
	}
	swept := make(chan *accessEnding, 1)
	e.wg.Go(func() {
		defer e.ending.done(id)
		told, err := e.sweepAccess(e.ctx, id, why)
		if err != nil {
			e.log.Error("ending access: it goes on", "selector", s.String(), "error", err)
			e.house.poke()
			return
		}
		swept <- told
	})
	return e.countDown(ctx, id, why, rad, ids, swept, told)
}

// beginAccess is the commit that decides a kill switch.
func beginAccess(t store.Txn, id string, why sweepRecord, verdict policy.Verdict, now time.Time) error {
	key := keySweep(sweepAccess, id)
	if _, begun, err := get[sweepRecord](t, key); err != nil || begun {
		return err
	}
	if err := put(t, key, why); err != nil {
		return err
	}
	return appendEvent(t, audit.Event{Time: now, Type: audit.AccessEnding, Actor: why.Actor, Reason: why.Reason, Correlation: why.Correlation,
		Details: tellVerdict(map[string]string{"selector": why.Access.Selector.String(), "ending": id}, verdict)})
}

// tellEvery is how often, at most, a caller is told how the ending goes on.
const tellEvery = 100 * time.Millisecond

// countDown tells how the ending goes on, until nothing is left.
func (e *Engine) countDown(ctx context.Context, id string, why sweepRecord, rad Radius, left []broker.LeaseID, swept <-chan *accessEnding, told func(Radius) error) error {
	if len(left) > 0 {
		if err := told(rad); err != nil {
			return err
		}
	}
	last := rad
	sweeping := true
	grants := map[broker.GrantID]struct{}{} // of the leases that have ended
	for {
		changed := e.watch.next()
		began := time.Now()
		still, err := e.stillAlive(ctx, left, &rad, grants)
		if err != nil {
			return err
		}
		left = still
		rad.Alive = len(left)
		if len(left) == 0 && !sweeping && e.finishAccess(context.WithoutCancel(ctx), id, why) {
			// What was on its way when it began is over too, or says so.
			if err := e.awaitDeliveries(ctx, slices.Collect(maps.Keys(grants))...); err != nil {
				return err
			}
			rad.Done = true
			return told(rad)
		}
		if rad.Alive != last.Alive || rad.Overdue != last.Overdue || rad.Lapsed != last.Lapsed {
			if err := told(rad); err != nil {
				return err
			}
			last = rad
		}
		// A look at very many takes its time; most of the time is for others.
		pause := time.NewTimer(max(tellEvery, 10*time.Since(began)))
		late := time.NewTimer(time.Second) // what becomes overdue, or is met later, signals nothing
		select {
		case <-changed:
			select {
			case <-pause.C:
			case <-ctx.Done():
			case <-e.ctx.Done():
			}
		case why.Access = <-swept:
			sweeping, swept = false, nil
			// Leases that were being made when the counting began are among them now.
			met, err := e.selectedLeases(ctx, why.Access)
			if err != nil {
				return err
			}
			left = slices.Compact(slices.Sorted(slices.Values(append(met, left...))))
		case <-late.C:
			if sweeping && !e.ending.has(id) {
				// The housekeeper goes on with what failed.
				if sweeping, err = e.sweepingStill(ctx, id, &why); err != nil {
					return err
				}
			}
		case <-ctx.Done():
		case <-e.ctx.Done():
		}
		pause.Stop()
		late.Stop()
		if err := ctx.Err(); err != nil {
			return err
		}
		if e.ctx.Err() != nil {
			return broker.Refuse(broker.ReasonShuttingDown, "the broker is stopping; the ending goes on when it is back", "list the leases that are left with `mayfly leases`")
		}
	}
}

// stillAlive looks at leases, counts those that are overdue, or have lapsed
// since, and adds the grants of those that have ended.
func (e *Engine) stillAlive(ctx context.Context, ids []broker.LeaseID, rad *Radius, grants map[broker.GrantID]struct{}) (still []broker.LeaseID, err error) {
	now := e.clock.now()
	overdue, lapsed := 0, 0
	for part := range slices.Chunk(ids, lookPage) {
		err := e.view(context.WithoutCancel(ctx), func(r store.Reader) error {
			for _, id := range part {
				l, ok, err := get[leaseRecord](r, keyLease(id))
				switch {
				case err != nil:
					return err
				case !ok: // forgotten long after its end
				case !l.State.Ended():
					still = append(still, id)
					if l.Overdue(now) {
						overdue++
					}
				default:
					grants[l.Grant] = struct{}{}
					if l.State == broker.LeaseLapsed {
						lapsed++
					}
				}
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	rad.Overdue = overdue
	rad.Lapsed += lapsed
	return still, nil
}

// resumeAccess goes on with a kill switch that an earlier run, or a call that
// failed, left.
func (e *Engine) resumeAccess(ctx context.Context, id string, why sweepRecord) error {
	if why.Access == nil {
		return fmt.Errorf("the sweep %s has no selector", id)
	}
	if e.ending.has(id) {
		return nil
	}
	if why.Access.Told.IsZero() {
		_, err := e.sweepAccess(ctx, id, why)
		return err
	}
	e.finishAccess(ctx, id, why)
	return nil
}

// selectedLeases are the leases that a kill switch has ended and that are not dead.
func (e *Engine) selectedLeases(ctx context.Context, a *accessEnding) (ids []broker.LeaseID, err error) {
	met := map[broker.LeaseID]struct{}{}
	err = a.Selector.matching(ctx, e, a.Told, func(l *leaseRecord) bool {
		if _, twice := met[l.ID]; !twice {
			met[l.ID] = struct{}{}
			ids = append(ids, l.ID)
		}
		return true
	})
	return ids, err
}

// sweepingStill reads how far the housekeeper has come with a kill switch.
func (e *Engine) sweepingStill(ctx context.Context, id string, why *sweepRecord) (still bool, err error) {
	err = e.view(ctx, func(r store.Reader) error {
		rec, ok, err := get[sweepRecord](r, keySweep(sweepAccess, id))
		if err == nil && ok && rec.Access != nil {
			*why = rec
			still = rec.Access.Told.IsZero()
		}
		return err
	})
	return still, err
}

// sweepAccess tells everything that a kill switch matches. Requests come first:
// one that is granted meanwhile is then found among the grants.
func (e *Engine) sweepAccess(ctx context.Context, id string, why sweepRecord) (*accessEnding, error) {
	s := why.Access.Selector
	failpoint.At("lease.sweep.begin")
	if err := e.withdrawRequests(ctx, s, why); err != nil {
		return nil, err
	}
	grants, err := e.selected(ctx, prefixGrants, func(r store.Reader, id string) (bool, error) {
		g, ok, err := get[broker.Grant](r, keyGrant(broker.GrantID(id)))
		return ok && s.grant(e.current.Load(), g), err
	})
	if err != nil {
		return nil, err
	}
	now := e.clock.now()
	ended := why
	ended.Access = nil
	for part := range slices.Chunk(grants, grantChunk) {
		err := e.update(ctx, now, func(t store.Txn) error {
			for _, id := range part {
				if err := withdraw(t, broker.GrantID(id), now, ended); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	failpoint.At("lease.sweep.told")
	for _, id := range grants {
		if _, err := e.sweepGrant(ctx, broker.GrantID(id), ended); err != nil {
			return nil, err
		}
	}
	// What is left are leases of grants that had ended before. After two looks
	// that found nothing new none was passed over.
	told := &accessEnding{Selector: s, At: why.Access.At, Told: e.clock.now()}
	for clean := 0; clean < 2; {
		var ids []broker.LeaseID
		err := s.matching(ctx, e, told.Told, func(l *leaseRecord) bool {
			if l.State != broker.LeaseRevoking {
				ids = append(ids, l.ID)
			}
			return true
		})
		if err != nil {
			return nil, err
		}
		if clean++; len(ids) > 0 {
			clean = 0
		}
		if _, err := e.endLeases(ctx, ids, ended.ending()); err != nil {
			return nil, err
		}
	}
	failpoint.At("lease.sweep.end")
	why.Access = told
	return told, e.update(ctx, e.clock.now(), func(t store.Txn) error { return put(t, keySweep(sweepAccess, id), why) })
}

// withdrawRequests takes back the pending requests that a selector matches.
func (e *Engine) withdrawRequests(ctx context.Context, s Selector, why sweepRecord) error {
	ids, err := e.selected(ctx, prefixWaiting, func(r store.Reader, id string) (bool, error) {
		rec, ok, err := get[requestRecord](r, keyRequest(broker.RequestID(id)))
		return ok && s.request(e.current.Load(), rec), err
	})
	if err != nil {
		return err
	}
	now := e.clock.now()
	for part := range slices.Chunk(ids, requestChunk) {
		ended := 0
		err := e.update(ctx, now, func(t store.Txn) error {
			ended = 0
			for _, id := range part {
				is, err := endPending(t, broker.RequestID(id), now, broker.RequestWithdrawn, by{why.Actor, why.Correlation, why.By}, why.Reason)
				if err != nil {
					return err
				}
				if is {
					ended++
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
		e.requestsEnded(broker.RequestWithdrawn, ended)
	}
	return nil
}

// selected lists the IDs behind the keys of a prefix that is wants.
func (e *Engine) selected(ctx context.Context, prefix string, is func(r store.Reader, id string) (bool, error)) (ids []string, err error) {
	err = e.paged(ctx, prefix, func(r store.Reader, key string) (bool, error) {
		ok, err := is(r, lastPart(key))
		if ok {
			ids = append(ids, lastPart(key))
		}
		return true, err
	})
	return ids, err
}

// finishAccess records that all that a kill switch matched is dead, or has
// lapsed, if it is so. In doubt it is not.
func (e *Engine) finishAccess(ctx context.Context, id string, why sweepRecord) bool {
	s := why.Access.Selector
	if last := e.ending.lastAlive(id); last != "" {
		alive := false
		err := e.view(ctx, func(r store.Reader) error {
			l, ok, err := get[leaseRecord](r, keyLease(last))
			alive = ok && !l.State.Ended()
			return err
		})
		if err != nil || alive {
			return false
		}
	}
	for range 2 { // one that moved while it was looked for is met the second time
		var alive broker.LeaseID
		err := s.matching(ctx, e, why.Access.Told, func(l *leaseRecord) bool {
			alive = l.ID
			return false
		})
		if err != nil {
			e.log.Error("looking for leases that are being ended", "selector", s.String(), "error", err)
			return false
		}
		if e.ending.setAlive(id, alive); alive != "" {
			return false
		}
	}
	now := e.clock.now()
	err := e.update(ctx, now, func(t store.Txn) error {
		_, ok, err := get[sweepRecord](t, keySweep(sweepAccess, id))
		if err != nil || !ok {
			return err // it was recorded
		}
		if err := t.Delete(keySweep(sweepAccess, id)); err != nil {
			return err
		}
		return appendEvent(t, audit.Event{Time: now, Type: audit.AccessEnded, Actor: why.Actor, Reason: why.Reason, Correlation: why.Correlation,
			Details: map[string]string{"selector": s.String(), "ending": id, "since": why.Access.At.Format(time.RFC3339)}})
	})
	if err != nil {
		e.log.Error("recording that access was ended", "selector", s.String(), "error", err)
		return false
	}
	e.log.Warn("KILL SWITCH: all that it matched is dead, or has lapsed", "selector", s.String())
	return true
}

// endAccessAnyway ends access that the store could not be told of.
func (e *Engine) endAccessAnyway(ctx context.Context, s Selector, why sweepRecord, cause error) error {
	why.Access = nil
	ids, err := e.selected(context.WithoutCancel(ctx), prefixGrants, func(r store.Reader, id string) (bool, error) {
		g, ok, err := get[broker.Grant](r, keyGrant(broker.GrantID(id)))
		return ok && s.grant(e.current.Load(), g), err
	})
	if err != nil {
		return err
	}
	grants := make([]broker.GrantID, len(ids))
	for i, id := range ids {
		grants[i] = broker.GrantID(id)
		e.limbo.withdraws(grants[i], why)
	}
	var rest []broker.LeaseID
	err = s.matching(context.WithoutCancel(ctx), e, e.clock.now(), func(l *leaseRecord) bool {
		rest = append(rest, l.ID)
		return true
	})
	if err != nil {
		return err
	}
	e.doom(rest, why.ending())
	return e.endAnyway(ctx, grants, why, cause)
}
