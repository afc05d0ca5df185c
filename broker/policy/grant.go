package policy

import (
	"fmt"
	"time"

	"github.com/mayfly-security/mayfly/broker"
)

// GrantFacts is what is known of one grant at one instant.
type GrantFacts struct {
	Grant      broker.Grant
	Incident   broker.Incident // the zero Incident unless Grant.Incident is set
	Agent      broker.Agent    // as in the catalog now
	AgentKnown bool
	Tool       broker.Tool // as in the catalog now
	ToolKnown  bool
	// Lost is a person whose vote the grant needs and who is not in the group
	// any more that made the vote count; zero if there is none.
	Lost broker.Voter
	// Policy is what the policy set says now to an issue under the grant. The
	// zero Verdict allows nothing.
	Policy Verdict
}

// Holds decides whether what a lease of this grant lives on still stands. It
// is asked for as long as the lease lives: by sweeps, and each time a resource
// server asks. Where it does not hold, cause says why the lease ends.
//
// A grant that is used up still holds: its uses are its leases.
func (f GrantFacts) Holds(now time.Time) (cause broker.Cause, ok bool) {
	switch {
	case !f.AgentKnown || f.Agent.Disabled || f.Agent.ID != f.Grant.Agent:
		return broker.CauseAgentDisabled, false
	case f.Grant.Incident != "" && f.Incident.ID != f.Grant.Incident:
		return broker.CauseIncidentClosed, false
	case f.Grant.Incident != "" && f.Incident.State != broker.IncidentOpen:
		return broker.CauseIncidentClosed, false
	case f.Grant.Incident != "" && !now.Before(f.Incident.EndsAt):
		return broker.CauseIncidentExpired, false
	case f.Grant.State == broker.GrantWithdrawn:
		return broker.CauseGrantWithdrawn, false
	case f.Grant.State == broker.GrantClosed:
		return broker.CauseIncidentClosed, false
	case f.Grant.State != broker.GrantOpen, !now.Before(f.Grant.NotAfter):
		return broker.CauseGrantExpired, false
	case f.toolChanged():
		return broker.CauseToolChanged, false
	case f.ruleChanged():
		return broker.CauseRuleChanged, false
	case f.Lost != broker.Voter{}:
		return broker.CauseVoterLost, false
	case !f.Policy.Allowed:
		return broker.CausePolicy, false
	}
	return "", true
}

// Suspended reports whether the grant gives nothing for a reason that may go
// away again: its tool or its approval rule is not what it was when the grant
// was made, so that what would be given now is not what was agreed to, or the
// policy set does not allow it.
func (f GrantFacts) Suspended() bool {
	return f.toolChanged() || f.ruleChanged() || !f.Policy.Allowed
}

func (f GrantFacts) toolChanged() bool {
	return !f.ToolKnown || f.Tool.Name != f.Grant.Tool || f.Tool.Digest != f.Grant.ToolDigest
}

// ruleChanged compares the approval rule with the one that a grant that was
// asked for came by. Other grants came by none.
func (f GrantFacts) ruleChanged() bool {
	if f.Grant.Request == "" {
		return false
	}
	rule := f.Tool.Approval
	if f.Grant.BreakGlass {
		rule = f.Tool.BreakGlass
	}
	if rule == nil {
		return f.Grant.Rule != ""
	}
	return rule.Name != f.Grant.Rule || rule.Digest != f.Grant.RuleDigest
}

// Ask is what a lease is asked for.
type Ask struct {
	Params map[string]string // checked against the tool
	TTL    time.Duration     // how long the credential is to live; checked against the tool
	MinTTL time.Duration     // the shortest that the provider can make
}

// Issue decides whether a lease may be made under this grant now, and until
// when it may live: the earliest of what was asked, the tool's maximum, the
// grant's end and the incident's end (I3).
func (f GrantFacts) Issue(ask Ask, now time.Time) (end time.Time, d Decision) {
	if cause, ok := f.Holds(now); !ok {
		return time.Time{}, Deny(f.refusal(cause))
	}
	if now.Before(f.Grant.NotBefore) {
		return time.Time{}, Deny(broker.Refusef(broker.ReasonNoGrant, "ask again then",
			"the grant for %s begins at %s", f.Grant.Tool, f.Grant.NotBefore.UTC().Format(time.RFC3339)))
	}
	if f.Grant.MaxUses > 0 && f.Grant.Uses >= f.Grant.MaxUses {
		return time.Time{}, Deny(broker.Refusef(broker.ReasonGrantUsed, "ask an operator for a new grant",
			"grant %s for %s was for %s, and is used up", f.Grant.ID, f.Grant.Tool, uses(f.Grant.MaxUses)))
	}
	for name, value := range f.Grant.Params {
		// A value that is left out is none, also where the fixed one is empty.
		if got, given := ask.Params[name]; !given || got != value {
			return time.Time{}, Deny(broker.Refusef(broker.ReasonNoGrant,
				"ask for exactly what was granted, or ask an operator for another grant",
				"grant %s for %s holds only for %s=%s", f.Grant.ID, f.Grant.Tool, name, value))
		}
	}
	if f.Grant.Request != "" {
		for name := range ask.Params {
			// Exactly the values that were agreed to, and none beside them.
			if _, agreed := f.Grant.Params[name]; !agreed {
				return time.Time{}, Deny(broker.Refusef(broker.ReasonNoGrant,
					"ask for exactly what was granted, or make another request",
					"grant %s for %s was asked for without %s", f.Grant.ID, f.Grant.Tool, name))
			}
		}
	}
	end = now.Add(min(ask.TTL, f.Tool.MaxTTL))
	end = earliest(end, f.Grant.NotAfter)
	if f.Grant.Incident != "" {
		end = earliest(end, f.Incident.EndsAt)
	}
	if end.Sub(now) < ask.MinTTL {
		return time.Time{}, Deny(broker.Refusef(broker.ReasonTTL, "ask for longer, or for a new grant if this one is about to end",
			"a lease of %s under grant %s would live %s, and the shortest that can be made lives %s",
			f.Grant.Tool, f.Grant.ID, end.Sub(now).Round(time.Second), ask.MinTTL))
	}
	return end, Allow("grant:" + string(f.Grant.ID))
}

