package lease_test

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/audit"
	"github.com/mayfly-security/mayfly/broker/lease"
	"github.com/mayfly-security/mayfly/providers/providertest"
	"github.com/mayfly-security/mayfly/store"
)

// outsideTools are the tools of providers where minting has an effect.
var outsideTools = []string{"db.read", "vault.read", "cloud.read"}

// eachOutside runs a test for each kind of provider with an effect outside.
func eachOutside(t *testing.T, f func(t *testing.T, tool string)) {
	for _, tool := range outsideTools {
		t.Run(tool, func(t *testing.T) { bubble(t, func(t *testing.T) { f(t, tool) }) })
	}
}

// system is the outside system that a tool's credentials are in.
func (r *rig) system(tool string) *providertest.System {
	if tool == "cloud.read" {
		return r.asked
	}
	return r.world
}

// TestI1_IntentFirst: when a provider is asked to create, the store has the
// intent already, with its deadline.
func TestI1_IntentFirst(t *testing.T) {
	eachOutside(t, func(t *testing.T, tool string) {
		r := newRig(t)
		r.grant(support, tool, time.Hour)
		var seen atomic.Int32
		r.system(tool).SetScript(func(c providertest.Call) providertest.Fault {
			if c.Op == providertest.OpCreate {
				counts, err := r.engine.Counts(context.Background())
				if err != nil || counts.ByState[broker.LeaseMinting] != 1 {
					t.Errorf("at the create the store has %v, %v; want one lease minting", counts, err)
				}
				seen.Add(1)
			}
			return providertest.Fault{}
		})
		r.mustIssue(tool)
		if seen.Load() != 1 {
			t.Errorf("the provider was asked to create %d times", seen.Load())
		}
	})
}

// TestI1_UnknownOutcome: whatever a provider says after it may have acted, in
// the end nothing of it is left; and until nothing can come any more, nobody
// says that it is dead.
func TestI1_UnknownOutcome(t *testing.T) {
	for name, fault := range map[string]providertest.Fault{
		"fails before acting": {Effect: providertest.FailBefore},
		"lies after acting":   {Effect: providertest.ActThenFail},
		"cuts after acting":   {Effect: providertest.ActThenCut},
		"acts twice":          {Effect: providertest.Duplicate},
		"acts late":           {Late: 12 * time.Second},
		"never answers":       {Delay: time.Hour},
	} {
		t.Run(name, func(t *testing.T) {
			eachOutside(t, func(t *testing.T, tool string) {
				r := newRig(t)
				r.grant(support, tool, time.Hour)
				sys := r.system(tool)
				sys.SetScript(providertest.Rules(1, providertest.Rule{Op: providertest.OpCreate, N: 1, Fault: fault}))
				began := time.Now()
				d, err := r.issue(tool)
				if err == nil {
					// A repeated create may come to a good credential; then
					// both of it must die with the lease.
					time.Sleep(time.Second)
					if _, err := r.engine.RevokeLease(context.Background(), as(support), d.Lease.ID, ""); err != nil {
						t.Fatal(err)
					}
					r.wantState(d.Lease.ID, broker.LeaseRevoked, 30*time.Second)
				} else {
					r.wantReason(err, broker.ReasonProvider)
					var e *broker.Error
					if !errors.As(err, &e) || e.Lease == "" {
						t.Fatalf("the refusal names no lease: %v", err)
					}
					if l := r.lease(e.Lease); l.State.Ended() {
						t.Errorf("the lease is %s although something may still come", l.State)
					}
					l := r.wantState(e.Lease, broker.LeaseRevoked, 30*time.Second)
					if got := l.EndedAt.Sub(began); got < 15*time.Second {
						t.Errorf("its death was believed %s after it began; the attempt and what comes late take 15s", got)
					}
				}
				time.Sleep(time.Minute)
				if live := sys.Live(); len(live) != 0 {
					t.Errorf("left: %+v", live)
				}
			})
		})
	}
}

// TestI1_RefusedMeansNothing: a provider's definite no is over at once, and
// costs no use.
func TestI1_RefusedMeansNothing(t *testing.T) {
	eachOutside(t, func(t *testing.T, tool string) {
		r := newRig(t)
		r.grant(support, tool, time.Hour, func(g *lease.GrantRequest) { g.MaxUses = 1 })
		r.system(tool).SetScript(providertest.Rules(1, providertest.Rule{N: 1, Times: 1, Fault: providertest.Fault{Effect: providertest.Refuse}}))
		_, err := r.issue(tool)
		r.wantReason(err, broker.ReasonProviderRefused)
		r.mustIssue(tool) // the use was given back
	})
}

