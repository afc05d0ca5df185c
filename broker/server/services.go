package server

import (
	"context"
	"errors"
	"strings"

	"connectrpc.com/connect"

	"github.com/mayfly-security/mayfly/broker"
	mayflyv1 "github.com/mayfly-security/mayfly/broker/api/mayfly/v1"
	"github.com/mayfly-security/mayfly/broker/audit"
	"github.com/mayfly-security/mayfly/broker/lease"
)

// unheard is a refusal that the engine has not heard of: it was made here, or
// by a read. call records it; those that the engine made, it recorded.
type unheard struct{ error }

func (u unheard) Unwrap() error { return u.error }

func own[T any](v T, err error) (T, error) {
	if err != nil {
		err = unheard{err}
	}
	return v, err
}

// call runs a handler's body and gives its error the form that callers see.
// act is what was asked for, as the evidence names it.
func call[Res any](ctx context.Context, s *Server, act string, body func(caller broker.Caller) (*Res, error)) (*connect.Response[Res], error) {
	v := visitOf(ctx)
	var res *Res
	caller, err := v.current()
	if err == nil {
		res, err = body(caller)
	}
	if err != nil {
		if u := (unheard{}); errors.As(err, &u) {
			s.engine.Refused(ctx, v.caller, act, "", u.error)
		}
		return nil, s.answerTo(ctx, v, err)
	}
	return connect.NewResponse(res), nil
}

// answerTo turns an error into what the caller sees: for people, with the
// header that says which token would help.
func (s *Server) answerTo(ctx context.Context, v *visit, err error) error {
	e := rpcError(ctx, s.log, v.caller.Correlation, err)
	if v.door.people {
		if c := challenge(err); c != "" {
			e.Meta().Set("WWW-Authenticate", c)
		}
	}
	return e
}

// checkPage refuses a page that cannot be meant: a token that is no listing's
// would otherwise pass for one that stands at the end, and show nothing. A
// token is a key's end, and so ends with an ID of what is listed.
func checkPage[ID ~string](size int32, token string, parse func(string) (ID, error)) error {
	if size < 0 {
		return unheard{broker.Refusef(broker.ReasonInvalidArgument, "leave it out, or give a number from 1 to 1000", "page_size is %d", size)}
	}
	last := token[strings.LastIndexByte(token, '|')+1:]
	_, err := parse(last)
	if token != "" && (err != nil && last != "" || len(token) > 512 || broker.Clean(token) != token) {
		return unheard{broker.Refuse(broker.ReasonInvalidArgument, "the page token is malformed", "send the token of the page before, unchanged")}
	}
	return nil
}

// maybe reads an ID that may be left out.
func maybe[ID ~string](s string, parse func(string) (ID, error)) (ID, error) {
	if s == "" {
		return "", nil
	}
	return own(parse(s))
}

// accessService is mayfly.v1.AccessService.
type accessService struct{ s *Server }

func (a accessService) WhoAmI(ctx context.Context, _ *connect.Request[mayflyv1.WhoAmIRequest]) (*connect.Response[mayflyv1.WhoAmIResponse], error) {
	return call(ctx, a.s, "who_am_i", func(caller broker.Caller) (*mayflyv1.WhoAmIResponse, error) {
		c := a.s.engine.Catalog()
		m := &mayflyv1.WhoAmIResponse{
			Id: caller.Principal().String(), SvidExpiresAt: stamp(caller.ValidUntil),
			BrokerId: a.s.identity.ID().String(), InstallationId: string(a.s.engine.InstallationID()),
			CatalogDigest: c.Digest(), PolicyDigest: c.Policies().Digest(),
		}
		if p := caller.Person; p != nil {
			subject := c.Subject(caller)
			m.Groups, m.AuthTime, m.Acr, m.SignInMethod = subject.Groups, stamp(p.AuthTime), p.ACR, string(p.Method)
			if subject.Operator {
				m.Roles = []string{"operator"}
			}
			return m, nil
		}
		agent, _ := c.Agent(caller.ID)
		m.Roles, m.Owner, m.Environment, m.Labels = c.Roles(caller.ID), agent.Owner, agent.Environment, agent.Labels
		return m, nil
	})
}

