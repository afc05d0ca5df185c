package awssts

import (
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/awssts/denylist"
	"github.com/mayfly-security/mayfly/providers/awssts/fakeaws"
)

// stored is everything that stands in the policies of a role.
func (w *world) stored(role string) denylist.Set {
	w.t.Helper()
	all := denylist.Set{}
	for name, text := range w.fake.Policies(role) {
		s, err := denylist.Parse(text)
		if err != nil {
			w.t.Fatalf("%s: %v", name, err)
		}
		all.Add(s)
	}
	return all
}

func (w *world) stands(l *lease) bool {
	return w.stored("crm0").Has(denylist.Entry{Kind: denylist.Lease, ID: string(l.req.Lease)})
}

// TestProgress: a lease is written when its entry stands, and verified when a
// probe that the same writing denies was seen to be denied, and still is.
func TestProgress(t *testing.T) {
	w := newWorld(t, faking(func(c *fakeaws.Config) { c.Force = func(int) time.Duration { return 7 * time.Second } }))
	p := w.open()
	a, b := w.mint(p, 10*time.Minute, ""), w.mint(p, 10*time.Minute, "")
	d := w.revoke(p, a, broker.CauseRevoked)
	if d.Err != nil || d.Progress != broker.ProgressWritten || d.RetryAt.IsZero() {
		t.Fatalf("%+v", d)
	}
	if !w.stands(a) || w.stands(b) {
		t.Error("the list is not what was asked for")
	}
	begun := w.clock.Now()
	for {
		d = p.Confirm(t.Context(), []providers.Ending{a.ending})[0]
		if d.Err != nil {
			t.Fatal(d.Err)
		}
		if d.Progress == broker.ProgressVerified {
			break
		}
		w.clock.Set(d.RetryAt)
	}
	if w.fake.Works(a.key) || !w.fake.Works(b.key) {
		t.Error("the wrong one is dead")
	}
	// In force after 7 s, and settled 2 s after that.
	if took := w.clock.Now().Sub(begun); took < 9*time.Second || took > 16*time.Second {
		t.Errorf("verified after %s", took)
	}
	if !strings.Contains(d.Left, "STS in eu-central-1") {
		t.Errorf("it says %q", d.Left)
	}
	if n := w.fake.Count("PutRolePolicy"); n != 1 {
		t.Errorf("%d writes", n)
	}
}

// TestNoProbe: without a probe nobody says verified before AWS's own end.
func TestNoProbe(t *testing.T) {
	w := newWorld(t, faking(func(c *fakeaws.Config) { c.NoProbe = true }))
	p := w.open()
	l := w.mint(p, 10*time.Minute, "")
	d := w.revoke(p, l, broker.CauseRevoked)
	for d.Progress != broker.ProgressVerified {
		if d.Err != nil || d.Progress != broker.ProgressWritten {
			t.Fatalf("%+v", d)
		}
		if w.fake.Works(l.key) {
			t.Fatal("it works")
		}
		w.clock.Set(d.RetryAt)
		d = p.Confirm(t.Context(), []providers.Ending{l.ending})[0]
	}
	if w.clock.Now().Before(l.minted.DiesAt) {
		t.Errorf("verified at %s, before AWS's end at %s", w.clock.Now(), l.minted.DiesAt)
	}
}

// TestRestart: a new process writes into a policy of its own, and verifies anew.
func TestRestart(t *testing.T) {
	w := newWorld(t)
	p := w.open()
	a, b := w.mint(p, 10*time.Minute, ""), w.mint(p, 10*time.Minute, "")
	w.revoke(p, a, broker.CauseRevoked)
	old := slices.Collect(maps.Keys(w.fake.Policies("crm0")))
	w.driver = New(nil)
	p = w.open()
	if d := w.confirm(p, a); d.Progress != broker.ProgressVerified || d.Err != nil {
		t.Fatalf("%+v", d)
	}
	if w.fake.Works(a.key) || !w.fake.Works(b.key) {
		t.Error("the wrong one is dead")
	}
	now := slices.Collect(maps.Keys(w.fake.Policies("crm0")))
	if len(old) != 1 || len(now) != 2 {
		t.Errorf("policies %v, and then %v", old, now)
	}
	// Once no write of the old process can land any more there is one policy again.
	w.clock.Advance(landing)
	w.reconcile(p)
	w.clock.Advance(landing)
	for range 3 {
		w.reconcile(p)
		w.clock.Advance(2 * visible)
	}
	if left := w.fake.Policies("crm0"); len(left) != 0 {
		t.Errorf("%v is left of dead sessions", left)
	}
}