// TestI2_DurableBeforeDelivered: no secret comes out if the commit that makes
// its lease active does not succeed, and what was made is ended.
func TestI2_DurableBeforeDelivered(t *testing.T) {
	for _, tool := range []string{"db.read", "vault.read", "crm.read"} {
		for _, unknown := range []bool{false, true} {
			t.Run(tool, func(t *testing.T) {
				bubble(t, func(t *testing.T) {
					faulty := &faultyStore{}
					r := newRig(t, func(r *rig) { r.wrap = faulty.wrap })
					r.grant(support, tool, time.Hour)
					synctest.Wait()
					// The commit that makes it active is the last of the issue.
					n := map[string]int{"db.read": 2, "vault.read": 3, "crm.read": 1}[tool]
					faulty.failNth(n, unknown)
					d, err := r.issue(tool)
					if err == nil {
						t.Fatalf("delivered %s although its commit failed", d.Lease.ID)
					}
					r.wantReason(err, broker.ReasonStore)
					time.Sleep(time.Minute)
					if live := r.world.Live(); len(live) != 0 {
						t.Errorf("left: %+v", live)
					}
					p, err := r.engine.Leases(context.Background(), lease.LeaseFilter{}, "", 0)
					if err != nil || len(p.Items) != 0 {
						t.Errorf("leases that have not ended: %+v, %v", p.Items, err)
					}
				})
			})
		}
	}
}

// faultyStore is a store whose next Nth Update fails, before it is carried
// out or, with an unknown outcome, after.
type faultyStore struct {
	store.Store
	mu      sync.Mutex
	in      int
	unknown bool
	all     bool
}

func (f *faultyStore) wrap(s store.Store) store.Store { f.Store = s; return f }

func (f *faultyStore) failNth(n int, unknown bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.in, f.unknown = n, unknown
}

// failAll makes every Update fail until it is called with false.
func (f *faultyStore) failAll(on bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.all = on
}

func (f *faultyStore) Update(ctx context.Context, fn func(store.Txn) error) error {
	f.mu.Lock()
	hit, all := f.in == 1, f.all
	if f.in > 0 {
		f.in--
	}
	unknown := f.unknown
	f.mu.Unlock()
	switch {
	case all, hit && !unknown:
		return store.ErrUnavailable
	case hit:
		if err := f.Store.Update(ctx, fn); err != nil {
			return err
		}
		return errors.Join(store.ErrUnavailable, store.ErrUnknown)
	}
	return f.Store.Update(ctx, fn)
}

// TestI3_RetriedForEver: a provider that is away for hours keeps its leases
// overdue, counted and shown, and they die soon after it is back. (backoff/v4
// by itself gives up after 15 minutes.)
func TestI3_RetriedForEver(t *testing.T) {
	eachOutside(t, func(t *testing.T, tool string) {
		r := newRig(t)
		r.grant(support, tool, time.Hour)
		d := r.mustIssue(tool)
		sys := r.system(tool)
		sys.SetScript(func(c providertest.Call) providertest.Fault {
			if c.Op == providertest.OpEnd || c.Op == providertest.OpStatus {
				return providertest.Fault{Effect: providertest.FailBefore}
			}
			return providertest.Fault{}
		})
		if _, err := r.engine.RevokeLease(context.Background(), as(sam), d.Lease.ID, ""); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Hour)
		l := r.lease(d.Lease.ID)
		if l.State != broker.LeaseRevoking || !l.Overdue(time.Now()) {
			t.Errorf("after two hours: %s, overdue %v", l.State, l.Overdue(time.Now()))
		}
		if c, err := r.engine.Counts(context.Background()); err != nil || c.Overdue != 1 {
			t.Errorf("Counts = %+v, %v; want one overdue", c, err)
		}
		p, err := r.engine.Leases(context.Background(), lease.LeaseFilter{Overdue: true}, "", 0)
		if err != nil || len(p.Items) != 1 {
			t.Errorf("the overdue: %+v, %v", p.Items, err)
		}
		sys.SetScript(nil)
		time.Sleep(2 * time.Minute)
		if l := r.lease(d.Lease.ID); !l.State.Ended() {
			t.Errorf("two minutes after the provider's return the lease is %s", l.State)
		}
	})
}

