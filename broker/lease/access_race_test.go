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
	"github.com/mayfly-security/mayfly/providers"
)

// TestManyApproversAtOnce: however many say yes at the same time, a request
// becomes one grant, of two people.
func TestManyApproversAtOnce(t *testing.T) {
	r := governedRig(t)
	people := []broker.Caller{person("ann", "finance"), person("amy", "finance", "security"), person("bob", "security"), person("ben", "finance", "security")}
	const rounds = 60
	for range rounds {
		v := r.mustAsk("db.read")
		var wg sync.WaitGroup
		for _, p := range people {
			for range 2 { // each twice, as from two windows
				wg.Go(func() {
					if _, err := r.approve(v, p); err != nil && broker.ReasonOf(err) != broker.ReasonRequestOver {
						t.Errorf("%s: %v", p.Person.Name, err)
					}
				})
			}
		}
		wg.Wait()
		got := r.request(v.ID)
		evs := r.events(lease.EventFilter{Grant: got.Grant, Type: audit.GrantCreated})
		if got.State != broker.RequestGranted || len(evs) != 1 || len(got.Approvals) < 2 {
			t.Fatalf("%s, %d grants, %d approvals", got.State, len(evs), len(got.Approvals))
		}
	}
	if n := len(r.events(lease.EventFilter{Type: audit.GrantCreated})); n != rounds {
		t.Errorf("%d requests made %d grants", rounds, n)
	}
}

// TestSingleUseForMany: 64 clients of one agent draw at a grant of one use.
func TestSingleUseForMany(t *testing.T) {
	r := governedRig(t)
	for range 10 {
		v := r.mustApprove(r.mustAsk("db.read"), person("ann", "finance"))
		r.mustApprove(v, person("bob", "security"))
		var given atomic.Int64
		var wg sync.WaitGroup
		for range 64 {
			wg.Go(func() {
				d, err := r.issue("db.read")
				switch {
				case err == nil:
					given.Add(1)
					d.Done()
				case broker.ReasonOf(err) != broker.ReasonGrantUsed && broker.ReasonOf(err) != broker.ReasonProvider && broker.ReasonOf(err) != broker.ReasonNoGrant:
					t.Errorf("a refusal: %v", err)
				}
			})
		}
		wg.Wait()
		if n := given.Load(); n != 1 {
			t.Fatalf("one use was given %d times", n)
		}
	}
}

// TestReloadWhileManyAsk: policies are exchanged while 128 clients ask and
// draw. Once a reload has returned nothing is given that it forbids, and by the
// evidence nothing ever was by a set that was not in force.
func TestReloadWhileManyAsk(t *testing.T) {
	const clients = 128
	r := governedRig(t)
	forbid := openPolicies + `
@id("no-ask") forbid (principal, action == Action::"request", resource == Tool::"docs.search");
@id("no-issue") forbid (principal, action == Action::"issue", resource == Tool::"docs.search");`
	var stop atomic.Bool
	var phase atomic.Int64 // odd while it is forbidden
	during := func(was int64) bool { return was%2 == 1 && phase.Load() == was }
	var granted, given, refused atomic.Int64
	var wg sync.WaitGroup
	for range clients {
		wg.Go(func() {
			for !stop.Load() {
				was := phase.Load()
				v, err := r.ask("docs.search")
				switch {
				case err == nil:
					if during(was) {
						t.Error("granted while it was forbidden")
					}
					granted.Add(1)
				case broker.ReasonOf(err) != broker.ReasonPolicy && broker.ReasonOf(err) != broker.ReasonConflict:
					t.Errorf("asking: %v", err)
				default:
					refused.Add(1)
				}
				was = phase.Load()
				if d, err := r.issue("docs.search"); err == nil {
					if during(was) {
						t.Error("given while it was forbidden")
					}
					given.Add(1)
					d.Done()
				}
				if v.Grant != "" {
					_, _, _ = r.engine.WithdrawGrant(bg, as(sam), v.Grant, "") // so that there are not ever more
				}
			}
		})
	}
	for range 5 {
		time.Sleep(20 * time.Millisecond) // let some come through; nothing is decided by it
		if err := r.reloadPolicies(forbid); err != nil {
			t.Fatal(err)
		}
		phase.Add(1)
		time.Sleep(20 * time.Millisecond)
		phase.Add(1)
		if err := r.reloadPolicies(openPolicies); err != nil {
			t.Fatal(err)
		}
	}
	stop.Store(true)
	wg.Wait()
	if granted.Load() == 0 || given.Load() == 0 || refused.Load() == 0 {
		t.Errorf("granted %d, given %d, refused %d: nothing raced", granted.Load(), given.Load(), refused.Load())
	}
	t.Logf("granted %d, given %d, refused %d", granted.Load(), given.Load(), refused.Load())
	digest := ""
	for _, ev := range r.events(lease.EventFilter{}) {
		switch ev.Type {
		case audit.CatalogLoaded:
			digest = ev.Details["policy_digest"]
		case audit.RequestCreated, audit.RequestGranted, audit.LeaseActive:
			if ev.Details["policy_digest"] != digest {
				t.Fatalf("%s by a policy set that was not in force", ev.Type)
			}
		case audit.GrantCreated:
			if ev.Request != "" && ev.Details["policy_digest"] != digest {
				t.Fatalf("%s by a policy set that was not in force", ev.Type)
			}
		}
	}
}

