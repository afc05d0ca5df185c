package policy_test

import (
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"pgregory.net/rapid"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/policy"
)

var (
	now   = time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	agent = spiffeid.RequireFromString("spiffe://acme.test/agent/support")
	bot   = spiffeid.RequireFromString("spiffe://acme.test/bot/pager")
)

// good is a grant of an open incident that holds in every respect.
func good() policy.GrantFacts {
	return policy.GrantFacts{
		Grant: broker.Grant{ID: "g1", Agent: agent, Tool: "crm.read", ToolDigest: "d", State: broker.GrantOpen,
			NotBefore: now.Add(-time.Minute), NotAfter: now.Add(time.Hour), Incident: "i1"},
		Incident:   broker.Incident{ID: "i1", State: broker.IncidentOpen, EndsAt: now.Add(30 * time.Minute)},
		Agent:      broker.Agent{ID: agent},
		AgentKnown: true,
		Tool:       broker.Tool{Name: "crm.read", Digest: "d", MaxTTL: 15 * time.Minute},
		ToolKnown:  true,
		Policy:     policy.Verdict{Allowed: true},
	}
}

func TestEachConditionEndsAGrant(t *testing.T) {
	if cause, ok := good().Holds(now); !ok {
		t.Fatalf("the good grant does not hold: %s", cause)
	}
	for name, c := range map[string]struct {
		spoil func(*policy.GrantFacts)
		cause broker.Cause
	}{
		"agent unknown":    {func(f *policy.GrantFacts) { f.AgentKnown = false }, broker.CauseAgentDisabled},
		"agent disabled":   {func(f *policy.GrantFacts) { f.Agent.Disabled = true }, broker.CauseAgentDisabled},
		"another agent":    {func(f *policy.GrantFacts) { f.Agent.ID = bot }, broker.CauseAgentDisabled},
		"incident closed":  {func(f *policy.GrantFacts) { f.Incident.State = broker.IncidentClosed }, broker.CauseIncidentClosed},
		"incident missing": {func(f *policy.GrantFacts) { f.Incident = broker.Incident{} }, broker.CauseIncidentClosed},
		"another incident": {func(f *policy.GrantFacts) { f.Incident.ID = "i2" }, broker.CauseIncidentClosed},
		"incident's end":   {func(f *policy.GrantFacts) { f.Incident.EndsAt = now }, broker.CauseIncidentExpired},
		"withdrawn":        {func(f *policy.GrantFacts) { f.Grant.State = broker.GrantWithdrawn }, broker.CauseGrantWithdrawn},
		"closed":           {func(f *policy.GrantFacts) { f.Grant.State = broker.GrantClosed }, broker.CauseIncidentClosed},
		"expired":          {func(f *policy.GrantFacts) { f.Grant.State = broker.GrantExpired }, broker.CauseGrantExpired},
		"no state":         {func(f *policy.GrantFacts) { f.Grant.State = "" }, broker.CauseGrantExpired},
		"at its very end":  {func(f *policy.GrantFacts) { f.Grant.NotAfter = now }, broker.CauseGrantExpired},
		"tool gone":        {func(f *policy.GrantFacts) { f.ToolKnown = false }, broker.CauseToolChanged},
		"tool changed":     {func(f *policy.GrantFacts) { f.Tool.Digest = "e" }, broker.CauseToolChanged},
		"rule made":        {func(f *policy.GrantFacts) { f.Grant.Request, f.Tool.Approval = "r1", &broker.ApprovalRule{Name: "two"} }, broker.CauseRuleChanged},
		"rule gone":        {func(f *policy.GrantFacts) { f.Grant.Request, f.Grant.Rule = "r1", "two" }, broker.CauseRuleChanged},
		"rule changed": {func(f *policy.GrantFacts) {
			f.Grant.Request, f.Grant.Rule, f.Grant.RuleDigest = "r1", "two", "old"
			f.Tool.Approval = &broker.ApprovalRule{Name: "two", Digest: "new"}
		}, broker.CauseRuleChanged},
		"the other rule": {func(f *policy.GrantFacts) {
			f.Grant.Request, f.Grant.Rule, f.Grant.RuleDigest, f.Grant.BreakGlass = "r1", "two", "old", true
			f.Tool.Approval = &broker.ApprovalRule{Name: "two", Digest: "old"}
		}, broker.CauseRuleChanged},
		"voter lost":          {func(f *policy.GrantFacts) { f.Lost = broker.Voter{Name: "ann", Group: "finance"} }, broker.CauseVoterLost},
		"policy denies":       {func(f *policy.GrantFacts) { f.Policy = policy.Verdict{Policies: []string{"no"}} }, broker.CausePolicy},
		"another tool's name": {func(f *policy.GrantFacts) { f.Tool.Name = "crm.write" }, broker.CauseToolChanged},
	} {
		t.Run(name, func(t *testing.T) {
			f := good()
			c.spoil(&f)
			if cause, ok := f.Holds(now); ok || cause != c.cause {
				t.Errorf("Holds = %q, %v; want %q, false", cause, ok, c.cause)
			}
			if _, d := f.Issue(policy.Ask{TTL: time.Minute}, now); d.Err() == nil {
				t.Error("Issue allows what does not hold")
			}
		})
	}
}

