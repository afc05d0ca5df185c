package lease_test

import (
	"context"
	"fmt"
	"maps"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/audit"
	"github.com/mayfly-security/mayfly/broker/lease"
)

var bg = context.Background()

func TestPolicyGrantsAtOnce(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := governedRig(t)
		v := r.mustAsk("docs.search", func(q *lease.AccessRequest) { q.Ticket = "OPS-7"; q.Key = "k" })
		if v.State != broker.RequestGranted || v.Grant == "" || v.Duration != 15*time.Minute {
			t.Fatalf("the request: %+v", v)
		}
		d := r.mustIssue("docs.search")
		if d.Lease.Grant != v.Grant {
			t.Errorf("the lease is of grant %s; want %s", d.Lease.Grant, v.Grant)
		}
		if again := r.mustAsk("docs.search", func(q *lease.AccessRequest) { q.Ticket = "OPS-7"; q.Key = "k" }); again.ID != v.ID {
			t.Errorf("the same key made %s and %s", v.ID, again.ID)
		}
		_, err := r.ask("docs.search", func(q *lease.AccessRequest) { q.Ticket = "OPS-8"; q.Key = "k" })
		r.wantReason(err, broker.ReasonKeyReused)

		var created audit.Event
		for _, ev := range r.events(lease.EventFilter{Grant: v.Grant, Type: audit.GrantCreated}) {
			created = ev
		}
		if created.Request != v.ID || created.Details["policies"] != "ask" || len(created.Details["policy_digest"]) != 64 || created.Details["ticket"] != "OPS-7" {
			t.Errorf("the evidence of the grant: %+v", created)
		}
		for _, ev := range r.events(lease.EventFilter{Lease: d.Lease.ID, Type: audit.LeaseActive}) {
			if ev.Request != v.ID || ev.Details["policies"] != "issue" {
				t.Errorf("the evidence of the lease: %+v", ev)
			}
		}
	})
}

// TestToolsThatCanBeAskedFor: an agent sees what policies let it ask for, and
// nothing else that it has no grant for.
func TestToolsThatCanBeAskedFor(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := governedRig(t, func(r *rig) { r.cedar = "" }) // the built-in set
		r.grant(support, "docs.search", time.Hour)
		views, err := r.engine.Tools(bg, as(support))
		if err != nil {
			t.Fatal(err)
		}
		got := map[string]bool{}
		for _, v := range views {
			got[v.Name] = v.Requestable
		}
		want := map[string]bool{"crm.read": true, "db.read": true, "vault.read": true, "docs.search": false}
		if !maps.Equal(got, want) {
			t.Errorf("it sees %v; want %v", got, want)
		}
		if views, err := r.engine.Tools(bg, person("eve")); err != nil || len(views) != 0 {
			t.Errorf("a person sees %v, %v", views, err)
		}
		_, err = r.ask("docs.search") // a tool without a rule is not given for the asking
		r.wantReason(err, broker.ReasonPolicy)
		evs := r.events(lease.EventFilter{Type: audit.RequestRefused})
		if len(evs) != 1 || len(evs[0].Details["policy_digest"]) != 64 || evs[0].Cause != string(broker.ReasonPolicy) {
			t.Errorf("the evidence of the refusal: %+v", evs)
		}
	})
}

func TestTwoPeopleOfTwoGroups(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := governedRig(t)
		v := r.mustAsk("db.read", lasting(time.Hour))
		if v.State != broker.RequestPending || v.MaxUses != 1 || fmt.Sprint(v.Missing) != "[1 of finance 1 of security]" {
			t.Fatalf("the request: %+v", v)
		}
		// One person in both groups counts once.
		v = r.mustApprove(v, person("ann", "finance", "security"))
		if v.State != broker.RequestPending || len(v.Missing) != 1 {
			t.Fatalf("after one vote: %+v", v)
		}
		if again := r.mustApprove(v, person("ann", "finance", "security")); len(again.Approvals) != 1 {
			t.Errorf("the same vote again made %d approvals", len(again.Approvals))
		}
		half := 30 * time.Minute
		bob := person("bob", "finance")
		v, err := r.engine.Vote(bg, bob, lease.Vote{Request: v.ID, Approve: true, Digest: v.Digest, Duration: &half, Comment: "half will do"})
		if err != nil || v.State != broker.RequestGranted {
			t.Fatalf("the second vote: %+v, %v", v, err)
		}
		p, err := r.engine.Grants(bg, lease.GrantFilter{}, "", 0)
		if err != nil || len(p.Items) != 1 {
			t.Fatalf("the grants: %+v, %v", p, err)
		}
		g := p.Items[0]
		if g.ID != v.Grant || g.NotAfter.Sub(g.NotBefore) != half || g.MaxUses != 1 || len(g.Voters) != 2 || g.Rule != "both" || g.Request != v.ID {
			t.Errorf("the grant: %+v", g)
		}
		r.mustIssue("db.read")
		_, err = r.issue("db.read")
		r.wantReason(err, broker.ReasonGrantUsed)
		types := map[audit.Type]int{}
		for _, ev := range r.events(lease.EventFilter{}) {
			if ev.Request == v.ID {
				types[ev.Type]++
			}
		}
		if types[audit.RequestCreated] != 1 || types[audit.RequestApproved] != 2 || types[audit.RequestGranted] != 1 || types[audit.GrantCreated] != 1 {
			t.Errorf("the evidence: %v", types)
		}
	})
}