// TestVoteAtTheEnd: votes race the end of their request, at the very instant
// of its expiry, its withdrawal or the close of its incident.
func TestVoteAtTheEnd(t *testing.T) {
	ends := map[string]func(r *rig, v lease.RequestView) error{
		"expiry": func(r *rig, v lease.RequestView) error { time.Sleep(time.Until(v.ExpiresAt)); return nil },
		"withdrawal": func(r *rig, v lease.RequestView) error {
			_, err := r.engine.WithdrawRequest(bg, as(support), v.ID, "")
			if broker.ReasonOf(err) == broker.ReasonRequestOver {
				err = nil
			}
			return err
		},
		"close": func(r *rig, v lease.RequestView) error {
			_, _, err := r.engine.CloseIncident(bg, as(pager), v.Incident, "")
			return err
		},
		"denial": func(r *rig, v lease.RequestView) error {
			_, err := r.engine.Vote(bg, person("amy", "finance"), lease.Vote{Request: v.ID})
			if broker.ReasonOf(err) == broker.ReasonRequestOver {
				err = nil
			}
			return err
		},
		"kill switch": func(r *rig, v lease.RequestView) error {
			_, err := r.end(lease.Selector{Tool: "crm.read"}, false)
			return err
		},
	}
	for name, end := range ends {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				r := governedRig(t)
				granted := 0
				for range 30 {
					in := windowFor(r, support)
					v := r.mustAsk("crm.read", func(q *lease.AccessRequest) { q.Incident = in.ID })
					var wg sync.WaitGroup
					wg.Go(func() {
						if err := end(r, v); err != nil {
							t.Error(err)
						}
					})
					wg.Go(func() {
						if name == "expiry" {
							time.Sleep(time.Until(v.ExpiresAt))
						}
						_, err := r.approve(v, person("ann", "finance"))
						if err != nil && broker.ReasonOf(err) != broker.ReasonRequestOver {
							t.Error(err)
						}
						if name == "expiry" && err == nil {
							t.Error("a vote at the instant of expiry counted")
						}
					})
					wg.Wait()
					synctest.Wait()
					got := r.request(v.ID)
					evs := r.events(lease.EventFilter{Grant: got.Grant, Type: audit.GrantCreated})
					switch {
					case got.State == broker.RequestGranted:
						granted++
						if len(evs) != 1 {
							t.Errorf("granted, with %d grants", len(evs))
						}
					case got.Grant != "" || got.State == broker.RequestPending && name != "expiry":
						t.Errorf("%s, grant %q", got.State, got.Grant)
					}
					if name != "denial" && name != "withdrawal" { // a grant ends with what it was under
						if _, err := r.issue("crm.read"); err == nil {
							t.Error("something was given after its end had returned")
						}
					} else if got.Grant != "" {
						_, _, _ = r.engine.WithdrawGrant(bg, as(sam), got.Grant, "")
					}
				}
				t.Logf("%d of 30 were granted before", granted)
			})
		})
	}
}

