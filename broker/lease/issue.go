package lease

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/audit"
	"github.com/mayfly-security/mayfly/broker/policy"
	"github.com/mayfly-security/mayfly/store"
)

// IssueRequest is what an agent asks for.
type IssueRequest struct {
	Tool   string
	Params map[string]string
	TTL    *time.Duration // nil means the tool's maximum
	Reason string         // may be empty
	// Key is the idempotency key: asking again with it returns the same lease
	// and never makes a second one. Empty means that the call stands alone.
	Key string
}

// asked is the request as its idempotency key is bound to it.
func (r IssueRequest) asked(caller broker.Principal) asked {
	return asked{caller: caller, key: r.Key, kind: kindLease, digest: requestDigest("issue", r.Tool, r.Params, r.TTL)}
}

func requestDigest(parts ...any) string {
	b, err := json.Marshal(parts) // maps are marshalled in the order of their keys
	if err != nil {
		panic(fmt.Sprintf("lease: request cannot be marshalled: %v", err)) // only strings, numbers and maps of them come here
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// Delivery is a credential on its way to its agent. Whoever gets one calls
// Done when the secret has been handed over, or cannot be: what closes an
// incident waits for it.
type Delivery struct {
	Lease  broker.Lease
	Secret broker.Secret
	Env    map[string]string // environment variable -> field of the secret
	Done   func()            // may be called more than once
}

// Issue gives the caller one credential for one tool under a grant that it
// has. Every refusal is evidence.
func (e *Engine) Issue(ctx context.Context, caller broker.Caller, req IssueRequest) (*Delivery, error) {
	d, err := e.issue(ctx, caller, req)
	if err != nil {
		e.Refused(ctx, caller, "issue", req.Tool, err)
		return nil, err
	}
	e.metrics.issued.WithLabelValues(d.Lease.Provider, d.Lease.Tool).Inc()
	return d, nil
}

func (e *Engine) issue(ctx context.Context, caller broker.Caller, req IssueRequest) (*Delivery, error) {
	if err := e.giving(); err != nil {
		return nil, err
	}
	if err := broker.CheckText("reason", req.Reason, broker.MaxReason); err != nil {
		return nil, err
	}
	if err := checkKey(req.Key); err != nil {
		return nil, err
	}
	if caller.Person != nil {
		return nil, broker.Refuse(broker.ReasonPermissionDenied,
			"a person draws no credentials: those of a grant are its agent's alone", "let the agent ask with its own identity")
	}
	ep := e.settled()
	if err := ep.agent(caller.ID); err != nil {
		return nil, err
	}
	if req.Key != "" {
		unlock, err := e.keys.lock(ctx, keyIdem(caller.Principal(), req.Key))
		if err != nil {
			return nil, err
		}
		defer unlock()
		if d, err := e.replay(ctx, caller, req); d != nil || err != nil {
			return d, err
		}
	}
	for range 8 {
		d, err := e.attempt(ctx, ep, caller, req)
		if !errors.Is(err, errStale) {
			return d, err
		}
		ep = e.settled()
	}
	return nil, broker.Refuse(broker.ReasonConflict, "the catalog is being exchanged", "try again")
}

// giving refuses while the engine gives nothing.
func (e *Engine) giving() error {
	if e.closed.Load() {
		return broker.Refuse(broker.ReasonShuttingDown, "the broker is stopping", "try again")
	}
	if err := e.room(); err != nil {
		return err
	}
	return e.clock.trusted()
}

// checkKey admits printable ASCII without "|", which divides the store's keys.
func checkKey(key string) error {
	if len(key) > broker.MaxKey {
		return broker.Refusef(broker.ReasonInvalidArgument, "use a shorter key, such as a UUID",
			"the idempotency key is %d characters long; at most %d are taken", len(key), broker.MaxKey)
	}
	for i := range len(key) {
		if c := key[i]; c <= ' ' || c > '~' || c == '|' {
			return broker.Refuse(broker.ReasonInvalidArgument,
				`the idempotency key has characters that are not printable ASCII, a space or a "|"`, "use letters, digits and dashes, such as a UUID")
		}
	}
	return nil
}

// ask checks what was asked for against the tool.
func (ep *epoch) ask(req IssueRequest) (broker.Tool, policy.Ask, error) {
	tool, ok := ep.catalog.Tool(req.Tool)
	if !ok {
		return tool, policy.Ask{}, broker.Refusef(broker.ReasonToolUnknown, "see `mayfly tools`",
			"there is no tool %q", broker.Clean(broker.Shorten(req.Tool, 64)))
	}
	if err := tool.CheckParams(req.Params); err != nil {
		return tool, policy.Ask{}, err
	}
	ttl := tool.MaxTTL
	if req.TTL != nil {
		ttl = *req.TTL
		if ttl <= 0 || ttl > tool.MaxTTL {
			return tool, policy.Ask{}, broker.Refusef(broker.ReasonTTL,
				fmt.Sprintf("ask for a TTL between 1s and %s, or leave it out", tool.MaxTTL),
				"a TTL of %s was asked for, and tool %s gives more than zero and at most %s", ttl, tool.Name, tool.MaxTTL)
		}
	}
	info := ep.catalog.ScopeInfo(tool.Name)
	return tool, policy.Ask{Params: req.Params, TTL: ttl, MinTTL: max(info.MinTTL, time.Second)}, nil
}

// attempt decides by one epoch and, if the decision is yes, makes the lease.
func (e *Engine) attempt(ctx context.Context, ep *epoch, caller broker.Caller, req IssueRequest) (*Delivery, error) {
	if err := ep.agent(caller.ID); err != nil {
		return nil, err
	}
	now := e.clock.now()
	candidates, err := e.candidates(ctx, ep, caller.ID, req, now)
	if err != nil {
		return nil, err
	}
	tool, ask, err := ep.ask(req)
	switch {
	case broker.ReasonOf(err) == broker.ReasonToolUnknown:
		return nil, err
	case err != nil && len(candidates) > 0:
		return nil, err // without a grant, what the tool takes is not told
	}
	i, end, d := policy.Pick(tool.Name, candidates, ask, now)
	if len(candidates) > 0 {
		f := candidates[max(i, 0)] // the one that was chosen, or the first
		e.decisions.add(ep.aboutGrant(f, req.Params, now), f.Policy)
	}
	if err := d.Err(); err != nil {
		return nil, err
	}
	if err := e.paces.may(ep, caller, now); err != nil {
		return nil, err
	}
	grant := candidates[i].Grant
	p := ep.providers[tool.Provider]
	if !p.acquire() {
		return nil, errStale
	}
	defer p.release()

	l := &leaseRecord{
		Lease: broker.Lease{
			ID: broker.NewLeaseID(now), Agent: caller.ID,
			Tool: tool.Name, ToolDigest: tool.Digest, Provider: tool.Provider,
			Params: maps.Clone(req.Params), Grant: grant.ID, Incident: grant.Incident,
			Reason: req.Reason, Correlation: caller.Correlation,
			State: broker.LeaseMinting, CreatedAt: now, End: end,
		},
		Key: req.Key, Stands: p.traits.Stands,
	}
	if req.Key != "" && caller.Certificate != [32]byte{} {
		l.Certificate = caller.Certificate[:]
	}
	var place *place // an inert provider needs none: it is in this process
	if !p.traits.Inert {
		if place, err = e.gate(tool.Provider).enter(ctx, tool.Name, p.traits.MintConcurrency, e.cfg.MintWait, e.clock.now); err != nil {
			return nil, err
		}
	}
	m := &minter{e: e, ep: ep, p: p, tool: tool, caller: caller, ask: ask, l: l, facts: candidates[i], asked: req.asked(caller.Principal()), place: place}
	defer m.done()
	if p.traits.Inert {
		return m.inert(ctx)
	}
	return m.outside(ctx)
}

// candidates are the open grants of an agent for a tool.
func (e *Engine) candidates(ctx context.Context, ep *epoch, agent spiffeid.ID, req IssueRequest, now time.Time) (candidates []policy.GrantFacts, err error) {
	tool := req.Tool
	if strings.Contains(tool, "|") {
		return nil, nil // there is no such tool, and it would divide the key
	}
	err = e.store.View(ctx, func(r store.Reader) error {
		candidates = candidates[:0]
		from, to := store.Prefix(prefixGrantsFor(agent, tool))
		for entry, err := range r.Scan(from, to) {
			if err != nil {
				return err
			}
			f, err := ep.read(r, broker.GrantID(lastPart(entry.Key)), req.Params, now)
			if err != nil {
				return err
			}
			candidates = append(candidates, f)
		}
		return nil
	})
	return candidates, storeRefusal(err)
}

// replay answers a request whose idempotency key has made a lease already. It
// returns neither a Delivery nor an error if the key is new.
func (e *Engine) replay(ctx context.Context, caller broker.Caller, req IssueRequest) (*Delivery, error) {
	key := keyIdem(caller.Principal(), req.Key)
	var l leaseRecord
	var held bool
	var done func()
	err := e.store.View(ctx, func(r store.Reader) error {
		id, err := req.asked(caller.Principal()).made(r)
		if err != nil || id == "" {
			return err
		}
		if l, _, err = get[leaseRecord](r, keyLease(broker.LeaseID(id))); err != nil {
			return err
		}
		return nil
	})
	if err != nil || l.ID == "" {
		return nil, storeRefusal(err)
	}
	// The delivery is registered first and the conditions are read after it:
	// a close that commits in between waits for it.
	done = e.deliveries.begin(l.Grant)
	if l, held, err = e.held(ctx, l.ID); err != nil {
		done()
		return nil, err
	}
	if held {
		s, ok := e.replays.get(key, e.clock.now())
		if !ok {
			s, ok = e.remint(ctx, caller, l)
		}
		if ok {
			now, ep := e.clock.now(), e.current.Load()
			ev := l.event(now, audit.LeaseReplayed)
			ev.Actor, ev.Correlation = caller.Principal().String(), caller.Correlation
			err := e.paces.mayAgain(ep, caller, now)
			if err == nil {
				err = e.update(ctx, now, func(t store.Txn) error { return appendEvent(t, ev) })
			}
			if err != nil {
				done()
				return nil, err
			}
			e.paces.gave(ep, caller, true, now)
			return &Delivery{Lease: l.Lease, Secret: s.secret, Env: s.env, Done: done}, nil
		}
	}
	done()
	return nil, e.lost(ctx, caller, l)
}

// remint makes the secret of a lease of an inert provider once more: the same
// lease, with the same end, for the same certificate. Such a secret need not be
// kept anywhere, and survives a restart.
func (e *Engine) remint(ctx context.Context, caller broker.Caller, l leaseRecord) (replayed, bool) {
	ep := e.settled()
	tool, ok := ep.catalog.Tool(l.Tool)
	p := ep.providers[l.Provider]
	if !ok || tool.Digest != l.ToolDigest || p == nil || !p.traits.Inert || !p.acquire() {
		return replayed{}, false
	}
	defer p.release()
	copy(caller.Certificate[:], l.Certificate)
	m := &minter{e: e, ep: ep, p: p, tool: tool, caller: caller, l: &l}
	minted, err := m.mint(ctx, m.request(), nil)
	if err != nil {
		e.log.Warn("making the secret of a lease again", "lease", l.ID, "provider", l.Provider, "error", err)
		return replayed{}, false
	}
	return replayed{secret: minted.Secret, env: tool.Env}, true
}

// lost says what became of a lease whose secret can no longer be given. One
// that is still alive is ended. Its use is not given back: whether the secret
// came to its agent is not known, and an agent that says it did not may have
// used it.
func (e *Engine) lost(ctx context.Context, caller broker.Caller, l leaseRecord) error {
	next := "ask again with a new idempotency key"
	var refusal *broker.Error
	switch {
	case l.Cause == broker.CauseMintFailed, l.State == broker.LeaseMinting:
		refusal = broker.Refusef(broker.ReasonProvider, next, "lease %s of this key was not made: the provider failed", l.ID)
	case l.State == broker.LeaseActive:
		why := ending{cause: broker.CauseSecretGone, actor: caller.Principal().String(), correlation: caller.Correlation}
		if !e.clock.late().Before(l.End) {
			why.cause, why.actor = broker.CauseTTL, audit.Broker
		}
		if _, err := e.endLeases(ctx, []broker.LeaseID{l.ID}, why); err != nil {
			return err
		}
		refusal = broker.Refusef(broker.ReasonSecretGone, next,
			"lease %s of this key exists, but its secret can no longer be handed out; the lease is being ended", l.ID)
	default:
		refusal = broker.Refusef(broker.ReasonConflict, next, "lease %s of this key is %s (%s)", l.ID, l.State, l.Cause)
	}
	refusal.Lease = l.ID
	return refusal
}

// held reads a lease and says whether everything that it lives on holds now.
func (e *Engine) held(ctx context.Context, id broker.LeaseID) (l leaseRecord, ok bool, err error) {
	ep := e.current.Load()
	err = e.store.View(ctx, func(r store.Reader) error {
		var found bool
		var err error
		if l, found, err = get[leaseRecord](r, keyLease(id)); err != nil {
			return err
		}
		if !found {
			return policy.NotFound("lease", string(id))
		}
		if !l.Usable(e.clock.late()) || e.doomed(&l) {
			return nil
		}
		f, err := ep.read(r, l.Grant, l.Params, e.clock.late())
		if err != nil {
			return err
		}
		if _, ok = e.holds(f, e.clock.late()); !ok {
			return nil
		}
		_, cut, err := e.cutOffOf(r, ep.providers[l.Provider], &l, l.Handle)
		ok = !cut && err == nil
		return err
	})
	return l, ok, storeRefusal(err)
}

// Usable reports whether the lease's credential is to be accepted now: what a
// resource server that asks the broker is told. It reads the conditions
// themselves, so that a lease is refused from the instant at which its
// incident closes, and not only when the lease has been told.
func (e *Engine) Usable(ctx context.Context, id broker.LeaseID) (broker.Lease, bool, error) {
	l, ok, err := e.held(ctx, id)
	if broker.ReasonOf(err) == broker.ReasonNotFound {
		return broker.Lease{}, false, nil
	}
	return l.Lease, ok, err
}
