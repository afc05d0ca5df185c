package server

import (
	"context"
	"errors"
	"slices"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/mayfly-security/mayfly/broker"
	mayflyv1 "github.com/mayfly-security/mayfly/broker/api/mayfly/v1"
	"github.com/mayfly-security/mayfly/broker/lease"
	"github.com/mayfly-security/mayfly/broker/policy"
	"github.com/mayfly-security/mayfly/broker/signin"
)

// requestService is mayfly.v1.RequestService.
type requestService struct{ s *Server }

func (q requestService) CreateRequest(ctx context.Context, req *connect.Request[mayflyv1.CreateRequestRequest]) (*connect.Response[mayflyv1.Request], error) {
	return call(ctx, q.s, "create_request", func(caller broker.Caller) (*mayflyv1.Request, error) {
		m := req.Msg
		r := lease.AccessRequest{
			Tool: m.GetTool(), Params: m.GetParameters(), MaxUses: int(m.GetMaxUses()), Reason: m.GetReason(), Ticket: m.GetTicket(),
			BreakGlass: m.GetBreakGlass(), Key: m.GetIdempotencyKey(),
		}
		var err error
		if r.Agent, err = spiffeID("agent", m.GetAgent()); err != nil {
			return nil, err
		}
		if r.Incident, err = maybe(m.GetIncidentId(), broker.ParseIncidentID); err != nil {
			return nil, err
		}
		if r.Duration, err = span("duration", broker.ReasonInvalidArgument, m.GetDuration()); err != nil {
			return nil, err
		}
		if m.GetSubjectToken() != "" {
			if err := q.s.actFor(ctx, &r, m.GetSubjectToken()); err != nil {
				return nil, unheard{err}
			}
		}
		return q.answer(q.s.engine.CreateRequest(ctx, caller, r))
	})
}

// maxSubjectToken is the longest token of a user that is looked at, in bytes.
const maxSubjectToken = 8 << 10

// actFor verifies the token of the user on whose behalf an agent acts. What is
// kept is who they are; the token is not.
func (s *Server) actFor(ctx context.Context, r *lease.AccessRequest, token string) error {
	if s.people == nil {
		return broker.Refuse(broker.ReasonTokenInvalid, "this broker has no identity provider, and takes no user's token", "leave subject_token out, or ask an operator")
	}
	if len(token) > maxSubjectToken {
		return broker.Refuse(broker.ReasonTokenInvalid, "the subject token is too long to be one", "send the user's token for the broker's audience")
	}
	u, id, until, err := s.people.signIn.Provider().VerifyUser(ctx, token, s.engine.Now())
	if err != nil {
		return err
	}
	if id == "" || u.Name == "" || !s.engine.Late().Before(until) {
		return broker.Refuse(broker.ReasonTokenInvalid, "the subject token has expired", "get a new one of the identity provider")
	}
	r.OnBehalfOf, r.UserToken, r.UserUntil = &u, id, until
	return nil
}

func (q requestService) answer(v lease.RequestView, err error) (*mayflyv1.Request, error) {
	if err != nil {
		return nil, err
	}
	return requestMessage(v), nil
}

func (q requestService) GetRequest(ctx context.Context, req *connect.Request[mayflyv1.GetRequestRequest]) (*connect.Response[mayflyv1.Request], error) {
	return call(ctx, q.s, "get_request", func(caller broker.Caller) (*mayflyv1.Request, error) {
		id, err := own(broker.ParseRequestID(req.Msg.GetId()))
		if err != nil {
			return nil, err
		}
		v, err := own(q.s.engine.Request(ctx, caller, id))
		return q.answer(v, err)
	})
}

