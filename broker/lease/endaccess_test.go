package lease_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/audit"
	"github.com/mayfly-security/mayfly/broker/lease"
	"github.com/mayfly-security/mayfly/providers/providertest"
	"github.com/mayfly-security/mayfly/store"
)

// end pulls the kill switch, and returns everything that was told.
func (r *rig) end(s lease.Selector, dry bool) ([]lease.Radius, error) {
	var told []lease.Radius
	err := r.engine.EndAccess(bg, as(sam), s, dry, "a leak", func(rad lease.Radius) error {
		told = append(told, rad)
		return nil
	})
	return told, err
}

// accessOfAll gives support and other something of everything, and leaves one
// request of support's pending.
func accessOfAll(r *rig) (mine, others []broker.LeaseID, pending broker.RequestID) {
	r.t.Helper()
	for _, tool := range []string{"db.read", "vault.read", "cloud.read", "crm.read"} {
		r.grant(support, tool, time.Hour)
		mine = append(mine, r.mustIssue(tool).Lease.ID)
	}
	r.grant(other, "crm.read", time.Hour)
	d, err := r.engine.Issue(bg, as(other), lease.IssueRequest{Tool: "crm.read"})
	if err != nil {
		r.t.Fatal(err)
	}
	d.Done()
	return mine, []broker.LeaseID{d.Lease.ID}, r.mustAsk("crm.read").ID
}

func TestKillSwitch(t *testing.T) {
	for name, c := range map[string]struct {
		selector func(r *rig) lease.Selector
		leases   int // of mine, in order; others only if all is set
		grants   int
		requests int
		ends     func(l broker.Lease) bool
	}{
		"agent":    {func(*rig) lease.Selector { return lease.Selector{Agent: support} }, 4, 4, 1, func(l broker.Lease) bool { return l.Agent == support }},
		"tool":     {func(*rig) lease.Selector { return lease.Selector{Tool: "crm.read"} }, 2, 2, 1, func(l broker.Lease) bool { return l.Tool == "crm.read" }},
		"provider": {func(*rig) lease.Selector { return lease.Selector{Provider: "recorded"} }, 1, 1, 0, func(l broker.Lease) bool { return l.Provider == "recorded" }},
		"owner":    {func(*rig) lease.Selector { return lease.Selector{Owner: "other@acme.test"} }, 1, 1, 0, func(l broker.Lease) bool { return l.Agent == other }},
		"all":      {func(*rig) lease.Selector { return lease.Selector{All: true} }, 5, 5, 1, func(broker.Lease) bool { return true }},
		"nothing":  {func(*rig) lease.Selector { return lease.Selector{Owner: "nobody@acme.test"} }, 0, 0, 0, func(broker.Lease) bool { return false }},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				r := governedRig(t)
				mine, others, pending := accessOfAll(r)
				s := c.selector(r)
				dry, err := r.end(s, true)
				if err != nil || len(dry) != 1 {
					t.Fatal(dry, err)
				}
				want := lease.Radius{Grants: c.grants, Requests: c.requests, Leases: c.leases, Alive: c.leases}
				same := func(got lease.Radius) bool {
					return got.Grants == want.Grants && got.Requests == want.Requests && got.Leases == want.Leases && got.Alive == want.Alive && !got.Done
				}
				if !same(dry[0]) {
					t.Errorf("the dry run says %+v; want %+v", dry[0], want)
				}
				for _, id := range append(mine, others...) {
					if l := r.lease(id); l.State != broker.LeaseActive {
						t.Fatalf("the dry run ended %s", id)
					}
				}
				told, err := r.end(s, false)
				if err != nil {
					t.Fatal(err)
				}
				if c.leases > 0 && !same(told[0]) {
					t.Errorf("first told %+v; want %+v", told[0], want)
				}
				last := told[len(told)-1]
				if !last.Done || last.Alive != 0 || last.Leases != c.leases {
					t.Errorf("last told: %+v", last)
				}
				for i := 1; i < len(told); i++ {
					if told[i].Alive > told[i-1].Alive {
						t.Errorf("it counts up: %+v", told)
					}
				}
				for _, id := range append(mine, others...) {
					l := r.lease(id)
					if c.ends(l) != (l.State == broker.LeaseRevoked) || c.ends(l) && l.Cause != broker.CauseRevoked {
						t.Errorf("%s of %s: %s (%s)", l.Tool, l.Agent, l.State, l.Cause)
					}
				}
				if got := r.request(pending); (got.State == broker.RequestWithdrawn) != (c.requests == 1) {
					t.Errorf("the request is %s", got.State)
				}
				for _, what := range []audit.Type{audit.AccessEnding, audit.AccessEnded} {
					if evs := r.events(lease.EventFilter{Type: what}); len(evs) != 1 || evs[0].Details["selector"] != s.String() || evs[0].Reason != "a leak" {
						t.Errorf("%s: %+v", what, evs)
					}
				}
			})
		})
	}
}

