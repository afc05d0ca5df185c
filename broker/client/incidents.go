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

// Incident is an incident as the broker tells it.
type Incident struct {
	broker.Incident
	Window     []Grant // the grants that were made with it, whole
	LeasesOpen int     // its leases that have not ended
}

// IncidentRequest asks for an incident to be opened: each of the agents gets a
// grant to each of the tools.
type IncidentRequest struct {
	Title     string
	Reference string // the incident system's name for it; may be empty
	Agents    []spiffeid.ID
	Tools     []string
	For       time.Duration // zero means the opener's maximum
	Key       string        // the idempotency key; empty means a fresh one
}

// OpenIncident opens a window.
func (c *Client) OpenIncident(ctx context.Context, r IncidentRequest) (Incident, error) {
	m := &mayflyv1.OpenIncidentRequest{Title: r.Title, Reference: r.Reference, Tools: r.Tools, IdempotencyKey: orFresh(r.Key)}
	for _, a := range r.Agents {
		m.Agents = append(m.Agents, a.String())
	}
	if r.For != 0 {
		m.Duration = durationpb.New(r.For)
	}
	res, err := call(ctx, c, c.incidents.OpenIncident, m)
	if err != nil {
		return Incident{}, err
	}
	d := decoder{}
	return d.incident(res), d.err
}

// CloseIncident closes a window. When it has returned, no lease of it is
// delivered any more, and Ended says how many are confirmed dead. reason may
// be empty. Closing what is closed tells how its leases stand.
func (c *Client) CloseIncident(ctx context.Context, id broker.IncidentID, reason string) (Incident, Ended, error) {
	res, err := call(ctx, c, c.incidents.CloseIncident, &mayflyv1.CloseIncidentRequest{Id: string(id), Reason: reason})
	if err != nil {
		return Incident{}, Ended{}, err
	}
	d := decoder{}
	return d.incident(res.GetIncident()), Ended{int(res.GetLeasesEnded()), int(res.GetLeasesRevoking()), int(res.GetLeasesLapsed())}, d.err
}

// Incident shows one incident.
func (c *Client) Incident(ctx context.Context, id broker.IncidentID) (Incident, error) {
	res, err := call(ctx, c, c.incidents.GetIncident, &mayflyv1.GetIncidentRequest{Id: string(id)})
	if err != nil {
		return Incident{}, err
	}
	d := decoder{}
	return d.incident(res), d.err
}

// Incidents lists incidents in the order of their opening: our own, or, for an
// operator, everybody's; all says whether closed ones are among them. After an
// error it ends.
func (c *Client) Incidents(ctx context.Context, all bool) iter.Seq2[Incident, error] {
	return pages(func(token string) ([]*mayflyv1.Incident, string, error) {
		res, err := call(ctx, c, c.incidents.ListIncidents, &mayflyv1.ListIncidentsRequest{All: all, PageSize: pageSize, PageToken: token})
		return res.GetIncidents(), res.GetNextPageToken(), err
	}, (*decoder).incident)
}
