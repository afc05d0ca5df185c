package server

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"strings"

	"connectrpc.com/connect"

	"github.com/mayfly-security/mayfly/broker"
	mayflyv1 "github.com/mayfly-security/mayfly/broker/api/mayfly/v1"
	"github.com/mayfly-security/mayfly/broker/lease"
)

// operatorService is mayfly.v1.OperatorService. The engine refuses everybody
// but operators.
type operatorService struct{ s *Server }

func (o operatorService) ForgetLease(ctx context.Context, req *connect.Request[mayflyv1.ForgetLeaseRequest]) (*connect.Response[mayflyv1.Lease], error) {
	return call(ctx, o.s, "forget_lease", func(caller broker.Caller) (*mayflyv1.Lease, error) {
		id, err := own(broker.ParseLeaseID(req.Msg.GetId()))
		if err != nil {
			return nil, err
		}
		l, err := o.s.engine.ForgetLease(ctx, caller, id, req.Msg.GetReason())
		if err != nil {
			return nil, err
		}
		return o.s.leaseMessage(ctx, l), nil
	})
}

func (o operatorService) ListStrays(ctx context.Context, req *connect.Request[mayflyv1.ListStraysRequest]) (*connect.Response[mayflyv1.ListStraysResponse], error) {
	return call(ctx, o.s, "list_strays", func(caller broker.Caller) (*mayflyv1.ListStraysResponse, error) {
		if err := checkStrayPage(req.Msg); err != nil {
			return nil, err
		}
		p, err := o.s.engine.Strays(ctx, caller, req.Msg.GetPageToken(), int(req.Msg.GetPageSize()))
		if err != nil {
			return nil, err
		}
		res := &mayflyv1.ListStraysResponse{NextPageToken: p.Next}
		for _, s := range p.Items {
			res.Strays = append(res.Strays, strayMessage(s))
		}
		return res, nil
	})
}

// checkStrayPage is checkPage for a listing whose tokens are a provider and a
// name of another system's.
func checkStrayPage(m *mayflyv1.ListStraysRequest) error {
	token := m.GetPageToken()
	if token != "" && (!strings.Contains(token, "|") || len(token) > 512 || broker.Clean(token) != token) {
		return unheard{broker.Refuse(broker.ReasonInvalidArgument, "the page token is malformed", "send the token of the page before, unchanged")}
	}
	return checkPage(m.GetPageSize(), "", broker.ParseLeaseID)
}

func (o operatorService) EndStray(ctx context.Context, req *connect.Request[mayflyv1.EndStrayRequest]) (*connect.Response[mayflyv1.EndStrayResponse], error) {
	return call(ctx, o.s, "end_stray", func(caller broker.Caller) (*mayflyv1.EndStrayResponse, error) {
		m := req.Msg
		s, removed, err := o.s.engine.EndStray(ctx, caller, m.GetProvider(), m.GetName(), m.GetReason())
		if err != nil {
			return nil, err
		}
		return &mayflyv1.EndStrayResponse{Stray: strayMessage(s), Removed: removed}, nil
	})
}

func (o operatorService) CutOff(ctx context.Context, req *connect.Request[mayflyv1.CutOffRequest]) (*connect.Response[mayflyv1.RoleCutOff], error) {
	return call(ctx, o.s, "cut_off", func(caller broker.Caller) (*mayflyv1.RoleCutOff, error) {
		m := req.Msg
		c, err := o.s.engine.CutOff(ctx, caller, lease.CutOffRequest{Provider: m.GetProvider(), Role: m.GetRole(), Reason: m.GetReason(), Dry: m.GetDryRun()})
		if err != nil {
			return nil, err
		}
		return cutOffMessage(c), nil
	})
}

func (o operatorService) ListCutOffs(ctx context.Context, req *connect.Request[mayflyv1.ListCutOffsRequest]) (*connect.Response[mayflyv1.ListCutOffsResponse], error) {
	return call(ctx, o.s, "list_cut_offs", func(caller broker.Caller) (*mayflyv1.ListCutOffsResponse, error) {
		m := req.Msg
		if err := checkPage(m.GetPageSize(), m.GetPageToken(), parseCutOffToken); err != nil {
			return nil, err
		}
		p, err := o.s.engine.CutOffs(ctx, caller, m.GetPageToken(), int(m.GetPageSize()))
		if err != nil {
			return nil, err
		}
		res := &mayflyv1.ListCutOffsResponse{NextPageToken: p.Next}
		for _, c := range p.Items {
			res.CutOffs = append(res.CutOffs, cutOffMessage(c))
		}
		return res, nil
	})
}

// parseCutOffToken checks the token of a page: a digest in hexadecimal.
func parseCutOffToken(s string) (string, error) {
	if b, err := hex.DecodeString(s); err != nil || len(b) != sha256.Size {
		return "", errors.New("no digest")
	}
	return s, nil
}

func cutOffMessage(c lease.CutOff) *mayflyv1.RoleCutOff {
	return &mayflyv1.RoleCutOff{
		Provider: c.Provider, Role: c.Cut.Role, MadeBefore: stamp(c.Cut.Before), ClearAt: stamp(c.Cut.Clear), Until: stamp(c.Cut.Until),
		Leases: int32(c.Leases), Alive: int32(c.Alive), ByAgent: counts(c.ByAgent), ByTool: counts(c.ByTool), Others: c.Cut.Others,
		Progress: string(c.Progress), Failing: c.Failing, DecidedBy: c.Actor, Reason: c.Reason, DecidedAt: stamp(c.At),
	}
}

func strayMessage(s lease.Stray) *mayflyv1.Stray {
	return &mayflyv1.Stray{
		Provider: s.Provider, Name: s.Name, Kind: s.Kind, LeaseId: string(s.Lease),
		DiesAt: stamp(s.DiesAt), FoundAt: stamp(s.FoundAt), Why: s.Why, EndedBy: s.EndedBy, Reason: s.Reason,
	}
}