// TestKillSwitchByPerson: whose vote it was, who asked, and for whom.
func TestKillSwitchByPerson(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := governedRig(t)
		v := r.mustApprove(r.mustAsk("crm.read"), person("ann", "finance"))
		mine := r.mustIssue("crm.read").Lease.ID
		r.grant(other, "crm.read", time.Hour)
		told, err := r.end(lease.Selector{Person: "ann"}, false)
		if err != nil || !told[len(told)-1].Done || told[0].Leases != 1 || told[0].Grants != 1 {
			t.Fatal(told, err)
		}
		if l := r.lease(mine); l.State != broker.LeaseRevoked {
			t.Errorf("the lease is %s", l.State)
		}
		p, err := r.engine.Grants(bg, lease.GrantFilter{All: true}, "", 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, g := range p.Items {
			if (g.State == broker.GrantWithdrawn) != (g.ID == v.Grant) {
				t.Errorf("grant of %s is %s", g.Agent, g.State)
			}
		}
	})
}

func TestKillSwitchRefusals(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := governedRig(t)
		never := func(lease.Radius) error { t.Error("a refused call told something"); return nil }
		for name, c := range map[string]struct {
			who    broker.Caller
			s      lease.Selector
			reason string
			want   broker.Reason
		}{
			"an agent":       {as(support), lease.Selector{All: true}, "x", broker.ReasonPermissionDenied},
			"a person":       {person("eve"), lease.Selector{All: true}, "x", broker.ReasonPermissionDenied},
			"nothing":        {as(sam), lease.Selector{}, "x", broker.ReasonInvalidArgument},
			"two things":     {as(sam), lease.Selector{All: true, Tool: "crm.read"}, "x", broker.ReasonInvalidArgument},
			"no reason":      {as(sam), lease.Selector{All: true}, "", broker.ReasonInvalidArgument},
			"ANSI in a name": {as(sam), lease.Selector{Tool: "\x1b[1m"}, "x", broker.ReasonInvalidArgument},
		} {
			err := r.engine.EndAccess(bg, c.who, c.s, false, c.reason, never)
			if broker.ReasonOf(err) != c.want {
				t.Errorf("%s: %v; want %s", name, err, c.want)
			}
		}
		if n := len(r.events(lease.EventFilter{Type: audit.AccessEnding})); n != 0 {
			t.Errorf("%d endings in the evidence", n)
		}
	})
}

// TestKillSwitchGoesOnWithoutItsCaller: an error of told, or a caller that
// leaves, ends the telling alone; so does a restart.
func TestKillSwitchGoesOnWithoutItsCaller(t *testing.T) {
	for _, how := range []string{"told", "caller", "restart"} {
		t.Run(how, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				r := governedRig(t)
				mine, _, pending := accessOfAll(r)
				r.world.SetScript(func(providertest.Call) providertest.Fault { return providertest.Fault{Effect: providertest.Away} })
				gone := errors.New("gone")
				ctx, cancel := context.WithCancel(bg)
				defer cancel()
				err := r.engine.EndAccess(ctx, as(sam), lease.Selector{Agent: support}, false, "a leak", func(rad lease.Radius) error {
					switch how {
					case "told":
						return gone
					case "caller":
						cancel()
					case "restart":
						cancel()
					}
					return nil
				})
				if !errors.Is(err, gone) && !errors.Is(err, context.Canceled) {
					t.Errorf("the call returned %v", err)
				}
				if how == "restart" {
					r.restart()
				}
				time.Sleep(5 * time.Second)
				if got := r.request(pending); got.State != broker.RequestWithdrawn {
					t.Errorf("the request is %s", got.State)
				}
				for _, id := range mine {
					if l := r.lease(id); l.State == broker.LeaseActive {
						t.Errorf("%s is still active", l.Tool)
					}
				}
				if n := len(r.events(lease.EventFilter{Type: audit.AccessEnded})); n != 0 {
					t.Error("ended, it says, while the provider is away")
				}
				r.world.SetScript(nil)
				time.Sleep(3 * time.Minute)
				for _, id := range mine {
					if l := r.lease(id); l.State != broker.LeaseRevoked {
						t.Errorf("%s is %s", l.Tool, l.State)
					}
				}
				if n := len(r.events(lease.EventFilter{Type: audit.AccessEnded})); n != 1 {
					t.Errorf("%d ends in the evidence", n)
				}
			})
		})
	}
}

