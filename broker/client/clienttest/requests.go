package clienttest

import (
	"context"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/mayfly-security/mayfly/broker"
	mayflyv1 "github.com/mayfly-security/mayfly/broker/api/mayfly/v1"
	"github.com/mayfly-security/mayfly/broker/api/mayfly/v1/mayflyv1connect"
)

// Voter is who votes at the stand-in.
const Voter = "person:ada@acme.test"

type requests struct {
	*Broker
	mayflyv1connect.UnimplementedRequestServiceHandler
}

// CreateRequest grants at once what a tool without an approval rule gives, and
// lets everything else wait for one yes.
func (r requests) CreateRequest(_ context.Context, c *connect.Request[mayflyv1.CreateRequestRequest]) (*connect.Response[mayflyv1.Request], error) {
	r.Lock()
	defer r.Unlock()
	m := c.Msg
	r.keep("CreateRequest", m)
	if made := r.wanted[m.GetIdempotencyKey()]; made != nil {
		return connect.NewResponse(proto.CloneOf(made)), nil
	}
	i := slices.IndexFunc(r.Tools, func(t *mayflyv1.Tool) bool { return t.GetName() == m.GetTool() })
	if i < 0 {
		return nil, Refusal(connect.CodeNotFound, broker.ReasonToolUnknown, "there is no such tool", "see `mayfly tools`")
	}
	now, tool := r.now(), r.Tools[i]
	agent, by := m.GetAgent(), Voter
	if agent == "" {
		agent = "spiffe://acme.test/agent/troubleshooter"
		by = agent
	}
	made := &mayflyv1.Request{
		Id: string(broker.NewRequestID(now)), Agent: agent, Tool: m.GetTool(), Parameters: m.GetParameters(), Duration: m.GetDuration(),
		MaxUses: m.GetMaxUses(), Reason: m.GetReason(), Ticket: m.GetTicket(), IncidentId: m.GetIncidentId(), CreatedBy: by,
		CreatedAt: timestamppb.New(now), ExpiresAt: timestamppb.New(now.Add(30*time.Minute + 30*time.Second)), State: string(broker.RequestPending), Rule: tool.GetApproval(),
		BreakGlass: m.GetBreakGlass(), Digest: strings.Repeat("d", 64), Missing: []string{"1 of " + tool.GetApproval()},
		ToolDescription: tool.GetDescription(), Sensitivity: tool.GetSensitivity(), Votable: true,
		AgentOwner: "troubleshooting@acme.test", Survives: tool.GetSurvives(),
	}
	if m.GetSubjectToken() != "" {
		made.OnBehalfOf = "person:user@acme.test"
	}
	if tool.GetApproval() == "" {
		r.decide(made, broker.RequestGranted)
	}
	r.Requests = append(r.Requests, made)
	if m.GetIdempotencyKey() != "" {
		if r.wanted == nil {
			r.wanted = map[string]*mayflyv1.Request{}
		}
		r.wanted[m.GetIdempotencyKey()] = made
	}
	return connect.NewResponse(proto.CloneOf(made)), nil
}

// decide ends the waiting. The caller holds the lock.
func (r requests) decide(m *mayflyv1.Request, state broker.RequestState) {
	m.State, m.DecidedAt, m.Missing, m.Votable = string(state), timestamppb.New(r.now()), nil, false
	if state == broker.RequestGranted {
		m.GrantId = string(broker.NewGrantID(r.now()))
	}
	r.notify()
}

// notify wakes those that watch. The caller holds the lock.
func (b *Broker) notify() {
	if b.changed != nil {
		close(b.changed)
	}
	b.changed = make(chan struct{})
}

// Decide brings the pending requests into a state, for those that watch them.
func (b *Broker) Decide(state broker.RequestState, by, why string) {
	b.Lock()
	defer b.Unlock()
	for _, m := range b.Requests {
		if m.GetState() == string(broker.RequestPending) {
			m.DecidedBy, m.Why = by, why
			requests{Broker: b}.decide(m, state)
		}
	}
}

func (b *Broker) request(id string) (*mayflyv1.Request, error) {
	i := slices.IndexFunc(b.Requests, func(m *mayflyv1.Request) bool { return m.GetId() == id })
	if i < 0 {
		return nil, notFound("request")
	}
	return b.Requests[i], nil
}

func (r requests) GetRequest(_ context.Context, c *connect.Request[mayflyv1.GetRequestRequest]) (*connect.Response[mayflyv1.Request], error) {
	r.Lock()
	defer r.Unlock()
	m, err := r.request(c.Msg.GetId())
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(proto.CloneOf(m)), nil
}

func (r requests) ListRequests(_ context.Context, c *connect.Request[mayflyv1.ListRequestsRequest]) (*connect.Response[mayflyv1.ListRequestsResponse], error) {
	r.Lock()
	defer r.Unlock()
	f := c.Msg
	var all []*mayflyv1.Request
	for _, m := range r.Requests {
		if (f.GetAll() || m.GetState() == string(broker.RequestPending)) && (f.GetTool() == "" || f.GetTool() == m.GetTool()) &&
			(f.GetAgent() == "" || f.GetAgent() == m.GetAgent()) && (!f.GetVotable() || m.GetVotable()) && (!f.GetBreakGlass() || m.GetBreakGlass()) {
			all = append(all, proto.CloneOf(m))
		}
	}
	items, next, err := page(r.Broker, all, f.GetPageSize(), f.GetPageToken())
	return connect.NewResponse(&mayflyv1.ListRequestsResponse{Requests: items, NextPageToken: next}), err
}

