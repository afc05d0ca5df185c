package policy

import (
	"slices"
	"time"

	"github.com/mayfly-security/mayfly/broker"
)

// recoveryVerbs are what somebody must be able to do, so that a broker can be
// brought back under control: end access, and see what a better policy set
// would change.
func recoveryVerbs() []Verb { return []Verb{VerbWithdrawGrant, VerbEndAccess, VerbPolicy} }

// Administers reports whether a subject may do all that recovery needs.
func Administers(d Decider, s Subject, now time.Time) bool {
	for _, v := range recoveryVerbs() {
		if !d.Decide(Query{Action: ActionAdminister, Verb: v, Subject: s, Now: now}).Allowed {
			return false
		}
	}
	return true
}

// Lockout refuses a policy set that would let none of the subjects administer:
// not now, and at no hour of the week that begins now (a set may keep
// operators to office hours).
func Lockout(d Decider, subjects []Subject, now time.Time) error {
	for hour := range 7 * 24 {
		at := now.Add(time.Duration(hour) * time.Hour)
		if slices.ContainsFunc(subjects, func(s Subject) bool { return Administers(d, s.fresh(at), at) }) {
			return nil
		}
	}
	return broker.Refusef(broker.ReasonLockout, "keep a policy that permits `administer` to a group that somebody is in; the present set stays",
		"this policy set would let nobody administer the broker: of %d operators and groups, none may do all of %v", len(subjects), recoveryVerbs())
}

// fresh is the subject, who if a person has just signed in.
func (s Subject) fresh(at time.Time) Subject {
	if s.Person != nil {
		p := *s.Person
		p.AuthTime = at
		s.Person = &p
	}
	return s
}

// maxMadeUp bounds the people that are made up.
const maxMadeUp = 512

// MadeUp makes people up who could be what a set's policies ask for: of each
// name, group, class of sign-in and identity provider that they compare with,
// besides those that are given, fresh from a sign-in. They are for Lockout: if
// none of them may administer, hardly anybody may.
func MadeUp(s *Set, groups, names []string, now time.Time) []broker.Person {
	add := func(to []string, more ...string) []string {
		for _, m := range more {
			if m != "" && !slices.Contains(to, m) {
				to = append(to, m)
			}
		}
		return to
	}
	names = add([]string{"somebody"}, names...)
	for _, n := range s.names {
		if n.Type == typePerson {
			names = add(names, n.ID)
		}
	}
	names = add(names, s.literals["name"]...)
	memberships := [][]string{nil, groups}
	for _, g := range groups {
		memberships = append(memberships, []string{g})
	}
	var all []broker.Person
	for _, acr := range append([]string{""}, s.literals["acr"]...) {
		for _, issuer := range add([]string{"https://issuer.invalid"}, s.literals["issuer"]...) {
			for _, in := range memberships {
				for _, name := range names {
					if len(all) == maxMadeUp {
						return all
					}
					all = append(all, broker.Person{Name: name, Issuer: issuer, Subject: "made up", Groups: in, ACR: acr,
						AuthTime: now, Method: broker.SignInBrowser})
				}
			}
		}
	}
	return all
}
