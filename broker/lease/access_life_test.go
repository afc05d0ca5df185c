package lease_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/audit"
	"github.com/mayfly-security/mayfly/broker/lease"
	"github.com/mayfly-security/mayfly/broker/policy"
)

// TestConditionsHoldAsLongAsLeases: each thing that a grant stands on ends its
// leases when it goes, and the cause is in the evidence.
func TestConditionsHoldAsLongAsLeases(t *testing.T) {
	for name, c := range map[string]struct {
		spoil func(r *rig, v lease.RequestView) error
		cause broker.Cause
		final bool // the grant is over, and does not come back
	}{
		"policy": {spoil: func(r *rig, _ lease.RequestView) error {
			return r.reloadPolicies(openPolicies + `@id("no") forbid (principal, action == Action::"issue", resource == Tool::"db.read");`)
		}, cause: broker.CausePolicy},
		"policy errs": {spoil: func(r *rig, _ lease.RequestView) error {
			return r.reloadPolicies(openPolicies + `@id("errs") permit (principal, action == Action::"issue", resource == Tool::"db.read") when { 9223372036854775807 + context.duration_seconds > 0 };`)
		}, cause: broker.CausePolicy},
		"rule": {spoil: func(r *rig, _ lease.RequestView) error { return r.reload("max_duration: 2h", "max_duration: 3h") }, cause: broker.CauseRuleChanged},
		"agent": {spoil: func(r *rig, _ lease.RequestView) error {
			return r.reload("disabled: false # support", "disabled: true # support")
		}, cause: broker.CauseAgentDisabled},
		"tool": {spoil: func(r *rig, _ lease.RequestView) error {
			return r.reload("provider: planned\n    description: reads\n    max_ttl: 15m", "provider: planned\n    description: reads\n    max_ttl: 16m")
		}, cause: broker.CauseToolChanged},
		"voter": {spoil: func(r *rig, _ lease.RequestView) error {
			return r.engine.PersonSeen(bg, *person("ann", "sales").Person)
		}, cause: broker.CauseVoterLost, final: true},
		"incident": {spoil: func(r *rig, v lease.RequestView) error {
			_, _, err := r.engine.CloseIncident(bg, as(pager), v.Incident, "")
			return err
		}, cause: broker.CauseIncidentClosed, final: true},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				r := governedRig(t)
				in := windowFor(r, support)
				v := r.mustAsk("db.read", func(q *lease.AccessRequest) { q.Incident = in.ID })
				r.mustApprove(v, person("ann", "finance"))
				r.mustApprove(v, person("bob", "security"))
				d := r.mustIssue("db.read")
				if _, ok, err := r.engine.Usable(bg, d.Lease.ID); !ok || err != nil {
					t.Fatalf("before: usable %v, %v", ok, err)
				}
				if err := c.spoil(r, v); err != nil {
					t.Fatal(err)
				}
				// The commit counts at once, and the death is quick.
				if _, ok, _ := r.engine.Usable(bg, d.Lease.ID); ok {
					t.Error("usable after its condition was gone")
				}
				l := r.wantState(d.Lease.ID, broker.LeaseRevoked, time.Second)
				if l.Cause != c.cause {
					t.Errorf("the cause is %q; want %q", l.Cause, c.cause)
				}
				evs := r.events(lease.EventFilter{Lease: l.ID, Type: audit.LeaseRevoking})
				if len(evs) != 1 || evs[0].Cause != string(c.cause) {
					t.Errorf("the evidence: %+v", evs)
				}
				if _, err := r.issue("db.read"); err == nil {
					t.Error("something was given afterwards")
				}
				p, err := r.engine.Grants(bg, lease.GrantFilter{All: true, Tool: "db.read"}, "", 0)
				if err != nil || len(p.Items) != 1 {
					t.Fatal(p, err)
				}
				g := p.Items[0]
				if open := g.State == broker.GrantOpen; open == c.final || open && name != "agent" && !g.Suspended {
					t.Errorf("the grant is %s (suspended %v)", g.State, g.Suspended)
				}
			})
		})
	}
}

// TestStandingIsTheRules: where the rule does not say so, a grant outlives its
// voters' membership.
func TestStandingIsTheRules(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := governedRig(t)
		r.mustApprove(r.mustAsk("crm.read"), person("ann", "finance"))
		d := r.mustIssue("crm.read")
		r.seen(person("ann"))
		if _, ok, err := r.engine.Usable(bg, d.Lease.ID); !ok || err != nil {
			t.Errorf("usable %v, %v", ok, err)
		}
		if n := len(r.events(lease.EventFilter{Type: audit.PersonChanged})); n != 1 {
			t.Errorf("%d pieces of evidence that a group was lost", n)
		}
		r.seen(person("ann"))
		if n := len(r.events(lease.EventFilter{Type: audit.PersonChanged})); n != 1 {
			t.Error("what did not change is evidence")
		}
	})
}

