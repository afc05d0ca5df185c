package policy_test

import (
	"fmt"
	"testing"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/policy"
)

// TestCould: what cannot be told without the parameters is told apart from what
// no parameters would change.
func TestCould(t *testing.T) {
	const permit = `@id("p") permit (principal, action == Action::"request", resource);`
	open := policy.Asked()
	for name, c := range map[string]struct {
		set  string
		want bool
	}{
		"permitted":            {permit, true},
		"nothing":              {`@id("i") permit (principal, action == Action::"issue", resource);`, false},
		"over-strict forbid":   {permit + `@id("f") forbid (principal, action == Action::"request", resource == Tool::"crm.refund") unless { context.integers.hasTag("amount") && context.integers.getTag("amount") <= 100 };`, true},
		"needs parameters":     {`@id("p") permit (principal, action == Action::"request", resource) when { context.params.hasTag("customer") };`, true},
		"needs a ticket":       {`@id("p") permit (principal, action == Action::"request", resource) when { context.ticket like "T-*" };`, true},
		"needs an incident":    {`@id("p") permit (principal, action == Action::"request", resource) when { context.incident.open };`, true},
		"needs a user":         {permit + `@id("f") forbid (principal, action == Action::"request", resource) unless { context.on_behalf_of.present };`, true},
		"shorter":              {permit + `@id("f") forbid (principal, action == Action::"request", resource) when { context.duration_seconds > 60 };`, true},
		"the whole context":    {`@id("p") permit (principal, action == Action::"request", resource) when { context has params };`, true},
		"forbidden":            {permit + `@id("f") forbid (principal, action == Action::"request", resource == Tool::"crm.refund");`, false},
		"forbidden by label":   {permit + `@id("f") forbid (principal, action == Action::"request", resource) when { resource.hasTag("class") && resource.getTag("class") == "personal" };`, false},
		"forbidden by rule":    {permit + `@id("f") forbid (principal, action == Action::"request", resource) when { context.rule == "refunds" };`, false},
		"forbidden both ways":  {permit + `@id("f") forbid (principal, action == Action::"request", resource) when { resource.sensitivity == "high" && context.ticket == "" };`, true},
		"forbidden, other way": {permit + `@id("f") forbid (principal, action == Action::"request", resource) when { resource.sensitivity == "low" && context.ticket == "" };`, true},
		"permit of another":    {`@id("p") permit (principal, action == Action::"request", resource) when { resource.sensitivity == "low" && context.params.hasTag("customer") };`, false},
		"errs":                 {permit + `@id("f") forbid (principal, action == Action::"request", resource) when { 9223372036854775807 + resource.max_ttl_seconds > 0 };`, false},
		"may err":              {permit + `@id("f") forbid (principal, action == Action::"request", resource) when { 9223372036854775807 + context.duration_seconds > 0 };`, true},
	} {
		q := ask(policy.ActionRequest)
		q.Params = nil
		if got := mustLoad(t, c.set).Could(q, open...); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
	if mustLoad(t, permit).Could(policy.Query{}, open...) {
		t.Error("what is no question could be allowed")
	}
	q := ask(policy.ActionIssue)
	q.Subject = policy.Subject{Person: &broker.Person{Name: "ann"}}
	if policy.Builtin().Could(q, open...) {
		t.Error("a person could be issued something")
	}
}

// TestReadsTime: a set says whether time alone can turn a decision.
func TestReadsTime(t *testing.T) {
	for when, want := range map[string]bool{
		`context.hour < 18`:                                      true,
		`context.weekday <= 5`:                                   true,
		`context.now > datetime("2026-01-01")`:                   true,
		`context.on_behalf_of.auth_age_seconds < 300`:            true,
		`context has hour`:                                       true,
		`if context.rule == "x" then context.hour > 3 else true`: true,
		`context.on_behalf_of.present && context.on_behalf_of.name like "*@acme.test"`: false,
		`context.on_behalf_of.acr == "phr" && context.reason == "now"`:                 false,
		`context.rule == "hour"`: false,
	} {
		s := mustLoad(t, fmt.Sprintf(`@id("a") permit (principal, action == Action::"issue", resource) when { %s };`, when))
		if got := s.ReadsTime(policy.ActionIssue); got != want {
			t.Errorf("%s: %v", when, got)
		}
		if s.ReadsTime(policy.ActionRequest) {
			t.Errorf("%s: said of another action", when)
		}
	}
	if policy.Builtin().ReadsTime(policy.ActionIssue) {
		t.Error("the built-in set reads the time")
	}
}

// TestLockoutFreshAtAnyHour: whoever may administer after a fresh sign-in, in
// office hours, can sign in then.
func TestLockoutFreshAtAnyHour(t *testing.T) {
	s := mustLoad(t, fmt.Sprintf(`@id("a") permit (principal is Person in Group::"sre", action == Action::"administer", resource)
		when { principal.auth_age_seconds <= 300 && context.hour == %d };`, (now.Hour()+5)%24))
	var subjects []policy.Subject
	for _, p := range policy.MadeUp(s, []string{"sre"}, nil, now) {
		subjects = append(subjects, policy.Subject{Person: &p, Groups: p.Groups})
	}
	if err := policy.Lockout(s, subjects, now); err != nil {
		t.Error(err)
	}
}
