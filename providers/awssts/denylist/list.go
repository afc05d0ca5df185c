package denylist

import (
	"fmt"
	"maps"
	"slices"
	"sort"
	"strings"
	"time"
)

// List is what is known of the policies of one role in which entries stand.
//
// PutRolePolicy replaces a policy whole and looks at no version: a write that
// was thought lost, or is another process's, may land at any time up to a bound
// and take what was written since with it. So a policy of which a write may be
// under way is counted upon only for what stands in it either way, and what
// must stand beyond that goes into another policy. Denies add up, so a write
// that lands late can lose nothing.
type List struct {
	Policies map[string]*Policy
	// Others is how many characters inline policies that are none of ours take.
	Others int
	// Needed need not be written any more, for what must stand denies the same;
	// but until that is in force it leaves no policy but the one that is written.
	Needed Set
}

// Spread is how long a write of IAM may take to be in force everywhere. Two
// writes of different policies come into force in any order: what was just
// written to one is not taken out of another before that.
const Spread = 5 * time.Minute

// Policy is one policy of a List.
type Policy struct {
	Stands Set    // what was last seen, or written, in it
	Late   []Late // writes that may still land
	Opaque int    // if not zero, it cannot be read, and has so many characters: it is left alone
	Own    bool   // this process writes it

	since map[Entry]time.Time // since when each entry has stood in it
}

// stand notes what stands in the policy from now on.
func (p *Policy) stand(set Set, now time.Time) {
	since := make(map[Entry]time.Time, len(set))
	for e := range set {
		if at, ok := p.since[e]; ok {
			since[e] = at
		} else {
			since[e] = now
		}
	}
	p.Stands, p.since = maps.Clone(set), since
}

// settled is what is sure and in force everywhere.
func (p *Policy) settled(now time.Time) Set {
	s := Set{}
	for e := range p.Sure() {
		if at, ok := p.since[e]; ok && !now.Before(at.Add(Spread)) {
			s[e] = struct{}{}
		}
	}
	return s
}

// Late is a write whose outcome is not known.
type Late struct {
	Set     Set  // what it writes
	Unknown bool // by another process: nobody knows what it writes
	Until   time.Time
}

// Sure is what stands in the policy whatever write lands in it.
func (p *Policy) Sure() Set {
	if p.Opaque != 0 {
		return Set{}
	}
	s := p.Stands
	for _, l := range p.Late {
		if l.Unknown {
			return Set{}
		}
		s = s.And(l.Set)
	}
	return s
}

// size is how many characters it takes at most.
func (p *Policy) size() int {
	if p.Opaque != 0 {
		return p.Opaque
	}
	n := Size(p.Stands)
	for _, l := range p.Late {
		n = max(n, Size(l.Set))
	}
	return n
}

// Settle forgets writes that can land no more.
func (l *List) Settle(now time.Time) {
	for _, p := range l.Policies {
		p.Late = slices.DeleteFunc(p.Late, func(late Late) bool { return !now.Before(late.Until) })
	}
}

// Sure is what stands in one policy or another whatever write lands.
func (l *List) Sure() Set {
	all := Set{}
	for _, p := range l.Policies {
		all.Add(p.Sure())
	}
	return all
}

// Settled is what is sure, and in force everywhere.
func (l *List) Settled(now time.Time) Set { return l.elsewhere("", now) }

// Stands is what was last seen in any policy.
func (l *List) Stands() Set {
	all := Set{}
	for _, p := range l.Policies {
		all.Add(p.Stands)
	}
	return all
}

// May is what was last seen in any policy, or may come to stand there by a write
// that lands late.
func (l *List) May() Set {
	all := l.Stands()
	for _, p := range l.Policies {
		for _, late := range p.Late {
			all.Add(late.Set)
		}
	}
	return all
}

// Used is how many characters of the quota are taken at most.
func (l *List) Used() int {
	n := l.Others
	for _, p := range l.Policies {
		n += p.size()
	}
	return n
}

// Step is one call to IAM that brings a list nearer to what must stand.
type Step struct {
	Policy string // its name; empty: nothing is to be done
	Set    Set    // what to write; empty: delete the policy
}

// FullError means that what must stand does not fit into the role's policies.
type FullError struct{ Missing int }

