package denylist

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"
)

func lease(id string) Entry { return Entry{Kind: Lease, ID: id} }

// TestSure: what a write that may still land would take away is not counted
// upon, and is written elsewhere.
func TestSure(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	a, b, c := lease("a"), lease("b"), lease("c")
	for name, test := range map[string]struct {
		late []Late
		sure Set
	}{
		"nothing under way":       {nil, SetOf(a, b)},
		"a write of ours":         {[]Late{{Set: SetOf(b, c), Until: now.Add(time.Minute)}}, SetOf(b)},
		"two of ours":             {[]Late{{Set: SetOf(b, c), Until: now.Add(time.Minute)}, {Set: SetOf(a, c), Until: now.Add(time.Minute)}}, Set{}},
		"another's":               {[]Late{{Unknown: true, Until: now.Add(time.Minute)}}, Set{}},
		"one that cannot land":    {[]Late{{Set: SetOf(c), Until: now}}, SetOf(a, b)},
		"another's that cannot":   {[]Late{{Unknown: true, Until: now}}, SetOf(a, b)},
		"a removal of ours":       {[]Late{{Set: Set{}, Until: now.Add(time.Minute)}}, Set{}},
		"ours, with all of it":    {[]Late{{Set: SetOf(a, b, c), Until: now.Add(time.Minute)}}, SetOf(a, b)},
		"ours that cannot, other": {[]Late{{Set: SetOf(c), Until: now}, {Set: SetOf(a), Until: now.Add(time.Minute)}}, SetOf(a)},
	} {
		l := &List{Policies: map[string]*Policy{"old": {Own: true, Late: test.late}}}
		l.Policies["old"].stand(SetOf(a, b), now.Add(-time.Hour))
		l.Settle(now)
		if got := l.Sure(); !got.Equal(test.sure) {
			t.Errorf("%s: sure is %v", name, got.Sorted())
			continue
		}
		step, err := l.Next(SetOf(a, b), "new", false, now)
		if err != nil {
			t.Fatal(err)
		}
		missing := SetOf(a, b).Minus(test.sure)
		if len(missing) == 0 && step.Policy != "" || len(missing) > 0 && (step.Policy != "new" || len(missing.Minus(step.Set)) > 0) {
			t.Errorf("%s: writes %v to %q", name, step.Set.Sorted(), step.Policy)
		}
	}
}

// TestSpread: what was written to another policy a moment ago is not taken out
// of the first one yet.
func TestSpread(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	must := leases(10)
	l := &List{Policies: map[string]*Policy{"a": {Own: true}, "b": {}}}
	l.Policies["a"].stand(must, now)
	l.Policies["b"].stand(must, now.Add(-time.Hour))
	if step, err := l.Next(must, "new", true, now.Add(Spread-time.Second)); err != nil || step.Policy != "" {
		t.Errorf("%+v, %v", step, err)
	}
	if step, err := l.Next(must, "new", true, now.Add(Spread)); err != nil || step.Policy != "b" || len(step.Set) != 0 {
		t.Errorf("%+v, %v", step, err)
	}
}

// TestAgain: for a probe everything is written into one policy, also what stands
// in one that cannot be written; but only as much as there is room for.
func TestAgain(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	must := leases(200)
	late := &Policy{Own: true, Late: []Late{{Set: must, Until: now.Add(time.Minute)}}}
	late.stand(must, now)
	l := &List{Policies: map[string]*Policy{"late": late}}
	if step := l.Again(must, leases(100), "new", 160); step.Policy != "new" || !step.Set.Equal(leases(100)) {
		t.Errorf("%d entries to %q", len(step.Set), step.Policy)
	}
	if step := l.Again(must, must, "new", 160); step.Policy != "" { // there is no room for it twice
		t.Errorf("%d entries to %q", len(step.Set), step.Policy)
	}
	some := &Policy{Own: true}
	some.stand(leases(20), now)
	l.Policies["some"] = some
	if step := l.Again(must, must, "new", 160); step.Policy != "some" || !step.Set.Equal(leases(20)) {
		t.Errorf("%d entries to %q", len(step.Set), step.Policy)
	}
	if step := l.Again(must, leases(100), "new", 160); step.Policy != "some" || !step.Set.Equal(leases(100)) {
		t.Errorf("%d entries to %q", len(step.Set), step.Policy)
	}
}

