package lease

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/cenkalti/backoff/v4"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/audit"
	"github.com/mayfly-security/mayfly/broker/failpoint"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/store"
)

// worker ends the leases of one provider. It reads the provider's part of the
// due index in the store, so that what must end needs no memory, survives a
// crash, and is held up by no other provider. It never gives up.
type worker struct {
	e        *Engine
	provider string

	poked chan struct{} // has room for one

	mu    sync.Mutex
	busy  map[broker.LeaseID]struct{} // in a batch now
	sleep time.Time                   // until when it sleeps; zero while it works
}

const (
	// idleSleep is the longest sleep: a bound for what a missed poke could cost.
	idleSleep = 10 * time.Second
	// troubleAfter is how many batches in a row must come to nothing before the
	// worker pauses; a single lease that cannot be ended stops no other.
	troubleAfter = 3
	// troublePause is the longest pause while a provider is in trouble.
	troublePause = 5 * time.Second
)

// startWorkers starts a worker for each provider of the epoch that has none.
// Those of providers that are gone stay: they have nothing to do.
func (e *Engine) startWorkers(ep *epoch) {
	e.workMu.Lock()
	defer e.workMu.Unlock()
	for name := range ep.providers {
		if e.workers[name] == nil {
			w := &worker{e: e, provider: name, poked: make(chan struct{}, 1), busy: map[broker.LeaseID]struct{}{}}
			e.workers[name] = w
			e.wg.Go(w.run)
		}
	}
}

// wake lets the provider's worker look at the due index now.
func (e *Engine) wake(provider string) { e.dueAt(provider, time.Time{}) }

// dueAt tells the provider's worker that something is due at an instant.
func (e *Engine) dueAt(provider string, at time.Time) {
	e.workMu.Lock()
	w := e.workers[provider]
	e.workMu.Unlock()
	if w == nil {
		return
	}
	w.mu.Lock()
	sooner := w.sleep.IsZero() || at.Before(w.sleep)
	w.mu.Unlock()
	if !sooner {
		return
	}
	select {
	case w.poked <- struct{}{}:
	default:
	}
}

// run looks for due leases and hands them out in batches until the engine closes.
func (w *worker) run() {
	e := w.e
	pause := newBackOff(min(e.cfg.RetryMin, troublePause), troublePause)
	failures := 0
	var batches sync.WaitGroup
	defer batches.Wait()
	results := make(chan error)
	running := 0
	var notBefore time.Time // set while the provider as a whole is in trouble
	for {
		limit, size := 1, 1
		if p, err := e.provider(w.provider); err == nil {
			limit, size = p.traits.Concurrency, p.traits.Batch
			p.release()
		}
		if failures >= troubleAfter {
			limit = 1 // one batch at a time finds out whether it is over
		}
		now := e.clock.now()
		next := now.Add(idleSleep)
		if running < limit && !now.Before(notBefore) {
			ids, upcoming, err := w.due(now, e.clock.late(), size)
			switch {
			case err != nil:
				e.log.Error("reading due leases", "provider", w.provider, "error", err)
				next = now.Add(pause.NextBackOff())
			case len(ids) > 0:
				running++
				batches.Go(func() {
					err := w.batch(ids)
					w.release(ids)
					select {
					case results <- err:
					case <-e.ctx.Done():
					}
				})
				continue
			case !upcoming.IsZero() && upcoming.Before(next):
				next = upcoming
			}
		} else if notBefore.After(now) && running == 0 {
			next = notBefore
		}

		w.mu.Lock()
		w.sleep = next
		w.mu.Unlock()
		timer := time.NewTimer(max(next.Sub(now), 0))
		select {
		case <-e.ctx.Done():
			timer.Stop()
			return
		case <-w.poked:
		case <-timer.C:
		case err := <-results:
			running--
			if err == nil {
				failures, notBefore = 0, time.Time{}
				pause.Reset()
			} else if failures++; failures >= troubleAfter {
				d := pause.NextBackOff()
				notBefore = e.clock.now().Add(d)
				e.log.Error("the provider is in trouble", "provider", w.provider, "failures", failures, "pause", d.String(), "error", err)
			}
		}
		timer.Stop()
		w.mu.Lock()
		w.sleep = time.Time{}
		w.mu.Unlock()
	}
}