// TestVoteCommitReadsAgain: what a vote stands on goes between its decision
// and its commit.
func TestVoteCommitReadsAgain(t *testing.T) {
	for name, c := range map[string]struct {
		end  func(ctx context.Context, r *rig, v lease.RequestView) error
		want broker.Reason // of the vote; empty: it is taken, and does not count
	}{
		"own group": {func(ctx context.Context, r *rig, _ lease.RequestView) error {
			return r.engine.PersonSeen(ctx, *person("bob").Person)
		}, broker.ReasonNotEligible},
		"other voter": {func(ctx context.Context, r *rig, _ lease.RequestView) error {
			return r.engine.PersonSeen(ctx, *person("ann").Person)
		}, ""},
		"incident": {func(ctx context.Context, r *rig, v lease.RequestView) error {
			_, _, err := r.engine.CloseIncident(ctx, as(pager), v.Incident, "")
			return err
		}, broker.ReasonRequestOver},
		"withdrawal": {func(ctx context.Context, r *rig, v lease.RequestView) error {
			_, err := r.engine.WithdrawRequest(ctx, as(support), v.ID, "")
			return err
		}, broker.ReasonRequestOver},
		"policy": {func(ctx context.Context, r *rig, _ lease.RequestView) error {
			r.cedar = openPolicies + `@id("no") forbid (principal, action == Action::"approve", resource);`
			return r.engine.Load(ctx, r.snapshot(), "test")
		}, broker.ReasonPolicy},
		"rule": {func(ctx context.Context, r *rig, _ lease.RequestView) error {
			r.yaml = replaceOnce(r.yaml, "max_duration: 2h", "max_duration: 3h")
			return r.engine.Load(ctx, r.snapshot(), "test")
		}, broker.ReasonRequestOver},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				gate := &gateStore{}
				r := governedRig(t, func(r *rig) { r.wrap = gate.wrap })
				in := windowFor(r, support)
				v := r.mustApprove(r.mustAsk("db.read", func(q *lease.AccessRequest) { q.Incident = in.ID }), person("ann", "finance"))
				synctest.Wait()
				release := gate.holdAll(1)
				defer release()
				voted := make(chan error, 1)
				go func() {
					_, err := r.approve(v, person("bob", "security"))
					voted <- err
				}()
				synctest.Wait() // it stands before its commit
				favoured := context.WithValue(bg, favoured{}, true)
				ended := make(chan error, 1)
				go func() { ended <- c.end(favoured, r, v) }()
				synctest.Wait()
				release()
				if err := <-ended; err != nil {
					t.Fatal(err)
				}
				err := <-voted
				if broker.ReasonOf(err) != c.want {
					t.Errorf("the vote: %v; want %q", err, c.want)
				}
				if got := r.request(v.ID); got.State == broker.RequestGranted {
					t.Error("it was granted")
				}
				if n := len(r.events(lease.EventFilter{Type: audit.RequestGranted})); n != 0 {
					t.Errorf("%d grants in the evidence", n)
				}
			})
		})
	}
}

