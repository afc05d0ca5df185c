package main

import (
	"context"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/client"
)

const (
	// awsPause is how long a refused renewal is not tried again.
	awsPause = time.Second
	// awsLook is how often the broker is asked whether the lease lives.
	awsLook = 15 * time.Second
)

// awsAgent holds one lease in memory and gives it to all who ask. It is renewed
// shortly before its end if anybody asked for it; one that nobody uses is left to
// end, and a new one is made for the next who asks.
type awsAgent struct {
	obtain func(context.Context) (*client.Credential, awsLease, error)
	state  func(context.Context, broker.LeaseID) (broker.LeaseState, error)
	giveUp func(client.Lease)
	now    func() time.Time
	warn   func(format string, args ...any)

	mu      sync.Mutex
	lease   awsLease      // the zero lease: there is none
	renewAt time.Time     // of lease
	used    bool          // somebody was given lease
	making  chan struct{} // closed when the asking that is under way is over; nil if none is
	refused error         // what came of the last asking
	again   time.Time     // no sooner is it tried again
	held    []client.Lease
	closed  bool
	asking  sync.WaitGroup
	ctx     context.Context // of what is asked in the background
	stop    context.CancelFunc
}

func (p *program) newAWSAgent(ctx context.Context, c *client.Client, req client.GetRequest) *awsAgent {
	a := &awsAgent{
		obtain: func(ctx context.Context) (*client.Credential, awsLease, error) { return p.awsObtain(ctx, c, req) },
		state: func(ctx context.Context, id broker.LeaseID) (broker.LeaseState, error) {
			l, err := c.Lease(ctx, id)
			return l.State, err
		},
		giveUp: func(l client.Lease) { _ = p.giveBack(ctx, c, l, "the endpoint ended") }, // it has told what went wrong
		now:    p.now, warn: p.warn,
	}
	a.ctx, a.stop = context.WithCancel(context.WithoutCancel(ctx))
	return a
}

// get gives the lease, waiting for one where there is none. The asking goes on
// also when the caller stops waiting: an SDK waits two seconds, and asks again.
func (a *awsAgent) get(ctx context.Context) (awsLease, error) {
	for {
		a.mu.Lock()
		now := a.now()
		if a.closed {
			a.mu.Unlock()
			return awsLease{}, context.Canceled
		}
		alive := a.lease.alive(now)
		if (!alive || !now.Before(a.renewAt)) && a.making == nil && !now.Before(a.again) {
			a.ask()
		}
		if alive {
			a.used = true
			lease := a.lease
			a.mu.Unlock()
			return lease, nil
		}
		making, refused := a.making, a.refused
		a.mu.Unlock()
		if making == nil {
			return awsLease{}, refused
		}
		select {
		case <-making:
		case <-ctx.Done():
			return awsLease{}, ctx.Err()
		}
	}
}

// prime has the first lease made, for nobody yet: what keeps it from being made
// is told at once.
func (a *awsAgent) prime(ctx context.Context) error {
	_, err := a.get(ctx)
	a.mu.Lock()
	defer a.mu.Unlock()
	a.used = false
	return err
}

// ask asks for a lease in the background. The caller holds the lock.
func (a *awsAgent) ask() {
	making := make(chan struct{})
	a.making = making
	a.asking.Go(func() {
		cred, lease, err := a.obtain(a.ctx)
		a.mu.Lock()
		defer a.mu.Unlock()
		a.making = nil
		defer close(making)
		now := a.now()
		if a.refused = err; err != nil {
			a.again = now.Add(awsPause + rand.N(awsPause/4))
			if a.lease.alive(now) && a.ctx.Err() == nil {
				f := failureOf(err, "")
				a.warn("lease %s is not renewed: %s%s", a.lease.ID, f.Message, inBrackets(f.Reason))
			}
			return
		}
		a.hold(cred.Lease, now)
		a.lease, a.used, a.again = lease, false, time.Time{}
		a.renewAt = lease.End.Add(-lease.margin() - rand.N(lease.margin()/2+1))
	})
}

// hold remembers a lease until its end: somebody may be using the one before
// still. The caller holds the lock.
func (a *awsAgent) hold(l client.Lease, now time.Time) {
	a.held = append(slices.DeleteFunc(a.held, func(l client.Lease) bool { return !now.Before(l.End) }), l)
}

// run renews the lease and sees whether it lives, until ctx ends.
func (a *awsAgent) run(ctx context.Context) {
	look := a.now().Add(awsLook)
	for {
		a.mu.Lock()
		now := a.now()
		wait, making := look.Sub(now), a.making
		if a.used && making == nil && a.lease.alive(now) {
			wait = min(wait, max(a.renewAt.Sub(now), a.again.Sub(now)))
		}
		a.mu.Unlock()
		timer := time.NewTimer(max(wait, 10*time.Millisecond))
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-making: // nil if nothing is
			timer.Stop()
		case <-timer.C:
		}
		a.renew()
		if !a.now().Before(look) {
			a.look(ctx)
			look = a.now().Add(awsLook)
		}
	}
}

// renew asks for a new lease where it is time, and the present one was used.
func (a *awsAgent) renew() {
	a.mu.Lock()
	defer a.mu.Unlock()
	now := a.now()
	if a.used && a.making == nil && a.lease.alive(now) && !now.Before(a.renewAt) && !now.Before(a.again) {
		a.ask()
	}
}

// look drops a lease that was ended early: nobody is given it any more, and the
// next who asks is told why there is no other.
func (a *awsAgent) look(ctx context.Context) {
	a.mu.Lock()
	id, alive := a.lease.ID, a.lease.alive(a.now())
	a.mu.Unlock()
	if !alive {
		return
	}
	if state, err := a.state(ctx, id); !leaseOver(state, err) {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.held = slices.DeleteFunc(a.held, func(l client.Lease) bool { return l.ID == id }) // there is nothing to give back
	if a.lease.ID == id {
		a.lease, a.used = awsLease{}, false
		a.warn("lease %s was ended", id)
	}
}

// leaseOver tells what the broker's answer about a lease means: it is over, also
// where it is not known any more, or where we may not ask. A broker that is away
// says nothing of it.
func leaseOver(state broker.LeaseState, err error) bool {
	if err == nil {
		return state != broker.LeaseActive
	}
	code := codeOf(err)
	return code == exitRefused || code == exitNotFound
}

// close ends what the agent holds. Nobody is given anything afterwards.
func (a *awsAgent) close() {
	a.mu.Lock()
	a.closed = true
	a.mu.Unlock()
	a.stop()
	a.asking.Wait()
	a.mu.Lock()
	held, now := a.held, a.now()
	a.held, a.lease = nil, awsLease{}
	a.mu.Unlock()
	for _, l := range held {
		if now.Before(l.End) {
			a.giveUp(l)
		}
	}
}
