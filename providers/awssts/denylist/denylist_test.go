package denylist

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/mayfly-security/mayfly/broker"
)

func leases(n int) Set {
	s := Set{}
	for i := range n {
		s[Entry{Kind: Lease, ID: fmt.Sprintf("l%025d", i)}] = struct{}{}
	}
	return s
}

func TestCapacity(t *testing.T) {
	n := 0
	for Size(leases(n+1)) <= Quota {
		n++
	}
	if n < 320 || n > 335 {
		t.Errorf("%d leases fit into a role's policies", n)
	}
	if got := Size(leases(10)) - Size(leases(9)); got != leaseCost {
		t.Errorf("a lease takes %d characters, and is counted with %d", got, leaseCost)
	}
}

func TestDocumentRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := Set{}
		for range rapid.IntRange(0, 30).Draw(t, "n") {
			id := rapid.StringMatching(`[a-z0-9]{25}`).Draw(t, "id")
			switch rapid.SampledFrom([]Kind{Lease, Incident, Agent, Probe}).Draw(t, "kind") {
			case Lease:
				s[Entry{Kind: Lease, ID: "l" + id}] = struct{}{}
			case Probe:
				s[Entry{Kind: Probe, ID: ProbePrefix + id[:8]}] = struct{}{}
			case Incident:
				s[Entry{Kind: Incident, ID: "i" + id}] = struct{}{}
			case Agent:
				s[Entry{Kind: Agent, ID: "mayfly-" + id, Before: rapid.Int64Range(1.7e9, 1.7e9+3).Draw(t, "before")}] = struct{}{}
			}
		}
		for range rapid.IntRange(0, 3).Draw(t, "cuts") {
			s[Entry{Kind: CutOff, Before: rapid.Int64Range(1.7e9, 1.7e9+3).Draw(t, "before")}] = struct{}{}
		}
		text := Render(s)
		if len(s) == 0 {
			if text != "" {
				t.Fatalf("an empty set is %q", text)
			}
			return
		}
		if strings.ContainsAny(text, " \n\t") {
			t.Errorf("white space in %s", text)
		}
		got, err := Parse(text)
		if err != nil || !got.Equal(s) {
			t.Errorf("%v\nread back %v, %v", s.Sorted(), got.Sorted(), err)
		}
	})
}

func TestParseRefuses(t *testing.T) {
	good := Render(leases(2))
	for name, text := range map[string]string{
		"nothing":           "",
		"no JSON":           "{",
		"an Allow":          strings.Replace(good, "Deny", "Allow", 1),
		"another action":    strings.Replace(good, `"Action":"*"`, `"Action":"s3:*"`, 1),
		"another condition": strings.Replace(good, "aws:userid", "aws:username", 1),
		"no prefix":         strings.Replace(good, "*:l", "l", 1),
		"a foreign field":   strings.Replace(good, `"Sid"`, `"NotPrincipal":"x","Sid"`, 1),
		"a bad time":        `{"Version":"2012-10-17","Statement":[{"Sid":"MayflyCutOff","Effect":"Deny","Action":"*","Resource":"*","Condition":{"DateLessThanEquals":{"aws:TokenIssueTime":"soon"}}}]}`,
	} {
		if s, err := Parse(text); !errors.Is(err, errForeign) {
			t.Errorf("%s: %v, %v", name, s, err)
		}
	}
	if s, err := Parse(strings.ReplaceAll(good, ",", ", ")); err != nil || len(s) != 2 {
		t.Errorf("with white space: %v, %v", s, err)
	}
}

