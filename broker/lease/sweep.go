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
}

const (
	sweepIncident = "incident"
	sweepGrants   = "grant"
	sweepCatalog  = "catalog"
)

func (s sweepRecord) ending() ending {
	return ending{cause: s.Cause, actor: s.Actor, reason: s.Reason, correlation: s.Correlation}
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
	failpoint.At("lease.sweep.told")
	now := e.clock.now()
	for part := range slices.Chunk(in.Grants, chunk) {
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

// sweepCatalog ends the leases of every grant that does not hold by the
// catalog as it is now, and returns those grants. They stay: they hold again if
// what changed is changed back.
func (e *Engine) sweepCatalog(ctx context.Context) ([]broker.GrantID, error) {
	ep := e.settled()
	type over struct {
		id    broker.GrantID
		cause broker.Cause
	}
	var gone []over
	err := e.store.View(ctx, func(r store.Reader) error {
		gone = gone[:0]
		from, to := store.Prefix(prefixGrants)
		for entry, err := range r.Scan(from, to) {
			if err != nil {
				return err
			}
			id := broker.GrantID(lastPart(entry.Key))
			f, err := ep.read(r, id)
			if err != nil {
				return err
			}
			if cause, ok := f.Holds(e.clock.now()); !ok {
				gone = append(gone, over{id, cause})
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	grants := make([]broker.GrantID, len(gone))
	for i, g := range gone {
		grants[i] = g.id
		if _, err := e.endGrantLeases(ctx, g.id, ending{cause: g.cause, actor: audit.Broker}); err != nil {
			return nil, err
		}
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
