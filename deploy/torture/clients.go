//go:build unix

package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/audit"
	"github.com/mayfly-security/mayfly/broker/client"
	"github.com/mayfly-security/mayfly/deploy/torture/ledger"
)

// actor is somebody who uses the broker for as long as a run lasts.
type actor struct {
	*run
	name string
	id   spiffeid.ID
	api  *client.Client
	rng  *rand.Rand
}

// actor makes one, with its own part of the seed.
func (r *run) actor(ctx context.Context, name string, id spiffeid.ID, n uint64) (*actor, error) {
	api, err := r.people.client(ctx, id, r.addr)
	if err != nil {
		return nil, err
	}
	return &actor{run: r, name: name, id: id, api: api, rng: rand.New(rand.NewPCG(r.opt.seed, n))}, nil
}

// pause sleeps between two spans of time.
func (a *actor) pause(ctx context.Context, least, most time.Duration) {
	d := least + time.Duration(a.rng.Int64N(int64(most-least)+1))
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}

// agent asks for credentials, uses some, gives some back and leaves others.
func (a *actor) agent(ctx context.Context) {
	for ctx.Err() == nil {
		req := client.GetRequest{Tool: toolRead, Reason: a.name}
		switch roll := a.rng.IntN(20); {
		case roll == 0:
			req.Tool = toolStatus
		case roll < 8:
			req.Tool = toolWrite
		}
		if req.Tool == toolRead && a.rng.IntN(3) > 0 {
			req.TTL = time.Duration(shortTTL+a.rng.IntN(longTTL-shortTTL+1)) * time.Second
		}
		asked := time.Now()
		a.asking.Add(1)
		cred, err := a.api.Get(ctx, req)
		a.asking.Add(-1)
		if err != nil {
			a.refused(ctx, "get", err)
			a.pause(ctx, 10*time.Millisecond, 80*time.Millisecond)
			continue
		}
		g := ledger.Delivered{Lease: cred.Lease.Lease, Asked: asked, Got: time.Now()}
		g.User, _ = cred.Secret.Reveal("username")
		g.Password, _ = cred.Secret.Reveal("password")
		a.history.note(a.name, "got", g.Lease.ID, g.Lease.Incident, g.Lease.Grant, g.User)
		a.found(a.deliveries.Add(g)...)
		a.evidence.Acknowledged(audit.LeaseActive, string(g.Lease.ID), "it was delivered to "+a.name)
		if a.rng.IntN(8) == 0 {
			a.mustWork(ctx, g)
		}
		a.pause(ctx, 0, 30*time.Millisecond)
		if a.rng.IntN(2) == 0 {
			a.giveBack(ctx, g)
		}
	}
}

// giveBack ends a lease and, if it is said to be dead, sees to it that it is.
func (a *actor) giveBack(ctx context.Context, g ledger.Delivered) {
	l, err := a.api.Revoke(ctx, g.Lease.ID, "done")
	if err != nil {
		a.refused(ctx, "give_back", err)
		return
	}
	a.history.note(a.name, "gave back", l.ID, l.State, l.Cause)
	if l.State == broker.LeaseActive || l.State == broker.LeaseMinting {
		a.found(ledger.Violation{Kind: ledger.Undead, Lease: l.ID, What: fmt.Sprintf("lease %s is %s after it was given back", l.ID, l.State)})
	}
	a.evidence.Acknowledged(audit.LeaseRevoking, string(g.Lease.ID), "it was given back by "+a.name)
	if l.State.Ended() && a.rng.IntN(4) == 0 {
		a.mustBeDead(ctx, g, l.Lease)
	}
}

// child is the same actor, with a part of its own of the seed.
func (a *actor) child() *actor {
	c := *a
	c.rng = rand.New(rand.NewPCG(a.rng.Uint64(), a.rng.Uint64()))
	return &c
}

// pending is how many windows, or grants, of one actor may be waiting for
// their end: an end waits for leases that a kill has left unsettled, and a
// broker that is killed every second never gets to answer it.
const pending = 40

