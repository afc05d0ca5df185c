package policy

import (
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/broker"
)

// Action is what a policy set decides about.
type Action string

// The actions.
const (
	ActionRequest      Action = "request"       // ask for a tool: an agent for itself, or a person for an agent
	ActionIssue        Action = "issue"         // get a credential under a grant, and keep it
	ActionApprove      Action = "approve"       // decide a request
	ActionOpenIncident Action = "open_incident" // open a window with this tool for this agent
	ActionAdminister   Action = "administer"    // do what Query.Verb says
)

// Actions are all actions, in the order of the reference.
func Actions() []Action {
	return []Action{ActionRequest, ActionIssue, ActionApprove, ActionOpenIncident, ActionAdminister}
}

// Verb is what somebody administers.
type Verb string

// The verbs of ActionAdminister.
const (
	VerbReadEvidence   Verb = "evidence.read"
	VerbSeeAll         Verb = "all.see" // everybody's leases, grants, requests and incidents; all tools
	VerbMakeGrant      Verb = "grant.create"
	VerbWithdrawGrant  Verb = "grant.withdraw"
	VerbRevokeLease    Verb = "lease.revoke"
	VerbForgetLease    Verb = "lease.forget"
	VerbEndAccess      Verb = "access.end"   // the kill switch
	VerbStrays         Verb = "stray.end"    // see and end what no lease answers for
	VerbCutOff         Verb = "role.cut_off" // see and end every session of a provider's role
	VerbPolicy         Verb = "policy.preview"
	VerbExplain        Verb = "policy.explain" // for somebody else
	VerbWithdraw       Verb = "request.withdraw"
	VerbEndSessions    Verb = "session.end" // somebody else's
	VerbReviewRequests Verb = "request.review"
)

// Verbs are all verbs, in the order of the reference.
func Verbs() []Verb {
	return []Verb{VerbReadEvidence, VerbSeeAll, VerbMakeGrant, VerbWithdrawGrant, VerbRevokeLease, VerbForgetLease,
		VerbEndAccess, VerbStrays, VerbCutOff, VerbPolicy, VerbExplain, VerbWithdraw, VerbEndSessions, VerbReviewRequests}
}

// Subject is who acts: exactly one of its first three fields is set.
type Subject struct {
	Agent   *broker.Agent
	Person  *broker.Person
	Service spiffeid.ID // a workload that is no agent: an incident bot, an operator's
	// Groups are all groups that the subject is in, by the identity provider
	// and by the catalog, sorted.
	Groups []string
	// Operator: the catalog lists the subject as an operator.
	Operator bool
}

// Principal names the subject.
func (s Subject) Principal() broker.Principal {
	switch {
	case s.Agent != nil:
		return broker.WorkloadPrincipal(s.Agent.ID)
	case s.Person != nil:
		return s.Person.Principal()
	}
	return broker.WorkloadPrincipal(s.Service)
}

// Query is one question to a policy set: may Subject do Action? Every field
// that a policy can read of it is filled by whoever asks; fields that do not
// apply are zero, and a policy reads an empty value.
type Query struct {
	Action  Action
	Subject Subject

	Verb Verb // administer

	// Of request, issue, approve and open_incident.
	Tool       *broker.Tool
	Agent      *broker.Agent // who gets the credential in the end; the subject itself for its own request and issue
	Params     map[string]string
	Duration   time.Duration // of the grant that is asked for, or of the window
	Reason     string
	Ticket     string
	Rule       string          // the approval rule that the request waits under, or the grant came by
	BreakGlass bool            // that rule is for emergencies
	Incident   broker.Incident // zero for none
	OnBehalfOf *broker.User    // nil for nobody
	Requester  broker.Principal
	Grant      broker.GrantID // issue

	Now time.Time
}

// Verdict is what a policy set says to a Query. The zero Verdict allows nothing.
type Verdict struct {
	Allowed bool
	// Policies are the IDs of the policies that decided, sorted: those that
	// permit it if it is allowed, those that forbid it if one does; none for a
	// default deny.
	Policies []string
	// Errors say which policies could not be evaluated, sorted. Any error denies.
	Errors []string
	// Digest is of the set that decided.
	Digest string
}

// Decider decides by a policy set. A *Set is one.
type Decider interface {
	Decide(q Query) Verdict
	Digest() string
}
