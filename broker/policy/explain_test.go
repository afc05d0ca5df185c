package policy_test

import (
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/policy"
)

func TestExplain(t *testing.T) {
	s := mustLoad(t, `
@id("office") permit (principal is Agent, action == Action::"request", resource == Tool::"crm.refund") when { context.duration_seconds <= 1800 && context.hour < 18 };
@id("small") permit (principal is Agent, action == Action::"request", resource) when { context.integers.hasTag("amount") && context.integers.getTag("amount") < 10 && context.rule == "x" } unless { context.on_behalf_of.present };
@id("approvers") permit (principal in Group::"payments", action == Action::"approve", resource);
@id("other") permit (principal, action == Action::"request", resource == Tool::"docs.search") when { context.ticket == "" };
@id("night") @description("No window at noon") forbid (principal, action == Action::"open_incident", resource) when { context.hour == 12 } unless { context.break_glass };
@id("all") permit (principal, action in [Action::"open_incident", Action::"issue"], resource);
@id("broken") forbid (principal, action == Action::"issue", resource) when { context.duration_seconds * 9223372036854775807 > 0 };
@id("never") forbid (principal, action == Action::"administer", resource);
`)
	for name, c := range map[string]struct {
		q       policy.Query
		summary string
		would   []string
	}{
		"nearest first": {ask(policy.ActionRequest), "denied: no policy permits request", []string{
			"policy \"office\" (p.cedar:2) would allow it if `context.duration_seconds <= 1800` (context.duration_seconds is 3600)",
			"policy \"small\" (p.cedar:3) would allow it if `context.integers.getTag(\"amount\") < 10` (context.integers.getTag(\"amount\") is 40), " +
				"and `context.rule == \"x\"` (context.rule is \"refunds\"), and not `context.on_behalf_of.present` (context.on_behalf_of.present is true)",
			"policy \"other\" (p.cedar:5) would allow it if the resource were Tool::\"docs.search\", and `context.ticket == \"\"` (context.ticket is \"T-1\")"}},
		"what guards is missing": {ask(policy.ActionRequest, func(q *policy.Query) { q.Params = nil; q.Tool.Name = "t"; q.OnBehalfOf = nil }), "denied: no policy permits request", []string{
			"policy \"small\" (p.cedar:3) would allow it if `context.integers.hasTag(\"amount\")`",
			"policy \"office\" (p.cedar:2) would allow it if the resource were Tool::\"crm.refund\", and `context.duration_seconds <= 1800` (context.duration_seconds is 3600)",
			"policy \"other\" (p.cedar:5) would allow it if the resource were Tool::\"docs.search\", and `context.ticket == \"\"` (context.ticket is \"T-1\")"}},
		"group":     {ask(policy.ActionApprove), "denied: no policy permits approve", []string{`policy "approvers" (p.cedar:4) would allow it if the principal were in Group::"payments"`}},
		"forbidden": {ask(policy.ActionOpenIncident), `forbidden by policy "night" (p.cedar:6): No window at noon`, []string{"policy \"night\" (p.cedar:6) must not apply; it does, because `context.hour == 12` (context.hour is 12), and not `context.break_glass` (context.break_glass is false)"}},
		"whatever":  {ask(policy.ActionAdminister), `forbidden by policy "never" (p.cedar:9)`, []string{`policy "never" (p.cedar:9) forbids it whatever anybody approves`}},
		"broken":    {ask(policy.ActionIssue), "denied, because a policy could not be evaluated: policy \"broken\" (p.cedar:8): ", nil},
		"allowed":   {ask(policy.ActionIssue, func(q *policy.Query) { q.Duration = 0 }), `allowed by policy "all" (p.cedar:7)`, nil},
		"kind":      {ask(policy.ActionApprove, func(q *policy.Query) { q.Subject = policy.Subject{Agent: q.Agent} }), "denied: an agent never does approve, whatever policies say", nil},
		"no query":  {policy.Query{}, "denied: the query has no time", nil},
	} {
		x := s.Explain(c.q)
		if !strings.HasPrefix(x.Summary, c.summary) || strings.Join(x.WouldAllow, "\n") != strings.Join(c.would, "\n") {
			t.Errorf("%s:\ngot  %s\n%s\nwant %s\n%s", name, x.Summary, strings.Join(x.WouldAllow, "\n"), c.summary, strings.Join(c.would, "\n"))
		}
	}
	hostile := ask(policy.ActionRequest, func(q *policy.Query) { q.Ticket = "\x1b[31m\u202e" })
	if got := strings.Join(s.Explain(hostile).WouldAllow, ""); strings.ContainsAny(got, "\x1b\u202e") {
		t.Errorf("%q", got)
	}
}

