package lease

import (
	"context"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/policy"
	"github.com/mayfly-security/mayfly/store"
)

// RequestView is a request as one caller sees it.
type RequestView struct {
	broker.Request
	Missing     []string // what is still needed, for people: "1 of finance"
	Votable     bool     // the caller may decide it now
	BreakGlass  bool
	Description string // of the tool
	Sensitivity string
	Owner       string // of the agent
	Survives    string // what outlives a revocation of the tool's credentials
}

// RequestFilter says which requests to list. Zero fields match everything.
type RequestFilter struct {
	Agent      spiffeid.ID
	Tool       string
	All        bool // also those that are pending no more
	Votable    bool
	BreakGlass bool
}

// Request returns one request to whoever may see it: its agent, that agent's
// owner, whoever made it, those who may decide it or did, and those who see all or review
// requests. To anybody else it does not exist.
func (e *Engine) Request(ctx context.Context, caller broker.Caller, id broker.RequestID) (RequestView, error) {
	ep := e.current.Load()
	all := e.seesRequests(ctx, ep, caller)
	var v RequestView
	err := e.view(ctx, func(r store.Reader) error {
		rec, ok, err := get[requestRecord](r, keyRequest(id))
		if err != nil {
			return err
		}
		if ok {
			v, ok, err = e.requestView(r, ep, caller, rec, all)
		}
		if err == nil && !ok {
			err = policy.NotFound("request", string(id))
		}
		return err
	})
	return v, err
}

// Requests lists the requests that the caller may see, in the order of their making.
func (e *Engine) Requests(ctx context.Context, caller broker.Caller, f RequestFilter, after string, size int) (Page[RequestView], error) {
	ep := e.current.Load()
	all := e.seesRequests(ctx, ep, caller)
	agent := f.Agent
	if _, isAgent := ep.catalog.Agent(caller.ID); isAgent && !all {
		if !agent.IsZero() && agent != caller.ID {
			return Page[RequestView]{}, nil // another's are not there
		}
		agent = caller.ID
	}
	prefix := prefixWaiting
	switch {
	case f.All && !agent.IsZero():
		prefix = prefixRequestsOf(agent)
	case f.All:
		prefix = prefixRequest
	}
	return page(ctx, e.store, prefix, after, size, func(r store.Reader, key string) (RequestView, bool, error) {
		rec, ok, err := get[requestRecord](r, keyRequest(broker.RequestID(lastPart(key))))
		if err != nil || !ok ||
			!agent.IsZero() && rec.Agent != agent || f.Tool != "" && rec.Tool != f.Tool ||
			f.BreakGlass && !rec.BreakGlass || !f.All && rec.State != broker.RequestPending {
			return RequestView{}, false, err
		}
		v, sees, err := e.requestView(r, ep, caller, rec, all)
		return v, sees && (!f.Votable || v.Votable), err
	})
}

// AwaitRequest returns the request once it differs from seen: at once if seen
// is zero, or if it is pending no more.
func (e *Engine) AwaitRequest(ctx context.Context, caller broker.Caller, id broker.RequestID, seen broker.Request) (RequestView, error) {
	for {
		changed := e.asks.next()
		v, err := e.Request(ctx, caller, id)
		if err != nil {
			return RequestView{}, err
		}
		if v.State != broker.RequestPending || seen.ID == "" || v.State != seen.State || len(v.Approvals) != len(seen.Approvals) {
			return v, nil
		}
		// Most changes are of other requests: who may see this one is asked, and
		// what is missing counted, once there is news of it.
		for same := true; same; {
			select {
			case <-changed:
			case <-ctx.Done():
				return RequestView{}, ctx.Err()
			case <-e.ctx.Done():
				return RequestView{}, broker.Refuse(broker.ReasonShuttingDown, "the broker is stopping", "ask again")
			}
			changed = e.asks.next()
			err := e.view(ctx, func(r store.Reader) error {
				rec, ok, err := get[requestRecord](r, keyRequest(id))
				same = ok && rec.State == seen.State && len(rec.Approvals) == len(seen.Approvals)
				return err
			})
			if err != nil {
				return RequestView{}, err
			}
		}
	}
}

// seesRequests reports whether the caller sees everybody's requests.
func (e *Engine) seesRequests(ctx context.Context, ep *epoch, caller broker.Caller) bool {
	if e.seesAll(ctx, ep, caller) {
		return true
	}
	v, err := e.administers(ctx, ep, caller, policy.VerbReviewRequests)
	return err == nil && v.Allowed
}

// requestView is a request as the caller sees it, by this epoch's catalog, and
// whether they see it at all.
func (e *Engine) requestView(r getter, ep *epoch, caller broker.Caller, rec requestRecord, all bool) (v RequestView, sees bool, err error) {
	v = RequestView{Request: rec.Request, BreakGlass: rec.BreakGlass}
	if tool, ok := ep.catalog.Tool(rec.Tool); ok {
		v.Description, v.Sensitivity, v.Survives = tool.Description, tool.Sensitivity, ep.catalog.ScopeInfo(tool.Name).Survives
	}
	agent, _ := ep.catalog.Agent(rec.Agent)
	v.Owner = agent.Owner
	me := caller.Principal()
	sees = all || me != "" && (me == rec.CreatedBy || me == broker.WorkloadPrincipal(rec.Agent))
	if caller.Person != nil {
		_, voted := votedBy(rec, *caller.Person)
		owned, err := ep.owned(r, caller, rec.Agent)
		if err != nil {
			return v, false, err
		}
		sees = sees || voted || owned
	}
	if rec.State != broker.RequestPending {
		return v, sees, nil
	}
	now := e.clock.now()
	b, err := ep.basis(r, rec, now)
	if err != nil || b.void != "" {
		return v, sees, err // nobody can decide it; the sweep that says so is under way
	}
	tally, err := ep.count(r, rec, b)
	if err != nil {
		return v, sees, err
	}
	v.Missing = tally.Missing
	v.Votable, err = e.votable(r, ep, caller, rec, b)
	return v, sees || v.Votable, err
}

// votable reports whether the caller may decide a request now, but for a
// sign-in that is too old, which can be made again.
func (e *Engine) votable(r getter, ep *epoch, caller broker.Caller, rec requestRecord, b basis) (bool, error) {
	if caller.Person == nil || !e.clock.late().Before(rec.ExpiresAt) {
		return false, nil
	}
	if _, voted := votedBy(rec, *caller.Person); voted {
		return false, nil
	}
	subject, refusal, err := ep.voter(r, rec, b, *caller.Person)
	if err != nil || refusal != nil {
		return false, err
	}
	_, verdict := ep.mayApprove(rec, b, subject, e.clock.now())
	return verdict.Allowed, nil
}
