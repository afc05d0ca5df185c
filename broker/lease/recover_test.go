package lease_test

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/lease"
	"github.com/mayfly-security/mayfly/providers/providertest"
)

// onlyLease is the one lease that was ever made.
func (r *rig) onlyLease() broker.Lease {
	r.t.Helper()
	p, err := r.engine.Leases(context.Background(), lease.LeaseFilter{All: true}, "", 0)
	if err != nil || len(p.Items) != 1 {
		r.t.Fatalf("leases: %+v, %v; want one", p.Items, err)
	}
	return p.Items[0]
}

// TestI1_ARestartEndsAttempts: an attempt that was under way when the broker
// stopped is being ended as soon as it is back, and its death is not believed
// before the request that was in flight can have no effect any more.
func TestI1_ARestartEndsAttempts(t *testing.T) {
	eachOutside(t, func(t *testing.T, tool string) {
		r := newRig(t)
		g := r.grant(support, tool, time.Hour, func(g *lease.GrantRequest) { g.MaxUses = 1 })
		r.system(tool).SetScript(providertest.Rules(1, providertest.Rule{Op: providertest.OpCreate, Fault: providertest.Fault{Late: 13 * time.Second}}))
		began := time.Now()
		done := r.background(tool)
		time.Sleep(time.Second)
		r.restart()
		synctest.Wait()
		l := r.onlyLease()
		if l.State != broker.LeaseRevoking || l.Cause != broker.CauseRestarted {
			t.Errorf("after the restart the lease is %s (%s)", l.State, l.Cause)
		}
		<-done // of the broker that is gone
		l = r.wantState(l.ID, broker.LeaseRevoked, time.Minute)
		if got := l.EndedAt.Sub(began); got < 15*time.Second {
			t.Errorf("its death was believed %s after it began; the attempt and what comes late take 15s", got)
		}
		if live := r.system(tool).Live(); len(live) != 0 {
			t.Errorf("left: %+v", live)
		}
		if n := r.grantNow(g.ID).Uses; n != 0 {
			t.Errorf("%d uses; want the use to be given back", n)
		}
	})
}

// TestI1_IntentUnknown: nothing is asked of the provider when it is not known
// whether the intent is durable, and what may stand in the store is ended at once.
func TestI1_IntentUnknown(t *testing.T) {
	eachOutside(t, func(t *testing.T, tool string) {
		faulty := &faultyStore{}
		r := newRig(t, func(r *rig) { r.wrap = faulty.wrap })
		r.grant(support, tool, time.Hour)
		synctest.Wait()
		faulty.failNth(1, true)
		_, err := r.issue(tool)
		r.wantReason(err, broker.ReasonStore)
		synctest.Wait()
		if l := r.onlyLease(); l.State != broker.LeaseRevoking || l.Cause != broker.CauseMintFailed {
			t.Errorf("the lease is %s (%s)", l.State, l.Cause)
		}
		if n := len(r.system(tool).All()); n != 0 {
			t.Errorf("%d credentials were made", n)
		}
		r.wantState(r.onlyLease().ID, broker.LeaseRevoked, 30*time.Second)
	})
}
