package clienttest

import (
	"context"
	"slices"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/mayfly-security/mayfly/broker"
	mayflyv1 "github.com/mayfly-security/mayfly/broker/api/mayfly/v1"
	"github.com/mayfly-security/mayfly/broker/api/mayfly/v1/mayflyv1connect"
)

type grants struct {
	*Broker
	mayflyv1connect.UnimplementedGrantServiceHandler
}

func (g grants) CreateGrant(_ context.Context, r *connect.Request[mayflyv1.CreateGrantRequest]) (*connect.Response[mayflyv1.Grant], error) {
	g.Lock()
	defer g.Unlock()
	m := r.Msg
	now := g.now()
	from := now
	if m.GetNotBefore() != nil {
		from = m.GetNotBefore().AsTime()
	}
	made := &mayflyv1.Grant{
		Id: string(broker.NewGrantID(now)), Agent: m.GetAgent(), Tool: m.GetTool(), Parameters: m.GetParameters(),
		NotBefore: timestamppb.New(from), NotAfter: timestamppb.New(from.Add(m.GetDuration().AsDuration())), MaxUses: m.GetMaxUses(),
		Reason: m.GetReason(), CreatedBy: "spiffe://acme.test/operator/sam", CreatedAt: timestamppb.New(now), State: string(broker.GrantOpen),
	}
	g.Grants = append(g.Grants, made)
	return connect.NewResponse(made), nil
}

func (g grants) WithdrawGrant(_ context.Context, r *connect.Request[mayflyv1.WithdrawGrantRequest]) (*connect.Response[mayflyv1.WithdrawGrantResponse], error) {
	g.Lock()
	defer g.Unlock()
	for _, one := range g.Grants {
		if one.GetId() == r.Msg.GetId() {
			one.State, one.EndedAt, one.EndedBy = string(broker.GrantWithdrawn), timestamppb.New(g.now()), "spiffe://acme.test/operator/sam"
			return connect.NewResponse(&mayflyv1.WithdrawGrantResponse{Grant: one, LeasesEnded: 2, LeasesRevoking: 1}), nil
		}
	}
	return nil, notFound("grant")
}

func (g grants) ListGrants(_ context.Context, r *connect.Request[mayflyv1.ListGrantsRequest]) (*connect.Response[mayflyv1.ListGrantsResponse], error) {
	g.Lock()
	defer g.Unlock()
	m := r.Msg
	var all []*mayflyv1.Grant
	for _, one := range g.Grants {
		if (m.GetAll() || one.GetState() == string(broker.GrantOpen)) && (m.GetTool() == "" || m.GetTool() == one.GetTool()) {
			all = append(all, one)
		}
	}
	items, next, err := page(g.Broker, all, m.GetPageSize(), m.GetPageToken())
	return connect.NewResponse(&mayflyv1.ListGrantsResponse{Grants: items, NextPageToken: next}), err
}

type incidents struct {
	*Broker
	mayflyv1connect.UnimplementedIncidentServiceHandler
}

func (i incidents) OpenIncident(_ context.Context, r *connect.Request[mayflyv1.OpenIncidentRequest]) (*connect.Response[mayflyv1.Incident], error) {
	i.Lock()
	defer i.Unlock()
	m, now, length := r.Msg, i.now(), time.Hour
	if m.GetDuration() != nil {
		length = m.GetDuration().AsDuration()
	}
	in := &mayflyv1.Incident{
		Id: string(broker.NewIncidentID(now)), Title: m.GetTitle(), Reference: m.GetReference(), OpenedBy: "spiffe://acme.test/bot/pager",
		OpenedAt: timestamppb.New(now), EndsAt: timestamppb.New(now.Add(length)), State: string(broker.IncidentOpen),
	}
	for _, a := range m.GetAgents() {
		for _, t := range m.GetTools() {
			in.Grants = append(in.Grants, &mayflyv1.Grant{
				Id: string(broker.NewGrantID(now)), Agent: a, Tool: t, NotBefore: in.OpenedAt, NotAfter: in.EndsAt, IncidentId: in.Id,
				Reason: in.Title, CreatedBy: in.OpenedBy, CreatedAt: in.OpenedAt, State: string(broker.GrantOpen),
			})
		}
	}
	i.Incidents = append(i.Incidents, in)
	return connect.NewResponse(in), nil
}

func (i incidents) find(id string) *mayflyv1.Incident {
	at := slices.IndexFunc(i.Incidents, func(in *mayflyv1.Incident) bool { return in.GetId() == id })
	if at < 0 {
		return nil
	}
	return i.Incidents[at]
}

func (i incidents) CloseIncident(_ context.Context, r *connect.Request[mayflyv1.CloseIncidentRequest]) (*connect.Response[mayflyv1.CloseIncidentResponse], error) {
	i.Lock()
	defer i.Unlock()
	in := i.find(r.Msg.GetId())
	if in == nil {
		return nil, notFound("incident")
	}
	in.State, in.ClosedBy, in.ClosedAt = string(broker.IncidentClosed), in.OpenedBy, timestamppb.New(i.now())
	return connect.NewResponse(&mayflyv1.CloseIncidentResponse{Incident: in, LeasesEnded: 1}), nil
}

func (i incidents) GetIncident(_ context.Context, r *connect.Request[mayflyv1.GetIncidentRequest]) (*connect.Response[mayflyv1.Incident], error) {
	i.Lock()
	defer i.Unlock()
	if in := i.find(r.Msg.GetId()); in != nil {
		return connect.NewResponse(in), nil
	}
	return nil, notFound("incident")
}

