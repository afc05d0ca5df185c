package lease

import (
	"context"
	"errors"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/store"
)

// metrics are the engine's numbers. Counters are kept as things happen; the
// number of leases by state is read from the store when somebody asks, so that
// it is never wrong.
type metrics struct {
	issued    *prometheus.CounterVec
	refused   *prometheus.CounterVec
	mint      *prometheus.HistogramVec
	end       *prometheus.HistogramVec
	lateDeath *prometheus.HistogramVec
	left      *prometheus.CounterVec

	requests   *prometheus.CounterVec
	breakGlass *prometheus.CounterVec
}

func newMetrics(reg prometheus.Registerer, e *Engine) *metrics {
	buckets := []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60}
	m := &metrics{
		issued: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "mayfly_leases_issued_total", Help: "Leases delivered, by provider and tool."}, []string{"provider", "tool"}),
		refused: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "mayfly_refusals_total", Help: "Calls refused, by reason."}, []string{"reason"}),
		mint: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "mayfly_mint_seconds", Help: "Time that a provider took to mint, by provider and outcome.", Buckets: buckets}, []string{"provider", "outcome"}),
		end: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "mayfly_revoke_seconds", Help: "Time that one call to a provider to revoke or confirm took, by provider, call and outcome.", Buckets: buckets}, []string{"provider", "call", "outcome"}),
		lateDeath: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "mayfly_death_after_end_seconds", Help: "Time from a lease's end to its confirmed death, by provider.", Buckets: append(buckets, 300, 3600)}, []string{"provider"}),
		left: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "mayfly_provider_calls_left_behind_total", Help: "Calls that a provider did not answer in its time nor soon after, by provider and call."}, []string{"provider", "call"}),
	}
	m.requests = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "mayfly_requests_total", Help: "Requests that were made or decided, by what became of them: pending, granted, denied, expired, withdrawn or void."}, []string{"outcome"})
	m.breakGlass = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "mayfly_break_glass_requests_total", Help: "Requests made under a rule for emergencies, by tool."}, []string{"tool"})
	if reg != nil {
		reg.MustRegister(m.requests, m.breakGlass, m.issued, m.refused, m.mint, m.end, m.lateDeath, m.left, accessCollector{e}, leaseCollector{e}, gateCollector{e})
	}
	return m
}

func (m *metrics) minted(provider string, took time.Duration, err error) {
	outcome := "ok"
	switch {
	case errors.Is(err, providers.ErrAway):
		outcome = "away"
	case errors.Is(err, providers.ErrRefused):
		outcome = "refused"
	case errors.Is(err, providers.ErrNothingMade):
		outcome = "nothing_made"
	case err != nil:
		outcome = "unknown"
	}
	m.mint.WithLabelValues(provider, outcome).Observe(took.Seconds())
}

func (m *metrics) ended(provider, call string, took time.Duration, err error) {
	outcome := "ok"
	switch {
	case errors.Is(err, providers.ErrAway):
		outcome = "away"
	case err != nil:
		outcome = "error"
	}
	m.end.WithLabelValues(provider, call, outcome).Observe(took.Seconds())
}

func (m *metrics) died(provider string, after time.Duration) {
	m.lateDeath.WithLabelValues(provider).Observe(max(after, 0).Seconds())
}

// Counts are the leases that have not ended.
type Counts struct {
	ByState map[broker.LeaseState]int
	Overdue int // past their end without their death being confirmed
	// Surviving are those of the overdue that the provider has done with: they
	// live until they die by themselves.
	Surviving int
}

