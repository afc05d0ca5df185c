package lease

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/store"
)

const (
	// listTimeout bounds one List. It may be long: nothing waits for it.
	listTimeout = time.Minute
	// callGrace is how long a provider may take to notice that its time is over.
	callGrace = 2 * time.Second
	// lookSoon and lookAgain bound the pauses after looks that failed, so that a
	// provider that returns is looked at soon.
	lookSoon  = time.Second
	lookAgain = 15 * time.Second
	// lookedUp is how many things are looked up in one View.
	lookedUp = 1000
)

// inventory compares what one provider has with what the store knows, again
// and again. Each provider has its own, with a time limit that the provider
// cannot break: a slow one holds up no other.
type inventory struct {
	e        *Engine
	provider string
	poked    chan struct{} // has room for one
	stuck    chan struct{} // of a call that has not returned in its time; nil if there is none
	stuckOn  *openProvider // that the call was made of

	// unwritten are strays that were removed, and of which the store could not
	// be told yet.
	unwritten []Stray

	mu      sync.Mutex
	beyond  int       // strays that there was no room to list, at the last look
	success time.Time // of the last look that succeeded; zero if there was none
	able    bool      // the provider can list
}

// startInventories starts one for each provider of the epoch that has none,
// and lets the others see that their provider may be another now.
func (e *Engine) startInventories(ep *epoch) {
	e.workMu.Lock()
	defer e.workMu.Unlock()
	for name := range ep.providers {
		if i := e.inventories[name]; i != nil {
			i.poke()
			continue
		}
		i := &inventory{e: e, provider: name, poked: make(chan struct{}, 1)}
		e.inventories[name] = i
		e.wg.Go(i.run)
	}
}

func (i *inventory) poke() {
	select {
	case i.poked <- struct{}{}:
	default:
	}
}

// pokeInventory has what an operator decided on removed now.
func (e *Engine) pokeInventory(provider string) {
	e.workMu.Lock()
	i := e.inventories[provider]
	e.workMu.Unlock()
	if i != nil {
		i.poke()
	}
}

func (i *inventory) run() {
	e := i.e
	every := e.cfg.InventoryEvery
	pause := newBackOff(min(lookSoon, every), min(lookAgain, every))
	var next time.Time // of the next look; zero means now
	for {
		able, looked, err := i.round(!time.Now().Before(next))
		switch {
		case e.ctx.Err() != nil:
			return
		case err != nil:
			e.log.Warn("comparing a provider with the store", "provider", i.provider, "error", err)
			next = time.Now().Add(pause.NextBackOff())
		case looked:
			pause.Reset()
			next = time.Now().Add(every)
		}
		var timer <-chan time.Time // a provider that cannot list waits to be another
		if able {
			timer = time.After(time.Until(next))
		}
		select {
		case <-e.ctx.Done():
			return
		case <-i.poked:
		case <-timer:
		}
	}
}

// round removes what operators decided on and, if it is time, looks.
func (i *inventory) round(look bool) (able, looked bool, err error) {
	p, err := i.e.provider(i.provider)
	if err != nil {
		i.is(false)
		return false, false, nil // a reload tells when it is back
	}
	defer p.release()
	inv, able := p.Provider.(providers.Inventory)
	i.is(able)
	if !able {
		return false, false, nil
	}
	if len(i.unwritten) > 0 {
		if err := i.e.resolve(i.e.ctx, i.unwritten, howRemoved); err != nil {
			return true, false, err
		}
		i.unwritten = nil
	}
	if look {
		return true, true, i.look(p, inv)
	}
	decided, err := i.decided()
	if err != nil {
		return true, false, err
	}
	return true, false, i.remove(p, inv, decided)
}

func (i *inventory) is(able bool) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.able = able
}

// decided are the strays that an operator wants ended.
func (i *inventory) decided() ([]Stray, error) {
	all, err := i.e.noted(i.e.ctx, i.provider)
	return slices.DeleteFunc(all, func(s Stray) bool { return s.EndedBy == "" }), err
}

