package denylist

import (
	"fmt"
	"maps"
	"slices"
	"sort"
	"time"
)

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
