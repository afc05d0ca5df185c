package signin

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/audit"
	"github.com/mayfly-security/mayfly/store"
)

// A cut ends what somebody has of before: the identity provider's tokens, which
// are in no list here, and codes that wait to be redeemed. It is kept for as
// long as such a token would be taken.
//
//	sessioncut|principal   since when; principal is everybody for all
const (
	prefixCut = "sessioncut|"
	everybody = "*"

	// maxTokenAge is for how long after it was issued a token of the identity
	// provider's is taken, whatever it says itself: no longer than a session.
	maxTokenAge = MaxSessionTTL
	cutLife     = maxTokenAge + skew
)

// cutRecord is a cut as the store has it.
type cutRecord struct {
	Version int       `json:"v"`
	At      time.Time `json:"at"`
}

// cut is one that the store may not have yet.
type cut struct {
	ending
	at time.Time
}

func decodeCut(value []byte) (time.Time, error) {
	var c cutRecord
	if err := json.Unmarshal(value, &c); err != nil {
		return time.Time{}, fmt.Errorf("decoding the end of a person's sessions: %w", err)
	}
	if c.Version > recordVersion {
		return time.Time{}, fmt.Errorf("the end of a person's sessions has version %d, and this broker reads up to %d: it was written by a newer Mayfly", c.Version, recordVersion)
	}
	return c.At, nil
}

// cutOff ends what a person has of before now. It holds at once, whether the
// store can be written or not; if it cannot, that is an error, and it is tried again.
func (m *Manager) cutOff(ctx context.Context, p broker.Principal, why ending) error {
	c := cut{why, m.cfg.Now()}
	m.mu.Lock()
	m.cuts[p.String()] = c
	m.signal()
	m.mu.Unlock()
	err := m.writeCut(context.WithoutCancel(ctx), p.String(), c)
	if err == nil {
		m.dropCut(p.String(), c)
	}
	return err
}

func (m *Manager) writeCut(ctx context.Context, whose string, c cut) error {
	return m.cfg.Store.Update(ctx, func(t store.Txn) error {
		if err := putCut(t, whose, c.at); err != nil {
			return err
		}
		return appendEvent(t, audit.Event{
			Time: c.at, Type: audit.SessionEnded, Actor: c.actor, Reason: c.reason, Cause: c.cause, Correlation: c.correlation,
			Details: map[string]string{"person": whose, "tokens_issued_before": c.at.UTC().Format(time.RFC3339)},
		})
	})
}

func putCut(t store.Txn, whose string, at time.Time) error {
	value, err := json.Marshal(cutRecord{recordVersion, at})
	if err != nil {
		return fmt.Errorf("encoding the end of a person's sessions: %w", err)
	}
	return t.Put(prefixCut+whose, value)
}

// dropCut takes a cut out of memory that the store has.
func (m *Manager) dropCut(whose string, c cut) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.cuts[whose] == c {
		delete(m.cuts, whose)
	}
}

// cutAt is when a person's things were ended last; zero if that is forgotten,
// or never was.
func (m *Manager) cutAt(ctx context.Context, p broker.Principal) (last time.Time, err error) {
	m.mu.Lock()
	inMemory := m.cuts[p.String()].at
	m.mu.Unlock()
	err = m.cfg.Store.View(ctx, func(r store.Reader) error {
		last = inMemory
		for _, whose := range []string{p.String(), everybody} {
			value, ok, err := r.Get(prefixCut + whose)
			if err != nil {
				return err
			}
			if !ok {
				continue
			}
			at, err := decodeCut(value)
			if err != nil {
				return err
			}
			if at.After(last) {
				last = at
			}
		}
		return nil
	})
	return last, storeRefusal(err)
}

// current refuses a token that is older than a session may get, or that was
// issued before its person's sessions were ended. It says how long it is taken.
func (m *Manager) current(ctx context.Context, p broker.Person, until time.Time) (time.Time, error) {
	if oldest := p.IssuedAt.Add(maxTokenAge); oldest.Before(until) {
		until = oldest
	}
	if !m.cfg.Late().Before(until) {
		return until, broker.Refusef(broker.ReasonTokenInvalid, "get a new one of the identity provider",
			"the bearer token has expired, or was issued more than %d hours ago", int(maxTokenAge.Hours()))
	}
	at, err := m.cutAt(ctx, p.Principal())
	// The identity provider's clock may be ahead, and a token of before with it.
	if err == nil && !at.IsZero() && !p.IssuedAt.After(at.Add(skew)) {
		err = broker.Refuse(broker.ReasonTokenInvalid, "the bearer token was issued before all sessions of its person were ended",
			"sign in with `mayfly login`, or get a new token in a minute")
	}
	return until, err
}

// sweepCuts writes those that the store does not have, and takes out of it those
// that no token is old enough for.
func (m *Manager) sweepCuts(ctx context.Context) error {
	m.mu.Lock()
	cuts := maps.Clone(m.cuts)
	m.mu.Unlock()
	for whose, c := range cuts {
		if err := m.writeCut(ctx, whose, c); err != nil {
			return err
		}
		m.dropCut(whose, c)
	}
	now := m.cfg.Now()
	var over []string
	err := m.cfg.Store.View(ctx, func(r store.Reader) error {
		over = nil
		from, to := store.Prefix(prefixCut)
		for e, err := range r.Scan(from, to) {
			if err != nil {
				return err
			}
			at, err := decodeCut(e.Value)
			if err != nil {
				return err
			}
			if now.Sub(at) > cutLife {
				over = append(over, e.Key)
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, key := range over {
		err := m.cfg.Store.Update(ctx, func(t store.Txn) error {
			value, ok, err := t.Get(key)
			if err != nil || !ok {
				return err
			}
			if at, err := decodeCut(value); err != nil || now.Sub(at) <= cutLife {
				return err // it was made anew
			}
			return t.Delete(key)
		})
		if err != nil {
			return err
		}
	}
	return nil
}
