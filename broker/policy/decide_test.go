package policy_test

import (
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/policy"
)

// ask is a query that has everything; change alters it.
func ask(action policy.Action, change ...func(*policy.Query)) policy.Query {
	support := broker.Agent{ID: agent, Owner: "ann@acme.test", Environment: "production", Labels: map[string]string{"team": "support"}}
	q := policy.Query{
		Action: action, Agent: &support,
		Tool: &broker.Tool{Name: "crm.refund", Provider: "acme", MaxTTL: 15 * time.Minute, Labels: map[string]string{"class": "personal"}, Sensitivity: "high",
			Params: []broker.Param{{Name: "amount", Type: broker.ParamInteger}, {Name: "customer", Type: broker.ParamString}}},
		Params: map[string]string{"amount": "40", "customer": "c-17"}, Duration: time.Hour, Reason: "a refund", Ticket: "T-1", Rule: "refunds",
		Incident:   broker.Incident{ID: "i1", State: broker.IncidentOpen, EndsAt: now.Add(time.Hour), Title: "down", Reference: "INC-1"},
		OnBehalfOf: &broker.User{Name: "uma@acme.test", AuthTime: now.Add(-time.Minute), ACR: "phr"},
		Requester:  broker.PersonPrincipal("rob@acme.test"), Verb: policy.VerbWithdrawGrant, Now: now,
	}
	person := broker.Person{Name: "ann@acme.test", Issuer: "https://id.acme.test", Subject: "1", AuthTime: now.Add(-90 * time.Second), ACR: "phr", Method: broker.SignInBrowser}
	switch action {
	case policy.ActionRequest, policy.ActionIssue:
		q.Subject.Agent = &support
	case policy.ActionApprove:
		q.Subject = policy.Subject{Person: &person, Groups: []string{"finance", "sre"}}
	default:
		q.Subject = policy.Subject{Service: bot, Groups: []string{"sre"}, Operator: true}
	}
	for _, c := range change {
		c(&q)
	}
	return q
}

// as makes a person of the groups ask.
func as(name string, groups ...string) func(*policy.Query) {
	return func(q *policy.Query) {
		q.Subject = policy.Subject{Person: &broker.Person{Name: name, Issuer: "https://id.acme.test", AuthTime: now.Add(-90 * time.Second), ACR: "phr",
			Method: broker.SignInBrowser}, Groups: groups}
	}
}

