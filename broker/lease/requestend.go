package lease

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/audit"
	"github.com/mayfly-security/mayfly/broker/policy"
	"github.com/mayfly-security/mayfly/store"
)

// by is who, or what, ends a request.
type by struct {
	actor       string
	correlation broker.CorrelationID
	by          permission
}

// requestChunk is how many requests one transaction looks at and ends: with
// what they stand on, that takes up to twelve operations.
const requestChunk = 8

// basis is what a pending request stands on, and what it is decided by.
type basis struct {
	void     string // why it can no longer be decided; empty if it can
	agent    broker.Agent
	rule     broker.ApprovalRule
	incident broker.Incident
}

// basis reads what a pending request stands on, by this epoch's catalog: its
// agent, its tool, its rule, its incident, and that policy lets it be asked.
// Where one of them is not what it was, the request is void.
func (ep *epoch) basis(r getter, rec requestRecord, now time.Time) (b basis, err error) {
	void := func(format string, args ...any) (basis, error) {
		return basis{void: fmt.Sprintf(format, args...)}, nil
	}
	agent, known := ep.catalog.Agent(rec.Agent)
	if !known || agent.Disabled {
		return void("agent %s is disabled, or is in the catalog no more", rec.Agent)
	}
	tool, known := ep.catalog.Tool(rec.Tool)
	if !known || tool.Digest != rec.ToolDigest {
		return void("tool %s was changed since it was asked for", rec.Tool)
	}
	rule := ruleOf(tool, rec.BreakGlass)
	if rule == nil || rule.Name != rec.Rule || rule.Digest != rec.RuleDigest {
		return void("the approval rule %s of tool %s was changed since it was asked for", rec.Rule, rec.Tool)
	}
	b = basis{agent: agent, rule: *rule}
	if rec.Incident != "" {
		if b.incident, _, err = get[broker.Incident](r, keyIncident(rec.Incident)); err != nil {
			return b, err
		}
		if b.incident.State != broker.IncidentOpen || !now.Before(b.incident.EndsAt) {
			return void("incident %s is closed", rec.Incident)
		}
	}
	creator := broker.Caller{ID: rec.Agent}
	if rec.Creator != nil {
		creator = broker.Caller{Person: rec.Creator}
	}
	subject, err := ep.subject(r, creator)
	if err != nil {
		return b, err
	}
	// By what is so now, as of the time at which it was asked: that time passes
	// makes nothing void.
	if v := ep.decide(ep.aboutRequest(rec, subject, b.incident, rec.CreatedAt)); !v.Allowed {
		return void("policies do not let %s ask for %s any more (policy set %s)", rec.CreatedBy, rec.Tool, policy.Short(v.Digest))
	}
	return b, nil
}

// leave takes a request out of those that are pending.
func (r *requestRecord) leave(t store.Txn) error {
	n, _, err := get[int](t, keyAsking(r.Agent))
	if err != nil {
		return err
	}
	if err := put(t, keyAsking(r.Agent), max(n-1, 0)); err != nil {
		return err
	}
	if err := t.Delete(keyWaiting(r.ID)); err != nil {
		return err
	}
	return t.Delete(keyHouse(r.ExpiresAt, houseRequest, string(r.ID)))
}

// brokerCaller is the broker itself, as the actor of what it does by itself.
var brokerCaller = by{actor: audit.Broker}

func byCaller(c broker.Caller) by {
	return by{actor: c.Principal().String(), correlation: c.Correlation}
}

// end ends a request that is pending, without a grant.
func (r *requestRecord) end(t store.Txn, now time.Time, state broker.RequestState, who by, why string) error {
	if err := r.leave(t); err != nil {
		return err
	}
	r.State, r.DecidedAt, r.DecidedBy, r.Why = state, now, broker.Principal(who.actor), why
	if err := put(t, keyRequest(r.ID), r); err != nil {
		return err
	}
	if err := t.Put(keyEnded(now, retiredRequest, string(r.ID)), nil); err != nil {
		return err
	}
	what := audit.RequestEnded
	if state == broker.RequestDenied {
		what = audit.RequestDenied
	}
	ev := r.event(now, what, broker.Caller{Correlation: who.correlation}, policy.Verdict{})
	ev.Actor, ev.Reason, ev.Cause = who.actor, why, string(state)
	who.by.tell(&ev)
	return appendEvent(t, ev)
}

// endPending ends a request if it is pending still.
func endPending(t store.Txn, id broker.RequestID, now time.Time, state broker.RequestState, who by, why string) (ended bool, err error) {
	rec, ok, err := get[requestRecord](t, keyRequest(id))
	if err != nil || !ok || rec.State != broker.RequestPending {
		return false, err
	}
	return true, rec.end(t, now, state, who, why)
}

