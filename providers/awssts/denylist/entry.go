// Package denylist is the list of sessions that a role denies: the document
// that is put into IAM, read back from it, and the order in which several
// policies of one role are written so that no entry is ever lost. It is pure:
// it reaches for no network and no store.
package denylist

import (
	"cmp"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/mayfly-security/mayfly/broker"
)

// Kind is what an entry denies.
type Kind string

// The kinds.
const (
	Lease    Kind = "lease"    // one session, by its name
	Probe    Kind = "probe"    // a session of the broker's own, with which it sees that the list is in force
	Incident Kind = "incident" // every session of an incident, by its tag; only of one that is over
	Agent    Kind = "agent"    // every older session of an agent, by its source identity
	CutOff   Kind = "cut_off"  // every older session of the role; an operator's word alone makes it
)

// Entry denies sessions. It is comparable.
type Entry struct {
	Kind   Kind
	ID     string // the session's name, the incident or the source identity; empty for a cut-off
	Before int64  // agent, cut_off: sessions that were made up to then (Unix seconds)
}

// Set is a set of entries.
type Set map[Entry]struct{}

// SetOf makes a set.
func SetOf(entries ...Entry) Set {
	s := Set{}
	for _, e := range entries {
		s[e] = struct{}{}
	}
	return s
}

// Has reports whether e is in s.
func (s Set) Has(e Entry) bool { _, ok := s[e]; return ok }

// Add puts everything of other into s.
func (s Set) Add(other Set) { maps.Copy(s, other) }

// Minus is what is in s and not in other.
func (s Set) Minus(other Set) Set {
	out := Set{}
	for e := range s {
		if !other.Has(e) {
			out[e] = struct{}{}
		}
	}
	return out
}

// And is what is in both.
func (s Set) And(other Set) Set { return s.Minus(s.Minus(other)) }

// Equal reports whether both have the same entries.
func (s Set) Equal(other Set) bool { return maps.Equal(s, other) }

// Sorted are the entries in a fixed order.
func (s Set) Sorted() []Entry {
	return slices.SortedFunc(maps.Keys(s), func(a, b Entry) int {
		return cmp.Or(strings.Compare(string(a.Kind), string(b.Kind)), strings.Compare(a.ID, b.ID), cmp.Compare(a.Before, b.Before))
	})
}

// Known is one lease of a role whose session may be alive.
type Known struct {
	Lease    broker.LeaseID
	Incident broker.IncidentID
	Agent    string    // its source identity
	Until    time.Time // when the session is dead by itself, with skew
	Issued   time.Time // when it had been made at the latest
	Begun    bool      // its ending has begun: it must be denied
	Closed   bool      // and the whole incident is over
	Disabled bool      // and its agent was disabled
}

// What an entry of each kind takes of the document at most; see the test.
const (
	leaseCost    = len(`"*:l1234567890123456789012345",`)
	incidentCost = len(`"i1234567890123456789012345",`)
	incidentBase = len(`{"Sid":"MayflyIncident","Effect":"Deny","Action":"*","Resource":"*","Condition":{"StringEquals":{"aws:PrincipalTag/mayfly-incident":[]}}},`)
	agentCost    = len(`{"Sid":"MayflyAgent12345","Effect":"Deny","Action":"*","Resource":"*","Condition":{"DateLessThanEquals":{"aws:TokenIssueTime":"2026-01-02T03:04:05Z"},"StringEquals":{"aws:SourceIdentity":["mayfly-12345678901234567890123456789012"]}}},`)
)

// CutOffAt is the entry that denies every session of a role that was made up to
// an instant.
func CutOffAt(before time.Time) Entry { return Entry{Kind: CutOff, Before: ceil(before)} }

// CutOffCost is what one cut-off takes of the document at most; see the test.
const CutOffCost = len(`{"Sid":"MayflyCutOff12345","Effect":"Deny","Action":"*","Resource":"*","Condition":{"DateLessThanEquals":{"aws:TokenIssueTime":"2026-01-02T03:04:05Z"}}},`)

// Denies reports whether an entry denies a lease's session.
func (e Entry) Denies(k Known) bool {
	switch e.Kind {
	case Lease:
		return e.ID == string(k.Lease)
	case Incident:
		return k.Incident != "" && e.ID == string(k.Incident)
	case Agent:
		return e.ID == k.Agent && !k.Issued.After(time.Unix(e.Before, 0))
	case CutOff:
		return !k.Issued.After(time.Unix(e.Before, 0))
	}
	return false
}

// Required are the entries that must stand now, in their shortest form, and
// which of them denies each lease whose ending has begun. What is dead by
// itself needs none. What a cut-off of the role denies needs no entry of its
// own; the zero Entry is none. The leases of an incident that is over, and those
// of an agent that was disabled, are denied by one entry where that is shorter.
func Required(known []Known, cut Entry, now time.Time) (Set, map[broker.LeaseID]Entry) {
	must := map[broker.LeaseID]Entry{}
	incidents, agents := map[broker.IncidentID][]Known{}, map[string][]Known{}
	for _, k := range known {
		if !k.Begun || !now.Before(k.Until) {
			continue
		}
		if cut.Denies(k) {
			must[k.Lease] = cut
			continue
		}
		must[k.Lease] = Entry{Kind: Lease, ID: string(k.Lease)}
		switch {
		case k.Closed && k.Incident != "":
			incidents[k.Incident] = append(incidents[k.Incident], k)
		case k.Disabled && k.Agent != "":
			agents[k.Agent] = append(agents[k.Agent], k)
		}
	}
	saved := 0
	for _, of := range incidents {
		saved += max(len(of)*leaseCost-incidentCost, 0)
	}
	if saved > incidentBase {
		for id, of := range incidents {
			for _, k := range of {
				must[k.Lease] = Entry{Kind: Incident, ID: string(id)}
			}
		}
	}
	for agent, of := range agents {
		if len(of)*leaseCost <= agentCost {
			continue
		}
		var latest time.Time
		for _, k := range of {
			if k.Issued.After(latest) {
				latest = k.Issued
			}
		}
		for _, k := range of {
			must[k.Lease] = Entry{Kind: Agent, ID: agent, Before: ceil(latest)}
		}
	}
	all := Set{}
	if cut.Kind == CutOff {
		all[cut] = struct{}{}
	}
	for _, e := range must {
		all[e] = struct{}{}
	}
	return all, must
}

func ceil(t time.Time) int64 {
	s := t.Unix()
	if t.Nanosecond() > 0 {
		s++
	}
	return s
}
