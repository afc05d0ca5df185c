package lease_test

import (
	"context"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/audit"
	"github.com/mayfly-security/mayfly/broker/lease"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/providertest"
)

// TestI4_StaticLapses: a secret that was there before its lease does not die
// with it. Its lease needs no end at the provider, is over when the provider
// can do no more, and is nowhere said to be dead.
func TestI4_StaticLapses(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t)
		r.hooked("world", &hooks{
			mint: func(_ context.Context, _ providers.MintRequest, mint func() (providers.Minted, error)) (providers.Minted, error) {
				minted, err := mint()
				minted.DiesAt, minted.Static, minted.Survives = time.Time{}, true, "the secret, until it is rotated"
				return minted, err
			},
			revoke: func(endings []providers.Ending, _ func() []providers.Death) []providers.Death {
				deaths := make([]providers.Death, len(endings))
				for i := range deaths {
					deaths[i] = providers.Death{Progress: broker.ProgressRequested, Lapsed: true}
				}
				return deaths
			},
		})
		g := r.grant(support, "db.read", time.Hour)
		d := r.mustIssue("db.read", ttl(time.Minute))
		if !d.Lease.Static || !r.lease(d.Lease.ID).Static {
			t.Error("it is not said to be static")
		}
		l := r.wantState(d.Lease.ID, broker.LeaseLapsed, 70*time.Second)
		if l.Progress != broker.ProgressRequested || l.Cause != broker.CauseTTL || l.EndedAt.IsZero() {
			t.Errorf("it is over with progress %q, cause %q, at %s", l.Progress, l.Cause, l.EndedAt)
		}
		var what []audit.Type
		for _, ev := range r.events(lease.EventFilter{Lease: l.ID}) {
			what = append(what, ev.Type)
			if ev.Type == audit.LeaseLapsed && !strings.HasPrefix(ev.Details["why"], "static") {
				t.Errorf("the evidence says %q", ev.Details)
			}
		}
		if got := what[len(what)-1]; got != audit.LeaseLapsed {
			t.Errorf("the evidence ends with %s", got)
		}
		for _, prefix := range []string{"open|", "due|", "revoking|"} {
			if left := r.keys(prefix); len(left) != 0 {
				t.Errorf("left in the index: %q", left)
			}
		}
		// The counts of who ends leases tell it from the dead.
		d = r.mustIssue("db.read", ttl(time.Minute))
		_, ended, err := r.engine.WithdrawGrant(context.Background(), as(sam), g.ID, "")
		if err != nil || ended.Lapsed != 1 || ended.Dead != 0 {
			t.Errorf("withdrawing: %+v, %v; lease %s", ended, err, d.Lease.ID)
		}
	})
}

// TestI4_LapsedIsBelievedOnlyWhenSettled: while something may still come, a
// provider's word that it can do nothing ends nothing.
func TestI4_LapsedIsBelievedOnlyWhenSettled(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t)
		r.hooked("world", &hooks{revoke: func(endings []providers.Ending, _ func() []providers.Death) []providers.Death {
			return []providers.Death{{Lapsed: true, Progress: broker.ProgressVerified}}
		}})
		r.grant(support, "db.read", time.Hour)
		r.world.SetScript(providertest.Rules(1, providertest.Rule{Op: providertest.OpCreate, Fault: providertest.Fault{Effect: providertest.ActThenFail}}))
		began := time.Now()
		_, err := r.issue("db.read")
		r.wantReason(err, broker.ReasonProvider)
		l := r.wantState(r.onlyLease().ID, broker.LeaseLapsed, time.Minute)
		if took := l.EndedAt.Sub(began); took < 15*time.Second {
			t.Errorf("it was over after %s; something could come for 15s", took)
		}
		if l.Progress == broker.ProgressVerified {
			t.Error("what has lapsed is said to be verified")
		}
	})
}

// TestEndingTellsWhenItSettles: a provider is told until when something of an
// attempt may still come, and is told nothing once the attempt is over; and
// what it says is left stands in the lease and in the evidence.
func TestEndingTellsWhenItSettles(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t)
		var mu sync.Mutex
		told := map[broker.LeaseID]time.Time{}
		r.hooked("world", &hooks{revoke: func(endings []providers.Ending, revoke func() []providers.Death) []providers.Death {
			mu.Lock()
			defer mu.Unlock()
			deaths := revoke()
			for i, e := range endings {
				told[e.Lease] = e.Settles
				deaths[i].Left = "a role that\ncannot log in"
			}
			return deaths
		}})
		r.grant(support, "db.read", time.Hour)
		good := r.mustIssue("db.read")
		r.world.SetScript(providertest.Rules(1, providertest.Rule{Op: providertest.OpCreate, Fault: providertest.Fault{Effect: providertest.ActThenFail}}))
		began := time.Now()
		_, err := r.issue("db.read")
		r.wantReason(err, broker.ReasonProvider)
		if _, err := r.engine.RevokeLease(context.Background(), as(sam), good.Lease.ID, ""); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		mu.Lock()
		defer mu.Unlock()
		for id, settles := range told {
			if id == good.Lease.ID && !settles.IsZero() {
				t.Errorf("of an attempt that is over the provider is told %s", settles)
			}
			if id != good.Lease.ID && settles.Sub(began) != 15*time.Second {
				t.Errorf("of an attempt of unknown outcome the provider is told %s; it began at %s", settles, began)
			}
		}
		if len(told) != 2 {
			t.Errorf("told of %d leases", len(told))
		}
		l := r.lease(good.Lease.ID)
		events := r.events(lease.EventFilter{Lease: l.ID, Type: audit.LeaseRevoked})
		if l.Left == "" || strings.Contains(l.Left, "\n") || len(events) != 1 || events[0].Details["left"] != l.Left {
			t.Errorf("left %q; the evidence says %+v", l.Left, events)
		}
	})
}
