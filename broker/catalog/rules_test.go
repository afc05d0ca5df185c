package catalog_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/catalog"
	"github.com/mayfly-security/mayfly/broker/policy"
)

const ruleText = `
approval_rules:
  - name: records
    need: [{group: support-leads}]
    max_duration: 4h
  - name: refunds
    need:
      - {group: finance, count: 2}
      - {group: security}
    never: [requester, owner, user]
    reauthenticate_within: 5m
    acr: [phr]
    user_reauthenticate_within: 10m
    user_acr: [pwd, phr]
    max_duration: 1h
    expires: 30m
    single_use: true
    standing: true
  - name: emergency
    need: [{group: sre}]
    max_duration: 30m
    break_glass: true
`

// governed is the sample catalog with rules, people and labels.
func governed(t testing.TB, pairs ...string) string {
	t.Helper()
	s := with(t, "max_ttl: 15m\n", "max_ttl: 15m\n    labels: {class: personal}\n    sensitivity: high\n    approval: records\n    break_glass: emergency\n",
		"      - spiffe://acme.test/operator/sam\n", "      - spiffe://acme.test/operator/sam\n    people: [ann@acme.test, bob@acme.test]\n") + ruleText
	for i := 0; i < len(pairs); i += 2 {
		if !strings.Contains(s, pairs[i]) {
			t.Fatalf("the catalog does not contain %q", pairs[i])
		}
		s = strings.Replace(s, pairs[i], pairs[i+1], 1)
	}
	return s
}

func TestApprovalRules(t *testing.T) {
	s := mustLoad(t, governed(t))
	records, _ := s.Rule("records")
	refunds, ok := s.Rule("refunds")
	want := broker.ApprovalRule{Name: "refunds", Need: []broker.Quorum{{Group: "finance", Count: 2}, {Group: "security", Count: 1}},
		NotRequester: true, NotOwner: true, NotUser: true, StepUp: broker.StepUp{MaxAge: 5 * time.Minute, ACR: []string{"phr"}},
		UserStepUp: broker.StepUp{MaxAge: 10 * time.Minute, ACR: []string{"pwd", "phr"}}, MaxDuration: time.Hour, Expires: 30 * time.Minute,
		SingleUse: true, Standing: true, Digest: refunds.Digest}
	if diff := cmp.Diff(want, refunds); diff != "" || !ok || len(refunds.Digest) != 64 {
		t.Error(diff)
	}
	if records.Expires != time.Hour || records.NotRequester || !records.StepUp.IsZero() {
		t.Errorf("what is left out: %+v", records)
	}
	if names := s.Rules(); len(names) != 3 || names[0].Name != "emergency" || !names[0].BreakGlass {
		t.Errorf("%+v", names)
	}
	if _, ok := s.Rule("x"); ok {
		t.Error("there is a rule x")
	}
	tool, _ := s.Tool("crm.read")
	if tool.Approval == nil || tool.Approval.Name != "records" || tool.BreakGlass == nil || tool.BreakGlass.Name != "emergency" ||
		tool.Sensitivity != "high" || tool.Labels["class"] != "personal" {
		t.Errorf("%+v", tool)
	}
	plain := mustLoad(t, acme(t))
	was, _ := plain.Tool("crm.read")
	if was.Digest != tool.Digest {
		t.Error("labels, sensitivity or rules changed the tool's digest")
	}
	if was.Approval != nil || was.BreakGlass != nil || was.Sensitivity != "medium" {
		t.Errorf("what is left out: %+v", was)
	}
	if got, want := s.KnownGroups(), []string{"finance", "security", "sre", "support-leads"}; !slices.Equal(got, want) {
		t.Errorf("groups %v; want %v", got, want)
	}
}