// TestFull: what does not fit is an error that says how much.
func TestFull(t *testing.T) {
	l := &List{Policies: map[string]*Policy{}, Others: Quota - 100}
	_, err := l.Next(leases(3), "new", false, time.Now())
	if full := (*FullError)(nil); !errors.As(err, &full) || full.Missing != 3 {
		t.Errorf("%v", err)
	}
}

// TestParsePlain: what would deny more than one session, or is no name of ours,
// is not taken for an entry: it would be written again and again after whoever
// put it there has taken it away.
func TestParsePlain(t *testing.T) {
	for _, e := range []Entry{
		{Kind: Lease, ID: "*"}, {Kind: Lease, ID: "l?"}, {Kind: Lease, ID: ""}, {Kind: Lease, ID: "${aws:username}"}, {Kind: Lease, ID: "l:1"}, {Kind: Lease, ID: "L1"},
		{Kind: Probe, ID: ProbePrefix + "*"}, {Kind: Incident, ID: "${aws:PrincipalTag/x}"}, {Kind: Incident, ID: ""}, {Kind: Agent, ID: "a b", Before: 1}, {Kind: Agent, ID: strings.Repeat("x", 65), Before: 1},
	} {
		if s, err := Parse(Render(SetOf(e, lease("l1")))); err == nil {
			t.Errorf("%+v was taken: %v", e, s.Sorted())
		}
	}
}

// TestNewFirst: a process that has just begun cannot count upon the list of the
// one before it, and has no room to write all of it again. What stands nowhere
// yet goes first, and there is room for more of it.
func TestNewFirst(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	old := leases(200)
	l := &List{Policies: map[string]*Policy{"old": {Late: []Late{{Unknown: true, Until: now.Add(15 * time.Minute)}}}}}
	l.Policies["old"].stand(old, now)
	must := leases(200)
	for i := range 60 {
		e := lease(fmt.Sprintf("z%025d", i)) // sorted behind all others
		must[e] = struct{}{}
		full := (*FullError)(nil)
		for {
			step, err := l.Next(must, "new", false, now)
			if err != nil && !errors.As(err, &full) {
				t.Fatal(err)
			}
			if err != nil || step.Policy == "" {
				break
			}
			l.Wrote(step, now)
			if l.Used() > Quota {
				t.Fatalf("%d characters", l.Used())
			}
		}
		if !l.Sure().Has(e) {
			t.Fatalf("lease %d stands nowhere, and %d that stand already were written again", i, len(l.Sure().And(old)))
		}
	}
	if n := len(l.Sure().And(old)); n == 0 {
		t.Error("nothing was written again")
	}
	// Once the old process's writes cannot land any more its list counts.
	l.Settle(now.Add(16 * time.Minute))
	if missing := must.Minus(l.Sure()); len(missing) > 0 {
		t.Errorf("%d are not sure", len(missing))
	}
}

// TestTogetherSoon: a list that is nearly full, most of it in a policy of a
// process that is gone, comes together within an hour, and not entry by entry.
func TestTogetherSoon(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	must := leases(287)
	l := &List{Others: 500, Policies: map[string]*Policy{"gone": {}, "before": {}, "own": {Own: true}}}
	for i, e := range must.Sorted() {
		name := "gone"
		switch {
		case i < 7:
			name = "own"
		case i < 11:
			name = "before"
		}
		p := l.Policies[name]
		p.stand(p.Stands.with(e), now.Add(-time.Hour))
	}
	for range 12 {
		for range 10 {
			step, err := l.Next(must, "new", true, now)
			if err != nil {
				t.Fatal(err)
			}
			if step.Policy == "" {
				break
			}
			l.Wrote(step, now)
			if n := l.Used(); n > Quota {
				t.Fatalf("%d characters", n)
			}
			if left := must.Minus(l.Sure()); len(left) > 0 {
				t.Fatalf("%v stands nowhere", left.Sorted())
			}
		}
		now = now.Add(Spread)
	}
	if len(l.Policies) != 1 {
		for name, p := range l.Policies {
			t.Errorf("%s is left with %d entries", name, len(p.Stands))
		}
	}
}

// with is the set and one entry more.
func (s Set) with(e Entry) Set {
	all := Set{e: struct{}{}}
	all.Add(s)
	return all
}