// TestI5_TheCommitReadsVoters: from the commit that says that a voter lost the
// group that a grant stands on, nothing of it becomes active, even before one
// lease was told.
func TestI5_TheCommitReadsVoters(t *testing.T) {
	bubble(t, func(t *testing.T) {
		gate := &gateStore{}
		r := governedRig(t, func(r *rig) { r.wrap = gate.wrap })
		v := r.mustApprove(r.mustAsk("db.read"), person("ann", "finance"))
		r.mustApprove(v, person("bob", "security"))
		h := &hooks{mint: func(_ context.Context, _ providers.MintRequest, mint func() (providers.Minted, error)) (providers.Minted, error) {
			minted, err := mint()
			time.Sleep(3 * time.Second)
			return minted, err
		}}
		r.hooked("", h)
		synctest.Wait()
		issued := make(chan error, 1)
		go func() {
			d, err := r.engine.Issue(context.WithValue(bg, favoured{}, true), as(support), lease.IssueRequest{Tool: "db.read"})
			if err == nil {
				d.Done()
			}
			issued <- err
		}()
		time.Sleep(time.Second)
		release := gate.holdAll(2) // the first is what the identity provider said
		defer release()
		seen := make(chan error, 1)
		go func() { seen <- r.engine.PersonSeen(bg, *person("ann").Person) }()
		if err := <-issued; broker.ReasonOf(err) != broker.ReasonNoGrant {
			t.Errorf("issued: %v; want no_grant", err)
		}
		release()
		if err := <-seen; err != nil {
			t.Error(err)
		}
		time.Sleep(10 * time.Second)
		if n := len(r.world.Live()); n != 0 {
			t.Errorf("%d credentials live on", n)
		}
	})
}

// TestUnknownCommitOfAVote: the store does not say whether a vote's commit
// happened. Voting again tells, and gives nothing twice.
func TestUnknownCommitOfAVote(t *testing.T) {
	for _, carried := range []bool{false, true} {
		bubble(t, func(t *testing.T) {
			faulty := &faultyStore{}
			r := governedRig(t, func(r *rig) { r.wrap = faulty.wrap })
			v := r.mustAsk("crm.read")
			synctest.Wait()
			faulty.failNth(1, carried)
			if _, err := r.approve(v, person("ann", "finance")); broker.ReasonOf(err) != broker.ReasonStore {
				t.Fatalf("the vote: %v", err)
			}
			if got, err := r.approve(v, person("ann", "finance")); err != nil || got.State != broker.RequestGranted {
				t.Errorf("again: %s, %v", got.State, err)
			}
			if n := len(r.events(lease.EventFilter{Type: audit.GrantCreated})); n != 1 {
				t.Errorf("%d grants", n)
			}
		})
	}
}

// TestKillSwitchWithoutTheStore: what ends does not wait for the store.
func TestKillSwitchWithoutTheStore(t *testing.T) {
	bubble(t, func(t *testing.T) {
		faulty := &faultyStore{}
		r := governedRig(t, func(r *rig) { r.wrap = faulty.wrap })
		mine, _, pending := accessOfAll(r)
		asked := r.request(pending)
		synctest.Wait()
		faulty.failAll(true)
		_, err := r.end(lease.Selector{Agent: support}, false)
		r.wantReason(err, broker.ReasonStore)
		for _, id := range mine {
			if _, ok, err := r.engine.Usable(bg, id); ok || err != nil && !errors.Is(err, context.Canceled) {
				t.Errorf("usable %v, %v", ok, err)
			}
		}
		time.Sleep(10 * time.Second)
		if n := len(r.world.Live()) + len(r.asked.Live()); n != 0 {
			t.Errorf("%d credentials live on", n)
		}
		faulty.failAll(false)
		if v, err := r.approve(asked, person("ann", "finance")); err == nil {
			t.Errorf("the first vote after it: %s", v.State)
		}
		time.Sleep(time.Minute)
		for _, id := range mine {
			if l := r.lease(id); l.State != broker.LeaseRevoked {
				t.Errorf("%s is %s", l.Tool, l.State)
			}
		}
		if v := r.request(pending); v.State != broker.RequestWithdrawn || v.Why != "a leak" {
			t.Errorf("the request is %s (%s)", v.State, v.Why)
		}
		for _, what := range []audit.Type{audit.AccessEnding, audit.AccessEnded} {
			if evs := r.events(lease.EventFilter{Type: what}); len(evs) != 1 || evs[0].Details["selector"] != "agent="+support.String() {
				t.Errorf("%s: %+v", what, evs)
			}
		}
		r.mustAsk("crm.read") // it forbids nothing for later
	})
}
