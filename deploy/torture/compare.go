//go:build unix

package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/audit"
	"github.com/mayfly-security/mayfly/broker/client"
	"github.com/mayfly-security/mayfly/deploy/torture/ledger"
)

// compare looks at the evidence, the store, the world, the store and the
// evidence again, and has the ledger judge what it saw. An error means that
// the look could not be carried through: the broker was killed on the way.
func (r *run) compare(ctx context.Context, all bool) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	pending := r.evidence.Pending()
	if err := r.follow(ctx); err != nil {
		return err
	}
	r.found(r.evidence.Untold(pending)...)
	first := r.evidence.Last()
	before, err := r.leases(ctx, false)
	if err != nil {
		return err
	}
	look := ledger.Look{
		Before: before, Began: time.Now(), Bound: r.opt.bound,
		Excused: func(id broker.LeaseID) bool { return r.proxy.Doubled(string(id)) },
		Roled:   func(tool string) bool { return tool != toolStatus },
	}
	seen := r.world.look(ctx, r.installation)
	if seen.rolesErr == nil {
		var wrong []ledger.Violation
		seen.roles, wrong = r.strays.judge(seen.roles, look.Began, r.outageEnd(look.Began))
		r.found(wrong...)
	}
	look.Roles, look.RolesRead, look.Tokens = seen.roles, seen.rolesErr == nil, seen.tokens
	if look.After, err = r.leases(ctx, false); err != nil {
		return err
	}
	look.Now = time.Now()
	if seen.tokensErr == nil {
		open := func(id broker.LeaseID) bool { _, is := look.After[id]; return is }
		if look.Tokens, seen.unused, err = r.world.spent(ctx, seen.tokens, open); err != nil {
			look.Tokens, seen.tokensErr = nil, err // Vault went away
		}
	}
	look.OutageEnd = r.outageEnd(look.Now)
	look.Lookup = func(id broker.LeaseID) (broker.Lease, bool, error) { return r.lease(ctx, id) }
	count, wrong, err := look.Check()
	if err != nil {
		return err
	}
	r.found(wrong...)
	r.report.looked(count, seen)
	for _, role := range seen.roles {
		if !r.proxy.Told(role.Name) {
			r.report.untold(role.Name)
		}
	}
	if err := r.follow(ctx); err != nil {
		return err
	}
	r.found(r.evidence.Agrees(look.After, first, r.evidence.Last(), false)...)
	r.sample(ctx, look)
	r.history.note("driver", "looked", count.Open, count.Revoking, count.Roles, count.Unsettled, count.Tokens, time.Since(look.Began).Milliseconds())
	if !all {
		return nil
	}
	whole, err := r.leases(ctx, true)
	if err != nil {
		return err
	}
	r.found(r.evidence.Agrees(whole, first, r.evidence.Last(), true)...)
	for _, id := range r.deliveries.Leases() {
		if _, known := whole[id]; !known {
			r.found(ledger.Violation{Kind: ledger.Lost, Lease: id, What: fmt.Sprintf("lease %s was delivered, and the store does not have it", id)})
		}
	}
	return nil
}

// sampled is how many logins are tried at a look, and how many credentials at
// the answer that what they lived on is over.
const sampled = 4

// sample logs in with some credentials that were delivered and are alive.
func (r *run) sample(ctx context.Context, look ledger.Look) {
	tried := 0
	for id, l := range look.After { // in no order
		if tried == sampled || ctx.Err() != nil {
			return
		}
		if g, delivered := r.deliveries.Of(id); delivered && l.State == broker.LeaseActive {
			r.mustWork(ctx, g)
			tried++
		}
	}
}

// follow reads the evidence to its end.
func (r *run) follow(ctx context.Context) error {
	for ev, err := range r.operators.Events(ctx, client.EventFilter{After: r.evidence.Last()}) {
		if err != nil {
			return err
		}
		r.found(r.evidence.Add(ledger.Event{
			Sequence: ev.Sequence, Type: audit.Type(ev.Type), Lease: ev.Lease, Grant: ev.Grant, Incident: ev.Incident, Cause: ev.Cause,
		})...)
	}
	return nil
}

func (r *run) leases(ctx context.Context, all bool) (map[broker.LeaseID]broker.Lease, error) {
	leases := map[broker.LeaseID]broker.Lease{}
	for l, err := range r.operators.Leases(ctx, client.LeaseFilter{All: all}) {
		if err != nil {
			return nil, err
		}
		leases[l.ID] = l.Lease
	}
	return leases, nil
}

func (r *run) lease(ctx context.Context, id broker.LeaseID) (broker.Lease, bool, error) {
	if _, err := broker.ParseLeaseID(string(id)); err != nil {
		return broker.Lease{}, false, nil // the world has a name that no lease can have
	}
	l, err := r.operators.Lease(ctx, id)
	if broker.ReasonOf(err) == broker.ReasonNotFound {
		return broker.Lease{}, false, nil
	}
	return l.Lease, err == nil, err
}