// TestEveryAttributeIsFilled: whatever a policy reads of the schema is there,
// and is what the query says.
func TestEveryAttributeIsFilled(t *testing.T) {
	for _, c := range []struct {
		action policy.Action
		when   string
	}{
		{policy.ActionRequest, `principal.owner == "ann@acme.test" && principal.environment == "production" && !principal.disabled && principal.getTag("team") == "support"`},
		{policy.ActionIssue, `context.agent == principal && context.agent.hasTag("team") && resource.name == "crm.refund"`},
		{policy.ActionIssue, `resource.provider == "acme" && resource in Provider::"acme" && resource.sensitivity == "high" && resource.max_ttl_seconds == 900`},
		{policy.ActionIssue, `resource.hasTag("class") && resource.getTag("class") == "personal"`},
		{policy.ActionIssue, `context.params.hasTag("customer") && context.params.getTag("customer") == "c-17" && context.params.hasTag("amount")`},
		{policy.ActionIssue, `context.integers.hasTag("amount") && context.integers.getTag("amount") <= 40 && !context.integers.hasTag("customer")`},
		{policy.ActionIssue, `context.duration_seconds == 3600 && context.reason == "a refund" && context.ticket like "T-*" && context.rule == "refunds" && !context.break_glass`},
		{policy.ActionIssue, `context.incident.id == "i1" && context.incident.open && context.incident.title == "down" && context.incident.reference == "INC-1"`},
		{policy.ActionIssue, `context.on_behalf_of.present && context.on_behalf_of.name == "uma@acme.test" && context.on_behalf_of.acr == "phr" && context.on_behalf_of.auth_age_seconds == 60`},
		{policy.ActionIssue, `context.requester.person && context.requester.name == "rob@acme.test"`},
		{policy.ActionIssue, `context.now == datetime("2026-11-23T12:00:00Z") && context.hour == 12 && context.weekday == 1`},
		{policy.ActionApprove, `principal in Group::"finance" && !(principal in Group::"mayfly:operators") && principal.name == context.agent.owner`},
		{policy.ActionApprove, `principal.issuer == "https://id.acme.test" && principal.method == "browser" && principal.acr == "phr" && principal.auth_age_seconds == 90`},
		{policy.ActionOpenIncident, `principal is Service && principal.operator && principal in Group::"sre"`},
		{policy.ActionAdminister, `context.verb == "grant.withdraw" && context.hour == 12 && context.weekday == 1 && context.now > datetime("2026-01-01")`},
		{policy.ActionAdminister, `resource == Broker::"mayfly" && principal in Group::"mayfly:operators"`},
	} {
		scope := map[policy.Action]string{policy.ActionRequest: "principal is Agent", policy.ActionOpenIncident: "principal is Service"}[c.action]
		if scope == "" {
			scope = "principal"
		}
		when := c.when
		if strings.Contains(when, "principal.getTag") {
			when = `principal.hasTag("team") && ` + when
		}
		s := mustLoad(t, fmt.Sprintf("@id(\"a\")\npermit (%s, action == Action::%q, resource) when { %s };", scope, c.action, when))
		if v := s.Decide(ask(c.action)); !v.Allowed || len(v.Errors) > 0 || !slices.Equal(v.Policies, []string{"a"}) || v.Digest != s.Digest() {
			t.Errorf("%s: %s: %+v", c.action, when, v)
		}
	}
	// And where nothing applies, it is there and empty.
	s := mustLoad(t, `@id("a") permit (principal, action == Action::"request", resource) when { context.incident.id == "" && !context.incident.open
		&& !context.on_behalf_of.present && context.on_behalf_of.name == "" && context.on_behalf_of.auth_age_seconds > 31536000 && context.requester.name == ""
		&& !context.requester.person && context.ticket == "" && !context.params.hasTag("amount") && !resource.hasTag("class") };`)
	empty := policy.Query{Action: policy.ActionRequest, Subject: policy.Subject{Agent: &broker.Agent{ID: agent}}, Tool: &broker.Tool{Name: "t"}, Now: now}
	if v := s.Decide(empty); !v.Allowed {
		t.Errorf("an empty query: %+v", v)
	}
}

func TestAuthenticationAges(t *testing.T) {
	s := mustLoad(t, `@id("a") permit (principal, action == Action::"approve", resource) when { principal.auth_age_seconds <= 300 };`)
	for name, c := range map[string]struct {
		change func(*broker.Person)
		want   bool
	}{
		"fresh":          {func(*broker.Person) {}, true},
		"the very limit": {func(p *broker.Person) { p.AuthTime = now.Add(-300 * time.Second) }, true},
		"just over":      {func(p *broker.Person) { p.AuthTime = now.Add(-300*time.Second - 1) }, false},
		"unknown":        {func(p *broker.Person) { p.AuthTime = time.Time{} }, false},
		"a bit early":    {func(p *broker.Person) { p.AuthTime = now.Add(time.Minute) }, true},
		"in the future":  {func(p *broker.Person) { p.AuthTime = now.Add(time.Minute + 1) }, false},
		"device":         {func(p *broker.Person) { p.Method = broker.SignInDevice }, false},
		"very long ago":  {func(p *broker.Person) { p.AuthTime = time.Date(1, 1, 2, 0, 0, 0, 0, time.UTC) }, false},
	} {
		q := ask(policy.ActionApprove)
		c.change(q.Subject.Person)
		if got := s.Decide(q).Allowed; got != c.want {
			t.Errorf("%s: allowed %v", name, got)
		}
	}
}