func (i incidents) ListIncidents(_ context.Context, r *connect.Request[mayflyv1.ListIncidentsRequest]) (*connect.Response[mayflyv1.ListIncidentsResponse], error) {
	i.Lock()
	defer i.Unlock()
	var all []*mayflyv1.Incident
	for _, in := range i.Incidents {
		if r.Msg.GetAll() || in.GetState() == string(broker.IncidentOpen) {
			all = append(all, in)
		}
	}
	items, next, err := page(i.Broker, all, r.Msg.GetPageSize(), r.Msg.GetPageToken())
	return connect.NewResponse(&mayflyv1.ListIncidentsResponse{Incidents: items, NextPageToken: next}), err
}

type audit struct {
	*Broker
	mayflyv1connect.UnimplementedAuditServiceHandler
}

func (a audit) ListEvents(_ context.Context, r *connect.Request[mayflyv1.ListEventsRequest]) (*connect.Response[mayflyv1.ListEventsResponse], error) {
	a.Lock()
	defer a.Unlock()
	m := r.Msg
	size := int(m.GetPageSize())
	if size == 0 || a.PageSize > 0 && a.PageSize < size {
		size = max(a.PageSize, 1)
	}
	res := &mayflyv1.ListEventsResponse{NextAfter: m.GetAfter()}
	looked := 0
	for _, e := range a.Events {
		if e.GetSequence() <= m.GetAfter() {
			continue
		}
		if !m.GetLatest() && looked == size {
			break
		}
		looked++
		res.NextAfter = e.GetSequence()
		if m.GetType() == "" || m.GetType() == e.GetType() {
			res.Events = append(res.Events, e)
		}
	}
	if m.GetLatest() && len(res.Events) > size {
		res.Events = res.Events[len(res.Events)-size:]
	}
	return connect.NewResponse(res), nil
}

type operator struct {
	*Broker
	mayflyv1connect.UnimplementedOperatorServiceHandler
}

func (o operator) ForgetLease(_ context.Context, r *connect.Request[mayflyv1.ForgetLeaseRequest]) (*connect.Response[mayflyv1.Lease], error) {
	o.Lock()
	defer o.Unlock()
	l := access{Broker: o.Broker}.find(r.Msg.GetId())
	switch {
	case l == nil:
		return nil, notFound("lease")
	case l.GetState() != string(broker.LeaseRevoking):
		return nil, Refusal(connect.CodeFailedPrecondition, broker.ReasonConflict, "only what is being revoked in vain can be forgotten", "revoke it first")
	}
	l.State, l.Cause, l.Overdue, l.EndedAt = string(broker.LeaseLapsed), string(broker.CauseForgotten), false, timestamppb.New(o.now())
	return connect.NewResponse(l), nil
}

func (o operator) ListStrays(_ context.Context, r *connect.Request[mayflyv1.ListStraysRequest]) (*connect.Response[mayflyv1.ListStraysResponse], error) {
	o.Lock()
	defer o.Unlock()
	items, next, err := page(o.Broker, o.Strays, r.Msg.GetPageSize(), r.Msg.GetPageToken())
	return connect.NewResponse(&mayflyv1.ListStraysResponse{Strays: items, NextPageToken: next}), err
}

func (o operator) EndStray(_ context.Context, r *connect.Request[mayflyv1.EndStrayRequest]) (*connect.Response[mayflyv1.EndStrayResponse], error) {
	o.Lock()
	defer o.Unlock()
	for n, s := range o.Strays {
		if s.GetProvider() == r.Msg.GetProvider() && s.GetName() == r.Msg.GetName() {
			s.EndedBy, s.Reason = "spiffe://acme.test/operator/sam", r.Msg.GetReason()
			removed := s.GetKind() != "stubborn"
			if removed {
				o.Strays = slices.Delete(slices.Clone(o.Strays), n, n+1)
			}
			return connect.NewResponse(&mayflyv1.EndStrayResponse{Stray: s, Removed: removed}), nil
		}
	}
	return nil, notFound("stray")
}

// CutOff answers with the cut-off of the role. It is not decided before that.
func (o operator) CutOff(_ context.Context, r *connect.Request[mayflyv1.CutOffRequest]) (*connect.Response[mayflyv1.RoleCutOff], error) {
	o.Lock()
	defer o.Unlock()
	o.keep("CutOff", r.Msg)
	for _, c := range o.CutOffs {
		if c.GetProvider() != r.Msg.GetProvider() || c.GetRole() != r.Msg.GetRole() {
			continue
		}
		c = proto.CloneOf(c)
		if r.Msg.GetDryRun() {
			c.Progress, c.Failing, c.DecidedBy, c.Reason, c.DecidedAt = "", false, "", "", nil
		}
		return connect.NewResponse(c), nil
	}
	return nil, notFound("role")
}

// ListCutOffs lists them, and takes each that is not failing one step further.
func (o operator) ListCutOffs(_ context.Context, r *connect.Request[mayflyv1.ListCutOffsRequest]) (*connect.Response[mayflyv1.ListCutOffsResponse], error) {
	o.Lock()
	defer o.Unlock()
	for _, c := range o.CutOffs {
		switch {
		case c.GetFailing():
		case c.GetProgress() == "":
			c.Progress = string(broker.ProgressWritten)
		case c.GetProgress() == string(broker.ProgressWritten):
			c.Progress, c.Alive = string(broker.ProgressVerified), 0
		}
	}
	items, next, err := page(o.Broker, o.CutOffs, r.Msg.GetPageSize(), r.Msg.GetPageToken())
	return connect.NewResponse(&mayflyv1.ListCutOffsResponse{CutOffs: items, NextPageToken: next}), err
}
