package lease

import (
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/mayfly-security/mayfly/broker"
)

// perHour is the pace of a person.
const perHour = 3600

// paces bound how much each caller is given in an hour: leases, requests and
// incidents, and how often the same is given again. Each of them is evidence,
// which stays. Without a bound one agent could fill the disk, and with that stop
// giving to all.
//
// They are in memory: a broker that starts again has seen nobody.
type paces struct {
	mu sync.Mutex
	of map[pace]*rate.Limiter
}

// pace is whose, and of what.
type pace struct {
	who   broker.Principal
	again bool // of what an idempotency key gives again
}

func newPaces() *paces { return &paces{of: map[pace]*rate.Limiter{}} }

// mostPerHour is how much a caller is given in an hour.
func (ep *epoch) mostPerHour(caller broker.Caller) int {
	if agent, ok := ep.catalog.Agent(caller.ID); ok {
		return agent.MaxPerHour
	}
	if opener, ok := ep.catalog.Opener(caller.ID); ok {
		return opener.MaxPerHour
	}
	return perHour
}

// may refuses a caller who was given as much as its pace allows. It counts
// nothing: what is refused for another reason costs nobody their pace.
func (p *paces) may(ep *epoch, caller broker.Caller, now time.Time) error {
	return p.within(ep, caller, false, now, "ask less often: a credential can be used until its end. Or have its `max_per_hour` raised in the catalog",
		"%s was given %d leases, requests and incidents in the last hour, which is its pace; the next is given in %s")
}

// mayAgain is may, for what an idempotency key gives again: so often, and no
// less often because of what is new.
func (p *paces) mayAgain(ep *epoch, caller broker.Caller, now time.Time) error {
	return p.within(ep, caller, true, now, "keep what you were given: it can be used until its end",
		"%s was given the same again %d times in the last hour, which is its pace; the next time is in %s")
}

// within refuses a caller whose bucket is empty, in words that name the caller,
// its pace, and how long it has to wait.
func (p *paces) within(ep *epoch, caller broker.Caller, again bool, now time.Time, next, format string) error {
	most := ep.mostPerHour(caller)
	wait := p.wait(pace{caller.Principal(), again}, most, now)
	if wait == 0 {
		return nil
	}
	return broker.Refusef(broker.ReasonRateLimited, next, format,
		callerName(caller), most, broker.Span(wait.Truncate(time.Second)+time.Second))
}

// gave counts one thing that was given, anew or again. Of those who ask at the
// same time more may be given something than there is room for: what is too much
// is waited for.
func (p *paces) gave(ep *epoch, caller broker.Caller, again bool, now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.bucket(pace{caller.Principal(), again}, ep.mostPerHour(caller)).ReserveN(now, 1)
}

// wait says for how long a bucket is empty still. It holds as many as are given
// in an hour, and fills within an hour.
func (p *paces) wait(of pace, most int, now time.Time) time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	r := p.bucket(of, most).ReserveN(now, 1)
	defer r.CancelAt(now)
	return r.DelayFrom(now)
}

// bucket is one's bucket: a new one for whoever has none, or after a reload that
// gives them another pace. The caller holds p.mu.
func (p *paces) bucket(of pace, most int) *rate.Limiter {
	l := p.of[of]
	if l == nil || l.Burst() != most {
		l = rate.NewLimiter(rate.Limit(float64(most)/time.Hour.Seconds()), most)
		p.of[of] = l
	}
	return l
}

// forget drops the buckets that are full again.
func (p *paces) forget(now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for of, l := range p.of {
		if l.TokensAt(now) >= float64(l.Burst()) {
			delete(p.of, of)
		}
	}
}