func TestRequired(t *testing.T) {
	now := time.Unix(1_700_000_000, 0)
	alive := now.Add(time.Minute)
	make := func(n int, change func(*Known)) (all []Known) {
		for i := range n {
			k := Known{Lease: broker.LeaseID(fmt.Sprintf("l%025d", i)), Incident: "i1", Agent: "mayfly-a", Until: alive, Issued: now.Add(-time.Hour), Begun: true}
			change(&k)
			all = append(all, k)
		}
		return all
	}
	count := func(known []Known) map[Kind]int {
		set, must := Required(known, Entry{}, now)
		kinds := map[Kind]int{}
		for e := range set {
			kinds[e.Kind]++
		}
		for _, k := range known {
			e, is := must[k.Lease]
			if is != (k.Begun && now.Before(k.Until)) {
				t.Errorf("%+v: denied by %v", k, e)
			}
			if is && !set.Has(e) {
				t.Errorf("%v is not in the set", e)
			}
		}
		return kinds
	}
	for name, test := range map[string]struct {
		known []Known
		want  map[Kind]int
	}{
		"each":           {make(20, func(*Known) {}), map[Kind]int{Lease: 20}},
		"open":           {make(20, func(k *Known) { k.Begun = false }), map[Kind]int{}},
		"dead by itself": {make(20, func(k *Known) { k.Until = now }), map[Kind]int{}},
		"incident":       {make(20, func(k *Known) { k.Closed = true }), map[Kind]int{Incident: 1}},
		"small incident": {make(3, func(k *Known) { k.Closed = true }), map[Kind]int{Lease: 3}},
		"agent":          {make(20, func(k *Known) { k.Disabled = true }), map[Kind]int{Agent: 1}},
		"few of agent":   {make(3, func(k *Known) { k.Disabled = true }), map[Kind]int{Lease: 3}},
	} {
		if diff := cmp.Diff(test.want, count(test.known)); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
	}
	// A new session of an agent that was enabled again is not denied by the entry of the old ones.
	set, _ := Required(make(20, func(k *Known) { k.Disabled = true; k.Issued = now.Add(-time.Hour + time.Nanosecond) }), Entry{}, now)
	if e := set.Sorted()[0]; e.Before != now.Add(-time.Hour).Unix()+1 {
		t.Errorf("%+v", e)
	}
}

// TestRequiredWithCutOff: what a cut-off denies needs no entry of its own,
// whyever it ends; what may be later does. It stands also for nobody.
func TestRequiredWithCutOff(t *testing.T) {
	now := time.Unix(1_700_000_000, 0)
	cut := CutOffAt(now.Add(-time.Nanosecond))
	if cut.Before != now.Unix() {
		t.Errorf("it reaches to %d", cut.Before)
	}
	lease := func(id string, issued time.Time) Known {
		return Known{Lease: broker.LeaseID(id), Incident: "i1", Agent: "mayfly-a", Until: now.Add(time.Minute), Issued: issued, Begun: true, Closed: true, Disabled: true}
	}
	open := lease("open", now.Add(-time.Hour))
	open.Begun = false
	set, must := Required([]Known{lease("older", now.Add(-time.Hour)), lease("same", now), lease("later", now.Add(time.Nanosecond)), open}, cut, now)
	want := map[broker.LeaseID]Entry{"older": cut, "same": cut, "later": {Kind: Lease, ID: "later"}}
	if diff := cmp.Diff(want, must); diff != "" || !set.Equal(SetOf(cut, want["later"])) {
		t.Errorf("%v\n%s", set.Sorted(), diff)
	}
	if set, must := Required(nil, cut, now); !set.Equal(SetOf(cut)) || len(must) != 0 {
		t.Errorf("for nobody: %v", set)
	}
	for n := range 3 { // the cost is what one more takes
		all := SetOf(CutOffAt(now))
		for i := range n {
			all.Add(SetOf(CutOffAt(now.Add(time.Duration(i+1) * time.Hour))))
		}
		with := SetOf(CutOffAt(now.Add(9 * time.Hour)))
		with.Add(all)
		if got := Size(with) - Size(all); got > CutOffCost {
			t.Errorf("one more takes %d characters, and is counted with %d", got, CutOffCost)
		}
	}
}

// TestCutOffBesideFullPolicy: where a cut-off finds no room beside what stands in
// a policy that cannot be written yet, that is not taken out for it: the cut-off
// would come into force later. In the policy itself it takes its place.
func TestCutOffBesideFullPolicy(t *testing.T) {
	now := time.Unix(1_700_000_000, 0)
	cut := SetOf(CutOffAt(now))
	stands := leases(20)
	old := &Policy{Late: []Late{{Unknown: true, Until: now.Add(time.Minute)}}}
	old.stand(stands, now.Add(-time.Hour))
	l := List{Policies: map[string]*Policy{"old": old}, Others: Quota - Size(stands) - 10, Needed: stands}
	step, err := l.Next(cut, "new", true, now)
	var full *FullError
	if !errors.As(err, &full) || step.Policy != "" {
		t.Errorf("%+v, %v", step, err)
	}
	l.Settle(now.Add(time.Minute)) // no write of it can land any more
	if step, err = l.Next(cut, "new", false, now.Add(time.Minute)); err != nil || step.Policy != "old" || !step.Set.Equal(cut) {
		t.Errorf("%+v, %v", step, err)
	}
}