// look lists what is there, removes what is known to be over, and notes what
// nobody here answers for.
func (i *inventory) look(p *openProvider, inv providers.Inventory) error {
	e := i.e
	began, early := e.clock.now(), e.clock.early()
	// What was found counts also where one of several systems did not answer;
	// that something is gone is then not known.
	found, partial := within(i, p, listTimeout, inv.List)
	if partial != nil {
		if partial = fmt.Errorf("listing what is there: %w", partial); len(found) == 0 {
			return partial
		}
	}
	was, err := e.noted(e.ctx, i.provider)
	if err != nil {
		return err
	}
	seen := make(map[string]struct{}, len(found))
	strays, err := i.judged(found, seen, began, early)
	if err != nil {
		return err
	}
	noted := make(map[string]Stray, len(was))
	var gone []Stray
	for _, s := range was {
		if _, there := seen[s.Name]; there {
			noted[s.Name] = s
		} else if s.FoundAt.Before(began) && partial == nil {
			gone = append(gone, s)
		}
	}
	if err := e.resolve(e.ctx, gone, howGone); err != nil {
		return err
	}
	if len(gone) > 0 {
		e.watch.signal()
	}
	var over, toNote []Stray
	beyond, room := 0, maxStrays-len(noted)
	for _, s := range strays {
		known, isNoted := noted[s.Name]
		s.EndedBy = known.EndedBy
		if s.Why != StrayUnknown || s.EndedBy != "" {
			over = append(over, s)
		}
		switch {
		case isNoted:
			toNote = append(toNote, s) // something of it may have changed
		case s.listable() && room > 0:
			room--
			toNote = append(toNote, s)
		case s.Why == StrayUnknown:
			beyond++
		}
	}
	if beyond > 0 {
		e.log.Error("more strays than are listed, or with names that cannot be", "provider", i.provider, "not_listed", beyond)
	}
	// What ends does not wait for evidence: what cannot be noted now is told of
	// when it is gone.
	noting := e.note(e.ctx, toNote)
	removing := i.remove(p, inv, over)
	i.mu.Lock()
	i.beyond = beyond
	if partial == nil {
		i.success = e.clock.now()
	}
	i.mu.Unlock()
	return errors.Join(partial, noting, removing)
}