func TestIssueRefusals(t *testing.T) {
	for name, c := range map[string]struct {
		spoil  func(*policy.GrantFacts)
		ask    policy.Ask
		reason broker.Reason
	}{
		"not begun":            {func(f *policy.GrantFacts) { f.Grant.NotBefore = now.Add(time.Second) }, policy.Ask{TTL: time.Minute}, broker.ReasonNoGrant},
		"used up":              {func(f *policy.GrantFacts) { f.Grant.MaxUses, f.Grant.Uses = 1, 1 }, policy.Ask{TTL: time.Minute}, broker.ReasonGrantUsed},
		"other parameter":      {func(f *policy.GrantFacts) { f.Grant.Params = map[string]string{"amount": "40"} }, policy.Ask{TTL: time.Minute, Params: map[string]string{"amount": "4000"}}, broker.ReasonNoGrant},
		"parameter left out":   {func(f *policy.GrantFacts) { f.Grant.Params = map[string]string{"amount": "40"} }, policy.Ask{TTL: time.Minute}, broker.ReasonNoGrant},
		"too short to be made": {func(f *policy.GrantFacts) {}, policy.Ask{TTL: time.Second, MinTTL: time.Minute}, broker.ReasonTTL},
	} {
		t.Run(name, func(t *testing.T) {
			f := good()
			c.spoil(&f)
			if _, d := f.Issue(c.ask, now); broker.ReasonOf(d.Err()) != c.reason {
				t.Errorf("Issue: %v; want %s", d.Err(), c.reason)
			}
		})
	}
}

// TestI3_EndIsTheEarliest: whatever the bounds are, a lease ends no later than
// any of them.
func TestI3_EndIsTheEarliest(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		span := func(label string) time.Duration {
			return time.Duration(rapid.Int64Range(1, int64(48*time.Hour)).Draw(t, label))
		}
		f := good()
		f.Tool.MaxTTL = span("maximum")
		f.Grant.NotAfter = now.Add(span("grant"))
		f.Incident.EndsAt = now.Add(span("incident"))
		ttl := span("asked")
		end, d := f.Issue(policy.Ask{TTL: ttl}, now)
		if d.Err() != nil {
			t.Fatal(d.Err())
		}
		for name, bound := range map[string]time.Time{
			"asked": now.Add(ttl), "maximum": now.Add(f.Tool.MaxTTL), "grant": f.Grant.NotAfter, "incident": f.Incident.EndsAt,
		} {
			if end.After(bound) {
				t.Fatalf("the lease ends at %s, after the bound %q at %s", end, name, bound)
			}
		}
		if !end.After(now) {
			t.Fatalf("the lease is over before it begins")
		}
	})
}