// TestOlderSignInGivesNothingBack: a token of before the last sign-in gives
// back no group that the last one took away.
func TestOlderSignInGivesNothingBack(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := governedRig(t)
		old := person("ann", "finance")
		time.Sleep(time.Minute)
		r.seen(person("ann"))
		r.seen(old)
		_, err := r.approve(r.mustAsk("crm.read"), old)
		r.wantReason(err, broker.ReasonNotEligible)
		time.Sleep(time.Minute)
		r.seen(person("ann", "finance"))
		r.mustApprove(r.mustAsk("crm.read"), person("ann", "finance"))
		r.wantReason(r.engine.PersonSeen(bg, broker.Person{Name: "ann"}), broker.ReasonTokenInvalid)
	})
}

// TestOlderTokenGivesNothingBack: neither does one of the same sign-in, which the
// identity provider made before it took the group away, nor one that does not
// say when the person signed in. It would be good for hours otherwise.
func TestOlderTokenGivesNothingBack(t *testing.T) {
	for name, authTime := range map[string]func(time.Time) time.Time{
		"the same sign-in": func(t time.Time) time.Time { return t },
		"no auth_time":     func(time.Time) time.Time { return time.Time{} },
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				r := governedRig(t)
				signedIn := authTime(time.Now())
				token := func(groups ...string) broker.Caller {
					c := person("ann", groups...)
					c.Person.AuthTime, c.Person.IssuedAt = signedIn, time.Now()
					return c
				}
				first := token()
				old := token("finance")
				r.seen(old)
				time.Sleep(time.Minute)
				r.seen(token())
				r.seen(old)
				r.seen(first)
				_, err := r.approve(r.mustAsk("crm.read"), old)
				r.wantReason(err, broker.ReasonNotEligible)
				if n := len(r.events(lease.EventFilter{Type: audit.PersonChanged})); n != 1 {
					t.Errorf("%d pieces of evidence that a group was lost", n)
				}
				// A token that says the same as the last moves it on all the same:
				// one of between the two gives nothing back.
				time.Sleep(time.Minute)
				between := token("finance")
				time.Sleep(time.Minute)
				r.seen(token())
				r.seen(between)
				_, err = r.approve(r.mustAsk("crm.read"), between)
				r.wantReason(err, broker.ReasonNotEligible)
				time.Sleep(time.Minute)
				back := token("finance")
				r.seen(back)
				if back.Person.AuthTime = time.Now(); r.mustApprove(r.mustAsk("crm.read"), back).State != broker.RequestGranted {
					t.Error("back in the group, the vote does not count")
				}
			})
		})
	}
}

// TestVoteOfOneWhoLeftDoesNotCount: between two votes the first voter leaves.
func TestVoteOfOneWhoLeftDoesNotCount(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := governedRig(t)
		v := r.mustApprove(r.mustAsk("db.read"), person("ann", "finance"))
		r.seen(person("ann"))
		v = r.mustApprove(v, person("bob", "security"))
		if v.State != broker.RequestPending || fmt.Sprint(v.Missing) != "[1 of finance]" {
			t.Fatalf("%s, missing %v", v.State, v.Missing)
		}
		// Back in the group, the same yes is counted anew.
		r.seen(person("ann", "finance"))
		if v = r.mustApprove(v, person("ann", "finance")); v.State != broker.RequestGranted || len(v.Approvals) != 2 {
			t.Errorf("%s with %d approvals", v.State, len(v.Approvals))
		}
	})
}