// bot opens windows and closes them, without waiting for the answer before it
// opens the next.
func (a *actor) bot(ctx context.Context) {
	var closing errgroup.Group
	closing.SetLimit(pending)
	defer func() { _ = closing.Wait() }() // what runs in it returns no errors
	for ctx.Err() == nil {
		req := client.IncidentRequest{Title: "torture", Tools: []string{toolRead, toolWrite, toolStatus}}
		first := a.rng.IntN(agents)
		for i := range 2 + a.rng.IntN(3) {
			req.Agents = append(req.Agents, agentID(first+i))
		}
		in, err := a.api.OpenIncident(ctx, req)
		if err != nil {
			a.refused(ctx, "open", err)
			a.pause(ctx, 20*time.Millisecond, 200*time.Millisecond)
			continue
		}
		a.history.note(a.name, "opened", in.ID)
		a.evidence.Acknowledged(audit.IncidentOpened, string(in.ID), "it was opened by "+a.name)
		c := a.child()
		closing.Go(func() error {
			c.pause(ctx, 200*time.Millisecond, 3*time.Second)
			c.end(ctx, "close", string(in.ID), audit.IncidentClosed, func() (client.Ended, error) {
				_, ended, err := c.api.CloseIncident(ctx, in.ID, "over")
				return ended, err
			})
			return nil
		})
		a.pause(ctx, 300*time.Millisecond, 1200*time.Millisecond)
	}
}

// end ends an incident or a grant, however often that has to be asked for.
func (a *actor) end(ctx context.Context, act, id string, told audit.Type, call func() (client.Ended, error)) {
	for ctx.Err() == nil {
		ended, err := call()
		at := time.Now()
		if err != nil {
			a.refused(ctx, act, err)
			a.pause(ctx, 20*time.Millisecond, 200*time.Millisecond)
			continue
		}
		a.report.ended(act)
		a.history.note(a.name, act, id, ended.Dead, ended.Revoking)
		a.evidence.Acknowledged(told, id, "it was answered to "+a.name+" that it is over")
		a.over(ctx, id, at)
		return
	}
}

// operator makes grants and withdraws them, and ends leases one by one.
func (a *actor) operator(ctx context.Context) {
	var withdrawing errgroup.Group
	withdrawing.SetLimit(pending)
	defer func() { _ = withdrawing.Wait() }()
	for ctx.Err() == nil {
		req := client.GrantRequest{Agent: agentID(a.rng.IntN(agents)), Tool: toolWrite, For: 10 * time.Minute, Reason: "torture"}
		if a.rng.IntN(3) == 0 {
			req.MaxUses = 1 + a.rng.IntN(20)
		}
		g, err := a.api.CreateGrant(ctx, req)
		if err != nil {
			a.refused(ctx, "grant", err)
			a.pause(ctx, 20*time.Millisecond, 200*time.Millisecond)
			continue
		}
		a.history.note(a.name, "granted", g.ID)
		a.evidence.Acknowledged(audit.GrantCreated, string(g.ID), "it was made by "+a.name)
		c := a.child()
		withdrawing.Go(func() error {
			c.pause(ctx, 200*time.Millisecond, 3*time.Second)
			c.end(ctx, "withdraw", string(g.ID), audit.GrantEnded, func() (client.Ended, error) {
				_, ended, err := c.api.WithdrawGrant(ctx, g.ID, "over")
				return ended, err
			})
			return nil
		})
		for range a.rng.IntN(4) {
			a.pause(ctx, 100*time.Millisecond, 600*time.Millisecond)
			a.revokeOne(ctx)
		}
		a.pause(ctx, 100*time.Millisecond, 600*time.Millisecond)
	}
}