// TestExactlyWhatWasAgreedTo: an approval of some values gives none but those.
func TestExactlyWhatWasAgreedTo(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := governedRig(t)
		with := func(p map[string]string) func(*lease.IssueRequest) {
			return func(q *lease.IssueRequest) { q.Params = p }
		}
		r.mustApprove(r.mustAsk("crm.read", params(map[string]string{"customer": "c-1"})), person("ann", "finance"))
		for _, p := range []map[string]string{nil, {"customer": "c-2"}} {
			_, err := r.issue("crm.read", with(p))
			r.wantReason(err, broker.ReasonNoGrant)
		}
		r.mustIssue("crm.read", with(map[string]string{"customer": "c-1"}))

		// What was asked for without a value gives none with one.
		r2 := governedRig(t)
		r2.mustApprove(r2.mustAsk("crm.read"), person("ann", "finance"))
		_, err := r2.issue("crm.read", with(map[string]string{"customer": "c-1"}))
		r2.wantReason(err, broker.ReasonNoGrant)
		r2.mustIssue("crm.read")
	})
}

func TestRequestRefusals(t *testing.T) {
	user := func(at time.Time) *broker.User {
		return &broker.User{Name: "uma", Issuer: issuer, Subject: "sub-uma", AuthTime: at}
	}
	for name, c := range map[string]struct {
		caller broker.Caller
		tool   string
		change func(r *rig, q *lease.AccessRequest)
		want   broker.Reason
	}{
		"nobody":             {caller: broker.Caller{}, want: broker.ReasonUnauthenticated},
		"no agent":           {caller: as(pager), want: broker.ReasonAgentUnknown},
		"for another agent":  {change: func(_ *rig, q *lease.AccessRequest) { q.Agent = other }, want: broker.ReasonPermissionDenied},
		"person without one": {caller: person("ann"), want: broker.ReasonInvalidArgument},
		"unknown agent":      {caller: person("ann"), change: func(_ *rig, q *lease.AccessRequest) { q.Agent = pager }, want: broker.ReasonAgentUnknown},
		"no reason":          {change: func(_ *rig, q *lease.AccessRequest) { q.Reason = "" }, want: broker.ReasonInvalidArgument},
		"ANSI in the reason": {change: func(_ *rig, q *lease.AccessRequest) { q.Reason = "\x1b[2Jfine" }, want: broker.ReasonInvalidArgument},
		"bidi in the ticket": {change: func(_ *rig, q *lease.AccessRequest) { q.Ticket = "a\u202eb" }, want: broker.ReasonInvalidArgument},
		"bad key":            {change: func(_ *rig, q *lease.AccessRequest) { q.Key = "a|b" }, want: broker.ReasonInvalidArgument},
		"no such tool":       {tool: "nothing|such", want: broker.ReasonToolUnknown},
		"no emergency rule":  {tool: "db.read", change: func(_ *rig, q *lease.AccessRequest) { q.BreakGlass = true }, want: broker.ReasonInvalidArgument},
		"too long":           {change: func(_ *rig, q *lease.AccessRequest) { d := 61 * time.Minute; q.Duration = &d }, want: broker.ReasonInvalidArgument},
		"no time":            {change: func(_ *rig, q *lease.AccessRequest) { d := time.Duration(0); q.Duration = &d }, want: broker.ReasonInvalidArgument},
		"negative uses":      {change: func(_ *rig, q *lease.AccessRequest) { q.MaxUses = -1 }, want: broker.ReasonInvalidArgument},
		"two of single use":  {tool: "db.read", change: func(_ *rig, q *lease.AccessRequest) { q.MaxUses = 2 }, want: broker.ReasonInvalidArgument},
		"bad parameter":      {change: func(_ *rig, q *lease.AccessRequest) { q.Params = map[string]string{"customer": "everybody"} }, want: broker.ReasonParameter},
		"no such incident":   {change: func(_ *rig, q *lease.AccessRequest) { q.Incident = "i1" }, want: broker.ReasonNotFound},
		"another's incident": {change: func(r *rig, q *lease.AccessRequest) { q.Incident = windowFor(r, other).ID }, want: broker.ReasonNotFound},
		"closed incident": {change: func(r *rig, q *lease.AccessRequest) {
			q.Incident = windowFor(r, support).ID
			if _, _, err := r.engine.CloseIncident(bg, as(pager), q.Incident, ""); err != nil {
				r.t.Fatal(err)
			}
		}, want: broker.ReasonIncidentClosed},
		"for nobody":      {tool: "vault.read", want: broker.ReasonStepUp},
		"user long ago":   {tool: "vault.read", change: func(_ *rig, q *lease.AccessRequest) { q.OnBehalfOf = user(time.Now().Add(-time.Hour)) }, want: broker.ReasonStepUp},
		"user to come":    {tool: "vault.read", change: func(_ *rig, q *lease.AccessRequest) { q.OnBehalfOf = user(time.Now().Add(time.Hour)) }, want: broker.ReasonStepUp},
		"nameless user":   {change: func(_ *rig, q *lease.AccessRequest) { q.OnBehalfOf = &broker.User{Name: "uma"} }, want: broker.ReasonTokenInvalid},
		"token of nobody": {change: func(_ *rig, q *lease.AccessRequest) { q.UserToken = "t" }, want: broker.ReasonInvalidArgument},
		"expired token": {change: func(_ *rig, q *lease.AccessRequest) {
			q.OnBehalfOf, q.UserToken, q.UserUntil = user(time.Now()), "t", time.Now()
		}, want: broker.ReasonTokenInvalid},
		"replayed token": {change: func(r *rig, q *lease.AccessRequest) {
			q.OnBehalfOf, q.UserToken, q.UserUntil = user(time.Now()), "t", time.Now().Add(time.Hour)
			first := *q
			first.Agent, first.Tool = other, "crm.read"
			if _, err := r.engine.CreateRequest(bg, as(other), first); err != nil {
				r.t.Fatal(err)
			}
		}, want: broker.ReasonTokenReplayed},
		"forbidden": {change: func(r *rig, _ *lease.AccessRequest) {
			if err := r.reloadPolicies(openPolicies + `@id("never") forbid (principal, action == Action::"request", resource == Tool::"crm.read");`); err != nil {
				r.t.Fatal(err)
			}
		}, want: broker.ReasonPolicy},
		"not permitted": {change: func(r *rig, _ *lease.AccessRequest) {
			if err := r.reloadPolicies(strings.Replace(openPolicies, `@id("ask") permit (principal,`, `@id("ask") permit (principal is Person,`, 1)); err != nil {
				r.t.Fatal(err)
			}
		}, want: broker.ReasonPolicy},
		"disabled": {change: func(r *rig, _ *lease.AccessRequest) {
			if err := r.reload("disabled: false # support", "disabled: true # support"); err != nil {
				r.t.Fatal(err)
			}
		}, want: broker.ReasonAgentDisabled},
		"too many": {change: func(r *rig, _ *lease.AccessRequest) {
			for range 32 {
				r.mustAsk("crm.read")
			}
		}, want: broker.ReasonRequestLimit},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				r := governedRig(t)
				caller, tool := c.caller, c.tool
				if caller.Principal() == "" && c.want != broker.ReasonUnauthenticated {
					caller = as(support)
				}
				if tool == "" {
					tool = "crm.read"
				}
				q := lease.AccessRequest{Tool: tool, Reason: "a test"}
				if c.change != nil {
					c.change(r, &q)
				}
				before := len(r.events(lease.EventFilter{Type: audit.RequestCreated}))
				_, err := r.engine.CreateRequest(bg, caller, q)
				r.wantReason(err, c.want)
				if n := len(r.events(lease.EventFilter{Type: audit.RequestCreated})); n != before {
					t.Errorf("a refused request made %d requests", n-before)
				}
				if n := len(r.events(lease.EventFilter{Type: audit.RequestRefused})); n == 0 {
					t.Error("the refusal is no evidence")
				}
				if c.want == broker.ReasonStepUp {
					if e := err.(*broker.Error); e.StepUp.MaxAge != 5*time.Minute {
						t.Errorf("the refusal asks for %+v", e.StepUp)
					}
				}
			})
		})
	}
}

