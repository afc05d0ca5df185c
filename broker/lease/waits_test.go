package lease_test

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
)

// TestWaitsFor: what the death of an overdue lease waits for is what its
// provider does about it, and not that something of it survives: a session whose
// denial could not be written is to be looked at, though open connections would
// survive it.
func TestWaitsFor(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t)
		var says atomic.Pointer[func(providers.Ending) providers.Death]
		answer := func(d func(providers.Ending) providers.Death) { says.Store(&d) }
		hear := func(endings []providers.Ending, _ func() []providers.Death) []providers.Death {
			deaths := make([]providers.Death, len(endings))
			for i, e := range endings {
				deaths[i] = (*says.Load())(e)
			}
			return deaths
		}
		r.hooked("asked", &hooks{
			mint: func(_ context.Context, _ providers.MintRequest, mint func() (providers.Minted, error)) (providers.Minted, error) {
				minted, err := mint()
				minted.Survives = "connections that are open"
				return minted, err
			},
			revoke: hear, confirm: hear,
		})
		wait := func(what string, overdue, surviving int) {
			t.Helper()
			for range 50 {
				time.Sleep(10 * time.Second)
				c, err := r.engine.Counts(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				if c.Overdue == overdue && c.Surviving == surviving {
					return
				}
			}
			c, _ := r.engine.Counts(t.Context())
			t.Fatalf("%s: %d are overdue, of which %d wait for their expiry", what, c.Overdue, c.Surviving)
		}
		answer(func(providers.Ending) providers.Death { return providers.Death{Err: errors.New("no room")} })
		r.grant(support, "cloud.read", time.Hour)
		l := r.mustIssue("cloud.read", ttl(15*time.Minute)).Lease
		if _, err := r.engine.RevokeLease(t.Context(), as(sam), l.ID, ""); err != nil {
			t.Fatal(err)
		}
		wait("the provider fails", 1, 0)
		answer(func(e providers.Ending) providers.Death {
			return providers.Death{Progress: broker.ProgressWritten, RetryAt: e.DiesAt.Add(-14 * time.Minute)}
		})
		wait("the provider looks again", 1, 0)
		answer(func(e providers.Ending) providers.Death {
			return providers.Death{Progress: broker.ProgressWritten, RetryAt: e.DiesAt}
		})
		wait("the provider can do no more", 1, 1)

		// A token that is verified offline can be revoked by nobody.
		r.grant(support, "docs.search", time.Hour)
		token := r.mustIssue("docs.search", ttl(15*time.Minute)).Lease
		if _, err := r.engine.RevokeLease(t.Context(), as(sam), token.ID, ""); err != nil {
			t.Fatal(err)
		}
		wait("a token", 2, 2)

		// It should have died by then: the provider is to say so, and is away.
		answer(func(providers.Ending) providers.Death { return providers.Death{Err: providers.ErrAway} })
		time.Sleep(time.Until(l.DiesAt) + 2*time.Minute)
		wait("its expiry is over", 1, 0)
	})
}
