package denylist

import (
	"fmt"
	"maps"
	"slices"
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