// TestErrorDenies: a policy that errs at run time denies and is named, also
// where Cedar alone would allow.
func TestErrorDenies(t *testing.T) {
	s := mustLoad(t, `@id("broken") forbid (principal, action == Action::"issue", resource) when { context.duration_seconds * 9223372036854775807 > 0 };
		@id("yes") permit (principal, action == Action::"issue", resource);`)
	v := s.Decide(ask(policy.ActionIssue))
	if v.Allowed || len(v.Policies) != 0 || len(v.Errors) != 1 || !strings.Contains(v.Errors[0], `policy "broken" (p.cedar:1)`) {
		t.Errorf("%+v", v)
	}
	if v := s.Decide(ask(policy.ActionIssue, func(q *policy.Query) { q.Duration = 0 })); !v.Allowed || len(v.Errors) != 0 {
		t.Errorf("without the overflow: %+v", v)
	}
}

// TestNoQuestion: what is no question is denied, by everything that permits.
func TestNoQuestion(t *testing.T) {
	s := mustLoad(t, `@id("all") permit (principal, action, resource);`)
	for name, c := range map[string]struct {
		q    policy.Query
		errs bool
	}{
		"zero":               {policy.Query{}, true},
		"no time":            {ask(policy.ActionIssue, func(q *policy.Query) { q.Now = time.Time{} }), true},
		"nobody":             {ask(policy.ActionIssue, func(q *policy.Query) { q.Subject = policy.Subject{} }), true},
		"person of no name":  {ask(policy.ActionApprove, as("")), true},
		"two subjects":       {ask(policy.ActionApprove, func(q *policy.Query) { q.Subject.Service = bot }), true},
		"agent and person":   {ask(policy.ActionApprove, func(q *policy.Query) { q.Subject.Agent = q.Agent }), true},
		"no tool":            {ask(policy.ActionIssue, func(q *policy.Query) { q.Tool = nil }), true},
		"no agent":           {ask(policy.ActionApprove, func(q *policy.Query) { q.Agent = nil }), true},
		"no action":          {ask("isue"), true},
		"no verb":            {ask(policy.ActionAdminister, func(q *policy.Query) { q.Verb = "" }), true},
		"odd verb":           {ask(policy.ActionAdminister, func(q *policy.Query) { q.Verb = "x" }), true},
		"no integer":         {ask(policy.ActionIssue, func(q *policy.Query) { q.Params = map[string]string{"amount": "4O"} }), true},
		"agent approves":     {ask(policy.ActionApprove, func(q *policy.Query) { q.Subject = policy.Subject{Agent: q.Agent} }), false},
		"service approves":   {ask(policy.ActionApprove, func(q *policy.Query) { q.Subject = policy.Subject{Service: bot} }), false},
		"service requests":   {ask(policy.ActionRequest, func(q *policy.Query) { q.Subject = policy.Subject{Service: bot} }), false},
		"person is issued":   {ask(policy.ActionIssue, as("ann")), false},
		"agent administers":  {ask(policy.ActionAdminister, func(q *policy.Query) { q.Subject = policy.Subject{Agent: q.Agent, Operator: true} }), false},
		"agent opens window": {ask(policy.ActionOpenIncident, func(q *policy.Query) { q.Subject = policy.Subject{Agent: q.Agent} }), false},
	} {
		if v := s.Decide(c.q); v.Allowed || (len(v.Errors) > 0) != c.errs || len(v.Policies) > 0 {
			t.Errorf("%s: %+v", name, v)
		}
	}
	for _, a := range policy.Actions() {
		if !s.Decide(ask(a)).Allowed {
			t.Errorf("%s of the good query is denied", a)
		}
	}
}

// TestReservedGroups: nobody comes into the operators' group by a claim.
func TestReservedGroups(t *testing.T) {
	s := policy.Builtin()
	if s.Decide(ask(policy.ActionAdminister, as("mallory", "mayfly:operators", "mayfly:x"))).Allowed {
		t.Error("a claim made an operator")
	}
	if !s.Decide(ask(policy.ActionAdminister, as("ann"), func(q *policy.Query) { q.Subject.Operator = true })).Allowed {
		t.Error("an operator may not administer")
	}
}

