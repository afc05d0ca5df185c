package policy_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/mayfly-security/mayfly/broker/policy"
)

func load(text string) (*policy.Set, error) {
	return policy.Load([]policy.Source{{Name: "p.cedar", Text: text}})
}

func mustLoad(t testing.TB, text string) *policy.Set {
	t.Helper()
	s, err := load(text)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestErrorsNameTheirPlace(t *testing.T) {
	const head = "// a comment\n@id(\"a\")\n"
	for name, c := range map[string]struct{ text, want string }{
		"attribute of an agent":   {head + `permit (principal is Agent, action == Action::"request", resource) when { principal.ownr == "x" };`, `p.cedar:3:85: there is no attribute "ownr" of Agent; did you mean "owner"?`},
		"attribute of a tool":     {head + "permit (principal, action == Action::\"issue\", resource)\nwhen { resource.sensitivty == \"low\" };", `p.cedar:4:17: there is no attribute "sensitivty" of Tool; did you mean "sensitivity"?`},
		"in brackets":             {head + "permit (principal, action == Action::\"issue\", resource)\nwhen { resource[\"sensitivty\"] == \"low\" };", `p.cedar:4:17: there is no attribute "sensitivty" of Tool; did you mean "sensitivity"?`},
		"attribute of context":    {head + "permit (principal, action == Action::\"issue\", resource)\nwhen { context.duration_second < 5 };", `p.cedar:4:16: there is no attribute "duration_second" in the context of issue; did you mean "duration_seconds"?`},
		"attribute of a record":   {head + "permit (principal, action == Action::\"issue\", resource)\nwhen { context.incident.opne };", `there is no attribute "opne" of incident; did you mean "open"?`},
		"attribute of some only":  {head + "permit (principal, action == Action::\"request\", resource)\nwhen { principal.owner == \"x\" };", `p.cedar:4:18: there is no attribute "owner" of Person`},
		"another action's":        {head + "forbid (principal, action == Action::\"administer\", resource)\nwhen { context.reason == \"\" };", `p.cedar:4:16: there is no attribute "reason" in the context of administer`},
		"has":                     {head + "permit (principal, action == Action::\"issue\", resource)\nwhen { principal has ownr };", `p.cedar:4:22: there is no attribute "ownr" anywhere, so this is never true; did you mean "owner"?`},
		"entity type in scope":    {head + "permit (principal is Agnt, action, resource);", `p.cedar:3:22: there is no entity type "Agnt"; did you mean "Agent"?`},
		"entity type of a name":   {head + `permit (principal, action, resource == Tol::"x");`, `p.cedar:3:40: there is no entity type "Tol"; did you mean "Tool"?`},
		"action":                  {head + `permit (principal, action == Action::"isue", resource);`, `p.cedar:3:30: there is no action "isue"; did you mean "issue"?`},
		"action in a set":         {head + `permit (principal, action in [Action::"issue", Action::"aprove"], resource);`, `p.cedar:3:48: there is no action "aprove"; did you mean "approve"?`},
		"annotation":              {"@ident(\"a\")\npermit (principal, action, resource);", `p.cedar:1:1: there is no annotation @ident; the annotations are id, description`},
		"annotation's spelling":   {head + "@desciption(\"a\")\npermit (principal, action, resource);", `p.cedar:3:1: there is no annotation @desciption; did you mean "description"?`},
		"no ID":                   {"permit (principal, action, resource);", `p.cedar:1:1: the policy has no ID: write @id("a.name.of.its.own") before it`},
		"odd ID":                  {"@id(\"a b\")\npermit (principal, action, resource);", `p.cedar:1:1: ID "a b" must be letters`},
		"ID twice":                {head + "permit (principal, action, resource);\n" + head + "permit (principal, action, resource);", `p.cedar:5:1: ID "a" is used here and at p.cedar:2:1`},
		"a built-in's ID":         {"@id(\"builtin.request\")\npermit (principal, action, resource);", `IDs that begin with "builtin." are the built-in policies'`},
		"verb":                    {head + "permit (principal, action == Action::\"administer\", resource)\nwhen { context.verb == \"grant.withdrew\" };", `p.cedar:4:24: verb is never "grant.withdrew"; did you mean "grant.withdraw"?`},
		"verb in a set":           {head + "permit (principal, action == Action::\"administer\", resource)\nwhen { [\"all.see\", \"lease.revok\"].contains(context.verb) };", `verb is never "lease.revok"; did you mean "lease.revoke"?`},
		"sensitivity":             {head + "forbid (principal, action == Action::\"issue\", resource)\nwhen { \"hihg\" == resource.sensitivity };", `p.cedar:4:8: sensitivity is never "hihg"; did you mean "high"?`},
		"type":                    {head + "permit (principal, action == Action::\"issue\", resource)\nwhen { context.duration_seconds < \"5\" };", `p.cedar:2:1: unexpected type: expected Long but saw String`},
		"label without asking":    {head + "permit (principal, action == Action::\"issue\", resource)\nwhen { resource.getTag(\"class\") == \"x\" };", `ask with hasTag first`},
		"never applies":           {head + `permit (principal is Agent, action == Action::"approve", resource);`, `the policy can never apply`},
		"attribute of a literal":  {head + "permit (principal, action == Action::\"issue\", resource)\nwhen { Tool::\"x\".sensitivity == \"low\" };", `p.cedar:4:8: an attribute of a named entity cannot be read`},
		"tag of a literal":        {head + "permit (principal, action == Action::\"issue\", resource)\nwhen { Tool::\"x\".hasTag(\"a\") };", `p.cedar:4:8: a tag of a named entity cannot be read`},
		"group of a literal":      {head + "permit (principal, action == Action::\"issue\", resource)\nwhen { Person::\"ann\" in Group::\"x\" };", `p.cedar:4:8: what Person::"ann" is in cannot be asked`},
		"agent that is no SPIFFE": {head + `permit (principal == Agent::"support", action, resource);`, `p.cedar:3:22: Agent names an identity by its SPIFFE ID`},
		"another broker":          {head + `permit (principal, action, resource == Broker::"x");`, `p.cedar:3:40: the only broker is Broker::"mayfly"`},
		"a group of the broker's": {head + `permit (principal in Group::"mayfly:admins", action, resource);`, `the only one of the broker's own is "mayfly:operators"`},
		"a name for parameters":   {head + "permit (principal, action == Action::\"issue\", resource)\nwhen { context.params == Params::\"x\" };", `the parameters of a request have no name`},
		"syntax":                  {head + `permit (principal, action resource);`, `p.cedar:3:`},
		"bidi":                    {head + "// \u202e\npermit (principal, action, resource);", `p.cedar:3:4: here is a control`},
		"escape":                  {head + "permit (principal, action, resource); // é\x1b[0m", `p.cedar:3:43: here is a control`},
		"not UTF-8":               {head + "permit (principal, action, resource); //\xff", `p.cedar:3:41: here is a control`},
		"deep":                    {head + "permit (principal, action, resource) when { " + strings.Repeat("(", 100_000), `more than 64 brackets deep`},
		"long":                    {head + "permit (principal, action, resource) when { true" + strings.Repeat(" && true", 10_000) + "};", `more than 10000 words`},
		"large":                   {strings.Repeat("/", 1<<20+1), `larger than`},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := load(c.text)
			var errs policy.Errors
			if !errors.As(err, &errs) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got  %v\nwant %s", err, c.want)
			}
		})
	}
}