// mustWork logs in with a credential that was delivered and is not known to be over.
func (r *run) mustWork(ctx context.Context, g ledger.Delivered) {
	if g.User == "" {
		return
	}
	works, err := r.world.login(ctx, g.User, g.Password)
	r.report.login(works, err)
	if err != nil || works || r.proxy.Doubled(string(g.Lease.ID)) {
		return
	}
	// It may have been ended meanwhile.
	l, known, err := r.lease(ctx, g.Lease.ID)
	switch {
	case err != nil:
	case !known:
		r.found(ledger.Violation{Kind: ledger.Lost, Lease: g.Lease.ID, What: fmt.Sprintf("lease %s was delivered, and the store does not have it", g.Lease.ID)})
	case l.State == broker.LeaseActive && time.Now().Before(l.End):
		r.found(ledger.Violation{Kind: ledger.Broken, Lease: l.ID, What: fmt.Sprintf("role %s of lease %s cannot log in, and the lease is active", g.User, l.ID)})
	}
}

// mustBeDead logs in with a credential whose lease the broker says is dead.
func (r *run) mustBeDead(ctx context.Context, g ledger.Delivered, l broker.Lease) {
	if g.User == "" {
		return
	}
	works, err := r.world.login(ctx, g.User, g.Password)
	r.report.login(works, err)
	if works {
		r.found(ledger.Violation{Kind: ledger.Undead, Lease: l.ID,
			What: fmt.Sprintf("role %s logs in, and lease %s was %s (%s) at %s", g.User, l.ID, l.State, l.Cause, l.EndedAt.Format(time.RFC3339Nano))})
	}
}

// outageEnd is until when something that leases depend on was away: now, while
// it is.
func (r *run) outageEnd(now time.Time) time.Time {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.away > 0 {
		return now
	}
	return r.outage
}

// outageOf marks the time in which do takes something away and brings it back.
func (r *run) outageOf(do func() error) error {
	r.mu.Lock()
	r.away++
	r.mu.Unlock()
	err := do()
	r.mu.Lock()
	defer r.mu.Unlock()
	r.away--
	r.outage = time.Now()
	return err
}

// chaos takes Vault and PostgreSQL away for a moment, now and then.
func (a *actor) chaos(ctx context.Context) {
	for ctx.Err() == nil {
		a.pause(ctx, 6*time.Second, 18*time.Second)
		if ctx.Err() != nil {
			return
		}
		what := chaosKinds[a.rng.IntN(len(chaosKinds))]
		away := time.Duration(a.rng.Int64N(int64(1500 * time.Millisecond)))
		a.history.note(a.name, "begins", what, away.Milliseconds())
		err := a.outageOf(func() error {
			return a.world.disturb(context.WithoutCancel(ctx), what, away, func(err error) { a.history.note(a.name, "tries again", err.Error()) })
		})
		a.history.note(a.name, "ended", what)
		a.report.disturbed(what)
		if err != nil {
			a.fatal(fmt.Errorf("after %s: %w", what, err))
			return
		}
	}
}

// finish ends everything and waits until nothing is left.
func (r *run) finish(ctx context.Context) error {
	r.say("ending everything")
	r.proxy.Quiet(true)
	if err := replace(r.catalogPath, catalogText(variant{disabled: -1}, r.vaultEntry, r.keys)); err != nil {
		return err
	}
	if d := r.current.Load(); d == nil || !d.alive() {
		if _, err := r.start(ctx, ""); err != nil {
			return err
		}
	}
	for in, err := range r.bots.Incidents(ctx, false) {
		if err != nil {
			return err
		}
		if _, _, err := r.bots.CloseIncident(ctx, in.ID, "the end"); err != nil {
			return err
		}
		at := time.Now()
		_, wrong := r.deliveries.Over(string(in.ID), at)
		r.found(wrong...)
	}
	for g, err := range r.operators.Grants(ctx, client.GrantFilter{}) {
		if err != nil {
			return err
		}
		if _, _, err := r.operators.WithdrawGrant(ctx, g.ID, "the end"); err != nil {
			return err
		}
	}
	return r.drain(ctx)
}

// drain waits, for at most the bound, until the store, PostgreSQL and Vault
// hold nothing of ours, and looks a last time.
func (r *run) drain(ctx context.Context) error {
	began := time.Now()
	var left string
	for time.Since(began) < r.opt.bound+2*longTTL*time.Second {
		open, err := r.leases(ctx, false)
		if err != nil {
			return err
		}
		at := time.Now()
		seen := r.world.look(ctx, r.installation)
		if err := errors.Join(seen.rolesErr, seen.tokensErr); err != nil {
			return err
		}
		_, wrong := r.strays.judge(seen.roles, at, r.outageEnd(at))
		r.found(wrong...)
		if len(open)+len(seen.roles)+len(seen.tokens) == 0 {
			left = ""
			break
		}
		left = fmt.Sprintf("%d leases, %d roles, %d tokens", len(open), len(seen.roles), len(seen.tokens))
		if r.opt.verbose {
			r.say("left after %s: %s", time.Since(began).Round(time.Second), left)
		}
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	r.report.drained(time.Since(began))
	if left != "" {
		r.found(ledger.Violation{Kind: ledger.Unbounded, What: "at the end there are still " + left})
	}
	if err := r.compare(ctx, true); err != nil {
		return err
	}
	// Everything that was ever delivered is dead: the latest of each.
	ids := r.deliveries.Leases()
	r.rng.Shuffle(len(ids), func(i, j int) { ids[i], ids[j] = ids[j], ids[i] })
	for _, id := range ids[:min(len(ids), 200)] {
		g, _ := r.deliveries.Of(id)
		if l, known, err := r.lease(ctx, id); err != nil {
			return err
		} else if known && l.State.Ended() {
			r.mustBeDead(ctx, g, l)
		}
	}
	return nil
}