// revokeOne ends some delivered lease, which may have ended already.
func (a *actor) revokeOne(ctx context.Context) {
	ids := a.deliveries.Leases()
	if len(ids) == 0 {
		return
	}
	g, _ := a.deliveries.Of(ids[a.rng.IntN(len(ids))])
	l, err := a.api.Revoke(ctx, g.Lease.ID, "operator")
	if err != nil {
		a.refused(ctx, "revoke", err)
		return
	}
	a.history.note(a.name, "revoked", l.ID, l.State, l.Cause)
	if l.State.Ended() {
		a.mustBeDead(ctx, g, l.Lease)
	}
}

// over is called when the broker has answered that an incident or a grant is
// over: what was delivered under it is dead, or is listed as being revoked.
func (a *actor) over(ctx context.Context, on string, at time.Time) {
	delivered, wrong := a.deliveries.Over(on, at)
	a.found(wrong...)
	a.rng.Shuffle(len(delivered), func(i, j int) { delivered[i], delivered[j] = delivered[j], delivered[i] })
	for _, g := range delivered[:min(len(delivered), sampled)] {
		l, err := a.operators.Lease(ctx, g.Lease.ID)
		switch {
		case err != nil:
			a.refused(ctx, "lease", err)
			return
		case l.State.Ended():
			a.mustBeDead(ctx, g, l.Lease)
		case l.State != broker.LeaseRevoking:
			a.found(ledger.Violation{Kind: ledger.Undead, Lease: l.ID,
				What: fmt.Sprintf("lease %s is %s after the end of %s had been answered", l.ID, l.State, on)})
		}
	}
}

// refused counts an error. What the broker said while it lived is its word;
// what a dead one did not say is no news.
func (a *actor) refused(ctx context.Context, act string, err error) {
	if ctx.Err() != nil {
		return
	}
	why := string(broker.ReasonOf(err))
	var conn *client.ConnectionError
	if errors.As(err, &conn) {
		why = "unreachable"
	}
	if why == "" {
		why = "other"
	}
	a.history.note(a.name, act+" refused", why, err.Error())
	a.report.refused(act, why)
}

// reloader exchanges the catalog again and again.
func (a *actor) reloader(ctx context.Context) {
	now := variant{disabled: -1}
	for ctx.Err() == nil {
		a.pause(ctx, 600*time.Millisecond, 2500*time.Millisecond)
		next := variant{disabled: -1, words: now.words, longer: now.longer}
		switch a.rng.IntN(4) {
		case 0:
			next.words = 1 - now.words
		case 1:
			next.longer = !now.longer
		default:
			if now.disabled < 0 {
				next.disabled = a.rng.IntN(agents)
			}
		}
		if now.disabled >= 0 && next.disabled != now.disabled {
			// From here on, also a broker that is restarted may enable it again.
			a.deliveries.Enabled(agentID(now.disabled).String(), time.Now())
		}
		if err := replace(a.catalogPath, catalogText(next, a.vaultEntry, a.keys)); err != nil {
			a.fatal(fmt.Errorf("writing the catalog: %w", err))
			return
		}
		if !a.loaded(ctx) {
			return
		}
		a.report.reloaded()
		a.history.note(a.name, "reloaded", next.words, next.longer, next.disabled)
		if next.disabled >= 0 && next.disabled != now.disabled {
			a.deliveries.Disabled(agentID(next.disabled).String(), time.Now())
		}
		now = next
	}
}

// loaded returns when the broker has taken over the catalog that is in place:
// by a signal, or by a start after it was put there.
func (a *actor) loaded(ctx context.Context) bool {
	for ctx.Err() == nil {
		d := a.current.Load()
		if d == nil || !d.alive() {
			a.pause(ctx, 5*time.Millisecond, 10*time.Millisecond)
			continue
		}
		if d.serving(ctx) != nil {
			continue
		}
		taken, err := d.reload(ctx)
		if err == nil && taken {
			return true
		}
		if err == nil {
			a.report.refused("reload", "refused")
			a.pause(ctx, 50*time.Millisecond, 100*time.Millisecond)
		}
	}
	return false
}