func TestRequestsEnd(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := governedRig(t)
		expires, denied, withdrawn := r.mustAsk("crm.read"), r.mustAsk("crm.read"), r.mustAsk("crm.read")
		if _, err := r.engine.Vote(bg, person("ann", "finance"), lease.Vote{Request: denied.ID, Comment: "no need"}); err != nil {
			t.Fatal(err)
		}
		_, err := r.engine.WithdrawRequest(bg, as(other), withdrawn.ID, "")
		r.wantReason(err, broker.ReasonNotFound)
		_, err = r.engine.WithdrawRequest(bg, person("ann", "finance"), withdrawn.ID, "")
		r.wantReason(err, broker.ReasonPermissionDenied)
		for range 2 {
			if v, err := r.engine.WithdrawRequest(bg, as(support), withdrawn.ID, "changed my mind"); err != nil || v.State != broker.RequestWithdrawn {
				t.Fatal(v, err)
			}
		}
		_, err = r.engine.WithdrawRequest(bg, as(support), denied.ID, "")
		r.wantReason(err, broker.ReasonRequestOver)
		if v, err := r.engine.WithdrawRequest(bg, as(sam), r.mustAsk("crm.read").ID, "not now"); err != nil || v.DecidedBy != broker.WorkloadPrincipal(sam) {
			t.Errorf("an operator withdraws: %+v, %v", v, err)
		}
		time.Sleep(10*time.Minute + time.Second)
		for id, want := range map[broker.RequestID]string{
			expires.ID: "expired nobody decided it in time", denied.ID: "denied no need", withdrawn.ID: "withdrawn changed my mind",
		} {
			if v := r.request(id); fmt.Sprint(v.State, " ", v.Why) != want {
				t.Errorf("%s %s; want %s", v.State, v.Why, want)
			}
		}
		// What ended counts no more.
		for range 32 {
			r.mustAsk("crm.read")
		}
	})
}

func TestIncidentTakesItsRequestsAlong(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := governedRig(t)
		in := windowFor(r, support)
		v := r.mustAsk("crm.read", func(q *lease.AccessRequest) { q.Incident = in.ID })
		free := r.mustAsk("crm.read")
		if _, _, err := r.engine.CloseIncident(bg, as(pager), in.ID, ""); err != nil {
			t.Fatal(err)
		}
		if got := r.request(v.ID); got.State != broker.RequestVoid {
			t.Errorf("the incident's request is %s", got.State)
		}
		if got := r.request(free.ID); got.State != broker.RequestPending {
			t.Errorf("the other request is %s", got.State)
		}
	})
}

func TestWhoSeesRequests(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := governedRig(t)
		mine := r.mustAsk("crm.read")
		byAnn, err := r.engine.CreateRequest(bg, person("ann", "finance"), lease.AccessRequest{Agent: other, Tool: "crm.read", Reason: "for other"})
		if err != nil {
			t.Fatal(err)
		}
		for name, c := range map[string]struct {
			who     broker.Caller
			sees    []broker.RequestID
			votable []broker.RequestID
		}{
			"agent":     {as(support), []broker.RequestID{mine.ID}, nil},
			"other":     {as(other), []broker.RequestID{byAnn.ID}, nil},
			"requester": {person("ann", "finance"), []broker.RequestID{mine.ID, byAnn.ID}, []broker.RequestID{mine.ID}},
			"approver":  {person("bob", "finance"), []broker.RequestID{mine.ID, byAnn.ID}, []broker.RequestID{mine.ID, byAnn.ID}},
			"stranger":  {person("eve", "sales"), nil, nil},
			"owner":     {person("Support@acme.test"), []broker.RequestID{mine.ID}, nil},
			"owners":    {person("olga", "other@acme.test"), []broker.RequestID{byAnn.ID}, nil},
			"no owner":  {person("olga", "Other@acme.test"), nil, nil},
			"operator":  {as(sam), []broker.RequestID{mine.ID, byAnn.ID}, nil},
			"bot":       {as(pager), nil, nil},
		} {
			for _, f := range []lease.RequestFilter{{}, {All: true}, {Votable: true}} {
				p, err := r.engine.Requests(bg, c.who, f, "", 0)
				if err != nil {
					t.Fatal(err)
				}
				var got []broker.RequestID
				for _, v := range p.Items {
					got = append(got, v.ID)
				}
				want := c.sees
				if f.Votable {
					want = c.votable
				}
				slices.Sort(got)
				want = slices.Sorted(slices.Values(want))
				if !slices.Equal(got, want) {
					t.Errorf("%s lists %v with %+v; want %v", name, got, f, want)
				}
			}
			for _, id := range []broker.RequestID{mine.ID, byAnn.ID} {
				_, err := r.engine.Request(bg, c.who, id)
				if sees := err == nil; sees != slices.Contains(c.sees, id) {
					t.Errorf("%s sees %s: %v (%v)", name, id, sees, err)
				}
			}
		}
	})
}

