package client

import (
	"context"
	"iter"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/mayfly-security/mayfly/broker"
	mayflyv1 "github.com/mayfly-security/mayfly/broker/api/mayfly/v1"
)

// Request is a request as the broker tells it to one caller. The digests of
// tool, rule and policies are not told and stay empty; of the user on whose
// behalf the agent acts and of those who voted, only what the API has.
type Request struct {
	broker.Request
	BreakGlass  bool
	Missing     []string // what is still needed, for people: "1 of finance"
	Description string   // the tool's
	Sensitivity string   // the tool's
	Owner       string   // the agent's
	Survives    string   // what outlives a revocation of the tool's credentials; empty for nothing
	Votable     bool     // we may decide it now
}

// AccessRequest asks for a tool.
type AccessRequest struct {
	Tool         string
	Agent        spiffeid.ID // a person names it; zero for an agent that asks for itself
	Params       map[string]string
	For          time.Duration // of the grant; zero means the rule's maximum
	MaxUses      int           // zero means any number, or 1 where the rule says so
	Reason       string        // required
	Ticket       string        // another system's name for the reason; may be empty
	Incident     broker.IncidentID
	SubjectToken broker.Secret // a token of the user on whose behalf the agent acts: see NewToken; zero for nobody
	BreakGlass   bool          // under the tool's rule for emergencies
	Key          string        // the idempotency key; empty means a fresh one
}

// CreateRequest asks for a tool. The State of the answer says what became of
// it: granted at once, or pending.
func (c *Client) CreateRequest(ctx context.Context, r AccessRequest) (Request, error) {
	token, _ := r.SubjectToken.Reveal(fieldToken)
	m := &mayflyv1.CreateRequestRequest{
		Tool: r.Tool, Agent: idText(r.Agent), Parameters: r.Params, MaxUses: int32(min(max(r.MaxUses, -1), 1<<30)),
		Reason: r.Reason, Ticket: r.Ticket, IncidentId: string(r.Incident), SubjectToken: token, BreakGlass: r.BreakGlass,
		IdempotencyKey: orFresh(r.Key),
	}
	if r.For != 0 {
		m.Duration = durationpb.New(r.For)
	}
	return requestOf(call(ctx, c, c.requests.CreateRequest, m))
}

// Request shows one request.
func (c *Client) Request(ctx context.Context, id broker.RequestID) (Request, error) {
	return requestOf(call(ctx, c, c.requests.GetRequest, &mayflyv1.GetRequestRequest{Id: string(id)}))
}

// RequestFilter says which requests to list. Zero fields match everything.
type RequestFilter struct {
	Agent      spiffeid.ID
	Tool       string
	All        bool // also those that are pending no more
	Votable    bool // only those that we may decide now
	BreakGlass bool // only those under a rule for emergencies
}

// Requests lists the requests that we may see, in the order of their making.
// It asks for pages as they are needed. After an error it ends.
func (c *Client) Requests(ctx context.Context, f RequestFilter) iter.Seq2[Request, error] {
	return pages(func(token string) ([]*mayflyv1.Request, string, error) {
		res, err := call(ctx, c, c.requests.ListRequests, &mayflyv1.ListRequestsRequest{
			All: f.All, Agent: idText(f.Agent), Tool: f.Tool, Votable: f.Votable, BreakGlass: f.BreakGlass,
			PageSize: pageSize, PageToken: token,
		})
		return res.GetRequests(), res.GetNextPageToken(), err
	}, (*decoder).request)
}

// WatchRequest gives a request as it is, and again whenever it changes, until
// it is pending no more. Config.Timeout bounds no more than how long a broker
// that went away is waited for. After an error it ends.
func (c *Client) WatchRequest(ctx context.Context, id broker.RequestID) iter.Seq2[Request, error] {
	return follow(ctx, c, streamOf[mayflyv1.WatchRequestRequest, mayflyv1.Request, Request]{
		open: c.requests.WatchRequest, decode: (*decoder).request, resume: true,
		last: func(r Request) bool { return r.State != broker.RequestPending },
	}, &mayflyv1.WatchRequestRequest{Id: string(id)})
}

