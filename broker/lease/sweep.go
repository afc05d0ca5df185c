package lease

import (
	"context"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/audit"
	"github.com/mayfly-security/mayfly/broker/failpoint"
	"github.com/mayfly-security/mayfly/broker/policy"
	"github.com/mayfly-security/mayfly/store"
)

// A change that ends leases (a close, a withdrawal, a reload) is one commit on
// a guard key and, in the same transaction, a sweep key. From that commit on
// nothing of it can be delivered. The leases that were alive are told by the
// sweep, which may take many transactions; its key goes when it is done, and
// one that a crash interrupted is done again at the next start.

// sweepRecord is the value of a sweep key.
type sweepRecord struct {
	Cause       broker.Cause
	Actor       string
	Reason      string
	Correlation broker.CorrelationID
	By          permission    `json:",omitzero"`
	Access      *accessEnding `json:",omitempty"` // of a sweep of kind access
}

const (
	sweepIncident = "incident"
	sweepGrants   = "grant"
	sweepCatalog  = "catalog"
	sweepPerson   = "person" // by personDigest
	sweepAccess   = "access" // the kill switch, by an ID of its own
	sweepCutOff   = "cutoff" // by cutOffID
)

func (s sweepRecord) ending() ending {
	return ending{cause: s.Cause, actor: s.Actor, reason: s.Reason, correlation: s.Correlation, by: s.By}
}

// resumeSweeps does what an earlier run, or an attempt that failed, left.
func (e *Engine) resumeSweeps(ctx context.Context) error {
	type pending struct {
		kind, id string
		rec      sweepRecord
	}
	var todo []pending
	err := e.store.View(ctx, func(r store.Reader) error {
		todo = todo[:0]
		from, to := store.Prefix(prefixSweep)
		for entry, err := range r.Scan(from, to) {
			if err != nil {
				return err
			}
			rec, err := decode[sweepRecord](entry.Key, entry.Value)
			if err != nil {
				return err
			}
			kind, id := splitSweep(entry.Key)
			todo = append(todo, pending{kind, id, rec})
		}
		return nil
	})
	for _, p := range todo {
		if err != nil {
			break
		}
		switch p.kind {
		case sweepIncident:
			_, err = e.sweepIncident(ctx, broker.IncidentID(p.id), p.rec)
		case sweepGrants:
			_, err = e.sweepGrant(ctx, broker.GrantID(p.id), p.rec)
		case sweepCatalog:
			_, err = e.sweepCatalog(ctx)
		case sweepPerson:
			_, err = e.sweepPerson(ctx, p.id, p.rec)
		case sweepAccess:
			err = e.resumeAccess(ctx, p.id, p.rec)
		case sweepCutOff:
			e.resumeCutOff(p.id)
		default:
			err = fmt.Errorf("there is no sweep of kind %q", p.kind)
		}
	}
	return err
}

func splitSweep(key string) (kind, id string) {
	id = lastPart(key)
	return key[len(prefixSweep) : len(key)-len(id)-1], id
}

// swept removes the key of a sweep that is done.
func (e *Engine) swept(ctx context.Context, kind, id string) error {
	return e.update(ctx, e.clock.now(), func(t store.Txn) error { return t.Delete(keySweep(kind, id)) })
}

