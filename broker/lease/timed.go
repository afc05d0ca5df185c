package lease

import (
	"context"
	"strings"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/policy"
	"github.com/mayfly-security/mayfly/store"
)

// askEvery is how often a policy set that reads the time is asked again about
// what is alive: no event tells that an hour is over.
const askEvery = 30 * time.Second

// askPage is how many grants one snapshot looks at.
const askPage = 256

// watchTime ends what policies do not allow any more because time has passed.
// It has a goroutine of its own: what it looks at may be much, and other ends
// do not wait for it.
func (e *Engine) watchTime() {
	pause := askEvery
	for {
		timer := time.NewTimer(pause)
		select {
		case <-e.ctx.Done():
			timer.Stop()
			return
		case <-timer.C:
		}
		began := time.Now()
		if ep := e.settled(); ep.policies().ReadsTime(policy.ActionIssue) {
			if err := e.sweepTimed(e.ctx, ep); err != nil && e.ctx.Err() == nil {
				e.log.Error("asking policies that read the time; it is asked again", "error", err)
			}
		}
		pause = max(askEvery, 4*time.Since(began)) // most of the time is for others
	}
}

// sweepTimed asks `issue` again for each open grant that has leases that have
// not ended, and ends what it denies. The grants stay: time passes on.
func (e *Engine) sweepTimed(ctx context.Context, ep *epoch) error {
	from, to := store.Prefix(prefixOpens)
	for from != "" {
		gone := map[ending][]broker.LeaseID{}
		next := ""
		now := e.clock.late() // what must be over is judged by it
		err := e.view(ctx, func(r store.Reader) error {
			clear(gone)
			next = from
			for range askPage {
				grant := broker.GrantID("")
				for entry, err := range r.Scan(next, to) {
					if err != nil {
						return err
					}
					grant = broker.GrantID(strings.Split(entry.Key, "|")[1])
					break
				}
				if grant == "" {
					next = ""
					return nil
				}
				_, next = store.Prefix(prefixOpen(grant))
				o, is, err := ep.over(r, grant, now)
				if err != nil {
					return err
				}
				if is && o.cause == broker.CausePolicy { // all else has events of its own
					o.into(gone)
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
		for why, ids := range gone {
			if _, err := e.endLeases(ctx, ids, why); err != nil {
				return err
			}
		}
		from = next
	}
	return nil
}
