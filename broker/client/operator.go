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

// CutOff is a role of a provider of which every older session is ended.
type CutOff struct {
	Provider, Role  string
	MadeBefore      time.Time // sessions that were made up to then are ended, by the provider's clock
	ClearAt         time.Time // until then the broker makes no session of the role
	Until           time.Time // from then on whatever was made before is dead by itself
	Leases, Alive   int       // the broker's own open leases that it hit; of them, not known to be dead
	ByAgent, ByTool map[string]int
	Others          string          // what else it ends, for people
	Progress        broker.Progress // at the provider
	Failing         bool            // the provider did not take it when it was last asked
	DecidedBy       string          // empty in a dry run, as is what follows
	Reason          string
	DecidedAt       time.Time
}

// CutOff ends every session of a role of a provider, whoever has it, and waits
// a moment for it; it goes on at the broker, whether anybody waits or not. With
// dry it only says what it would hit. Only operators may. The reason is required
// unless dry. Doing it again also ends what was made meanwhile.
func (c *Client) CutOff(ctx context.Context, provider, role, reason string, dry bool) (CutOff, error) {
	m, err := call(ctx, c, c.operator.CutOff, &mayflyv1.CutOffRequest{Provider: provider, Role: role, Reason: reason, DryRun: dry})
	if err != nil {
		return CutOff{}, err
	}
	d := decoder{}
	return d.cutOff(m), d.err
}

// CutOffs lists the roles that are cut off. Only operators may. After an error
// it ends.
func (c *Client) CutOffs(ctx context.Context) iter.Seq2[CutOff, error] {
	return pages(func(token string) ([]*mayflyv1.RoleCutOff, string, error) {
		res, err := call(ctx, c, c.operator.ListCutOffs, &mayflyv1.ListCutOffsRequest{PageSize: pageSize, PageToken: token})
		return res.GetCutOffs(), res.GetNextPageToken(), err
	}, (*decoder).cutOff)
}

func (*decoder) cutOff(m *mayflyv1.RoleCutOff) CutOff {
	return CutOff{
		Provider: m.GetProvider(), Role: m.GetRole(), MadeBefore: instant(m.GetMadeBefore()), ClearAt: instant(m.GetClearAt()), Until: instant(m.GetUntil()),
		Leases: int(m.GetLeases()), Alive: int(m.GetAlive()), ByAgent: counts(m.GetByAgent()), ByTool: counts(m.GetByTool()), Others: m.GetOthers(),
		Progress: broker.Progress(m.GetProgress()), Failing: m.GetFailing(), DecidedBy: m.GetDecidedBy(), Reason: m.GetReason(), DecidedAt: instant(m.GetDecidedAt()),
	}
}