func TestAwaitRequest(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := governedRig(t)
		v := r.mustAsk("db.read")
		if now, err := r.engine.AwaitRequest(bg, as(support), v.ID, broker.Request{}); err != nil || now.ID != v.ID {
			t.Fatal(now, err)
		}
		got := make(chan lease.RequestView, 1)
		go func() {
			seen := v
			for seen.State == broker.RequestPending {
				next, err := r.engine.AwaitRequest(bg, as(support), v.ID, seen.Request)
				if err != nil {
					t.Error(err)
					return
				}
				got <- next
				seen = next
			}
		}()
		synctest.Wait()
		r.mustApprove(v, person("ann", "finance"))
		if next := <-got; len(next.Approvals) != 1 || next.State != broker.RequestPending {
			t.Errorf("first: %+v", next)
		}
		r.mustApprove(v, person("bob", "security"))
		if next := <-got; next.State != broker.RequestGranted {
			t.Errorf("then: %+v", next)
		}
		ctx, cancel := context.WithCancel(bg)
		cancel()
		w := r.mustAsk("db.read")
		if _, err := r.engine.AwaitRequest(ctx, as(support), w.ID, w.Request); !errors.Is(err, context.Canceled) {
			t.Errorf("a caller who left: %v", err)
		}
		_, err := r.engine.AwaitRequest(bg, as(other), w.ID, broker.Request{})
		r.wantReason(err, broker.ReasonNotFound)
	})
}

func TestPersonDrawsNothing(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := governedRig(t)
		r.grant(support, "crm.read", time.Hour)
		_, err := r.engine.Issue(bg, person("sue", "sre"), lease.IssueRequest{Tool: "crm.read"})
		r.wantReason(err, broker.ReasonPermissionDenied)
		d := r.mustIssue("crm.read")
		_, err = r.engine.RevokeLease(bg, person("eve"), d.Lease.ID, "")
		r.wantReason(err, broker.ReasonNotFound)
		_, err = r.engine.SightOf(bg, person("eve"))
		r.wantReason(err, broker.ReasonPermissionDenied)
		if s, err := r.engine.SightOf(bg, as(support)); err != nil || !s.Sees(support) || s.Sees(other) {
			t.Error(s, err)
		}
		// A person is an operator by their group.
		if s, err := r.engine.SightOf(bg, person("sue", "sre")); err != nil || !s.All {
			t.Error(s, err)
		}
		if l, err := r.engine.RevokeLease(bg, person("sue", "sre"), d.Lease.ID, ""); err != nil || l.Cause != broker.CauseRevoked {
			t.Error(l, err)
		}
		// As the identity provider says now, not as the session began.
		r.seen(person("sue"))
		_, err = r.engine.SightOf(bg, person("sue", "sre"))
		r.wantReason(err, broker.ReasonPermissionDenied)
	})
}

func TestRecovery(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := governedRig(t)
		eve := person("eve")
		_, _, err := r.engine.Events(bg, eve, lease.EventFilter{}, 0, 1, false)
		r.wantReason(err, broker.ReasonPermissionDenied)
		for name, call := range map[string]func() error{
			"too long":  func() error { return r.engine.Recover(bg, "person:eve", 2*time.Hour, "locked out", "uid:0") },
			"no time":   func() error { return r.engine.Recover(bg, "person:eve", 0, "locked out", "uid:0") },
			"no reason": func() error { return r.engine.Recover(bg, "person:eve", time.Hour, "", "uid:0") },
			"nobody":    func() error { return r.engine.Recover(bg, "eve", time.Hour, "locked out", "uid:0") },
			"no name":   func() error { return r.engine.Recover(bg, "person:", time.Hour, "locked out", "uid:0") },
			"by nobody": func() error { return r.engine.Recover(bg, "person:eve", time.Hour, "locked out", "") },
		} {
			if err := call(); broker.ReasonOf(err) != broker.ReasonInvalidArgument {
				t.Errorf("%s: %v", name, err)
			}
		}
		if err := r.engine.Recover(bg, "person:eve", time.Hour, "locked out", "uid:0"); err != nil {
			t.Fatal(err)
		}
		if _, _, err := r.engine.Events(bg, eve, lease.EventFilter{}, 0, 1, false); err != nil {
			t.Errorf("in the recovery: %v", err)
		}
		_, _, err = r.engine.Events(bg, person("mallory"), lease.EventFilter{}, 0, 1, false)
		r.wantReason(err, broker.ReasonPermissionDenied)
		// It lets nobody approve.
		_, err = r.approve(r.mustAsk("crm.read"), eve)
		r.wantReason(err, broker.ReasonNotEligible)
		if !strings.Contains(string(r.logs.Bytes()), "RECOVERY IS OPEN") {
			t.Error("nothing loud in the log")
		}
		// Nor be given anything: that asks nobody, and is no part of a recovery.
		_, err = r.engine.CreateGrant(bg, eve, lease.GrantRequest{Agent: support, Tool: "db.read", For: time.Hour, Reason: "repair"})
		r.wantReason(err, broker.ReasonPermissionDenied)
		g := r.grant(support, "db.read", time.Hour)
		if _, _, err := r.engine.WithdrawGrant(bg, eve, g.ID, "repair"); err != nil {
			t.Errorf("ending, in the recovery: %v", err)
		}
		if err := r.engine.EndAccess(bg, eve, lease.Selector{Agent: other}, false, "repair", func(lease.Radius) error { return nil }); err != nil {
			t.Errorf("the kill switch, in the recovery: %v", err)
		}
		if evs := r.events(lease.EventFilter{Type: audit.AccessEnding}); len(evs) != 1 || evs[0].Details["policies"] != "recovery" {
			t.Errorf("the evidence of what was done in it: %+v", evs)
		}
		r.restart() // it outlives that
		if _, _, err := r.engine.Events(bg, eve, lease.EventFilter{}, 0, 1, false); err != nil {
			t.Errorf("after a restart: %v", err)
		}
		time.Sleep(time.Hour)
		_, _, err = r.engine.Events(bg, eve, lease.EventFilter{}, 0, 1, false)
		r.wantReason(err, broker.ReasonPermissionDenied)
		time.Sleep(11 * time.Second)
		if n := len(r.events(lease.EventFilter{Type: audit.RecoveryClosed})); n != 1 {
			t.Errorf("%d ends of it in the evidence", n)
		}
	})
}

