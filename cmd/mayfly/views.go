package main

import (
	"fmt"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/client"
)

// The views are what --output json prints. Their fields have the names and
// meanings of the API's JSON (broker/api/mayfly/v1/mayfly.proto; a test holds
// the names to it). One thing differs from it: 64-bit numbers are numbers, and no
// strings. Unset fields are left out.

type identityView struct {
	ID             string            `json:"id"`
	Roles          []string          `json:"roles"`
	Owner          string            `json:"owner,omitempty"`
	Environment    string            `json:"environment,omitempty"`
	Labels         map[string]string `json:"labels,omitempty"`
	SVIDExpiresAt  time.Time         `json:"svidExpiresAt,omitzero"`
	BrokerID       string            `json:"brokerId"`
	InstallationID string            `json:"installationId"`
	CatalogDigest  string            `json:"catalogDigest"`
	PolicyDigest   string            `json:"policyDigest,omitempty"`
	Groups         []string          `json:"groups,omitempty"`
	AuthTime       time.Time         `json:"authTime,omitzero"`
	ACR            string            `json:"acr,omitempty"`
	SignInMethod   string            `json:"signInMethod,omitempty"`
}

type toolView struct {
	Name         string            `json:"name"`
	Description  string            `json:"description,omitempty"`
	Provider     string            `json:"provider"`
	MaxTTL       string            `json:"maxTtl"` // seconds, as "900s"
	Parameters   []parameterView   `json:"parameters,omitempty"`
	Env          map[string]string `json:"env,omitempty"`
	Survives     string            `json:"survives,omitempty"`
	IsStatic     bool              `json:"isStatic,omitempty"`
	GrantedUntil time.Time         `json:"grantedUntil,omitzero"`
	Refusal      string            `json:"refusal,omitempty"`
	Labels       map[string]string `json:"labels,omitempty"`
	Sensitivity  string            `json:"sensitivity,omitempty"`
	Approval     string            `json:"approval,omitempty"`
	BreakGlass   string            `json:"breakGlass,omitempty"`
	Requestable  bool              `json:"requestable"`
}

type parameterView struct {
	Name        string   `json:"name"`
	Type        string   `json:"type"`
	Pattern     string   `json:"pattern,omitempty"`
	OneOf       []string `json:"oneOf,omitempty"`
	Min         *int64   `json:"min,omitempty"`
	Max         *int64   `json:"max,omitempty"`
	Optional    bool     `json:"optional"`
	Description string   `json:"description,omitempty"`
}

type leaseView struct {
	ID            string            `json:"id"`
	Agent         string            `json:"agent"`
	Tool          string            `json:"tool"`
	Provider      string            `json:"provider"`
	Parameters    map[string]string `json:"parameters,omitempty"`
	GrantID       string            `json:"grantId"`
	IncidentID    string            `json:"incidentId,omitempty"`
	Reason        string            `json:"reason,omitempty"`
	CorrelationID string            `json:"correlationId"`
	State         string            `json:"state"`
	Progress      string            `json:"progress,omitempty"`
	Cause         string            `json:"cause,omitempty"`
	Overdue       bool              `json:"overdue"`
	CreatedAt     time.Time         `json:"createdAt"`
	End           time.Time         `json:"end"`
	DiesAt        time.Time         `json:"diesAt,omitzero"`
	EndedAt       time.Time         `json:"endedAt,omitzero"`
	Survives      string            `json:"survives,omitempty"`
	IsStatic      bool              `json:"isStatic,omitempty"`
	Left          string            `json:"left,omitempty"`
	OnBehalfOf    string            `json:"onBehalfOf,omitempty"`
}

type strayView struct {
	Provider string    `json:"provider"`
	Name     string    `json:"name"`
	Kind     string    `json:"kind,omitempty"`
	LeaseID  string    `json:"leaseId,omitempty"`
	DiesAt   time.Time `json:"diesAt,omitzero"`
	FoundAt  time.Time `json:"foundAt"`
	Why      string    `json:"why"`
	EndedBy  string    `json:"endedBy,omitempty"`
	Reason   string    `json:"reason,omitempty"`
}

type strayEndView struct {
	Stray   strayView `json:"stray"`
	Removed bool      `json:"removed"`
}

type cutOffView struct {
	Provider   string         `json:"provider"`
	Role       string         `json:"role"`
	MadeBefore time.Time      `json:"madeBefore"`
	ClearAt    time.Time      `json:"clearAt"`
	Until      time.Time      `json:"until"`
	Leases     int            `json:"leases"`
	Alive      int            `json:"alive"`
	ByAgent    map[string]int `json:"byAgent,omitempty"`
	ByTool     map[string]int `json:"byTool,omitempty"`
	Others     string         `json:"others"`
	Progress   string         `json:"progress"`
	Failing    bool           `json:"failing,omitempty"`
	DecidedBy  string         `json:"decidedBy,omitempty"`
	Reason     string         `json:"reason,omitempty"`
	DecidedAt  time.Time      `json:"decidedAt,omitzero"`
}

