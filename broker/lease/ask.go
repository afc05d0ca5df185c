package lease

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/cenkalti/backoff/v4"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/audit"
	"github.com/mayfly-security/mayfly/broker/failpoint"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/store"
)

// What a call to a provider is, for metrics and logs.
const (
	callMint    = "mint"
	callRevoke  = "revoke"
	callConfirm = "confirm"
	callCutOff  = "cut_off"
)

// outcome is what came of a batch.
type outcome struct {
	answered bool  // the provider said of a lease how far its ending has come
	failed   error // nothing came of it for any lease
	away     error // the provider answers nobody
	left     bool  // a call was left behind
	store    error // the store could not be read or told
}

func (o outcome) and(p outcome) outcome {
	if o.failed == nil || p.answered {
		o.failed = p.failed
	}
	if o.away == nil {
		o.away = p.away
	}
	o.answered, o.left, o.store = o.answered || p.answered, o.left || p.left, errors.Join(o.store, p.store)
	if o.answered {
		o.failed = nil
	}
	return o
}

// batch brings each lease one step further.
func (w *worker) batch(ids []broker.LeaseID) (o outcome) {
	e := w.e
	leases, err := w.read(ids)
	if err != nil {
		return outcome{store: err}
	}
	var revoke, confirm, ended []*leaseRecord
	for _, l := range leases {
		_, doomed := w.doom(l.ID)
		switch {
		case l.State.Ended():
			w.forget(l.ID)
		case l.State == broker.LeaseMinting && e.isMinting(l.ID) && !doomed:
			w.postpone(l.ID, time.Second)
		case l.State == broker.LeaseActive && !doomed && l.diedByItself(e.clock.early()):
			// It has died by itself: if nothing is left of it, that was it.
			confirm = append(confirm, l)
		case l.State != broker.LeaseRevoking && !doomed:
			ended = append(ended, l)
		case l.Progress == broker.ProgressNone:
			revoke = append(revoke, l)
		default:
			confirm = append(confirm, l)
		}
	}
	if len(ended) > 0 {
		if o.store = w.endAtTTL(ended); o.store == nil {
			// They are due again at once, as revoking.
			defer e.wake(w.provider)
		} else {
			// What ends does not wait for the store.
			for _, l := range ended {
				w.doomLater(l.ID, endingOf(l))
			}
			revoke = append(revoke, ended...)
		}
	}
	if len(revoke)+len(confirm) == 0 {
		return o
	}
	p, err := e.provider(w.provider)
	if err != nil {
		o.failed = err
		return o
	}
	defer p.release()
	return o.and(w.ask(p, revoke, callRevoke, p.Revoke)).and(w.ask(p, confirm, callConfirm, p.Confirm))
}

// read reads leases, with what is known of them and the store could not be told.
func (w *worker) read(ids []broker.LeaseID) (leases []*leaseRecord, err error) {
	var missing []broker.LeaseID
	err = w.e.store.View(w.e.ctx, func(r store.Reader) error {
		leases, missing = make([]*leaseRecord, 0, len(ids)), nil
		for _, id := range ids {
			l, ok, err := get[leaseRecord](r, keyLease(id))
			if err != nil {
				return err
			}
			if !ok {
				missing = append(missing, id)
				continue
			}
			leases = append(leases, &l)
		}
		return nil
	})
	for _, id := range missing {
		w.forget(id)
		w.postpone(id, time.Minute)
		w.e.log.Error("a lease is due and has no record", "lease", id, "provider", w.provider)
	}
	for _, l := range leases {
		w.overlay(l)
	}
	return leases, err
}

// move tells the store of leases whose end has come, while the provider cannot
// be asked to end them.
func (w *worker) move(ids []broker.LeaseID) (o outcome) {
	leases, err := w.read(ids)
	if err != nil {
		return outcome{store: err}
	}
	var ended []*leaseRecord
	for _, l := range leases {
		switch {
		case l.State.Ended(), l.State == broker.LeaseRevoking:
		case l.State == broker.LeaseMinting && w.e.isMinting(l.ID):
			w.postpone(l.ID, time.Second)
		default:
			ended = append(ended, l)
		}
	}
	return outcome{store: w.endAtTTL(ended)}
}

