package lease

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/audit"
	"github.com/mayfly-security/mayfly/broker/policy"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/store"
)

// A stray is something at a provider that bears the installation's name and
// that no lease answers for. What the store knows to be over is removed; what
// it does not know is left to an operator, for it may be of use to somebody.

// Why something is a stray.
const (
	StrayUnknown = "lease_unknown" // the store does not know the lease: an operator decides
	StrayEnded   = "lease_ended"   // the lease is over, and this was left, or came late: it is removed
	StrayExpired = "expired"       // the store does not know the lease, and this died by itself: it is removed
)

const (
	// maxStrays is how many strays of one provider are listed. What is beyond
	// is counted, and listed when there is room.
	maxStrays = 1000
	// maxStrayName is the longest name that is listed, in bytes. What the
	// broker makes is far shorter.
	maxStrayName = 255
	// strayChunk is how many strays one transaction moves: one takes up to six
	// operations.
	strayChunk = 16
)

// Stray is one of them as the store has it.
type Stray struct {
	Provider string
	Name     string         // as the system behind the provider has it
	Kind     string         // for people
	Lease    broker.LeaseID // that its name tells of; empty if that is none
	DiesAt   time.Time      // when it dies by itself; zero if it does not, or that is not known
	FoundAt  time.Time
	Why      string // StrayUnknown, StrayEnded or StrayExpired

	// EndedBy is the operator who decided that it is to be ended; empty while
	// nobody has.
	EndedBy     string               `json:",omitempty"`
	Reason      string               `json:",omitempty"` // the operator's
	Correlation broker.CorrelationID `json:",omitempty"`
}

func (s Stray) found() providers.Found {
	return providers.Found{Name: s.Name, Kind: s.Kind, Lease: s.Lease, DiesAt: s.DiesAt}
}

// event is the evidence of what happens to a stray; of its lease it says what
// the store knows.
func (s Stray) event(t store.Txn, now time.Time, what audit.Type) (audit.Event, error) {
	ev := audit.Event{Time: now, Type: what, Actor: audit.Broker, Provider: s.Provider, Lease: s.Lease, Cause: s.Why,
		Details: map[string]string{"name": broker.Clean(broker.Shorten(s.Name, maxStrayName)), "kind": s.Kind}}
	if !s.DiesAt.IsZero() {
		ev.Details["dies_at"] = s.DiesAt.Format(time.RFC3339)
	}
	if s.EndedBy != "" {
		ev.Actor, ev.Reason, ev.Correlation = s.EndedBy, s.Reason, s.Correlation
	}
	if s.Lease == "" {
		return ev, nil
	}
	l, ok, err := get[leaseRecord](t, keyLease(s.Lease))
	if ok {
		ev.Agent, ev.Tool, ev.Grant, ev.Incident = l.Agent.String(), l.Tool, l.Grant, l.Incident
	}
	return ev, err
}

// newStray takes over what a provider found. Text of others is bounded and
// cleaned; the name stays as it is, for it is what the thing is removed by.
func newStray(provider string, f providers.Found, now time.Time, why string) Stray {
	s := Stray{Provider: provider, Name: f.Name, Kind: broker.Clean(broker.Shorten(f.Kind, 64)), DiesAt: f.DiesAt.UTC(), FoundAt: now, Why: why}
	if f.DiesAt.IsZero() {
		s.DiesAt = time.Time{}
	}
	if id, err := broker.ParseLeaseID(string(f.Lease)); err == nil {
		s.Lease = id
	}
	return s
}

// listable reports whether a stray can be shown and named by people, and kept
// under its name.
func (s Stray) listable() bool {
	return s.Name != "" && len(s.Name) <= maxStrayName && broker.Clean(s.Name) == s.Name
}

// Strays lists the strays that are known of, by provider and name, to operators.
func (e *Engine) Strays(ctx context.Context, caller broker.Caller, after string, size int) (Page[Stray], error) {
	if _, err := e.administer(ctx, e.current.Load(), caller, policy.VerbStrays); err != nil {
		e.Refused(ctx, caller, "list_strays", "", err)
		return Page[Stray]{}, err
	}
	return page(ctx, e.store, prefixStray, after, size, func(r store.Reader, key string) (Stray, bool, error) {
		return get[Stray](r, key)
	})
}

