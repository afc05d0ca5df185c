package signin

import "context"

// Sweep is what the Manager does by itself every few seconds.
func (m *Manager) Sweep(ctx context.Context) error { return m.sweep(ctx) }

// Pending is how many sign-ins by browser are under way.
func (m *Manager) Pending() int { return m.flows.len(m.cfg.Now()) + m.asks.len(m.cfg.Now()) }

const MostFlows = mostFlows
