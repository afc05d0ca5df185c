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
// incidents. Each of them is a record and evidence, which stays. Without a
// bound one agent could fill the disk, and with that stop giving to all.
//
// They are in memory: a broker that starts again has seen nobody.
type paces struct {
	mu sync.Mutex
	of map[broker.Principal]*rate.Limiter
}

func newPaces() *paces { return &paces{of: map[broker.Principal]*rate.Limiter{}} }

// take counts one thing given to the caller, or refuses it.
func (p *paces) take(ep *epoch, caller broker.Caller, now time.Time) error {
	most := perHour
	if agent, ok := ep.catalog.Agent(caller.ID); ok {
		most = agent.MaxPerHour
	} else if opener, ok := ep.catalog.Opener(caller.ID); ok {
		most = opener.MaxPerHour
	}
	wait := p.wait(caller.Principal(), most, now)
	if wait == 0 {
		return nil
	}
	return broker.Refusef(broker.ReasonRateLimited, "ask less often: a credential can be used until its end. Or have its `max_per_hour` raised in the catalog",
		"%s was given %d leases, requests and incidents in the last hour, which is its pace; the next is given in %s", callerName(caller), most, broker.Span(wait.Truncate(time.Second)+time.Second))
}

// wait takes one from a caller's bucket, which holds as many as are given in an
// hour and fills within an hour. If it is empty, it says for how long still.
func (p *paces) wait(who broker.Principal, most int, now time.Time) time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	l := p.of[who]
	if l == nil || l.Burst() != most { // a caller that is new, or a reload
		l = rate.NewLimiter(rate.Limit(float64(most)/time.Hour.Seconds()), most)
		p.of[who] = l
	}
	r := l.ReserveN(now, 1)
	wait := r.DelayFrom(now)
	if wait > 0 {
		r.CancelAt(now)
	}
	return wait
}

// forget drops the buckets that are full again.
func (p *paces) forget(now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for who, l := range p.of {
		if l.TokensAt(now) >= float64(l.Burst()) {
			delete(p.of, who)
		}
	}
}
