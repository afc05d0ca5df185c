package lease

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/audit"
	"github.com/mayfly-security/mayfly/broker/failpoint"
	"github.com/mayfly-security/mayfly/broker/policy"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/store"
)

// minter makes one lease. It owns l until it returns; a call to the provider
// that is left behind has no part of it but the ID.
type minter struct {
	e      *Engine
	ep     *epoch // the epoch that decided; commits may move it on
	p      *openProvider
	tool   broker.Tool
	caller broker.Caller
	ask    policy.Ask
	l      *leaseRecord
	facts  policy.GrantFacts // that decided last
	asked  asked
	place  *place // at the provider's gate; nil where none is needed

	left bool // the call to the provider was left behind

	mu     sync.Mutex
	over   bool             // nobody waits for the attempt any more
	handle providers.Handle // the last that was recorded
}

func (m *minter) request() providers.MintRequest {
	return providers.MintRequest{
		Lease: m.l.ID, Agent: m.l.Agent, Certificate: m.caller.Certificate,
		Tool: m.tool, Params: m.l.Params, Incident: m.l.Incident,
		Now: m.l.CreatedAt, End: m.l.End,
	}
}

// inert makes a lease whose minting has no effect outside until somebody holds
// the secret: it is minted first and needs one commit, the one that makes it
// active.
func (m *minter) inert(ctx context.Context) (*Delivery, error) {
	attempt, cancel := context.WithTimeout(ctx, m.p.traits.MintTimeout)
	minted, err := m.mint(attempt, m.request(), nil)
	cancel()
	if ctx.Err() != nil {
		m.place.ended(ownWord, err, m.e.clock.now()) // the caller left: that tells nothing of the provider
	} else {
		m.place.ended(resultOf(err), err, m.e.clock.now())
	}
	if err != nil {
		return nil, m.providerRefusal(err)
	}
	m.settle(minted)
	done := m.e.deliveries.begin(m.l.Grant)
	now := m.e.clock.now()
	err = m.e.update(ctx, now, func(t store.Txn) error {
		l := *m.l
		if err := m.admit(t, now); err != nil {
			return err
		}
		l.State, l.ActiveAt, l.Due = broker.LeaseActive, now, l.End
		if err := m.create(t, &l); err != nil {
			return err
		}
		ev := m.event(&l, now, audit.LeaseActive)
		return appendEvent(t, ev)
	})
	m.counted(err, now)
	if err != nil {
		done()
		// A commit of unknown outcome may have made a lease that nobody gets.
		// Its secret is dropped here, and so harmless; the record is ended.
		if errors.Is(err, store.ErrUnknown) {
			m.e.endLater(m.l.ID, nil, broker.CauseUndelivered, true)
		}
		return nil, err
	}
	m.l.State, m.l.ActiveAt = broker.LeaseActive, now
	return m.deliver(minted.Secret, done), nil
}

