package lease

import (
	"math/rand/v2"
	"sync"
	"time"

	"github.com/mayfly-security/mayfly/broker"
)

// worker ends the leases of one provider. It reads the provider's part of the
// due index in the store, so that what must end needs no memory, survives a
// crash, and is held up by no other provider. It never gives up.
//
// While a provider answers nobody, small batches find out when it is back;
// then everything that is due is ended at full speed. Leases that fail again
// and again, of a database behind the provider that hangs, say, have a bounded
// share of the calls, so that they keep no others waiting.
type worker struct {
	e        *Engine
	provider string
	gate     *gate

	poked chan struct{} // has room for one

	mu      sync.Mutex
	sleep   time.Time // until when it sleeps; zero while it works
	busy    map[broker.LeaseID]struct{}
	failing map[broker.LeaseID]failing   // those whose last try failed
	tools   map[string]int               // by tool: batches in a row that came to nothing for it
	soon    map[broker.LeaseID]struct{}  // to be tried now, whenever they are due
	later   map[broker.LeaseID]time.Time // to be left alone until then, whenever they are due
	untold  map[broker.LeaseID]told      // what the provider said and the store could not be told
	doomed  map[broker.LeaseID]ending    // to be ended although the store could not be told

	// Of the loop alone.
	trouble trouble
	running [kinds]int
	fresh   bool      // the last batch was of leases that had not failed
	hold    time.Time // no batch begins before
	tell    time.Time // the store is told no sooner
}

// failing is a lease whose last try failed.
type failing struct {
	tool     string
	attempts int
}

// kind is one of the kinds of work that a worker does at a time.
type kind int

const (
	firstTry kind = iota // ending leases that have not failed
	retry                // ending leases that have
	moving               // telling the store of those whose end has come, while the provider is in trouble
	telling              // telling the store what it could not be told
	kinds
)

const (
	// idleSleep is the longest sleep: a bound for what a missed poke could cost.
	idleSleep = 10 * time.Second
	// moved is the most leases that are moved to revoking at once.
	moved = 8 * chunk
	// crowdedPause is the pause between calls once very many were left behind.
	crowdedPause = time.Minute
	// tellPause is the pause between tries to tell the store.
	tellPause = time.Second
)

// done is a piece of work that is over.
type done struct {
	kind  kind
	spell int
	outcome
}

// startWorkers starts a worker for each provider of the epoch that has none.
// Those of providers that are gone stay: they have nothing to do.
func (e *Engine) startWorkers(ep *epoch) {
	e.workMu.Lock()
	defer e.workMu.Unlock()
	for name := range ep.providers {
		if e.workers[name] == nil {
			w := newWorker(e, name)
			e.workers[name] = w
			e.wg.Go(w.run)
		}
	}
}

func newWorker(e *Engine, provider string) *worker {
	return &worker{
		e: e, provider: provider, gate: e.gate(provider), poked: make(chan struct{}, 1),
		busy:    map[broker.LeaseID]struct{}{},
		failing: map[broker.LeaseID]failing{},
		tools:   map[string]int{},
		soon:    map[broker.LeaseID]struct{}{},
		later:   map[broker.LeaseID]time.Time{},
		untold:  map[broker.LeaseID]told{},
		doomed:  map[broker.LeaseID]ending{},
	}
}

// wake lets the provider's worker look at the due index now.
func (e *Engine) wake(provider string) { e.dueAt(provider, time.Time{}) }

// dueAt tells the provider's worker that something is due at an instant.
func (e *Engine) dueAt(provider string, at time.Time) {
	w := e.worker(provider)
	if w == nil {
		return
	}
	w.mu.Lock()
	sooner := w.sleep.IsZero() || at.Before(w.sleep)
	w.mu.Unlock()
	if sooner {
		w.poke()
	}
}

func (e *Engine) worker(provider string) *worker {
	e.workMu.Lock()
	defer e.workMu.Unlock()
	return e.workers[provider]
}

func (w *worker) poke() {
	select {
	case w.poked <- struct{}{}:
	default:
	}
}