func (q requestService) ListRequests(ctx context.Context, req *connect.Request[mayflyv1.ListRequestsRequest]) (*connect.Response[mayflyv1.ListRequestsResponse], error) {
	return call(ctx, q.s, "list_requests", func(caller broker.Caller) (*mayflyv1.ListRequestsResponse, error) {
		m := req.Msg
		if err := checkPage(m.GetPageSize(), m.GetPageToken(), broker.ParseRequestID); err != nil {
			return nil, err
		}
		f := lease.RequestFilter{Tool: m.GetTool(), All: m.GetAll(), Votable: m.GetVotable(), BreakGlass: m.GetBreakGlass()}
		var err error
		if f.Agent, err = spiffeID("agent", m.GetAgent()); err != nil {
			return nil, err
		}
		p, err := own(q.s.engine.Requests(ctx, caller, f, m.GetPageToken(), int(m.GetPageSize())))
		if err != nil {
			return nil, err
		}
		res := &mayflyv1.ListRequestsResponse{NextPageToken: p.Next}
		for _, v := range p.Items {
			res.Requests = append(res.Requests, requestMessage(v))
		}
		return res, nil
	})
}

func (q requestService) WatchRequest(ctx context.Context, req *connect.Request[mayflyv1.WatchRequestRequest], out *connect.ServerStream[mayflyv1.Request]) error {
	return q.s.stream(ctx, "watch_request", func(st *streaming) error {
		id, err := own(broker.ParseRequestID(req.Msg.GetId()))
		if err != nil {
			return err
		}
		var seen broker.Request
		for {
			v, news, err := q.await(ctx, st, id, seen)
			if err == nil && !news {
				continue
			}
			if _, err := st.authorize(); err != nil { // for this very message, which may be a refusal
				return err
			}
			if err != nil {
				return err
			}
			if err := out.Send(requestMessage(v)); err != nil {
				return err
			}
			if v.State != broker.RequestPending {
				return nil
			}
			seen = v.Request
		}
	})
}

// await waits for news of a request for one turn.
func (q requestService) await(ctx context.Context, st *streaming, id broker.RequestID, seen broker.Request) (v lease.RequestView, news bool, err error) {
	turn, end := st.turn(ctx)
	defer end()
	caller, err := st.authorize()
	if err != nil {
		return v, false, err
	}
	v, err = own(q.s.engine.AwaitRequest(turn, caller, id, seen))
	if err != nil && turn.Err() != nil && ctx.Err() == nil && broker.ReasonOf(err) == broker.ReasonInternal {
		return v, false, nil // nothing yet
	}
	return v, err == nil, err
}

func (q requestService) WithdrawRequest(ctx context.Context, req *connect.Request[mayflyv1.WithdrawRequestRequest]) (*connect.Response[mayflyv1.Request], error) {
	return call(ctx, q.s, "withdraw_request", func(caller broker.Caller) (*mayflyv1.Request, error) {
		id, err := own(broker.ParseRequestID(req.Msg.GetId()))
		if err != nil {
			return nil, err
		}
		return q.answer(q.s.engine.WithdrawRequest(ctx, caller, id, req.Msg.GetReason()))
	})
}

func (q requestService) ApproveRequest(ctx context.Context, req *connect.Request[mayflyv1.ApproveRequestRequest]) (*connect.Response[mayflyv1.Request], error) {
	return call(ctx, q.s, "approve_request", func(caller broker.Caller) (*mayflyv1.Request, error) {
		m := req.Msg
		id, err := own(broker.ParseRequestID(m.GetId()))
		if err != nil {
			return nil, err
		}
		d, err := span("duration", broker.ReasonInvalidArgument, m.GetDuration())
		if err != nil {
			return nil, err
		}
		return q.answer(q.s.engine.Vote(ctx, caller, lease.Vote{Request: id, Approve: true, Digest: m.GetDigest(), Comment: m.GetComment(), Duration: d}))
	})
}

func (q requestService) DenyRequest(ctx context.Context, req *connect.Request[mayflyv1.DenyRequestRequest]) (*connect.Response[mayflyv1.Request], error) {
	return call(ctx, q.s, "deny_request", func(caller broker.Caller) (*mayflyv1.Request, error) {
		id, err := own(broker.ParseRequestID(req.Msg.GetId()))
		if err != nil {
			return nil, err
		}
		return q.answer(q.s.engine.Vote(ctx, caller, lease.Vote{Request: id, Comment: req.Msg.GetComment()}))
	})
}

