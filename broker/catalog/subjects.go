package catalog

import (
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/policy"
)

// Policies is the policy set; policy.Builtin if the catalog has none.
func (s *Snapshot) Policies() *policy.Set { return s.policies }

// Rule returns one approval rule.
func (s *Snapshot) Rule(name string) (broker.ApprovalRule, bool) {
	r, ok := s.rules[name]
	return r, ok
}

// Rules returns every approval rule, in the order of their names.
func (s *Snapshot) Rules() []broker.ApprovalRule {
	var all []broker.ApprovalRule
	for _, name := range slices.Sorted(maps.Keys(s.rules)) {
		all = append(all, s.rules[name])
	}
	return all
}

// PersonGroups are the groups that a person is in: those that the identity
// provider says, and those of the catalog that list the person's name; sorted,
// each once. Groups of the broker's own are never among them.
func (s *Snapshot) PersonGroups(p broker.Person) []string {
	var all []string
	for _, g := range p.Groups {
		if !strings.HasPrefix(g, policy.ReservedGroups) {
			all = append(all, g)
		}
	}
	for g, names := range s.people {
		if names[p.Name] {
			all = append(all, g)
		}
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// KnownGroups are the groups that the catalog, its approval rules and its
// policies name, sorted.
func (s *Snapshot) KnownGroups() []string {
	known := map[string]bool{}
	for g := range s.groups {
		known[g] = true
	}
	for _, r := range s.rules {
		for _, n := range r.Need {
			known[n.Group] = true
		}
	}
	for _, n := range s.policies.Names() {
		if n.Type == "Group" && !strings.HasPrefix(n.ID, policy.ReservedGroups) {
			known[n.ID] = true
		}
	}
	return slices.Sorted(maps.Keys(known))
}

// Subject is a caller as policies see it: an agent of the catalog, a person,
// or another workload; with all its groups. A person is an operator by a group
// that the catalog lists as one, whether the identity provider or the catalog
// puts them into it.
func (s *Snapshot) Subject(c broker.Caller) policy.Subject {
	if c.Person != nil {
		groups := s.PersonGroups(*c.Person)
		return policy.Subject{Person: c.Person, Groups: groups, Operator: s.operatingGroup(groups)}
	}
	if a, ok := s.agents[c.ID]; ok {
		return policy.Subject{Agent: &a}
	}
	var groups []string
	for g, members := range s.groups {
		if members[c.ID] {
			groups = append(groups, g)
		}
	}
	slices.Sort(groups)
	return policy.Subject{Service: c.ID, Groups: groups, Operator: s.operators[c.ID]}
}

func (s *Snapshot) operatingGroup(groups []string) bool {
	return slices.ContainsFunc(groups, func(g string) bool { return s.operating[g] })
}

// Administrators are subjects that may be able to administer: the catalog's
// operators, the people whom it lists, and people made up, fresh from a
// sign-in, of every group that anything names. They are for policy.Lockout.
func (s *Snapshot) Administrators(now time.Time) []policy.Subject {
	var all []policy.Subject
	for _, id := range slices.SortedFunc(maps.Keys(s.operators), compareIDs) {
		all = append(all, s.Subject(broker.Caller{ID: id}))
	}
	names := map[string]bool{}
	for _, listed := range s.people {
		maps.Copy(names, listed)
	}
	for _, p := range policy.MadeUp(s.policies, s.KnownGroups(), slices.Sorted(maps.Keys(names)), now) {
		all = append(all, s.Subject(broker.Caller{Person: &p}))
	}
	return all
}
