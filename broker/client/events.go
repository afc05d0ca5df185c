package client

import (
	"context"
	"iter"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	mayflyv1 "github.com/mayfly-security/mayfly/broker/api/mayfly/v1"
)

// Event is one piece of evidence. Empty fields do not apply.
type Event struct {
	Sequence    uint64
	Time        time.Time
	Type        string // "noun.verb"
	Actor       string // a SPIFFE ID, or "broker"
	Agent       string
	Tool        string
	Provider    string
	Lease       broker.LeaseID
	Grant       broker.GrantID
	Incident    broker.IncidentID
	Request     broker.RequestID
	OnBehalfOf  broker.Principal // the user for whom the agent acts
	Reason      string           // why, in the actor's words
	Cause       string           // why, as a stable word: a broker.Reason or broker.Cause
	Correlation broker.CorrelationID
	Details     map[string]string
}

// EventFilter says which events to list. Zero fields match everything.
type EventFilter struct {
	After    uint64 // only events after this sequence number
	Latest   int    // only the last so many that match, at most 1,000; zero means all after After
	Agent    string
	Tool     string
	Lease    broker.LeaseID
	Grant    broker.GrantID
	Incident broker.IncidentID
	Request  broker.RequestID
	Type     string
}

// Events lists the evidence in the order in which it was committed. After an
// error it ends.
func (c *Client) Events(ctx context.Context, f EventFilter) iter.Seq2[Event, error] {
	return func(yield func(Event, error) bool) {
		req := &mayflyv1.ListEventsRequest{
			After: f.After, Agent: f.Agent, Tool: f.Tool, LeaseId: string(f.Lease), GrantId: string(f.Grant),
			IncidentId: string(f.Incident), RequestId: string(f.Request), Type: f.Type, PageSize: pageSize, Latest: f.Latest > 0,
		}
		if f.Latest > 0 {
			req.PageSize = int32(min(f.Latest, pageSize))
		}
		for {
			res, err := call(ctx, c, c.audit.ListEvents, req)
			if err != nil {
				yield(Event{}, err)
				return
			}
			for _, m := range res.GetEvents() {
				if !yield(event(m), nil) {
					return
				}
			}
			// What is behind the last event is an end; so is an answer that
			// does not come further.
			if f.Latest > 0 || res.GetNextAfter() <= req.After {
				return
			}
			req.After = res.GetNextAfter()
		}
	}
}

func event(m *mayflyv1.Event) Event {
	return Event{
		Sequence: m.GetSequence(), Time: instant(m.GetTime()), Type: m.GetType(), Actor: m.GetActor(),
		Agent: m.GetAgent(), Tool: m.GetTool(), Provider: m.GetProvider(),
		Lease: broker.LeaseID(m.GetLeaseId()), Grant: broker.GrantID(m.GetGrantId()), Incident: broker.IncidentID(m.GetIncidentId()),
		Request: broker.RequestID(m.GetRequestId()), OnBehalfOf: broker.Principal(m.GetOnBehalfOf()),
		Reason: m.GetReason(), Cause: m.GetCause(), Correlation: broker.CorrelationID(m.GetCorrelationId()), Details: m.GetDetails(),
	}
}
