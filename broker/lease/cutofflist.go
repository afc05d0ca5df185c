package lease

import (
	"cmp"
	"context"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/policy"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/store"
)

// CutOff is a cut-off, and how far it has come.
type CutOff struct {
	Provider string
	Cut      providers.Cut
	Actor    string    // empty for one that was only looked at
	Reason   string    // the same
	At       time.Time // the same
	// Leases are the broker's own open leases that it hit, or would; Alive those
	// that are not known to be dead now.
	Leases, Alive   int
	ByAgent, ByTool map[string]int // of Alive
	Progress        broker.Progress
	Failing         bool // the provider did not take it when it was last asked; it is tried again
}

// view is what people see of a cut-off.
func (c cutOffRecord) view(alive map[broker.LeaseID]*leaseRecord) CutOff {
	v := CutOff{Provider: c.Provider, Cut: c.Cut, Actor: c.Actor, Reason: c.Reason, At: c.At, Leases: c.Leases, Alive: len(alive),
		ByAgent: map[string]int{}, ByTool: map[string]int{}, Progress: c.Progress, Failing: c.Failing}
	for _, l := range alive {
		v.ByAgent[l.Agent.String()]++
		v.ByTool[l.Tool]++
	}
	return v
}

// CutOffs lists the roles that are cut off, to operators: until what was made
// before is dead by itself.
func (e *Engine) CutOffs(ctx context.Context, caller broker.Caller, after string, size int) (Page[CutOff], error) {
	if _, err := e.administer(ctx, e.current.Load(), caller, policy.VerbCutOff); err != nil {
		e.Refused(ctx, caller, "list_cut_offs", "", err)
		return Page[CutOff]{}, err
	}
	recs, err := page(ctx, e.store, prefixCutOff, after, size, func(r store.Reader, key string) (cutOffRecord, bool, error) {
		return get[cutOffRecord](r, key)
	})
	if err != nil {
		return Page[CutOff]{}, storeRefusal(err)
	}
	alive, err := e.alive(ctx, recs.Items)
	if err != nil {
		return Page[CutOff]{}, err
	}
	out := Page[CutOff]{Next: recs.Next}
	for _, rec := range recs.Items {
		out.Items = append(out.Items, rec.view(alive[cutOffID(rec.Provider, rec.Cut.Role)]))
	}
	return out, nil
}

// alive are the open leases that cut-offs hit, by cutOffID: one look at the
// leases of each provider. Of one that is not in the catalog there are none.
func (e *Engine) alive(ctx context.Context, recs []cutOffRecord) (map[string]map[broker.LeaseID]*leaseRecord, error) {
	byID, names := map[string]cutOffRecord{}, map[string]struct{}{}
	for _, rec := range recs {
		byID[cutOffID(rec.Provider, rec.Cut.Role)] = rec
		names[rec.Provider] = struct{}{}
	}
	all := map[string]map[broker.LeaseID]*leaseRecord{}
	for name := range names {
		p, able, err := e.cutter(e.current.Load(), name)
		if err != nil {
			continue
		}
		err = e.openLeases(ctx, name, func(l *leaseRecord) bool {
			id := cutOffID(name, able.RoleOf(l.ending()))
			if rec, is := byID[id]; is && rec.hits(l.CreatedAt) {
				if all[id] == nil {
					all[id] = map[broker.LeaseID]*leaseRecord{}
				}
				all[id][l.ID] = l
			}
			return true
		})
		p.release()
		if err != nil {
			return nil, err
		}
	}
	return all, nil
}

// cuts are the cut-offs of a provider that must stand. It is
// providers.Config.Cuts.
func (e *Engine) cuts(ctx context.Context, provider string) (cuts []providers.Cut, err error) {
	early := e.clock.early()
	err = e.store.View(ctx, func(r store.Reader) error {
		cuts = cuts[:0]
		for rec, err := range cutOffsOf(r) {
			if err != nil {
				return err
			}
			if rec.Provider == provider && early.Before(rec.Cut.Until) {
				cuts = append(cuts, rec.Cut)
			}
		}
		return nil
	})
	return cuts, err
}

var cutOffsDesc = prometheus.NewDesc("mayfly_cut_offs", "Roles that are cut off, by provider and how far the last decision has come: requested, written or verified.", []string{"provider", "progress"}, nil)

// collectCutOffs tells how far cut-offs have come.
func (e *Engine) collectCutOffs(ctx context.Context, ch chan<- prometheus.Metric) {
	type of struct{ provider, progress string }
	counts := map[of]int{}
	err := e.view(ctx, func(r store.Reader) error {
		clear(counts)
		for rec, err := range cutOffsOf(r) {
			if err != nil {
				return err
			}
			counts[of{rec.Provider, string(cmp.Or(rec.Progress, broker.ProgressRequested))}]++
		}
		return nil
	})
	if err != nil {
		ch <- prometheus.NewInvalidMetric(cutOffsDesc, err)
		return
	}
	for k, n := range counts {
		ch <- prometheus.MustNewConstMetric(cutOffsDesc, prometheus.GaugeValue, float64(n), k.provider, k.progress)
	}
}