// judged are those of what was found that are strays, each once. seen gets the
// name of everything.
func (i *inventory) judged(found []providers.Found, seen map[string]struct{}, began, early time.Time) (strays []Stray, err error) {
	for part := range slices.Chunk(found, lookedUp) {
		var some []Stray
		err := i.e.store.View(i.e.ctx, func(r store.Reader) error {
			some = some[:0]
			for _, f := range part {
				s := newStray(i.provider, f, began, "")
				var err error
				if s.Why, err = i.e.judge(r, s, began, early); err != nil {
					return err
				}
				if s.Why != "" {
					some = append(some, s)
				}
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
		for _, f := range part {
			seen[f.Name] = struct{}{}
		}
		strays = append(strays, some...)
	}
	slices.SortStableFunc(strays, func(a, b Stray) int { return strings.Compare(a.Name, b.Name) })
	return slices.CompactFunc(strays, func(a, b Stray) bool { return a.Name == b.Name }), nil
}

// remove has strays ended and removed at the provider, and records it. Just
// before, the store is asked again: what a lease answers for stays.
func (i *inventory) remove(p *openProvider, inv providers.Inventory, strays []Stray) error {
	e := i.e
	left, failures := 0, error(nil)
	for part := range slices.Chunk(strays, p.traits.Batch) {
		part, err := i.stillStrays(part)
		if err != nil {
			return err
		}
		if len(part) == 0 {
			continue
		}
		found := make([]providers.Found, len(part))
		for n, s := range part {
			found[n] = s.found()
		}
		outcome, err := within(i, p, p.traits.RevokeTimeout, func(ctx context.Context) ([]error, error) {
			return inv.Remove(ctx, found), nil
		})
		if err == nil && len(outcome) != len(part) {
			err = fmt.Errorf("provider %s was asked to remove %d things and answered for %d", i.provider, len(part), len(outcome))
		}
		if err != nil {
			return fmt.Errorf("removing strays: %w", err)
		}
		var removed []Stray
		for n, s := range part {
			if outcome[n] == nil {
				removed = append(removed, s)
				e.metricStrays.WithLabelValues(i.provider, s.Why).Inc()
				continue
			}
			if left++; failures == nil {
				failures = outcome[n]
			}
		}
		if err := e.resolve(e.ctx, removed, howRemoved); err != nil {
			i.unwritten = append(i.unwritten, removed...)
			left, failures = left+len(removed), errors.Join(failures, err)
		}
		e.watch.signal()
		if len(removed) == 0 && errors.Is(failures, providers.ErrAway) {
			break // the rest would come to nothing, too
		}
	}
	if failures != nil {
		return stillThere(left, failures)
	}
	return nil
}

// stillStrays are those that no lease answers for. A lease that has ended
// never lives again, so that this holds until they are removed.
func (i *inventory) stillStrays(strays []Stray) (still []Stray, err error) {
	err = i.e.store.View(i.e.ctx, func(r store.Reader) error {
		still = still[:0]
		for _, s := range strays {
			answered, err := i.e.answeredFor(r, s.Lease)
			if err != nil {
				return err
			}
			if !answered {
				still = append(still, s)
			}
		}
		return nil
	})
	return still, err
}

// within calls a provider under a time limit that does not trust it: a call
// that goes on for longer is left behind, holding its provider, and no other
// is made until it has returned.
func within[T any](i *inventory, p *openProvider, limit time.Duration, call func(context.Context) (T, error)) (T, error) {
	var none T
	if i.stuck != nil && i.stuckOn == p { // a reload may have put another in its place
		select {
		case <-i.stuck:
		default:
			return none, errStuck
		}
	}
	i.stuck, i.stuckOn = nil, nil
	type outcome struct {
		value T
		err   error
	}
	if !p.acquire() {
		return none, errors.New("the provider is closed")
	}
	ctx, cancel := context.WithTimeout(i.e.ctx, limit)
	answer, returned := make(chan outcome, 1), make(chan struct{})
	go func() {
		defer close(returned)
		defer p.release()
		defer cancel()
		var o outcome
		defer func() {
			if r := recover(); r != nil {
				o = outcome{err: fmt.Errorf("the provider panicked: %v", r)}
			}
			answer <- o
		}()
		o.value, o.err = call(ctx)
	}()
	select {
	case o := <-answer:
		return o.value, o.err
	case <-ctx.Done():
	}
	grace := time.NewTimer(callGrace)
	defer grace.Stop()
	select {
	case o := <-answer:
		return o.value, o.err
	case <-grace.C:
		i.stuck, i.stuckOn = returned, p
		return none, fmt.Errorf("the provider did not answer in %s: %w", limit, context.DeadlineExceeded)
	}
}

// strayCollector reads the numbers of strays when metrics are asked for.
type strayCollector struct{ e *Engine }

var (
	straysDesc = prometheus.NewDesc("mayfly_strays",
		"Things at a provider that bear the installation's name and that no lease answers for, by provider.", []string{"provider"}, nil)
	lookedDesc = prometheus.NewDesc("mayfly_inventory_last_success_timestamp_seconds",
		"When a provider was last compared with the store, by provider; absent where it never was.", []string{"provider"}, nil)
)

func newStrayCounter(reg prometheus.Registerer, e *Engine) *prometheus.CounterVec {
	removed := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "mayfly_strays_removed_total", Help: "Strays ended and removed, by provider and why they were strays."}, []string{"provider", "why"})
	if reg != nil {
		reg.MustRegister(removed, strayCollector{e})
	}
	return removed
}

func (strayCollector) Describe(ch chan<- *prometheus.Desc) {
	ch <- straysDesc
	ch <- lookedDesc
}

func (c strayCollector) Collect(ch chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	counts, err := c.e.strayCounts(ctx)
	if err != nil {
		ch <- prometheus.NewInvalidMetric(straysDesc, err)
		return
	}
	c.e.workMu.Lock()
	all := make([]*inventory, 0, len(c.e.inventories))
	for _, i := range c.e.inventories {
		all = append(all, i)
	}
	c.e.workMu.Unlock()
	for _, i := range all {
		i.mu.Lock()
		able, beyond, success := i.able, i.beyond, i.success
		i.mu.Unlock()
		if able {
			counts[i.provider] += beyond
		}
		if !success.IsZero() {
			ch <- prometheus.MustNewConstMetric(lookedDesc, prometheus.GaugeValue, float64(success.UnixNano())/1e9, i.provider)
		}
	}
	for provider, n := range counts {
		ch <- prometheus.MustNewConstMetric(straysDesc, prometheus.GaugeValue, float64(n), provider)
	}
}