// TestLockout: a reload that would let nobody administer is refused, and the
// present set stays.
func TestLockout(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := governedRig(t)
		was := r.engine.Catalog().Policies().Digest()
		r.wantReason(r.reloadPolicies(strings.Replace(openPolicies, `@id("operators") permit`, `@id("operators") forbid`, 1)), broker.ReasonLockout)
		if got := r.engine.Catalog().Policies().Digest(); got != was {
			t.Error("the present set did not stay")
		}
		if n := len(r.events(lease.EventFilter{Type: audit.CatalogRefused})); n != 1 {
			t.Errorf("%d refusals in the evidence", n)
		}
		// A broker that begins with one starts, and says so.
		r.stop()
		r.start()
		if !strings.Contains(string(r.logs.Bytes()), "NOBODY may administer") {
			t.Error("nothing loud in the log")
		}
		if err := r.engine.Recover(bg, broker.WorkloadPrincipal(sam), time.Hour, "repair", "uid:0"); err != nil {
			t.Fatal(err)
		}
		if _, err := r.engine.Preview(bg, as(sam), []policy.Source{{Name: "p.cedar", Text: openPolicies}}); err != nil {
			t.Errorf("in the recovery: %v", err)
		}
		if err := r.reloadPolicies(openPolicies); err != nil {
			t.Error(err)
		}
		r.grant(support, "crm.read", time.Hour)
	})
}