// EndStray has a stray ended and removed, on an operator's word. The decision
// is durable, and is carried out for as long as it takes; EndStray waits a
// moment for it, and removed says whether it was.
func (e *Engine) EndStray(ctx context.Context, caller broker.Caller, provider, name, reason string) (s Stray, removed bool, err error) {
	s, removed, err = e.endStray(ctx, caller, provider, name, reason)
	if err != nil {
		e.Refused(ctx, caller, "end_stray", "", err)
	}
	return s, removed, err
}

func (e *Engine) endStray(ctx context.Context, caller broker.Caller, provider, name, reason string) (s Stray, removed bool, err error) {
	verdict, err := e.administer(ctx, e.current.Load(), caller, policy.VerbStrays)
	if err != nil {
		return s, false, err
	}
	if err := requireReason(reason, "ending a stray"); err != nil {
		return s, false, err
	}
	if len(provider) > 64 || strings.Contains(provider, "|") || !(Stray{Name: name}).listable() {
		return s, false, noStray(provider, name)
	}
	if err := e.hasInventory(provider); err != nil {
		return s, false, err
	}
	now := e.clock.now()
	key := keyStray(provider, name)
	err = e.update(ctx, now, func(t store.Txn) error {
		var ok bool
		if s, ok, err = get[Stray](t, key); err != nil {
			return err
		}
		if !ok {
			return noStray(provider, name)
		}
		answered, err := e.answeredFor(t, s.Lease)
		if err != nil {
			return err
		}
		if answered {
			return broker.Refusef(broker.ReasonConflict, "revoke the lease (`mayfly revoke`)",
				"it belongs to lease %s, which has not ended", s.Lease)
		}
		if s.EndedBy != "" {
			return nil // it is being ended; the first decision stands
		}
		s.EndedBy, s.Reason, s.Correlation = caller.Principal().String(), reason, caller.Correlation
		if err := put(t, key, s); err != nil {
			return err
		}
		ev, err := s.event(t, now, audit.StrayEnding)
		if err != nil {
			return err
		}
		ev.Details = tellVerdict(ev.Details, verdict)
		return appendEvent(t, ev)
	})
	if err != nil {
		return s, false, err
	}
	removed, err = e.awaitRemoval(ctx, provider, key)
	return s, removed, err
}

func noStray(provider, name string) *broker.Error {
	return broker.Refusef(broker.ReasonNotFound, "see `mayfly strays`; what is not there has been removed, or went by itself",
		"there is no stray %q of provider %q", broker.Clean(broker.Shorten(name, 100)), broker.Clean(broker.Shorten(provider, 64)))
}

// hasInventory refuses a provider at which nothing can be looked for.
func (e *Engine) hasInventory(provider string) error {
	p, err := e.provider(provider)
	if err != nil {
		return broker.Refusef(broker.ReasonNotFound, "put the provider back into the catalog, or end it at the provider by hand",
			"provider %s is not in the catalog", broker.Clean(broker.Shorten(provider, 64)))
	}
	defer p.release()
	if _, ok := p.Provider.(providers.Inventory); !ok {
		return broker.Refusef(broker.ReasonConflict, "end it at the provider by hand",
			"provider %s cannot list or remove what is there", provider)
	}
	return nil
}

// awaitRemoval waits, for at most the configured time, until a stray is gone.
func (e *Engine) awaitRemoval(ctx context.Context, provider, key string) (bool, error) {
	timer := time.NewTimer(e.cfg.EndWait)
	defer timer.Stop()
	e.pokeInventory(provider)
	for {
		changed := e.watch.next()
		there := false
		err := e.store.View(ctx, func(r store.Reader) (err error) {
			_, there, err = r.Get(key)
			return err
		})
		if err != nil || !there {
			return !there && err == nil, storeRefusal(err)
		}
		select {
		case <-changed:
		case <-timer.C:
			return false, nil
		case <-ctx.Done():
			return false, nil
		}
	}
}

// answers reports whether a lease answers for what bears its name: it has not
// ended, and its provider can be asked to end it. One without a handle is
// over, and nobody but the inventory can know what is there of it: that is so
// for what was being made when a backup was.
func (e *Engine) answers(l *leaseRecord) bool {
	return !l.State.Ended() && (l.State != broker.LeaseRevoking || l.Handle != nil || e.isMinting(l.ID))
}

// answeredFor reports whether the store has a lease that answers.
func (e *Engine) answeredFor(r getter, id broker.LeaseID) (bool, error) {
	if id == "" {
		return false, nil
	}
	l, ok, err := get[leaseRecord](r, keyLease(id))
	return ok && e.answers(&l), err
}