func (r requests) WatchRequest(ctx context.Context, c *connect.Request[mayflyv1.WatchRequestRequest], s *connect.ServerStream[mayflyv1.Request]) error {
	for {
		r.Lock()
		m, err := r.request(c.Msg.GetId())
		if err == nil {
			m = proto.CloneOf(m)
		}
		if r.changed == nil {
			r.changed = make(chan struct{})
		}
		changed := r.changed
		r.Unlock()
		if err != nil {
			return err
		}
		if err := s.Send(m); err != nil {
			return err
		}
		if m.GetState() != string(broker.RequestPending) {
			return nil
		}
		if err := r.cut("WatchRequest"); err != nil {
			return err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (r requests) WithdrawRequest(_ context.Context, c *connect.Request[mayflyv1.WithdrawRequestRequest]) (*connect.Response[mayflyv1.Request], error) {
	r.Lock()
	defer r.Unlock()
	r.keep("WithdrawRequest", c.Msg)
	return r.end(c.Msg.GetId(), broker.RequestWithdrawn, func(m *mayflyv1.Request) { m.DecidedBy, m.Why = m.GetCreatedBy(), c.Msg.GetReason() })
}

func (r requests) ApproveRequest(_ context.Context, c *connect.Request[mayflyv1.ApproveRequestRequest]) (*connect.Response[mayflyv1.Request], error) {
	r.Lock()
	defer r.Unlock()
	r.keep("ApproveRequest", c.Msg)
	if m, err := r.request(c.Msg.GetId()); err == nil && m.GetDigest() != c.Msg.GetDigest() {
		return nil, Refusal(connect.CodeFailedPrecondition, broker.ReasonConflict, "the request is not what was shown", "look at it again")
	}
	return r.end(c.Msg.GetId(), broker.RequestGranted, func(m *mayflyv1.Request) {
		m.DecidedBy = Voter
		m.Approvals = append(m.Approvals, &mayflyv1.Approval{
			Person: Voter, Approved: true, At: timestamppb.New(r.now()), Comment: c.Msg.GetComment(), Duration: c.Msg.GetDuration(),
		})
	})
}

func (r requests) DenyRequest(_ context.Context, c *connect.Request[mayflyv1.DenyRequestRequest]) (*connect.Response[mayflyv1.Request], error) {
	r.Lock()
	defer r.Unlock()
	r.keep("DenyRequest", c.Msg)
	return r.end(c.Msg.GetId(), broker.RequestDenied, func(m *mayflyv1.Request) {
		m.DecidedBy, m.Why = Voter, c.Msg.GetComment()
		m.Approvals = append(m.Approvals, &mayflyv1.Approval{Person: Voter, At: timestamppb.New(r.now()), Comment: c.Msg.GetComment()})
	})
}

// end ends the waiting of a request that is pending. The caller holds the lock.
func (r requests) end(id string, state broker.RequestState, change func(*mayflyv1.Request)) (*connect.Response[mayflyv1.Request], error) {
	m, err := r.request(id)
	if err != nil {
		return nil, err
	}
	if m.GetState() != string(broker.RequestPending) {
		return nil, Refusal(connect.CodeFailedPrecondition, broker.ReasonRequestOver, "the request is "+m.GetState(), "ask again")
	}
	change(m)
	r.decide(m, state)
	return connect.NewResponse(proto.CloneOf(m)), nil
}

type policy struct {
	*Broker
	mayflyv1connect.UnimplementedPolicyServiceHandler
}

func (p policy) Explain(_ context.Context, c *connect.Request[mayflyv1.ExplainRequest]) (*connect.Response[mayflyv1.ExplainResponse], error) {
	p.Lock()
	defer p.Unlock()
	p.keep("Explain", c.Msg)
	return connect.NewResponse(p.Explained), nil
}

func (p policy) Preview(_ context.Context, c *connect.Request[mayflyv1.PreviewRequest]) (*connect.Response[mayflyv1.PreviewResponse], error) {
	p.Lock()
	defer p.Unlock()
	p.keep("Preview", c.Msg)
	return connect.NewResponse(p.Previewed), nil
}

func (o operator) EndAccess(ctx context.Context, c *connect.Request[mayflyv1.EndAccessRequest], s *connect.ServerStream[mayflyv1.EndAccessProgress]) error {
	o.Lock()
	if !c.Msg.GetDryRun() {
		o.keep("EndAccess", c.Msg)
	}
	all := slices.Clone(o.Ends)
	o.Unlock()
	if c.Msg.GetDryRun() {
		all = all[:min(len(all), 1)]
	}
	for _, m := range all {
		if err := s.Send(m); err != nil {
			return err
		}
		if err := o.cut("EndAccess"); err != nil {
			return err
		}
	}
	if c.Msg.GetDryRun() || len(all) > 0 && all[len(all)-1].GetDone() {
		return nil
	}
	<-ctx.Done()
	return ctx.Err()
}
