package client

import (
	"context"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/broker"
	mayflyv1 "github.com/mayfly-security/mayfly/broker/api/mayfly/v1"
)

// Question asks whether an access is possible. Fields that do not apply are zero.
type Question struct {
	Action    string           // "request", "issue", "approve", "open_incident" or "administer"
	Principal broker.Principal // empty means we
	Tool      string
	Agent     spiffeid.ID // who would get the credential, where the principal is no agent
	Params    map[string]string
	Incident  broker.IncidentID
	Groups    []string // of a person who is not we
	Verb      string   // of administer
}

// Explanation says why an access is or is not possible.
type Explanation struct {
	Possible     bool
	Summary      string   // what would happen, and why
	Policies     []string // that decided
	Errors       []string // policies that could not be evaluated; any denies
	WouldAllow   []string // nearest first
	PolicyDigest string
	Grants       []string // that are there for it, and why each does not serve
}

// Explain says whether an access is possible now, by which policies, and if
// not, what would allow it. Operators ask for everybody, all others for themselves.
func (c *Client) Explain(ctx context.Context, q Question) (Explanation, error) {
	m, err := call(ctx, c, c.policy.Explain, &mayflyv1.ExplainRequest{
		Action: q.Action, Principal: q.Principal.String(), Tool: q.Tool, Agent: idText(q.Agent), Parameters: q.Params,
		IncidentId: string(q.Incident), Groups: q.Groups, Verb: q.Verb,
	})
	if err != nil {
		return Explanation{}, err
	}
	return Explanation{
		Possible: m.GetPossible(), Summary: m.GetSummary(), Policies: m.GetPolicies(), Errors: m.GetErrors(),
		WouldAllow: m.GetWouldAllow(), PolicyDigest: m.GetPolicyDigest(), Grants: m.GetGrants(),
	}, nil
}

// PolicyFile is one file of a policy set.
type PolicyFile struct{ Name, Text string }

// Preview is what a policy set would change if it were loaded.
type Preview struct {
	Problems                []string // what is wrong with the set; then nothing else is filled
	Digest, PresentDigest   string
	Added, Removed, Changed []string          // policies, by ID
	Ends                    []PreviewGrant    // the open grants that it would end
	Grants                  int               // open grants that were looked at
	Turns                   []PreviewDecision // of the last decisions, those that it would turn
	Decisions               int               // decisions that were looked at
}

// PreviewGrant is an open grant that a new set would end.
type PreviewGrant struct {
	Grant  broker.GrantID
	Agent  spiffeid.ID
	Tool   string
	Leases int // that have not ended
	Why    string
}

// PreviewDecision is a decision that a new set would turn.
type PreviewDecision struct {
	At                         time.Time
	Principal                  broker.Principal
	Action                     string
	About                      string // the tool, or the verb of administer
	WasAllowed, WouldBeAllowed bool
	Why                        string
}

// Preview says what a set of policies would change if it were loaded. It loads nothing.
func (c *Client) Preview(ctx context.Context, files []PolicyFile) (Preview, error) {
	req := &mayflyv1.PreviewRequest{}
	for _, f := range files {
		req.Files = append(req.Files, &mayflyv1.PolicyFile{Name: f.Name, Text: f.Text})
	}
	m, err := call(ctx, c, c.policy.Preview, req)
	if err != nil {
		return Preview{}, err
	}
	v := Preview{
		Problems: m.GetProblems(), Digest: m.GetDigest(), PresentDigest: m.GetPresentDigest(),
		Added: m.GetAdded(), Removed: m.GetRemoved(), Changed: m.GetChanged(),
		Grants: int(m.GetGrants()), Decisions: int(m.GetDecisions()),
	}
	d := decoder{}
	for _, g := range m.GetEnds() {
		v.Ends = append(v.Ends, PreviewGrant{broker.GrantID(g.GetGrantId()), d.id("agent", g.GetAgent()), g.GetTool(), int(g.GetLeases()), g.GetWhy()})
	}
	for _, t := range m.GetTurns() {
		v.Turns = append(v.Turns, PreviewDecision{
			instant(t.GetAt()), broker.Principal(t.GetPrincipal()), t.GetAction(), t.GetAbout(), t.GetWasAllowed(), t.GetWouldBeAllowed(), t.GetWhy(),
		})
	}
	return v, d.err
}