func requestMessage(v lease.RequestView) *mayflyv1.Request {
	m := &mayflyv1.Request{
		Id: string(v.ID), Agent: v.Agent.String(), Tool: v.Tool, Parameters: v.Params, Duration: durationpb.New(v.Duration),
		MaxUses: int32(v.MaxUses), Reason: v.Reason, Ticket: v.Ticket, IncidentId: string(v.Incident), OnBehalfOf: userName(v.OnBehalfOf),
		CreatedBy: v.CreatedBy.String(), CreatedAt: stamp(v.CreatedAt), ExpiresAt: stamp(v.ExpiresAt),
		State: string(v.State), Rule: v.Rule, BreakGlass: v.BreakGlass, Digest: v.Digest, Missing: v.Missing,
		GrantId: string(v.Grant), DecidedAt: stamp(v.DecidedAt), DecidedBy: v.DecidedBy.String(), Why: v.Why,
		ToolDescription: v.Description, Sensitivity: v.Sensitivity, Votable: v.Votable,
		AgentOwner: v.Owner, Survives: v.Survives,
	}
	for _, a := range v.Approvals {
		am := &mayflyv1.Approval{
			Person: a.Person.Principal().String(), Approved: a.Approved, At: stamp(a.At), Comment: a.Comment,
			AuthTime: stamp(a.Person.AuthTime), Acr: a.Person.ACR,
		}
		if a.Duration != 0 {
			am.Duration = durationpb.New(a.Duration)
		}
		m.Approvals = append(m.Approvals, am)
	}
	return m
}

// userName is the principal of a user; empty for nobody.
func userName(u *broker.User) string {
	if u == nil {
		return ""
	}
	return u.Principal().String()
}

// policyService is mayfly.v1.PolicyService.
type policyService struct{ s *Server }

func (p policyService) Explain(ctx context.Context, req *connect.Request[mayflyv1.ExplainRequest]) (*connect.Response[mayflyv1.ExplainResponse], error) {
	return call(ctx, p.s, "explain", func(caller broker.Caller) (*mayflyv1.ExplainResponse, error) {
		m := req.Msg
		r := lease.ExplainRequest{
			Action: policy.Action(m.GetAction()), Principal: broker.Principal(m.GetPrincipal()), Groups: m.GetGroups(),
			Tool: m.GetTool(), Params: m.GetParameters(), Verb: policy.Verb(m.GetVerb()),
		}
		if !slices.Contains(policy.Actions(), r.Action) {
			return nil, unheard{broker.Refusef(broker.ReasonInvalidArgument, "the API's definition lists the actions",
				"there is no action %q", broker.Clean(broker.Shorten(m.GetAction(), 40)))}
		}
		if r.Verb != "" && !slices.Contains(policy.Verbs(), r.Verb) {
			var known []string
			for _, v := range policy.Verbs() {
				known = append(known, string(v))
			}
			return nil, unheard{broker.Refusef(broker.ReasonInvalidArgument, "the reference of policies lists the verbs",
				"there is no verb %q%s", broker.Clean(broker.Shorten(m.GetVerb(), 40)), broker.Suggest(m.GetVerb(), "verbs", known))}
		}
		if err := checkPrincipal(r.Principal); err != nil {
			return nil, err
		}
		var err error
		if r.Agent, err = spiffeID("agent", m.GetAgent()); err != nil {
			return nil, err
		}
		if r.Incident, err = maybe(m.GetIncidentId(), broker.ParseIncidentID); err != nil {
			return nil, err
		}
		x, err := p.s.engine.Explain(ctx, caller, r)
		if err != nil {
			return nil, err
		}
		return &mayflyv1.ExplainResponse{
			Possible: x.Possible, Summary: x.Summary, Policies: x.Verdict.Policies, Errors: x.Verdict.Errors,
			WouldAllow: x.WouldAllow, PolicyDigest: x.Verdict.Digest, Grants: x.Grants,
		}, nil
	})
}

