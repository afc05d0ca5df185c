package client

import (
	"errors"
	"fmt"
	"iter"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/mayfly-security/mayfly/broker"
	mayflyv1 "github.com/mayfly-security/mayfly/broker/api/mayfly/v1"
)

// pageSize is how many items a listing asks for at once: the most that there is.
const pageSize = 1000

// pages walks a listing page by page. It ends after an error, and refuses to
// go round in circles.
func pages[M, T any](page func(token string) ([]*M, string, error), decode func(*decoder, *M) T) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		var zero T
		token := ""
		for {
			items, next, err := page(token)
			if err != nil {
				yield(zero, err)
				return
			}
			for _, m := range items {
				d := decoder{}
				item := decode(&d, m)
				if d.err != nil {
					yield(zero, d.err)
					return
				}
				if !yield(item, nil) {
					return
				}
			}
			switch next {
			case "":
				return
			case token:
				yield(zero, errors.New("reading a listing: the broker gave the same page token again"))
				return
			}
			token = next
		}
	}
}

// decoder turns messages into values and keeps the first error.
type decoder struct{ err error }

// id reads a SPIFFE ID; empty gives the zero ID.
func (d *decoder) id(field, s string) spiffeid.ID {
	if s == "" {
		return spiffeid.ID{}
	}
	id, err := spiffeid.FromString(s)
	if err != nil && d.err == nil {
		d.err = fmt.Errorf("reading the broker's answer: %s %q: %w", field, clean(broker.Shorten(s, 100)), err)
	}
	return id
}

func idText(id spiffeid.ID) string {
	if id.IsZero() {
		return ""
	}
	return id.String()
}

// instant reads a time; unset gives the zero time.
func instant(t *timestamppb.Timestamp) time.Time {
	if t == nil {
		return time.Time{}
	}
	return t.AsTime()
}

func (d *decoder) lease(m *mayflyv1.Lease) Lease {
	return Lease{
		Lease: broker.Lease{
			ID: broker.LeaseID(m.GetId()), Agent: d.id("agent", m.GetAgent()), Tool: m.GetTool(), Provider: m.GetProvider(),
			Params: m.GetParameters(), Grant: broker.GrantID(m.GetGrantId()), Incident: broker.IncidentID(m.GetIncidentId()),
			Reason: m.GetReason(), Correlation: broker.CorrelationID(m.GetCorrelationId()),
			State: broker.LeaseState(m.GetState()), Progress: broker.Progress(m.GetProgress()), Cause: broker.Cause(m.GetCause()),
			CreatedAt: instant(m.GetCreatedAt()), End: instant(m.GetEnd()), DiesAt: instant(m.GetDiesAt()), EndedAt: instant(m.GetEndedAt()),
			Survives: m.GetSurvives(), Static: m.GetIsStatic(), Left: m.GetLeft(),
		},
		PastEnd: m.GetOverdue(), OnBehalfOf: broker.Principal(m.GetOnBehalfOf()),
	}
}

func (d *decoder) grant(m *mayflyv1.Grant) Grant {
	g := Grant{
		Grant: broker.Grant{
			ID: broker.GrantID(m.GetId()), Agent: d.id("agent", m.GetAgent()), Tool: m.GetTool(), Params: m.GetParameters(),
			NotBefore: instant(m.GetNotBefore()), NotAfter: instant(m.GetNotAfter()),
			MaxUses: int(m.GetMaxUses()), Uses: int(m.GetUses()), Incident: broker.IncidentID(m.GetIncidentId()),
			Reason: m.GetReason(), CreatedBy: broker.Principal(m.GetCreatedBy()), CreatedAt: instant(m.GetCreatedAt()),
			State: broker.GrantState(m.GetState()), EndedAt: instant(m.GetEndedAt()), EndedBy: m.GetEndedBy(),
			Request: broker.RequestID(m.GetRequestId()), OnBehalfOf: userOf(m.GetOnBehalfOf()), Rule: m.GetRule(), BreakGlass: m.GetBreakGlass(),
			PolicyDigest: m.GetPolicyDigest(),
		},
		Suspended: m.GetSuspended(),
	}
	for _, v := range m.GetVoters() {
		g.Voters = append(g.Voters, broker.Voter{Name: personName(v)})
	}
	return g
}

func (d *decoder) incident(m *mayflyv1.Incident) Incident {
	in := Incident{
		Incident: broker.Incident{
			ID: broker.IncidentID(m.GetId()), Title: m.GetTitle(), Reference: m.GetReference(),
			OpenedBy: broker.Principal(m.GetOpenedBy()), OpenedAt: instant(m.GetOpenedAt()), EndsAt: instant(m.GetEndsAt()),
			State: broker.IncidentState(m.GetState()), ClosedBy: m.GetClosedBy(), ClosedAt: instant(m.GetClosedAt()),
		},
		LeasesOpen: int(m.GetLeasesOpen()),
	}
	for _, g := range m.GetGrants() {
		in.Grants = append(in.Grants, broker.GrantID(g.GetId()))
		in.Window = append(in.Window, d.grant(g))
	}
	return in
}
