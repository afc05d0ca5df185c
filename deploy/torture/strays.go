//go:build unix

package main

import (
	"context"
	"fmt"
	"maps"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/deploy/testbed"
	"github.com/mayfly-security/mayfly/deploy/torture/ledger"
	"github.com/mayfly-security/mayfly/providers/vault/vaultscope"
)

// sweepBound is how long a role that Vault has lost may stay: the engine
// compares a provider with its store once a minute, and after each start.
const sweepBound = time.Minute + 30*time.Second

// strays are roles that were made as Vault makes them and that Vault does not
// know: what it leaves behind when it crashes, or its caller vanishes, between
// making a role and remembering it. Real ones are rare; these are planted.
type strays struct {
	mu      sync.Mutex
	planted map[string]time.Time // and not seen to be gone
	count   int
	swept   int
	longest time.Duration
}

// judge takes the planted roles out of what a look found, and complains of
// those that are there for too long. A role that a look began too late to see
// is gone.
func (s *strays) judge(roles []ledger.Thing, began, outageEnd time.Time) (others []ledger.Thing, wrong []ledger.Violation) {
	s.mu.Lock()
	defer s.mu.Unlock()
	there := map[string]bool{}
	for _, r := range roles {
		if _, planted := s.planted[r.Name]; planted {
			there[r.Name] = true
		} else {
			others = append(others, r)
		}
	}
	for name, since := range maps.Clone(s.planted) {
		age := began.Sub(since)
		switch {
		case age < 0: // it was planted after the look began
		case !there[name]:
			s.swept++
			s.longest = max(s.longest, age)
			delete(s.planted, name)
		case outageEnd.After(since) && began.Sub(outageEnd) < sweepBound:
		case age > sweepBound:
			wrong = append(wrong, ledger.Violation{Kind: ledger.Unbounded, What: fmt.Sprintf("role %s, which Vault does not know, was not swept for %s", name, age.Round(time.Second))})
			delete(s.planted, name) // told once; from now on it is an orphan
		}
	}
	return others, wrong
}

// loser plants roles that Vault does not know: of leases that are over, and of
// leases that never were but whose time is over.
func (a *actor) loser(ctx context.Context) {
	for ctx.Err() == nil {
		a.pause(ctx, 500*time.Millisecond, 3*time.Second)
		lease, until := broker.NewLeaseID(time.Now()), time.Now().Add(-30*time.Second)
		if a.rng.IntN(2) == 0 {
			ids := a.deliveries.Leases()
			if len(ids) == 0 {
				continue
			}
			l, known, err := a.lease(ctx, ids[a.rng.IntN(len(ids))])
			if err != nil || !known || !l.State.Ended() {
				continue
			}
			lease, until = l.ID, time.Now().Add(time.Hour)
		}
		name := vaultscope.LeaseRolePrefix(a.installation, lease) + fmt.Sprintf("lost%04d", a.rng.IntN(10000))
		// It is noted first, so that no look takes it for an orphan.
		s := a.strays
		s.mu.Lock()
		s.planted[name] = time.Now()
		s.count++
		s.mu.Unlock()
		err := a.world.plant(ctx, name, until)
		s.mu.Lock()
		if err != nil {
			delete(s.planted, name)
			s.count--
		} else {
			s.planted[name] = time.Now()
		}
		s.mu.Unlock()
		a.history.note(a.name, "planted", name, err == nil)
	}
}

// plant makes a role as Vault does, with Vault's login as its maker.
func (w *world) plant(ctx context.Context, name string, until time.Time) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	return pgx.BeginFunc(ctx, w.super, func(tx pgx.Tx) error {
		_, err := tx.Exec(ctx, fmt.Sprintf("SET LOCAL ROLE %s; CREATE ROLE %s LOGIN PASSWORD 'lost' VALID UNTIL '%s' IN ROLE %s",
			pgx.Identifier{testbed.AdminLogin}.Sanitize(), pgx.Identifier{name}.Sanitize(), until.UTC().Format(time.RFC3339),
			pgx.Identifier{vaultscope.GroupRole(toolRead)}.Sanitize()))
		return err
	})
}
