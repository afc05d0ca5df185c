package lease_test

import (
	"context"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/lease"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/providertest"
	"github.com/mayfly-security/mayfly/store"
)

// gateStore holds one Update back until it is told to let it go.
type gateStore struct {
	store.Store
	mu   sync.Mutex
	in   int
	gate chan struct{}
}

func (g *gateStore) wrap(s store.Store) store.Store { g.Store = s; return g }

// hold holds the nth Update from now back, and returns what lets it go.
func (g *gateStore) hold(n int) (release func()) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.in, g.gate = n, make(chan struct{})
	return sync.OnceFunc(func() { close(g.gate) })
}

func (g *gateStore) Update(ctx context.Context, fn func(store.Txn) error) error {
	g.mu.Lock()
	held := g.in == 1
	if g.in > 0 {
		g.in--
	}
	gate := g.gate
	g.mu.Unlock()
	if held {
		<-gate
	}
	return g.Store.Update(ctx, fn)
}

// enders are the ways in which what a lease lives on can end. Each is one
// commit, after which its leases are told by others.
var enders = []struct {
	name   string
	reason broker.Reason     // of a delivery that comes too late
	grant  broker.GrantState // what becomes of the grant
	end    func(r *rig, in broker.Incident) error
}{
	{"close", broker.ReasonIncidentClosed, broker.GrantClosed, func(r *rig, in broker.Incident) error {
		_, _, err := r.engine.CloseIncident(context.Background(), as(pager), in.ID, "")
		return err
	}},
	{"withdraw", broker.ReasonNoGrant, broker.GrantWithdrawn, func(r *rig, in broker.Incident) error {
		_, _, err := r.engine.WithdrawGrant(context.Background(), as(sam), in.Grants[0], "")
		return err
	}},
	{"disable", broker.ReasonAgentDisabled, broker.GrantOpen, func(r *rig, _ broker.Incident) error {
		return r.reload("disabled: false # support", "disabled: true # support")
	}},
	{"widen", broker.ReasonGrantSuspended, broker.GrantOpen, func(r *rig, _ broker.Incident) error {
		text := r.yaml
		for _, name := range tools {
			text = widen(text, name)
		}
		r.yaml = text
		return r.engine.Load(context.Background(), r.snapshot(), "test")
	}},
}

// TestI5_TheCommitReadsAgain: from the commit of an end on nothing becomes
// active, even before one lease was told of it. The attempt was admitted
// before, and comes to its commit between the two.
func TestI5_TheCommitReadsAgain(t *testing.T) {
	for _, e := range enders {
		t.Run(e.name, func(t *testing.T) {
			for _, tool := range tools {
				t.Run(tool, func(t *testing.T) {
					bubble(t, func(t *testing.T) {
						gate := &gateStore{}
						r := newRig(t, func(r *rig) { r.wrap = gate.wrap })
						h := &hooks{mint: func(_ context.Context, _ providers.MintRequest, mint func() (providers.Minted, error)) (providers.Minted, error) {
							minted, err := mint()
							time.Sleep(3 * time.Second)
							return minted, err
						}}
						r.hooked(map[string]string{"cloud.read": "asked", "crm.read": "token", "docs.search": "token"}[tool], h)
						in := r.open(time.Hour, tool)
						synctest.Wait()
						issued := r.background(tool)
						time.Sleep(time.Second)
						release := gate.hold(2) // the first is the end, and the next would tell its leases
						defer release()
						ended := make(chan error, 1)
						go func() { ended <- e.end(r, in) }()
						select {
						case err := <-issued:
							if err == nil {
								t.Error("delivered after the commit of the end")
							} else if reason := broker.ReasonOf(err); reason != e.reason && reason != broker.ReasonNoGrant {
								t.Errorf("reason %q (%v); want %q", reason, err, e.reason)
							}
						case <-time.After(5 * time.Second):
							t.Error("the attempt waits for the sweep")
						}
						release()
						if err := <-ended; err != nil {
							t.Error(err)
						}
						time.Sleep(time.Minute)
						if n := len(r.world.Live()) + len(r.asked.Live()); n != 0 {
							t.Errorf("%d credentials are left", n)
						}
					})
				})
			}
		})
	}
}

// TestI5_TheIntentReadsAgain: an end that comes between the decision and the
// commit of the intent leaves the provider unasked.
func TestI5_TheIntentReadsAgain(t *testing.T) {
	for _, e := range enders {
		t.Run(e.name, func(t *testing.T) {
			for _, tool := range tools {
				t.Run(tool, func(t *testing.T) {
					bubble(t, func(t *testing.T) {
						gate := &gateStore{}
						r := newRig(t, func(r *rig) { r.wrap = gate.wrap })
						in := r.open(time.Hour, tool)
						synctest.Wait()
						release := gate.hold(1)
						defer release()
						issued := r.background(tool)
						synctest.Wait()
						ended := make(chan error, 1)
						go func() { ended <- e.end(r, in) }() // it waits for a token's delivery, which has begun
						synctest.Wait()
						release()
						err := <-issued
						if reason := broker.ReasonOf(err); err == nil || reason != e.reason && reason != broker.ReasonNoGrant {
							t.Errorf("reason %q (%v); want %q", reason, err, e.reason)
						}
						if err := <-ended; err != nil {
							t.Error(err)
						}
						if n := len(r.world.All()) + len(r.asked.All()); n != 0 {
							t.Errorf("%d credentials were made", n)
						}
						if n := len(r.keys("lease|")); n != 0 {
							t.Errorf("%d leases are in the store", n)
						}
					})
				})
			}
		})
	}
}