// TestPreviewEndsExactlyThose: loading a set ends exactly the grants that its
// preview named.
func TestPreviewEndsExactlyThose(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := governedRig(t)
		with := func(c string) func(*lease.IssueRequest) {
			return func(q *lease.IssueRequest) { q.Params = map[string]string{"customer": c} }
		}
		wide := r.grant(support, "crm.read", time.Hour)
		one, two := r.mustIssue("crm.read", with("c-1")), r.mustIssue("crm.read", with("c-2"))
		docs := r.mustAsk("docs.search")
		doc := r.mustIssue("docs.search")
		v := r.mustApprove(r.mustAsk("db.read"), person("ann", "finance"))
		r.mustApprove(v, person("bob", "security"))
		db := r.mustIssue("db.read")
		unused := r.grant(other, "docs.search", time.Hour)

		next := openPolicies + `
@id("no-docs") forbid (principal, action == Action::"issue", resource == Tool::"docs.search");
@id("not-c2") forbid (principal, action == Action::"issue", resource == Tool::"crm.read") when { context.params.hasTag("customer") && context.params.getTag("customer") == "c-2" };`
		_, err := r.engine.Preview(bg, as(support), nil)
		r.wantReason(err, broker.ReasonPermissionDenied)
		p, err := r.engine.Preview(bg, as(sam), []policy.Source{{Name: "policies.cedar", Text: next}})
		if err != nil || len(p.Problems) > 0 {
			t.Fatal(p.Problems, err)
		}
		ends := map[broker.GrantID]int{}
		for _, g := range p.Ends {
			ends[g.Grant.ID] = g.Leases
			if g.Why == "" {
				t.Error("it does not say why")
			}
		}
		if len(ends) != 3 || ends[wide.ID] != 1 || ends[docs.Grant] != 1 || ends[unused.ID] != 0 || p.Grants != 4 {
			t.Errorf("the preview of %d grants ends %v", p.Grants, ends)
		}
		if fmt.Sprint(p.Added, p.Removed, p.Changed) != "[no-docs not-c2] [] []" {
			t.Errorf("added %v, removed %v, changed %v", p.Added, p.Removed, p.Changed)
		}
		turned := map[string]bool{}
		for _, d := range p.Turns {
			if d.Action == policy.ActionIssue {
				turned[d.About] = true
			}
			if !d.Was || d.Now || d.Why == "" {
				t.Errorf("turned: %+v", d)
			}
		}
		if !turned["docs.search"] || !turned["crm.read"] || turned["db.read"] {
			t.Errorf("turned decisions: %v", turned)
		}
		if l := r.lease(two.Lease.ID); l.State != broker.LeaseActive {
			t.Fatal("a preview ended something")
		}
		if err := r.reloadPolicies(next); err != nil {
			t.Fatal(err)
		}
		for id, alive := range map[broker.LeaseID]bool{one.Lease.ID: true, two.Lease.ID: false, doc.Lease.ID: false, db.Lease.ID: true} {
			if _, ok, err := r.engine.Usable(bg, id); ok != alive || err != nil {
				t.Errorf("%s: usable %v, %v; want %v", id, ok, err, alive)
			}
			if l := r.lease(id); (l.State == broker.LeaseActive) != alive || !alive && l.Cause != broker.CausePolicy {
				t.Errorf("%s is %s (%s)", id, l.State, l.Cause)
			}
		}
		// The same again changes nothing.
		if p, err := r.engine.Preview(bg, as(sam), []policy.Source{{Name: "policies.cedar", Text: next}}); err != nil || len(p.Ends) != 0 || p.Digest != p.Present {
			t.Errorf("the preview of what is loaded: %+v, %v", p.Ends, err)
		}
		for _, bad := range []string{`permit (principal, action, resource) when { context.nothing };`, `forbid (principal, action, resource);`} {
			if p, err := r.engine.Preview(bg, as(sam), []policy.Source{{Name: "bad.cedar", Text: bad}}); err != nil || len(p.Problems) == 0 {
				t.Errorf("%s: %+v, %v", bad, p.Problems, err)
			}
		}
		_, err = r.engine.Preview(bg, as(sam), []policy.Source{{Name: "big.cedar", Text: strings.Repeat(" ", 2<<20)}})
		r.wantReason(err, broker.ReasonTooLarge)
	})
}

func TestExplain(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := governedRig(t)
		r.grant(support, "crm.read", time.Hour)
		for name, c := range map[string]struct {
			who      broker.Caller
			ask      lease.ExplainRequest
			want     broker.Reason
			possible bool
			says     string
		}{
			"own issue":        {as(support), lease.ExplainRequest{Action: policy.ActionIssue, Tool: "crm.read"}, "", true, "issue"},
			"no grant":         {as(support), lease.ExplainRequest{Action: policy.ActionIssue, Tool: "db.read"}, "", false, "no grant"},
			"own request":      {as(support), lease.ExplainRequest{Action: policy.ActionRequest, Tool: "db.read"}, "", true, "1 of finance and 1 of security"},
			"own approval":     {person("ann", "finance"), lease.ExplainRequest{Action: policy.ActionApprove, Tool: "crm.read", Agent: support}, "", true, "approve"},
			"in no group":      {person("eve"), lease.ExplainRequest{Action: policy.ActionApprove, Tool: "crm.read", Agent: support}, "", false, "approval rule"},
			"own owner":        {person("support@acme.test", "finance"), lease.ExplainRequest{Action: policy.ActionApprove, Tool: "crm.read", Agent: support}, "", false, "owns"},
			"administer":       {person("eve"), lease.ExplainRequest{Action: policy.ActionAdminister, Verb: policy.VerbMakeGrant}, "", false, "no policy"},
			"somebody else":    {person("eve"), lease.ExplainRequest{Action: policy.ActionAdminister, Verb: policy.VerbMakeGrant, Principal: "person:ann"}, broker.ReasonPermissionDenied, false, ""},
			"for an operator":  {as(sam), lease.ExplainRequest{Action: policy.ActionAdminister, Verb: policy.VerbMakeGrant, Principal: "person:ann", Groups: []string{"sre"}}, "", true, "operators"},
			"another agent's":  {as(sam), lease.ExplainRequest{Action: policy.ActionIssue, Tool: "crm.read", Principal: broker.WorkloadPrincipal(support)}, "", true, "issue"},
			"no tool":          {as(support), lease.ExplainRequest{Action: policy.ActionIssue, Tool: "nothing"}, broker.ReasonToolUnknown, false, ""},
			"no principal":     {as(sam), lease.ExplainRequest{Action: policy.ActionIssue, Tool: "crm.read", Principal: "eve"}, broker.ReasonInvalidArgument, false, ""},
			"no incident":      {as(support), lease.ExplainRequest{Action: policy.ActionIssue, Tool: "crm.read", Incident: "i1"}, broker.ReasonNotFound, false, ""},
			"open an incident": {as(pager), lease.ExplainRequest{Action: policy.ActionOpenIncident, Tool: "crm.read", Agent: support}, "", true, "windows"},
			"no opener":        {as(sam), lease.ExplainRequest{Action: policy.ActionOpenIncident, Tool: "crm.read", Agent: support}, "", false, "opener"},
			"an odd action":    {as(support), lease.ExplainRequest{Action: "fly", Tool: "crm.read"}, "", false, "fly"},
		} {
			x, err := r.engine.Explain(bg, c.who, c.ask)
			if broker.ReasonOf(err) != c.want {
				t.Errorf("%s: %v; want %q", name, err, c.want)
			}
			if err == nil && (x.Possible != c.possible || !strings.Contains(x.Summary, c.says)) {
				t.Errorf("%s: possible %v, %q; want %v, %q", name, x.Possible, x.Summary, c.possible, c.says)
			}
		}
	})
}

