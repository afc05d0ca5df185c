package lease_test

import (
	"sync"
	"testing"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/lease"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/providertest"
)

// TestI4_WhatIsLeftIsEnded: a credential has died by itself, and something of
// it is left at the provider. It is not said to have expired before that is gone.
func TestI4_WhatIsLeftIsEnded(t *testing.T) {
	eachOutside(t, func(t *testing.T, tool string) {
		r := newRig(t)
		var mu sync.Mutex
		left := true
		h := &hooks{
			confirm: func(endings []providers.Ending, confirm func() []providers.Death) []providers.Death {
				mu.Lock()
				defer mu.Unlock()
				if left {
					return make([]providers.Death, len(endings)) // not dead, and nothing else to tell
				}
				return confirm()
			},
			revoke: func(_ []providers.Ending, revoke func() []providers.Death) []providers.Death {
				mu.Lock()
				defer mu.Unlock()
				left = false
				return revoke()
			},
		}
		r.hooked(map[bool]string{true: "asked", false: "world"}[tool == "cloud.read"], h)
		r.grant(support, tool, time.Hour)
		d := r.mustIssue(tool, ttl(time.Minute))
		r.wantState(d.Lease.ID, broker.LeaseExpired, 90*time.Second)
		mu.Lock()
		defer mu.Unlock()
		if left {
			t.Error("said to be expired, with something left at the provider")
		}
	})
}

// TestI3_EndsNoLaterThanWhatItIsFor: the end of a lease is the earliest of all
// that bounds it.
func TestI3_EndsNoLaterThanWhatItIsFor(t *testing.T) {
	for name, c := range map[string]struct {
		prepare func(r *rig)
		change  func(*lease.IssueRequest)
		want    time.Duration
	}{
		"what was asked":       {func(r *rig) { r.grant(support, "db.read", time.Hour) }, ttl(time.Minute), time.Minute},
		"the tool's maximum":   {func(r *rig) { r.grant(support, "db.read", time.Hour) }, func(*lease.IssueRequest) {}, 15 * time.Minute},
		"the grant's end":      {func(r *rig) { r.grant(support, "db.read", 3*time.Minute) }, func(*lease.IssueRequest) {}, 3 * time.Minute},
		"the incident's end":   {func(r *rig) { r.open(4*time.Minute, "db.read") }, func(*lease.IssueRequest) {}, 4 * time.Minute},
		"the provider's limit": {func(r *rig) { r.grant(support, "db.read", time.Hour) }, func(*lease.IssueRequest) {}, 2 * time.Minute},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				r := newRig(t, func(r *rig) {
					if name == "the provider's limit" {
						r.world = providertest.NewSystem(providertest.SystemConfig{MaxTTL: 2 * time.Minute})
					}
				})
				c.prepare(r)
				d := r.mustIssue("db.read", c.change)
				if got := d.Lease.End.Sub(d.Lease.CreatedAt); got != c.want {
					t.Errorf("it lives %s; want %s", got, c.want)
				}
				if l := r.lease(d.Lease.ID); !l.End.Equal(d.Lease.End) {
					t.Errorf("its end is %s in the store, and the agent was told %s", l.End, d.Lease.End)
				}
				r.wantState(d.Lease.ID, broker.LeaseExpired, c.want+time.Second)
			})
		})
	}
}
