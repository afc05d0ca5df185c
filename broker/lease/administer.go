package lease

import (
	"context"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/policy"
)

// Administer refuses a caller who may not do what verb says: for what is
// administered beside the engine, such as people's sessions. It records
// nothing.
func (e *Engine) Administer(ctx context.Context, caller broker.Caller, verb policy.Verb) error {
	_, err := e.administer(ctx, e.current.Load(), caller, verb)
	return err
}
