package signin

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/audit"
	"github.com/mayfly-security/mayfly/store"
)

const actorBroker = audit.Broker

// ending is why sessions end, and who ends them.
type ending struct {
	actor       string // as audit.Event.Actor
	cause       string // signed_out, ended, expired, code_replayed, too_many or store_restored
	reason      string // in the actor's words
	correlation broker.CorrelationID
}

// ended is a session that is over, and perhaps still in the store.
type ended struct {
	ending
	until time.Time // it would have expired then
}

// endIn is the ending of one session, in a transaction, with its evidence.
func endIn(t store.Txn, d digest, rec sessionRecord, now time.Time, why ending) error {
	if err := t.Delete(keySession(d)); err != nil {
		return err
	}
	if err := t.Delete(keySessionOf(rec.Person.Principal(), rec.Person.Session)); err != nil {
		return err
	}
	return appendEvent(t, audit.Event{
		Time: now, Type: audit.SessionEnded, Actor: why.actor, Reason: why.reason, Cause: why.cause, Correlation: why.correlation,
		Details: map[string]string{"session": string(rec.Person.Session), "person": rec.Person.Principal().String()},
	})
}

// SignOut ends the session of a person who has one.
func (m *Manager) SignOut(ctx context.Context, p broker.Person, reason string, correlation broker.CorrelationID) error {
	if p.Session == "" {
		return broker.Refuse(broker.ReasonInvalidArgument, "a token of the identity provider's is no session, and cannot be signed out here", "have the identity provider revoke it")
	}
	if err := broker.CheckText("reason", reason, broker.MaxReason); err != nil {
		return err
	}
	var d digest
	err := m.cfg.Store.View(ctx, func(r store.Reader) error {
		value, ok, err := r.Get(keySessionOf(p.Principal(), p.Session))
		if err != nil {
			return err
		}
		if !ok || len(value) != len(d) {
			return sessionOver()
		}
		d = digest(value)
		return nil
	})
	if err != nil {
		return storeRefusal(err)
	}
	_, err = m.end(ctx, []digest{d}, ending{actor: p.Principal().String(), cause: "signed_out", reason: reason, correlation: correlation})
	return err
}

// EndSessions ends all sessions of the person of that name, and says how many
// there were. Tokens of the identity provider's of before are over, too. Its
// caller has found out that actor may.
func (m *Manager) EndSessions(ctx context.Context, actor broker.Principal, person, reason string, correlation broker.CorrelationID) (int, error) {
	if person == "" || len(person) > broker.MaxPersonName {
		return 0, broker.Refuse(broker.ReasonInvalidArgument, "person is no name of a person", "give the name as it is in the evidence, without \"person:\"")
	}
	if err := broker.CheckText("reason", reason, broker.MaxReason); err != nil {
		return 0, err
	}
	why := ending{actor: actor.String(), cause: "ended", reason: reason, correlation: correlation}
	// Whatever comes of this, the sessions are ended as well.
	unwritten := storeRefusal(m.cutOff(ctx, broker.PersonPrincipal(person), why))
	total := 0
	for {
		found, err := m.sessionsOf(ctx, broker.PersonPrincipal(person))
		if err != nil {
			return total, storeRefusal(err)
		}
		if len(found) == 0 {
			return total, unwritten
		}
		n, err := m.end(ctx, found, why)
		total += n
		if err != nil {
			return total, err
		}
		if n == 0 {
			return total, unwritten // others are ending them
		}
	}
}

// end ends sessions. They are over at once, whether the store can be written or
// not; if it cannot, that is an error, and it is tried again.
func (m *Manager) end(ctx context.Context, which []digest, why ending) (int, error) {
	m.mu.Lock()
	for _, d := range which {
		if _, already := m.over[d]; !already {
			m.over[d] = ended{why, m.cfg.Late().Add(MaxSessionTTL)}
		}
	}
	m.signal()
	m.mu.Unlock()
	n, err := m.remove(context.WithoutCancel(ctx), which, func(digest) ending { return why })
	return n, storeRefusal(err)
}

// remove takes sessions out of the store, with evidence.
func (m *Manager) remove(ctx context.Context, which []digest, why func(digest) ending) (total int, err error) {
	const each = store.MaxOps/4 - 1 // a session takes a read, two deletions and an event
	for part := range slices.Chunk(which, each) {
		n := 0
		now := m.cfg.Now()
		err := m.cfg.Store.Update(ctx, func(t store.Txn) error {
			n = 0
			for _, d := range part {
				rec, ok, err := get(t, d)
				if err != nil {
					return err
				}
				if !ok {
					continue
				}
				if err := endIn(t, d, rec, now, why(d)); err != nil {
					return err
				}
				n++
			}
			return nil
		})
		if err != nil {
			return total, err
		}
		total += n
	}
	return total, nil
}

func (m *Manager) isOver(d digest) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	_, over := m.over[d]
	return over
}

// sweep takes what is over out of the store.
func (m *Manager) sweep(ctx context.Context) error {
	if err := m.sweepCuts(ctx); err != nil {
		return err
	}
	late := m.cfg.Late()
	m.mu.Lock()
	why := maps.Clone(m.over)
	m.mu.Unlock()
	which := slices.Collect(maps.Keys(why))
	err := m.cfg.Store.View(ctx, func(r store.Reader) error {
		which = slices.Collect(maps.Keys(why))
		from, to := store.Prefix(prefixSession)
		for e, err := range r.Scan(from, to) {
			if err != nil {
				return err
			}
			rec, err := decode(e.Value)
			if err != nil {
				return err
			}
			d, err := digestOfKey(e.Key)
			if err != nil {
				return err
			}
			if _, listed := why[d]; !listed && !late.Before(rec.ExpiresAt) {
				which = append(which, d)
			}
		}
		return nil
	})
	if err != nil || len(which) == 0 {
		return err
	}
	_, err = m.remove(ctx, which, func(d digest) ending {
		if e, listed := why[d]; listed {
			return e.ending
		}
		return ending{actor: actorBroker, cause: "expired"}
	})
	if err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for d := range why {
		delete(m.over, d) // the store says it now
	}
	return nil
}

// EndAll ends every session in a store that no broker serves from, and every
// token of before: one that came back from a backup has sessions that were
// signed out since, and does not know whose tokens were ended.
func EndAll(ctx context.Context, s store.Store, now time.Time) (int, error) {
	m := &Manager{cfg: Config{Store: s, Now: func() time.Time { return now }}}
	var which []digest
	err := s.View(ctx, func(r store.Reader) error {
		which = nil
		from, to := store.Prefix(prefixSession)
		for e, err := range r.Scan(from, to) {
			if err != nil {
				return err
			}
			d, err := digestOfKey(e.Key)
			if err != nil {
				return err
			}
			which = append(which, d)
		}
		return nil
	})
	if err == nil {
		err = s.Update(ctx, func(t store.Txn) error { return putCut(t, everybody, now) })
	}
	if err == nil {
		n, rerr := m.remove(ctx, which, func(digest) ending { return ending{actor: actorBroker, cause: string(broker.CauseRestored)} })
		if rerr == nil {
			return n, nil
		}
		err = rerr
	}
	return 0, fmt.Errorf("ending the sessions of a store: %w", err)
}