// checkPrincipal refuses what names nobody. Empty means the caller.
func checkPrincipal(p broker.Principal) error {
	if p == "" {
		return nil
	}
	_, workload := p.Workload()
	if name, person := p.Person(); !workload && (!person || name == "" || len(name) > broker.MaxPersonName || broker.Clean(name) != name) {
		return unheard{broker.Refusef(broker.ReasonInvalidArgument, `give a SPIFFE ID, or "person:" and a name`,
			"%q names nobody", broker.Clean(broker.Shorten(p.String(), 100)))}
	}
	return nil
}

func (p policyService) Preview(ctx context.Context, req *connect.Request[mayflyv1.PreviewRequest]) (*connect.Response[mayflyv1.PreviewResponse], error) {
	return call(ctx, p.s, "preview", func(caller broker.Caller) (*mayflyv1.PreviewResponse, error) {
		var files []policy.Source
		for _, f := range req.Msg.GetFiles() {
			if err := broker.CheckText("a file's name", f.GetName(), 200); err != nil {
				return nil, unheard{err}
			}
			files = append(files, policy.Source{Name: f.GetName(), Text: f.GetText()})
		}
		v, err := p.s.engine.Preview(ctx, caller, files)
		if err != nil {
			return nil, err
		}
		res := &mayflyv1.PreviewResponse{
			Problems: v.Problems, Digest: v.Digest, PresentDigest: v.Present, Added: v.Added, Removed: v.Removed, Changed: v.Changed,
			Grants: int32(v.Grants), Decisions: int32(v.Decisions),
		}
		for _, g := range v.Ends {
			res.Ends = append(res.Ends, &mayflyv1.PreviewGrant{
				GrantId: string(g.Grant.ID), Agent: g.Grant.Agent.String(), Tool: g.Grant.Tool, Leases: int32(g.Leases), Why: g.Why})
		}
		for _, d := range v.Turns {
			res.Turns = append(res.Turns, &mayflyv1.PreviewDecision{
				At: stamp(d.At), Principal: d.Principal.String(), Action: string(d.Action), About: d.About,
				WasAllowed: d.Was, WouldBeAllowed: d.Now, Why: d.Why})
		}
		return res, nil
	})
}

// EndAccess is the kill switch. What was begun goes on, whether anybody is told
// or not.
func (o operatorService) EndAccess(ctx context.Context, req *connect.Request[mayflyv1.EndAccessRequest], out *connect.ServerStream[mayflyv1.EndAccessProgress]) error {
	return o.s.stream(ctx, "end_access", func(st *streaming) error {
		m := req.Msg
		sel := lease.Selector{Tool: m.GetTool(), Provider: m.GetProvider(), Owner: m.GetOwner(), Person: m.GetPerson(), All: m.GetAll()}
		var err error
		if sel.Agent, err = spiffeID("agent", m.GetAgent()); err != nil {
			return err
		}
		if sel.Incident, err = maybe(m.GetIncidentId(), broker.ParseIncidentID); err != nil {
			return err
		}
		return st.guarded(ctx, func(ctx context.Context, caller broker.Caller, tell func() error) error {
			return o.s.engine.EndAccess(ctx, caller, sel, m.GetDryRun(), m.GetReason(), func(r lease.Radius) error {
				if err := tell(); err != nil {
					return err
				}
				return out.Send(radiusMessage(r))
			})
		})
	})
}

func radiusMessage(r lease.Radius) *mayflyv1.EndAccessProgress {
	return &mayflyv1.EndAccessProgress{
		Grants: int32(r.Grants), Requests: int32(r.Requests), Leases: int32(r.Leases),
		Alive: int32(r.Alive), Overdue: int32(r.Overdue), Lapsed: int32(r.Lapsed),
		ByAgent: counts(r.ByAgent), ByTool: counts(r.ByTool), ByProvider: counts(r.ByProvider),
		Survives: r.Survives, Done: r.Done,
	}
}

func counts(m map[string]int) map[string]int32 {
	out := make(map[string]int32, len(m))
	for k, n := range m {
		out[k] = int32(n)
	}
	return out
}

// signInService is mayfly.v1.SignInService. Nothing of it needs a session but
// SignOut.
type signInService struct{ p *people }