// TestVerifiedStands: an entry stays after the end was verified, until the
// session is dead by itself, and goes then.
func TestVerifiedStands(t *testing.T) {
	w := newWorld(t)
	p := w.open()
	a := w.mint(p, 10*time.Minute, "")
	w.revoke(p, a, broker.CauseRevoked)
	w.confirm(p, a)
	for range 20 {
		w.reconcile(p)
		if w.clock.Now().Before(a.minted.DiesAt) && (!w.stands(a) || w.fake.Works(a.key)) {
			t.Fatalf("it does not stand at %s, and dies at %s", w.clock.Now(), a.minted.DiesAt)
		}
		w.clock.Advance(time.Minute)
	}
	if left := w.fake.Policies("crm0"); len(left) != 0 {
		t.Errorf("%v is left", left)
	}
}

// TestSomebodyElse: what others do to the list is repaired, and what cannot be
// read is left alone.
func TestSomebodyElse(t *testing.T) {
	w := newWorld(t)
	p := w.open()
	a, b := w.mint(p, 40*time.Minute, ""), w.mint(p, 40*time.Minute, "")
	w.revoke(p, a, broker.CauseRevoked)
	w.confirm(p, a)
	name := slices.Collect(maps.Keys(w.fake.Policies("crm0")))[0]
	w.clock.Advance(2 * visible)
	for what, text := range map[string]string{"removed": "", "changed": `{"Version":"2012-10-17","Statement":[{"Effect":"Allow","Action":"*","Resource":"*"}]}`} {
		w.fake.SetPolicy("crm0", name, text)
		if !w.fake.Works(a.key) {
			t.Fatal("the test has taken nothing away")
		}
		w.reconcile(p)
		if w.fake.Works(a.key) || !w.fake.Works(b.key) {
			t.Errorf("%s: the list was not repaired", what)
		}
		w.clock.Advance(2 * visible)
	}
	// A policy of the role's own only takes room.
	w.fake.SetPolicy("crm0", "permissions", strings.Repeat(" x", 9000))
	w.reconcile(p)
	for range 100 {
		if _, err := w.try(p, time.Minute, ""); err != nil {
			if !strings.Contains(err.Error(), "deny lists") {
				t.Fatal(err)
			}
			return
		}
	}
	t.Error("leases are made for which the list has no room")
}

// TestRestore: a store that came back from a backup has forgotten a lease. What
// denies it stays until the longest session has ended.
func TestRestore(t *testing.T) {
	w := newWorld(t)
	p := w.open()
	a, b := w.mint(p, time.Hour, ""), w.mint(p, time.Hour, "")
	w.revoke(p, a, broker.CauseRevoked)
	w.confirm(p, a)
	w.store.forget(a.req.Lease)
	w.driver = New(nil)
	p = w.open()
	w.revoke(p, b, broker.CauseRevoked)
	for w.clock.Now().Before(a.req.End) {
		w.reconcile(p)
		if !w.stands(a) || w.fake.Works(a.key) || w.fake.Works(b.key) {
			t.Fatal("a session that the store forgot is alive again")
		}
		w.clock.Advance(4 * time.Minute)
	}
	w.clock.Advance(keepForeign)
	for range 3 {
		w.reconcile(p)
		w.clock.Advance(landing + time.Second)
	}
	if left := w.fake.Policies("crm0"); len(left) != 0 {
		t.Errorf("%v is left", left)
	}
}

// TestIncident: one entry ends the leases of an incident that is over, and an
// agent that was disabled; others of the role go on.
func TestIncident(t *testing.T) {
	const incident = broker.IncidentID("i1234567890123456789012345")
	for cause, kind := range map[broker.Cause]denylist.Kind{broker.CauseIncidentClosed: denylist.Incident, broker.CauseAgentDisabled: denylist.Agent} {
		w := newWorld(t)
		p := w.open()
		var all []*lease
		var endings []providers.Ending
		for range 30 {
			l := w.mint(p, 10*time.Minute, incident)
			all = append(all, l)
			endings = append(endings, l.ending)
		}
		w.clock.Advance(2 * time.Minute)
		other := w.mint(p, 10*time.Minute, "")
		for _, l := range all {
			w.begin(l, cause)
		}
		for i, d := range p.Revoke(t.Context(), endings) {
			if d.Err != nil || w.fake.Works(all[i].key) {
				t.Fatalf("%s: %+v", cause, d)
			}
		}
		if !w.fake.Works(other.key) {
			t.Errorf("%s: a lease beside it is dead", cause)
		}
		for _, l := range all {
			if d := w.confirm(p, l); d.Progress != broker.ProgressVerified {
				t.Fatalf("%s: %+v", cause, d)
			}
		}
		kinds := map[denylist.Kind]int{}
		for e := range w.stored("crm0") {
			kinds[e.Kind]++
		}
		if kinds[kind] != 1 || kinds[denylist.Lease] != 0 {
			t.Errorf("%s: %v", cause, kinds)
		}
	}
}

