package lease_test

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/lease"
)

// Inputs of the history: a secret is handed over, or an incident is closed.
type handOver struct{ incident broker.IncidentID }
type closing struct{ incident broker.IncidentID }

// closedIsClosed is the specification of I5 for one incident: once it is
// closed, nothing is handed over.
var closedIsClosed = porcupine.Model{
	Partition: func(history []porcupine.Operation) [][]porcupine.Operation {
		by := map[broker.IncidentID][]porcupine.Operation{}
		for _, op := range history {
			switch in := op.Input.(type) {
			case handOver:
				by[in.incident] = append(by[in.incident], op)
			case closing:
				by[in.incident] = append(by[in.incident], op)
			}
		}
		parts := make([][]porcupine.Operation, 0, len(by))
		for _, p := range by {
			parts = append(parts, p)
		}
		return parts
	},
	Init: func() any { return false },
	Step: func(closed, input, _ any) (bool, any) {
		if _, ok := input.(handOver); ok {
			return !closed.(bool), closed
		}
		return true, true
	},
}

// TestI5_ClosedIsClosed races closes against issues, on real goroutines and a
// real store. The history of what was handed over, and when each close
// returned, is checked against the specification.
func TestI5_ClosedIsClosed(t *testing.T) {
	const closes, issuers, workers = 5000, 2, 32 // each close races each of its issuers
	r := newRig(t, func(r *rig) {
		r.tune = func(c *lease.Config) { c.EndWait = time.Nanosecond } // whether they are dead yet is not asked here
	})
	began := time.Now()
	var (
		mu        sync.Mutex
		history   []porcupine.Operation
		delivered atomic.Int64
		next      atomic.Int64
		wg        sync.WaitGroup
	)
	add := func(client int, input any, call, ret time.Duration) {
		mu.Lock()
		defer mu.Unlock()
		history = append(history, porcupine.Operation{ClientId: client, Input: input, Call: call.Nanoseconds(), Output: nil, Return: ret.Nanoseconds()})
	}
	for w := range workers {
		wg.Go(func() {
			for {
				n := int(next.Add(1))
				if n > closes {
					return
				}
				tool := []string{"crm.read", "db.read"}[n%2]
				in, err := r.engine.OpenIncident(t.Context(), as(pager), lease.IncidentRequest{
					Title: "race", Agents: []spiffeid.ID{support}, Tools: []string{tool},
				})
				if err != nil {
					t.Errorf("opening: %v", err)
					return
				}
				var race sync.WaitGroup
				for i := range issuers {
					race.Go(func() {
						d, err := r.engine.Issue(t.Context(), as(support), lease.IssueRequest{Tool: tool})
						if err != nil {
							return
						}
						// It may be under another's grant, whose close races, too.
						call := time.Since(began)
						delivered.Add(1)
						add(w*(issuers+1)+i, handOver{d.Lease.Incident}, call, time.Since(began))
						d.Done()
					})
				}
				race.Go(func() {
					call := time.Since(began)
					if _, _, err := r.engine.CloseIncident(t.Context(), as(pager), in.ID, ""); err != nil {
						t.Errorf("closing: %v", err)
					}
					add(w*(issuers+1)+issuers, closing{in.ID}, call, time.Since(began))
				})
				race.Wait()
			}
		})
	}
	wg.Wait()
	if result := porcupine.CheckOperations(closedIsClosed, history); !result {
		t.Error("something was handed over after its incident's close had returned")
	}
	t.Logf("%d races of close against issue, %d delivered, in %s", closes*issuers, delivered.Load(), time.Since(began).Round(time.Millisecond))
	if n := delivered.Load(); n < closes*issuers/20 || n > closes*issuers*19/20 {
		t.Errorf("%d deliveries in %d races: nothing raced", n, closes*issuers)
	}
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		counts, err := r.engine.Counts(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		left := len(r.world.Live())
		if counts.ByState[broker.LeaseActive]+counts.ByState[broker.LeaseMinting]+counts.ByState[broker.LeaseRevoking] == 0 && left == 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("30 s after all incidents closed: %v, and %d credentials live", counts, left)
		}
	}
}

// TestI5_ReloadDisableWithdraw races the other ends: a withdrawn grant, a
// disabled agent and a widened tool hand nothing over once they have returned.
func TestI5_ReloadDisableWithdraw(t *testing.T) {
	r := newRig(t, func(r *rig) {
		r.tune = func(c *lease.Config) { c.EndWait = time.Nanosecond }
	})
	const rounds, issuers = 60, 4
	for round := range rounds {
		g := r.grant(support, "crm.read", time.Hour)
		var over atomic.Bool
		var wg sync.WaitGroup
		var delivered atomic.Int64
		for range issuers {
			wg.Go(func() {
				for {
					d, err := r.engine.Issue(context.Background(), as(support), lease.IssueRequest{Tool: "crm.read"})
					if err != nil {
						return
					}
					if over.Load() {
						t.Error("a secret was handed over after the end had returned")
					}
					delivered.Add(1)
					d.Done()
				}
			})
		}
		for delivered.Load() < issuers {
			time.Sleep(100 * time.Microsecond) // let the race begin; nothing is decided by it
		}
		var err error
		undo := func() error { return nil }
		switch round % 3 {
		case 0:
			_, _, err = r.engine.WithdrawGrant(context.Background(), as(sam), g.ID, "")
		case 1:
			err = r.reload("disabled: false # support", "disabled: true # support")
			undo = func() error { return r.reload("disabled: true # support", "disabled: false # support") }
		case 2:
			widened := fmt.Sprintf("max_ttl: %dm", 16+round)
			err = r.reload("max_ttl: 15m\n    params", widened+"\n    params")
			undo = func() error { return r.reload(widened+"\n    params", "max_ttl: 15m\n    params") }
		}
		over.Store(true)
		wg.Wait()
		if err != nil {
			t.Fatal(err)
		}
		// A suspended grant holds again when what changed is changed back, so
		// it goes before that.
		if _, _, err := r.engine.WithdrawGrant(context.Background(), as(sam), g.ID, ""); err != nil {
			t.Fatal(err)
		}
		if err := undo(); err != nil {
			t.Fatal(err)
		}
	}
}
