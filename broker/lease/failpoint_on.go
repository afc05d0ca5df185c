//go:build failpoints

package lease

import (
	"context"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/failpoint"
	"github.com/mayfly-security/mayfly/providers"
)

// mutant is outside with the intent taken out, as brokers do it that mint first
// and record afterwards: what the torture test must notice. It exists only in a
// build with the tag "failpoints", and there only if MAYFLY_MUTATE says so.
func (m *minter) mutant(ctx context.Context, now, deadline time.Time) (d *Delivery, is bool, err error) {
	if !failpoint.Mutated("no-intent") {
		return nil, false, nil
	}
	detached := context.WithoutCancel(ctx)
	attempt, cancel := context.WithDeadline(detached, deadline)
	defer cancel()
	minted, err := m.mint(attempt, m.request(), func(providers.Handle) error { return nil })
	if err != nil {
		return nil, true, m.providerRefusal(err)
	}
	m.settle(minted)
	if err := m.intend(detached, now); err != nil {
		return nil, true, err
	}
	done := m.e.deliveries.begin(m.l.Grant)
	refusal, err := m.activate(detached, minted.Handle)
	switch {
	case err != nil:
		done()
		m.e.endLater(m.l.ID, minted.Handle, broker.CauseUndelivered, false)
		return nil, true, err
	case refusal != nil:
		done()
		m.e.wake(m.l.Provider)
		return nil, true, refusal
	}
	return m.deliver(minted.Secret, done), true, nil
}
