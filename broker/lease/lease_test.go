package lease_test

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/audit"
	"github.com/mayfly-security/mayfly/broker/lease"
)

// bubble runs a test in a bubble of time of its own.
func bubble(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	synctest.Test(t, f)
}

// tools are one of each kind of provider.
var tools = []string{"db.read", "vault.read", "cloud.read", "crm.read", "docs.search"}

// TestLife walks each kind of lease from the request to its end.
func TestLife(t *testing.T) {
	for _, tool := range tools {
		t.Run(tool, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				r := newRig(t)
				_, err := r.issue(tool)
				r.wantReason(err, broker.ReasonNoGrant)

				r.grant(support, tool, time.Hour)
				d := r.mustIssue(tool, ttl(5*time.Minute))
				if d.Secret.IsZero() {
					t.Error("the delivery has no secret")
				}
				l := r.lease(d.Lease.ID)
				if l.State != broker.LeaseActive || l.End.Sub(l.CreatedAt) > 5*time.Minute {
					t.Errorf("after the delivery: %+v", l)
				}
				if _, ok, err := r.engine.Usable(context.Background(), l.ID); err != nil || !ok {
					t.Errorf("Usable = %v, %v", ok, err)
				}
				time.Sleep(5*time.Minute + 10*time.Second)
				l = r.lease(l.ID)
				if !l.State.Ended() {
					t.Fatalf("10 s after its end the lease is %s", l.State)
				}
				if _, ok, _ := r.engine.Usable(context.Background(), l.ID); ok {
					t.Error("an ended lease is usable")
				}
				if n := len(r.world.Live()) + len(r.asked.Live()); n != 0 {
					t.Errorf("%d credentials are left", n)
				}
				types := map[audit.Type]int{}
				for _, e := range r.events(lease.EventFilter{Lease: l.ID}) {
					types[e.Type]++
				}
				if types[audit.LeaseActive] != 1 || types[audit.LeaseRevoked]+types[audit.LeaseExpired] != 1 {
					t.Errorf("the evidence of its life: %v", types)
				}
			})
		})
	}
}

func TestCloseEndsEverything(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t)
		in := r.open(time.Hour, tools...)
		var ids []broker.LeaseID
		for _, tool := range tools {
			ids = append(ids, r.mustIssue(tool).Lease.ID)
		}
		closed, ended, err := r.engine.CloseIncident(context.Background(), as(pager), in.ID, "resolved")
		if err != nil {
			t.Fatal(err)
		}
		if closed.State != broker.IncidentClosed {
			t.Errorf("the incident is %s", closed.State)
		}
		// The offline token lives until it expires, and nobody says otherwise.
		if ended.Dead != 4 || ended.Revoking != 1 {
			t.Errorf("the close says %+v; want 4 dead and 1 still being revoked", ended)
		}
		for i, id := range ids[:4] {
			if l := r.lease(id); l.State != broker.LeaseRevoked || l.Cause != broker.CauseIncidentClosed {
				t.Errorf("%s: %s (%s)", tools[i], l.State, l.Cause)
			}
		}
		off := r.lease(ids[4])
		if off.State != broker.LeaseRevoking || off.Survives == "" || !off.Overdue(time.Now().Add(time.Second)) {
			t.Errorf("the offline token: %+v", off)
		}
		if n := len(r.world.Live()) + len(r.asked.Live()); n != 0 {
			t.Errorf("%d credentials are left", n)
		}
		for _, tool := range tools {
			_, err := r.issue(tool)
			r.wantReason(err, broker.ReasonNoGrant)
		}
		r.wantState(ids[4], broker.LeaseExpired, 16*time.Minute)

		// Closing again is no error and tells the same.
		if _, ended, err := r.engine.CloseIncident(context.Background(), as(pager), in.ID, ""); err != nil || ended != (lease.Ended{}) {
			t.Errorf("closing again: %+v, %v", ended, err)
		}
	})
}