func (i signInService) GetSignIn(ctx context.Context, _ *connect.Request[mayflyv1.GetSignInRequest]) (*connect.Response[mayflyv1.GetSignInResponse], error) {
	return call(ctx, i.p.s, "get_sign_in", func(broker.Caller) (*mayflyv1.GetSignInResponse, error) {
		p := i.p.signIn.Provider()
		return &mayflyv1.GetSignInResponse{Issuer: p.Issuer(), Device: p.CanDevice(), SamplePeople: p.Sample()}, nil
	})
}

func (i signInService) RedeemCode(ctx context.Context, req *connect.Request[mayflyv1.RedeemCodeRequest]) (*connect.Response[mayflyv1.Session], error) {
	return call(ctx, i.p.s, "redeem_code", func(caller broker.Caller) (*mayflyv1.Session, error) {
		s, err := own(i.p.signIn.Redeem(ctx, req.Msg.GetCode(), req.Msg.GetCodeVerifier(), req.Msg.GetRedirectUri(), caller.Correlation))
		return sessionMessage(s), err
	})
}

func (i signInService) StartDevice(ctx context.Context, _ *connect.Request[mayflyv1.StartDeviceRequest]) (*connect.Response[mayflyv1.StartDeviceResponse], error) {
	return call(ctx, i.p.s, "start_device", func(broker.Caller) (*mayflyv1.StartDeviceResponse, error) {
		d, err := own(i.p.signIn.StartDevice(ctx, visitOf(ctx).from))
		if err != nil {
			return nil, err
		}
		handle, _ := d.Handle.Reveal("handle")
		return &mayflyv1.StartDeviceResponse{
			Handle: handle, UserCode: d.UserCode, VerificationUri: d.VerificationURI, VerificationUriComplete: d.VerificationURIComplete,
			ExpiresAt: stamp(d.ExpiresAt), Interval: durationpb.New(d.Interval),
		}, nil
	})
}

func (i signInService) PollDevice(ctx context.Context, req *connect.Request[mayflyv1.PollDeviceRequest]) (*connect.Response[mayflyv1.Session], error) {
	return call(ctx, i.p.s, "poll_device", func(caller broker.Caller) (*mayflyv1.Session, error) {
		s, err := i.p.signIn.PollDevice(ctx, req.Msg.GetHandle(), caller.Correlation)
		if broker.ReasonOf(err) == broker.ReasonSignInPending {
			return nil, err // to wait is no refusal, and no evidence
		}
		s, err = own(s, err)
		return sessionMessage(s), err
	})
}

func (i signInService) SignOut(ctx context.Context, req *connect.Request[mayflyv1.SignOutRequest]) (*connect.Response[mayflyv1.SignOutResponse], error) {
	return call(ctx, i.p.s, "sign_out", func(caller broker.Caller) (*mayflyv1.SignOutResponse, error) {
		if caller.Person == nil {
			return nil, errors.New("a caller of the people listener is no person")
		}
		m := req.Msg
		name := m.GetPerson()
		if n, ok := broker.Principal(name).Person(); ok {
			name = n
		}
		if name == "" {
			if err := i.p.signIn.SignOut(ctx, *caller.Person, m.GetReason(), caller.Correlation); err != nil {
				return nil, unheard{err}
			}
			return &mayflyv1.SignOutResponse{Sessions: 1}, nil
		}
		if name != caller.Person.Name { // one's own are one's own
			if err := i.p.s.engine.Administer(ctx, caller, policy.VerbEndSessions); err != nil {
				return nil, unheard{err}
			}
		}
		n, err := own(i.p.signIn.EndSessions(ctx, caller.Principal(), name, m.GetReason(), caller.Correlation))
		return &mayflyv1.SignOutResponse{Sessions: int32(n)}, err
	})
}

func sessionMessage(s signin.Session) *mayflyv1.Session {
	token, _ := s.Token.Reveal("token")
	return &mayflyv1.Session{
		Token: token, Id: string(s.Person.Session), Person: s.Person.Principal().String(), Groups: s.Person.Groups,
		ExpiresAt: stamp(s.ExpiresAt), AuthTime: stamp(s.Person.AuthTime), Acr: s.Person.ACR,
	}
}