func TestLockout(t *testing.T) {
	operator := policy.Subject{Service: bot, Operator: true}
	people := func(s *policy.Set) []policy.Subject {
		all := []policy.Subject{operator}
		for _, p := range policy.MadeUp(s, []string{"sre", "security"}, []string{"ann"}, now) {
			all = append(all, policy.Subject{Person: &p, Groups: p.Groups})
		}
		return all
	}
	const scope = `action == Action::"administer", resource`
	for name, c := range map[string]struct {
		text   string
		locked bool
	}{
		"nothing":            {``, true},
		"operators":          {`@id("a") permit (principal in Group::"mayfly:operators", ` + scope + `);`, false},
		"a group":            {`@id("a") permit (principal in Group::"sre", ` + scope + `);`, false},
		"two groups at once": {`@id("a") permit (principal in Group::"sre", ` + scope + `) when { principal in Group::"security" };`, false},
		"a group of nobody":  {`@id("a") permit (principal in Group::"other", ` + scope + `);`, true},
		"by name":            {`@id("a") permit (principal == Person::"zoe", ` + scope + `);`, false},
		"by attribute":       {`@id("a") permit (principal is Person, ` + scope + `) when { principal.name == "zoe" && principal.acr == "phr" && principal.issuer == "https://x" && principal.auth_age_seconds < 60 };`, false},
		"the listed":         {`@id("a") permit (principal == Person::"ann", ` + scope + `);`, false},
		"one verb is out":    {`@id("a") permit (principal, ` + scope + `); @id("b") forbid (principal, ` + scope + `) when { context.verb == "access.end" };`, true},
		"reading alone":      {`@id("a") permit (principal, ` + scope + `) when { context.verb == "evidence.read" };`, true},
		"errs":               {`@id("a") permit (principal, ` + scope + `); @id("b") forbid (principal, ` + scope + `) when { context.hour + 9223372036854775807 > 0 && context.hour > 24 };`, false},
		"always errs":        {`@id("a") permit (principal, ` + scope + `); @id("b") forbid (principal, ` + scope + `) when { context.weekday + 9223372036854775807 > 0 };`, true},
		"office hours":       {`@id("a") permit (principal, ` + scope + `) when { context.weekday == 3 && context.hour == 9 };`, false},
		"forbidden":          {`@id("a") permit (principal, ` + scope + `); @id("b") forbid (principal, action, resource);`, true},
	} {
		s := mustLoad(t, c.text)
		err := policy.Lockout(s, people(s), now)
		if (err != nil) != c.locked || err != nil && broker.ReasonOf(err) != broker.ReasonLockout {
			t.Errorf("%s: %v", name, err)
		}
	}
	if policy.Lockout(policy.Builtin(), nil, now) == nil {
		t.Error("a broker without anybody is not locked")
	}
}

// world is a catalog of one agent and one tool.
type world struct{}