// run looks for due leases and hands them out in batches until the engine closes.
func (w *worker) run() {
	e := w.e
	var batches sync.WaitGroup
	defer batches.Wait()
	results := make(chan done)
	start := func(k kind, work func() outcome) {
		w.running[k]++
		d := done{kind: k, spell: w.trouble.spell}
		batches.Go(func() {
			d.outcome = work()
			select {
			case results <- d:
			case <-e.ctx.Done():
			}
		})
	}
	for {
		now := e.clock.now()
		next := now.Add(idleSleep)
		if w.mustTell() && w.running[telling] == 0 {
			if now.Before(w.tell) {
				next = earlier(next, w.tell)
			} else {
				start(telling, w.tellStore)
			}
		}
		want := w.wants(now)
		p, err := w.due(now, e.clock.late(), want)
		if err != nil {
			e.log.Error("reading due leases", "provider", w.provider, "error", err)
			next = earlier(next, now.Add(tellPause))
		}
		for k, ids := range p.ids {
			if len(ids) == 0 {
				continue
			}
			if kind(k) != moving {
				w.fresh = kind(k) == firstTry
			}
			start(kind(k), func() outcome {
				defer w.release(ids)
				if kind(k) == moving {
					return w.move(ids)
				}
				return w.batch(ids)
			})
		}
		if p.any() {
			continue
		}
		if !p.upcoming.IsZero() {
			next = earlier(next, p.upcoming)
		}
		for _, until := range []time.Time{w.trouble.until, w.trouble.again, w.hold} {
			if until.After(now) {
				next = earlier(next, until)
			}
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
		case d := <-results:
			w.running[d.kind]--
			w.judge(d)
		}
		timer.Stop()
		w.mu.Lock()
		w.sleep = time.Time{}
		w.mu.Unlock()
	}
}

// want is how much work of each kind may begin now.
type want struct {
	room [kinds]int // 1: a batch may begin
	size int        // the most leases of a batch
	one  bool       // first or again, and not both
}

// wants decides what may begin. A provider that is away is asked for one batch
// at a time. While it is not, the failing have at least one call and at most a
// quarter of them; where there is only one, they take turns.
func (w *worker) wants(now time.Time) want {
	limit, size := 1, 1
	if p, err := w.e.provider(w.provider); err == nil {
		limit, size = p.traits.Concurrency, p.traits.Batch
		p.release()
	}
	asked := w.running[firstTry] + w.running[retry]
	wants := want{size: size}
	if w.trouble.in() && w.running[moving] == 0 && !now.Before(w.tell) {
		wants.room[moving] = 1
	}
	if now.Before(w.hold) {
		return wants
	}
	switch {
	case w.trouble.in():
		wants.size = min(size, probeSize)
		if (w.trouble.away || limit == 1) && asked > 0 {
			break
		}
		wants.one = w.trouble.away || limit == 1
		if w.running[firstTry] == 0 && !now.Before(w.trouble.until) {
			wants.room[firstTry] = 1
		}
		if w.running[retry] == 0 && !now.Before(w.trouble.again) {
			wants.room[retry] = 1
		}
	case asked < limit:
		wants.room[firstTry] = 1
		if w.running[retry] < max(1, limit/4) {
			wants.room[retry] = 1
		}
		wants.one = limit-asked == 1
	}
	return wants
}

// judge draws what follows for the worker from a piece of work that is over.
func (w *worker) judge(d done) {
	e := w.e
	now := e.clock.now()
	if d.store != nil {
		e.log.Error("telling the store of leases that end", "provider", w.provider, "error", d.store)
		w.tell = now.Add(tellPause)
	}
	if d.kind != firstTry && d.kind != retry {
		return
	}
	if d.left && w.gate.crowded(w.limit()) {
		w.hold = now.Add(crowdedPause)
	}
	switch {
	case d.away != nil, d.failed != nil:
		pause := min(2*e.cfg.RetryMin, troubleFirst)
		if w.trouble.failed(d.away != nil, d.kind == firstTry, d.spell, pause, now, rand.Float64()) {
			w.gate.endsNothing(now)
			err := d.away
			if err == nil {
				err = d.failed
			}
			e.log.Error("the provider is in trouble: its leases are ended when it is back", "provider", w.provider, "away", d.away != nil, "error", err)
		}
	case d.answered:
		over, wasAway := w.trouble.ended(d.spell)
		if over {
			e.log.Info("the provider ends leases again", "provider", w.provider)
			w.gate.endsAgain(now)
		}
		if wasAway {
			w.pullAll() // of one that hung, it is not known which leases it hung for
		}
	}
}

func (w *worker) limit() int {
	p, err := w.e.provider(w.provider)
	if err != nil {
		return 1
	}
	defer p.release()
	return p.traits.Concurrency
}
