package ledger

import (
	"sync"
	"time"

	"github.com/mayfly-security/mayfly/broker"
)

// Slack is how much later than an answer sent before it an answer may be seen
// here: both come over sockets of one machine to goroutines of one process. A
// delivery that is later than that was sent later. One that was committed
// later is found by the order of the evidence, and one that was asked for
// later by its beginning, both without any slack.
const Slack = time.Second

// Delivered is one credential as its agent got it.
type Delivered struct {
	Lease    broker.Lease
	User     string
	Password string
	Asked    time.Time // with a monotonic part: when the agent began to ask
	Got      time.Time // with a monotonic part: when it had the answer
}

// Deliveries knows what was delivered and what was over when. Its methods may
// be called from many goroutines.
type Deliveries struct {
	mu     sync.Mutex
	all    map[broker.LeaseID]*Delivered
	by     map[string][]*Delivered // by what they live on: incident, grant, lease
	over   map[string]time.Time    // what is over, and since when that was answered
	barred map[string][]bar        // by agent: when it was disabled
}

// bar is a time in which an agent was disabled: from the return of the reload
// that did it until right before the one that undid it began.
type bar struct{ from, to time.Time }

// NewDeliveries begins without any.
func NewDeliveries() *Deliveries {
	return &Deliveries{all: map[broker.LeaseID]*Delivered{}, by: map[string][]*Delivered{}, over: map[string]time.Time{}, barred: map[string][]bar{}}
}

// Add notes a delivery.
func (d *Deliveries) Add(g Delivered) (wrong []Violation) {
	d.mu.Lock()
	defer d.mu.Unlock()
	id := g.Lease.ID
	if was := d.all[id]; was != nil {
		if was.User != g.User || was.Password != g.Password {
			wrong = append(wrong, violation(Duplicate, id, "lease %s was delivered with two secrets", id))
		}
		return wrong
	}
	d.all[id] = &g
	for _, on := range []string{string(g.Lease.Incident), string(g.Lease.Grant)} {
		if on == "" {
			continue
		}
		d.by[on] = append(d.by[on], &g)
		if at, is := d.over[on]; is {
			if v := tooLate(&g, on, at); v != nil {
				wrong = append(wrong, *v)
			}
		}
	}
	for _, b := range d.barred[g.Lease.Agent.String()] {
		if b.to.IsZero() || g.Asked.Before(b.to) {
			if v := tooLate(&g, g.Lease.Agent.String(), b.from); v != nil && (b.to.IsZero() || g.Got.Before(b.to)) {
				wrong = append(wrong, *v)
			}
		}
	}
	return wrong
}

func tooLate(g *Delivered, on string, over time.Time) *Violation {
	switch {
	case g.Asked.After(over):
		v := violation(Late, g.Lease.ID, "lease %s was asked for %s after the end of %s had been answered, and was delivered",
			g.Lease.ID, g.Asked.Sub(over).Round(time.Microsecond), on)
		return &v
	case g.Got.Sub(over) > Slack:
		v := violation(Late, g.Lease.ID, "lease %s was delivered %s after the end of %s had been answered",
			g.Lease.ID, g.Got.Sub(over).Round(time.Microsecond), on)
		return &v
	}
	return nil
}

// Over notes that the broker has answered that an incident or a grant is over,
// and returns what had been delivered under it.
func (d *Deliveries) Over(on string, at time.Time) (delivered []Delivered, wrong []Violation) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if _, is := d.over[on]; !is {
		d.over[on] = at
	}
	for _, g := range d.by[on] {
		delivered = append(delivered, *g)
		if v := tooLate(g, on, d.over[on]); v != nil {
			wrong = append(wrong, *v)
		}
	}
	return delivered, wrong
}

// Disabled notes that an agent is disabled since a reload returned.
func (d *Deliveries) Disabled(agent string, since time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.barred[agent] = append(d.barred[agent], bar{from: since})
}

// Enabled notes that a reload that enables an agent is about to begin.
func (d *Deliveries) Enabled(agent string, at time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if bars := d.barred[agent]; len(bars) > 0 && bars[len(bars)-1].to.IsZero() {
		bars[len(bars)-1].to = at
	}
}

// Of returns what was delivered of a lease.
func (d *Deliveries) Of(id broker.LeaseID) (Delivered, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	g := d.all[id]
	if g == nil {
		return Delivered{}, false
	}
	return *g, true
}

// Count is how many leases were delivered.
func (d *Deliveries) Count() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.all)
}

// Leases returns the IDs of all leases that were delivered.
func (d *Deliveries) Leases() []broker.LeaseID {
	d.mu.Lock()
	defer d.mu.Unlock()
	ids := make([]broker.LeaseID, 0, len(d.all))
	for id := range d.all {
		ids = append(ids, id)
	}
	return ids
}
