package main

import (
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/client"
)

// The views of requests, of policies and of the kill switch; see views.go.

type requestView struct {
	ID              string            `json:"id"`
	Agent           string            `json:"agent"`
	Tool            string            `json:"tool"`
	Parameters      map[string]string `json:"parameters,omitempty"`
	Duration        string            `json:"duration,omitempty"` // seconds, as "900s"
	MaxUses         int               `json:"maxUses,omitempty"`
	Reason          string            `json:"reason"`
	Ticket          string            `json:"ticket,omitempty"`
	IncidentID      string            `json:"incidentId,omitempty"`
	OnBehalfOf      string            `json:"onBehalfOf,omitempty"`
	CreatedBy       string            `json:"createdBy"`
	CreatedAt       time.Time         `json:"createdAt"`
	ExpiresAt       time.Time         `json:"expiresAt,omitzero"`
	State           string            `json:"state"`
	Rule            string            `json:"rule,omitempty"`
	BreakGlass      bool              `json:"breakGlass,omitempty"`
	Digest          string            `json:"digest"`
	Approvals       []approvalView    `json:"approvals,omitempty"`
	Missing         []string          `json:"missing,omitempty"`
	GrantID         string            `json:"grantId,omitempty"`
	DecidedAt       time.Time         `json:"decidedAt,omitzero"`
	DecidedBy       string            `json:"decidedBy,omitempty"`
	Why             string            `json:"why,omitempty"`
	ToolDescription string            `json:"toolDescription,omitempty"`
	Sensitivity     string            `json:"sensitivity,omitempty"`
	AgentOwner      string            `json:"agentOwner,omitempty"`
	Survives        string            `json:"survives,omitempty"`
	Votable         bool              `json:"votable"`
}

type approvalView struct {
	Person   string    `json:"person"`
	Approved bool      `json:"approved"`
	At       time.Time `json:"at"`
	Comment  string    `json:"comment,omitempty"`
	Duration string    `json:"duration,omitempty"`
	AuthTime time.Time `json:"authTime,omitzero"`
	ACR      string    `json:"acr,omitempty"`
}

type explanationView struct {
	Possible     bool     `json:"possible"`
	Summary      string   `json:"summary"`
	Policies     []string `json:"policies,omitempty"`
	Errors       []string `json:"errors,omitempty"`
	WouldAllow   []string `json:"wouldAllow,omitempty"`
	PolicyDigest string   `json:"policyDigest"`
	Grants       []string `json:"grants,omitempty"`
}

type previewView struct {
	Problems      []string              `json:"problems,omitempty"`
	Digest        string                `json:"digest,omitempty"`
	PresentDigest string                `json:"presentDigest,omitempty"`
	Added         []string              `json:"added,omitempty"`
	Removed       []string              `json:"removed,omitempty"`
	Changed       []string              `json:"changed,omitempty"`
	Ends          []previewGrantView    `json:"ends"`
	Grants        int                   `json:"grants"`
	Turns         []previewDecisionView `json:"turns"`
	Decisions     int                   `json:"decisions"`
}

type previewGrantView struct {
	GrantID string `json:"grantId"`
	Agent   string `json:"agent"`
	Tool    string `json:"tool"`
	Leases  int    `json:"leases"`
	Why     string `json:"why"`
}

type previewDecisionView struct {
	At             time.Time `json:"at"`
	Principal      string    `json:"principal"`
	Action         string    `json:"action"`
	About          string    `json:"about"`
	WasAllowed     bool      `json:"wasAllowed"`
	WouldBeAllowed bool      `json:"wouldBeAllowed"`
	Why            string    `json:"why"`
}

type radiusView struct {
	Grants     int            `json:"grants"`
	Requests   int            `json:"requests"`
	Leases     int            `json:"leases"`
	Alive      int            `json:"alive"`
	Overdue    int            `json:"overdue"`
	Lapsed     int            `json:"lapsed"`
	ByAgent    map[string]int `json:"byAgent,omitempty"`
	ByTool     map[string]int `json:"byTool,omitempty"`
	ByProvider map[string]int `json:"byProvider,omitempty"`
	Survives   []string       `json:"survives,omitempty"`
	Done       bool           `json:"done"`
}

func viewRequest(r client.Request) requestView {
	v := requestView{
		ID: string(r.ID), Agent: r.Agent.String(), Tool: r.Tool, Parameters: r.Params, Duration: secondsText(r.Duration), MaxUses: r.MaxUses,
		Reason: r.Reason, Ticket: r.Ticket, IncidentID: string(r.Incident), OnBehalfOf: userText(r.OnBehalfOf),
		CreatedBy: r.CreatedBy.String(), CreatedAt: r.CreatedAt, ExpiresAt: r.ExpiresAt, State: string(r.State), Rule: r.Rule,
		BreakGlass: r.BreakGlass, Digest: r.Digest, Missing: r.Missing, GrantID: string(r.Grant), DecidedAt: r.DecidedAt,
		DecidedBy: r.DecidedBy.String(), Why: r.Why, ToolDescription: r.Description, Sensitivity: r.Sensitivity, AgentOwner: r.Owner, Survives: r.Survives, Votable: r.Votable,
	}
	for _, a := range r.Approvals {
		v.Approvals = append(v.Approvals, approvalView{
			Person: broker.PersonPrincipal(a.Person.Name).String(), Approved: a.Approved, At: a.At, Comment: a.Comment,
			Duration: secondsText(a.Duration), AuthTime: a.Person.AuthTime, ACR: a.Person.ACR,
		})
	}
	return v
}

func viewExplanation(e client.Explanation) explanationView {
	return explanationView{e.Possible, e.Summary, e.Policies, e.Errors, e.WouldAllow, e.PolicyDigest, e.Grants}
}

func viewPreview(w client.Preview) previewView {
	v := previewView{
		Problems: w.Problems, Digest: w.Digest, PresentDigest: w.PresentDigest, Added: w.Added, Removed: w.Removed, Changed: w.Changed,
		Ends: []previewGrantView{}, Grants: w.Grants, Turns: []previewDecisionView{}, Decisions: w.Decisions,
	}
	for _, g := range w.Ends {
		v.Ends = append(v.Ends, previewGrantView{string(g.Grant), g.Agent.String(), g.Tool, g.Leases, g.Why})
	}
	for _, d := range w.Turns {
		v.Turns = append(v.Turns, previewDecisionView{d.At, d.Principal.String(), d.Action, d.About, d.WasAllowed, d.WouldBeAllowed, d.Why})
	}
	return v
}

func viewRadius(r client.Radius) radiusView { return radiusView(r) }