// TestI5_ARestartFinishesTheEnd: the broker dies between the commit of an end
// and the telling of its leases. They are told when it is back.
func TestI5_ARestartFinishesTheEnd(t *testing.T) {
	for _, e := range enders {
		t.Run(e.name, func(t *testing.T) {
			eachOutside(t, func(t *testing.T, tool string) {
				var now *mortal
				r := newRig(t, func(r *rig) {
					r.wrap = func(s store.Store) store.Store { now = &mortal{Store: s}; return now }
				})
				in := r.open(time.Hour, tool)
				d := r.mustIssue(tool)
				synctest.Wait()
				now.arm(2, false)
				if err := e.end(r, in); err == nil {
					t.Fatal("the end has returned, although the store died on its way")
				}
				r.restart()
				r.wantState(d.Lease.ID, broker.LeaseRevoked, 10*time.Second)
				if g := r.grantNow(in.Grants[0]); g.State != e.grant {
					t.Errorf("the grant is %s; want %s", g.State, e.grant)
				}
				if left := r.keys("sweep|"); len(left) != 0 {
					t.Errorf("left: %q", left)
				}
			})
		})
	}
}

// TestI5_AChangeWhileItWasDown: a catalog that was changed while the broker was
// down ends what it no longer allows.
func TestI5_AChangeWhileItWasDown(t *testing.T) {
	eachOutside(t, func(t *testing.T, tool string) {
		r := newRig(t)
		r.open(time.Hour, tool)
		d := r.mustIssue(tool)
		r.stop()
		r.yaml = widen(r.yaml, tool)
		r.start()
		if l := r.wantState(d.Lease.ID, broker.LeaseRevoked, 10*time.Second); l.Cause != broker.CauseToolChanged {
			t.Errorf("it ended because of %q", l.Cause)
		}
	})
}

// TestI4_WhatIsLeftIsEnded: a credential has died by itself, and something of
// it is left at the provider. It is not said to have expired before that is gone.
func TestI4_WhatIsLeftIsEnded(t *testing.T) {
	eachOutside(t, func(t *testing.T, tool string) {
		r := newRig(t)
		var mu sync.Mutex
		left := true
		h := &hooks{
			confirm: func(endings []providers.Ending, confirm func() []providers.Death) []providers.Death {
				mu.Lock()
				defer mu.Unlock()
				if left {
					return make([]providers.Death, len(endings)) // not dead, and nothing else to tell
				}
				return confirm()
			},
			revoke: func(_ []providers.Ending, revoke func() []providers.Death) []providers.Death {
				mu.Lock()
				defer mu.Unlock()
				left = false
				return revoke()
			},
		}
		r.hooked(map[bool]string{true: "asked", false: "world"}[tool == "cloud.read"], h)
		r.grant(support, tool, time.Hour)
		d := r.mustIssue(tool, ttl(time.Minute))
		r.wantState(d.Lease.ID, broker.LeaseExpired, 90*time.Second)
		mu.Lock()
		defer mu.Unlock()
		if left {
			t.Error("said to be expired, with something left at the provider")
		}
	})
}

// TestI3_EndsNoLaterThanWhatItIsFor: the end of a lease is the earliest of all
// that bounds it.
func TestI3_EndsNoLaterThanWhatItIsFor(t *testing.T) {
	for name, c := range map[string]struct {
		prepare func(r *rig)
		change  func(*lease.IssueRequest)
		want    time.Duration
	}{
		"what was asked":       {func(r *rig) { r.grant(support, "db.read", time.Hour) }, ttl(time.Minute), time.Minute},
		"the tool's maximum":   {func(r *rig) { r.grant(support, "db.read", time.Hour) }, func(*lease.IssueRequest) {}, 15 * time.Minute},
		"the grant's end":      {func(r *rig) { r.grant(support, "db.read", 3*time.Minute) }, func(*lease.IssueRequest) {}, 3 * time.Minute},
		"the incident's end":   {func(r *rig) { r.open(4*time.Minute, "db.read") }, func(*lease.IssueRequest) {}, 4 * time.Minute},
		"the provider's limit": {func(r *rig) { r.grant(support, "db.read", time.Hour) }, func(*lease.IssueRequest) {}, 2 * time.Minute},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				r := newRig(t, func(r *rig) {
					if name == "the provider's limit" {
						r.world = providertest.NewSystem(providertest.SystemConfig{MaxTTL: 2 * time.Minute})
					}
				})
				c.prepare(r)
				d := r.mustIssue("db.read", c.change)
				if got := d.Lease.End.Sub(d.Lease.CreatedAt); got != c.want {
					t.Errorf("it lives %s; want %s", got, c.want)
				}
				if l := r.lease(d.Lease.ID); !l.End.Equal(d.Lease.End) {
					t.Errorf("its end is %s in the store, and the agent was told %s", l.End, d.Lease.End)
				}
				r.wantState(d.Lease.ID, broker.LeaseExpired, c.want+time.Second)
			})
		})
	}
}