// sweepIncident ends the grants of a closed incident and their leases, and
// returns the leases that had not ended.
func (e *Engine) sweepIncident(ctx context.Context, id broker.IncidentID, why sweepRecord) ([]broker.LeaseID, error) {
	var in broker.Incident
	err := e.store.View(ctx, func(r store.Reader) (err error) {
		in, _, err = get[broker.Incident](r, keyIncident(id))
		return err
	})
	if err != nil {
		return nil, err
	}
	failpoint.At("lease.sweep.begin")
	var all []broker.LeaseID
	for _, g := range in.Grants {
		ids, err := e.endGrantLeases(ctx, g, why.ending())
		if err != nil {
			return nil, err
		}
		all = append(all, ids...)
	}
	if err := e.sweepRequests(ctx, id); err != nil {
		return nil, err
	}
	failpoint.At("lease.sweep.told")
	now := e.clock.now()
	for part := range slices.Chunk(in.Grants, grantChunk) {
		err := e.update(ctx, now, func(t store.Txn) error {
			for _, g := range part {
				if err := endGrant(t, g, now, broker.GrantClosed, why); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	failpoint.At("lease.sweep.end")
	return all, e.swept(ctx, sweepIncident, string(id))
}

// sweepGrant ends the leases of a grant that is over.
func (e *Engine) sweepGrant(ctx context.Context, id broker.GrantID, why sweepRecord) ([]broker.LeaseID, error) {
	ids, err := e.endGrantLeases(ctx, id, why.ending())
	if err != nil {
		return nil, err
	}
	return ids, e.swept(ctx, sweepGrants, string(id))
}

// over is what does not hold of an open grant.
type over struct {
	grant   broker.Grant
	cause   broker.Cause
	verdict policy.Verdict
	leases  []broker.LeaseID            // that have not ended, and are over
	whys    map[string][]broker.LeaseID // the same, by why, for people
}

// over finds what of an open grant does not hold by this epoch; is reports
// whether there is any. Policies may decide by values that the grant leaves to
// its leases: then each lease is judged by its own.
func (ep *epoch) over(r store.Reader, id broker.GrantID, now time.Time) (o over, is bool, err error) {
	f, err := ep.read(r, id, nil, now)
	if err != nil {
		return o, false, err
	}
	cause, holds := f.Holds(now)
	o = over{grant: f.Grant, cause: cause, verdict: f.Policy, whys: map[string][]broker.LeaseID{}}
	each := f.AgentKnown && f.ToolKnown && free(f) && (holds || cause == broker.CausePolicy)
	if holds && !each {
		return o, false, nil
	}
	n := 0
	for entry, err := range r.Scan(store.Prefix(prefixOpen(id))) {
		if err != nil {
			return o, false, err
		}
		n++
		lease := broker.LeaseID(lastPart(entry.Key))
		if each {
			l, err := mustLease(r, lease)
			if err != nil {
				return o, false, err
			}
			v := ep.decide(ep.aboutGrant(f, l.Params, now))
			if v.Allowed {
				continue
			}
			o.cause, o.verdict = broker.CausePolicy, v
		}
		o.leases = append(o.leases, lease)
		why := becauseOf(o.cause, o.verdict)
		o.whys[why] = append(o.whys[why], lease)
	}
	return o, len(o.leases) > 0 || n == 0 && !holds, nil
}

// free reports whether the grant leaves values of parameters to its leases.
func free(f policy.GrantFacts) bool {
	if f.Grant.Request != "" {
		return false
	}
	for _, p := range f.Tool.Params {
		if _, fixed := f.Grant.Params[p.Name]; !fixed {
			return true
		}
	}
	return false
}

// overAll finds what does not hold of all open grants.
func (e *Engine) overAll(ctx context.Context, ep *epoch, each func(r store.Reader, o over) error) error {
	now := e.clock.now()
	return e.paged(ctx, prefixGrants, func(r store.Reader, key string) (bool, error) {
		o, is, err := ep.over(r, broker.GrantID(lastPart(key)), now)
		if err == nil && is {
			err = each(r, o)
		}
		return true, err
	})
}

// sweepCatalog ends the leases of every grant that does not hold by the
// catalog as it is now, and makes void the requests that cannot be decided any
// more. It returns those grants. They stay: they hold again if what changed is
// changed back. One whose voter has lost the group that it stood on is over for
// good.
func (e *Engine) sweepCatalog(ctx context.Context) ([]broker.GrantID, error) {
	ep := e.settled()
	var gone []over
	if err := e.overAll(ctx, ep, func(_ store.Reader, o over) error { gone = append(gone, o); return nil }); err != nil {
		return nil, err
	}
	var grants, lost []broker.GrantID
	causes := map[ending][]broker.LeaseID{}
	for _, o := range gone {
		grants = append(grants, o.grant.ID)
		if o.cause == broker.CauseVoterLost {
			lost = append(lost, o.grant.ID)
		} else {
			o.into(causes)
		}
	}
	for why, ids := range causes {
		if _, err := e.endLeases(ctx, ids, why); err != nil {
			return nil, err
		}
	}
	if err := e.endForGood(ctx, lost, sweepRecord{Cause: broker.CauseVoterLost, Actor: audit.Broker}); err != nil {
		return nil, err
	}
	if err := e.sweepRequests(ctx, ""); err != nil {
		return nil, err
	}
	// A reload that came meanwhile has a sweep of its own to do.
	return grants, e.update(ctx, e.clock.now(), func(t store.Txn) error {
		cat, _, err := get[catalogRecord](t, keyCatalog)
		if err != nil || cat.Generation != ep.generation {
			return err
		}
		return t.Delete(keySweep(sweepCatalog, "all"))
	})
}

// into adds what is over to leases by why they end.
func (o over) into(all map[ending][]broker.LeaseID) {
	for why, ids := range o.whys {
		e := ending{cause: o.cause, actor: audit.Broker, reason: why}
		all[e] = append(all[e], ids...)
	}
}

// becauseOf says for people which policies ended what they do not allow.
func becauseOf(cause broker.Cause, v policy.Verdict) string {
	if cause != broker.CausePolicy {
		return ""
	}
	return "policy set " + v.Digest + " does not allow it: " + v.Why()
}

// awaitDeliveries returns when every delivery under the grants that had begun
// is over. Whoever ended the grants calls it before it answers, and after the
// leases were told: an agent that takes its secret slowly, or never, holds up
// the answer and not the end.
func (e *Engine) awaitDeliveries(ctx context.Context, grants ...broker.GrantID) error {
	for _, id := range grants {
		if err := e.deliveries.wait(ctx, id); err != nil {
			return fmt.Errorf("waiting for deliveries under grant %s: %w", id, err)
		}
	}
	return nil
}

// endGrantLeases ends the leases of a grant that can no longer give. It
// returns those that had not ended.
func (e *Engine) endGrantLeases(ctx context.Context, id broker.GrantID, why ending) ([]broker.LeaseID, error) {
	var ids []broker.LeaseID
	err := e.store.View(ctx, func(r store.Reader) error {
		ids = ids[:0]
		from, to := store.Prefix(prefixOpen(id))
		for entry, err := range r.Scan(from, to) {
			if err != nil {
				return err
			}
			ids = append(ids, broker.LeaseID(lastPart(entry.Key)))
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	if _, err := e.endLeases(ctx, ids, why); err != nil {
		return nil, err
	}
	return ids, nil
}

// endLeases moves leases to revoking and wakes their providers' workers. It
// returns how many it moved; those that were there already are left alone.
func (e *Engine) endLeases(ctx context.Context, ids []broker.LeaseID, why ending) (moved int, err error) {
	now := e.clock.now()
	counts := make([]int, (len(ids)+chunk-1)/chunk)
	wake := make([]map[string]struct{}, len(counts))
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(8)
	i := 0
	for part := range slices.Chunk(ids, chunk) {
		n := i
		i++
		g.Go(func() error {
			return e.update(gctx, now, func(t store.Txn) error {
				counts[n], wake[n] = 0, map[string]struct{}{}
				for _, id := range part {
					l, err := mustLease(t, id)
					if err != nil {
						return err
					}
					if l.State == broker.LeaseRevoking || l.State.Ended() {
						continue
					}
					counts[n]++
					wake[n][l.Provider] = struct{}{}
					if err := startRevoking(t, l, now, why); err != nil {
						return err
					}
				}
				return nil
			})
		})
	}
	err = g.Wait()
	if untellable(err) {
		e.doom(ids, why) // what ends does not wait for the store
	}
	for n := range counts {
		moved += counts[n]
		for provider := range wake[n] {
			e.wake(provider)
		}
	}
	return moved, err
}

// awaitEnd waits, for at most the configured time, until the leases have
// ended, and returns what became of them.
func (e *Engine) awaitEnd(ctx context.Context, ids []broker.LeaseID) (Ended, error) {
	timer := time.NewTimer(e.cfg.EndWait)
	defer timer.Stop()
	left := slices.Clone(ids)
	var ended Ended
	for {
		changed := e.watch.next()
		var seen Ended
		err := e.store.View(ctx, func(r store.Reader) error {
			seen = Ended{}
			var still []broker.LeaseID
			for _, id := range left {
				l, err := mustLease(r, id)
				switch {
				case err != nil:
					return err
				case !l.State.Ended():
					still = append(still, id)
				case l.State == broker.LeaseLapsed:
					seen.Lapsed++
				default:
					seen.Dead++
				}
			}
			left = still
			return nil
		})
		if err != nil {
			return Ended{}, err
		}
		ended = Ended{Dead: ended.Dead + seen.Dead, Lapsed: ended.Lapsed + seen.Lapsed, Revoking: len(left)}
		if len(left) == 0 {
			return ended, nil
		}
		select {
		case <-changed:
		case <-timer.C:
			return ended, nil
		case <-ctx.Done():
			return ended, nil
		}
	}
}