// WithdrawRequest takes back a request that is pending. reason may be empty.
func (c *Client) WithdrawRequest(ctx context.Context, id broker.RequestID, reason string) (Request, error) {
	return requestOf(call(ctx, c, c.requests.WithdrawRequest, &mayflyv1.WithdrawRequestRequest{Id: string(id), Reason: reason}))
}

// Vote is a person's decision of a request.
type Vote struct {
	Request broker.RequestID
	Digest  string        // of the request as it was shown; a yes needs it, a no does not send it
	Comment string        // may be empty
	For     time.Duration // of a yes: the longest that is agreed to; zero means what was asked
}

// Approve is a person's yes. Where the sign-in is too old or too weak, the
// error's reason is broker.ReasonStepUp, and its StepUp says what is needed.
func (c *Client) Approve(ctx context.Context, v Vote) (Request, error) {
	m := &mayflyv1.ApproveRequestRequest{Id: string(v.Request), Digest: v.Digest, Comment: v.Comment}
	if v.For != 0 {
		m.Duration = durationpb.New(v.For)
	}
	return requestOf(call(ctx, c, c.requests.ApproveRequest, m))
}

// Deny is a person's no, which is final.
func (c *Client) Deny(ctx context.Context, v Vote) (Request, error) {
	return requestOf(call(ctx, c, c.requests.DenyRequest, &mayflyv1.DenyRequestRequest{Id: string(v.Request), Comment: v.Comment}))
}

func requestOf(m *mayflyv1.Request, err error) (Request, error) {
	if err != nil {
		return Request{}, err
	}
	d := decoder{}
	return d.request(m), d.err
}

func (d *decoder) request(m *mayflyv1.Request) Request {
	r := Request{
		Request: broker.Request{
			ID: broker.RequestID(m.GetId()), Agent: d.id("agent", m.GetAgent()), Tool: m.GetTool(), Params: m.GetParameters(),
			Duration: m.GetDuration().AsDuration(), MaxUses: int(m.GetMaxUses()), Reason: m.GetReason(), Ticket: m.GetTicket(),
			Incident: broker.IncidentID(m.GetIncidentId()), OnBehalfOf: userOf(m.GetOnBehalfOf()),
			CreatedBy: broker.Principal(m.GetCreatedBy()), CreatedAt: instant(m.GetCreatedAt()), ExpiresAt: instant(m.GetExpiresAt()),
			Rule: m.GetRule(), Digest: m.GetDigest(), State: broker.RequestState(m.GetState()),
			Grant: broker.GrantID(m.GetGrantId()), DecidedAt: instant(m.GetDecidedAt()), DecidedBy: broker.Principal(m.GetDecidedBy()),
			Why: m.GetWhy(),
		},
		BreakGlass: m.GetBreakGlass(), Missing: m.GetMissing(), Description: m.GetToolDescription(), Sensitivity: m.GetSensitivity(),
		Votable: m.GetVotable(), Owner: m.GetAgentOwner(), Survives: m.GetSurvives(),
	}
	for _, a := range m.GetApprovals() {
		r.Approvals = append(r.Approvals, broker.Approval{
			Person:   broker.Person{Name: personName(a.GetPerson()), AuthTime: instant(a.GetAuthTime()), ACR: a.GetAcr()},
			Approved: a.GetApproved(), At: instant(a.GetAt()), Comment: a.GetComment(), Duration: a.GetDuration().AsDuration(),
		})
	}
	return r
}

// personName is a person's name, whether it is written as a principal or not.
func personName(s string) string {
	if name, ok := broker.Principal(s).Person(); ok {
		return name
	}
	return s
}

// userOf is a user of whom only the name is told; nil for nobody.
func userOf(s string) *broker.User {
	if s == "" {
		return nil
	}
	return &broker.User{Name: personName(s)}
}
