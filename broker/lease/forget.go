package lease

import (
	"context"
	"fmt"
	"maps"
	"strings"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/audit"
	"github.com/mayfly-security/mayfly/broker/policy"
	"github.com/mayfly-security/mayfly/store"
)

// ForgetLease gives up waiting for the death of an overdue lease, on an
// operator's word: the lease has lapsed, and is said to have lapsed and never
// to be dead. It is for a provider that is gone for good. Nothing else gives
// up on a lease (I3).
//
// What bears the lease's name at a provider with an inventory is still ended
// when it is found. Forgetting what was forgotten changes nothing.
func (e *Engine) ForgetLease(ctx context.Context, caller broker.Caller, id broker.LeaseID, reason string) (broker.Lease, error) {
	l, err := e.forgetLease(ctx, caller, id, reason)
	if err != nil {
		e.Refused(ctx, caller, "forget_lease", "", err)
	}
	return l, err
}

func (e *Engine) forgetLease(ctx context.Context, caller broker.Caller, id broker.LeaseID, reason string) (broker.Lease, error) {
	verdict, err := e.administer(ctx, e.current.Load(), caller, policy.VerbForgetLease)
	if err != nil {
		return broker.Lease{}, err
	}
	if err := requireReason(reason, "forgetting a lease"); err != nil {
		return broker.Lease{}, err
	}
	why := ending{cause: broker.CauseForgotten, actor: caller.Principal().String(), reason: reason, correlation: caller.Correlation}
	now := e.clock.now()
	var l *leaseRecord
	err = e.update(ctx, now, func(t store.Txn) (err error) {
		if l, err = mustLease(t, id); err != nil {
			return err
		}
		if l.State == broker.LeaseLapsed {
			return nil
		}
		if err := e.forgettable(l, now); err != nil {
			return err
		}
		return lapse(t, l, now, e.cfg.Retention, why, tellVerdict(lastKnown(l), verdict))
	})
	if err != nil {
		return broker.Lease{}, err
	}
	e.unlearn(l)
	e.log.Warn("an operator had a lease forgotten: it is not known to be dead", "lease", id, "provider", l.Provider, "operator", caller.Principal().String())
	e.watch.signal()
	return l.Lease, nil
}

// requireReason refuses an act of an operator's that nobody could explain later.
func requireReason(reason, what string) error {
	if err := broker.CheckText("reason", reason, broker.MaxReason); err != nil {
		return err
	}
	if strings.TrimSpace(reason) == "" {
		return broker.Refuse(broker.ReasonInvalidArgument, what+" needs a reason", "say why with --reason")
	}
	return nil
}

// forgettable refuses what can still be ended, or is being made.
func (e *Engine) forgettable(l *leaseRecord, now time.Time) error {
	switch {
	case l.State.Ended():
		return broker.Refusef(broker.ReasonConflict, "nothing is left to do", "lease %s is dead already: %s", l.ID, l.State)
	case l.State != broker.LeaseRevoking:
		return broker.Refusef(broker.ReasonConflict, "revoke it first (`mayfly revoke`)",
			"lease %s is %s, and only what is being revoked in vain can be forgotten", l.ID, l.State)
	case e.isMinting(l.ID):
		return broker.Refusef(broker.ReasonConflict, "wait until the provider has answered, or its time is over",
			"lease %s is still being made", l.ID)
	case !l.Overdue(now):
		return broker.Refusef(broker.ReasonConflict, "wait a moment", "lease %s is not overdue", l.ID)
	}
	return nil
}

// lastKnown is what the store knew of a lease when it was given up on.
func lastKnown(l *leaseRecord) map[string]string {
	known := map[string]string{
		"known":    "not confirmed dead",
		"end":      l.End.Format(time.RFC3339),
		"attempts": fmt.Sprint(l.Attempts),
	}
	if l.Progress != "" {
		known["progress"] = string(l.Progress)
	}
	if !l.DiesAt.IsZero() {
		known["dies_at"] = l.DiesAt.Format(time.RFC3339)
	}
	if l.Cause != "" {
		known["was_ended_for"] = string(l.Cause)
	}
	return known
}

// lapse moves a lease to its last state without a death: it is over, and
// nobody says that it is dead. Its progress stays what it was, and a use of
// its grant is not given back: it may have been had.
func lapse(t store.Txn, l *leaseRecord, now time.Time, retention time.Duration, why ending, details map[string]string) error {
	if err := l.leave(t, now, broker.LeaseLapsed, retention); err != nil {
		return err
	}
	if why.cause != "" {
		l.Cause = why.cause
	}
	if err := put(t, keyLease(l.ID), l); err != nil {
		return err
	}
	ev := l.event(now, audit.LeaseLapsed)
	if why.actor != "" {
		ev.Actor = why.actor
	}
	ev.Reason = why.reason
	if why.correlation != "" {
		ev.Correlation = why.correlation
	}
	if ev.Details == nil {
		ev.Details = map[string]string{}
	}
	maps.Copy(ev.Details, details)
	return appendEvent(t, ev)
}