type credentialView struct {
	Lease  leaseView         `json:"lease"`
	Secret map[string]string `json:"secret"`
	Env    map[string]string `json:"env,omitempty"`
}

type grantView struct {
	ID         string            `json:"id"`
	Agent      string            `json:"agent"`
	Tool       string            `json:"tool"`
	Parameters map[string]string `json:"parameters,omitempty"`
	NotBefore  time.Time         `json:"notBefore"`
	NotAfter   time.Time         `json:"notAfter"`
	MaxUses    int               `json:"maxUses,omitempty"`
	Uses       int               `json:"uses,omitempty"`
	IncidentID string            `json:"incidentId,omitempty"`
	Reason     string            `json:"reason,omitempty"`
	CreatedBy  string            `json:"createdBy"`
	CreatedAt  time.Time         `json:"createdAt"`
	State      string            `json:"state"`
	Suspended  bool              `json:"suspended"`
	EndedAt    time.Time         `json:"endedAt,omitzero"`
	EndedBy    string            `json:"endedBy,omitempty"`

	RequestID    string   `json:"requestId,omitempty"`
	OnBehalfOf   string   `json:"onBehalfOf,omitempty"`
	Rule         string   `json:"rule,omitempty"`
	Voters       []string `json:"voters,omitempty"`
	BreakGlass   bool     `json:"breakGlass,omitempty"`
	PolicyDigest string   `json:"policyDigest,omitempty"`
}

type withdrawalView struct {
	Grant          grantView `json:"grant"`
	LeasesEnded    int       `json:"leasesEnded"`
	LeasesRevoking int       `json:"leasesRevoking"`
	LeasesLapsed   int       `json:"leasesLapsed,omitempty"`
}

type incidentView struct {
	ID         string      `json:"id"`
	Title      string      `json:"title"`
	Reference  string      `json:"reference,omitempty"`
	OpenedBy   string      `json:"openedBy"`
	OpenedAt   time.Time   `json:"openedAt"`
	EndsAt     time.Time   `json:"endsAt"`
	Grants     []grantView `json:"grants"`
	State      string      `json:"state"`
	ClosedBy   string      `json:"closedBy,omitempty"`
	ClosedAt   time.Time   `json:"closedAt,omitzero"`
	LeasesOpen int         `json:"leasesOpen"`
}

type closingView struct {
	Incident       incidentView `json:"incident"`
	LeasesEnded    int          `json:"leasesEnded"`
	LeasesRevoking int          `json:"leasesRevoking"`
	LeasesLapsed   int          `json:"leasesLapsed,omitempty"`
}

type eventView struct {
	Sequence      uint64            `json:"sequence"`
	Time          time.Time         `json:"time"`
	Type          string            `json:"type"`
	Actor         string            `json:"actor,omitempty"`
	Agent         string            `json:"agent,omitempty"`
	Tool          string            `json:"tool,omitempty"`
	Provider      string            `json:"provider,omitempty"`
	LeaseID       string            `json:"leaseId,omitempty"`
	GrantID       string            `json:"grantId,omitempty"`
	IncidentID    string            `json:"incidentId,omitempty"`
	Reason        string            `json:"reason,omitempty"`
	Cause         string            `json:"cause,omitempty"`
	CorrelationID string            `json:"correlationId,omitempty"`
	Details       map[string]string `json:"details,omitempty"`
	RequestID     string            `json:"requestId,omitempty"`
	OnBehalfOf    string            `json:"onBehalfOf,omitempty"`
}

func viewIdentity(w client.Identity) identityView {
	until := w.SVIDExpiresAt
	if until.IsZero() {
		until = w.SessionUntil
	}
	return identityView{
		ID: w.Principal.String(), Roles: w.Roles, Owner: w.Owner, Environment: w.Environment, Labels: w.Labels,
		SVIDExpiresAt: until, BrokerID: w.Broker.String(),
		InstallationID: string(w.Installation), CatalogDigest: w.CatalogDigest, PolicyDigest: w.PolicyDigest,
		Groups: w.Groups, AuthTime: w.AuthTime, ACR: w.ACR, SignInMethod: string(w.Method),
	}
}