// TestRuleDigests: whatever a rule says is part of its digest, and of the
// catalog's.
func TestRuleDigests(t *testing.T) {
	base := mustLoad(t, governed(t))
	was, _ := base.Rule("refunds")
	for _, pair := range [][2]string{
		{"count: 2", "count: 3"}, {"{group: security}", "{group: audit}"}, {"[requester, owner, user]", "[requester, owner]"},
		{"reauthenticate_within: 5m", "reauthenticate_within: 6m"}, {"acr: [phr]", "acr: [phrh]"}, {"user_reauthenticate_within: 10m", "user_reauthenticate_within: 11m"},
		{"user_acr: [pwd, phr]", "user_acr: [phr]"}, {"max_duration: 1h", "max_duration: 2h"}, {"expires: 30m", "expires: 31m"},
		{"single_use: true", "single_use: false"}, {"standing: true", "standing: false"},
	} {
		s := mustLoad(t, governed(t, pair[0], pair[1]))
		changed, _ := s.Rule("refunds")
		if changed.Digest == was.Digest || s.Digest() == base.Digest() {
			t.Errorf("%s is not part of a digest", pair[0])
		}
		diff := catalog.Diff(base, s)
		if len(diff) != 1 || !strings.HasPrefix(diff[0], "rule refunds: ") {
			t.Errorf("%s: %v", pair[0], diff)
		}
	}
	for _, pair := range [][2]string{{"class: personal", "class: public"}, {"sensitivity: high", "sensitivity: low"}, {"approval: records", "approval: refunds"},
		{"    break_glass: emergency\n", ""}, {"people: [ann@acme.test, bob@acme.test]", "people: [ann@acme.test]"}} {
		s := mustLoad(t, governed(t, pair[0], pair[1]))
		if s.Digest() == base.Digest() || len(catalog.Diff(base, s)) != 1 {
			t.Errorf("%s: %v", pair[0], catalog.Diff(base, s))
		}
	}
}

func TestRuleErrorsNameTheirPlace(t *testing.T) {
	for name, c := range map[string]struct{ text, want string }{
		"unknown rule":        {governed(t, "approval: records", "approval: record"), `there is no approval rule "record"; did you mean "records"?`},
		"unknown break glass": {governed(t, "break_glass: emergency", "break_glass: emergncy"), `there is no approval rule "emergncy"; did you mean "emergency"?`},
		"ordinary emergency":  {governed(t, "approval: records", "approval: emergency"), "rule emergency is for emergencies"},
		"emergency ordinary":  {governed(t, "break_glass: emergency", "break_glass: records"), "rule records is an ordinary one"},
		"sensitivity":         {governed(t, "sensitivity: high", "sensitivity: hihg"), `did you mean "high"?`},
		"label":               {governed(t, "class: personal", "Class: personal"), `name "Class" must be lowercase`},
		"nobody":              {governed(t, "need: [{group: support-leads}]\n", "need: []\n"), "a rule needs people of 1 to 10 groups"},
		"need left out":       {governed(t, "    need: [{group: support-leads}]\n", ""), "a rule needs people of 1 to 10 groups"},
		"no group":            {governed(t, "{group: support-leads}", "{count: 1}"), "group is missing"},
		"count of none":       {governed(t, "count: 2", "count: 0"), "count is 0; it must be between 1 and 20"},
		"count of many":       {governed(t, "count: 2", "count: 21"), "count is 21"},
		"too many together":   {governed(t, "count: 2}\n      - {group: security}", "count: 12}\n      - {group: security, count: 9}"), "the rule needs more than 20 people"},
		"group twice":         {governed(t, "{group: security}", "{group: finance}"), `group "finance" is named twice; say how many with count`},
		"reserved group":      {governed(t, "{group: security}", "{group: \"mayfly:operators\"}"), "are the broker's own"},
		"never":               {governed(t, "[requester, owner, user]", "[requestor]"), `never is for requester, owner and user, not "requestor"; did you mean "requester"?`},
		"no maximum":          {governed(t, "support-leads}]\n    max_duration: 4h\n", "support-leads}]\n"), "max_duration is 0s; it must be between 1s and 744h0m0s"},
		"long maximum":        {governed(t, "support-leads}]\n    max_duration: 4h", "support-leads}]\n    max_duration: 745h"), "max_duration is 745h0m0s; it must be between 1s and 744h0m0s"},
		"expires":             {governed(t, "expires: 30m", "expires: -1s"), "expires is -1s"},
		"age":                 {governed(t, "reauthenticate_within: 5m", "reauthenticate_within: -5m"), "reauthenticate_within is -5m0s"},
		"user's age":          {governed(t, "user_reauthenticate_within: 10m", "user_reauthenticate_within: 1ms"), "user_reauthenticate_within is 1ms"},
		"class":               {governed(t, "acr: [phr]", "acr: [\"a b\"]"), "a class has no space"},
		"rule twice":          {governed(t, "name: refunds", "name: records"), "rule records is defined here and at"},
		"unknown key":         {governed(t, "single_use: true", "single_us: true"), `unknown key "single_us" in rule; did you mean "single_use"?`},
		"person":              {governed(t, "[ann@acme.test, bob@acme.test]", "[\"a|b\"]"), "characters that no person's name has"},
		"person twice":        {governed(t, "[ann@acme.test, bob@acme.test]", "[a, a]"), `"a" is listed twice`},
		"empty person":        {governed(t, "[ann@acme.test, bob@acme.test]", "[\"\"]"), "a person's name has 1 to 200 bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := load(t, c.text)
			if err == nil || !strings.Contains(err.Error(), c.want) || !strings.HasPrefix(err.Error(), "a.yaml:") {
				t.Errorf("got  %v\nwant %s", err, c.want)
			}
		})
	}
}

