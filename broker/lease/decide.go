package lease

import (
	"context"
	"maps"
	"strings"
	"sync"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/audit"
	"github.com/mayfly-security/mayfly/broker/policy"
	"github.com/mayfly-security/mayfly/store"
)

// maxDecisions is how many of the last decisions are remembered for previews.
const maxDecisions = 1000

// decisions are the last answers of the policy set, with what was asked.
type decisions struct {
	mu   sync.Mutex
	last []decision // a ring once it is full
	next int
}

type decision struct {
	query   policy.Query
	allowed bool
}

func (d *decisions) add(q policy.Query, v policy.Verdict) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.last) < maxDecisions {
		d.last = append(d.last, decision{q, v.Allowed})
		return
	}
	d.last[d.next] = decision{q, v.Allowed}
	d.next = (d.next + 1) % maxDecisions
}

// all are the decisions, the newest first.
func (d *decisions) all() []decision {
	d.mu.Lock()
	defer d.mu.Unlock()
	all := make([]decision, 0, len(d.last))
	for i := range d.last {
		all = append(all, d.last[(d.next+len(d.last)-1-i)%len(d.last)])
	}
	return all
}

// decide asks the policy set, and remembers what it said.
func (e *Engine) decide(ep *epoch, q policy.Query) policy.Verdict {
	v := ep.decide(q)
	e.decisions.add(q, v)
	return v
}

func (ep *epoch) decide(q policy.Query) policy.Verdict { return ep.policies().Decide(q) }

// policies is the set that the epoch decides by: the catalog's, unless another
// is being tried.
func (ep *epoch) policies() *policy.Set {
	if ep.tried != nil {
		return ep.tried
	}
	return ep.catalog.Policies()
}

// administer refuses a caller who may not do what verb says: the policy set
// decides, and an open recovery stands in for it. The verdict is for the evidence.
func (e *Engine) administer(ctx context.Context, ep *epoch, caller broker.Caller, verb policy.Verb) (policy.Verdict, error) {
	v, err := e.administers(ctx, ep, caller, verb)
	if err != nil {
		return v, err
	}
	if !v.Allowed {
		return v, v.AdminRefusal(callerName(caller), verb)
	}
	return v, nil
}

func (e *Engine) administers(ctx context.Context, ep *epoch, caller broker.Caller, verb policy.Verb) (policy.Verdict, error) {
	if caller.Principal() == "" {
		return policy.Verdict{}, nil // nobody
	}
	q := policy.Query{Action: policy.ActionAdminister, Subject: ep.catalog.Subject(caller), Verb: verb, Now: e.clock.now()}
	if caller.Person != nil {
		err := e.view(ctx, func(r store.Reader) (err error) {
			q.Subject, err = ep.subject(r, caller)
			return err
		})
		if err != nil {
			return policy.Verdict{}, err
		}
	}
	v := ep.decide(q)
	if verb != policy.VerbSeeAll { // each listing asks that
		e.decisions.add(q, v)
	}
	// An agent never administers for want of others, and what gives is no part of
	// a recovery: policies may have taken it from everybody.
	if v.Allowed || q.Subject.Agent != nil || verb == policy.VerbMakeGrant {
		return v, nil
	}
	recovers, err := e.recovers(ctx, q.Subject.Principal())
	if recovers {
		v = policy.Verdict{Allowed: true, Policies: []string{recoveryPolicy}, Digest: v.Digest}
	}
	return v, err
}

// SeesAll reports whether the caller may see everybody's leases, grants,
// requests and incidents, and all tools. In doubt it may not.
func (e *Engine) SeesAll(ctx context.Context, caller broker.Caller) bool {
	return e.seesAll(ctx, e.current.Load(), caller)
}

func (e *Engine) seesAll(ctx context.Context, ep *epoch, caller broker.Caller) bool {
	v, err := e.administers(ctx, ep, caller, policy.VerbSeeAll)
	if err != nil {
		e.log.Error("deciding what a caller may see", "caller", callerName(caller), "error", err)
		return false
	}
	return v.Allowed
}

// callerName is the caller's principal, for people.
func callerName(caller broker.Caller) string {
	if p := caller.Principal(); p != "" {
		return p.String()
	}
	return "nobody"
}

// aboutGrant is the question whether the agent may be given, or keep, what a
// grant allows, with these values.
func (ep *epoch) aboutGrant(f policy.GrantFacts, params map[string]string, now time.Time) policy.Query {
	g := f.Grant
	if params == nil {
		params = g.Params
	}
	return policy.Query{
		Action: policy.ActionIssue, Subject: ep.catalog.Subject(broker.Caller{ID: g.Agent}),
		Tool: &f.Tool, Agent: &f.Agent, Params: maps.Clone(params),
		Duration: g.NotAfter.Sub(g.NotBefore), Reason: g.Reason, Ticket: g.Ticket,
		Rule: g.Rule, BreakGlass: g.BreakGlass, Incident: f.Incident, OnBehalfOf: g.OnBehalfOf,
		Requester: g.CreatedBy, Grant: g.ID, Now: now,
	}
}

// tellVerdict puts a verdict into the details of a piece of evidence.
func tellVerdict(details map[string]string, v policy.Verdict) map[string]string {
	if details == nil {
		details = map[string]string{}
	}
	if len(v.Policies) > 0 {
		details["policies"] = broker.Shorten(strings.Join(v.Policies, ","), 1000)
	}
	if len(v.Errors) > 0 {
		details["policy_errors"] = broker.Clean(broker.Shorten(strings.Join(v.Errors, "; "), 1000))
	}
	if v.Digest != "" {
		details["policy_digest"] = v.Digest
	}
	return details
}

// permission is what let somebody do something, for the evidence; the zero
// permission is of what needs none. It can be compared and kept.
type permission struct {
	Policies string `json:",omitempty"`
	Digest   string `json:",omitempty"`
}

func permissionOf(v policy.Verdict) permission {
	told := tellVerdict(nil, v)
	return permission{Policies: told["policies"], Digest: told["policy_digest"]}
}

// tell puts a permission into a piece of evidence.
func (p permission) tell(ev *audit.Event) {
	if p == (permission{}) {
		return
	}
	if ev.Details == nil {
		ev.Details = map[string]string{}
	}
	ev.Details["policies"], ev.Details["policy_digest"] = p.Policies, p.Digest
}

// view is store.View with the store's own errors as a refusal.
func (e *Engine) view(ctx context.Context, fn func(r store.Reader) error) error {
	return storeRefusal(e.store.View(ctx, fn))
}
