package lease_test

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/lease"
)

const clients = 64

// together runs f for each client at the same time, on real goroutines.
func together(f func(n int)) {
	var wg sync.WaitGroup
	start := make(chan struct{})
	for n := range clients {
		wg.Go(func() {
			<-start
			f(n)
		})
	}
	close(start)
	wg.Wait()
}

// TestOneKeyOneLease: however many ask with one key at once, there is one
// lease and one credential, and all of them get it.
func TestOneKeyOneLease(t *testing.T) {
	for _, tool := range tools {
		t.Run(tool, func(t *testing.T) {
			r := newRig(t)
			g := r.grant(support, tool, time.Hour, func(g *lease.GrantRequest) { g.MaxUses = 2 })
			var mu sync.Mutex
			got := map[broker.LeaseID]string{}
			together(func(int) {
				d, err := r.issue(tool, key("the-same"))
				if err != nil {
					t.Errorf("refused: %v", err)
					return
				}
				secret := ""
				for _, name := range d.Secret.Names() {
					value, _ := d.Secret.Reveal(name)
					secret += value + " "
				}
				mu.Lock()
				defer mu.Unlock()
				if was, ok := got[d.Lease.ID]; ok && was != secret && slices.Contains(outsideTools, tool) {
					t.Errorf("lease %s was given with two secrets", d.Lease.ID)
				}
				got[d.Lease.ID] = secret
			})
			if len(got) != 1 {
				t.Errorf("%d leases of one key", len(got))
			}
			if n := len(r.world.All()) + len(r.asked.All()); n > 1 {
				t.Errorf("%d credentials were made", n)
			}
			if n := r.grantNow(g.ID).Uses; n != 1 {
				t.Errorf("%d uses", n)
			}
		})
	}
}

// TestSingleUse: of many who ask at once, one gets the single use.
func TestSingleUse(t *testing.T) {
	for _, tool := range tools {
		t.Run(tool, func(t *testing.T) {
			r := newRig(t)
			r.grant(support, tool, time.Hour, func(g *lease.GrantRequest) { g.MaxUses = 1 })
			var mu sync.Mutex
			delivered := 0
			together(func(n int) {
				_, err := r.issue(tool, key(fmt.Sprint("client-", n)))
				mu.Lock()
				defer mu.Unlock()
				if err == nil {
					delivered++
					return
				}
				r.wantReason(err, broker.ReasonGrantUsed)
			})
			if delivered != 1 {
				t.Errorf("a single use was delivered %d times", delivered)
			}
			if n := len(r.world.All()) + len(r.asked.All()); n > 1 {
				t.Errorf("%d credentials were made", n)
			}
		})
	}
}

func (r *rig) grantNow(id broker.GrantID) broker.Grant {
	r.t.Helper()
	page, err := r.engine.Grants(context.Background(), lease.GrantFilter{All: true}, "", 0)
	if err != nil {
		r.t.Fatal(err)
	}
	for _, g := range page.Items {
		if g.ID == id {
			return g.Grant
		}
	}
	r.t.Fatalf("there is no grant %s", id)
	return broker.Grant{}
}

// TestLostAnswer: the answer of a single use was lost, and the broker has
// restarted. A token is made again, as the same lease. Another secret is gone:
// asking again ends what perhaps nobody has, and the use stays spent, for
// perhaps somebody has used it.
func TestLostAnswer(t *testing.T) {
	for _, tool := range tools {
		t.Run(tool, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				r := newRig(t)
				g := r.grant(support, tool, time.Hour, func(g *lease.GrantRequest) { g.MaxUses = 1 })
				first := r.mustIssue(tool, key("first"))
				time.Sleep(3 * time.Minute) // longer than an answer is kept
				r.restart()
				_, err := r.issue(tool, key("second"))
				r.wantReason(err, broker.ReasonGrantUsed)

				again, err := r.issue(tool, key("first"))
				if !slices.Contains(outsideTools, tool) {
					if err != nil || again.Lease.ID != first.Lease.ID || !again.Lease.End.Equal(first.Lease.End) || again.Secret.IsZero() {
						t.Errorf("asking again: %+v, %v; want lease %s", again, err, first.Lease.ID)
					}
				} else {
					r.wantReason(err, broker.ReasonSecretGone)
					l := r.wantState(first.Lease.ID, broker.LeaseRevoked, 10*time.Second)
					if l.Cause != broker.CauseSecretGone {
						t.Errorf("it ended because of %q", l.Cause)
					}
					if n := len(r.world.Live()) + len(r.asked.Live()); n != 0 {
						t.Errorf("%d credentials are left", n)
					}
					_, err = r.issue(tool, key("first"))
					r.wantReason(err, broker.ReasonConflict) // the key stays with its lease
				}
				if n := r.grantNow(g.ID).Uses; n != 1 {
					t.Errorf("%d uses; want the one that was spent", n)
				}
				_, err = r.issue(tool, key("third"))
				r.wantReason(err, broker.ReasonGrantUsed)

				// Another grant is another use.
				r.grant(support, tool, time.Hour, func(g *lease.GrantRequest) { g.MaxUses = 1 })
				if d := r.mustIssue(tool, key("third")); d.Lease.ID == first.Lease.ID {
					t.Error("the new key got the old lease")
				}
			})
		})
	}
}
