package client

import (
	"context"
	"iter"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/broker"
	mayflyv1 "github.com/mayfly-security/mayfly/broker/api/mayfly/v1"
)

// Selector says whose access is ended. Exactly one field is set.
type Selector struct {
	Agent    spiffeid.ID
	Tool     string
	Provider string
	Owner    string // of agents, as the catalog has it
	Incident broker.IncidentID
	Person   string // whose votes or requests, or on whose behalf
	All      bool
}

// Radius is what a Selector matched, and what has become of it.
type Radius struct {
	Grants, Requests, Leases    int // what it matched at the beginning
	Alive                       int // of the leases: not yet known to be dead
	Overdue                     int // of these: past their end
	Lapsed                      int // over, and not known to be dead
	ByAgent, ByTool, ByProvider map[string]int
	Survives                    []string // what outlives the revocation, for people
	Done                        bool
}

// EndAccess is the kill switch: it withdraws every grant and request, and ends
// every lease, that the selector matches. It tells what there is, and again as
// leases die, until none is left. With dry it only counts, once. What was begun
// goes on at the broker, whether anybody listens or not. reason is required
// unless dry. After an error it ends.
func (c *Client) EndAccess(ctx context.Context, s Selector, dry bool, reason string) iter.Seq2[Radius, error] {
	return follow(ctx, c, streamOf[mayflyv1.EndAccessRequest, mayflyv1.EndAccessProgress, Radius]{
		open: c.operator.EndAccess, decode: (*decoder).radius,
		last: func(r Radius) bool { return r.Done || dry },
	}, &mayflyv1.EndAccessRequest{
		Agent: idText(s.Agent), Tool: s.Tool, Provider: s.Provider, Owner: s.Owner, IncidentId: string(s.Incident), Person: personName(s.Person), All: s.All,
		Reason: reason, DryRun: dry,
	})
}

func (*decoder) radius(m *mayflyv1.EndAccessProgress) Radius {
	return Radius{
		Grants: int(m.GetGrants()), Requests: int(m.GetRequests()), Leases: int(m.GetLeases()),
		Alive: int(m.GetAlive()), Overdue: int(m.GetOverdue()), Lapsed: int(m.GetLapsed()),
		ByAgent: counts(m.GetByAgent()), ByTool: counts(m.GetByTool()), ByProvider: counts(m.GetByProvider()),
		Survives: m.GetSurvives(), Done: m.GetDone(),
	}
}

func counts(m map[string]int32) map[string]int {
	if len(m) == 0 {
		return nil
	}
	out := make(map[string]int, len(m))
	for k, n := range m {
		out[k] = int(n)
	}
	return out
}
