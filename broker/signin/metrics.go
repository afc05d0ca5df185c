package signin

import (
	"context"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/store"
)

type metrics struct {
	signIns *prometheus.CounterVec
}

func newMetrics(reg prometheus.Registerer, m *Manager) *metrics {
	v := &metrics{signIns: prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "mayfly_sign_ins_total",
		Help: "Sign-ins of people that came to an end, by method and outcome: ok, refused, expired, denied (by the person), unknown (no such sign-in or code), other_browser, other_issuer or replayed."},
		[]string{"method", "outcome"})}
	if reg == nil {
		return v
	}
	reg.MustRegister(v.signIns,
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "mayfly_sessions", Help: "Sessions of people in the store; one that has expired stays for some seconds. -1 if they cannot be read."},
			m.count),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "mayfly_sign_ins_pending", Help: "Sign-ins of people that are under way."},
			func() float64 {
				now := m.cfg.Now()
				return float64(m.flows.len(now) + m.asks.len(now) + m.devices.len(now))
			}))
	return v
}

func (v *metrics) signIn(method broker.SignInMethod, outcome string) {
	v.signIns.WithLabelValues(string(method), outcome).Inc()
}

// count is how many sessions there are, from the store.
func (m *Manager) count() float64 {
	n := 0.0
	err := m.cfg.Store.View(context.Background(), func(r store.Reader) error {
		n = 0
		from, to := store.Prefix(prefixSession)
		for _, err := range r.Scan(from, to) {
			if err != nil {
				return err
			}
			n++
		}
		return nil
	})
	if err != nil {
		m.cfg.Log.Debug("counting sessions", "error", err)
		return -1
	}
	return n
}
