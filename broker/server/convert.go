package server

import (
	"context"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/broker"
	mayflyv1 "github.com/mayfly-security/mayfly/broker/api/mayfly/v1"
	"github.com/mayfly-security/mayfly/broker/audit"
	"github.com/mayfly-security/mayfly/broker/lease"
)

// stamp turns an instant into the API's form; the zero instant is unset.
func stamp(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

// instant is the reverse of stamp.
func instant(field string, t *timestamppb.Timestamp) (time.Time, error) {
	if t == nil {
		return time.Time{}, nil
	}
	if err := t.CheckValid(); err != nil {
		return time.Time{}, unheard{broker.Refusef(broker.ReasonInvalidArgument, "send an RFC 3339 time", "%s is no time", field)}
	}
	return t.AsTime(), nil
}

// span reads a duration that may be unset.
func span(field string, reason broker.Reason, d *durationpb.Duration) (*time.Duration, error) {
	if d == nil {
		return nil, nil
	}
	if err := d.CheckValid(); err != nil {
		return nil, unheard{broker.Refusef(reason, `send seconds with an "s", such as "300s"`, "%s is no duration", field)}
	}
	v := d.AsDuration()
	return &v, nil
}

// spiffeID reads a SPIFFE ID; empty gives the zero ID.
func spiffeID(field, s string) (spiffeid.ID, error) {
	if s == "" {
		return spiffeid.ID{}, nil
	}
	id, err := spiffeid.FromString(s)
	if err != nil {
		return id, unheard{broker.Refusef(broker.ReasonInvalidArgument, "give it as spiffe://<trust domain>/<path>",
			"%s %q is no SPIFFE ID", field, broker.Clean(broker.Shorten(s, 100)))}
	}
	return id, nil
}

// requiredID reads a SPIFFE ID that must be there.
func requiredID(field, s string) (spiffeid.ID, error) {
	if s == "" {
		return spiffeid.ID{}, unheard{broker.Refusef(broker.ReasonInvalidArgument, "give it as spiffe://<trust domain>/<path>",
			"%s is missing, or one of them is empty", field)}
	}
	return spiffeID(field, s)
}

// leaseMessages are leases as the API has them. On whose behalf they are is left
// out where it cannot be read: a credential that was made is not held back for it.
func (s *Server) leaseMessages(ctx context.Context, leases ...broker.Lease) (messages []*mayflyv1.Lease) {
	users, err := s.engine.UsersOf(context.WithoutCancel(ctx), leases...)
	if err != nil {
		s.log.ErrorContext(ctx, "reading on whose behalf leases are", "error", err)
	}
	now := s.engine.Now()
	for _, l := range leases {
		messages = append(messages, leaseMessage(l, users[l.Grant], now))
	}
	return messages
}

func (s *Server) leaseMessage(ctx context.Context, l broker.Lease) *mayflyv1.Lease {
	return s.leaseMessages(ctx, l)[0]
}

func leaseMessage(l broker.Lease, user broker.Principal, now time.Time) *mayflyv1.Lease {
	return &mayflyv1.Lease{
		Id: string(l.ID), Agent: l.Agent.String(), Tool: l.Tool, Provider: l.Provider,
		Parameters: l.Params, GrantId: string(l.Grant), IncidentId: string(l.Incident),
		Reason: l.Reason, CorrelationId: string(l.Correlation),
		State: string(l.State), Progress: string(l.Progress), Cause: string(l.Cause), Overdue: l.Overdue(now),
		CreatedAt: stamp(l.CreatedAt), End: stamp(l.End), DiesAt: stamp(l.DiesAt), EndedAt: stamp(l.EndedAt),
		Survives: l.Survives, IsStatic: l.Static, Left: l.Left, OnBehalfOf: user.String(),
	}
}

func grantMessage(g lease.GrantView) *mayflyv1.Grant {
	return &mayflyv1.Grant{
		Id: string(g.ID), Agent: g.Agent.String(), Tool: g.Tool, Parameters: g.Params,
		NotBefore: stamp(g.NotBefore), NotAfter: stamp(g.NotAfter),
		MaxUses: int32(g.MaxUses), Uses: int32(g.Uses),
		IncidentId: string(g.Incident), Reason: g.Reason,
		CreatedBy: g.CreatedBy.String(), CreatedAt: stamp(g.CreatedAt),
		State: string(g.State), Suspended: g.Suspended,
		EndedAt: stamp(g.EndedAt), EndedBy: g.EndedBy,
		RequestId: string(g.Request), OnBehalfOf: userName(g.OnBehalfOf), Rule: g.Rule, Voters: voters(g.Voters),
		BreakGlass: g.BreakGlass, PolicyDigest: g.PolicyDigest,
	}
}

// voters are the principals of those whose votes made a grant.
func voters(vs []broker.Voter) (names []string) {
	for _, v := range vs {
		names = append(names, broker.PersonPrincipal(v.Name).String())
	}
	return names
}

func incidentMessage(v lease.IncidentView) *mayflyv1.Incident {
	m := &mayflyv1.Incident{
		Id: string(v.ID), Title: v.Title, Reference: v.Reference,
		OpenedBy: v.OpenedBy.String(), OpenedAt: stamp(v.OpenedAt), EndsAt: stamp(v.EndsAt),
		State: string(v.State), ClosedBy: v.ClosedBy, ClosedAt: stamp(v.ClosedAt),
		LeasesOpen: int32(v.Open),
	}
	for _, g := range v.Grants {
		m.Grants = append(m.Grants, grantMessage(g))
	}
	return m
}

func toolMessage(v lease.ToolView) *mayflyv1.Tool {
	m := &mayflyv1.Tool{
		Name: v.Name, Description: v.Description, Provider: v.Provider,
		MaxTtl: durationpb.New(v.MaxTTL), Env: v.Env,
		Survives: v.Survives, IsStatic: v.Static, Refusal: string(v.Refusal),
		Labels: v.Labels, Sensitivity: string(v.Sensitivity), Approval: ruleName(v.Approval), BreakGlass: ruleName(v.BreakGlass), Requestable: v.Requestable,
	}
	if v.Granted != nil {
		m.GrantedUntil = stamp(v.Granted.NotAfter)
	}
	for _, p := range v.Params {
		pm := &mayflyv1.Parameter{
			Name: p.Name, Type: string(p.Type), OneOf: p.OneOf, Min: p.Min, Max: p.Max,
			Optional: p.Optional, Description: p.Description, Pattern: p.PatternText(),
		}
		m.Parameters = append(m.Parameters, pm)
	}
	return m
}

func ruleName(r *broker.ApprovalRule) string {
	if r == nil {
		return ""
	}
	return r.Name
}

func eventMessage(e audit.Event) *mayflyv1.Event {
	return &mayflyv1.Event{
		Sequence: e.Sequence, Time: stamp(e.Time), Type: string(e.Type), Actor: e.Actor,
		Agent: e.Agent, Tool: e.Tool, Provider: e.Provider,
		LeaseId: string(e.Lease), GrantId: string(e.Grant), IncidentId: string(e.Incident),
		Reason: e.Reason, Cause: e.Cause, CorrelationId: string(e.Correlation), Details: e.Details,
		RequestId: string(e.Request), OnBehalfOf: e.OnBehalfOf.String(),
	}
}
