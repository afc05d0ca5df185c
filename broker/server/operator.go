package server

import (
	"context"
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

func strayMessage(s lease.Stray) *mayflyv1.Stray {
	return &mayflyv1.Stray{
		Provider: s.Provider, Name: s.Name, Kind: s.Kind, LeaseId: string(s.Lease),
		DiesAt: stamp(s.DiesAt), FoundAt: stamp(s.FoundAt), Why: s.Why, EndedBy: s.EndedBy, Reason: s.Reason,
	}
}