// TestKillSwitchSurvivesTheBroker: the broker dies at each of the commits of a
// kill switch. When it is back, everything that was matched ends, or, if
// nothing had been decided, nothing does.
func TestKillSwitchSurvivesTheBroker(t *testing.T) {
	for n := 1; ; n++ {
		last := false
		for _, carry := range []bool{false, true} {
			t.Run(fmt.Sprintf("%d_%v", n, carry), func(t *testing.T) {
				bubble(t, func(t *testing.T) {
					var now *mortal
					r := governedRig(t, func(r *rig) {
						r.wrap = func(s store.Store) store.Store { now = &mortal{Store: s}; return now }
					})
					mine, others, pending := accessOfAll(r)
					synctest.Wait()
					now.arm(n, carry)
					ctx, cancel := context.WithTimeout(bg, time.Minute)
					defer cancel()
					err := r.engine.EndAccess(ctx, as(sam), lease.Selector{Agent: support}, false, "a leak", func(lease.Radius) error { return nil })
					last = err == nil
					r.restart()
					time.Sleep(time.Minute)
					decided := len(r.events(lease.EventFilter{Type: audit.AccessEnding}))
					if decided != 1 && (n > 1 || carry) {
						t.Errorf("%d decisions in the evidence", decided)
					}
					if ended := len(r.events(lease.EventFilter{Type: audit.AccessEnded})); ended != decided {
						t.Errorf("%d decisions and %d ends in the evidence", decided, ended)
					}
					want := map[int]broker.LeaseState{0: broker.LeaseActive, 1: broker.LeaseRevoked}[decided]
					for _, id := range mine {
						if l := r.lease(id); l.State != want {
							t.Errorf("%s is %s; want %s", l.Tool, l.State, want)
						}
					}
					if l := r.lease(others[0]); l.State != broker.LeaseActive {
						t.Errorf("the other agent's lease is %s", l.State)
					}
					if got := r.request(pending); decided == 1 && got.State != broker.RequestWithdrawn {
						t.Errorf("the request is %s", got.State)
					}
					if left := r.keys("sweep|"); len(left) != 0 {
						t.Errorf("left: %q", left)
					}
				})
			})
		}
		if last || t.Failed() {
			if n < 5 {
				t.Errorf("it took %d commits only", n)
			}
			return
		}
	}
}

// TestDisabledToLastDeath: from the disabling of an agent to the death of the
// last of its 100 leases, by the machine's clock.
func TestDisabledToLastDeath(t *testing.T) {
	const leases = 100
	r := newRig(t)
	for _, tool := range []string{"db.read", "crm.read"} {
		r.grant(support, tool, time.Hour)
	}
	var ids []broker.LeaseID
	for i := range leases {
		ids = append(ids, r.mustIssue([]string{"db.read", "crm.read"}[i%2]).Lease.ID)
	}
	began := time.Now()
	if err := r.reload("disabled: false # support", "disabled: true # support"); err != nil {
		t.Fatal(err)
	}
	for {
		left := 0
		for _, id := range ids {
			if l := r.lease(id); l.State != broker.LeaseRevoked {
				left++
			} else if l.Cause != broker.CauseAgentDisabled {
				t.Fatalf("the cause is %s", l.Cause)
			}
		}
		if left == 0 && len(r.world.Live()) == 0 {
			break
		}
		if time.Since(began) > 10*time.Second {
			t.Fatalf("after 10 s %d leases are left", left)
		}
		time.Sleep(time.Millisecond)
	}
	took := time.Since(began)
	t.Logf("%d leases dead %s after their agent was disabled", leases, took.Round(time.Millisecond))
	if took > time.Second {
		t.Errorf("it took %s; want less than 1s", took)
	}
}
