package lease

import (
	"context"
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

// maxGrant is the longest that a grant can be good for.
const maxGrant = 31 * 24 * time.Hour

// GrantRequest is what an operator asks for.
type GrantRequest struct {
	Agent     spiffeid.ID
	Tool      string
	Params    map[string]string // fixed values; may be empty
	NotBefore time.Time         // zero means now
	NotAfter  time.Time         // when it ends; zero means For after its beginning
	For       time.Duration     // used where NotAfter is zero
	MaxUses   int               // 0 means any number
	Reason    string            // required
	Key       string            // idempotency key; may be empty
}

// CreateGrant gives an agent the right to a tool for a time, on an operator's word.
func (e *Engine) CreateGrant(ctx context.Context, caller broker.Caller, req GrantRequest) (broker.Grant, error) {
	g, err := e.createGrant(ctx, caller, req)
	if err != nil {
		e.Refused(ctx, caller, "create_grant", req.Tool, err)
	}
	return g, err
}

func (e *Engine) createGrant(ctx context.Context, caller broker.Caller, req GrantRequest) (broker.Grant, error) {
	if err := e.giving(); err != nil {
		return broker.Grant{}, err
	}
	ep := e.settled()
	verdict, err := e.administer(ctx, ep, caller, policy.VerbMakeGrant)
	if err != nil {
		return broker.Grant{}, err
	}
	if p := caller.Person; p != nil && p.Method == broker.SignInDevice {
		// It stands for all the approvals that the tool's rule wants, and a code
		// counts for none that needs a fresh sign-in: it can be phished.
		return broker.Grant{}, broker.Refuse(broker.ReasonStepUp, "a sign-in by device code makes no grant", "sign in with a browser: `mayfly login`")
	}
	now := e.clock.now()
	g, err := ep.newGrant(req, caller.Principal(), now)
	if err != nil {
		return broker.Grant{}, err
	}
	if err := checkKey(req.Key); err != nil {
		return broker.Grant{}, err
	}
	once := asked{caller: caller.Principal(), key: req.Key, kind: "grant",
		digest: requestDigest("grant", req.Agent, req.Tool, req.Params, req.NotBefore, req.NotAfter, req.For, req.MaxUses)}
	made := g
	err = e.update(ctx, now, func(t store.Txn) error {
		made = g
		if err := ep.same(t); err != nil {
			return err
		}
		id, err := once.take(t, string(g.ID), now)
		if err != nil {
			return err
		}
		if id != "" {
			made, err = madeBy[broker.Grant](t, once, keyGrant(broker.GrantID(id)))
			return err
		}
		return openGrant(t, g, caller, verdict)
	})
	if err != nil {
		return broker.Grant{}, again(err)
	}
	e.house.dueAt(made.NotAfter)
	return made, nil
}

// newGrant checks a request and makes the grant that it asks for.
func (ep *epoch) newGrant(req GrantRequest, by broker.Principal, now time.Time) (broker.Grant, error) {
	if err := requireReason(req.Reason, "a grant"); err != nil {
		return broker.Grant{}, err
	}
	agent, known := ep.catalog.Agent(req.Agent)
	if !known || agent.Disabled {
		return broker.Grant{}, policy.AgentRefusal(req.Agent.String(), known)
	}
	if broker.WorkloadPrincipal(req.Agent) == by {
		return broker.Grant{}, broker.Refuse(broker.ReasonSelfService, "nobody makes a grant for itself", "let another operator make it")
	}
	tool, ok := ep.catalog.Tool(req.Tool)
	if !ok {
		return broker.Grant{}, broker.Refusef(broker.ReasonToolUnknown, "see `mayfly tools`",
			"there is no tool %q", broker.Clean(broker.Shorten(req.Tool, 64)))
	}
	if len(req.Params) > 0 {
		if err := checkFixed(tool, req.Params); err != nil {
			return broker.Grant{}, err
		}
	}
	from := req.NotBefore
	if from.IsZero() {
		from = now
	}
	if req.NotAfter.IsZero() {
		req.NotAfter = from.Add(min(req.For, 10*maxGrant)) // what is too long is refused below
	}
	switch {
	case !req.NotAfter.After(from):
		return broker.Grant{}, broker.Refusef(broker.ReasonInvalidArgument, "give an end after the beginning",
			"the grant would end (%s) before it begins (%s)", req.NotAfter.UTC().Format(time.RFC3339), from.UTC().Format(time.RFC3339))
	case !req.NotAfter.After(now):
		return broker.Grant{}, broker.Refuse(broker.ReasonInvalidArgument, "the grant would be over already", "give an end in the future")
	case req.NotAfter.Sub(now) > maxGrant:
		return broker.Grant{}, broker.Refusef(broker.ReasonInvalidArgument, "make a shorter grant, and renew it if need be",
			"the grant would end in %s; the longest is %s", req.NotAfter.Sub(now).Round(time.Minute), maxGrant)
	case req.MaxUses < 0:
		return broker.Grant{}, broker.Refuse(broker.ReasonInvalidArgument, "the number of uses is negative", "give 0 for any number, or a number above it")
	}
	return broker.Grant{
		ID: broker.NewGrantID(now), Agent: req.Agent, Tool: tool.Name, ToolDigest: tool.Digest,
		Params: maps.Clone(req.Params), NotBefore: from.UTC(), NotAfter: req.NotAfter.UTC(), MaxUses: req.MaxUses,
		Reason: req.Reason, CreatedBy: by, CreatedAt: now, State: broker.GrantOpen,
		PolicyDigest: ep.policies().Digest(),
	}, nil
}

// checkFixed checks the values that a grant fixes: each declared and of its
// type; none has to be there.
func checkFixed(tool broker.Tool, params map[string]string) error {
	loose := tool
	loose.Params = nil
	for _, p := range tool.Params {
		p.Optional = true
		loose.Params = append(loose.Params, p)
	}
	return loose.CheckParams(params)
}

// same refuses, inside the transaction, what was decided by another catalog.
func (ep *epoch) same(t store.Txn) error {
	cat, _, err := get[catalogRecord](t, keyCatalog)
	if err == nil && cat.Generation != ep.generation {
		err = errStale
	}
	return err
}

// again turns a decision that a reload overtook into a refusal to repeat.
func again(err error) error {
	if err == errStale {
		return broker.Refuse(broker.ReasonConflict, "the catalog is being exchanged", "try again")
	}
	return err
}

// openGrant writes a new grant, its indexes and its evidence. caller is whose
// act made it, and verdict what allowed that.
func openGrant(t store.Txn, g broker.Grant, caller broker.Caller, verdict policy.Verdict) error {
	if err := put(t, keyGrant(g.ID), g); err != nil {
		return err
	}
	if err := t.Put(keyGrantOf(g), nil); err != nil {
		return err
	}
	if err := t.Put(keyHouse(g.NotAfter, houseGrant, string(g.ID)), nil); err != nil {
		return err
	}
	if err := indexVotes(g, func(key string) error { return t.Put(key, nil) }); err != nil {
		return err
	}
	ev := grantEvent(g, g.CreatedAt, audit.GrantCreated)
	ev.Actor, ev.Reason, ev.Correlation = caller.Principal().String(), g.Reason, caller.Correlation
	ev.Details = map[string]string{
		"not_before": g.NotBefore.Format(time.RFC3339), "not_after": g.NotAfter.Format(time.RFC3339),
		"max_uses": fmt.Sprint(g.MaxUses), "tool_digest": g.ToolDigest,
	}
	tellVerdict(ev.Details, verdict)
	tellOrigin(ev.Details, g)
	for k, v := range g.Params {
		ev.Details["param."+k] = v
	}
	return appendEvent(t, ev)
}

func grantEvent(g broker.Grant, now time.Time, what audit.Type) audit.Event {
	ev := audit.Event{Time: now, Type: what, Agent: g.Agent.String(), Tool: g.Tool, Grant: g.ID, Incident: g.Incident, Request: g.Request}
	if g.OnBehalfOf != nil {
		ev.OnBehalfOf = g.OnBehalfOf.Principal()
	}
	return ev
}

// tellOrigin puts into the details of a piece of evidence what a grant that
// was asked for came from.
func tellOrigin(details map[string]string, g broker.Grant) {
	if g.Ticket != "" {
		details["ticket"] = g.Ticket
	}
	if g.Rule != "" {
		details["rule"], details["rule_digest"] = g.Rule, g.RuleDigest
	}
	if g.BreakGlass {
		details["break_glass"] = "true"
	}
	if len(g.Voters) > 0 {
		names := make([]string, len(g.Voters))
		for i, v := range g.Voters {
			names[i] = v.Name + " (" + v.Group + ")"
		}
		details["voters"] = broker.Shorten(strings.Join(names, ", "), 2000)
	}
}

// endGrant ends a grant that is open; one that is not stays as it is.
func endGrant(t store.Txn, id broker.GrantID, now time.Time, state broker.GrantState, why sweepRecord) error {
	g, ok, err := get[broker.Grant](t, keyGrant(id))
	if err != nil || !ok || g.State != broker.GrantOpen {
		return err
	}
	g.State, g.EndedAt, g.EndedBy = state, now, why.Actor
	if err := t.Delete(keyGrantOf(g)); err != nil {
		return err
	}
	if err := indexVotes(g, t.Delete); err != nil {
		return err
	}
	if err := put(t, keyGrant(id), g); err != nil {
		return err
	}
	if err := t.Put(keyEnded(now, retiredGrant, string(id)), nil); err != nil {
		return err
	}
	ev := grantEvent(g, now, audit.GrantEnded)
	ev.Actor, ev.Reason, ev.Cause, ev.Correlation = why.Actor, why.Reason, string(why.Cause), why.Correlation
	why.By.tell(&ev)
	return appendEvent(t, ev)
}

// withdraw ends a grant: the commit of this is the instant from which nothing
// of it can be delivered. One that has ended stays as it is.
func withdraw(t store.Txn, id broker.GrantID, now time.Time, why sweepRecord) error {
	if g, ok, err := get[broker.Grant](t, keyGrant(id)); err != nil || !ok || g.State != broker.GrantOpen {
		return err
	}
	if err := endGrant(t, id, now, broker.GrantWithdrawn, why); err != nil {
		return err
	}
	return put(t, keySweep(sweepGrants, string(id)), why)
}

// Ended counts what became of leases that a call ended.
type Ended struct {
	Dead     int // confirmed dead since the call
	Revoking int // still being revoked
	Lapsed   int // over, and not known to be dead: nothing and nobody could end them
}

// WithdrawGrant ends a grant and its leases. When it has returned, no lease of
// the grant is ever delivered. Withdrawing what has ended tells how its leases
// stand.
func (e *Engine) WithdrawGrant(ctx context.Context, caller broker.Caller, id broker.GrantID, reason string) (broker.Grant, Ended, error) {
	g, ended, err := e.withdrawGrant(ctx, caller, id, reason)
	if err != nil {
		e.Refused(ctx, caller, "withdraw_grant", "", err)
	}
	return g, ended, err
}

func (e *Engine) withdrawGrant(ctx context.Context, caller broker.Caller, id broker.GrantID, reason string) (broker.Grant, Ended, error) {
	if err := broker.CheckText("reason", reason, broker.MaxReason); err != nil {
		return broker.Grant{}, Ended{}, err
	}
	verdict, err := e.administer(ctx, e.current.Load(), caller, policy.VerbWithdrawGrant)
	if err != nil {
		return broker.Grant{}, Ended{}, err
	}
	why := sweepRecord{Cause: broker.CauseGrantWithdrawn, Actor: caller.Principal().String(), Reason: reason, Correlation: caller.Correlation,
		By: permissionOf(verdict)}
	var g broker.Grant
	now := e.clock.now()
	err = e.update(ctx, now, func(t store.Txn) error {
		was, ok, err := get[broker.Grant](t, keyGrant(id))
		if err != nil {
			return err
		}
		if !ok {
			return policy.NotFound("grant", string(id))
		}
		if was.State == broker.GrantOpen {
			if err := withdraw(t, id, now, why); err != nil {
				return err
			}
		}
		g, _, err = get[broker.Grant](t, keyGrant(id))
		return err
	})
	if untellable(err) {
		err = e.withdrawAnyway(ctx, id, why, err)
	}
	if err != nil {
		return broker.Grant{}, Ended{}, err
	}
	ids, err := e.sweepGrant(context.WithoutCancel(ctx), id, why) // only the waiting is the caller's
	if err != nil {
		e.house.poke() // it goes on with the sweep
		return broker.Grant{}, Ended{}, err
	}
	if err := e.awaitDeliveries(ctx, id); err != nil {
		return broker.Grant{}, Ended{}, err
	}
	ended, err := e.awaitEnd(ctx, ids)
	return g, ended, err
}