func (a accessService) ListTools(ctx context.Context, _ *connect.Request[mayflyv1.ListToolsRequest]) (*connect.Response[mayflyv1.ListToolsResponse], error) {
	return call(ctx, a.s, "list_tools", func(caller broker.Caller) (*mayflyv1.ListToolsResponse, error) {
		views, err := a.s.engine.Tools(ctx, caller)
		res := &mayflyv1.ListToolsResponse{}
		for _, v := range views {
			res.Tools = append(res.Tools, toolMessage(v))
		}
		return res, err
	})
}

func (a accessService) IssueLease(ctx context.Context, req *connect.Request[mayflyv1.IssueLeaseRequest]) (*connect.Response[mayflyv1.IssueLeaseResponse], error) {
	return call(ctx, a.s, "issue", func(caller broker.Caller) (*mayflyv1.IssueLeaseResponse, error) {
		m := req.Msg
		ttl, err := span("ttl", broker.ReasonTTL, m.GetTtl())
		if err != nil {
			return nil, err
		}
		d, err := a.s.engine.Issue(ctx, caller, lease.IssueRequest{
			Tool: m.GetTool(), Params: m.GetParameters(), TTL: ttl, Reason: m.GetReason(), Key: m.GetIdempotencyKey(),
		})
		if err != nil {
			return nil, err
		}
		visitOf(ctx).carry(d.Done)
		return &mayflyv1.IssueLeaseResponse{
			Lease: a.s.leaseMessage(ctx, d.Lease), Secret: d.Secret.RevealAll(), Env: d.Env,
		}, nil
	})
}

func (a accessService) GetLease(ctx context.Context, req *connect.Request[mayflyv1.GetLeaseRequest]) (*connect.Response[mayflyv1.Lease], error) {
	return call(ctx, a.s, "get_lease", func(caller broker.Caller) (*mayflyv1.Lease, error) {
		id, err := own(broker.ParseLeaseID(req.Msg.GetId()))
		if err != nil {
			return nil, err
		}
		sight, err := own(a.s.engine.SightOf(ctx, caller))
		if err != nil {
			return nil, err
		}
		l, err := own(a.s.engine.Lease(ctx, id, sight))
		if err != nil {
			return nil, err
		}
		return a.s.leaseMessage(ctx, l), nil
	})
}

func (a accessService) ListLeases(ctx context.Context, req *connect.Request[mayflyv1.ListLeasesRequest]) (*connect.Response[mayflyv1.ListLeasesResponse], error) {
	return call(ctx, a.s, "list_leases", func(caller broker.Caller) (*mayflyv1.ListLeasesResponse, error) {
		m := req.Msg
		if err := checkPage(m.GetPageSize(), m.GetPageToken(), broker.ParseLeaseID); err != nil {
			return nil, err
		}
		f := lease.LeaseFilter{Tool: m.GetTool(), All: m.GetAll(), Overdue: m.GetOverdue()}
		var err error
		if f.Grant, err = maybe(m.GetGrantId(), broker.ParseGrantID); err != nil {
			return nil, err
		}
		if f.Incident, err = maybe(m.GetIncidentId(), broker.ParseIncidentID); err != nil {
			return nil, err
		}
		if f.Agent, err = spiffeID("agent", m.GetAgent()); err != nil {
			return nil, err
		}
		sight, err := own(a.s.engine.SightOf(ctx, caller))
		if err != nil {
			return nil, err
		}
		p, err := a.s.engine.LeasesIn(ctx, sight, f, m.GetPageToken(), int(m.GetPageSize()))
		if err != nil {
			return nil, err
		}
		return &mayflyv1.ListLeasesResponse{NextPageToken: p.Next, Leases: a.s.leaseMessages(ctx, p.Items...)}, nil
	})
}

func (a accessService) RevokeLease(ctx context.Context, req *connect.Request[mayflyv1.RevokeLeaseRequest]) (*connect.Response[mayflyv1.Lease], error) {
	return call(ctx, a.s, "revoke_lease", func(caller broker.Caller) (*mayflyv1.Lease, error) {
		id, err := own(broker.ParseLeaseID(req.Msg.GetId()))
		if err != nil {
			return nil, err
		}
		l, err := a.s.engine.RevokeLease(ctx, caller, id, req.Msg.GetReason())
		if err != nil {
			return nil, err
		}
		return a.s.leaseMessage(ctx, l), nil
	})
}

// grantService is mayfly.v1.GrantService.
type grantService struct{ s *Server }