func TestPeopleAndGroups(t *testing.T) {
	s := mustLoad(t, governed(t))
	ann := broker.Person{Name: "ann@acme.test", Groups: []string{"finance", "mayfly:operators", "sre"}}
	if got := s.PersonGroups(ann); !slices.Equal(got, []string{"finance", "sre"}) {
		t.Errorf("ann is in %v", got)
	}
	if got := s.PersonGroups(broker.Person{Name: "ANN@acme.test"}); len(got) != 0 {
		t.Errorf("another name is in %v", got)
	}
	sam, support := spiffeid.RequireFromString("spiffe://acme.test/operator/sam"), spiffeid.RequireFromString("spiffe://acme.test/agent/support")
	for name, c := range map[string]struct {
		caller   broker.Caller
		groups   string
		operator bool
	}{
		"operator":               {broker.Caller{ID: sam}, "sre", true},
		"agent":                  {broker.Caller{ID: support}, "", false},
		"somebody listed":        {broker.Caller{Person: &broker.Person{Name: "bob@acme.test"}}, "sre", true},
		"somebody by a claim":    {broker.Caller{Person: &broker.Person{Name: "zoe", Groups: []string{"sre"}}}, "sre", true},
		"somebody else":          {broker.Caller{Person: &broker.Person{Name: "zoe", Groups: []string{"finance"}}}, "finance", false},
		"a claim of our own":     {broker.Caller{Person: &broker.Person{Name: "zoe", Groups: []string{"mayfly:operators"}}}, "", false},
		"a workload without any": {broker.Caller{ID: spiffeid.RequireFromString("spiffe://acme.test/x")}, "", false},
	} {
		got := s.Subject(c.caller)
		if strings.Join(got.Groups, " ") != c.groups || got.Operator != c.operator {
			t.Errorf("%s: %+v", name, got)
		}
		if (got.Agent != nil) != (name == "agent") || got.Principal() != c.caller.Principal() {
			t.Errorf("%s: %+v", name, got)
		}
	}
}