// Counts reads how many leases have not ended, by state, and how many of them
// are past their end. It reads keys only, but of leases that are being made.
func (e *Engine) Counts(ctx context.Context) (Counts, error) {
	c := Counts{ByState: map[broker.LeaseState]int{
		broker.LeaseMinting: 0, broker.LeaseActive: 0, broker.LeaseRevoking: 0,
	}}
	now := e.clock.now()
	err := e.store.View(ctx, func(r store.Reader) error {
		clear(c.ByState)
		c.Overdue, c.Surviving = 0, 0
		from, to := store.Prefix(prefixDue)
		for entry, err := range r.Scan(from, to) {
			if err != nil {
				return err
			}
			state := broker.LeaseState(entry.Value)
			c.ByState[state]++
			switch state {
			case broker.LeaseActive:
				// An active lease is due at its end.
				if at, err := timeOfKey(entry.Key, 2); err == nil && now.After(at) {
					c.Overdue++
				}
			case broker.LeaseMinting:
				// One that is being made is due when its attempt is over. There
				// are never many.
				l, _, err := get[leaseRecord](r, keyLease(broker.LeaseID(lastPart(entry.Key))))
				if err != nil {
					return err
				}
				if l.Overdue(now) {
					c.Overdue++
				}
			}
		}
		from, _ = store.Prefix(prefixRevoking)
		for entry, err := range r.Scan(from, prefixRevoking+keyTime(now)) {
			if err != nil {
				return err
			}
			c.Overdue++
			if waitsForExpiry(string(entry.Value), now) {
				c.Surviving++
			}
		}
		return nil
	})
	return c, storeRefusal(err)
}

// leaseCollector reads the number of leases when metrics are asked for.
type leaseCollector struct{ e *Engine }

var (
	leasesDesc  = prometheus.NewDesc("mayfly_leases", "Leases that have not ended, by state.", []string{"state"}, nil)
	overdueDesc = prometheus.NewDesc("mayfly_leases_overdue", "Leases past their end whose death is not confirmed, by what it waits for: the provider's word, or the expiry of what the provider can do no more about.", []string{"waits_for"}, nil)
)

func (leaseCollector) Describe(ch chan<- *prometheus.Desc) {
	ch <- leasesDesc
	ch <- overdueDesc
}

func (c leaseCollector) Collect(ch chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	counts, err := c.e.Counts(ctx)
	if err != nil {
		ch <- prometheus.NewInvalidMetric(overdueDesc, err)
		return
	}
	for _, s := range []broker.LeaseState{broker.LeaseMinting, broker.LeaseActive, broker.LeaseRevoking} {
		ch <- prometheus.MustNewConstMetric(leasesDesc, prometheus.GaugeValue, float64(counts.ByState[s]), string(s))
	}
	ch <- prometheus.MustNewConstMetric(overdueDesc, prometheus.GaugeValue, float64(counts.Overdue-counts.Surviving), waitsProvider)
	ch <- prometheus.MustNewConstMetric(overdueDesc, prometheus.GaugeValue, float64(counts.Surviving), waitsExpiry)
}

// gateCollector tells how each provider fares.
type gateCollector struct{ e *Engine }

var (
	upDesc      = prometheus.NewDesc("mayfly_provider_up", "1 while a provider mints and ends leases, as far as the last calls tell, and 0 while it does not, by provider.", []string{"provider"}, nil)
	breakerDesc = prometheus.NewDesc("mayfly_provider_breaker_open", "1 while nothing is given at a provider but for one attempt now and then, by provider.", []string{"provider"}, nil)
	mintsDesc   = prometheus.NewDesc("mayfly_mints_in_flight", "Mints under way, those left behind too, by provider.", []string{"provider"}, nil)
	leftDesc    = prometheus.NewDesc("mayfly_provider_calls_left_behind", "Calls left behind that have not returned, by provider and call.", []string{"provider", "call"}, nil)
)

func (gateCollector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{upDesc, breakerDesc, mintsDesc, leftDesc} {
		ch <- d
	}
}

func (c gateCollector) Collect(ch chan<- prometheus.Metric) {
	c.e.gateMu.Lock()
	gates := make([]*gate, 0, len(c.e.gates))
	for _, g := range c.e.gates {
		gates = append(gates, g)
	}
	c.e.gateMu.Unlock()
	is := map[bool]float64{true: 1}
	for _, g := range gates {
		s := g.state()
		ch <- prometheus.MustNewConstMetric(upDesc, prometheus.GaugeValue, is[s.up], g.provider)
		ch <- prometheus.MustNewConstMetric(breakerDesc, prometheus.GaugeValue, is[s.open], g.provider)
		ch <- prometheus.MustNewConstMetric(mintsDesc, prometheus.GaugeValue, float64(s.mints), g.provider)
		for what, n := range s.left {
			ch <- prometheus.MustNewConstMetric(leftDesc, prometheus.GaugeValue, float64(n), g.provider, what)
		}
	}
}