// judge says what the store knows of a thing that a provider listed: why it is
// a stray, or "" if it is none. began is when the provider was asked.
func (e *Engine) judge(r getter, s Stray, began, early time.Time) (why string, err error) {
	var l leaseRecord
	known := false
	if s.Lease != "" {
		if l, known, err = get[leaseRecord](r, keyLease(s.Lease)); err != nil {
			return "", err
		}
	}
	switch {
	case known && e.answers(&l):
		return "", nil
	case known && l.State == broker.LeaseLapsed && l.Static:
		return "", nil // it was there before the lease
	case known && l.State.Ended() && !l.EndedAt.Before(began):
		return "", nil // it ended while the provider was listing; the next look tells
	case known:
		return StrayEnded, nil
	case !s.DiesAt.IsZero() && !early.Before(s.DiesAt):
		return StrayExpired, nil
	}
	return StrayUnknown, nil
}

// note records strays, each once: evidence that it was found, and the record
// itself.
func (e *Engine) note(ctx context.Context, strays []Stray) error {
	for part := range slices.Chunk(strays, strayChunk) {
		now := e.clock.now()
		err := e.update(ctx, now, func(t store.Txn) error {
			for _, s := range part {
				if !s.listable() {
					continue // it cannot be kept under its name
				}
				key := keyStray(s.Provider, s.Name)
				was, ok, err := get[Stray](t, key)
				if err != nil {
					return err
				}
				if ok && was.Why == s.Why && was.DiesAt.Equal(s.DiesAt) {
					continue
				}
				if ok { // what is known of it has changed; that it is there is in the evidence
					was.Why, was.DiesAt = s.Why, s.DiesAt
					s = was
				} else if err := appendStray(t, s, now, audit.StrayFound, ""); err != nil {
					return err
				}
				if err := put(t, key, s); err != nil {
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

func appendStray(t store.Txn, s Stray, now time.Time, what audit.Type, how string) error {
	ev, err := s.event(t, now, what)
	if err != nil {
		return err
	}
	if how != "" {
		ev.Details["how"] = how
	}
	return appendEvent(t, ev)
}

// How a stray went, as the evidence says it.
const (
	howRemoved = "removed" // by the broker
	howGone    = "gone"    // it was not there any more
)

// resolve records that strays are gone. One that was never noted, for the
// store could not be written, is in the evidence as found and removed.
func (e *Engine) resolve(ctx context.Context, strays []Stray, how string) error {
	for part := range slices.Chunk(strays, strayChunk) {
		now := e.clock.now()
		err := e.update(ctx, now, func(t store.Txn) error {
			for _, s := range part {
				was, noted := s, false
				if s.listable() {
					var err error
					if was, noted, err = get[Stray](t, keyStray(s.Provider, s.Name)); err != nil {
						return err
					}
				}
				switch {
				case noted:
					s.EndedBy, s.Reason, s.Correlation = was.EndedBy, was.Reason, was.Correlation
					if err := t.Delete(keyStray(s.Provider, s.Name)); err != nil {
						return err
					}
				case how == howGone:
					continue // somebody else has resolved it
				default:
					if err := appendStray(t, s, now, audit.StrayFound, ""); err != nil {
						return err
					}
				}
				if err := appendStray(t, s, now, audit.StrayRemoved, how); err != nil {
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

// noted are the strays of a provider that the store has.
func (e *Engine) noted(ctx context.Context, provider string) (strays []Stray, err error) {
	err = e.store.View(ctx, func(r store.Reader) error {
		strays = strays[:0]
		for entry, err := range r.Scan(store.Prefix(prefixStraysOf(provider))) {
			if err != nil {
				return err
			}
			s, err := decode[Stray](entry.Key, entry.Value)
			if err != nil {
				return err
			}
			strays = append(strays, s)
		}
		return nil
	})
	return strays, err
}

// strayCounts are the strays that the store has, by provider.
func (e *Engine) strayCounts(ctx context.Context) (map[string]int, error) {
	counts := map[string]int{}
	err := e.store.View(ctx, func(r store.Reader) error {
		clear(counts)
		for entry, err := range r.Scan(store.Prefix(prefixStray)) {
			if err != nil {
				return err
			}
			provider, _, _ := strings.Cut(entry.Key[len(prefixStray):], "|")
			counts[provider]++
		}
		return nil
	})
	return counts, err
}

var errStuck = errors.New("the provider has not returned from the call before, although its time is over")

func stillThere(n int, first error) error {
	return fmt.Errorf("removing strays: %d are still there: %w", n, first)
}