// diedByItself reports whether the credential has died by itself for certain.
func (l *leaseRecord) diedByItself(early time.Time) bool {
	return !l.DiesAt.IsZero() && !early.Before(l.DiesAt)
}

// endingOf says why a lease ends that nobody ended: its end has come, or it is
// an attempt that nobody runs any more.
func endingOf(l *leaseRecord) ending {
	if l.State == broker.LeaseMinting {
		return ending{cause: broker.CauseMintFailed, actor: audit.Broker, refund: true}
	}
	return ending{cause: broker.CauseTTL, actor: audit.Broker}
}

// endAtTTL moves leases whose end has come, and attempts that nobody runs any
// more, to revoking.
func (w *worker) endAtTTL(leases []*leaseRecord) error {
	byWhy := map[ending][]broker.LeaseID{}
	for _, l := range leases {
		why := endingOf(l)
		byWhy[why] = append(byWhy[why], l.ID)
	}
	for why, ids := range byWhy {
		if _, err := w.e.endLeases(w.e.ctx, ids, why); err != nil {
			return err
		}
	}
	return nil
}

// ask has the provider end, or look at, some leases, and writes what it says.
func (w *worker) ask(p *openProvider, leases []*leaseRecord, what string, call func(context.Context, []providers.Ending) []providers.Death) (o outcome) {
	if len(leases) == 0 {
		return o
	}
	e := w.e
	endings := make([]providers.Ending, len(leases))
	for i, l := range leases {
		endings[i] = l.ending()
	}
	// What the answer is worth is decided by what was known before the provider
	// looked: an attempt that comes back meanwhile may have made something
	// after the look.
	early := e.clock.early()
	unsettled := make([]bool, len(leases))
	for i, l := range leases {
		unsettled[i] = e.unsettled(l, early)
	}
	ctx, cancel := context.WithTimeout(e.ctx, p.traits.RevokeTimeout)
	defer cancel()
	start := time.Now()
	failpoint.At("lease.end.ask")
	deaths, err := called(ctx, w.gate, p, what, func(ctx context.Context) ([]providers.Death, error) {
		return call(ctx, endings), nil
	}, nil)
	failpoint.At("lease.end.answer")
	if err == nil && len(deaths) != len(endings) {
		err = fmt.Errorf("provider %s was asked to %s %d leases and answered for %d", w.provider, what, len(endings), len(deaths))
	}
	if err != nil {
		deaths = make([]providers.Death, len(leases))
		for i := range deaths {
			deaths[i].Err = err
		}
	}
	o = w.account(leases, deaths)
	o.left = errors.Is(err, errLeft)
	trouble := errors.Join(o.failed, o.away)
	e.metrics.ended(w.provider, what, time.Since(start), trouble)
	if o.failed != nil {
		o.failed = fmt.Errorf("asking to %s %d leases: %w", what, len(endings), o.failed)
	}
	var tell []told
	for i, d := range deaths {
		if !errors.Is(d.Err, providers.ErrAway) || progressed(leases[i], d) {
			tell = append(tell, told{lease: leases[i].ID, death: d, unsettled: unsettled[i], early: early})
		}
	}
	for part := range slices.Chunk(tell, tellChunk) {
		if err := w.write(part); err != nil {
			o.store = errors.Join(o.store, err)
			w.keep(part)
		}
	}
	failpoint.At("lease.end.written")
	e.watch.signal()
	return o
}

func progressed(l *leaseRecord, d providers.Death) bool {
	return d.Lapsed || d.Progress != broker.ProgressNone && d.Progress != l.Progress
}