// TestI3_OneSlowProviderHoldsUpNoOther: while one provider hangs, the leases of
// another end at once; and one lease that cannot be ended stops no other.
func TestI3_OneSlowProviderHoldsUpNoOther(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t)
		r.grant(support, "cloud.read", time.Hour)
		r.grant(support, "db.read", time.Hour)
		slow, fast, stuck := r.mustIssue("cloud.read"), r.mustIssue("db.read"), r.mustIssue("db.read")
		r.asked.SetScript(func(providertest.Call) providertest.Fault { return providertest.Fault{Delay: time.Hour} })
		name := func(id broker.LeaseID) string {
			for _, c := range r.world.Live() {
				if c.Lease() == id {
					return c.Name
				}
			}
			t.Fatalf("no credential of %s", id)
			return ""
		}
		r.world.SetScript(providertest.Rules(1, providertest.Rule{Op: providertest.OpEnd, Name: name(stuck.Lease.ID),
			Fault: providertest.Fault{Effect: providertest.FailBefore}}))
		for _, id := range []broker.LeaseID{slow.Lease.ID, stuck.Lease.ID} {
			if _, err := r.engine.RevokeLease(context.Background(), as(support), id, ""); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(10 * time.Minute) // the stuck one has failed often by now
		began := time.Now()
		if _, err := r.engine.RevokeLease(context.Background(), as(support), fast.Lease.ID, ""); err != nil {
			t.Fatal(err)
		}
		r.wantState(fast.Lease.ID, broker.LeaseRevoked, 6*time.Second)
		t.Logf("revoked in %s beside a slow provider and a stuck lease", time.Since(began))
	})
}

// TestI4_NeverMoreThanIsTrue: a provider that can only be asked is never said
// to have revoked before it is so.
func TestI4_NeverMoreThanIsTrue(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t)
		r.asked = nil
		r.stop()
		r.asked = providertest.NewSystem(providertest.SystemConfig{Settle: 20 * time.Second})
		r.drivers["asked"] = providertest.Driver{System: r.asked}
		r.start()
		r.grant(support, "cloud.read", time.Hour)
		d := r.mustIssue("cloud.read")
		if _, err := r.engine.RevokeLease(context.Background(), as(support), d.Lease.ID, ""); err != nil {
			t.Fatal(err)
		}
		progress := []broker.Progress{}
		for range 600 {
			l := r.lease(d.Lease.ID)
			if n := len(progress); n == 0 || progress[n-1] != l.Progress {
				progress = append(progress, l.Progress)
			}
			if live := len(r.asked.Live()); l.State.Ended() && live != 0 {
				t.Fatalf("said to be %s while it works", l.State)
			}
			time.Sleep(100 * time.Millisecond)
		}
		if l := r.lease(d.Lease.ID); l.State != broker.LeaseRevoked {
			t.Errorf("after a minute it is %s", l.State)
		}
		if len(progress) < 3 || progress[len(progress)-1] != broker.ProgressVerified {
			t.Errorf("the progress was %q", progress)
		}
	})
}

// TestI4_OfflineTokensSurvive: a token that resource servers verify offline is
// never said to be revoked; it expires, and not before its own end.
func TestI4_OfflineTokensSurvive(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t)
		g := r.grant(support, "docs.search", time.Hour)
		d := r.mustIssue("docs.search", ttl(10*time.Minute))
		_, ended, err := r.engine.WithdrawGrant(context.Background(), as(sam), g.ID, "")
		if err != nil || ended.Dead != 0 || ended.Revoking != 1 {
			t.Fatalf("withdrawing: %+v, %v", ended, err)
		}
		for time.Since(d.Lease.CreatedAt) < 10*time.Minute-time.Second {
			if l := r.lease(d.Lease.ID); l.State != broker.LeaseRevoking {
				t.Fatalf("it is %s while it can be used", l.State)
			}
			time.Sleep(5 * time.Second)
		}
		l := r.wantState(d.Lease.ID, broker.LeaseExpired, 30*time.Second)
		if l.EndedAt.Before(l.DiesAt) {
			t.Errorf("expired at %s, before it died at %s", l.EndedAt, l.DiesAt)
		}
	})
}

// TestI6_NoGivingWithoutEvidence: what gives is in the evidence as soon as it
// is in the store, whatever happens in between.
func TestI6_NoGivingWithoutEvidence(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t)
		r.open(time.Hour, tools...)
		for _, tool := range tools {
			d := r.mustIssue(tool)
			events := r.events(lease.EventFilter{Lease: d.Lease.ID, Type: audit.LeaseActive})
			if len(events) != 1 || events[0].Actor != support.String() || events[0].Correlation == "" || events[0].Incident == "" {
				t.Errorf("%s: the evidence of giving: %+v", tool, events)
			}
		}
		if n := len(r.events(lease.EventFilter{Type: audit.GrantCreated})); n != len(tools) {
			t.Errorf("%d grants in the evidence; want %d", n, len(tools))
		}
	})
}

