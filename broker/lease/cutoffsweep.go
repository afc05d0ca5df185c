package lease

import (
	"context"
	"errors"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/audit"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/store"
)

// carriers are the cut-offs that are being carried out in this process: one
// goroutine each, so that a provider that hangs holds nothing else up. The zero
// value is ready.
type carriers struct {
	mu  sync.Mutex
	now map[string]chan struct{} // by ID: pokes it
}

// carryOutNow begins to carry a cut-off out, or has whoever does look again.
func (e *Engine) carryOutNow(id string) { e.carryOut(id, true) }

// resumeCutOff goes on with a cut-off that an earlier run left.
func (e *Engine) resumeCutOff(id string) { e.carryOut(id, false) }

func (e *Engine) carryOut(id string, poke bool) {
	c := &e.carriers
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.now == nil {
		c.now = map[string]chan struct{}{}
	}
	if poked, running := c.now[id]; running {
		if poke {
			select {
			case poked <- struct{}{}:
			default:
			}
		}
		return
	}
	poked := make(chan struct{}, 1)
	c.now[id] = poked
	e.wg.Go(func() {
		for {
			e.carry(id, poked)
			c.mu.Lock()
			if len(poked) == 0 || e.ctx.Err() != nil {
				delete(c.now, id)
				c.mu.Unlock()
				return
			}
			<-poked // it was decided anew just as nothing was left to do
			c.mu.Unlock()
		}
	})
}

// carry carries a cut-off out until nothing is left to do. It never gives up
// before what was made until then is dead by itself.
func (e *Engine) carry(id string, poked <-chan struct{}) {
	pause := e.cfg.RetryMin
	for {
		wait, done, err := e.carryOn(e.ctx, id)
		if done || e.ctx.Err() != nil {
			return
		}
		if err == nil {
			pause = e.cfg.RetryMin
		} else {
			wait = pause
			pause = min(2*pause, e.cfg.RetryMax)
			e.log.Error("CUT-OFF: it did not come further, and is tried again", "cut_off", id, "error", err)
		}
		timer := time.NewTimer(max(wait, e.cfg.RetryMin))
		select {
		case <-e.ctx.Done():
		case <-poked:
			pause = e.cfg.RetryMin
		case <-timer.C:
		}
		timer.Stop()
	}
}

// carryOn takes a cut-off one step further, and says when to look again.
func (e *Engine) carryOn(ctx context.Context, id string) (wait time.Duration, done bool, err error) {
	var rec cutOffRecord
	var ok bool
	if b, begun := e.limbo.cutOff(id); begun {
		rec, ok = b.rec, true
	} else if err := e.view(ctx, func(r store.Reader) (err error) {
		rec, ok, err = get[cutOffRecord](r, keyCutOff(id))
		return err
	}); err != nil {
		return 0, false, err
	}
	if !ok || rec.done() {
		return 0, true, nil
	}
	p, able, err := e.cutter(e.current.Load(), rec.Provider)
	if err != nil {
		return 0, false, errors.Join(err, e.cutOffCame(ctx, id, rec, providers.Death{Err: err}))
	}
	defer p.release()
	// The leases are told beside it: what is written ends the sessions, and does
	// not wait for the store; what tells of them does not wait for the provider.
	told := make(chan error, 1)
	go func() { told <- e.endHit(ctx, id, able, rec) }()
	death := providers.Death{Progress: rec.Progress, RetryAt: e.clock.now().Add(e.cfg.RetryMin)}
	if rec.Progress != broker.ProgressVerified {
		death = e.askCutOff(ctx, p, able, rec)
	}
	err = errors.Join(death.Err, <-told, e.cutOffCame(ctx, id, rec, death))
	return death.RetryAt.Sub(e.clock.now()), false, err
}

// askCutOff has the provider cut off, under a time limit that does not trust it.
func (e *Engine) askCutOff(ctx context.Context, p *openProvider, able providers.CutOff, rec cutOffRecord) providers.Death {
	attempt, cancel := context.WithTimeout(ctx, p.traits.RevokeTimeout)
	defer cancel()
	death, err := called(attempt, e.gate(rec.Provider), p, callCutOff, func(ctx context.Context) (providers.Death, error) { return able.CutOff(ctx, rec.Cut), nil }, nil)
	if err != nil {
		return providers.Death{Err: err}
	}
	return death
}

