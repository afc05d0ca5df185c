package client

import (
	"context"
	"iter"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	mayflyv1 "github.com/mayfly-security/mayfly/broker/api/mayfly/v1"
)

// Stray is something at a provider that bears the installation's name and that
// no lease answers for.
type Stray struct {
	Provider string
	Name     string         // as the system behind the provider has it
	Kind     string         // for people
	Lease    broker.LeaseID // that its name tells of; empty if it tells of none
	DiesAt   time.Time      // when it dies by itself; zero if it does not, or that is not known
	FoundAt  time.Time
	Why      string // "lease_unknown" (an operator decides), "lease_ended" or "expired" (it is being removed)
	EndedBy  string // the operator who decided that it is to be ended; empty while nobody has
	Reason   string // the operator's
}

// Forget gives up waiting for the death of an overdue lease: it has lapsed
// then, and is never said to be dead. Only operators may. The reason is
// required. Forgetting what was forgotten changes nothing.
func (c *Client) Forget(ctx context.Context, id broker.LeaseID, reason string) (Lease, error) {
	m, err := call(ctx, c, c.operator.ForgetLease, &mayflyv1.ForgetLeaseRequest{Id: string(id), Reason: reason})
	if err != nil {
		return Lease{}, err
	}
	d := decoder{}
	return d.lease(m), d.err
}

// Strays lists the strays that the broker knows of, by provider and name. Only
// operators may. After an error it ends.
func (c *Client) Strays(ctx context.Context) iter.Seq2[Stray, error] {
	return pages(func(token string) ([]*mayflyv1.Stray, string, error) {
		res, err := call(ctx, c, c.operator.ListStrays, &mayflyv1.ListStraysRequest{PageSize: pageSize, PageToken: token})
		return res.GetStrays(), res.GetNextPageToken(), err
	}, (*decoder).stray)
}

// EndStray has a stray ended and removed at its provider, and waits a moment
// for it; removed says whether it is gone. If not, the broker tries again until
// it is. Only operators may. The reason is required. One that is gone already
// is not found.
func (c *Client) EndStray(ctx context.Context, provider, name, reason string) (s Stray, removed bool, err error) {
	res, err := call(ctx, c, c.operator.EndStray, &mayflyv1.EndStrayRequest{Provider: provider, Name: name, Reason: reason})
	if err != nil {
		return Stray{}, false, err
	}
	d := decoder{}
	return d.stray(res.GetStray()), res.GetRemoved(), d.err
}

func (*decoder) stray(m *mayflyv1.Stray) Stray {
	return Stray{
		Provider: m.GetProvider(), Name: m.GetName(), Kind: m.GetKind(), Lease: broker.LeaseID(m.GetLeaseId()),
		DiesAt: instant(m.GetDiesAt()), FoundAt: instant(m.GetFoundAt()), Why: m.GetWhy(), EndedBy: m.GetEndedBy(), Reason: m.GetReason(),
	}
}
