package awssts

import (
	"bytes"
	"context"
	"fmt"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers/awssts/denylist"
)

// begin notes leases that must be denied from now on, whatever the store says.
func (p *provider) begin(w *writer, asked []denylist.Known) {
	p.writers.mu.Lock()
	defer p.writers.mu.Unlock()
	now := p.now()
	for lease, k := range w.begun {
		if !now.Before(k.Until) {
			delete(w.begun, lease)
		}
	}
	for _, k := range asked {
		k.Begun = true
		w.begun[k.Lease] = k
	}
}

// must are the leases of the role whose ending has begun, as the store has them,
// with what was asked for that the store may not show yet. With an error they
// are only the latter.
func (p *provider) must(ctx context.Context, w *writer) (map[broker.LeaseID]denylist.Known, error) {
	stored, failed := p.known(ctx, true)
	if failed != nil {
		failed = fmt.Errorf("reading what must be denied: %w", failed)
	}
	all := map[broker.LeaseID]denylist.Known{}
	for _, k := range stored {
		if !bytes.Contains(k.Handle, []byte(w.role.ARN)) {
			continue // most are another role's: reading them takes its time
		}
		h, err := decodeHandle(k.Handle)
		if err != nil || h.Role != w.role.ARN {
			continue
		}
		d := h.known()
		d.Begun = k.Begun
		switch k.Cause {
		case broker.CauseIncidentClosed, broker.CauseIncidentExpired:
			d.Closed = true
		case broker.CauseAgentDisabled:
			d.Disabled = true
		}
		all[d.Lease] = d
	}
	p.writers.mu.Lock()
	defer p.writers.mu.Unlock()
	for lease, k := range w.begun {
		known, ok := all[lease]
		if !ok {
			known = k
		}
		known.Begun = true
		all[lease] = known
	}
	return all, failed
}

// begun are those whose ending has begun. After a restart only the store knows.
func (p *provider) begun(ctx context.Context, w *writer, leases []at) ([]at, error) {
	in := func(has func(broker.LeaseID) bool) (some []at) {
		for _, l := range leases {
			if has(broker.LeaseID(l.h.Session)) {
				some = append(some, l)
			}
		}
		return some
	}
	p.writers.mu.Lock()
	begun := in(func(id broker.LeaseID) bool { _, ok := w.begun[id]; return ok })
	p.writers.mu.Unlock()
	if len(begun) == len(leases) {
		return begun, nil
	}
	known, err := p.must(ctx, w)
	return in(func(id broker.LeaseID) bool { return known[id].Begun }), err
}
