package lease_test

import (
	"context"
	"fmt"
	"strconv"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/audit"
	"github.com/mayfly-security/mayfly/broker/lease"
)

// TestRefusalFlood: whoever is refused often makes the broker write little,
// and every refusal is in the evidence, by itself or counted.
func TestRefusalFlood(t *testing.T) {
	const flood = 10_000
	stranger := func(n int) broker.Caller {
		return as(spiffeid.RequireFromString(fmt.Sprintf("spiffe://acme.test/stranger/%d", n)))
	}
	denied := broker.Refuse(broker.ReasonAgentUnknown, "who are you", "ask an operator")
	for name, refuse := range map[string]func(r *rig, n int){
		"one agent": func(r *rig, n int) {
			_, err := r.issue("db.read")
			r.wantReason(err, broker.ReasonNoGrant)
		},
		"each of 500 strangers often": func(r *rig, n int) {
			r.engine.Refused(context.Background(), stranger(n%500), "issue", "db.read", denied)
		},
		"each stranger twice": func(r *rig, n int) { r.engine.Refused(context.Background(), stranger(n/2), "issue", "db.read", denied) },
		"each a stranger":     func(r *rig, n int) { r.engine.Refused(context.Background(), stranger(n), "issue", "db.read", denied) },
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				r := newRig(t)
				before := len(r.events(lease.EventFilter{}))
				for n := range flood {
					refuse(r, n)
				}
				time.Sleep(30 * time.Second) // the window is over, and its counts are written
				events := r.events(lease.EventFilter{})[before:]
				total := 0
				for _, e := range events {
					switch e.Type {
					case audit.RequestRefused:
						total++
					case audit.RefusalsSuppressed:
						n, err := strconv.Atoi(e.Details["count"])
						if err != nil || n <= 0 {
							t.Errorf("a count of %q", e.Details["count"])
						}
						total += n
					default:
						t.Errorf("unexpected evidence: %+v", e)
					}
				}
				if total != flood {
					t.Errorf("the evidence counts %d refusals of %d", total, flood)
				}
				if len(events) > 500 {
					t.Errorf("%d refusals cost %d entries of evidence", flood, len(events))
				}
				t.Logf("%d refusals, %d entries", flood, len(events))
			})
		})
	}
}

// TestRefusalsAtTheEnd: what is only counted is written when the broker stops.
func TestRefusalsAtTheEnd(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t)
		for range 20 {
			r.issue("db.read")
		}
		r.restart()
		total := len(r.events(lease.EventFilter{Type: audit.RequestRefused}))
		for _, e := range r.events(lease.EventFilter{Type: audit.RefusalsSuppressed}) {
			n, _ := strconv.Atoi(e.Details["count"])
			total += n
		}
		if total != 20 {
			t.Errorf("the evidence counts %d refusals of 20", total)
		}
	})
}
