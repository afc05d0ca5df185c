package lease_test

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/audit"
	"github.com/mayfly-security/mayfly/broker/lease"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/providertest"
)

// outliving is a driver whose credentials live for an hour longer than asked,
// as where a provider's shortest TTL is long: only an ending ends them in time.
type outliving struct{ providers.Driver }

type outlivingProvider struct{ providers.Provider }

type outlivingPlanner struct {
	outlivingProvider
	providers.Planner
}

func (o outliving) Open(ctx context.Context, config providers.Config) (providers.Provider, error) {
	p, err := o.Driver.Open(ctx, config)
	if err != nil {
		return nil, err
	}
	if planner, ok := p.(providers.Planner); ok {
		return outlivingPlanner{outlivingProvider{p}, planner}, nil
	}
	return outlivingProvider{p}, nil
}

func (p outlivingProvider) Mint(ctx context.Context, req providers.MintRequest, record func(providers.Handle) error) (providers.Minted, error) {
	req.End = req.End.Add(time.Hour)
	return p.Provider.Mint(ctx, req, record)
}

// newFaultyRig is a rig on a store that can fail, with credentials that only an
// ending ends.
func newFaultyRig(t *testing.T) (*rig, *faultyStore) {
	faulty := &faultyStore{}
	r := newRig(t, func(r *rig) { r.wrap = faulty.wrap })
	r.stop()
	for _, driver := range []string{"world", "asked"} {
		r.drivers[driver] = outliving{r.drivers[driver]}
	}
	r.start()
	return r, faulty
}

// TestI3_EndingWithoutAStore: while the store cannot be written nothing is
// given, and what must end is ended all the same. What happened is told when
// the store is back.
func TestI3_EndingWithoutAStore(t *testing.T) {
	eachOutside(t, func(t *testing.T, tool string) {
		r, faulty := newFaultyRig(t)
		r.grant(support, tool, time.Hour)
		d := r.mustIssue(tool, ttl(time.Minute))
		synctest.Wait()
		faulty.failAll(true)
		_, err := r.issue(tool)
		r.wantReason(err, broker.ReasonStore)
		time.Sleep(70 * time.Second)
		if live := r.system(tool).Live(); len(live) != 0 {
			t.Errorf("ten seconds after their end these live: %+v", live)
		}
		if l := r.lease(d.Lease.ID); l.State != broker.LeaseActive {
			t.Fatalf("the store cannot be written, and says that the lease is %s", l.State)
		}
		if c, err := r.engine.Counts(context.Background()); err != nil || c.Overdue != 1 {
			t.Errorf("%d are overdue, %v; the death of one is nowhere recorded", c.Overdue, err)
		}
		r.wantReason(r.engine.Ready(context.Background()), broker.ReasonStore)
		asked := len(r.system(tool).History())
		time.Sleep(10 * time.Minute)
		if n := len(r.system(tool).History()) - asked; n > 0 {
			t.Errorf("of what is dead the provider was asked %d times more to end it", n)
		}
		faulty.failAll(false)
		l := r.wantState(d.Lease.ID, broker.LeaseRevoked, 5*time.Second)
		if l.Cause != broker.CauseTTL || l.Progress != broker.ProgressVerified {
			t.Errorf("it ended for %q, with progress %q", l.Cause, l.Progress)
		}
		for _, what := range []audit.Type{audit.LeaseRevoking, audit.LeaseRevoked} {
			if n := len(r.events(lease.EventFilter{Lease: l.ID, Type: what})); n != 1 {
				t.Errorf("%d events say %s", n, what)
			}
		}
		for _, prefix := range []string{"open|", "due|", "revoking|"} {
			if left := r.keys(prefix); len(left) != 0 {
				t.Errorf("left in the index: %q", left)
			}
		}
		r.mustIssue(tool)
	})
}