// TestRestoreEndsRequests: nothing of before a backup is given, what was asked
// for too.
func TestRestoreEndsRequests(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := governedRig(t)
		v := r.mustApprove(r.mustAsk("db.read"), person("ann", "finance"))
		r.engine.Close()
		if err := lease.MarkBackup(bg, r.db, time.Now(), "test"); err != nil {
			t.Fatal(err)
		}
		r.restart()
		if got := r.request(v.ID); got.State != broker.RequestVoid {
			t.Errorf("the request is %s", got.State)
		}
		_, err := r.approve(v, person("bob", "security"))
		r.wantReason(err, broker.ReasonRequestOver)
	})
}

// TestUserTokenIsForgotten: a token's binding goes with its end.
func TestUserTokenIsForgotten(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := governedRig(t)
		ask := func(agent spiffeid.ID, until time.Time) error {
			_, err := r.engine.CreateRequest(bg, as(agent), lease.AccessRequest{Tool: "crm.read", Reason: "a test",
				OnBehalfOf: &broker.User{Name: "uma", Issuer: issuer, Subject: "s"}, UserToken: "token", UserUntil: until})
			return err
		}
		until := time.Now().Add(time.Minute)
		for range 2 { // the same agent may show it again
			if err := ask(support, until); err != nil {
				t.Fatal(err)
			}
		}
		r.wantReason(ask(other, until), broker.ReasonTokenReplayed)
		time.Sleep(2 * time.Minute)
		if err := ask(other, time.Now().Add(time.Minute)); err != nil {
			t.Errorf("after its end: %v", err)
		}
	})
}

