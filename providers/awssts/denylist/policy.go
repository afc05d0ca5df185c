package denylist

import (
	"maps"
	"time"
)

// Policy is one policy of a List.
type Policy struct {
	Stands Set    // what was last seen, or written, in it
	Late   []Late // writes that may still land
	Opaque int    // if not zero, it cannot be read, and has so many characters: it is left alone
	Own    bool   // this process writes it

	since map[Entry]time.Time // since when each entry has stood in it
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

// Spread is how long a write of IAM may take to be in force everywhere. Two
// writes of different policies come into force in any order: what was just
// written to one is not taken out of another before that.
const Spread = 5 * time.Minute

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