// TestI6_EndingNeedsNoEvidence: while the store cannot be written nothing is
// given; what must end is ended as soon as it can be told.
func TestI6_StoreAway(t *testing.T) {
	bubble(t, func(t *testing.T) {
		faulty := &faultyStore{}
		r := newRig(t, func(r *rig) { r.wrap = faulty.wrap })
		r.grant(support, "db.read", time.Hour)
		d := r.mustIssue("db.read", ttl(time.Minute))
		faulty.failAll(true)
		_, err := r.issue("db.read")
		r.wantReason(err, broker.ReasonStore)
		time.Sleep(5 * time.Minute)
		if err := r.engine.Ready(context.Background()); broker.ReasonOf(err) != broker.ReasonStore {
			t.Errorf("Ready = %v", err)
		}
		faulty.failAll(false)
		time.Sleep(time.Minute)
		if l := r.lease(d.Lease.ID); !l.State.Ended() {
			t.Errorf("a minute after the store's return the lease is %s", l.State)
		}
		if err := r.engine.Ready(context.Background()); err != nil {
			t.Errorf("Ready = %v", err)
		}
	})
}

// TestI8_FailDead: if the broker disappears for ever, every credential dies by
// itself, no later than its lease's end.
func TestI8_FailDead(t *testing.T) {
	eachOutside(t, func(t *testing.T, tool string) {
		r := newRig(t)
		r.grant(support, tool, 20*time.Minute)
		l := r.mustIssue(tool).Lease
		r.engine.Close()
		for _, c := range r.system(tool).Live() {
			if c.DiesAt.After(l.End) {
				t.Errorf("the credential dies at %s, after the lease's end at %s", c.DiesAt, l.End)
			}
		}
		time.Sleep(time.Until(l.End) + time.Second)
		if n := len(r.system(tool).Live()); n != 0 {
			t.Errorf("%d credentials live without a broker", n)
		}
	})
}

// TestI6_NearlyFull: while the store's last room is kept for ending, nothing is
// given and everything that must end ends.
func TestI6_NearlyFull(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var full atomic.Bool
		r := newRig(t, func(r *rig) {
			r.tune = func(c *lease.Config) {
				c.Room = func() error {
					if full.Load() {
						return errors.New("nearly full")
					}
					return nil
				}
			}
		})
		in := r.open(time.Hour, "db.read")
		d := r.mustIssue("db.read")
		full.Store(true)
		time.Sleep(2 * time.Second)
		_, err := r.issue("db.read")
		r.wantReason(err, broker.ReasonStore)
		r.wantReason(r.engine.Ready(context.Background()), broker.ReasonStore)
		if _, ended, err := r.engine.CloseIncident(context.Background(), as(pager), in.ID, ""); err != nil || ended.Dead != 1 {
			t.Fatalf("closing while the store is nearly full: %+v, %v", ended, err)
		}
		if l := r.lease(d.Lease.ID); l.State != broker.LeaseRevoked {
			t.Errorf("the lease is %s", l.State)
		}
		full.Store(false)
		time.Sleep(2 * time.Second)
		if err := r.engine.Ready(context.Background()); err != nil {
			t.Errorf("Ready = %v", err)
		}
	})
}

// TestI4_AProviderStaysItself: a provider with leases cannot be pointed at
// another system, which would know nothing of them and call them dead.
func TestI4_AProviderStaysItself(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t)
		g := r.grant(support, "db.read", time.Hour)
		d := r.mustIssue("db.read")
		err := r.reload("{mode: planned, mint_timeout: 10s", "{mode: planned, mint_timeout: 11s")
		r.wantReason(err, broker.ReasonConflict)
		if l := r.lease(d.Lease.ID); l.State != broker.LeaseActive || len(r.world.Live()) != 1 {
			t.Errorf("after the refused reload the lease is %s, and %d credentials live", l.State, len(r.world.Live()))
		}
		if _, _, err := r.engine.WithdrawGrant(context.Background(), as(sam), g.ID, ""); err != nil {
			t.Fatal(err)
		}
		if err := r.engine.Load(context.Background(), r.snapshot(), "test"); err != nil {
			t.Errorf("after its leases have ended: %v", err)
		}
	})
}