func viewTool(t client.Tool) toolView {
	v := toolView{
		Name: t.Name, Description: t.Description, Provider: t.Provider, MaxTTL: secondsText(t.MaxTTL),
		Env: t.Env, Survives: t.Survives, IsStatic: t.Static, GrantedUntil: t.GrantedUntil, Refusal: string(t.Refusal),
		Labels: t.Labels, Sensitivity: t.Sensitivity, Approval: t.ApprovalRule, BreakGlass: t.BreakGlassRule, Requestable: t.Requestable,
	}
	for _, p := range t.Params {
		v.Parameters = append(v.Parameters, viewParameter(p))
	}
	return v
}

func viewParameter(p broker.Param) parameterView {
	v := parameterView{
		Name: p.Name, Type: string(p.Type), OneOf: p.OneOf, Min: p.Min, Max: p.Max,
		Optional: p.Optional, Description: p.Description,
	}
	if p.Pattern != nil {
		v.Pattern = p.Pattern.String()
	}
	return v
}

func viewLease(l client.Lease) leaseView {
	return leaseView{
		ID: string(l.ID), Agent: l.Agent.String(), Tool: l.Tool, Provider: l.Provider, Parameters: l.Params,
		GrantID: string(l.Grant), IncidentID: string(l.Incident), Reason: l.Reason, CorrelationID: string(l.Correlation),
		State: string(l.State), Progress: string(l.Progress), Cause: string(l.Cause), Overdue: l.PastEnd,
		CreatedAt: l.CreatedAt, End: l.End, DiesAt: l.DiesAt, EndedAt: l.EndedAt, Survives: l.Survives,
		IsStatic: l.Static, Left: l.Left, OnBehalfOf: l.OnBehalfOf.String(),
	}
}

func viewStray(s client.Stray) strayView {
	return strayView{
		Provider: s.Provider, Name: s.Name, Kind: s.Kind, LeaseID: string(s.Lease), DiesAt: s.DiesAt, FoundAt: s.FoundAt,
		Why: s.Why, EndedBy: s.EndedBy, Reason: s.Reason,
	}
}

func viewCutOff(c client.CutOff) cutOffView {
	return cutOffView{
		Provider: c.Provider, Role: c.Role, MadeBefore: c.MadeBefore, ClearAt: c.ClearAt, Until: c.Until, Leases: c.Leases, Alive: c.Alive,
		ByAgent: c.ByAgent, ByTool: c.ByTool, Others: c.Others, Progress: string(c.Progress), Failing: c.Failing,
		DecidedBy: c.DecidedBy, Reason: c.Reason, DecidedAt: c.DecidedAt,
	}
}

func viewGrant(g client.Grant) grantView {
	v := grantView{
		ID: string(g.ID), Agent: g.Agent.String(), Tool: g.Tool, Parameters: g.Params,
		NotBefore: g.NotBefore, NotAfter: g.NotAfter, MaxUses: g.MaxUses, Uses: g.Uses,
		IncidentID: string(g.Incident), Reason: g.Reason, CreatedBy: g.CreatedBy.String(), CreatedAt: g.CreatedAt,
		State: string(g.State), Suspended: g.Suspended, EndedAt: g.EndedAt, EndedBy: g.EndedBy,
		RequestID: string(g.Request), OnBehalfOf: userText(g.OnBehalfOf), Rule: g.Rule, BreakGlass: g.BreakGlass, PolicyDigest: g.PolicyDigest,
	}
	for _, w := range g.Voters {
		v.Voters = append(v.Voters, broker.PersonPrincipal(w.Name).String())
	}
	return v
}

func viewIncident(in client.Incident) incidentView {
	v := incidentView{
		ID: string(in.ID), Title: in.Title, Reference: in.Reference, OpenedBy: in.OpenedBy.String(),
		OpenedAt: in.OpenedAt, EndsAt: in.EndsAt, Grants: []grantView{}, State: string(in.State),
		ClosedBy: in.ClosedBy, ClosedAt: in.ClosedAt, LeasesOpen: in.LeasesOpen,
	}
	for _, g := range in.Window {
		v.Grants = append(v.Grants, viewGrant(g))
	}
	return v
}

func viewEvent(e client.Event) eventView {
	return eventView{
		Sequence: e.Sequence, Time: e.Time, Type: e.Type, Actor: e.Actor, Agent: e.Agent, Tool: e.Tool, Provider: e.Provider,
		LeaseID: string(e.Lease), GrantID: string(e.Grant), IncidentID: string(e.Incident), Reason: e.Reason, Cause: e.Cause,
		CorrelationID: string(e.Correlation), Details: e.Details, RequestID: string(e.Request), OnBehalfOf: e.OnBehalfOf.String(),
	}
}

// secondsText is a span as the API's JSON has it: "900s". The zero span is empty.
func secondsText(d time.Duration) string {
	if d == 0 {
		return ""
	}
	return fmt.Sprintf("%gs", d.Seconds())
}