// cloud is the policies of one role in a model of IAM, with writes under way.
type cloud struct {
	policies map[string]Set
	past     map[string][]past // what policies were, until when
	flying   []flying
	others   int
	now      time.Time
	forced   Set // entries that were in force whatever order writes come into force in
}

type past struct {
	set   Set
	until time.Time
}

// change notes what a policy was.
func (c *cloud) change(name string, set Set) {
	c.past[name] = append(c.past[name], past{c.policies[name], c.now})
	if len(set) == 0 {
		delete(c.policies, name)
	} else {
		c.policies[name] = set
	}
}

// inForce reports whether an entry denies, whatever of its policies' latest
// writes are in force already.
func (c *cloud) inForce(e Entry) bool {
	for name, set := range c.policies {
		all := set.Has(e)
		for _, p := range c.past[name] {
			if c.now.Before(p.until.Add(Spread)) {
				all = all && p.set.Has(e)
			}
		}
		if all {
			return true
		}
	}
	return false
}

// keptInForce returns an entry that must deny, did, and may not any more.
func (c *cloud) keptInForce(must Set) (Entry, bool) {
	for e := range must {
		is := c.inForce(e)
		if c.forced.Has(e) && !is {
			return e, false
		}
		if is {
			c.forced[e] = struct{}{}
		}
	}
	return Entry{}, true
}

type flying struct {
	step  Step
	until time.Time
}

func (c *cloud) put(s Step) bool {
	if len(s.Set) == 0 {
		c.change(s.Policy, nil)
		return true
	}
	n := c.others + Size(s.Set)
	for name, set := range c.policies {
		if name != s.Policy {
			n += Size(set)
		}
	}
	if n > Quota {
		return false
	}
	c.change(s.Policy, s.Set)
	return true
}

func (c *cloud) has(e Entry) bool {
	for _, s := range c.policies {
		if s.Has(e) {
			return true
		}
	}
	return false
}