// TestSoonOver: what is about to end by itself costs no write.
func TestSoonOver(t *testing.T) {
	w := newWorld(t)
	p := w.open()
	l := w.mint(p, time.Minute, "")
	w.clock.Set(l.req.End)
	d := w.revoke(p, l, broker.CauseTTL)
	if d.Progress != broker.ProgressRequested || !d.RetryAt.Equal(l.minted.DiesAt) || w.fake.Count("PutRolePolicy") != 0 {
		t.Errorf("%+v, %d writes", d, w.fake.Count("PutRolePolicy"))
	}
}

// TestIAMFails: what IAM does not do is no progress.
func TestIAMFails(t *testing.T) {
	fail := ""
	w := newWorld(t, faking(func(c *fakeaws.Config) {
		c.Fail = func(action string, _ int) (string, int) {
			if action == "PutRolePolicy" && fail != "" {
				return fail, map[string]int{"ServiceFailure": 500}[fail] | map[bool]int{true: 400}[fail != "ServiceFailure"]
			}
			return "", 0
		}
	}))
	p := w.open()
	l := w.mint(p, 10*time.Minute, "")
	for _, code := range []string{"Throttling", "AccessDenied", "ServiceFailure", "NoSuchEntity", "LimitExceeded"} {
		fail = code
		if d := w.revoke(p, l, broker.CauseRevoked); d.Err == nil || d.Progress != broker.ProgressNone {
			t.Errorf("%s: %+v", code, d)
		}
	}
	fail = ""
	if d := w.confirm(p, l); d.Progress != broker.ProgressVerified || d.Err != nil || w.fake.Works(l.key) {
		t.Errorf("%+v", d)
	}
}

// TestStaleWriter: a write that was given up lands when another has long taken
// its place. It takes nothing away.
func TestStaleWriter(t *testing.T) {
	for _, restart := range []bool{false, true} {
		t.Run(fmt.Sprint("restart ", restart), func(t *testing.T) {
			held, resume, landed := make(chan struct{}), make(chan struct{}), make(chan struct{})
			first := true
			w := newWorld(t, faking(func(c *fakeaws.Config) {
				c.Hold = func(action string, _ url.Values) {
					if action == "PutRolePolicy" && first {
						first = false
						close(held)
						<-resume
						defer close(landed)
					}
				}
			}))
			p := w.open()
			a, b := w.mint(p, 40*time.Minute, ""), w.mint(p, 40*time.Minute, "")
			ctx, cancel := contextWith(t)
			w.begin(a, broker.CauseRevoked)
			done := make(chan providers.Death)
			go func() { done <- p.Revoke(ctx, []providers.Ending{a.ending})[0] }()
			<-held
			cancel() // the broker gives up, or is gone
			if d := <-done; d.Err == nil {
				t.Fatalf("%+v", d)
			}
			if restart {
				w.driver = New(nil)
				p = w.open()
			}
			if d := w.revoke(p, b, broker.CauseRevoked); d.Err != nil {
				t.Fatal(d.Err)
			}
			for _, l := range []*lease{a, b} {
				if d := w.confirm(p, l); d.Err != nil || w.fake.Works(l.key) {
					t.Fatalf("%+v", d)
				}
			}
			n := w.fake.Count("PutRolePolicy")
			close(resume)
			<-landed
			w.waitFor(n + 1)
			if w.fake.Works(a.key) || w.fake.Works(b.key) {
				t.Error("a session came back to life")
			}
			w.reconcile(p)
			if w.fake.Works(a.key) || w.fake.Works(b.key) {
				t.Error("a session came back to life with the next comparison")
			}
		})
	}
}