// account remembers which leases, and which tools, fail.
func (w *worker) account(leases []*leaseRecord, deaths []providers.Death) (o outcome) {
	w.mu.Lock()
	defer w.mu.Unlock()
	well := map[string]bool{} // by tool: something came of it for one of its leases
	for i, d := range deaths {
		l := leases[i]
		switch {
		case d.Err == nil || progressed(l, d):
			o.answered = o.answered || d.Progress != broker.ProgressNone || d.Lapsed
			well[l.Tool] = true
			delete(w.failing, l.ID)
		case errors.Is(d.Err, providers.ErrAway): // it says nothing of the lease
		default:
			if !well[l.Tool] {
				well[l.Tool] = false // it is in the map
			}
			w.failing[l.ID] = failing{tool: l.Tool, attempts: w.failing[l.ID].attempts + 1}
		}
		if d.Err != nil && o.failed == nil {
			o.failed = d.Err
		}
		if o.away == nil && errors.Is(d.Err, providers.ErrAway) {
			o.away = d.Err
		}
	}
	for tool, is := range well {
		switch {
		case !is:
			w.tools[tool]++
		case w.tools[tool] >= troubleAfter:
			// Its pauses grew while it was in trouble.
			for id, f := range w.failing {
				if f.tool == tool {
					w.pull(id)
				}
			}
			fallthrough
		default:
			delete(w.tools, tool)
		}
		if is {
			o.failed = nil
		}
	}
	if o.away != nil {
		o.answered, o.failed = false, nil
	}
	return o
}

// unsettled reports whether something of the attempt to mint may still appear
// at the provider: its outcome is not known, and there is time left for it.
func (e *Engine) unsettled(l *leaseRecord, early time.Time) bool {
	return !l.State.Ended() && l.ActiveAt.IsZero() && !l.MintDone &&
		(early.Before(l.Settles) || e.isMinting(l.ID))
}

// write brings leases to where the provider says that they are.
func (w *worker) write(said []told) error {
	why := make([]ending, len(said))
	doomed := make([]bool, len(said))
	for i, s := range said {
		why[i], doomed[i] = w.doom(s.lease)
	}
	now := w.e.clock.now()
	err := w.e.update(w.e.ctx, now, func(t store.Txn) error {
		for i, s := range said {
			l, ok, err := get[leaseRecord](t, keyLease(s.lease))
			if err != nil {
				return err
			}
			if !ok || l.State.Ended() {
				continue
			}
			if doomed[i] {
				if err := why[i].begin(t, &l, now); err != nil {
					return err
				}
			}
			if err := w.step(t, &l, s.death, s.unsettled, now, s.early); err != nil {
				return err
			}
		}
		return nil
	})
	if err == nil {
		w.written(said)
	}
	return err
}

// step is what one Death means for one lease.
func (w *worker) step(t store.Txn, l *leaseRecord, d providers.Death, unsettled bool, now, early time.Time) error {
	e := w.e
	over := d.Lapsed || d.Progress == broker.ProgressVerified
	dead := over && !d.Lapsed // who says both is believed the less

	switch {
	case over && unsettled:
		// Something may have appeared after the provider looked. Dead is only
		// believed when nothing can come any more.
		at := now.Add(e.retryAfter(l.Attempts))
		if l.Settles.After(now) && l.Settles.Before(at) && !e.isMinting(l.ID) {
			at = l.Settles
		}
		l.Attempts++
		return moveDue(t, l, at)
	case d.Lapsed && l.State == broker.LeaseRevoking:
		return w.lapsed(t, l, d, now)
	case dead && l.State == broker.LeaseActive:
		l.Left, l.Cause = leftOf(d), broker.CauseTTL
		return finish(t, l, now, broker.LeaseExpired, e.cfg.Retention, nil)
	case dead:
		state := broker.LeaseRevoked
		if l.diedByItself(early) {
			state = broker.LeaseExpired
		}
		e.metrics.died(l.Provider, now.Sub(l.End))
		l.Left = leftOf(d)
		return finish(t, l, now, state, e.cfg.Retention, nil)
	case l.State == broker.LeaseActive:
		// It should have died by itself, and something is left: end it.
		return startRevoking(t, l, now, ending{cause: broker.CauseTTL, actor: audit.Broker})
	}

	away := errors.Is(d.Err, providers.ErrAway)
	if d.Err != nil && !away {
		e.log.Warn("ending a lease", "lease", l.ID, "provider", l.Provider, "attempts", l.Attempts+1, "error", d.Err)
	}
	at := d.RetryAt
	switch {
	case away:
		at = l.Due // it is asked for when the provider is back
	case !at.After(now) || d.Err != nil: // not said, or past by the engine's time and not by the provider's
		at = now.Add(e.retryAfter(l.Attempts))
		l.Attempts++
	}
	// A failure takes nothing back of what the provider said before.
	if d.Progress != l.Progress && (d.Err == nil || d.Progress != broker.ProgressNone) {
		l.Progress = d.Progress
		if err := appendEvent(t, l.progressEvent(now)); err != nil {
			return err
		}
	}
	if l.State == broker.LeaseRevoking {
		if err := t.Put(keyRevoking(l.End, l.ID), []byte(waitsFor(l, d))); err != nil {
			return err
		}
	}
	return moveDue(t, l, at)
}

