package lease_test

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/audit"
	"github.com/mayfly-security/mayfly/broker/lease"
	"github.com/mayfly-security/mayfly/providers/providertest"
)

// never is a world that ends nothing.
var never = providertest.Rules(1, providertest.Rule{Op: providertest.OpEnd, Fault: providertest.Fault{Effect: providertest.FailBefore}},
	providertest.Rule{Op: providertest.OpStatus, Fault: providertest.Fault{Effect: providertest.FailBefore}})

// TestForget: only an operator has a lease forgotten, only one that is being
// revoked in vain, only with a reason; and nobody says that it is dead.
func TestForget(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, func(r *rig) { r.tune = func(c *lease.Config) { c.Retention = time.Hour } })
		ctx := context.Background()
		forget := func(id broker.LeaseID, reason string) (broker.Lease, error) {
			return r.engine.ForgetLease(ctx, as(sam), id, reason)
		}
		g := r.grant(support, "db.read", time.Hour, func(q *lease.GrantRequest) { q.MaxUses = 1 })
		d := r.mustIssue("db.read")
		id := d.Lease.ID

		_, err := forget(id, "gone for good")
		r.wantReason(err, broker.ReasonConflict)
		if err == nil || !strings.Contains(err.Error(), "is active") {
			t.Errorf("an active lease: %v", err)
		}

		r.world.SetScript(never)
		if _, err := r.engine.RevokeLease(ctx, as(sam), id, ""); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		if l := r.lease(id); l.State != broker.LeaseRevoking || !l.Overdue(r.engine.Now()) {
			t.Fatalf("the lease is %s", l.State)
		}

		for _, who := range []broker.Caller{as(support), as(other), as(pager)} {
			_, err := r.engine.ForgetLease(ctx, who, id, "gone for good")
			r.wantReason(err, broker.ReasonPermissionDenied)
		}
		_, err = forget(id, "")
		r.wantReason(err, broker.ReasonInvalidArgument)
		_, err = forget(broker.NewLeaseID(time.Now()), "gone for good")
		r.wantReason(err, broker.ReasonNotFound)
		if l := r.lease(id); l.State != broker.LeaseRevoking {
			t.Fatalf("after refusals the lease is %s", l.State)
		}

		l, err := forget(id, "the server was thrown away")
		if err != nil {
			t.Fatal(err)
		}
		if l.State != broker.LeaseLapsed || l.Cause != broker.CauseForgotten || l.Progress == broker.ProgressVerified || l.EndedAt.IsZero() {
			t.Errorf("forgotten, the lease is %s, cause %q, progress %q, ended %s", l.State, l.Cause, l.Progress, l.EndedAt)
		}
		if !r.world.Works(d.Secret.RevealAll()["password"]) {
			t.Fatal("the test is of a credential that lives")
		}
		counts, err := r.engine.Counts(ctx)
		if err != nil || counts.Overdue != 0 || counts.ByState[broker.LeaseRevoking] != 0 {
			t.Errorf("after it was forgotten: %+v, %v", counts, err)
		}
		events := r.events(lease.EventFilter{Lease: id, Type: audit.LeaseLapsed})
		if len(events) != 1 {
			t.Fatalf("%d events of the forgetting", len(events))
		}
		ev := events[0]
		if ev.Actor != sam.String() || ev.Reason != "the server was thrown away" || ev.Cause != string(broker.CauseForgotten) ||
			ev.Details["known"] != "not confirmed dead" || ev.Details["dies_at"] == "" || ev.Details["attempts"] == "0" || ev.Details["was_ended_for"] != "revoked" {
			t.Errorf("the evidence: %+v", ev)
		}
		for _, dead := range []audit.Type{audit.LeaseRevoked, audit.LeaseExpired} {
			if n := len(r.events(lease.EventFilter{Lease: id, Type: dead})); n != 0 {
				t.Errorf("%d events say that it is dead", n)
			}
		}

		// The provider returns; the lease stays as it is, and its use is spent.
		r.world.SetScript(nil)
		time.Sleep(5 * time.Minute)
		if l := r.lease(id); l.State != broker.LeaseLapsed {
			t.Errorf("later the lease is %s", l.State)
		}
		if again, err := forget(id, "once more"); err != nil || again.State != broker.LeaseLapsed {
			t.Errorf("forgetting it again: %s, %v", again.State, err)
		}
		if n := len(r.events(lease.EventFilter{Lease: id, Type: audit.LeaseLapsed})); n != 1 {
			t.Errorf("%d events after it was forgotten twice", n)
		}
		_, err = r.issue("db.read")
		r.wantReason(err, broker.ReasonGrantUsed)
		_ = g

		// One that is dead is not forgotten.
		r.grant(support, "vault.read", time.Hour)
		dead := r.mustIssue("vault.read").Lease.ID
		if _, err := r.engine.RevokeLease(ctx, as(sam), dead, ""); err != nil {
			t.Fatal(err)
		}
		_, err = forget(dead, "tidy up")
		r.wantReason(err, broker.ReasonConflict)

		// The record goes in its time, as that of every ended lease.
		time.Sleep(2 * time.Hour)
		_, err = forget(id, "once more")
		r.wantReason(err, broker.ReasonNotFound)
	})
}

// TestForgetWhileItIsMade: what a provider may still answer for is not
// forgotten: its handle would be lost.
func TestForgetWhileItIsMade(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t)
		g := r.grant(support, "db.read", time.Hour)
		r.world.SetScript(providertest.Rules(1, providertest.Rule{Op: providertest.OpCreate, Fault: providertest.Fault{Delay: 5 * time.Second}}))
		done := make(chan struct{})
		go func() { defer close(done); r.issue("db.read") }()
		time.Sleep(time.Second)
		go r.engine.WithdrawGrant(context.Background(), as(sam), g.ID, "")
		time.Sleep(time.Second)
		p, err := r.engine.Leases(context.Background(), lease.LeaseFilter{}, "", 0)
		if err != nil || len(p.Items) != 1 || p.Items[0].State != broker.LeaseRevoking {
			t.Fatalf("%+v, %v", p.Items, err)
		}
		_, err = r.engine.ForgetLease(context.Background(), as(sam), p.Items[0].ID, "why not")
		r.wantReason(err, broker.ReasonConflict)
		<-done
		r.wantState(p.Items[0].ID, broker.LeaseRevoked, time.Minute)
	})
}

// TestAForgottenLeaseIsNotCountedDead where what ended it answers how many are.
func TestAForgottenLeaseIsNotCountedDead(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, func(r *rig) { r.tune = func(c *lease.Config) { c.EndWait = time.Minute } })
		g := r.grant(support, "db.read", time.Hour)
		r.grant(support, "vault.read", time.Hour)
		id := r.mustIssue("db.read").Lease.ID
		r.world.SetScript(never)
		answered := make(chan lease.Ended)
		go func() {
			_, ended, err := r.engine.WithdrawGrant(context.Background(), as(sam), g.ID, "")
			if err != nil {
				t.Error(err)
			}
			answered <- ended
		}()
		time.Sleep(10 * time.Second)
		if _, err := r.engine.ForgetLease(context.Background(), as(sam), id, "gone"); err != nil {
			t.Fatal(err)
		}
		if got := <-answered; got != (lease.Ended{Lapsed: 1}) {
			t.Errorf("the withdrawal says %+v", got)
		}
	})
}