// outside makes a lease at a provider where minting has an effect: intent,
// mint, commit (I1, I2).
func (m *minter) outside(ctx context.Context) (*Delivery, error) {
	now := m.e.clock.now()
	deadline := now.Add(m.p.traits.MintTimeout)
	m.l.Settles = deadline.Add(m.p.traits.LateBound)
	m.l.Due = deadline.Add(time.Second)
	if planner, ok := m.p.Provider.(providers.Planner); ok {
		handle, err := planner.Plan(m.request())
		if err != nil {
			return nil, m.providerRefusal(errors.Join(providers.ErrNothingMade, err))
		}
		m.l.Handle = handle
	}
	m.e.startMint(m.l.ID)
	defer func() {
		if !m.left {
			m.e.endMint(m.l.ID)
		}
	}()
	if d, is, err := m.mutant(ctx, now, deadline); is {
		return d, err
	}
	failpoint.At("lease.intent.before")
	if err := m.intend(ctx, now); err != nil {
		return nil, err
	}
	failpoint.At("lease.intent.after")

	// From here on the attempt is carried through whatever the caller does:
	// something may exist.
	detached := context.WithoutCancel(ctx)
	// The deadline is the one that the intent has, however long its commit took.
	attempt, cancel := context.WithTimeout(detached, deadline.Sub(m.e.clock.now()))
	minted, err := m.mint(attempt, m.request(), func(h providers.Handle) error {
		return m.record(detached, h)
	})
	cancel()
	m.place.ended(resultOf(err), err, m.e.clock.now())
	if err != nil {
		m.fail(detached, minted.Handle, err)
		return nil, m.providerRefusal(err)
	}
	if minted.Handle == nil {
		minted.Handle = m.lastHandle()
	}
	m.settle(minted)

	done := m.e.deliveries.begin(m.l.Grant)
	failpoint.At("lease.activate.before")
	refusal, err := m.activate(detached, minted.Handle)
	failpoint.At("lease.activate.after")
	switch {
	case err != nil:
		done()
		m.e.endLater(m.l.ID, minted.Handle, broker.CauseUndelivered, false)
		return nil, err
	case refusal != nil:
		done()
		m.e.wake(m.l.Provider)
		return nil, refusal
	case ctx.Err() != nil && m.l.Key == "":
		// Nobody is there to take it, and nobody can ask for it again.
		done()
		m.e.endLater(m.l.ID, nil, broker.CauseUndelivered, false)
		return nil, ctx.Err()
	}
	return m.deliver(minted.Secret, done), nil
}

// mint calls the provider and turns a panic, and a credential that would live
// for ever, into an error of unknown outcome. So is an attempt that does not
// end in its time: what it records from then on is refused, nothing of it is
// ever delivered, and what it comes to after all is ended.
func (m *minter) mint(ctx context.Context, req providers.MintRequest, record func(providers.Handle) error) (minted providers.Minted, err error) {
	start := time.Now()
	minted, err = called(ctx, m.e.gate(m.l.Provider), m.p, callMint, func(ctx context.Context) (providers.Minted, error) {
		minted, err := m.p.Mint(ctx, req, record)
		if err == nil && minted.DiesAt.IsZero() && !minted.Static {
			err = errors.New("the provider made a credential that does not die by itself (I8)")
		}
		return minted, err
	}, m.late)
	if errors.Is(err, errLeft) {
		m.left = true
		m.mu.Lock()
		m.over = true
		m.mu.Unlock()
	}
	m.e.metrics.minted(m.l.Provider, time.Since(start), err)
	return minted, err
}

// late takes what an attempt came to that was left behind: it is ended. Until
// then no death of its lease was believed.
func (m *minter) late(minted providers.Minted, _ error) {
	m.place.leave()
	if m.p.traits.Inert {
		return // the secret is dropped here, and so harmless
	}
	m.e.endMint(m.l.ID)
	m.e.endLater(m.l.ID, minted.Handle, broker.CauseMintFailed, false)
}

// done gives the place at the provider back, if the provider's call is over.
func (m *minter) done() {
	if m.left {
		return // late does
	}
	m.place.ended(ownWord, nil, m.e.clock.now()) // if the provider was not asked
	m.place.leave()
}

// lastHandle is the last one that was recorded, or planned.
func (m *minter) lastHandle() providers.Handle {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.handle != nil {
		return m.handle
	}
	return m.l.Handle
}

// settle takes over what the provider says of the credential's life.
func (m *minter) settle(minted providers.Minted) {
	m.l.DiesAt, m.l.Survives, m.l.Static = minted.DiesAt.UTC(), minted.Survives, minted.Static
	if !minted.Ends.IsZero() && minted.Ends.Before(m.l.End) {
		m.l.End = minted.Ends.UTC()
	}
	m.l.Handle = minted.Handle
}