func (g grantService) CreateGrant(ctx context.Context, req *connect.Request[mayflyv1.CreateGrantRequest]) (*connect.Response[mayflyv1.Grant], error) {
	return call(ctx, g.s, "create_grant", func(caller broker.Caller) (*mayflyv1.Grant, error) {
		m := req.Msg
		r := lease.GrantRequest{Tool: m.GetTool(), Params: m.GetParameters(), MaxUses: int(m.GetMaxUses()),
			Reason: m.GetReason(), Key: m.GetIdempotencyKey()}
		var err error
		if r.Agent, err = requiredID("agent", m.GetAgent()); err != nil {
			return nil, err
		}
		if r.NotBefore, err = instant("not_before", m.GetNotBefore()); err != nil {
			return nil, err
		}
		if r.NotAfter, err = instant("not_after", m.GetNotAfter()); err != nil {
			return nil, err
		}
		d, err := span("duration", broker.ReasonInvalidArgument, m.GetDuration())
		if err != nil {
			return nil, err
		}
		if (d == nil) == r.NotAfter.IsZero() {
			return nil, unheard{broker.Refuse(broker.ReasonInvalidArgument, "a grant needs an end: exactly one of not_after and duration", "give one of them")}
		}
		if d != nil {
			r.For = *d
		}
		grant, err := g.s.engine.CreateGrant(ctx, caller, r)
		if err != nil {
			return nil, err
		}
		return grantMessage(lease.GrantView{Grant: grant}), nil
	})
}

func (g grantService) WithdrawGrant(ctx context.Context, req *connect.Request[mayflyv1.WithdrawGrantRequest]) (*connect.Response[mayflyv1.WithdrawGrantResponse], error) {
	return call(ctx, g.s, "withdraw_grant", func(caller broker.Caller) (*mayflyv1.WithdrawGrantResponse, error) {
		id, err := own(broker.ParseGrantID(req.Msg.GetId()))
		if err != nil {
			return nil, err
		}
		grant, ended, err := g.s.engine.WithdrawGrant(ctx, caller, id, req.Msg.GetReason())
		if err != nil {
			return nil, err
		}
		return &mayflyv1.WithdrawGrantResponse{Grant: grantMessage(lease.GrantView{Grant: grant}),
			LeasesEnded: int32(ended.Dead), LeasesRevoking: int32(ended.Revoking), LeasesLapsed: int32(ended.Lapsed)}, nil
	})
}

func (g grantService) ListGrants(ctx context.Context, req *connect.Request[mayflyv1.ListGrantsRequest]) (*connect.Response[mayflyv1.ListGrantsResponse], error) {
	return call(ctx, g.s, "list_grants", func(caller broker.Caller) (*mayflyv1.ListGrantsResponse, error) {
		m := req.Msg
		if err := checkPage(m.GetPageSize(), m.GetPageToken(), broker.ParseGrantID); err != nil {
			return nil, err
		}
		f := lease.GrantFilter{Tool: m.GetTool(), All: m.GetAll()}
		var err error
		if f.Incident, err = maybe(m.GetIncidentId(), broker.ParseIncidentID); err != nil {
			return nil, err
		}
		if f.Agent, err = spiffeID("agent", m.GetAgent()); err != nil {
			return nil, err
		}
		sight, err := own(g.s.engine.SightOf(ctx, caller))
		if err != nil {
			return nil, err
		}
		p, err := g.s.engine.GrantsIn(ctx, sight, f, m.GetPageToken(), int(m.GetPageSize()))
		if err != nil {
			return nil, err
		}
		res := &mayflyv1.ListGrantsResponse{NextPageToken: p.Next}
		for _, v := range p.Items {
			res.Grants = append(res.Grants, grantMessage(v))
		}
		return res, nil
	})
}

// incidentService is mayfly.v1.IncidentService.
type incidentService struct{ s *Server }

func (i incidentService) OpenIncident(ctx context.Context, req *connect.Request[mayflyv1.OpenIncidentRequest]) (*connect.Response[mayflyv1.Incident], error) {
	return call(ctx, i.s, "open_incident", func(caller broker.Caller) (*mayflyv1.Incident, error) {
		m := req.Msg
		r := lease.IncidentRequest{Title: m.GetTitle(), Reference: m.GetReference(), Tools: m.GetTools(), Key: m.GetIdempotencyKey()}
		for _, a := range m.GetAgents() {
			id, err := requiredID("agents", a)
			if err != nil {
				return nil, err
			}
			r.Agents = append(r.Agents, id)
		}
		var err error
		if r.Duration, err = span("duration", broker.ReasonInvalidArgument, m.GetDuration()); err != nil {
			return nil, err
		}
		in, err := i.s.engine.OpenIncident(ctx, caller, r)
		if err != nil {
			return nil, err
		}
		v, err := i.s.engine.Incident(ctx, caller, in.ID)
		return incidentMessage(v), err
	})
}

