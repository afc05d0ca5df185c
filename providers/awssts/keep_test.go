package awssts

import (
	"errors"
	"testing"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/awssts/denylist"
)

// TestRestoreFolded: what one entry denies of an incident or an agent stays
// denied although the store forgot some of the leases, and knows others.
func TestRestoreFolded(t *testing.T) {
	const incident = broker.IncidentID("i1234567890123456789012345")
	for _, cause := range []broker.Cause{broker.CauseIncidentClosed, broker.CauseAgentDisabled} {
		w := newWorld(t)
		p := w.open()
		var all []*lease
		var endings []providers.Ending
		for range 30 {
			l := w.mint(p, time.Hour, incident)
			all = append(all, l)
			endings = append(endings, l.ending)
			w.begin(l, cause)
		}
		for _, d := range p.Revoke(t.Context(), endings) {
			if d.Err != nil {
				t.Fatal(d.Err)
			}
		}
		if len(w.stored("crm0")) > 3 {
			t.Fatalf("nothing was folded: %v", w.stored("crm0"))
		}
		// The backup is older than half of the leases, and than the end of all.
		for i, l := range all {
			if i < 15 {
				w.store.forget(l.req.Lease)
			} else {
				w.begin(l, broker.CauseRestored)
			}
		}
		w.driver = New(nil)
		p = w.open()
		for w.clock.Now().Before(all[0].req.End) {
			w.reconcile(p)
			for i, l := range all {
				if w.fake.Works(l.key) {
					t.Fatalf("%s: lease %d is alive again at %s of an hour", cause, i, w.clock.Now().Sub(l.req.Now))
				}
			}
			w.clock.Advance(4 * time.Minute)
		}
	}
}

// TestRestoreUnmarked: a store that was put back by hand takes a lease for open
// that had been ended: what denies it is not taken out.
func TestRestoreUnmarked(t *testing.T) {
	w := newWorld(t)
	p := w.open()
	a := w.mint(p, time.Hour, "")
	before := providers.Known{Ending: a.ending}
	w.revoke(p, a, broker.CauseRevoked)
	w.confirm(p, a)
	w.store.put(before)
	w.driver = New(nil)
	p = w.open()
	for w.clock.Now().Before(a.req.End) {
		w.reconcile(p)
		if !w.stands(a) || w.fake.Works(a.key) {
			t.Fatalf("it is alive again after %s", w.clock.Now().Sub(a.req.Now))
		}
		w.clock.Advance(4 * time.Minute)
	}
}

// TestDeadLeave: what is dead by itself leaves the list with the next
// comparison, whatever was made and ended between: the room is needed.
func TestDeadLeave(t *testing.T) {
	w := newWorld(t)
	p := w.open()
	b := w.mint(p, 30*time.Minute, "")
	w.revoke(p, b, broker.CauseRevoked)
	w.confirm(p, b)
	for range 8 {
		a := w.mint(p, time.Minute, "")
		w.revoke(p, a, broker.CauseRevoked)
		w.confirm(p, a)
		w.clock.Set(a.minted.DiesAt)
		w.store.forget(a.req.Lease) // the engine has no more to do with it
		w.mint(p, time.Minute, "")
		if d := p.Revoke(t.Context(), []providers.Ending{b.ending})[0]; d.Err != nil {
			t.Fatal(d.Err)
		}
		w.clock.Advance(visible)
		w.reconcile(p)
		if w.stands(a) {
			t.Fatalf("a lease that is dead by itself stands at %s", w.clock.Now())
		}
		if !w.stands(b) {
			t.Fatal("what is alive for itself was taken out, too")
		}
	}
}

// TestProvenAgain: an end is verified by what stands now. What was proven and
// was then taken away by somebody is proven anew.
func TestProvenAgain(t *testing.T) {
	w := newWorld(t)
	p := w.open()
	a := w.mint(p, time.Hour, "")
	w.revoke(p, a, broker.CauseRevoked)
	w.confirm(p, a)
	w.clock.Advance(2 * visible)
	for name := range w.fake.Policies("crm0") {
		w.fake.SetPolicy("crm0", name, "")
	}
	w.reconcile(p)
	if d := p.Revoke(t.Context(), []providers.Ending{a.ending})[0]; d.Err != nil || d.Progress != broker.ProgressWritten {
		t.Errorf("it was written a moment ago, and nobody has asked a probe since: %+v", d)
	}
	if d := w.confirm(p, a); d.Progress != broker.ProgressVerified {
		t.Errorf("%+v", d)
	}
}

// TestProvenWhen: the evidence tells when this lease's denial was seen, not
// when another's was.
func TestProvenWhen(t *testing.T) {
	w := newWorld(t)
	p := w.open()
	a := w.mint(p, time.Hour, "")
	w.revoke(p, a, broker.CauseRevoked)
	first := w.confirm(p, a).Left
	w.clock.Advance(5 * time.Minute)
	b := w.mint(p, 50*time.Minute, "")
	w.revoke(p, b, broker.CauseRevoked)
	w.confirm(p, b)
	if d := p.Revoke(t.Context(), []providers.Ending{a.ending})[0]; d.Progress != broker.ProgressVerified || d.Left != first {
		t.Errorf("first it says\n%s\nand then (%s)\n%s", first, d.Progress, d.Left)
	}
}

// TestAheadClock: AWS's clock is ahead of ours. An agent's entry tells sessions
// by when AWS made them, and denies those that we had it make before.
func TestAheadClock(t *testing.T) {
	w := newWorld(t)
	w.clock.behind = -90 * time.Second
	p := w.open()
	var all []*lease
	var endings []providers.Ending
	for range 20 {
		l := w.mint(p, 10*time.Minute, "")
		all = append(all, l)
		endings = append(endings, l.ending)
		w.begin(l, broker.CauseAgentDisabled)
	}
	p.Revoke(t.Context(), endings)
	folded := false
	for e := range w.stored("crm0") {
		folded = folded || e.Kind == denylist.Agent
	}
	if !folded {
		t.Fatal("nothing was folded")
	}
	for i, l := range all {
		if w.fake.Works(l.key) {
			t.Fatalf("lease %d works", i)
		}
	}
}

// TestStoreAway: what ends waits for no store. A lease that the engine ends is
// denied although the store cannot be read, and nothing that stands is lost.
func TestStoreAway(t *testing.T) {
	w := newWorld(t)
	p := w.open()
	a, b := w.mint(p, time.Hour, ""), w.mint(p, time.Hour, "")
	w.revoke(p, a, broker.CauseRevoked)
	w.confirm(p, a)
	w.store.fail(errors.New("the store hangs"))
	if d := p.Revoke(t.Context(), []providers.Ending{b.ending})[0]; d.Err != nil || d.Progress != broker.ProgressWritten {
		t.Errorf("%+v", d)
	}
	if err := p.reconcile(t.Context()); err == nil {
		t.Error("a list was compared with a store that cannot be read")
	}
	if !w.stands(a) || !w.stands(b) || w.fake.Works(a.key) || w.fake.Works(b.key) {
		t.Error("something is alive")
	}
	w.store.fail(nil)
	w.begin(b, broker.CauseRevoked)
	if d := w.confirm(p, b); d.Progress != broker.ProgressVerified {
		t.Errorf("%+v", d)
	}
}