func (f GrantFacts) refusal(cause broker.Cause) *broker.Error {
	switch cause {
	case broker.CauseAgentDisabled:
		return AgentRefusal(f.Grant.Agent.String(), f.AgentKnown)
	case broker.CauseIncidentClosed, broker.CauseIncidentExpired:
		return broker.Refusef(broker.ReasonIncidentClosed, "nothing to do: access ended with the incident",
			"incident %s, which the grant for %s belongs to, is closed", f.Grant.Incident, f.Grant.Tool)
	case broker.CauseToolChanged:
		return broker.Refusef(broker.ReasonGrantSuspended, "ask for a new grant",
			"tool %s was changed after grant %s was made", f.Grant.Tool, f.Grant.ID)
	case broker.CauseRuleChanged:
		return broker.Refusef(broker.ReasonGrantSuspended, "make a new request",
			"the approval rule of tool %s was changed after grant %s was made", f.Grant.Tool, f.Grant.ID)
	case broker.CauseVoterLost:
		return broker.Refusef(broker.ReasonNoGrant, "make a new request",
			"grant %s for %s stood on the vote of %s, who is not in %s any more", f.Grant.ID, f.Grant.Tool, f.Lost.Name, f.Lost.Group)
	case broker.CausePolicy:
		return f.Policy.Refusal(f.Grant.Agent.String(), "be given "+f.Grant.Tool)
	case broker.CauseGrantWithdrawn:
		return broker.Refusef(broker.ReasonNoGrant, "ask an operator for a new grant",
			"grant %s for %s was withdrawn", f.Grant.ID, f.Grant.Tool)
	}
	return broker.Refusef(broker.ReasonNoGrant, "ask an operator for a new grant",
		"grant %s for %s is over", f.Grant.ID, f.Grant.Tool)
}

// AgentRefusal is the refusal of an agent that is unknown or disabled.
func AgentRefusal(id string, known bool) *broker.Error {
	if !known {
		return broker.Refusef(broker.ReasonAgentUnknown, "ask an operator to add it to the catalog's agents",
			"%s is no agent of the catalog", id)
	}
	return broker.Refusef(broker.ReasonAgentDisabled, "ask its owner or an operator",
		"%s is disabled in the catalog", id)
}

// Pick chooses the grant to issue under: of those that allow it, the one that
// lets the lease live longest, and of equals the one that is not counted, then
// the oldest. If none allows it, the refusal is the one nearest to a yes.
func Pick(tool string, candidates []GrantFacts, ask Ask, now time.Time) (chosen int, end time.Time, d Decision) {
	chosen = -1
	d = Deny(broker.Refusef(broker.ReasonNoGrant,
		"ask an operator for a grant (`mayfly grant create`), or the incident's opener for a window (`mayfly incident open`)",
		"there is no grant for %s", tool))
	for i, f := range candidates {
		e, di := f.Issue(ask, now)
		switch {
		case di.Err() == nil:
			if chosen < 0 || better(f.Grant, e, candidates[chosen].Grant, end) {
				chosen, end, d = i, e, di
			}
		case chosen < 0 && nearness(di.Refusal.Reason) >= nearness(d.Refusal.Reason):
			d = di
		}
	}
	return chosen, end, d
}

func better(a broker.Grant, aEnd time.Time, b broker.Grant, bEnd time.Time) bool {
	if !aEnd.Equal(bEnd) {
		return aEnd.After(bEnd)
	}
	if (a.MaxUses == 0) != (b.MaxUses == 0) {
		return a.MaxUses == 0
	}
	return a.ID < b.ID
}

// nearness orders refusals by how much of a grant there was.
func nearness(r broker.Reason) int {
	switch r {
	case broker.ReasonTTL:
		return 5
	case broker.ReasonGrantSuspended, broker.ReasonPolicy:
		return 4
	case broker.ReasonGrantUsed:
		return 3
	case broker.ReasonIncidentClosed:
		return 2
	case broker.ReasonAgentDisabled, broker.ReasonAgentUnknown:
		return 1
	}
	return 0
}

func earliest(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}

func uses(n int) string {
	if n == 1 {
		return "one use"
	}
	return fmt.Sprintf("%d uses", n)
}