// TestI5_AnEndThatCannotBeWritten: what ends leases, and cannot be committed,
// ends them at their providers, gives nothing of them from then on, tells its
// caller that it is not durable, and is committed later.
func TestI5_AnEndThatCannotBeWritten(t *testing.T) {
	ends := map[string]func(r *rig, in broker.Incident, g broker.Grant, leases []broker.LeaseID) error{
		"close": func(r *rig, in broker.Incident, _ broker.Grant, _ []broker.LeaseID) error {
			_, _, err := r.engine.CloseIncident(context.Background(), as(pager), in.ID, "it is over")
			return err
		},
		"withdraw": func(r *rig, _ broker.Incident, g broker.Grant, _ []broker.LeaseID) error {
			_, _, err := r.engine.WithdrawGrant(context.Background(), as(sam), g.ID, "it is over")
			return err
		},
		"revoke": func(r *rig, _ broker.Incident, _ broker.Grant, leases []broker.LeaseID) (err error) {
			for _, id := range leases {
				if _, err = r.engine.RevokeLease(context.Background(), as(sam), id, "it is over"); err == nil {
					return nil
				}
			}
			return err
		},
	}
	for name, end := range ends {
		t.Run(name, func(t *testing.T) {
			eachOutside(t, func(t *testing.T, tool string) {
				r, faulty := newFaultyRig(t)
				var in broker.Incident
				var g broker.Grant
				if name == "withdraw" {
					g = r.grant(support, tool, time.Hour)
				} else {
					in = r.open(time.Hour, tool)
				}
				var leases []broker.LeaseID
				for range 20 {
					leases = append(leases, r.mustIssue(tool).Lease.ID)
				}
				keyed := r.mustIssue(tool, key("k"))
				leases = append(leases, keyed.Lease.ID)
				synctest.Wait()
				faulty.failAll(true)

				if _, _, err := r.engine.CloseIncident(context.Background(), as(support), in.ID, ""); broker.ReasonOf(err) == broker.ReasonStore {
					t.Error("a stranger is told about the store")
				}
				time.Sleep(10 * time.Second)
				if n := len(r.system(tool).Live()); n != len(leases) {
					t.Fatalf("%d of %d live, and nobody with a right to has ended any", n, len(leases))
				}

				err := end(r, in, g, leases)
				var refusal *broker.Error
				if r.wantReason(err, broker.ReasonStore); !errors.As(err, &refusal) || refusal.Message == "the broker cannot write its store" {
					t.Errorf("the caller is told %v", err)
				}
				if _, ok, _ := r.engine.Usable(context.Background(), keyed.Lease.ID); ok {
					t.Error("it was ended, and is usable")
				}
				time.Sleep(5 * time.Second)
				if n := len(r.system(tool).Live()); n != 0 {
					t.Errorf("five seconds later %d live", n)
				}
				// The store is back, and is not told yet.
				faulty.failAll(false)
				if _, err := r.issue(tool, key("k")); err == nil {
					t.Error("what was ended is given again")
				}
				if name != "revoke" {
					if d, err := r.issue(tool); err == nil {
						t.Errorf("it was ended, and gives lease %s", d.Lease.ID)
					}
				}
				time.Sleep(5 * time.Second)
				for _, id := range leases {
					if l := r.lease(id); l.State != broker.LeaseRevoked || l.Cause == broker.CauseTTL {
						t.Fatalf("lease %s is %s (%s)", id, l.State, l.Cause)
					}
				}
				if ended := r.keys("sweep|"); len(ended) != 0 {
					t.Errorf("left to sweep: %q", ended)
				}
				switch name {
				case "close":
					events := r.events(lease.EventFilter{Incident: in.ID, Type: audit.IncidentClosed})
					if len(events) != 1 || events[0].Actor != pager.String() || events[0].Reason != "it is over" {
						t.Errorf("the evidence says %+v", events)
					}
				case "withdraw":
					if g := r.grantNow(g.ID); g.State != broker.GrantWithdrawn {
						t.Errorf("the grant is %s", g.State)
					}
				}
			})
		})
	}
}

