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

// gateStore holds Updates back until it is told to let them go.
type gateStore struct {
	store.Store
	mu   sync.Mutex
	in   int
	all  bool // that one and all after it but the favoured
	gate chan struct{}
}

// favoured marks the context of calls that a gateStore lets pass.
type favoured struct{}

func (g *gateStore) wrap(s store.Store) store.Store { g.Store = s; return g }

// hold holds the nth Update from now back, and returns what lets it go.
func (g *gateStore) hold(n int) (release func()) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.close(n, false)
}

// holdAll holds the nth Update from now back, and all after it, except those
// with a favoured context.
func (g *gateStore) holdAll(n int) (release func()) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.close(n, true)
}

func (g *gateStore) close(n int, all bool) (release func()) {
	gate := make(chan struct{})
	g.in, g.all, g.gate = n, all, gate
	return sync.OnceFunc(func() { close(gate) })
}

func (g *gateStore) Update(ctx context.Context, fn func(store.Txn) error) error {
	g.mu.Lock()
	held := g.in == 1
	switch {
	case held && g.all:
		held = ctx.Value(favoured{}) == nil
	case g.in > 0:
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
	{"policy", broker.ReasonPolicy, broker.GrantOpen, func(r *rig, _ broker.Incident) error {
		return r.reloadPolicies(openPolicies + `@id("no") forbid (principal, action == Action::"issue", resource);`)
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
						issued := make(chan error, 1)
						go func() {
							ctx := context.WithValue(context.Background(), favoured{}, true)
							d, err := r.engine.Issue(ctx, as(support), lease.IssueRequest{Tool: tool})
							if err == nil {
								d.Done()
							}
							issued <- err
						}()
						time.Sleep(time.Second)
						release := gate.holdAll(2) // the first is the end, and the next would tell its leases
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

// TestI5_RevokedWhileItWasMade: a lease that an operator ends while it is made
// is not delivered, although its grant holds.
func TestI5_RevokedWhileItWasMade(t *testing.T) {
	eachOutside(t, func(t *testing.T, tool string) {
		r := newRig(t)
		r.grant(support, tool, time.Hour)
		r.system(tool).SetScript(providertest.Rules(1, providertest.Rule{Op: providertest.OpCreate, Fault: providertest.Fault{Delay: 3 * time.Second}}))
		issued := r.background(tool)
		time.Sleep(time.Second)
		if _, err := r.engine.RevokeLease(context.Background(), as(sam), r.onlyLease().ID, "stop it"); err != nil {
			t.Fatal(err)
		}
		if err := <-issued; err == nil {
			t.Error("delivered after it was revoked")
		}
		if l := r.wantState(r.onlyLease().ID, broker.LeaseRevoked, 30*time.Second); !l.ActiveAt.IsZero() {
			t.Error("it was active")
		}
		if n := len(r.system(tool).Live()); n != 0 {
			t.Errorf("%d credentials are left", n)
		}
	})
}

// TestI5_UsableReadsTheConditions: a resource server that asks is told no from
// the commit of an end on, even before the lease was told of it.
func TestI5_UsableReadsTheConditions(t *testing.T) {
	for _, e := range enders {
		t.Run(e.name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				gate := &gateStore{}
				r := newRig(t, func(r *rig) { r.wrap = gate.wrap })
				in := r.open(time.Hour, "crm.read")
				d := r.mustIssue("crm.read")
				synctest.Wait()
				release := gate.holdAll(2) // the first is the end
				defer release()
				ended := make(chan error, 1)
				go func() { ended <- e.end(r, in) }()
				synctest.Wait()
				l, ok, err := r.engine.Usable(context.Background(), d.Lease.ID)
				if err != nil || ok {
					t.Errorf("Usable = %v, %v after the commit of the end", ok, err)
				}
				if l.State != broker.LeaseActive {
					t.Errorf("the lease is %s: it was told already, and nothing is tested", l.State)
				}
				release()
				if err := <-ended; err != nil {
					t.Error(err)
				}
			})
		})
	}
}

// TestI5_TheEndAwaitsDeliveries: whatever ends a grant waits, before it
// returns, for each delivery under way, and ends the lease without waiting.
func TestI5_TheEndAwaitsDeliveries(t *testing.T) {
	for _, e := range enders {
		t.Run(e.name, func(t *testing.T) {
			for _, tool := range tools {
				t.Run(tool, func(t *testing.T) {
					bubble(t, func(t *testing.T) {
						r := newRig(t)
						in := r.open(time.Hour, tool)
						d, err := r.engine.Issue(context.Background(), as(support), lease.IssueRequest{Tool: tool})
						if err != nil {
							t.Fatal(err)
						}
						defer d.Done()
						ended := make(chan error, 1)
						go func() { ended <- e.end(r, in) }()
						time.Sleep(time.Minute)
						select {
						case err := <-ended:
							t.Errorf("it returned (%v) while the secret was on its way", err)
							return
						default:
						}
						if l := r.lease(d.Lease.ID); l.State == broker.LeaseActive {
							t.Error("the lease is active while its delivery takes time")
						}
						d.Done()
						if err := <-ended; err != nil {
							t.Error(err)
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

// afterStore calls a function when the nth favoured Update is committed and
// its caller does not know it yet.
type afterStore struct {
	store.Store
	mu    sync.Mutex
	in    int
	after func()
}

func (a *afterStore) wrap(s store.Store) store.Store { a.Store = s; return a }

func (a *afterStore) Update(ctx context.Context, fn func(store.Txn) error) error {
	err := a.Store.Update(ctx, fn)
	if ctx.Value(favoured{}) != nil {
		a.mu.Lock()
		a.in--
		last := a.in == 0
		a.mu.Unlock()
		if last {
			a.after()
		}
	}
	return err
}

// TestI5_RegisteredBeforeItsCommit: an end that comes right after the commit
// to active knows of the delivery that follows, and waits for it.
func TestI5_RegisteredBeforeItsCommit(t *testing.T) {
	commits := map[string]int{"db.read": 2, "vault.read": 3, "cloud.read": 2, "crm.read": 1, "docs.search": 1}
	for _, e := range enders {
		t.Run(e.name, func(t *testing.T) {
			for _, tool := range tools {
				t.Run(tool, func(t *testing.T) {
					bubble(t, func(t *testing.T) {
						s := &afterStore{in: commits[tool]}
						r := newRig(t, func(r *rig) { r.wrap = s.wrap })
						in := r.open(time.Hour, tool)
						ended := make(chan error, 1)
						s.after = func() {
							go func() { ended <- e.end(r, in) }()
							time.Sleep(10 * time.Second)
							if len(ended) > 0 {
								t.Error("it returned between the commit to active and the delivery")
							}
						}
						ctx := context.WithValue(context.Background(), favoured{}, true)
						d, err := r.engine.Issue(ctx, as(support), lease.IssueRequest{Tool: tool})
						if err != nil {
							t.Fatal(err)
						}
						d.Done()
						if err := <-ended; err != nil {
							t.Error(err)
						}
					})
				})
			}
		})
	}
}
