package client

import (
	"context"
	"iter"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/mayfly-security/mayfly/broker"
	mayflyv1 "github.com/mayfly-security/mayfly/broker/api/mayfly/v1"
)

// Grant is a grant as the broker tells it. ToolDigest and RuleDigest are not
// told and stay empty; of voters and of the user, only the names are.
type Grant struct {
	broker.Grant
	Suspended bool // the tool is not what it was when the grant was made
}

// GrantRequest asks for a grant to be made.
type GrantRequest struct {
	Agent     spiffeid.ID
	Tool      string
	Params    map[string]string // values that are fixed
	NotBefore time.Time         // zero means now
	NotAfter  time.Time         // either this or For
	For       time.Duration     // counted from NotBefore
	MaxUses   int               // zero means any number
	Reason    string            // required
	Key       string            // the idempotency key; empty means a fresh one
}

// Ended says what became of the leases under what was ended.
type Ended struct {
	Dead     int // confirmed dead since the call
	Revoking int // still being revoked
	Lapsed   int // over, and not known to be dead
}

// CreateGrant gives one agent the right to one tool for a time.
func (c *Client) CreateGrant(ctx context.Context, r GrantRequest) (Grant, error) {
	m := &mayflyv1.CreateGrantRequest{
		Agent: idText(r.Agent), Tool: r.Tool, Parameters: r.Params, MaxUses: int32(min(max(r.MaxUses, -1), 1<<30)),
		Reason: r.Reason, IdempotencyKey: orFresh(r.Key),
		NotBefore: stamp(r.NotBefore), NotAfter: stamp(r.NotAfter),
	}
	if r.For != 0 {
		m.Duration = durationpb.New(r.For)
	}
	res, err := call(ctx, c, c.grants.CreateGrant, m)
	if err != nil {
		return Grant{}, err
	}
	d := decoder{}
	return d.grant(res), d.err
}

// WithdrawGrant ends a grant and every lease under it. reason may be empty.
func (c *Client) WithdrawGrant(ctx context.Context, id broker.GrantID, reason string) (Grant, Ended, error) {
	res, err := call(ctx, c, c.grants.WithdrawGrant, &mayflyv1.WithdrawGrantRequest{Id: string(id), Reason: reason})
	if err != nil {
		return Grant{}, Ended{}, err
	}
	d := decoder{}
	return d.grant(res.GetGrant()), Ended{int(res.GetLeasesEnded()), int(res.GetLeasesRevoking()), int(res.GetLeasesLapsed())}, d.err
}

// GrantFilter says which grants to list. Zero fields match everything.
type GrantFilter struct {
	Agent    spiffeid.ID
	Tool     string
	Incident broker.IncidentID
	All      bool // also those that have ended
}

// Grants lists grants: our own, or, for an operator, everybody's. After an
// error it ends.
func (c *Client) Grants(ctx context.Context, f GrantFilter) iter.Seq2[Grant, error] {
	return pages(func(token string) ([]*mayflyv1.Grant, string, error) {
		res, err := call(ctx, c, c.grants.ListGrants, &mayflyv1.ListGrantsRequest{
			All: f.All, Agent: idText(f.Agent), Tool: f.Tool, IncidentId: string(f.Incident), PageSize: pageSize, PageToken: token,
		})
		return res.GetGrants(), res.GetNextPageToken(), err
	}, (*decoder).grant)
}

func stamp(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}