func (e *FullError) Error() string {
	return fmt.Sprintf("the role's inline policies have no room for %d more entries of the deny list", e.Missing)
}

// Next says what to do next so that everything in must stands. fresh names a
// new policy, if one is needed. With tidy, what need not stand any more is
// taken out, too, and policies are put together; without, only what is missing
// costs a call.
//
// Whatever is done, an entry of must that is sure stays sure.
func (l *List) Next(must Set, fresh string, tidy bool, now time.Time) (Step, error) {
	names := slices.Sorted(maps.Keys(l.Policies))
	active := l.active(names)
	missing := must.Minus(l.Sure())
	if len(missing) == 0 && !tidy {
		return Step{}, nil
	}
	stands := Set{}
	if active == "" {
		if len(must) == 0 {
			return l.remove(names, active, must, now), nil
		}
		active = fresh
	} else {
		stands = l.Policies[active].Stands
	}
	room := Quota - l.Others
	for _, name := range names {
		if name != active {
			room -= l.Policies[name].size()
		}
	}
	// What is sure elsewhere stays there while writes may land late: copies take
	// room. Afterwards everything comes together again.
	target := stands.And(must)
	target.Add(missing)
	if tidy && !l.late() {
		target = maps.Clone(must)
	}
	if Size(target) <= room {
		if !stands.Equal(target) && (len(missing) > 0 || tidy) {
			return Step{Policy: active, Set: target}, nil
		}
		return l.remove(names, active, must, now), nil
	}
	// Not all of it fits beside the other policies: what is missing goes first.
	next := stands.And(must)
	size, elsewhere := Size(next), l.elsewhere(active, now)
	// What is sure elsewhere makes room for what is sure nowhere.
	if len(missing) > 0 && size+leaseCost > room {
		for _, e := range next.And(elsewhere).Sorted() {
			delete(next, e)
		}
	}
	// What stands nowhere comes before what stands in a policy that cannot be
	// counted upon yet, and such copies leave room for more of it.
	standing := missing.And(l.Stands())
	next = fill(next, missing.Minus(standing).Sorted(), room)
	next = fill(next, standing.Sorted(), room-Quota/4)
	next = fill(next, must.Minus(missing).Minus(next).Sorted(), room)
	if !next.Equal(stands) && (len(next.Minus(stands)) > 0 || tidy) && len(next.And(missing)) > 0 {
		return Step{Policy: active, Set: next}, nil
	}
	// Then room is made: what is sure elsewhere, or need not stand, leaves the
	// others, one after the other.
	for _, name := range names {
		p := l.Policies[name]
		if name == active || p.Opaque != 0 {
			continue
		}
		keep := p.Stands.And(must)
		keep.Add(p.Stands.And(l.Needed))
		if keep = keep.Minus(l.elsewhere(name, now)); len(keep) < len(p.Stands) {
			return Step{Policy: name, Set: keep}, nil
		}
	}
	if len(missing) == 0 && len(next.Minus(stands)) > 0 {
		return Step{Policy: active, Set: next}, nil
	}
	if len(missing) > 0 {
		return Step{}, &FullError{Missing: len(missing)}
	}
	return Step{}, nil
}

// active is the policy that is written; empty if there is none that can be. It
// is the one in which most stands: where room is short, each entry that comes to
// it from another waits until it is in force.
//
// A policy of a process that is gone is as good as one of our own once none of
// its writes can land any more.
func (l *List) active(names []string) string {
	active := ""
	for _, name := range names {
		p := l.Policies[name]
		if len(p.Late) > 0 || p.Opaque != 0 {
			continue
		}
		if active == "" || len(p.Stands) > len(l.Policies[active].Stands) ||
			len(p.Stands) == len(l.Policies[active].Stands) && p.Own && !l.Policies[active].Own {
			active = name
		}
	}
	return active
}