func newBackOff(first, longest time.Duration) *backoff.ExponentialBackOff {
	return backoff.NewExponentialBackOff(
		backoff.WithInitialInterval(first),
		backoff.WithMaxInterval(longest),
		backoff.WithMaxElapsedTime(0), // the default gives up after 15 minutes
	)
}

// due returns the next leases that are due and in no batch, and marks them
// busy; or, if there are none, when the next one will be, by the engine's time.
//
// A lease ends by the later of both clocks. When to try again is a matter of
// the engine's time alone: a jump of the machine's clock forward must not take
// the pauses between tries away, and one back not stretch them.
func (w *worker) due(now, late time.Time, size int) (ids []broker.LeaseID, upcoming time.Time, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	err = w.e.store.View(w.e.ctx, func(r store.Reader) error {
		ids, upcoming = ids[:0], time.Time{}
		from, to := store.Prefix(prefixDueOf(w.provider))
		for entry, err := range r.Scan(from, to) {
			if err != nil {
				return err
			}
			at, err := timeOfKey(entry.Key, 2)
			if err != nil {
				return err
			}
			wait := at.Sub(now)
			if broker.LeaseState(entry.Value) == broker.LeaseActive {
				wait = at.Sub(late)
			}
			if wait > 0 {
				if soon := now.Add(wait); upcoming.IsZero() || soon.Before(upcoming) {
					upcoming = soon
				}
				if at.After(late) {
					return nil
				}
				continue
			}
			id := broker.LeaseID(lastPart(entry.Key))
			if _, busy := w.busy[id]; busy {
				continue
			}
			if ids = append(ids, id); len(ids) == size {
				return nil
			}
		}
		return nil
	})
	if err != nil {
		return nil, time.Time{}, err
	}
	for _, id := range ids {
		w.busy[id] = struct{}{}
	}
	return ids, upcoming, nil
}

func (w *worker) release(ids []broker.LeaseID) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, id := range ids {
		delete(w.busy, id)
	}
}

// batch brings each lease one step further. An error means that nothing came
// of it for any lease: the provider, or the store, may be in trouble as a whole.
func (w *worker) batch(ids []broker.LeaseID) error {
	e := w.e
	leases := make([]*leaseRecord, 0, len(ids))
	var ended []broker.LeaseID // due, and still active: their end has come
	err := e.store.View(e.ctx, func(r store.Reader) error {
		leases, ended = leases[:0], ended[:0]
		for _, id := range ids {
			l, err := mustLease(r, id)
			if err != nil {
				return err
			}
			leases = append(leases, l)
		}
		return nil
	})
	if err != nil {
		return err
	}
	var revoke, confirm []*leaseRecord
	for _, l := range leases {
		switch {
		case l.State == broker.LeaseMinting && e.isMinting(l.ID):
			if err := w.postpone(l, e.clock.now().Add(time.Second)); err != nil {
				return err
			}
		case l.State == broker.LeaseActive && l.diedByItself(e.clock.early()):
			// It has died by itself: if nothing is left of it, that was it.
			confirm = append(confirm, l)
		case l.State == broker.LeaseActive, l.State == broker.LeaseMinting:
			ended = append(ended, l.ID)
		case l.Progress == broker.ProgressNone:
			revoke = append(revoke, l)
		case l.State == broker.LeaseRevoking:
			confirm = append(confirm, l)
		}
	}
	if len(ended) > 0 {
		if err := w.endAtTTL(ended, leases); err != nil {
			return err
		}
		// They are due again at once, as revoking.
		defer e.wake(w.provider)
	}
	p, err := e.provider(w.provider)
	if err != nil {
		return err
	}
	defer p.release()
	return errors.Join(
		w.ask(p, revoke, "revoke", p.Revoke),
		w.ask(p, confirm, "confirm", p.Confirm),
	)
}

// diedByItself reports whether the credential has died by itself for certain.
func (l *leaseRecord) diedByItself(early time.Time) bool {
	return !l.DiesAt.IsZero() && !early.Before(l.DiesAt)
}

// endAtTTL moves leases whose end has come, and attempts that nobody runs any
// more, to revoking.
func (w *worker) endAtTTL(ids []broker.LeaseID, leases []*leaseRecord) error {
	byCause := map[broker.Cause][]broker.LeaseID{}
	for _, id := range ids {
		i := slices.IndexFunc(leases, func(l *leaseRecord) bool { return l.ID == id })
		cause := broker.CauseTTL
		if leases[i].State == broker.LeaseMinting {
			cause = broker.CauseMintFailed
		}
		byCause[cause] = append(byCause[cause], id)
	}
	for cause, ids := range byCause {
		why := ending{cause: cause, actor: audit.Broker, refund: cause == broker.CauseMintFailed}
		if _, err := w.e.endLeases(w.e.ctx, ids, why); err != nil {
			return err
		}
	}
	return nil
}

