package lease

import (
	"fmt"
	"sync"
	"time"

	"github.com/mayfly-security/mayfly/broker"
)

// clockTolerance is how far the machine's clock may stand from the engine's
// before the engine stops giving. It leaves room for a time daemon's steps.
const clockTolerance = 30 * time.Second

// clock is the engine's time. It never goes back: not while the engine runs,
// for it counts on from where it began by the monotonic clock, and not over a
// restart, for it begins no earlier than the high-water mark in the store. A
// machine's clock that jumps therefore changes no decision in a caller's
// favour. Where the two come to differ by more than clockTolerance, one of
// them is wrong and the engine cannot know which: it gives nothing until they
// agree, or until an operator decides: a restart takes a forward jump for true,
// and AcceptClock a step back. Ending goes on, by whichever clock is later.
type clock struct {
	wall func() time.Time // the machine's clock; time.Now but in tests

	mu   sync.Mutex
	base time.Time // engine time at mono
	mono time.Time // a reading with a monotonic part, taken at base
}

func newClock(wall func() time.Time, highWater time.Time) *clock {
	base := wall().Round(0).UTC()
	if highWater.After(base) {
		base = highWater
	}
	return &clock{wall: wall, base: base, mono: time.Now()}
}

// now is the engine's time, in UTC. Small corrections of the machine's clock
// forward are followed; a step back is waited out.
func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	mono := time.Now()
	t := c.base.Add(mono.Sub(c.mono))
	if w := c.wall().Round(0).UTC(); w.After(t) && w.Sub(t) <= clockTolerance {
		t = w
	}
	c.base, c.mono = t, mono
	return t
}

// late is the time by which things must have ended: the later of both clocks.
func (c *clock) late() time.Time {
	t := c.now()
	if w := c.wall().Round(0).UTC(); w.After(t) {
		return w
	}
	return t
}

// early is the time that has passed for certain: the earlier of both clocks.
// What is claimed ("expired") is measured by it.
func (c *clock) early() time.Time {
	t := c.now()
	if w := c.wall().Round(0).UTC(); w.Before(t) {
		return w
	}
	return t
}

// trusted returns a refusal while the two clocks differ too much to give.
func (c *clock) trusted() error {
	t := c.now()
	w := c.wall().Round(0).UTC()
	if off := w.Sub(t); off > clockTolerance || off < -clockTolerance {
		return broker.Refuse(broker.ReasonClock,
			"the broker's clock jumped, so it gives nothing",
			"an operator sets the clock right, or restarts the broker if it is right now").
			Because(fmt.Errorf("the machine's clock says %s and the broker's time is %s (%s apart)",
				w.Format(time.RFC3339), t.Format(time.RFC3339), off.Round(time.Second)))
	}
	return nil
}