// TestNothingIsLost: entries come, die and are written by processes that stop
// in the middle of a write; their last write lands when it likes. What is sure
// stands, at every moment, and in the end everything stands.
func TestNothingIsLost(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const late = 15 * time.Minute
		now := time.Unix(1_700_000_000, 0)
		c := &cloud{policies: map[string]Set{}, past: map[string][]past{}, forced: Set{}, now: now, others: rapid.SampledFrom([]int{0, 500, 4000}).Draw(t, "others")}
		capacity := (Quota - c.others - 840) / leaseCost // as the provider admits leases
		must, serial, process, fresh := Set{}, 0, 0, 0
		list := &List{Policies: map[string]*Policy{}, Others: c.others}
		see := func() {
			names := map[string]bool{}
			for name := range list.Policies {
				names[name] = true
			}
			for name := range c.policies {
				names[name] = true
			}
			for name := range names {
				set, there := c.policies[name]
				if err := list.Saw(name, Render(set), there, now, now.Add(late)); err != nil {
					t.Fatal(err)
				}
			}
		}
		check := func(what string) {
			t.Helper()
			list.Settle(now)
			for e := range list.Sure().And(must) {
				if !c.has(e) {
					t.Fatalf("%s: %v is counted upon and does not stand", what, e)
				}
			}
			if e, ok := c.keptInForce(must); !ok {
				t.Fatalf("%s: %v was in force, and may not be any more", what, e)
			}
		}
		land := func(i int) {
			f := c.flying[i]
			c.flying = append(c.flying[:i:i], c.flying[i+1:]...)
			c.put(f.step)
			check("after a late write landed")
		}
		// work brings the list to where nothing is missing.
		work := func(unknown bool, tidy bool) {
			trail := ""
			for range 400 {
				list.Settle(now)
				step, err := list.Next(must, fmt.Sprintf("p%d-%d", process, fresh), tidy, now)
				if err != nil {
					// Old writes may hold room until they cannot land any more.
					if full := (*FullError)(nil); !errors.As(err, &full) {
						t.Fatal(err)
					}
					return
				}
				trail = fmt.Sprintf("%s\n%s: %d, used %d of %d, missing %d of %d", trail[max(len(trail)-1500, 0):], step.Policy, len(step.Set), list.Used(), Quota, len(must.Minus(list.Sure())), len(must))
				if step.Policy == "" {
					if left := must.Minus(list.Sure()); len(left) > 0 {
						t.Fatalf("nothing is to be done, and %d entries are not sure", len(left))
					}
					return
				}
				if unknown && rapid.IntRange(0, 3).Draw(t, "lost") == 0 {
					fresh++
					until := now.Add(late)
					list.Lost(step, until)
					if rapid.Bool().Draw(t, "lands now") {
						c.put(step)
					} else {
						c.flying = append(c.flying, flying{step, until})
					}
					unknown = false
				} else if c.put(step) {
					list.Wrote(step, now)
				} else {
					for name, set := range c.policies {
						trail += fmt.Sprintf(" refused[%s=%d]", name, len(set))
					}
					see() // a write landed that we had not seen
				}
				check("after a step")
			}
			t.Fatalf("there is no end to it: %s", trail)
		}
		for range rapid.IntRange(5, 25).Draw(t, "acts") {
			switch rapid.IntRange(0, 7).Draw(t, "act") {
			case 7: // all of it is written once more, for a probe
				list.Settle(now)
				step := list.Again(must, leases(min(len(must), 40)).And(must), fmt.Sprintf("p%d-%d", process, fresh), 160)
				if step.Policy == "" {
					continue
				}
				if p := list.Policies[step.Policy]; p != nil && len(p.Stands.And(must).Minus(step.Set)) > 0 {
					t.Fatalf("%v would be taken out", p.Stands.And(must).Minus(step.Set).Sorted())
				}
				if c.put(step) {
					list.Wrote(step, now)
				} else {
					see() // a write landed that we had not seen
				}
				check("after it was written again")
			case 0, 1, 2: // leases are ended early
				for range rapid.IntRange(1, 90).Draw(t, "n") {
					if len(must) < capacity {
						serial++
						must[Entry{Kind: Lease, ID: fmt.Sprintf("l%025d", serial)}] = struct{}{}
					}
				}
				work(rapid.Bool().Draw(t, "unknown"), false)
			case 3: // some die by themselves
				for i, e := range must.Sorted() {
					if i%3 == 0 {
						delete(must, e)
					}
				}
				work(false, rapid.Bool().Draw(t, "tidy"))
			case 4: // a new process takes over; the old one's last write is under way
				if step, err := list.Next(must, fmt.Sprintf("p%d-%d", process, fresh), true, now); err == nil && step.Policy != "" {
					c.flying = append(c.flying, flying{step, now.Add(late)})
				}
				process++
				fresh = 0
				list = &List{Policies: map[string]*Policy{}, Others: c.others}
				see()
				check("after a takeover")
				work(false, false)
			case 5:
				check("before time passes")
				now = now.Add(rapid.SampledFrom([]time.Duration{time.Second, time.Minute, 8 * time.Minute}).Draw(t, "passes"))
				c.now, c.flying = now, keepAlive(c.flying, now)
				see()
				work(false, true)
			case 6:
				if len(c.flying) > 0 {
					land(rapid.IntRange(0, len(c.flying)-1).Draw(t, "which"))
				}
			}
		}
		c.flying = nil
		for range 40 { // what was seen from others cannot be under way any more
			now = now.Add(2 * late)
			c.now = now
			see()
			work(false, true)
		}
		for e := range must {
			if !c.has(e) {
				t.Errorf("%v does not stand in the end", e)
			}
		}
		if len(c.policies) > 1 {
			t.Errorf("%d policies are left", len(c.policies))
			for name, p := range list.Policies {
				t.Logf("%s: %d entries, %d characters, %d late, own %t, of %d with %d others", name, len(p.Stands), p.size(), len(p.Late), p.Own, len(must), c.others)
			}
		}
	})
}

func keepAlive(all []flying, now time.Time) (alive []flying) {
	for _, f := range all {
		if now.Before(f.until) {
			alive = append(alive, f)
		}
	}
	return alive
}
