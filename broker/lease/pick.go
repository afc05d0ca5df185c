package lease

import (
	"slices"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/store"
)

// picked is what a worker does next.
type picked struct {
	ids [moving + 1][]broker.LeaseID
	// upcoming is when the next lease is due, by the engine's time; zero if
	// none is.
	upcoming time.Time
}

func (p *picked) any() bool {
	return slices.ContainsFunc(p.ids[:], func(ids []broker.LeaseID) bool { return len(ids) > 0 })
}

// due picks leases that are due and in no batch, and marks them busy.
//
// A lease ends by the later of both clocks. When to try again is a matter of
// the engine's time alone: a jump of the machine's clock forward must not take
// the pauses between tries away, and one back not stretch them.
func (w *worker) due(now, late time.Time, want want) (p picked, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	ahead := w.dueAhead(want, now)
	err = w.e.store.View(w.e.ctx, func(r store.Reader) error {
		picking := picking{w: w, r: r, want: want, now: now}
		picking.picked = ahead
		picking.ids[firstTry] = slices.Clone(ahead.ids[firstTry])
		from, to := store.Prefix(prefixDueOf(w.provider))
		for entry, err := range r.Scan(from, to) {
			if err != nil {
				return err
			}
			at, err := timeOfKey(entry.Key, 2)
			if err != nil {
				return err
			}
			state := broker.LeaseState(entry.Value)
			wait := at.Sub(now)
			if state == broker.LeaseActive {
				wait = at.Sub(late)
			}
			if wait > 0 {
				picking.soon(now.Add(wait))
				if at.After(late) {
					break
				}
				continue
			}
			more, err := picking.take(broker.LeaseID(lastPart(entry.Key)), state)
			if err != nil {
				return err
			}
			if !more {
				break
			}
		}
		p = picking.picked
		return nil
	})
	if err != nil {
		return picked{}, err
	}
	if want.one && len(p.ids[firstTry]) > 0 && len(p.ids[retry]) > 0 {
		if w.fresh {
			p.ids[firstTry] = nil
		} else {
			p.ids[retry] = nil
		}
	}
	for _, ids := range p.ids {
		for _, id := range ids {
			w.busy[id] = struct{}{}
			delete(w.soon, id)
		}
	}
	return p, nil
}

// dueAhead picks leases that are tried now whenever they are due. The caller
// holds w.mu.
func (w *worker) dueAhead(want want, now time.Time) (p picked) {
	if want.room[firstTry] == 0 {
		return p
	}
	for id := range w.soon {
		if len(p.ids[firstTry]) == want.size {
			break
		}
		if _, busy := w.busy[id]; busy {
			continue
		}
		if at := w.later[id]; now.Before(at) {
			if p.upcoming.IsZero() || at.Before(p.upcoming) {
				p.upcoming = at
			}
			continue
		}
		p.ids[firstTry] = append(p.ids[firstTry], id)
	}
	return p
}

// picking is one reading of the due index. The worker's mu is held.
type picking struct {
	picked
	w    *worker
	r    store.Reader
	want want
	now  time.Time

	tool     string // of those picked that failed
	attempts int    // of the first of them
}

func (p *picking) soon(at time.Time) {
	if p.upcoming.IsZero() || at.Before(p.upcoming) {
		p.upcoming = at
	}
}

// full reports whether there is no room for a kind.
func (p *picking) full(k kind, size int) bool {
	return p.want.room[k] == 0 || len(p.ids[k]) >= size
}

// take picks a due lease if there is room. It reports whether there may be room
// for another.
func (p *picking) take(id broker.LeaseID, state broker.LeaseState) (more bool, err error) {
	w := p.w
	if _, busy := w.busy[id]; busy {
		return true, nil
	}
	if at, ok := w.later[id]; ok {
		if p.now.Before(at) {
			p.soon(at)
			return true, nil
		}
		delete(w.later, id)
	}
	_, doomed := w.doomed[id]
	if w.trouble.in() && state != broker.LeaseRevoking && !doomed {
		if !p.full(moving, moved) {
			p.ids[moving] = append(p.ids[moving], id)
		}
	} else {
		f, slow, err := w.slow(p.r, id)
		if err != nil {
			return false, err
		}
		if slow {
			p.takeAgain(id, f)
		} else if !p.full(firstTry, p.want.size) && !slices.Contains(p.ids[firstTry], id) {
			p.ids[firstTry] = append(p.ids[firstTry], id)
		}
	}
	return !p.full(firstTry, p.want.size) || !p.full(moving, moved) || p.want.room[retry] > 0 && len(p.ids[retry]) < again64(p.want.size, p.attempts), nil
}

// slow tells whether a lease failed before, or is of a tool that is in trouble.
func (w *worker) slow(r store.Reader, id broker.LeaseID) (failing, bool, error) {
	if _, ahead := w.soon[id]; ahead {
		return failing{}, false, nil
	}
	if f, failed := w.failing[id]; failed {
		return f, true, nil
	}
	if !w.toolsInTrouble() {
		return failing{}, false, nil
	}
	l, ok, err := get[leaseRecord](r, keyLease(id))
	if err != nil || !ok {
		return failing{}, false, err
	}
	return failing{tool: l.Tool}, w.tools[l.Tool] >= troubleAfter, nil
}

func (w *worker) toolsInTrouble() bool {
	for _, n := range w.tools {
		if n >= troubleAfter {
			return true
		}
	}
	return false
}

// again64 is how many leases that failed so often are tried at once: ever
// fewer, so that one that spoils its batch comes to be alone.
func again64(size, attempts int) int { return max(size>>(2*min(attempts, 3)), 1) }

// takeAgain picks a lease that failed, together with such as have its tool and
// failed as often: they may share its fate.
func (p *picking) takeAgain(id broker.LeaseID, f failing) {
	if p.want.room[retry] == 0 {
		return
	}
	f.attempts = min(f.attempts, 3)
	if len(p.ids[retry]) == 0 {
		p.tool, p.attempts = f.tool, f.attempts
	}
	if f.tool == p.tool && f.attempts == p.attempts && len(p.ids[retry]) < again64(p.want.size, f.attempts) {
		p.ids[retry] = append(p.ids[retry], id)
	}
}

func (w *worker) release(ids []broker.LeaseID) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, id := range ids {
		delete(w.busy, id)
	}
}

// pullAll has every lease that failed tried now: its pauses grew while the
// provider was in trouble.
func (w *worker) pullAll() {
	w.mu.Lock()
	defer w.mu.Unlock()
	clear(w.tools)
	for id := range w.failing {
		w.pull(id)
	}
}

// pull has a lease tried now. The caller holds w.mu.
func (w *worker) pull(id broker.LeaseID) {
	delete(w.failing, id)
	delete(w.later, id)
	if t, ok := w.untold[id]; !ok || !t.over() {
		w.soon[id] = struct{}{}
	}
}