// TestI3_EndingWithoutAStoreIsRetried: without a store, too, a provider that
// fails is asked again, with pauses, until it has ended what it must.
func TestI3_EndingWithoutAStoreIsRetried(t *testing.T) {
	eachOutside(t, func(t *testing.T, tool string) {
		r, faulty := newFaultyRig(t)
		r.grant(support, tool, time.Hour)
		var leases []broker.LeaseID
		for range 10 {
			leases = append(leases, r.mustIssue(tool, ttl(time.Minute)).Lease.ID)
		}
		synctest.Wait()
		var calls atomic.Int64
		r.system(tool).SetScript(func(providertest.Call) providertest.Fault {
			calls.Add(1)
			return providertest.Fault{Effect: providertest.FailBefore}
		})
		faulty.failAll(true)
		if _, err := r.engine.RevokeLease(context.Background(), as(sam), leases[0], ""); err == nil {
			t.Error("the store cannot be written, and the revocation is said to be durable")
		}
		time.Sleep(5 * time.Minute)
		if n := calls.Load(); n < 10 || n > 400 {
			t.Errorf("in five minutes the provider was asked %d times", n)
		}
		r.system(tool).SetScript(nil)
		time.Sleep(70 * time.Second)
		if n := len(r.system(tool).Live()); n != 0 {
			t.Errorf("%d live", n)
		}
		faulty.failAll(false)
		for _, id := range leases {
			r.wantState(id, broker.LeaseRevoked, 5*time.Second)
		}
	})
}

// TestI3_MintedWithoutAStore: what was made while the store went away is ended
// by the handle that the store was not told.
func TestI3_MintedWithoutAStore(t *testing.T) {
	eachOutside(t, func(t *testing.T, tool string) {
		r, faulty := newFaultyRig(t)
		r.grant(support, tool, time.Hour)
		synctest.Wait()
		r.system(tool).SetScript(providertest.Rules(1, providertest.Rule{Op: providertest.OpCreate, Fault: providertest.Fault{Delay: 3 * time.Second}}))
		done := r.background(tool)
		synctest.Wait()
		faulty.failAll(true)
		r.wantReason(<-done, broker.ReasonStore)
		time.Sleep(10 * time.Second)
		if n := len(r.system(tool).Live()); n != 0 {
			t.Errorf("%d live", n)
		}
		faulty.failAll(false)
		r.wantState(r.onlyLease().ID, broker.LeaseRevoked, time.Minute)
	})
}

// TestI5_WhatIsUnderWayEndsToo: the store is back before it is told of a close.
// What was being made at the close is not delivered, and nothing else is made.
func TestI5_WhatIsUnderWayEndsToo(t *testing.T) {
	eachOutside(t, func(t *testing.T, tool string) {
		r, faulty := newFaultyRig(t)
		in := r.open(time.Hour, tool, "crm.read")
		token := r.mustIssue("crm.read")
		r.system(tool).SetScript(providertest.Rules(1, providertest.Rule{Op: providertest.OpCreate, Fault: providertest.Fault{Held: true}}))
		done := r.background(tool)
		synctest.Wait()
		faulty.failAll(true)
		_, _, err := r.engine.CloseIncident(context.Background(), as(pager), in.ID, "")
		r.wantReason(err, broker.ReasonStore)
		synctest.Wait()
		faulty.failAll(false)
		if _, err := r.issue("crm.read"); err == nil {
			t.Error("the incident was closed, and a token is given")
		}
		if _, ok, _ := r.engine.Usable(context.Background(), token.Lease.ID); ok {
			t.Error("the incident was closed, and a token of it is usable")
		}
		if n := r.system(tool).ReleaseLate(); n != 1 {
			t.Fatalf("%d creations were held", n)
		}
		if err := <-done; err == nil {
			t.Error("the incident was closed, and a lease of it was delivered")
		}
		time.Sleep(30 * time.Second)
		if n := len(r.system(tool).Live()); n != 0 {
			t.Errorf("%d live", n)
		}
		if left := r.keys("open|"); len(left) != 0 {
			t.Errorf("these have not ended: %q", left)
		}
	})
}