func (w *worker) postpone(l *leaseRecord, at time.Time) error {
	return w.e.update(w.e.ctx, w.e.clock.now(), func(t store.Txn) error {
		l, err := mustLease(t, l.ID)
		if err != nil || l.State.Ended() {
			return err
		}
		return moveDue(t, l, at)
	})
}

// ask has the provider end, or look at, some leases, and writes what it says.
func (w *worker) ask(p *openProvider, leases []*leaseRecord, what string, call func(context.Context, []providers.Ending) []providers.Death) error {
	if len(leases) == 0 {
		return nil
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
	start := time.Now()
	failpoint.At("lease.end.ask")
	deaths := safely(ctx, endings, call)
	failpoint.At("lease.end.answer")
	cancel()
	if len(deaths) != len(endings) {
		return fmt.Errorf("provider %s was asked to %s %d leases and answered for %d", w.provider, what, len(endings), len(deaths))
	}
	var trouble error // the first failure
	progress := false
	for i, d := range deaths {
		if d.Err == nil || d.Progress != broker.ProgressNone && d.Progress != leases[i].Progress {
			progress = true
		} else if trouble == nil {
			trouble = d.Err
		}
	}
	e.metrics.ended(w.provider, what, time.Since(start), trouble)
	var failed error
	if !progress {
		failed = fmt.Errorf("asking to %s %d leases: %w", what, len(endings), trouble)
	}
	for i := 0; i < len(leases); i += chunk {
		n := min(i+chunk, len(leases))
		if err := w.write(leases[i:n], deaths[i:n], unsettled[i:n], early); err != nil {
			failed = errors.Join(failed, err)
		}
	}
	failpoint.At("lease.end.written")
	e.watch.signal()
	return failed
}

// safely calls the provider and turns a panic into a failure of each lease.
func safely(ctx context.Context, endings []providers.Ending, call func(context.Context, []providers.Ending) []providers.Death) (deaths []providers.Death) {
	defer func() {
		if r := recover(); r != nil {
			deaths = make([]providers.Death, len(endings))
			for i := range deaths {
				deaths[i].Err = fmt.Errorf("the provider panicked: %v", r)
			}
		}
	}()
	return call(ctx, endings)
}

// unsettled reports whether something of the attempt to mint may still appear
// at the provider: its outcome is not known, and there is time left for it.
func (e *Engine) unsettled(l *leaseRecord, early time.Time) bool {
	return l.State == broker.LeaseRevoking && l.ActiveAt.IsZero() && !l.MintDone &&
		(early.Before(l.Settles) || e.isMinting(l.ID))
}

// write brings the leases to where the provider says that they are. unsettled
// and early are of the moment before it was asked.
func (w *worker) write(leases []*leaseRecord, deaths []providers.Death, unsettled []bool, early time.Time) error {
	e := w.e
	now := e.clock.now()
	return e.update(e.ctx, now, func(t store.Txn) error {
		for i, was := range leases {
			l, err := mustLease(t, was.ID)
			if err != nil {
				return err
			}
			if l.State.Ended() {
				continue
			}
			if err := w.step(t, l, deaths[i], unsettled[i], now, early); err != nil {
				return err
			}
		}
		return nil
	})
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

	if d.Err != nil {
		e.log.Warn("ending a lease", "lease", l.ID, "provider", l.Provider, "attempts", l.Attempts+1, "error", d.Err)
	}
	at := d.RetryAt
	if !at.After(now) || d.Err != nil { // not said, or past by the engine's time and not by the provider's
		at = now.Add(e.retryAfter(l.Attempts))
		l.Attempts++
	}
	if d.Progress != l.Progress {
		l.Progress = d.Progress
		if err := appendEvent(t, l.progressEvent(now)); err != nil {
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

// retryAfter is the pause before the next try to end a lease that attempts
// tries did not end.
func (e *Engine) retryAfter(attempts int) time.Duration {
	b := newBackOff(e.cfg.RetryMin, e.cfg.RetryMax)
	d := b.NextBackOff()
	for range min(attempts, 20) {
		d = b.NextBackOff()
	}
	return d
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