func windowFor(r *rig, agent interface{ String() string }) broker.Incident {
	r.t.Helper()
	req := lease.IncidentRequest{Title: "broken", Tools: []string{"cloud.read"}}
	switch agent.String() {
	case support.String():
		req.Agents = append(req.Agents, support)
	default:
		req.Agents = append(req.Agents, other)
	}
	in, err := r.engine.OpenIncident(bg, as(pager), req)
	if err != nil {
		r.t.Fatal(err)
	}
	return in
}

func TestVoteRefusals(t *testing.T) {
	good := func() broker.Caller { return person("ann", "finance") }
	for name, c := range map[string]struct {
		tool   string // crm.read
		asker  broker.Caller
		voter  func() broker.Caller
		change func(r *rig, v lease.RequestView, vote *lease.Vote)
		want   broker.Reason
		state  broker.RequestState // pending
	}{
		"an agent":      {voter: func() broker.Caller { return as(support) }, want: broker.ReasonPermissionDenied},
		"an operator":   {voter: func() broker.Caller { return as(sam) }, want: broker.ReasonPermissionDenied},
		"nobody":        {voter: func() broker.Caller { return broker.Caller{} }, want: broker.ReasonPermissionDenied},
		"no group":      {voter: func() broker.Caller { return person("eve", "sales") }, want: broker.ReasonNotEligible},
		"the owner":     {voter: func() broker.Caller { return person("support@acme.test", "finance") }, want: broker.ReasonNotEligible},
		"the requester": {asker: good(), voter: good, want: broker.ReasonNotEligible},
		"under another name": {asker: good(), voter: func() broker.Caller {
			c := person("ann2", "finance")
			c.Person.Subject = "sub-ann"
			return c
		}, want: broker.ReasonNotEligible},
		"the user":            {voter: func() broker.Caller { return person("uma", "finance") }, want: broker.ReasonNotEligible},
		"no digest":           {change: func(_ *rig, _ lease.RequestView, v *lease.Vote) { v.Digest = "" }, want: broker.ReasonInvalidArgument},
		"another digest":      {change: func(_ *rig, _ lease.RequestView, v *lease.Vote) { v.Digest = strings.Repeat("0", 64) }, want: broker.ReasonConflict},
		"no duration":         {change: func(_ *rig, _ lease.RequestView, v *lease.Vote) { d := time.Duration(0); v.Duration = &d }, want: broker.ReasonInvalidArgument},
		"ANSI in the comment": {change: func(_ *rig, _ lease.RequestView, v *lease.Vote) { v.Comment = "\x1b[1m" }, want: broker.ReasonInvalidArgument},
		"no such request":     {change: func(_ *rig, _ lease.RequestView, v *lease.Vote) { v.Request = broker.NewRequestID(time.Now()) }, want: broker.ReasonNotFound},
		"old sign-in": {tool: "db.read", voter: func() broker.Caller {
			c := good()
			c.Person.AuthTime = time.Now().Add(-6 * time.Minute)
			return c
		}, want: broker.ReasonStepUp},
		"unknown sign-in": {tool: "db.read", voter: func() broker.Caller { c := good(); c.Person.AuthTime = time.Time{}; return c }, want: broker.ReasonStepUp},
		"sign-in to come": {tool: "db.read", voter: func() broker.Caller {
			c := good()
			c.Person.AuthTime = time.Now().Add(2 * time.Minute)
			return c
		}, want: broker.ReasonStepUp},
		"device code":                  {tool: "db.read", voter: func() broker.Caller { c := good(); c.Person.Method = broker.SignInDevice; return c }, want: broker.ReasonStepUp},
		"weak sign-in":                 {tool: "db.read", voter: func() broker.Caller { c := good(); c.Person.ACR = "pwd"; return c }, want: broker.ReasonStepUp},
		"group lost since the sign-in": {change: func(r *rig, _ lease.RequestView, _ *lease.Vote) { r.seen(person("ann")) }, want: broker.ReasonNotEligible},
		"policy": {change: func(r *rig, _ lease.RequestView, _ *lease.Vote) {
			if err := r.reloadPolicies(openPolicies + `@id("no") forbid (principal, action == Action::"approve", resource);`); err != nil {
				r.t.Fatal(err)
			}
		}, want: broker.ReasonPolicy},
		"expired": {change: func(*rig, lease.RequestView, *lease.Vote) { time.Sleep(10*time.Minute + time.Second) }, want: broker.ReasonRequestOver, state: broker.RequestExpired},
		"withdrawn": {change: func(r *rig, v lease.RequestView, _ *lease.Vote) {
			if _, err := r.engine.WithdrawRequest(bg, as(support), v.ID, ""); err != nil {
				r.t.Fatal(err)
			}
		}, want: broker.ReasonRequestOver, state: broker.RequestWithdrawn},
		"denied": {change: func(r *rig, v lease.RequestView, _ *lease.Vote) {
			if _, err := r.engine.Vote(bg, person("bob", "finance"), lease.Vote{Request: v.ID}); err != nil {
				r.t.Fatal(err)
			}
		}, want: broker.ReasonRequestOver, state: broker.RequestDenied},
		"own no before": {change: func(r *rig, v lease.RequestView, _ *lease.Vote) {
			if _, err := r.engine.Vote(bg, good(), lease.Vote{Request: v.ID}); err != nil {
				r.t.Fatal(err)
			}
		}, want: broker.ReasonConflict, state: broker.RequestDenied},
		"tool changed": {change: func(r *rig, _ lease.RequestView, _ *lease.Vote) {
			if err := r.reload("max_ttl: 15m\n    params", "max_ttl: 16m\n    params"); err != nil {
				r.t.Fatal(err)
			}
		}, want: broker.ReasonRequestOver, state: broker.RequestVoid},
		"rule changed": {change: func(r *rig, _ lease.RequestView, _ *lease.Vote) {
			if err := r.reload("need: [{group: finance}]\n    never: [requester, owner, user]\n    max_duration: 1h", "need: [{group: finance}]\n    never: [requester, owner, user]\n    max_duration: 2h"); err != nil {
				r.t.Fatal(err)
			}
		}, want: broker.ReasonRequestOver, state: broker.RequestVoid},
		"asking forbidden since": {change: func(r *rig, _ lease.RequestView, _ *lease.Vote) {
			if err := r.reloadPolicies(openPolicies + `@id("no") forbid (principal, action == Action::"request", resource);`); err != nil {
				r.t.Fatal(err)
			}
		}, want: broker.ReasonRequestOver, state: broker.RequestVoid},
		"agent disabled since": {change: func(r *rig, _ lease.RequestView, _ *lease.Vote) {
			if err := r.reload("disabled: false # support", "disabled: true # support"); err != nil {
				r.t.Fatal(err)
			}
		}, want: broker.ReasonRequestOver, state: broker.RequestVoid},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				r := governedRig(t)
				asker, tool := c.asker, c.tool
				if asker.Principal() == "" {
					asker = as(support)
				}
				if tool == "" {
					tool = "crm.read"
				}
				v, err := r.engine.CreateRequest(bg, asker, lease.AccessRequest{Agent: support, Tool: tool, Reason: "a test",
					OnBehalfOf: &broker.User{Name: "uma", Issuer: issuer, Subject: "sub-uma", AuthTime: time.Now()}})
				if err != nil {
					t.Fatal(err)
				}
				vote := lease.Vote{Request: v.ID, Approve: true, Digest: v.Digest}
				if c.change != nil {
					c.change(r, v, &vote)
				}
				voter := good()
				if c.voter != nil {
					voter = c.voter()
				}
				_, err = r.engine.Vote(bg, voter, vote)
				r.wantReason(err, c.want)
				want := c.state
				if want == "" {
					want = broker.RequestPending
				}
				if got := r.request(v.ID); got.State != want || got.Grant != "" {
					t.Errorf("the request is %s (%s), grant %q; want %s", got.State, got.Why, got.Grant, want)
				}
				if n := len(r.events(lease.EventFilter{Type: audit.GrantCreated})); n != 0 {
					t.Errorf("%d grants were made", n)
				}
			})
		})
	}
}
