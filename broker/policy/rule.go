package policy

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/mayfly-security/mayfly/broker"
)

// Voting is what is known of one request and the rule that it waits under.
type Voting struct {
	Rule    broker.ApprovalRule
	Request broker.Request
	Owner   string // the agent's, as in the catalog now
}

// Ballot is one yes, with what is known of the voter now.
type Ballot struct {
	Person   broker.Person
	Groups   []string      // that the voter is in now: the identity provider's and the catalog's
	Duration time.Duration // the longest that the voter agrees to; 0 means what was asked
}

// Tally is what the ballots come to. The zero Tally gives nothing.
type Tally struct {
	Met     bool
	Missing []string // for people: "1 of finance"; empty if Met
	// Of a quorum that is met:
	Voters   []broker.Voter // whose yes counts, each with the group that it counts for, in the rule's order
	Duration time.Duration  // of the grant: the shortest of what was asked, the rule's maximum and what each voter agrees to
	MaxUses  int            // of the grant; 0 means any number
}

// Eligible reports whether a person, in these groups now, may decide the
// request by its rule. Whether policy lets them approve, and whether their
// sign-in is fresh enough, is asked besides: see Set.Decide and StepUp.
func (v Voting) Eligible(p broker.Person, groups []string) error {
	refuse := func(format string, args ...any) error {
		return broker.Refusef(broker.ReasonNotEligible, "have somebody else decide: "+v.who(), format, args...)
	}
	if p.Name == "" {
		return refuse("somebody without a name decides nothing")
	}
	if v.Rule.NotRequester {
		if name, ok := v.Request.CreatedBy.Person(); ok && strings.EqualFold(name, p.Name) {
			return refuse("%s made the request, and rule %s lets nobody approve their own", p.Name, v.Rule.Name)
		}
	}
	if v.Rule.NotOwner && v.owns(p, groups) {
		return refuse("%s owns the agent (%s), and rule %s lets no owner approve", p.Name, v.Owner, v.Rule.Name)
	}
	if u := v.Request.OnBehalfOf; v.Rule.NotUser && u != nil {
		if strings.EqualFold(u.Name, p.Name) || p.Same(broker.Person{Name: u.Name, Issuer: u.Issuer, Subject: u.Subject}) {
			return refuse("the agent acts for %s, and rule %s lets nobody approve what is done for themselves", p.Name, v.Rule.Name)
		}
	}
	if !slices.ContainsFunc(v.Rule.Need, func(n broker.Quorum) bool { return n.Count > 0 && slices.Contains(groups, n.Group) }) {
		return refuse("%s is in no group that rule %s asks", p.Name, v.Rule.Name)
	}
	return nil
}

// owns reports whether a person is the agent's owner, or in the group that is.
func (v Voting) owns(p broker.Person, groups []string) bool {
	same := func(s string) bool { return strings.EqualFold(s, v.Owner) }
	return v.Owner != "" && (same(p.Name) || slices.ContainsFunc(groups, same))
}

// Owns reports whether a person, in these groups, may see what is an agent's as
// its owner. A group's name is taken as it is written.
func Owns(owner string, p broker.Person, groups []string) bool {
	return owner != "" && (strings.EqualFold(p.Name, owner) || slices.Contains(groups, owner))
}

// who says whom the rule asks.
func (v Voting) who() string {
	var all []string
	for _, n := range v.Rule.Need {
		all = append(all, fmt.Sprintf("%d of %s", n.Count, n.Group))
	}
	return strings.Join(all, " and ")
}

