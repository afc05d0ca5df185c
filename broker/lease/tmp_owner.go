package lease

import (
	"context"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/policy"
)

func (e *Engine) Owner(ctx context.Context, caller broker.Caller) (spiffeid.ID, error) {
	if e.Catalog().Operator(caller.ID) {
		return spiffeid.ID{}, nil
	}
	if caller.ID.IsZero() {
		return spiffeid.ID{}, broker.Refuse(broker.ReasonPermissionDenied, "a person", "x")
	}
	return caller.ID, nil
}

func (e *Engine) Administer(ctx context.Context, caller broker.Caller, verb policy.Verb) error {
	return broker.Refuse(broker.ReasonPermissionDenied, "a person", "x")
}
