package lease_test

import (
	"context"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/audit"
	"github.com/mayfly-security/mayfly/broker/lease"
	"github.com/mayfly-security/mayfly/providers/providertest"
)

// wall is a machine's clock that can be set.
type wall struct{ off atomic.Int64 }

func (w *wall) set(off time.Duration) { w.off.Store(int64(off)) }
func (w *wall) now() time.Time        { return time.Now().Add(time.Duration(w.off.Load())) }

func newClockRig(t testing.TB) (*rig, *wall) {
	w := &wall{}
	return newRig(t, func(r *rig) { r.tune = func(c *lease.Config) { c.Wall = w.now } }), w
}

// wantNoGiving checks that nothing is given because of the clock.
func (r *rig) wantNoGiving(tool string) {
	r.t.Helper()
	_, err := r.issue(tool)
	r.wantReason(err, broker.ReasonClock)
	_, err = r.engine.CreateGrant(context.Background(), as(sam), lease.GrantRequest{Agent: support, Tool: tool, For: time.Hour, Reason: "a test"})
	r.wantReason(err, broker.ReasonClock)
	_, err = r.engine.OpenIncident(context.Background(), as(pager), lease.IncidentRequest{Title: "a test", Agents: []spiffeid.ID{support}, Tools: []string{tool}})
	r.wantReason(err, broker.ReasonClock)
	r.wantReason(r.engine.Ready(context.Background()), broker.ReasonClock)
}

// TestClockBackward: a machine's clock that is set back lets no lease live
// longer, neither in a running broker nor over a restart.
func TestClockBackward(t *testing.T) {
	for name, restart := range map[string]bool{"running": false, "restarted": true} {
		t.Run(name, func(t *testing.T) {
			for _, tool := range []string{"db.read", "vault.read", "crm.read"} {
				t.Run(tool, func(t *testing.T) {
					bubble(t, func(t *testing.T) {
						r, w := newClockRig(t)
						g := r.grant(support, tool, 10*time.Minute)
						d := r.mustIssue(tool, ttl(5*time.Minute))
						time.Sleep(time.Minute)
						was := r.engine.Now()
						w.set(-2 * time.Hour)
						if restart {
							r.restart()
						}
						// The mark in the store is at most 10 s old.
						const lag = 10 * time.Second
						if now := r.engine.Now(); now.Before(was.Add(-lag)) {
							t.Fatalf("the broker's time went back by %s", was.Sub(now))
						}
						r.wantNoGiving(tool)
						time.Sleep(4*time.Minute + lag + time.Second)
						if l, ok, err := r.engine.Usable(context.Background(), d.Lease.ID); err != nil || ok {
							t.Errorf("after its TTL the lease is usable (%s), %v", l.State, err)
						}
						if l := r.lease(d.Lease.ID); !l.State.Ended() {
							t.Errorf("after its TTL the lease is %s", l.State)
						}
						if n := len(r.world.Live()); n != 0 {
							t.Errorf("%d credentials are left", n)
						}
						time.Sleep(5*time.Minute + lag)
						if g := r.grantNow(g.ID); g.State != broker.GrantExpired {
							t.Errorf("after its end the grant is %s", g.State)
						}
						w.set(0)
						r.grant(support, tool, time.Hour)
						r.mustIssue(tool)
					})
				})
			}
		})
	}
}

// TestI4_ClockBackwardExpiresNothing: by a clock that was set back a token has
// not expired; by the broker's own time it has. Only the earlier of them is
// certain to have passed.
func TestI4_ClockBackwardExpiresNothing(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r, w := newClockRig(t)
		r.grant(support, "docs.search", time.Hour)
		d := r.mustIssue("docs.search", ttl(5*time.Minute))
		w.set(-30 * time.Minute)
		time.Sleep(10 * time.Minute)
		if l := r.lease(d.Lease.ID); l.State != broker.LeaseRevoking {
			t.Errorf("it is %s; resource servers may go by the machine's clock", l.State)
		}
		r.wantState(d.Lease.ID, broker.LeaseExpired, 28*time.Minute) // a try a minute or so
	})
}