// Tally counts. A ballot of somebody who is not eligible counts for nothing;
// nobody counts twice, under whichever of their names; and one person's yes
// counts for one entry of the rule, so that the quorum is met only where each
// entry has people of its own.
func (v Voting) Tally(ballots []Ballot) Tally {
	people := v.people(ballots)
	var slots []string // one for each person that is needed
	for _, n := range v.Rule.Need {
		for range n.Count {
			slots = append(slots, n.Group)
		}
	}
	by := assign(slots, people)
	t := Tally{Met: len(slots) > 0}
	missing := map[string]int{}
	for slot, person := range by {
		if person < 0 {
			t.Met = false
			missing[slots[slot]]++
		}
	}
	if !t.Met {
		for _, n := range v.Rule.Need {
			if missing[n.Group] > 0 {
				t.Missing = append(t.Missing, fmt.Sprintf("%d of %s", missing[n.Group], n.Group))
				delete(missing, n.Group)
			}
		}
		if len(slots) == 0 {
			t.Missing = []string{fmt.Sprintf("rule %s names nobody", v.Rule.Name)}
		}
		return t
	}
	t.Duration, t.MaxUses = min(v.Request.Duration, v.Rule.MaxDuration), v.Request.MaxUses
	for _, one := range people {
		for _, b := range one {
			if b.Duration > 0 {
				t.Duration = min(t.Duration, b.Duration)
			}
		}
	}
	if v.Rule.SingleUse {
		t.MaxUses = 1
	}
	for slot, person := range by {
		b := ofGroup(people[person], slots[slot])
		t.Voters = append(t.Voters, broker.Voter{Name: b.Person.Name, Issuer: b.Person.Issuer, Subject: b.Person.Subject,
			Group: slots[slot], Standing: v.Rule.Standing})
	}
	return t
}

// people gathers the ballots of each person, and leaves out everybody of whom
// one ballot is not eligible: whoever may not vote under one name may not
// under another.
func (v Voting) people(ballots []Ballot) [][]Ballot {
	var all [][]Ballot
	for _, b := range ballots {
		one := []Ballot{b}
		var others [][]Ballot
		for _, other := range all {
			if slices.ContainsFunc(other, func(o Ballot) bool { return o.Person.Same(b.Person) }) {
				one = append(other, one...)
			} else {
				others = append(others, other)
			}
		}
		all = append(others, one)
	}
	return slices.DeleteFunc(all, func(one []Ballot) bool {
		return slices.ContainsFunc(one, func(b Ballot) bool { return v.Eligible(b.Person, b.Groups) != nil })
	})
}

// ofGroup is the person's ballot that counts for a group.
func ofGroup(one []Ballot, group string) *Ballot {
	for i := range one {
		if slices.Contains(one[i].Groups, group) {
			return &one[i]
		}
	}
	return nil
}

// assign gives each slot a person of its group, no person two, and as many
// slots as can be: a maximum matching, by augmenting paths. A slot that stays
// empty has -1; those that come first are filled first.
func assign(slots []string, people [][]Ballot) []int {
	bySlot, byPerson := make([]int, len(slots)), make([]int, len(people))
	for i := range bySlot {
		bySlot[i] = -1
	}
	for i := range byPerson {
		byPerson[i] = -1
	}
	var fill func(slot int, tried []bool) bool
	fill = func(slot int, tried []bool) bool {
		for p, one := range people {
			if tried[p] || ofGroup(one, slots[slot]) == nil {
				continue
			}
			tried[p] = true
			if byPerson[p] < 0 || fill(byPerson[p], tried) {
				bySlot[slot], byPerson[p] = p, slot
				return true
			}
		}
		return false
	}
	for slot := range slots {
		fill(slot, make([]bool, len(people)))
	}
	return bySlot
}

// StepUp refuses an authentication that is not what need asks for (RFC 9470):
// too old, of another class, at an unknown time, in the future, or by device
// code, which proves nobody fresh at this machine. The refusal carries need,
// so that the caller can go through it.
func StepUp(need broker.StepUp, authTime time.Time, acr string, method broker.SignInMethod, now time.Time) error {
	if need.IsZero() {
		return nil
	}
	refuse := func(format string, args ...any) error {
		e := broker.Refusef(broker.ReasonStepUp, "sign in again; `mayfly` does it by itself", format, args...)
		e.StepUp = need
		return e
	}
	switch {
	case method == broker.SignInDevice:
		return refuse("a sign-in by device code never counts for this")
	case authTime.After(now.Add(maxSkew)):
		return refuse("the sign-in is in the future, by the broker's clock")
	case need.MaxAge > 0 && authTime.IsZero():
		return refuse("the identity provider did not say when the sign-in was; it must be no older than %s", broker.Span(need.MaxAge))
	case need.MaxAge > 0 && now.Sub(authTime) > need.MaxAge:
		return refuse("the sign-in is %s old; it must be no older than %s", broker.Span(now.Sub(authTime).Round(time.Second)), broker.Span(need.MaxAge))
	case len(need.ACR) > 0 && !slices.Contains(need.ACR, acr):
		return refuse("the sign-in is of class %q; it must be one of %q", broker.Clean(broker.Shorten(acr, 60)), need.ACR)
	}
	return nil
}
