package lease

import (
	"context"
	"errors"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/policy"
)

var errNotBuilt = errors.New("not built yet")

// AccessRequest is what somebody asks for.
type AccessRequest struct {
	Agent      spiffeid.ID // zero: the caller, who is an agent
	Tool       string
	Params     map[string]string
	Duration   *time.Duration // nil means the rule's maximum
	MaxUses    int
	Reason     string // required
	Ticket     string
	Incident   broker.IncidentID
	OnBehalfOf *broker.User // verified by the caller of this
	UserToken  string       // what tells the user's token apart (IdentityProvider.VerifyUser); empty for none
	UserUntil  time.Time    // the end of that token's validity
	BreakGlass bool
	Key        string // idempotency key; may be empty
}

// RequestView is a request as one caller sees it.
type RequestView struct {
	broker.Request
	Missing     []string // what is still needed, for people: "1 of finance"
	Votable     bool     // the caller may decide it now
	BreakGlass  bool
	Description string // of the tool
	Sensitivity string
}

// RequestFilter says which requests to list. Zero fields match everything.
type RequestFilter struct {
	Agent      spiffeid.ID
	Tool       string
	All        bool // also those that are pending no more
	Votable    bool
	BreakGlass bool
}

// Vote is one person's decision of a request.
type Vote struct {
	Request  broker.RequestID
	Approve  bool
	Digest   string // of the request as it was shown; needed for a yes
	Comment  string
	Duration *time.Duration // the longest that is agreed to; nil means what was asked
}

// CreateRequest asks for a tool. Every outcome is evidence.
func (e *Engine) CreateRequest(ctx context.Context, caller broker.Caller, req AccessRequest) (RequestView, error) {
	return RequestView{}, errNotBuilt
}

// Request returns one request to whoever may see it.
func (e *Engine) Request(ctx context.Context, caller broker.Caller, id broker.RequestID) (RequestView, error) {
	return RequestView{}, errNotBuilt
}

// Requests lists the requests that the caller may see, in the order of their making.
func (e *Engine) Requests(ctx context.Context, caller broker.Caller, f RequestFilter, after string, size int) (Page[RequestView], error) {
	return Page[RequestView]{}, errNotBuilt
}

// AwaitRequest returns the request once it differs from seen: at once if seen
// is zero, or if it is pending no more.
func (e *Engine) AwaitRequest(ctx context.Context, caller broker.Caller, id broker.RequestID, seen broker.Request) (RequestView, error) {
	return RequestView{}, errNotBuilt
}

// WithdrawRequest takes back a request that is pending.
func (e *Engine) WithdrawRequest(ctx context.Context, caller broker.Caller, id broker.RequestID, reason string) (RequestView, error) {
	return RequestView{}, errNotBuilt
}

// Vote is a person's yes or no. A yes that completes the quorum makes the grant
// in the same commit.
func (e *Engine) Vote(ctx context.Context, caller broker.Caller, v Vote) (RequestView, error) {
	return RequestView{}, errNotBuilt
}

// PersonSeen records what the identity provider says of a person. When it has
// returned, no vote counts for a group that they are not in any more, and what
// stood on one is being ended.
func (e *Engine) PersonSeen(ctx context.Context, p broker.Person) error { return errNotBuilt }

// Selector says what the kill switch is about. Exactly one field is set.
type Selector struct {
	Agent    spiffeid.ID
	Tool     string
	Provider string
	Owner    string
	Incident broker.IncidentID
	Person   string
	All      bool
}

// Radius is what a Selector matches, and what has become of it.
type Radius struct {
	Grants, Requests, Leases    int
	Alive, Overdue, Lapsed      int
	ByAgent, ByTool, ByProvider map[string]int
	Survives                    []string
	Done                        bool
}

// EndAccess withdraws every grant and request, and ends every lease, that the
// selector matches. It calls told with what there is, and again whenever that
// changes, until none is left or ctx ends; an error of told ends the telling
// alone. With dry it only counts.
func (e *Engine) EndAccess(ctx context.Context, caller broker.Caller, s Selector, dry bool, reason string, told func(Radius) error) error {
	return errNotBuilt
}

// Explanation says why an access is or is not possible.
type Explanation struct {
	Possible   bool
	Summary    string
	Verdict    policy.Verdict
	WouldAllow []string // nearest first
	Grants     []string
}

// ExplainRequest is a question about an access.
type ExplainRequest struct {
	Action    policy.Action
	Principal broker.Principal // empty: the caller
	Groups    []string         // of a person who is not the caller
	Tool      string
	Agent     spiffeid.ID
	Params    map[string]string
	Incident  broker.IncidentID
	Verb      policy.Verb
}

// Explain answers why an access is or is not possible now.
func (e *Engine) Explain(ctx context.Context, caller broker.Caller, req ExplainRequest) (Explanation, error) {
	return Explanation{}, errNotBuilt
}

// Preview is what a policy set would change.
type Preview struct {
	Problems                []string // then nothing else is filled
	Digest, Present         string
	Added, Removed, Changed []string // policy IDs
	Ends                    []PreviewGrant
	Grants                  int // open grants looked at
	Turns                   []PreviewDecision
	Decisions               int // decisions looked at
}

// PreviewGrant is an open grant that a new set would end.
type PreviewGrant struct {
	Grant  broker.Grant
	Leases int // that have not ended
	Why    string
}

// PreviewDecision is a decision that a new set would turn.
type PreviewDecision struct {
	At        time.Time
	Principal broker.Principal
	Action    policy.Action
	About     string
	Was, Now  bool
	Why       string
}

// Preview says what a policy set would change if it were loaded.
func (e *Engine) Preview(ctx context.Context, caller broker.Caller, files []policy.Source) (Preview, error) {
	return Preview{}, errNotBuilt
}

// Recover lets a principal administer for a time whatever the policies say. It
// is called on the broker's host alone; who says who did.
func (e *Engine) Recover(ctx context.Context, p broker.Principal, d time.Duration, reason, who string) error {
	return errNotBuilt
}