func TestPick(t *testing.T) {
	used := good()
	used.Grant.ID, used.Grant.MaxUses, used.Grant.Uses = "g2", 1, 1
	counted := good()
	counted.Grant.ID, counted.Grant.MaxUses = "g0", 5
	short := good()
	short.Grant.ID, short.Grant.NotAfter = "g3", now.Add(time.Minute)

	ask := policy.Ask{TTL: 10 * time.Minute}
	if i, _, d := policy.Pick("crm.read", []policy.GrantFacts{used, short, counted, good()}, ask, now); d.Err() != nil || i != 3 {
		t.Errorf("Pick chose %d (%v); want 3: the one that lasts, and of those the uncounted", i, d.Err())
	}
	if i, _, d := policy.Pick("crm.read", []policy.GrantFacts{used}, ask, now); i != -1 || broker.ReasonOf(d.Err()) != broker.ReasonGrantUsed {
		t.Errorf("Pick of a used grant = %d, %v", i, d.Err())
	}
	if _, _, d := policy.Pick("crm.read", nil, ask, now); broker.ReasonOf(d.Err()) != broker.ReasonNoGrant {
		t.Errorf("Pick of nothing: %v", d.Err())
	}
}

func TestZeroDecisionDenies(t *testing.T) {
	if (policy.Decision{}).Err() == nil {
		t.Error("the zero Decision allows")
	}
}

func TestOpenIncident(t *testing.T) {
	opener := policy.Opener{ID: bot, Tools: []string{"crm.read"}, Agents: []spiffeid.ID{agent}, MaxDuration: time.Hour, MaxOpen: 1}
	window := func(change func(*policy.Window)) policy.Window {
		w := policy.Window{Agents: []spiffeid.ID{agent}, Tools: []string{"crm.read"}, Duration: time.Hour}
		change(&w)
		return w
	}
	for name, c := range map[string]struct {
		caller   spiffeid.ID
		isOpener bool
		w        policy.Window
		reason   broker.Reason
	}{
		"good":          {bot, true, window(func(*policy.Window) {}), ""},
		"no opener":     {bot, false, window(func(*policy.Window) {}), broker.ReasonPermissionDenied},
		"another's":     {agent, true, window(func(*policy.Window) {}), broker.ReasonPermissionDenied},
		"for itself":    {bot, true, window(func(w *policy.Window) { w.Agents = append(w.Agents, bot) }), broker.ReasonSelfService},
		"other agent":   {bot, true, window(func(w *policy.Window) { w.Agents[0] = spiffeid.RequireFromString("spiffe://acme.test/x") }), broker.ReasonPermissionDenied},
		"other tool":    {bot, true, window(func(w *policy.Window) { w.Tools[0] = "crm.write" }), broker.ReasonPermissionDenied},
		"too long":      {bot, true, window(func(w *policy.Window) { w.Duration++ }), broker.ReasonInvalidArgument},
		"no time":       {bot, true, window(func(w *policy.Window) { w.Duration = 0 }), broker.ReasonInvalidArgument},
		"negative time": {bot, true, window(func(w *policy.Window) { w.Duration = -time.Hour }), broker.ReasonInvalidArgument},
	} {
		t.Run(name, func(t *testing.T) {
			if err := policy.OpenIncident(c.caller, opener, c.isOpener, c.w).Err(); broker.ReasonOf(err) != c.reason {
				t.Errorf("%v; want %q", err, c.reason)
			}
		})
	}
	if policy.AnotherIncident(opener, 1).Err() == nil || policy.AnotherIncident(opener, 0).Err() != nil {
		t.Error("AnotherIncident does not count to one")
	}
}

func TestCloseIncident(t *testing.T) {
	in := broker.Incident{ID: "i1", OpenedBy: broker.WorkloadPrincipal(bot)}
	if err := policy.CloseIncident(bot, in, false, false).Err(); err != nil {
		t.Errorf("the opener may not close: %v", err)
	}
	if err := policy.CloseIncident(agent, in, true, true).Err(); err != nil {
		t.Errorf("a closer may not close: %v", err)
	}
	if err := policy.CloseIncident(agent, in, false, false).Err(); broker.ReasonOf(err) != broker.ReasonNotFound {
		t.Errorf("a stranger is told %v; want not_found", err)
	}
	if err := policy.CloseIncident(agent, in, false, true).Err(); broker.ReasonOf(err) != broker.ReasonPermissionDenied {
		t.Errorf("one who sees it and may not close is told %v; want permission_denied", err)
	}
}