// leftOf is what a provider says of what is left, fit for the evidence.
func leftOf(d providers.Death) string { return broker.Clean(broker.Shorten(d.Left, maxLeft)) }

// lapsed ends a lease of which nothing can be ended: nobody says that it is dead.
func (w *worker) lapsed(t store.Txn, l *leaseRecord, d providers.Death, now time.Time) error {
	if d.Progress != broker.ProgressNone && d.Progress != broker.ProgressVerified {
		l.Progress = d.Progress
	}
	l.Left = leftOf(d)
	details := lastKnown(l)
	details["why"] = "the provider can do nothing to end it"
	if l.Static {
		details["why"] = "static: the secret was there before the lease, and only a rotation ends it"
	}
	if l.Left != "" {
		details["left"] = l.Left
	}
	return lapse(t, l, now, w.e.cfg.Retention, ending{}, details)
}

func (l *leaseRecord) progressEvent(now time.Time) audit.Event {
	ev := l.event(now, audit.LeaseProgressed)
	if ev.Details == nil {
		ev.Details = map[string]string{}
	}
	ev.Details["progress"] = string(l.Progress)
	return ev
}

func newBackOff(first, longest time.Duration) *backoff.ExponentialBackOff {
	return backoff.NewExponentialBackOff(
		backoff.WithInitialInterval(first),
		backoff.WithMaxInterval(longest),
		backoff.WithMaxElapsedTime(0), // the default gives up after 15 minutes
	)
}

// retryAfter is the pause before the next try to end a lease that attempts
// tries did not end.
func (e *Engine) retryAfter(attempts int) time.Duration {
	b := newBackOff(e.cfg.RetryMin, e.cfg.RetryMax)
	d := b.NextBackOff()
	for range min(attempts, 20) {
		d = b.NextBackOff()
	}
	return min(d, e.cfg.RetryMax)
}

// recoverMints ends the attempts that an earlier run left: nobody carries them
// through any more, and what they may have made is to be found and ended.
func (e *Engine) recoverMints(ctx context.Context) error {
	var ids []broker.LeaseID
	err := e.store.View(ctx, func(r store.Reader) error {
		ids = ids[:0]
		from, to := store.Prefix(prefixDue)
		for entry, err := range r.Scan(from, to) {
			if err != nil {
				return err
			}
			if broker.LeaseState(entry.Value) == broker.LeaseMinting {
				ids = append(ids, broker.LeaseID(lastPart(entry.Key)))
			}
		}
		return nil
	})
	if err != nil || len(ids) == 0 {
		return err
	}
	e.log.Info("ending attempts to mint that a stop interrupted", "leases", len(ids))
	_, err = e.endLeases(ctx, ids, ending{cause: broker.CauseRestarted, actor: audit.Broker, refund: true})
	return err
}