// Again writes a policy once more although nothing is missing, with everything in
// tell, which may stand in another one: so that what is written with it tells of
// that. It leaves spare characters of the quota: where there is no room for all,
// it writes what stands in the policy alone.
func (l *List) Again(must, tell Set, fresh string, spare int) Step {
	step := Step{Policy: l.active(slices.Sorted(maps.Keys(l.Policies)))}
	stands, room := Set{}, Quota-l.Used()-spare
	if p := l.Policies[step.Policy]; p != nil {
		keep := maps.Clone(must)
		keep.Add(l.Needed)
		stands, room = p.Stands.And(keep), room+p.size()
	} else {
		step.Policy = fresh
	}
	step.Set = maps.Clone(stands)
	step.Set.Add(tell)
	if Size(step.Set) > room {
		step.Set = stands
	}
	if len(step.Set) == 0 {
		return Step{}
	}
	return step
}

// late reports whether a write may still land in any policy.
func (l *List) late() bool {
	for _, p := range l.Policies {
		if len(p.Late) > 0 {
			return true
		}
	}
	return false
}

// fill adds as many of the entries as fit into room.
func fill(s Set, entries []Entry, room int) Set {
	fits := func(n int) bool {
		with := maps.Clone(s)
		for _, e := range entries[:n] {
			with[e] = struct{}{}
		}
		return Size(with) <= room
	}
	n := sort.Search(len(entries), func(i int) bool { return !fits(i + 1) })
	s = maps.Clone(s)
	for _, e := range entries[:n] {
		s[e] = struct{}{}
	}
	return s
}

// elsewhere is what is sure, and in force, in other policies than this one.
func (l *List) elsewhere(than string, now time.Time) Set {
	all := Set{}
	for name, p := range l.Policies {
		if name != than {
			all.Add(p.settled(now))
		}
	}
	return all
}

// remove gives up a policy that is not needed: what must stand stands in the
// active one. One in which a write may still land is left until it cannot.
func (l *List) remove(names []string, active string, must Set, now time.Time) Step {
	sure := Set{}
	if p := l.Policies[active]; p != nil {
		sure = p.settled(now)
	}
	if len(must.Minus(sure)) > 0 {
		return Step{}
	}
	for _, name := range names {
		p := l.Policies[name]
		if name == active && len(must) > 0 || p.Opaque != 0 || len(p.Late) > 0 {
			continue
		}
		return Step{Policy: name, Set: Set{}}
	}
	return Step{}
}

// Wrote notes a write or deletion that IAM has confirmed.
func (l *List) Wrote(s Step, now time.Time) {
	p := l.Policies[s.Policy]
	switch {
	case len(s.Set) == 0 && (p == nil || len(p.Late) == 0):
		delete(l.Policies, s.Policy)
	case p == nil:
		p = &Policy{Own: true}
		l.Policies[s.Policy] = p
		p.stand(s.Set, now)
	default:
		p.stand(s.Set, now)
	}
}

// Lost notes a write whose outcome is not known, and that may land until then.
func (l *List) Lost(s Step, until time.Time) {
	p := l.Policies[s.Policy]
	if p == nil {
		p = &Policy{Stands: Set{}, Own: true}
		l.Policies[s.Policy] = p
	}
	p.Late = append(p.Late, Late{Set: maps.Clone(s.Set), Until: until})
}

// Saw notes what IAM shows of a policy; nil if it has none of that name. until
// is how long a write of another process's to it may still land.
func (l *List) Saw(name, policy string, there bool, now, until time.Time) error {
	p := l.Policies[name]
	if !there {
		if p != nil && len(p.Late) == 0 {
			delete(l.Policies, name)
		} else if p != nil {
			p.stand(Set{}, now)
			p.Opaque = 0
		}
		return nil
	}
	set, err := Parse(policy)
	if p == nil {
		p = &Policy{Late: []Late{{Unknown: true, Until: until}}}
		l.Policies[name] = p
	}
	if err != nil {
		// Our own is written again; another's may hold what we do not know of.
		p.stand(Set{}, now)
		if !p.Own {
			p.Opaque = len(strings.Join(strings.Fields(policy), ""))
		}
		return fmt.Errorf("policy %s: %w", name, err)
	}
	if !p.Own && p.Stands != nil && !p.Stands.Equal(set) {
		p.Late = append(p.Late, Late{Unknown: true, Until: until}) // somebody else writes it
	}
	p.stand(set, now)
	p.Opaque = 0
	// A write that is seen has landed, and lands no second time.
	p.Late = slices.DeleteFunc(p.Late, func(late Late) bool { return !late.Unknown && late.Set.Equal(set) })
	return nil
}
