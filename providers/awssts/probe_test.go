package awssts

import (
	"sync/atomic"
	"testing"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/awssts/fakeaws"
)

// TestProbeDeniedAbove: a probe that is denied by another policy than its role's
// proves nothing of the list.
func TestProbeDeniedAbove(t *testing.T) {
	for _, above := range []string{"service control policy", "service control policy: arn:aws:organizations::123456789012:policy/o-x/service_control_policy/p-x", "permissions boundary", "session policy", "VPC endpoint policy"} {
		var denies atomic.Bool
		w := newWorld(t, faking(func(c *fakeaws.Config) {
			c.Force = func(int) time.Duration { return 5 * time.Minute }
			c.Above = func() string {
				if denies.Load() {
					return above
				}
				return ""
			}
		}))
		p := w.open()
		l := w.mint(p, 4*time.Minute, "")
		d := w.revoke(p, l, broker.CauseRevoked)
		denies.Store(true)
		for w.clock.Now().Before(l.req.End) {
			if d.Err != nil || d.Progress == broker.ProgressVerified {
				t.Fatalf("%s: it is said to be dead, and works: %t: %+v", above, w.fake.Works(l.key), d)
			}
			w.clock.Set(d.RetryAt)
			w.clock.Advance(time.Millisecond)
			d = p.Confirm(t.Context(), []providers.Ending{l.ending})[0]
		}
	}
}

// TestProbeInTime: endings that follow each other without a pause are verified
// all the same, one after the other.
func TestProbeInTime(t *testing.T) {
	w := newWorld(t, early(`{"mode":"deny_list","settle":"10s"}`), faking(func(c *fakeaws.Config) { c.Force = func(int) time.Duration { return 6 * time.Second } }))
	p := w.open()
	type ended struct {
		*lease
		at, next time.Time
		over     bool
	}
	var all []*ended
	for i := range 40 {
		l := w.mint(p, 30*time.Minute, "")
		if d := w.revoke(p, l, broker.CauseRevoked); d.Err != nil {
			t.Fatal(d.Err)
		}
		all = append(all, &ended{lease: l, at: w.clock.Now()})
		for range 4 {
			w.clock.Advance(time.Second)
			for k, e := range all {
				if e.over || w.clock.Now().Before(e.next) {
					continue
				}
				d := p.Confirm(t.Context(), []providers.Ending{e.ending})[0]
				if d.Err != nil {
					t.Fatal(d.Err)
				}
				e.next = d.RetryAt
				if e.over = d.Progress == broker.ProgressVerified; e.over && w.fake.Works(e.key) {
					t.Fatalf("lease %d is verified, and works", k)
				}
			}
		}
		for k, e := range all {
			if !e.over && w.clock.Now().Sub(e.at) > 75*time.Second {
				t.Fatalf("lease %d is not verified %s after its end, when %d have ended", k, w.clock.Now().Sub(e.at), i+1)
			}
		}
	}
	if n := w.fake.Count("PutRolePolicy"); n > 80 {
		t.Errorf("%d writes for %d leases", n, len(all))
	}
}

// TestProbeReaches: what stands in a policy that cannot be written for the
// moment is written into another for the probe, and no write follows another in vain.
func TestProbeReaches(t *testing.T) {
	var lose atomic.Bool
	w := newWorld(t, faking(func(c *fakeaws.Config) {
		c.Quiet = func(action string, _ int) bool { return action == "PutRolePolicy" && lose.Swap(false) }
	}))
	p := w.open()
	a, b := w.mint(p, 30*time.Minute, ""), w.mint(p, 30*time.Minute, "")
	w.revoke(p, a, broker.CauseRevoked)
	lose.Store(true) // the answer to b's write is lost, and a's entry stands in that policy alone
	if d := w.revoke(p, b, broker.CauseRevoked); d.Err == nil {
		t.Fatalf("%+v", d)
	}
	begun := w.clock.Now()
	for _, l := range []*lease{b, a} {
		d := p.Revoke(t.Context(), []providers.Ending{l.ending})[0]
		for d.Progress != broker.ProgressVerified {
			if d.Err != nil {
				t.Fatal(d.Err)
			}
			w.clock.Set(d.RetryAt)
			d = p.Confirm(t.Context(), []providers.Ending{l.ending})[0]
		}
	}
	if took := w.clock.Now().Sub(begun); took > time.Minute {
		t.Errorf("verified after %s", took)
	}
	if n := w.fake.Count("PutRolePolicy"); n > 5 {
		t.Errorf("%d writes", n)
	}
}

// TestProbeRests: where no probe can be made, none is tried for each lease and
// each look anew.
func TestProbeRests(t *testing.T) {
	w := newWorld(t, faking(func(c *fakeaws.Config) { c.NoProbe = true }))
	p := w.open()
	l := w.mint(p, 30*time.Minute, "")
	before, looks := w.fake.Count("AssumeRole"), 0
	d := w.revoke(p, l, broker.CauseRevoked)
	for w.clock.Now().Before(l.req.End) {
		if d.Err != nil || d.Progress != broker.ProgressWritten {
			t.Fatalf("%+v", d)
		}
		w.clock.Set(d.RetryAt)
		d = p.Confirm(t.Context(), []providers.Ending{l.ending})[0]
		looks++
	}
	if n := w.fake.Count("AssumeRole") - before; n > 35 || looks > 35 {
		t.Errorf("%d probes were made in half an hour, and the lease was looked at %d times", n, looks)
	}
}
