// Package ledger compares what the world has, what the broker's store says and
// what its evidence tells, and says where they contradict. It asks nobody: it
// is given what others read, so that each of its verdicts can be tested with a
// planted fault.
//
// The broker works while it is looked at. Each check is therefore made so that
// no order of events in a correct broker makes it complain: it uses the instant
// at which a look began, and what was read before and after.
package ledger

import (
	"fmt"
	"time"

	"github.com/mayfly-security/mayfly/broker"
)

// Kind is a kind of violation, as the report counts it.
type Kind string

// The kinds of violations.
const (
	Orphan     Kind = "orphan"            // something lives that no lease accounts for
	Missing    Kind = "missing"           // a lease is active, and nothing of it lives
	Duplicate  Kind = "duplicate"         // more than one credential of a lease lives
	Late       Kind = "delivered_late"    // a lease came to its agent after what it lived on was over
	Undead     Kind = "works_after_end"   // a credential works after its lease was said to be dead
	Broken     Kind = "does_not_work"     // a credential of an active lease does not work
	Unbounded  Kind = "over_bound"        // something took longer than the stated bound
	NoEvidence Kind = "without_evidence"  // a change that the evidence does not tell of, or tells otherwise
	Lost       Kind = "lost_acknowledged" // something was acknowledged, and the store does not have it
)

// Violation is one contradiction.
type Violation struct {
	Kind  Kind           `json:"kind"`
	Lease broker.LeaseID `json:"lease,omitempty"`
	What  string         `json:"what"`
}

func (v Violation) String() string { return fmt.Sprintf("%s: %s", v.Kind, v.What) }

func violation(kind Kind, id broker.LeaseID, format string, args ...any) Violation {
	return Violation{Kind: kind, Lease: id, What: fmt.Sprintf(format, args...)}
}

// Thing is one thing that lives outside: a PostgreSQL role, or a Vault token.
type Thing struct {
	Name  string
	Lease broker.LeaseID
}

// Look is one look at the world between two at the store.
type Look struct {
	Before map[broker.LeaseID]broker.Lease // leases that had not ended, read before the world
	Began  time.Time                       // when the look at the world began
	After  map[broker.LeaseID]broker.Lease // the same, read after the world
	// Lookup reads one lease that was not among those of After.
	Lookup func(broker.LeaseID) (l broker.Lease, known bool, err error)
	// Now is when After was read.
	Now time.Time

	Roles     []Thing // live roles
	RolesRead bool    // false: PostgreSQL was away, and Roles says nothing
	Tokens    []Thing // live accessors

	// Excused are leases whose credential was ended by a fault of the
	// network's making, and not by the broker.
	Excused func(broker.LeaseID) bool
	// Bound is how long a lease may be minting or revoking.
	Bound time.Duration
	// Outages are until when, and how long in all, what leases depend on was
	// away: the bound begins to count again after the last.
	OutageEnd time.Time
	// Roled reports whether leases of a tool have a role.
	Roled func(tool string) bool
}

// Count is what a look found that is in order.
type Count struct {
	Roles     int // live roles
	Tokens    int // live accessors
	Unsettled int // live roles of leases that are minting or revoking
	Open      int // leases that have not ended
	Revoking  int
}

// Check compares one look at the world with the store.
func (l Look) Check() (count Count, wrong []Violation, err error) {
	count = Count{Roles: len(l.Roles), Tokens: len(l.Tokens), Open: len(l.After)}
	roles := map[broker.LeaseID]int{}
	for _, r := range l.Roles {
		roles[r.Lease]++
		bad, open, err := l.accounts(r, "role")
		if err != nil {
			return count, wrong, err
		}
		if bad != nil {
			wrong = append(wrong, *bad)
		} else if open && l.After[r.Lease].State != broker.LeaseActive {
			count.Unsettled++
		}
	}
	for _, t := range l.Tokens {
		bad, _, err := l.accounts(t, "Vault token")
		if err != nil {
			return count, wrong, err
		}
		if bad != nil {
			wrong = append(wrong, *bad)
		}
	}
	for id, now := range l.After {
		before, was := l.Before[id]
		if was && l.RolesRead && l.Roled(now.Tool) && before.State == broker.LeaseActive && now.State == broker.LeaseActive &&
			l.Now.Before(now.End) && !l.Excused(id) {
			switch n := roles[id]; {
			case n == 0:
				wrong = append(wrong, violation(Missing, id, "lease %s is active until %s and has no role", id, now.End.Format(time.RFC3339Nano)))
			case n > 1:
				wrong = append(wrong, violation(Duplicate, id, "lease %s is active and has %d roles", id, n))
			}
		}
		if now.State == broker.LeaseRevoking {
			count.Revoking++
		}
		if v := l.late(now); v != nil {
			wrong = append(wrong, *v)
		}
	}
	return count, wrong, nil
}

// accounts says whether a lease accounts for a thing: one that has not ended,
// or that ended after the look at the world began.
func (l Look) accounts(t Thing, what string) (bad *Violation, open bool, err error) {
	if _, open := l.After[t.Lease]; open {
		return nil, true, nil
	}
	lease, known, err := l.Lookup(t.Lease)
	switch {
	case err != nil:
		return nil, false, err
	case !known:
		v := violation(Orphan, t.Lease, "%s %s lives, and the store does not know lease %s", what, t.Name, t.Lease)
		return &v, false, nil
	case lease.State.Ended() && lease.EndedAt.Before(l.Began):
		v := violation(Orphan, t.Lease, "%s %s lives, and lease %s was %s (%s) %s before", what, t.Name, t.Lease,
			lease.State, lease.Cause, l.Began.Sub(lease.EndedAt).Round(time.Millisecond))
		return &v, false, nil
	}
	return nil, false, nil
}

// late says whether a lease is minting or revoking for longer than its bound.
func (l Look) late(lease broker.Lease) *Violation {
	var since time.Time
	switch lease.State {
	case broker.LeaseMinting:
		since = lease.CreatedAt
	case broker.LeaseRevoking:
		since = lease.End // where what ended it has put it
	default:
		return nil
	}
	if l.OutageEnd.After(since) {
		since = l.OutageEnd
	}
	if over := l.Now.Sub(since) - l.Bound; over > 0 {
		v := violation(Unbounded, lease.ID, "lease %s is %s (%s) for %s longer than the bound of %s",
			lease.ID, lease.State, lease.Cause, over.Round(time.Millisecond), l.Bound)
		return &v
	}
	return nil
}