// endHit ends the leases that a cut-off hits. Two looks that find none are
// needed: one that moved while it was looked for is met the second time. Those
// that are being made find the cut-off when they are to become active.
func (e *Engine) endHit(ctx context.Context, id string, able providers.CutOff, rec cutOffRecord) error {
	if rec.Told {
		return nil
	}
	for clean := 0; clean < 2; clean++ {
		hit, err := e.hitBy(ctx, able, rec)
		if err != nil {
			return err
		}
		maps.DeleteFunc(hit, func(_ broker.LeaseID, l *leaseRecord) bool { return l.State == broker.LeaseRevoking })
		if len(hit) > 0 {
			clean = -1
		}
		if _, err := e.endLeases(ctx, slices.Sorted(maps.Keys(hit)), rec.ending()); err != nil {
			return err
		}
	}
	return e.update(ctx, e.clock.now(), func(t store.Txn) error {
		is, ok, err := get[cutOffRecord](t, keyCutOff(id))
		if err != nil || !ok || is.Decision != rec.Decision {
			return err // it was decided anew, or could not be written yet
		}
		is.Told = true
		return e.putCutOff(t, id, is)
	})
}

// putCutOff writes a cut-off, and takes its sweep away once nothing is left to do.
func (e *Engine) putCutOff(t store.Txn, id string, rec cutOffRecord) error {
	if err := put(t, keyCutOff(id), rec); err != nil || !rec.done() {
		return err
	}
	return t.Delete(keySweep(sweepCutOff, id))
}

// steps tells how far a progress is, so that two can be compared.
func steps(p broker.Progress) int {
	return slices.Index([]broker.Progress{broker.ProgressNone, broker.ProgressRequested, broker.ProgressWritten, broker.ProgressVerified}, p)
}

// cutOffCame records what came of asking the provider, where it is news.
func (e *Engine) cutOffCame(ctx context.Context, id string, rec cutOffRecord, death providers.Death) error {
	now := e.clock.now()
	news := false
	err := e.update(ctx, now, func(t store.Txn) error {
		news = false
		is, ok, err := get[cutOffRecord](t, keyCutOff(id))
		if err != nil || !ok || is.Decision != rec.Decision || is.Progress == broker.ProgressVerified {
			return err
		}
		var what audit.Type
		details := map[string]string{}
		switch {
		case death.Err != nil && !is.Failing:
			is.Failing, what = true, audit.CutOffFailed
			details["failure"] = failureOf(death.Err)
		case death.Err != nil, steps(death.Progress) <= steps(is.Progress) && !is.Failing:
			return nil
		default:
			is.Failing = false
			if steps(death.Progress) > steps(is.Progress) {
				is.Progress = death.Progress
			}
			switch is.Progress {
			case broker.ProgressWritten:
				what = audit.CutOffWritten
			case broker.ProgressVerified:
				what = audit.CutOffVerified
				if death.Left != "" {
					details["left"] = broker.Clean(broker.Shorten(death.Left, maxLeft))
				}
			}
		}
		news = true
		if err := e.putCutOff(t, id, is); err != nil || what == "" {
			return err
		}
		ev := is.event(now, what, audit.Broker)
		maps.Copy(ev.Details, details)
		return appendEvent(t, ev)
	})
	if err == nil && news {
		e.watch.signal()
		if death.Progress == broker.ProgressVerified {
			e.log.Warn("CUT-OFF: it is verified", "provider", rec.Provider, "role", rec.Cut.Role, "made_before", rec.Cut.Before)
		}
	}
	return err
}

// failureOf is what the evidence says of a failure: never upstream text.
func failureOf(err error) string {
	var refusal *broker.Error
	switch {
	case errors.Is(err, providers.ErrAway):
		return "the provider is away"
	case errors.Is(err, errLeft):
		return "the provider does not answer"
	case asRefusal(err, &refusal):
		return broker.Clean(broker.Shorten(refusal.Message, maxLeft))
	}
	return "the provider failed, or refuses; the broker's log says why"
}

func asRefusal(err error, refusal **broker.Error) bool { return errors.As(err, refusal) }

// endCutOff takes a cut-off away that need not stand any more: whatever it was
// to end is dead by itself.
func (e *Engine) endCutOff(ctx context.Context, key, id string, now time.Time) error {
	early := e.clock.early()
	return e.update(ctx, now, func(t store.Txn) error {
		if err := t.Delete(key); err != nil {
			return err
		}
		rec, ok, err := get[cutOffRecord](t, keyCutOff(id))
		if err != nil || !ok || early.Before(rec.Cut.Until) {
			return err // another decision took it further, and has a key of its own
		}
		for _, key := range []string{keyCutOff(id), keySweep(sweepCutOff, id)} {
			if err := t.Delete(key); err != nil {
				return err
			}
		}
		ev := rec.event(now, audit.CutOffEnded, audit.Broker)
		ev.Details["progress"] = string(rec.Progress)
		return appendEvent(t, ev)
	})
}