// admit decides again, inside the transaction, whether the lease may be made,
// counts its use, and takes its idempotency key.
func (m *minter) admit(t store.Txn, now time.Time) error {
	f, err := m.ep.guard(t, m.l.Grant, m.l.Params, now)
	if err != nil {
		return err
	}
	m.facts = f
	if _, d := f.Issue(m.ask, now); d.Err() != nil {
		return d.Err()
	}
	if why, over := m.e.limbo.over(f.Grant); over {
		refusal := lateRefusal(why.Cause, m.l.ID)
		refusal.Lease = "" // there is no such lease
		return refusal
	}
	if f.Grant.MaxUses > 0 {
		f.Grant.Uses++
		if err := put(t, keyGrant(f.Grant.ID), f.Grant); err != nil {
			return err
		}
	}
	already, err := m.asked.take(t, string(m.l.ID), now)
	if err == nil && already != "" {
		err = broker.Refuse(broker.ReasonConflict, "another request with this idempotency key is under way", "ask again with the same key")
	}
	return err
}

// create writes the lease and its indexes.
func (m *minter) create(t store.Txn, l *leaseRecord) error {
	if err := l.count(t, m.facts.Agent.MaxLeases); err != nil {
		return err
	}
	if err := t.Put(keyLeaseOf(l.Agent, l.ID), nil); err != nil {
		return err
	}
	if err := t.Put(keyOpen(l.Grant, l.ID), nil); err != nil {
		return err
	}
	if err := t.Put(keyDue(l.Provider, l.Due, l.ID), dueValue(l.State)); err != nil {
		return err
	}
	return put(t, keyLease(l.ID), l)
}

func (m *minter) event(l *leaseRecord, now time.Time, what audit.Type) audit.Event {
	ev := l.event(now, what)
	ev.Actor, ev.Reason = m.caller.Principal().String(), l.Reason
	if ev.Details == nil {
		ev.Details = map[string]string{}
	}
	ev.Request = m.facts.Grant.Request
	if user := m.facts.Grant.OnBehalfOf; user != nil {
		ev.OnBehalfOf = user.Principal()
	}
	tellVerdict(ev.Details, m.facts.Policy)
	ev.Details["end"] = l.End.Format(time.RFC3339)
	for k, v := range l.Params {
		ev.Details["param."+k] = v
	}
	return ev
}

// intend commits the intent: from here on the store says that something may
// exist, until when the attempt can run, and by which handle it is found.
func (m *minter) intend(ctx context.Context, now time.Time) error {
	err := m.e.update(ctx, now, func(t store.Txn) error {
		if err := m.admit(t, now); err != nil {
			return err
		}
		if cut, is, err := m.e.cutOffOf(t, m.p, m.l, m.l.Handle); err != nil || is {
			if is {
				err = cut.notNow(m.l.Tool, now)
			}
			return err
		}
		if err := m.create(t, m.l); err != nil {
			return err
		}
		return appendEvent(t, m.event(m.l, now, audit.LeaseIntended))
	})
	m.counted(err, now)
	if errors.Is(err, store.ErrUnknown) {
		m.e.endLater(m.l.ID, nil, broker.CauseMintFailed, false)
	}
	return err
}

// counted counts an attempt to the caller's pace once there is, or may be, a
// record of it, whatever becomes of it.
func (m *minter) counted(err error, now time.Time) {
	if err == nil || errors.Is(err, store.ErrUnknown) {
		m.e.paces.gave(m.ep, m.caller, false, now)
	}
}

// record makes a handle durable while the attempt runs. It refuses, so that
// the provider goes no further, once the lease is to be ended.
func (m *minter) record(ctx context.Context, h providers.Handle) error {
	failpoint.At("lease.record.before")
	now := m.e.clock.now()
	state := broker.LeaseMinting
	err := m.e.update(ctx, now, func(t store.Txn) error {
		l, err := mustLease(t, m.l.ID)
		if err != nil {
			return err
		}
		if state = l.State; state.Ended() {
			return nil
		}
		l.Handle = h
		return put(t, keyLease(l.ID), l)
	})
	if err != nil {
		return fmt.Errorf("recording the handle of lease %s: %w", m.l.ID, err)
	}
	failpoint.At("lease.record.after")
	m.mu.Lock()
	m.handle = h
	over := m.over
	m.mu.Unlock()
	if over {
		return fmt.Errorf("the attempt to mint lease %s took too long, and is being ended", m.l.ID)
	}
	if state != broker.LeaseMinting {
		return fmt.Errorf("lease %s is %s already", m.l.ID, state)
	}
	return nil
}

