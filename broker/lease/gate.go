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
	mints   int                 // under way, those left behind too
	byTool  map[string]int      // of them, by tool
	queue   []*waiter           // those who wait for a place, first come first
	breaker breaker             // open while the provider says that it is away
	tools   map[string]*breaker // open while attempts of a tool come to unknown outcomes
	left    map[string]int      // calls left behind that have not returned, by what they are
	trouble time.Time           // since when its worker could end nothing; zero while it can
}

// gate returns the provider's.
func (e *Engine) gate(provider string) *gate {
	e.gateMu.Lock()
	defer e.gateMu.Unlock()
	g := e.gates[provider]
	if g == nil {
		g = &gate{provider: provider, log: e.log, metrics: e.metrics,
			left: map[string]int{}, byTool: map[string]int{}, tools: map[string]*breaker{}}
		e.gates[provider] = g
	}
	return g
}

// place is the right to one attempt.
type place struct {
	g         *gate
	tool      string
	most      int
	probe     bool // it finds out whether the provider is back
	toolProbe bool // it finds out whether the tool's attempts come to something again
	told      bool // what the attempt came to
}

// waiter is a request that waits for a place.
type waiter struct {
	tool string
	most int
	turn chan struct{} // closed when it has the place
}

// enter waits for at most wait for one of most places, and begins an attempt
// for a tool. One tool has at most half of the places, so that a system behind
// the provider that hangs holds up its own tools and no others.
func (g *gate) enter(ctx context.Context, tool string, most int, wait time.Duration, now func() time.Time) (*place, error) {
	if err := g.refuse(tool, now()); err != nil {
		return nil, err
	}
	w := &waiter{tool: tool, most: most, turn: make(chan struct{})}
	if err := g.take(ctx, w, wait); err != nil {
		return nil, err
	}
	p := &place{g: g, tool: tool, most: most}
	if err := g.refuse(tool, now()); err != nil { // it opened while this one waited
		p.leave()
		return nil, err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	_, p.probe = g.breaker.begin(now())
	_, p.toolProbe = g.of(tool).begin(now())
	return p, nil
}

// of returns a tool's breaker. The caller holds g.mu.
func (g *gate) of(tool string) *breaker {
	b := g.tools[tool]
	if b == nil {
		b = &breaker{}
		g.tools[tool] = b
	}
	return b
}

// refuse refuses while the provider is away, or the tool in trouble.
func (g *gate) refuse(tool string, now time.Time) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if b := g.breaker; b.refuses(now) {
		return g.away(b, "provider "+g.provider)
	}
	if b := *g.of(tool); b.refuses(now) {
		return g.away(b, "what is behind tool "+tool)
	}
	return nil
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
	// That it is away is the provider's matter, an unknown outcome the tool's:
	// the system behind it may hang while others work.
	provider, tool := r, r
	if r == unknown {
		provider = nothing
	}
	if r == away {
		tool = nothing
	}
	was, toolWas := g.breaker.open(), g.of(p.tool).open()
	g.breaker.end(provider, p.probe, now, rand.Float64())
	g.of(p.tool).end(tool, p.toolProbe, now, rand.Float64())
	switch is := g.breaker.open(); {
	case is && !was:
		g.log.Error("the provider is away: nothing is given there", "provider", g.provider, "next", g.breaker.next, "error", err)
	case was && !is:
		g.log.Info("the provider mints again", "provider", g.provider)
	}
	switch is := g.of(p.tool).open(); {
	case is && !toolWas:
		g.log.Error("attempts for a tool come to nothing: it is not given", "provider", g.provider, "tool", p.tool, "next", g.of(p.tool).next, "error", err)
	case toolWas && !is:
		g.log.Info("a tool is given again", "provider", g.provider, "tool", p.tool)
	}
}

// leave gives the place to the next.
func (p *place) leave() {
	if p != nil {
		p.g.give(p.tool)
	}
}

// room reports whether a waiter can have a place. The caller holds g.mu.
func (g *gate) room(w *waiter) bool {
	return g.mints < w.most && g.byTool[w.tool] < (w.most+1)/2
}

// seat gives a waiter its place. The caller holds g.mu.
func (g *gate) seat(w *waiter) {
	g.mints++
	g.byTool[w.tool]++
	close(w.turn)
}

func (g *gate) take(ctx context.Context, w *waiter, wait time.Duration) error {
	g.mu.Lock()
	// Whoever waits already, and could have the place, comes first.
	if g.room(w) && !slices.ContainsFunc(g.queue, g.room) {
		g.seat(w)
		g.mu.Unlock()
		return nil
	}
	g.queue = append(g.queue, w)
	g.mu.Unlock()
	timer := time.NewTimer(wait)
	defer timer.Stop()
	var err error
	select {
	case <-w.turn:
		return nil
	case <-ctx.Done():
		err = ctx.Err()
	case <-timer.C:
		err = broker.Refusef(broker.ReasonProvider, "try again in a moment",
			"provider %s is busy: as many requests are under way there, or for tool %s, as there can be at a time", g.provider, w.tool)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	i := slices.Index(g.queue, w)
	if i < 0 {
		return nil // the turn came at the same moment
	}
	g.queue = slices.Delete(g.queue, i, i+1)
	return err
}

// give takes a place back, and gives it to the first who can have it.
func (g *gate) give(tool string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.mints--
	if g.byTool[tool]--; g.byTool[tool] == 0 {
		delete(g.byTool, tool)
	}
	for {
		i := slices.IndexFunc(g.queue, g.room)
		if i < 0 {
			return
		}
		g.seat(g.queue[i])
		g.queue = slices.Delete(g.queue, i, i+1)
	}
}

// away is what is told while nothing is given.
func (g *gate) away(b breaker, what string) error {
	next := "it is being tried now: try again in a moment"
	if !b.probing {
		next = "it is tried again from " + b.next.UTC().Format(time.RFC3339) + " on: try again then"
	}
	return broker.Refusef(broker.ReasonProvider, next,
		"%s has not answered since %s, so nothing is given there", what, b.since.UTC().Format(time.RFC3339))
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
	for _, b := range g.tools {
		b.hint(now)
	}
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
	for _, what := range []string{callMint, callRevoke, callConfirm, callCutOff} {
		s.left[what] = g.left[what]
	}
	return s
}