// loadWith loads the governed catalog with files of policies beside it.
func loadWith(t testing.TB, policies ...string) (*catalog.Snapshot, error) {
	t.Helper()
	dir := t.TempDir()
	names := []string{filepath.Join(dir, "a.yaml")}
	texts := []string{governed(t)}
	for i, text := range policies {
		names = append(names, filepath.Join(dir, string(rune('p'+i))+".cedar"))
		texts = append(texts, text)
	}
	for i, name := range names {
		if err := os.WriteFile(name, []byte(texts[i]), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return catalog.Load(names, drivers)
}

func TestPolicies(t *testing.T) {
	const admin = `@id("admin") permit (principal in Group::"mayfly:operators", action == Action::"administer", resource);`
	s, err := loadWith(t, admin, `@id("read") permit (principal == Agent::"spiffe://acme.test/agent/support", action == Action::"request", resource == Tool::"crm.read");
		@id("leads") permit (principal in Group::"leads", action == Action::"approve", resource in Provider::"acme-tokens");`)
	if err != nil {
		t.Fatal(err)
	}
	if got := s.Policies().IDs(); !slices.Equal(got, []string{"admin", "leads", "read"}) {
		t.Errorf("%v", got)
	}
	if !slices.Contains(s.KnownGroups(), "leads") || slices.Contains(s.KnownGroups(), "mayfly:operators") {
		t.Errorf("%v", s.KnownGroups())
	}
	without := mustLoad(t, governed(t))
	if without.Policies().Digest() != policy.Builtin().Digest() {
		t.Error("a catalog without policies has others than the built-in ones")
	}
	if s.Digest() == without.Digest() {
		t.Error("policies are not part of the catalog's digest")
	}
	changes := strings.Join(catalog.Diff(without, s), "\n")
	if !strings.Contains(changes, "policy admin added") || !strings.Contains(changes, "policy builtin.administer removed") {
		t.Errorf("%s", changes)
	}
	now := time.Now()
	if err := policy.Lockout(s.Policies(), s.Administrators(now), now); err != nil {
		t.Error(err)
	}
	none, err := loadWith(t, "// nothing\n")
	if err != nil {
		t.Fatal(err)
	}
	if err := policy.Lockout(none.Policies(), none.Administrators(now), now); broker.ReasonOf(err) != broker.ReasonLockout {
		t.Errorf("an empty policy file: %v", err)
	}
	byPerson, err := loadWith(t, `@id("a") permit (principal == Person::"bob@acme.test", action, resource) when { principal in Group::"sre" };`)
	if err != nil {
		t.Fatal(err)
	}
	if err := policy.Lockout(byPerson.Policies(), byPerson.Administrators(now), now); err != nil {
		t.Error(err)
	}
	// The set that a preview reads is the one that a catalog would.
	again, err := without.LoadPolicies([]policy.Source{{Name: "x", Text: admin}})
	if err != nil || len(again.IDs()) != 1 {
		t.Errorf("%v", err)
	}
	if built, err := s.LoadPolicies(nil); err != nil || built.Digest() != policy.Builtin().Digest() {
		t.Errorf("no file: %v", err)
	}
	if _, err := s.LoadPolicies([]policy.Source{{Name: "x.cedar", Text: `@id("a") permit (principal, action, resource == Tool::"crm.raed");`}}); err == nil || !strings.Contains(err.Error(), `x.cedar:1:49: the catalog has no Tool "crm.raed"; did you mean "crm.read"?`) {
		t.Errorf("%v", err)
	}
}

func TestPolicyErrorsNameTheirPlace(t *testing.T) {
	for name, c := range map[string]struct{ text, want string }{
		"attribute":     {"@id(\"a\")\nforbid (principal, action == Action::\"issue\", resource)\nwhen { resource.sensitivty == \"high\" };", `p.cedar:3:17: there is no attribute "sensitivty" of Tool; did you mean "sensitivity"?`},
		"tool":          {`@id("a") permit (principal, action, resource == Tool::"crm.raed");`, `p.cedar:1:49: the catalog has no Tool "crm.raed"; did you mean "crm.read"?`},
		"tool in a set": {`@id("a") permit (principal, action == Action::"issue", resource) when { resource in [Tool::"crm.read", Tool::"crm.raed"] };`, `the catalog has no Tool "crm.raed"`},
		"provider":      {`@id("a") permit (principal, action, resource in Provider::"acme-token");`, `the catalog has no Provider "acme-token"; did you mean "acme-tokens"?`},
		"agent":         {`@id("a") permit (principal == Agent::"spiffe://acme.test/agent/suport", action, resource);`, `the catalog has no Agent "spiffe://acme.test/agent/suport"; did you mean "spiffe://acme.test/agent/support"?`},
		"syntax":        {"@id(\"a\")\npermit (principal, action, resource)", "p.cedar:2:"},
	} {
		_, err := loadWith(t, c.text)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got  %v\nwant %s", name, err, c.want)
		}
	}
	if _, err := catalog.Load([]string{"/nowhere/p.cedar"}, drivers); err == nil {
		t.Error("a file that is not there is a policy set")
	}
}
