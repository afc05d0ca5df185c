package lease

import (
	"context"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/store"
)

// What is denied at a provider until it dies by itself must go on being denied
// after its death was confirmed: a provider with Traits.Stands renders, from
// the store, everything that stands there. Leases that have not ended are in
// the due index; for those that have, there is
//
//	stands|provider|ID             a lease whose death was confirmed before it died by itself
//
// which is written with the lease's last state and goes when it is dead by itself.
const prefixStands = "stands|"

func prefixStandsOf(provider string) string { return prefixStands + provider + "|" }

func keyStands(provider string, id broker.LeaseID) string {
	return prefixStandsOf(provider) + string(id)
}

// standOn keeps a lease that is being finished in what stands, if it is alive
// for itself, or if it is not known how long.
func standOn(t store.Txn, l *leaseRecord, state broker.LeaseState) error {
	if !l.Stands || state == broker.LeaseExpired {
		return nil
	}
	return t.Put(keyStands(l.Provider, l.ID), nil)
}

// known are all leases of a provider that have not ended, and those that have
// but do not count as dead by themselves. It is providers.Config.Known: with
// begun, the leases that nobody ends cost a key each and no record.
func (e *Engine) known(ctx context.Context, provider string, begun bool) ([]providers.Known, error) {
	var all []providers.Known
	var over []string
	early := e.clock.early()
	err := e.store.View(ctx, func(r store.Reader) error {
		all, over = all[:0], over[:0]
		for _, prefix := range []string{prefixDueOf(provider), prefixStandsOf(provider)} {
			for entry, err := range r.Scan(store.Prefix(prefix)) {
				if err != nil {
					return err
				}
				if begun && len(entry.Value) > 0 && broker.LeaseState(entry.Value) != broker.LeaseRevoking {
					continue // its due key says that it is not being ended
				}
				l, ok, err := get[leaseRecord](r, keyLease(broker.LeaseID(lastPart(entry.Key))))
				if err != nil {
					return err
				}
				if !ok || l.State.Ended() && l.diedByItself(early) {
					over = append(over, entry.Key)
					continue
				}
				all = append(all, l.known())
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	if err := e.fallen(ctx, over); err != nil {
		// It is read again next time. What must be denied does not wait for it.
		e.log.Warn("forgetting what stands at a provider no more", "provider", provider, "error", err)
	}
	return all, nil
}

// fallen removes what need not stand any more.
func (e *Engine) fallen(ctx context.Context, keys []string) error {
	for len(keys) > 0 {
		part := keys[:min(len(keys), 64)]
		keys = keys[len(part):]
		err := e.update(ctx, e.clock.now(), func(t store.Txn) error {
			for _, key := range part {
				if len(key) < len(prefixStands) || key[:len(prefixStands)] != prefixStands {
					continue // a due key without a lease is the worker's to tell of
				}
				if err := t.Delete(key); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func (l *leaseRecord) known() providers.Known {
	k := providers.Known{Ending: l.ending(), Incident: l.Incident}
	if l.State == broker.LeaseRevoking || l.State.Ended() {
		k.Begun, k.Cause = true, l.Cause
	}
	return k
}
