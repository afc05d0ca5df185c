package lease_test

import (
	"context"
	"log/slog"
	"testing"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/audit"
	"github.com/mayfly-security/mayfly/broker/lease"
)

// TestAcceptClock: a clock that ran a day ahead is set right. The broker gives
// nothing until an operator accepts that; then it gives again, and what was
// made in the time that never was is over.
func TestAcceptClock(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r, w := newClockRig(t)
		old := r.grant(support, "db.read", 12*time.Hour)
		before := r.mustIssue("db.read")

		w.set(24 * time.Hour)
		r.restart() // a restart takes a forward jump for true
		r.wantState(before.Lease.ID, broker.LeaseExpired, time.Minute)
		r.grant(support, "vault.read", time.Hour)
		in := r.open(time.Hour, "crm.read")
		wrong := r.mustIssue("vault.read").Lease.ID
		time.Sleep(20 * time.Second) // the mark is written

		w.set(0)
		r.restart()
		r.wantNoGiving("vault.read")

		r.stop()
		r.openStore()
		was, err := lease.AcceptClock(context.Background(), r.db, w.now(), "host:root", slog.New(slog.DiscardHandler))
		if err != nil || !was.After(w.now().Add(23*time.Hour)) {
			t.Fatalf("AcceptClock: %v, %v", was, err)
		}
		if err := r.db.Close(); err != nil {
			t.Fatal(err)
		}
		r.start()

		if err := r.engine.Ready(context.Background()); err != nil {
			t.Fatalf("after the clock was accepted: %v", err)
		}
		if l := r.wantState(wrong, broker.LeaseRevoked, time.Minute); l.Cause != broker.CauseClockSetBack {
			t.Errorf("the lease of the time that never was ended for %q", l.Cause)
		}
		_, err = r.issue("vault.read")
		r.wantReason(err, broker.ReasonNoGrant)
		if v, err := r.engine.Incident(context.Background(), as(pager), in.ID); err != nil || v.State != broker.IncidentClosed {
			t.Errorf("the incident: %+v, %v", v.State, err)
		}
		// The grant of before was ended by the clock that ran ahead.
		if n := len(r.events(lease.EventFilter{Grant: old.ID, Type: audit.GrantEnded})); n != 1 {
			t.Errorf("the end of the old grant is in the evidence %d times", n)
		}
		if n := len(r.events(lease.EventFilter{Type: audit.ClockTrusted})); n == 0 {
			t.Error("that the clock was accepted is not in the evidence")
		}
		r.grant(support, "vault.read", time.Hour)
		if l := r.mustIssue("vault.read").Lease; l.End.After(w.now().Add(time.Hour)) {
			t.Errorf("a new lease ends at %s", l.End)
		}
		r.stop()
		r.openStore()
		if was, err := lease.AcceptClock(context.Background(), r.db, w.now().Add(time.Hour), "host:root", slog.New(slog.DiscardHandler)); err != nil || was.After(w.now().Add(time.Hour)) {
			t.Errorf("accepting a clock that is not behind: %v, %v", was, err)
		}
		if err := r.db.Close(); err != nil {
			t.Fatal(err)
		}
	})
}
