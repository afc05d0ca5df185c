package broker

import (
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Request is an agent's wish (or somebody's for it) for a tool, with a reason.
// It is decided by policy and by the tool's approval rule.
type Request struct {
	ID         RequestID
	Agent      spiffeid.ID
	Tool       string
	Params     map[string]string // exactly these values are approved; all of the tool's that are not optional
	Duration   time.Duration     // how long the grant is to be good, from the moment that it is made; approvers may shorten it
	MaxUses    int               // 0 means any number; a rule that says single_use makes it 1
	Reason     string            // required
	Ticket     string            // another system's name for the reason; may be empty
	Incident   IncidentID        // the grant ends with it; empty for none
	OnBehalfOf *User             // nil if the agent acts for nobody
	CreatedBy  Principal         // the agent, or a person for it
	CreatedAt  time.Time
	ExpiresAt  time.Time // a request that is pending then has expired

	Rule         string // the approval rule that it waits under; empty if policy grants it at once
	RuleDigest   string // the rule as it was when the request was made
	ToolDigest   string // the tool as it was then
	PolicyDigest string // the policy set that allowed the asking
	// Digest is the SHA-256, in hex, of everything that an approver agrees to.
	// A vote names it, so that nobody agrees to what they were not shown.
	Digest string

	State     RequestState
	Approvals []Approval `json:",omitempty"` // in the order of their coming; at most one of each person
	Grant     GrantID    `json:",omitempty"` // what it became, in state granted
	DecidedAt time.Time  `json:",omitzero"`  // when it left the state pending
	DecidedBy Principal  `json:",omitempty"` // who or what ended the state pending
	Why       string     `json:",omitempty"` // for people: why it was denied, or is void
}

// RequestState says what became of a request.
type RequestState string

// The states of a request. All but pending are final.
const (
	RequestPending   RequestState = "pending"   // waits for approval
	RequestGranted   RequestState = "granted"   // there is a grant
	RequestDenied    RequestState = "denied"    // by an approver
	RequestExpired   RequestState = "expired"   // nobody decided in time
	RequestWithdrawn RequestState = "withdrawn" // by whoever asked, or an operator
	RequestVoid      RequestState = "void"      // what it asks for, or the rule, changed meanwhile: to be asked again
)

// Approval is one person's yes or no to one request.
type Approval struct {
	Person   Person // who, and how they were authenticated
	Approved bool
	At       time.Time
	Comment  string        `json:",omitempty"`
	Duration time.Duration `json:",omitempty"` // the longest that this approver agrees to; 0 means what was asked
	Digest   string        // of the request as it was shown
	By       string        `json:",omitempty"` // the policies that let them decide
}

// ApprovalRule says who must agree before a request becomes a grant. It is
// catalog data; the decision is Go code (broker/policy).
type ApprovalRule struct {
	Name string
	// Need lists what is needed, all of it. One person's yes counts for one
	// entry, so that two groups mean two people.
	Need []Quorum
	// Never says who must not approve although they are in a group.
	NotRequester, NotOwner, NotUser bool
	StepUp                          StepUp        // of each approver, at the vote
	UserStepUp                      StepUp        // of the user on whose behalf the agent acts, at the request
	MaxDuration                     time.Duration // of the grant; never zero
	Expires                         time.Duration // of a request that waits; never zero
	SingleUse                       bool
	// Standing: the grant ends as soon as a person whose vote it needed is no
	// longer in the group that made the vote count.
	Standing bool
	// BreakGlass: loud in log, metrics and evidence, and listed for review.
	BreakGlass bool
	Digest     string // SHA-256, in hex, of everything above
}

// MaxVoters is the most people that one rule can need: what is known of each is
// read in one transaction of the store.
const MaxVoters = 20

// Quorum is a number of people of one group.
type Quorum struct {
	Group string
	Count int
}