// TestClockForward: a machine's clock that jumps forward stops giving and no
// ending, and it is told. When it is right again, giving goes on.
func TestClockForward(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r, w := newClockRig(t)
		r.grant(support, "db.read", 3*time.Hour)
		d := r.mustIssue("db.read", ttl(10*time.Minute))
		time.Sleep(time.Minute)
		w.set(time.Hour)
		r.wantNoGiving("db.read")
		if _, ok, _ := r.engine.Usable(context.Background(), d.Lease.ID); ok {
			t.Error("by one of the clocks the lease is over, and it is usable")
		}
		r.wantState(d.Lease.ID, broker.LeaseRevoked, 15*time.Second)
		if n := len(r.world.Live()); n != 0 {
			t.Errorf("%d credentials are left", n)
		}
		time.Sleep(time.Minute)
		if n := len(r.events(lease.EventFilter{Type: audit.ClockUntrusted})); n != 1 {
			t.Errorf("the evidence tells %d times that the clock is not trusted", n)
		}
		w.set(0)
		r.mustIssue("db.read")
		time.Sleep(15 * time.Second)
		if n := len(r.events(lease.EventFilter{Type: audit.ClockTrusted})); n != 1 {
			t.Errorf("the evidence tells %d times that the clock is trusted again", n)
		}
		if err := r.engine.Ready(context.Background()); err != nil {
			t.Errorf("Ready = %v", err)
		}
	})
}

// TestClockSteps: the small steps of a time daemon stop nothing, and the
// broker's time never goes back.
func TestClockSteps(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r, w := newClockRig(t)
		r.grant(support, "crm.read", time.Hour)
		last := r.engine.Now()
		for _, off := range []time.Duration{5 * time.Second, -5 * time.Second, 20 * time.Second, 0, 29 * time.Second, time.Second} {
			w.set(off)
			now := r.engine.Now()
			if now.Before(last) {
				t.Errorf("with the clock off by %s the broker's time went back by %s", off, last.Sub(now))
			}
			last = now
			r.mustIssue("crm.read")
			time.Sleep(time.Second)
		}
	})
}

// TestClockJumpKeepsThePauses: while the machine's clock is off, either way, a
// provider that is away is asked no more often than otherwise; and when the
// clock is right again, no try waits for the time that it had shown.
func TestClockJumpKeepsThePauses(t *testing.T) {
	for name, off := range map[string]time.Duration{"forward": 2 * time.Hour, "backward": -2 * time.Hour} {
		t.Run(name, func(t *testing.T) {
			eachOutside(t, func(t *testing.T, tool string) {
				r, w := newClockRig(t)
				r.grant(support, tool, time.Hour)
				d, failed := r.mustIssue(tool), r.mustIssue(tool)
				var calls atomic.Int64
				away := func(c providertest.Call) providertest.Fault {
					calls.Add(1)
					return providertest.Fault{Effect: providertest.FailBefore}
				}
				r.system(tool).SetScript(away)
				w.set(off)
				for _, l := range []broker.LeaseID{d.Lease.ID, failed.Lease.ID} {
					if _, err := r.engine.RevokeLease(context.Background(), as(support), l, ""); err != nil {
						t.Fatal(err)
					}
				}
				time.Sleep(2 * time.Minute)
				if n := calls.Load(); n == 0 || n > 200 {
					t.Errorf("in two minutes the provider was asked %d times", n)
				}
				w.set(0)
				r.system(tool).SetScript(nil)
				r.wantState(d.Lease.ID, broker.LeaseRevoked, 2*time.Minute)
				r.wantState(failed.Lease.ID, broker.LeaseRevoked, 2*time.Minute)
			})
		})
	}
}

// TestClockJumpWhileUnsettled: an attempt of unknown outcome is looked at now
// and then until nothing of it can come any more, whatever the clock shows.
func TestClockJumpWhileUnsettled(t *testing.T) {
	for name, off := range map[string]time.Duration{"forward": 2 * time.Hour, "backward": -time.Hour} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				r, w := newClockRig(t)
				r.grant(support, "db.read", time.Hour)
				var calls atomic.Int64
				r.world.SetScript(func(c providertest.Call) providertest.Fault {
					calls.Add(1)
					if c.Op == providertest.OpCreate {
						return providertest.Fault{Effect: providertest.ActThenFail}
					}
					return providertest.Fault{}
				})
				_, err := r.issue("db.read")
				r.wantReason(err, broker.ReasonProvider)
				w.set(off)
				time.Sleep(30 * time.Second)
				if n := calls.Load(); n > 50 {
					t.Errorf("in half a minute the provider was asked %d times", n)
				}
				w.set(0)
				time.Sleep(time.Minute)
				if left := r.keys("open|"); len(left) != 0 {
					t.Errorf("a minute later these have not ended: %q", left)
				}
			})
		})
	}
}