func TestBuiltin(t *testing.T) {
	s := policy.Builtin()
	noRule := func(q *policy.Query) { q.Rule = "" }
	for name, c := range map[string]struct {
		q    policy.Query
		want string
	}{
		"request":              {ask(policy.ActionRequest), "builtin.request"},
		"request for an agent": {ask(policy.ActionRequest, as("ann")), "builtin.request"},
		"no rule, no grant":    {ask(policy.ActionRequest, noRule), ""},
		"issue":                {ask(policy.ActionIssue, noRule), "builtin.issue"},
		"approve":              {ask(policy.ActionApprove), "builtin.approve"},
		"open":                 {ask(policy.ActionOpenIncident), "builtin.open_incident"},
		"administer":           {ask(policy.ActionAdminister), "builtin.administer"},
		"no operator":          {ask(policy.ActionAdminister, func(q *policy.Query) { q.Subject.Operator = false }), ""},
	} {
		if v := s.Decide(c.q); v.Allowed != (c.want != "") || strings.Join(v.Policies, " ") != c.want {
			t.Errorf("%s: %+v", name, v)
		}
	}
	empty, err := policy.Load(nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range policy.Actions() {
		if empty.Decide(ask(a)).Allowed {
			t.Errorf("the empty set allows %s", a)
		}
	}
}

func TestForbidWins(t *testing.T) {
	s := mustLoad(t, `@id("b") permit (principal, action, resource); @id("c") permit (principal, action, resource);
		@id("a") forbid (principal, action == Action::"request", resource in Provider::"acme");`)
	if v := s.Decide(ask(policy.ActionRequest)); v.Allowed || !slices.Equal(v.Policies, []string{"a"}) {
		t.Errorf("%+v", v)
	}
	if v := s.Decide(ask(policy.ActionIssue)); !v.Allowed || !slices.Equal(v.Policies, []string{"b", "c"}) {
		t.Errorf("%+v", v)
	}
}

func TestDigestAndDiff(t *testing.T) {
	one := mustLoad(t, `@id("a") permit (principal, action == Action::"issue", resource) when { context.reason == "x  y" }; @id("b") forbid (principal, action, resource);`)
	same, err := policy.Load([]policy.Source{{Name: "z", Text: "// b\n@id(\"b\")\nforbid(principal,action,resource);"},
		{Name: "y", Text: "@id(\"a\")permit(principal,action==Action::\"issue\",resource)/* c */when{context.reason==\"x  y\"};"}})
	if err != nil {
		t.Fatal(err)
	}
	if one.Digest() != same.Digest() || len(one.Digest()) != 64 {
		t.Error("layout, comments or files changed the digest")
	}
	next := mustLoad(t, `@id("a") permit (principal, action == Action::"issue", resource) when { context.reason == "x y" }; @id("c") forbid (principal, action, resource);`)
	if next.Digest() == one.Digest() {
		t.Error("what a text holds is part of the digest")
	}
	added, removed, changed := policy.Diff(one, next)
	if diff := cmp.Diff([][]string{{"c"}, {"b"}, {"a"}}, [][]string{added, removed, changed}); diff != "" {
		t.Error(diff)
	}
	if added, removed, changed := policy.Diff(one, same); added != nil || removed != nil || changed != nil {
		t.Error("there is a difference between equals")
	}
}

// drawPolicy makes a policy as teams write them, of a small world, so that
// policies meet queries.
func drawPolicy(t *rapid.T, id int) string {
	pick := func(label string, from ...string) string { return rapid.SampledFrom(from).Draw(t, label) }
	conditions := []string{
		"", `when { resource == Tool::"t1" && context.duration_seconds > 60 }`, `when { resource in [Tool::"t1", Tool::"t2"] }`,
		`when { [Tool::"t2", Tool::"t3"].contains(resource) && context.duration_seconds * 9223372036854775807 > 0 }`,
		`when { context.duration_seconds * 9223372036854775807 > 0 && resource == Tool::"t1" }`,
		`when { resource == Tool::"t1" || resource in Provider::"p1" }`, `when { resource == Tool::"t1" || context.reason == "" }`,
		`when { principal is Person || resource == Tool::"t2" }`, `unless { resource == Tool::"t1" }`, `when { !(resource == Tool::"t3") } unless { context.duration_seconds * 9223372036854775807 > 0 }`,
		`when { resource in [Tool::"t1", Provider::"p2"] } when { principal in Group::"g1" || principal == Agent::"spiffe://acme.test/a1" }`,
		`when { principal in [Group::"g1", Group::"g2"] && resource == Tool::"t2" } when { context.reason == "x" }`,
		`when { resource is Tool in Provider::"p1" && context.duration_seconds < 100 }`, `when { Tool::"t1" == resource }`,
	}
	return fmt.Sprintf("@id(\"p%d\") %s (principal%s, action%s, resource%s) %s;\n", id, pick("effect", "permit", "forbid", "permit"),
		pick("principal", "", "", ` == Agent::"spiffe://acme.test/a1"`, ` in Group::"g1"`, ` in Group::"g2"`, ` is Person`, ` is Agent`, ` is Person in Group::"g1"`, ` == Person::"ann"`),
		pick("action", ` == Action::"request"`, ` in [Action::"request", Action::"issue"]`, ` in [Action::"approve", Action::"request"]`),
		pick("resource", "", "", ` == Tool::"t1"`, ` == Tool::"t2"`, ` in Provider::"p1"`, ` is Tool`, ` is Tool in Provider::"p2"`),
		rapid.SampledFrom(conditions).Draw(t, "condition"))
}

// TestIndexChangesNothing: a decision by the index is the decision by all
// policies, its errors among them.
func TestIndexChangesNothing(t *testing.T) {
	a1 := spiffeid.RequireFromString("spiffe://acme.test/a1")
	seen := map[bool]int{}
	rapid.Check(t, func(t *rapid.T) {
		var text strings.Builder
		for i := range rapid.IntRange(0, 12).Draw(t, "policies") {
			one := drawPolicy(t, i)
			if _, err := load(one); err == nil { // some combinations can never apply
				text.WriteString(one)
			}
		}
		s, err := load(text.String())
		if err != nil {
			t.Fatal(err)
		}
		for range 8 {
			q := ask(rapid.SampledFrom([]policy.Action{policy.ActionRequest, policy.ActionIssue, policy.ActionApprove}).Draw(t, "action"))
			q.Tool.Name = rapid.SampledFrom([]string{"t1", "t2", "t3"}).Draw(t, "tool")
			q.Tool.Provider = rapid.SampledFrom([]string{"p1", "p2"}).Draw(t, "provider")
			q.Duration = rapid.SampledFrom([]time.Duration{0, time.Second, time.Hour}).Draw(t, "duration")
			if q.Subject.Person != nil || q.Action == policy.ActionRequest && rapid.Bool().Draw(t, "person") {
				as(rapid.SampledFrom([]string{"ann", "bob"}).Draw(t, "name"), rapid.SampledFrom([][]string{nil, {"g1"}, {"g1", "g2"}}).Draw(t, "groups")...)(&q)
			} else if rapid.Bool().Draw(t, "a1") {
				q.Agent.ID = a1
			}
			by, all := s.Decide(q), policy.DecideUnindexed(s, q)
			if diff := cmp.Diff(all, by); diff != "" {
				t.Fatalf("%s\nof %s", diff, text.String())
			}
			seen[by.Allowed]++
		}
	})
	if seen[true] == 0 || seen[false] == 0 {
		t.Errorf("only one outcome was seen: %v", seen)
	}
}

// teams is a policy set as teams write one: each policy is about a tool or a
// group of theirs, and a few about everything.
func teams(n int) string {
	var b strings.Builder
	for i := range n {
		tool, group := i%(1+n/8), i%(1+n/10)
		switch i % 8 {
		case 0, 1:
			fmt.Fprintf(&b, "@id(\"p%d\") permit (principal is Agent, action in [Action::\"request\", Action::\"issue\"], resource == Tool::\"tool%d\") when { principal.environment == \"production\" && context.duration_seconds <= 3600 };\n", i, tool)
		case 2, 3:
			fmt.Fprintf(&b, "@id(\"p%d\") permit (principal in Group::\"group%d\", action == Action::\"approve\", resource == Tool::\"tool%d\") when { principal.auth_age_seconds <= 900 };\n", i, group, tool)
		case 4:
			fmt.Fprintf(&b, "@id(\"p%d\") forbid (principal == Agent::\"spiffe://acme.test/agent/n%d\", action, resource) when { context.hour < 6 };\n", i, i)
		case 5:
			fmt.Fprintf(&b, "@id(\"p%d\") permit (principal, action == Action::\"request\", resource) when { resource in [Tool::\"tool%d\", Tool::\"tool%d\"] && context.integers.hasTag(\"amount\") && context.integers.getTag(\"amount\") < 100 };\n", i, tool, tool+1)
		case 6:
			fmt.Fprintf(&b, "@id(\"p%d\") forbid (principal, action, resource == Tool::\"tool%d\") unless { context.break_glass || context.hour >= 8 };\n", i, tool)
		default:
			fmt.Fprintf(&b, "@id(\"p%d\") permit (principal in Group::\"group%d\", action == Action::\"request\", resource in Provider::\"provider%d\");\n", i, group, i%20)
		}
	}
	b.WriteString("@id(\"all.disabled\") forbid (principal is Agent, action, resource) when { principal.disabled };\n" +
		"@id(\"all.high\") forbid (principal, action == Action::\"request\", resource) when { resource.sensitivity == \"high\" && context.rule == \"\" };\n" +
		"@id(\"all.operators\") permit (principal in Group::\"mayfly:operators\", action == Action::\"administer\", resource);\n")
	return b.String()
}

// BenchmarkDecide: what a decision costs, and what the slowest of a hundred does.
func BenchmarkDecide(b *testing.B) {
	for _, n := range []int{10, 100, 1000} {
		b.Run(fmt.Sprintf("policies=%d", n), func(b *testing.B) {
			s := mustLoad(b, teams(n))
			var questions []policy.Query
			for i := range 64 {
				for _, action := range []policy.Action{policy.ActionRequest, policy.ActionIssue, policy.ActionApprove, policy.ActionAdminister} {
					q := ask(action)
					q.Tool.Name, q.Tool.Provider = fmt.Sprintf("tool%d", i%(1+n/8)), fmt.Sprintf("provider%d", i%20)
					if q.Subject.Person != nil {
						q.Subject.Groups = nil
						for g := range 10 {
							q.Subject.Groups = append(q.Subject.Groups, fmt.Sprintf("group%d", (i+g)%(1+n/10)))
						}
					}
					questions = append(questions, q)
				}
			}
			// What the thread itself took is measured besides: on a machine that
			// others use too, the clock on the wall measures them.
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			took, cpu := make([]time.Duration, 0, b.N), make([]time.Duration, 0, b.N)
			b.ResetTimer()
			for i := range b.N {
				begin, own := time.Now(), threadTime(b)
				s.Decide(questions[i%len(questions)])
				cpu = append(cpu, threadTime(b)-own)
				took = append(took, time.Since(begin))
			}
			b.StopTimer()
			for unit, all := range map[string][]time.Duration{"p99-µs": took, "p99-cpu-µs": cpu} {
				slices.Sort(all)
				b.ReportMetric(float64(all[len(all)*99/100].Nanoseconds())/1000, unit)
			}
		})
	}
}

// threadTime is the processor time that this thread has used.
func threadTime(t testing.TB) time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts); err != nil {
		t.Fatal(err)
	}
	return time.Duration(ts.Nano())
}

// TestIndexIsNarrow: of 1,000 policies a decision evaluates a few.
func TestIndexIsNarrow(t *testing.T) {
	s := mustLoad(t, teams(1000))
	q := ask(policy.ActionRequest)
	q.Tool.Name, q.Tool.Provider = "tool7", "provider7"
	if n := policy.Candidates(s, q); n < 3 || n > 40 {
		t.Errorf("%d of 1,003 policies are evaluated", n)
	}
}

func TestReferenceIsFresh(t *testing.T) {
	reference, err := policy.Reference()
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"mayfly.cedarschema": policy.SchemaText(), "policy.md": reference} {
		got, err := os.ReadFile("../../docs/reference/" + name)
		if err != nil || !strings.HasSuffix(string(got), want) {
			t.Errorf("docs/reference/%s is stale: `make generate` (%v)", name, err)
		}
	}
}