// activate commits the lease as active if everything it lives on still holds,
// and as revoking if not; refusal then says why. An error means that neither
// is certain.
func (m *minter) activate(ctx context.Context, h providers.Handle) (refusal *broker.Error, err error) {
	for range 8 {
		now := m.e.clock.now()
		var l *leaseRecord
		err = m.e.update(ctx, now, func(t store.Txn) error {
			refusal = nil
			if l, err = mustLease(t, m.l.ID); err != nil {
				return err
			}
			f, err := m.ep.guard(t, m.l.Grant, l.Params, now)
			if err != nil {
				return err
			}
			m.facts = f
			l.Handle, l.MintDone = h, true
			l.DiesAt, l.Survives, l.Static = m.l.DiesAt, m.l.Survives, m.l.Static
			if l.State == broker.LeaseMinting {
				l.End = earlier(l.End, m.l.End) // one that is being ended has its end, and is indexed by it
			}
			cause, holds := m.e.holds(f, now)
			cut, isCut, err := m.e.cutOffOf(t, m.p, m.l, h)
			if err != nil {
				return err
			}
			switch {
			case l.State != broker.LeaseMinting:
				// It was ended while it was made: the worker now has the handle
				// and need not wait for the attempt any more.
				refusal = lateRefusal(l.Cause, l.ID)
				if l.State.Ended() {
					return fmt.Errorf("lease %s ended as %s while it was being made", l.ID, l.State)
				}
				l.Refund = true // its secret goes to nobody
				return moveDue(t, l, now)
			case !holds:
				refusal = lateRefusal(cause, l.ID)
				return startRevoking(t, l, now, ending{cause: cause, actor: audit.Broker, refund: true})
			case isCut:
				refusal = lateRefusal(broker.CauseCutOff, l.ID)
				why := cut.ending()
				why.refund = true
				return startRevoking(t, l, now, why)
			case !now.Before(l.End):
				refusal = lateRefusal(broker.CauseTTL, l.ID)
				return startRevoking(t, l, now, ending{cause: broker.CauseTTL, actor: audit.Broker, refund: true})
			}
			l.State, l.ActiveAt = broker.LeaseActive, now
			if err := moveDue(t, l, l.End); err != nil {
				return err
			}
			return appendEvent(t, m.event(l, now, audit.LeaseActive))
		})
		if !errors.Is(err, errStale) {
			break
		}
		m.ep = m.e.settled()
	}
	if err != nil {
		return nil, err
	}
	if refusal == nil {
		m.l.State, m.l.ActiveAt = broker.LeaseActive, m.e.clock.now()
	}
	return refusal, nil
}

// lateRefusal tells an agent that what its lease was to live on ended while
// the lease was being made.
func lateRefusal(cause broker.Cause, id broker.LeaseID) *broker.Error {
	reason := broker.ReasonNoGrant
	switch cause {
	case broker.CauseIncidentClosed, broker.CauseIncidentExpired:
		reason = broker.ReasonIncidentClosed
	case broker.CauseAgentDisabled:
		reason = broker.ReasonAgentDisabled
	case broker.CauseToolChanged, broker.CauseRuleChanged:
		reason = broker.ReasonGrantSuspended
	case broker.CausePolicy:
		reason = broker.ReasonPolicy
	case broker.CauseTTL, broker.CauseMintFailed, broker.CauseCutOff:
		reason = broker.ReasonProvider
	}
	next := "ask again once you have a grant that holds"
	if reason == broker.ReasonProvider { // the grant holds
		next = "ask again in a moment"
	}
	r := broker.Refusef(reason, next,
		"lease %s was ended before it could be handed over (%s)", id, cause)
	r.Lease = id
	return r
}