// TestBreakGlass: a rule for emergencies is a rule like another, and loud.
func TestBreakGlass(t *testing.T) {
	bubble(t, func(t *testing.T) {
		reg := prometheus.NewRegistry()
		r := governedRig(t, func(r *rig) { r.tune = func(c *lease.Config) { c.Metrics = reg } })
		r.mustAsk("crm.read")
		v := r.mustAsk("crm.read", func(q *lease.AccessRequest) { q.BreakGlass = true })
		if v.Rule != "emergency" || !v.BreakGlass || v.Duration != 30*time.Minute || fmt.Sprint(v.Missing) != "[1 of oncall]" {
			t.Fatalf("the request: %+v", v)
		}
		_, err := r.approve(v, person("ann", "finance")) // the ordinary rule's group is not asked
		r.wantReason(err, broker.ReasonNotEligible)
		v = r.mustApprove(v, person("ona", "oncall"))
		d := r.mustIssue("crm.read")
		p, err := r.engine.Requests(bg, as(sam), lease.RequestFilter{All: true, BreakGlass: true}, "", 0)
		if err != nil || len(p.Items) != 1 || p.Items[0].ID != v.ID {
			t.Errorf("for review: %+v, %v", p.Items, err)
		}
		if n := strings.Count(string(r.logs.Bytes()), "BREAK-GLASS"); n != 2 {
			t.Errorf("%d lines in the log; want one for the asking and one for the giving", n)
		}
		if evs := r.events(lease.EventFilter{Request: v.ID, Type: audit.GrantCreated}); len(evs) != 1 || evs[0].Details["break_glass"] != "true" {
			t.Errorf("the evidence: %+v", evs)
		}
		metrics := map[string]float64{}
		families, err := reg.Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range families {
			for _, m := range f.Metric {
				metrics[f.GetName()] += m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
		if metrics["mayfly_break_glass_requests_total"] != 1 || metrics["mayfly_requests_waiting"] != 1 || metrics["mayfly_recovery_open"] != 0 || metrics["mayfly_requests_total"] != 3 {
			t.Errorf("the metrics: %v", metrics)
		}
		// The grant is bound to its own rule.
		if err := r.reload("max_duration: 1h\n    expires", "max_duration: 2h\n    expires"); err != nil {
			t.Fatal(err)
		}
		if _, ok, err := r.engine.Usable(bg, d.Lease.ID); !ok || err != nil {
			t.Errorf("after the other rule was changed: usable %v, %v", ok, err)
		}
		if err := r.reload("max_duration: 30m", "max_duration: 20m"); err != nil {
			t.Fatal(err)
		}
		if l := r.wantState(d.Lease.ID, broker.LeaseRevoked, time.Second); l.Cause != broker.CauseRuleChanged {
			t.Errorf("the cause is %s", l.Cause)
		}
	})
}

// TestAnIncidentHasRoomForSoMany: what is asked for under an incident ends with
// it, and one incident takes so many.
func TestAnIncidentHasRoomForSoMany(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := governedRig(t)
		in := windowFor(r, support)
		under := func(q *lease.AccessRequest) { q.Incident = in.ID }
		var last lease.RequestView
		for range 199 { // and one of the window
			last = r.mustAsk("docs.search", under)
		}
		_, err := r.ask("docs.search", under)
		r.wantReason(err, broker.ReasonIncidentLimit)
		for range 256 - 199 {
			r.mustAsk("docs.search")
		}
		_, err = r.ask("docs.search") // nor are there ever more of what is given for the asking
		r.wantReason(err, broker.ReasonRequestLimit)
		if _, _, err := r.engine.CloseIncident(bg, as(pager), in.ID, ""); err != nil {
			t.Fatal(err)
		}
		r.mustAsk("docs.search")
		p, err := r.engine.Grants(bg, lease.GrantFilter{All: true, Incident: in.ID}, "", lease.MaxPage)
		if err != nil || len(p.Items) != 200 {
			t.Fatal(len(p.Items), err)
		}
		for _, g := range p.Items {
			if g.State != broker.GrantClosed {
				t.Errorf("grant %s is %s", g.ID, g.State)
			}
		}
		if got := r.request(last.ID); got.State != broker.RequestGranted {
			t.Errorf("the request is %s", got.State)
		}
	})
}

// TestTheCatalogsGroupsCount: a person whom the catalog puts into a group
// votes for it, and a grant that stands on that ends when the catalog does not
// any more.
func TestTheCatalogsGroupsCount(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := governedRig(t, func(r *rig) {
			r.yaml = replaceOnce(r.yaml, "  - name: closers\n", "  - name: finance\n    people: [ann, amy]\n  - name: closers\n")
		})
		v := r.mustApprove(r.mustAsk("db.read"), person("ann"))
		v = r.mustApprove(v, person("bob", "security"))
		if v.State != broker.RequestGranted {
			t.Fatalf("%s, missing %v", v.State, v.Missing)
		}
		d := r.mustIssue("db.read")
		r.seen(person("ann")) // the identity provider has nothing to say of it
		if _, ok, err := r.engine.Usable(bg, d.Lease.ID); !ok || err != nil {
			t.Fatalf("usable %v, %v", ok, err)
		}
		if err := r.reload("people: [ann, amy]", "people: [amy]"); err != nil {
			t.Fatal(err)
		}
		if l := r.wantState(d.Lease.ID, broker.LeaseRevoked, time.Second); l.Cause != broker.CauseVoterLost {
			t.Errorf("the cause is %s", l.Cause)
		}
		if err := r.reload("people: [amy]", "people: [ann, amy]"); err != nil {
			t.Fatal(err)
		}
		if g := r.grantNow(v.Grant); g.State != broker.GrantWithdrawn {
			t.Errorf("the grant is %s: it is over for good", g.State)
		}
	})
}
