package lease

import (
	"fmt"
	"maps"
	"strings"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/audit"
	"github.com/mayfly-security/mayfly/broker/policy"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/store"
)

// chunk is how many leases one transaction begins to end: that takes up to six
// operations of the store's store.MaxOps.
const chunk = 9

// tellChunk is how many leases one transaction is told of: one that was ended
// without the store, and is dead, takes up to seventeen operations.
const tellChunk = 7

// grantChunk is how many grants one transaction ends: an end takes up to eight
// operations, and one more for each person on whose vote the grant stands.
const grantChunk = 4

// ending says why leases are ended.
type ending struct {
	cause       broker.Cause
	actor       string // a SPIFFE ID, or audit.Broker
	reason      string // in the actor's words; may be empty
	correlation broker.CorrelationID
	by          permission
	refund      bool // the use of the grant is given back: the agent never had it
	// handle, if not empty, is a better handle than the store's: the store
	// could not be told of it.
	handle string
}

func mustLease(r getter, id broker.LeaseID) (*leaseRecord, error) {
	l, ok, err := get[leaseRecord](r, keyLease(id))
	if err != nil {
		return nil, err
	}
	if !ok {
		return nil, policy.NotFound("lease", string(id))
	}
	return &l, nil
}

// dueValue is the value of a due key: the state, so that leases can be counted
// without reading them.
func dueValue(s broker.LeaseState) []byte { return []byte(s) }

// moveDue sets when the lease is next looked at, and writes the lease.
func moveDue(t store.Txn, l *leaseRecord, at time.Time) error {
	if err := t.Delete(keyDue(l.Provider, l.Due, l.ID)); err != nil {
		return err
	}
	l.Due = at
	if err := t.Put(keyDue(l.Provider, at, l.ID), dueValue(l.State)); err != nil {
		return err
	}
	return put(t, keyLease(l.ID), l)
}

// What the death of a lease in state revoking waits for: the value of its
// revoking key, so that the overdue can be counted without reading them.
const (
	waitsProvider = "provider" // to confirm it
	waitsExpiry   = "expiry"   // it dies by itself, and the provider does no more until then: behind it stands when
)

// expiryGrace is how long after that the provider has to say that it is dead.
const expiryGrace = time.Minute

// waitsFor is what a Death says of that.
func waitsFor(l *leaseRecord, d providers.Death) string {
	if d.Err == nil && !l.DiesAt.IsZero() && !d.RetryAt.Before(l.DiesAt) {
		return waitsExpiry + "|" + keyTime(d.RetryAt)
	}
	return waitsProvider
}

// waitsForExpiry reads the value of a revoking key. Once the expiry is over it is
// the provider's word that is waited for.
func waitsForExpiry(value string, now time.Time) bool {
	what, until, _ := strings.Cut(value, "|")
	return what == waitsExpiry && (until == "" || keyTime(now.Add(-expiryGrace)) <= until)
}

// startRevoking moves a lease that has not ended to revoking: from now on it
// must be dead. One that is there already stays as it is.
func startRevoking(t store.Txn, l *leaseRecord, now time.Time, why ending) error {
	if l.State == broker.LeaseRevoking || l.State.Ended() {
		return nil
	}
	l.State, l.Cause = broker.LeaseRevoking, why.cause
	l.End = earlier(l.End, now)
	l.Refund = l.Refund || why.refund
	if err := t.Put(keyRevoking(l.End, l.ID), []byte(waitsProvider)); err != nil {
		return err
	}
	if err := moveDue(t, l, now); err != nil {
		return err
	}
	ev := l.event(now, audit.LeaseRevoking)
	ev.Actor, ev.Reason = why.actor, why.reason
	why.by.tell(&ev)
	if why.correlation != "" {
		ev.Correlation = why.correlation
	}
	return appendEvent(t, ev)
}

// leave takes a lease out of those that have not ended, to a last state.
// Whoever calls it writes the lease.
func (l *leaseRecord) leave(t store.Txn, now time.Time, state broker.LeaseState, retention time.Duration) error {
	for _, key := range []string{
		keyDue(l.Provider, l.Due, l.ID),
		keyRevoking(l.End, l.ID),
		keyOpen(l.Grant, l.ID),
	} {
		if err := t.Delete(key); err != nil {
			return err
		}
	}
	if err := standOn(t, l, state); err != nil {
		return err
	}
	if err := l.uncount(t); err != nil {
		return err
	}
	l.State, l.EndedAt = state, now
	return t.Put(keyHouse(now.Add(retention), houseLease, string(l.ID)), nil)
}

// maxLeft bounds what a provider says of what is left of a dead lease.
const maxLeft = 300

// finish moves a lease to its last state: its death is confirmed. What may
// still be there of it stands in l.Left.
func finish(t store.Txn, l *leaseRecord, now time.Time, state broker.LeaseState, retention time.Duration, details map[string]string) error {
	if err := l.leave(t, now, state, retention); err != nil {
		return err
	}
	l.Progress = broker.ProgressVerified
	if l.Refund {
		if err := refund(t, l.Grant); err != nil {
			return err
		}
	}
	if err := put(t, keyLease(l.ID), l); err != nil {
		return err
	}
	what := audit.LeaseRevoked
	if state == broker.LeaseExpired {
		what = audit.LeaseExpired
	}
	ev := l.event(now, what)
	ev.Details = maps.Clone(details)
	if l.Left != "" {
		if ev.Details == nil {
			ev.Details = map[string]string{}
		}
		ev.Details["left"] = l.Left
	}
	return appendEvent(t, ev)
}

// refund gives a use back to a grant that counts them.
func refund(t store.Txn, id broker.GrantID) error {
	g, ok, err := get[broker.Grant](t, keyGrant(id))
	if err != nil || !ok || g.MaxUses == 0 {
		return err
	}
	if g.Uses == 0 {
		return fmt.Errorf("grant %s has no use to give back", id)
	}
	g.Uses--
	return put(t, keyGrant(id), g)
}