// fail records that the attempt failed. If the provider is certain that it
// made nothing, the lease is over; otherwise what it may have made is ended.
func (m *minter) fail(ctx context.Context, h providers.Handle, cause error) {
	m.e.log.Warn("minting a lease", "lease", m.l.ID, "tool", m.l.Tool, "provider", m.l.Provider,
		"correlation", m.l.Correlation, "error", cause)
	failpoint.At("lease.fail")
	if !errors.Is(cause, providers.ErrNothingMade) {
		m.e.endLater(m.l.ID, h, broker.CauseMintFailed, false)
		return
	}
	now := m.e.clock.now()
	err := m.e.update(ctx, now, func(t store.Txn) error {
		l, err := mustLease(t, m.l.ID)
		if err != nil || l.State.Ended() {
			return err
		}
		l.MintDone, l.Refund = true, true
		if l.State == broker.LeaseMinting {
			l.Cause = broker.CauseMintFailed
		}
		return finish(t, l, now, broker.LeaseRevoked, m.e.cfg.Retention, map[string]string{"made": "nothing"})
	})
	if err != nil {
		m.e.endLater(m.l.ID, h, broker.CauseMintFailed, false)
	} else {
		m.e.unlearn(m.l)
	}
	m.e.watch.signal()
}

// providerRefusal is what the agent is told: never the upstream's text.
func (m *minter) providerRefusal(err error) error {
	var refusal *broker.Error
	switch {
	case errors.As(err, &refusal) && errors.Is(err, providers.ErrNothingMade):
		// The provider's own word to the caller, such as "connect with a
		// certificate"; bounded, and safe to show.
		return broker.Refuse(refusal.Reason, broker.Clean(broker.Shorten(refusal.Message, 300)),
			broker.Clean(broker.Shorten(refusal.Next, 300))).Because(err)
	case errors.Is(err, providers.ErrAway) && errors.Is(err, providers.ErrNothingMade):
		refusal = broker.Refusef(broker.ReasonProvider, "try again later; nothing was made",
			"provider %s is away", m.l.Provider)
	case errors.Is(err, providers.ErrRefused):
		refusal = broker.Refusef(broker.ReasonProviderRefused, "give the correlation ID to an operator",
			"provider %s refused to make a credential for %s", m.l.Provider, m.l.Tool)
	default:
		refusal = broker.Refusef(broker.ReasonProvider, "try again later; what may have been made is being ended",
			"provider %s did not make a credential for %s", m.l.Provider, m.l.Tool)
	}
	refusal.Lease = m.l.ID
	if m.p.traits.Inert {
		refusal.Lease = "" // there is no such lease
	}
	return refusal.Because(err)
}

func (m *minter) deliver(secret broker.Secret, done func()) *Delivery {
	if m.l.Key != "" && !m.p.traits.Inert { // an inert provider can make it again
		m.e.replays.put(keyIdem(broker.WorkloadPrincipal(m.l.Agent), m.l.Key), replayed{secret: secret, env: m.tool.Env}, m.e.clock.now())
	}
	failpoint.At("lease.deliver")
	m.e.dueAt(m.l.Provider, m.l.End)
	return &Delivery{Lease: m.l.Lease, Secret: secret, Env: m.tool.Env, Done: done}
}

// startMint and endMint keep the set of attempts that run in this process. The
// worker of the provider leaves their leases alone.
func (e *Engine) startMint(id broker.LeaseID) {
	e.mintMu.Lock()
	defer e.mintMu.Unlock()
	e.minting[id] = struct{}{}
}

func (e *Engine) endMint(id broker.LeaseID) {
	e.mintMu.Lock()
	defer e.mintMu.Unlock()
	delete(e.minting, id)
}

func (e *Engine) isMinting(id broker.LeaseID) bool {
	e.mintMu.Lock()
	defer e.mintMu.Unlock()
	_, ok := e.minting[id]
	return ok
}

func earlier(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}