func (world) Agents() []broker.Agent {
	return []broker.Agent{{ID: agent, Owner: "ann@acme.test", Environment: "production"}}
}
func (w world) Agent(id spiffeid.ID) (broker.Agent, bool) { return w.Agents()[0], id == agent }
func (world) Tools() []broker.Tool {
	return []broker.Tool{{Name: "pay", Provider: "acme", Sensitivity: "high", MaxTTL: time.Minute, Params: []broker.Param{{Name: "amount", Type: broker.ParamInteger}},
		Approval: &broker.ApprovalRule{Name: "payments"}, BreakGlass: &broker.ApprovalRule{Name: "emergency", BreakGlass: true}}}
}
func (w world) Tool(name string) (broker.Tool, bool) { return w.Tools()[0], name == "pay" }
func (w world) Subject(c broker.Caller) policy.Subject {
	if c.Person != nil {
		return policy.Subject{Person: c.Person, Groups: c.Person.Groups}
	}
	if a, ok := w.Agent(c.ID); ok {
		return policy.Subject{Agent: &a}
	}
	return policy.Subject{Service: c.ID, Operator: c.ID == bot}
}

func TestCases(t *testing.T) {
	s := mustLoad(t, `
@id("ask") permit (principal is Agent, action == Action::"request", resource == Tool::"pay") when { context.rule == "payments" && context.integers.hasTag("amount") && context.integers.getTag("amount") <= 100 };
@id("broken") forbid (principal, action == Action::"request", resource) when { context.duration_seconds * 9223372036854775807 > 0 };
@id("vote") permit (principal in Group::"finance", action == Action::"approve", resource) when { principal.auth_age_seconds <= 300 && context.requester.name != principal.name };
@id("glass") permit (principal, action == Action::"issue", resource) when { context.break_glass && context.incident.open && context.on_behalf_of.name == "uma" && context.hour == 3 };
@id("ops") permit (principal in Group::"mayfly:operators", action == Action::"administer", resource) when { context.verb == "all.see" };`)
	age := func(d time.Duration) *time.Duration { return &d }
	me, robot := agent.String(), bot.String()
	amount := func(n string) map[string]string { return map[string]string{"amount": n} }
	for name, c := range map[string]struct {
		c       policy.Case
		problem string // "" means that it passes
	}{
		"allowed":          {policy.Case{Principal: me, Action: "request", Tool: "pay", Params: amount("40"), Expect: "allow", Policies: []string{"ask"}}, ""},
		"denied":           {policy.Case{Principal: me, Action: "request", Tool: "pay", Params: amount("4000"), Expect: "deny"}, ""},
		"unexpected deny":  {policy.Case{Principal: me, Action: "request", Tool: "pay", Params: amount("4000"), Expect: "allow"}, "expected allow, but it is denied: no policy permits request\n  policy \"ask\" (p.cedar:2) would allow it if"},
		"unexpected allow": {policy.Case{Principal: me, Action: "request", Tool: "pay", Params: amount("40"), Expect: "deny"}, "expected deny, but it is allowed by policy \"ask\""},
		"other policy":     {policy.Case{Principal: me, Action: "request", Tool: "pay", Params: amount("40"), Expect: "allow", Policies: []string{"x"}}, "allow as expected, but decided by ask and not by x"},
		"by nothing":       {policy.Case{Principal: me, Action: "request", Tool: "pay", Params: amount("400"), Expect: "deny", Policies: []string{"x"}}, "deny as expected, but decided by no policy and not by x"},
		"denied by error":  {policy.Case{Principal: me, Action: "request", Tool: "pay", Params: amount("40"), Duration: time.Hour, Expect: "deny"}, "denied as expected, but only because a policy could not be evaluated"},
		"approve":          {policy.Case{Principal: "ann", Groups: []string{"finance"}, AuthAge: age(time.Minute), Action: "approve", Tool: "pay", Agent: me, Params: amount("1"), Requester: "rob", Expect: "allow"}, ""},
		"own request":      {policy.Case{Principal: "ann", Groups: []string{"finance"}, AuthAge: age(time.Minute), Action: "approve", Tool: "pay", Agent: me, Params: amount("1"), Requester: "ann", Expect: "deny"}, ""},
		"old sign-in":      {policy.Case{Principal: "ann", Groups: []string{"finance"}, AuthAge: age(time.Hour), Action: "approve", Tool: "pay", Agent: me, Params: amount("1"), Expect: "deny"}, ""},
		"unknown sign-in":  {policy.Case{Principal: "ann", Groups: []string{"finance"}, Action: "approve", Tool: "pay", Agent: me, Params: amount("1"), Expect: "deny"}, ""},
		"break glass": {policy.Case{Principal: me, Action: "issue", Tool: "pay", Params: amount("1"), BreakGlass: true, Incident: &policy.CaseIncident{ID: "i"},
			OnBehalfOf: &policy.CaseUser{Name: "uma"}, Time: time.Date(2026, 1, 1, 3, 0, 0, 0, time.UTC), Expect: "allow"}, ""},
		"closed": {policy.Case{Principal: me, Action: "issue", Tool: "pay", Params: amount("1"), BreakGlass: true, Incident: &policy.CaseIncident{ID: "i", Closed: true},
			OnBehalfOf: &policy.CaseUser{Name: "uma"}, Time: time.Date(2026, 1, 1, 3, 0, 0, 0, time.UTC), Expect: "deny"}, ""},
		"administer":       {policy.Case{Principal: robot, Action: "administer", Verb: "all.see", Expect: "allow"}, ""},
		"another verb":     {policy.Case{Principal: robot, Action: "administer", Verb: "access.end", Expect: "deny"}, ""},
		"odd verb":         {policy.Case{Principal: robot, Action: "administer", Verb: "acess.end", Expect: "deny"}, `did you mean "access.end"?`},
		"misplaced verb":   {policy.Case{Principal: me, Action: "request", Tool: "pay", Verb: "all.see", Expect: "deny"}, "verb is for administer alone"},
		"no expectation":   {policy.Case{Principal: me, Action: "request", Tool: "pay"}, "it must be allow or deny"},
		"odd action":       {policy.Case{Principal: me, Action: "requst", Tool: "pay", Expect: "deny"}, `did you mean "request"?`},
		"odd tool":         {policy.Case{Principal: me, Action: "request", Tool: "pays", Expect: "deny"}, `the catalog has no tool "pays"; did you mean "pay"?`},
		"odd agent":        {policy.Case{Principal: "ann", Action: "approve", Tool: "pay", Params: amount("1"), Agent: me + "t", Expect: "deny"}, `did you mean "` + me + `"?`},
		"no agent":         {policy.Case{Principal: "ann", Action: "approve", Tool: "pay", Params: amount("1"), Expect: "deny"}, "agent is missing"},
		"odd parameter":    {policy.Case{Principal: me, Action: "request", Tool: "pay", Params: amount("x"), Expect: "deny"}, "no decimal integer"},
		"no principal":     {policy.Case{Action: "request", Tool: "pay", Expect: "deny"}, "principal is missing"},
		"odd principal":    {policy.Case{Principal: "spiffe://", Action: "request", Tool: "pay", Expect: "deny"}, "is no SPIFFE ID"},
		"groups of agents": {policy.Case{Principal: me, Groups: []string{"x"}, Action: "request", Tool: "pay", Expect: "deny"}, "are for people"},
		"odd method":       {policy.Case{Principal: "ann", Method: "brwser", Action: "approve", Tool: "pay", Expect: "deny"}, `did you mean "browser"?`},
		"incident's ID":    {policy.Case{Principal: me, Action: "request", Tool: "pay", Params: amount("1"), Incident: &policy.CaseIncident{}, Expect: "deny"}, "incident has no id"},
		"user's name":      {policy.Case{Principal: me, Action: "request", Tool: "pay", Params: amount("1"), OnBehalfOf: &policy.CaseUser{}, Expect: "deny"}, "on_behalf_of has no name"},
	} {
		c.c.Name = name
		r := policy.RunCases(s, world{}, []policy.Case{c.c}, now)[0]
		if r.Name != name || r.Passed != (c.problem == "") || !strings.Contains(r.Problem, c.problem) || c.problem == "" && r.Problem != "" {
			t.Errorf("%s: %+v", name, r)
		}
	}
}
