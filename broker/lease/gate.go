package lease

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/mayfly-security/mayfly/broker"
)

// gate stands before one provider: it bounds the attempts to mint that are
// under way there, refuses them while the provider is away, and counts the
// calls that it never answered. A provider's gate stays when the catalog is
// exchanged. No other provider's is affected by it.
type gate struct {
	provider string
	log      *slog.Logger
	metrics  *metrics

	mu      sync.Mutex
	mints   int             // under way, those left behind too
	queue   []chan struct{} // those who wait for a place, first come first
	breaker breaker
	left    map[string]int // calls left behind that have not returned, by what they are
	trouble time.Time      // since when its worker could end nothing; zero while it can
}

// gate returns the provider's.
func (e *Engine) gate(provider string) *gate {
	e.gateMu.Lock()
	defer e.gateMu.Unlock()
	g := e.gates[provider]
	if g == nil {
		g = &gate{provider: provider, log: e.log, metrics: e.metrics, left: map[string]int{}}
		e.gates[provider] = g
	}
	return g
}

// place is the right to one attempt.
type place struct {
	g     *gate
	most  int
	probe bool
	told  bool // what the attempt came to
}

// enter waits for at most wait for one of most places, and begins an attempt.
func (g *gate) enter(ctx context.Context, most int, wait time.Duration, now func() time.Time) (*place, error) {
	g.mu.Lock()
	if b := g.breaker; b.refuses(now()) {
		g.mu.Unlock()
		return nil, g.away(b)
	}
	g.mu.Unlock()
	if err := g.take(ctx, most, wait); err != nil {
		return nil, err
	}
	g.mu.Lock()
	ok, probe := g.breaker.begin(now())
	b := g.breaker
	g.mu.Unlock()
	if !ok { // it opened while this one waited
		g.give(most)
		return nil, g.away(b)
	}
	return &place{g: g, most: most, probe: probe}, nil
}

// ended tells what the attempt came to. Only the first word counts. A nil place
// is of an attempt that needs none.
func (p *place) ended(r result, err error, now time.Time) {
	if p == nil || p.told {
		return
	}
	p.told = true
	g := p.g
	g.mu.Lock()
	defer g.mu.Unlock()
	was := g.breaker.open()
	g.breaker.end(r, p.probe, now, rand.Float64())
	switch is := g.breaker.open(); {
	case is && !was:
		g.log.Error("the provider is away: nothing is given there", "provider", g.provider, "next", g.breaker.next, "error", err)
	case was && !is:
		g.log.Info("the provider mints again", "provider", g.provider)
	}
}

// leave gives the place to the next.
func (p *place) leave() {
	if p != nil {
		p.g.give(p.most)
	}
}

func (g *gate) take(ctx context.Context, most int, wait time.Duration) error {
	g.mu.Lock()
	if g.mints < most && len(g.queue) == 0 {
		g.mints++
		g.mu.Unlock()
		return nil
	}
	turn := make(chan struct{})
	g.queue = append(g.queue, turn)
	g.mu.Unlock()
	timer := time.NewTimer(wait)
	defer timer.Stop()
	var err error
	select {
	case <-turn:
		return nil
	case <-ctx.Done():
		err = ctx.Err()
	case <-timer.C:
		err = broker.Refusef(broker.ReasonProvider, "try again in a moment",
			"provider %s is busy: %d requests are under way there, which is the most at a time", g.provider, most)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	i := slices.Index(g.queue, turn)
	if i < 0 {
		return nil // the turn came at the same moment
	}
	g.queue = slices.Delete(g.queue, i, i+1)
	return err
}

func (g *gate) give(most int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for g.mints--; g.mints < most && len(g.queue) > 0; g.mints++ {
		close(g.queue[0])
		g.queue = g.queue[1:]
	}
}

// away is what is told while nothing is given.
func (g *gate) away(b breaker) error {
	next := "it is being tried now: try again in a moment"
	if !b.probing {
		next = "it is tried again from " + b.next.UTC().Format(time.RFC3339) + " on: try again then"
	}
	return broker.Refusef(broker.ReasonProvider, next,
		"provider %s has not answered since %s, so nothing is given there", g.provider, b.since.UTC().Format(time.RFC3339))
}

// leave and returned count the calls that nobody waits for any more.
func (g *gate) leave(what string) {
	g.mu.Lock()
	g.left[what]++
	n := g.left[what]
	g.mu.Unlock()
	g.metrics.left.WithLabelValues(g.provider, what).Inc()
	g.log.Error("the provider does not answer, and the call was left behind", "provider", g.provider, "call", what, "left_behind", n)
}

func (g *gate) returned(what string, err error) {
	g.mu.Lock()
	g.left[what]--
	n := g.left[what]
	g.mu.Unlock()
	g.log.Warn("a call that was left behind has returned", "provider", g.provider, "call", what, "left_behind", n, "error", err)
}

// crowded reports whether so many calls that end leases were left behind that
// more would only add to them.
func (g *gate) crowded(limit int) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.left[callRevoke]+g.left[callConfirm] >= max(16, 4*limit)
}

// endsAgain and endsNothing tell how the provider's worker fares.
func (g *gate) endsAgain(now time.Time) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.trouble = time.Time{}
	g.breaker.hint(now)
}

func (g *gate) endsNothing(now time.Time) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.trouble.IsZero() {
		g.trouble = now
	}
}

// gateState is what metrics tell of a gate.
type gateState struct {
	mints int
	open  bool // the breaker is
	up    bool
	left  map[string]int
}

func (g *gate) state() gateState {
	g.mu.Lock()
	defer g.mu.Unlock()
	s := gateState{mints: g.mints, open: g.breaker.open(), left: map[string]int{}}
	s.up = !s.open && g.trouble.IsZero()
	for _, what := range []string{callMint, callRevoke, callConfirm} {
		s.left[what] = g.left[what]
	}
	return s
}
