package lease

import (
	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/store"
)

// count adds a lease that is being made to those that its agent holds, of
// which it may have at most most. Whoever calls it writes the lease.
//
// An agent that was taken over can make no more than so many credentials at a
// provider, each of which is to be ended again.
func (l *leaseRecord) count(t store.Txn, most int) error {
	n, _, err := get[int](t, keyHeld(l.Agent))
	if err != nil {
		return err
	}
	if n >= most {
		return broker.Refusef(broker.ReasonLeaseLimit, "give some back (`mayfly revoke`), or have `max_leases` of the agent raised in the catalog",
			"%s has %d leases that have not ended, and may have %d", l.Agent, n, most)
	}
	l.Counted = true
	return put(t, keyHeld(l.Agent), n+1)
}

// uncount takes a lease that ends out of those that its agent holds.
func (l *leaseRecord) uncount(t store.Txn) error {
	if !l.Counted {
		return nil // by a broker that did not count
	}
	l.Counted = false
	n, _, err := get[int](t, keyHeld(l.Agent))
	switch {
	case err != nil:
		return err
	case n <= 1:
		return t.Delete(keyHeld(l.Agent))
	}
	return put(t, keyHeld(l.Agent), n-1)
}