// requestsEnded follows the commit that ended requests.
func (e *Engine) requestsEnded(state broker.RequestState, n int) {
	e.metrics.requests.WithLabelValues(string(state)).Add(float64(n))
	e.asks.signal()
}

// WithdrawRequest takes back a request that is pending: its agent does, or
// whoever made it, or who may withdraw them all. Withdrawing what was withdrawn
// changes nothing.
func (e *Engine) WithdrawRequest(ctx context.Context, caller broker.Caller, id broker.RequestID, reason string) (RequestView, error) {
	v, err := e.withdrawRequest(ctx, caller, id, reason)
	if err != nil {
		e.Refused(ctx, caller, "withdraw_request", "", err)
		return RequestView{}, err
	}
	return v, nil
}

func (e *Engine) withdrawRequest(ctx context.Context, caller broker.Caller, id broker.RequestID, reason string) (RequestView, error) {
	if err := broker.CheckText("reason", reason, broker.MaxReason); err != nil {
		return RequestView{}, err
	}
	seen, err := e.Request(ctx, caller, id)
	if err != nil {
		return RequestView{}, err
	}
	who := byCaller(caller)
	if p := caller.Principal(); p != seen.CreatedBy && p != broker.WorkloadPrincipal(seen.Agent) {
		verdict, err := e.administer(ctx, e.current.Load(), caller, policy.VerbWithdraw)
		if err != nil {
			return RequestView{}, err
		}
		who.by = permissionOf(verdict)
	}
	now := e.clock.now()
	ended := 0
	err = e.update(ctx, now, func(t store.Txn) error {
		ended = 0
		rec, ok, err := get[requestRecord](t, keyRequest(id))
		switch {
		case err != nil:
			return err
		case !ok:
			return policy.NotFound("request", string(id))
		case rec.State == broker.RequestWithdrawn:
			return nil
		case rec.State != broker.RequestPending:
			return requestOver(rec.Request)
		}
		ended = 1
		return rec.end(t, now, broker.RequestWithdrawn, who, reason)
	})
	if err != nil {
		return RequestView{}, err
	}
	e.requestsEnded(broker.RequestWithdrawn, ended)
	return e.Request(context.WithoutCancel(ctx), caller, id)
}

// expireRequest ends a request that nobody decided in time.
func (e *Engine) expireRequest(ctx context.Context, key string, id broker.RequestID, now time.Time) error {
	ended := false
	err := e.update(ctx, now, func(t store.Txn) (err error) {
		if err := t.Delete(key); err != nil {
			return err
		}
		ended, err = endPending(t, id, now, broker.RequestExpired, brokerCaller, "nobody decided it in time")
		return err
	})
	if err == nil && ended {
		e.requestsEnded(broker.RequestExpired, 1)
	}
	return err
}

// sweepRequests makes void what cannot be decided any more: all such requests,
// or those of one incident.
func (e *Engine) sweepRequests(ctx context.Context, incident broker.IncidentID) error {
	ep := e.settled()
	now := e.clock.now()
	var ids []broker.RequestID
	err := e.view(ctx, func(r store.Reader) error {
		ids = ids[:0]
		for entry, err := range r.Scan(store.Prefix(prefixWaiting)) {
			if err != nil {
				return err
			}
			if incident != "" && string(entry.Value) != string(incident) {
				continue
			}
			rec, ok, err := get[requestRecord](r, keyRequest(broker.RequestID(lastPart(entry.Key))))
			if err != nil {
				return err
			}
			if !ok {
				continue
			}
			b, err := ep.basis(r, rec, now)
			if err != nil {
				return err
			}
			if b.void != "" {
				ids = append(ids, rec.ID)
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	for part := range slices.Chunk(ids, requestChunk) {
		ended := 0
		err := e.update(ctx, now, func(t store.Txn) error {
			ended = 0
			if err := ep.same(t); err != nil {
				return err
			}
			for _, id := range part {
				rec, ok, err := get[requestRecord](t, keyRequest(id))
				if err != nil {
					return err
				}
				if !ok || rec.State != broker.RequestPending {
					continue
				}
				b, err := ep.basis(t, rec, now)
				if err != nil {
					return err
				}
				if b.void == "" {
					continue
				}
				ended++
				if err := rec.end(t, now, broker.RequestVoid, brokerCaller, b.void); err != nil {
					return err
				}
			}
			return nil
		})
		if err == errStale {
			break // the reload that came meanwhile has a sweep of its own to do
		}
		if err != nil {
			return err
		}
		e.requestsEnded(broker.RequestVoid, ended)
	}
	return nil
}