func (i incidentService) CloseIncident(ctx context.Context, req *connect.Request[mayflyv1.CloseIncidentRequest]) (*connect.Response[mayflyv1.CloseIncidentResponse], error) {
	return call(ctx, i.s, "close_incident", func(caller broker.Caller) (*mayflyv1.CloseIncidentResponse, error) {
		id, err := own(broker.ParseIncidentID(req.Msg.GetId()))
		if err != nil {
			return nil, err
		}
		_, ended, err := i.s.engine.CloseIncident(ctx, caller, id, req.Msg.GetReason())
		if err != nil {
			return nil, err
		}
		v, err := i.s.engine.Incident(context.WithoutCancel(ctx), caller, id)
		if err != nil {
			return nil, err
		}
		return &mayflyv1.CloseIncidentResponse{Incident: incidentMessage(v),
			LeasesEnded: int32(ended.Dead), LeasesRevoking: int32(ended.Revoking), LeasesLapsed: int32(ended.Lapsed)}, nil
	})
}

func (i incidentService) GetIncident(ctx context.Context, req *connect.Request[mayflyv1.GetIncidentRequest]) (*connect.Response[mayflyv1.Incident], error) {
	return call(ctx, i.s, "get_incident", func(caller broker.Caller) (*mayflyv1.Incident, error) {
		id, err := own(broker.ParseIncidentID(req.Msg.GetId()))
		if err != nil {
			return nil, err
		}
		v, err := own(i.s.engine.Incident(ctx, caller, id))
		if err != nil {
			return nil, err
		}
		return incidentMessage(v), nil
	})
}

func (i incidentService) ListIncidents(ctx context.Context, req *connect.Request[mayflyv1.ListIncidentsRequest]) (*connect.Response[mayflyv1.ListIncidentsResponse], error) {
	return call(ctx, i.s, "list_incidents", func(caller broker.Caller) (*mayflyv1.ListIncidentsResponse, error) {
		m := req.Msg
		if err := checkPage(m.GetPageSize(), m.GetPageToken(), broker.ParseIncidentID); err != nil {
			return nil, err
		}
		p, err := i.s.engine.Incidents(ctx, caller, m.GetAll(), m.GetPageToken(), int(m.GetPageSize()))
		if err != nil {
			return nil, err
		}
		res := &mayflyv1.ListIncidentsResponse{NextPageToken: p.Next}
		for _, v := range p.Items {
			res.Incidents = append(res.Incidents, incidentMessage(v))
		}
		return res, nil
	})
}

// auditService is mayfly.v1.AuditService.
type auditService struct{ s *Server }

func (a auditService) ListEvents(ctx context.Context, req *connect.Request[mayflyv1.ListEventsRequest]) (*connect.Response[mayflyv1.ListEventsResponse], error) {
	return call(ctx, a.s, "list_events", func(caller broker.Caller) (*mayflyv1.ListEventsResponse, error) {
		m := req.Msg
		if err := checkPage(m.GetPageSize(), "", broker.ParseLeaseID); err != nil {
			return nil, err
		}
		f := lease.EventFilter{Agent: m.GetAgent(), Tool: m.GetTool(), Type: audit.Type(m.GetType())}
		var err error
		if f.Lease, err = maybe(m.GetLeaseId(), broker.ParseLeaseID); err != nil {
			return nil, err
		}
		if f.Grant, err = maybe(m.GetGrantId(), broker.ParseGrantID); err != nil {
			return nil, err
		}
		if f.Incident, err = maybe(m.GetIncidentId(), broker.ParseIncidentID); err != nil {
			return nil, err
		}
		if f.Request, err = maybe(m.GetRequestId(), broker.ParseRequestID); err != nil {
			return nil, err
		}
		events, looked, err := a.s.engine.Events(ctx, caller, f, m.GetAfter(), int(m.GetPageSize()), m.GetLatest())
		if err != nil {
			return nil, err
		}
		res := &mayflyv1.ListEventsResponse{NextAfter: looked}
		for _, e := range events {
			res.Events = append(res.Events, eventMessage(e))
		}
		return res, nil
	})
}
