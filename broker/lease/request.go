package lease

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/audit"
	"github.com/mayfly-security/mayfly/broker/policy"
	"github.com/mayfly-security/mayfly/store"
)

// maxWaiting is how many requests of one agent may be pending at once.
const maxWaiting = 32

// maxGiven is how many open grants of one tool an agent may have and still be
// given another at once. It is counted outside of the transaction: what matters
// is that there is an end to it.
const maxGiven = 256

// maxApprovals is the most votes that one request can have: what is known of
// each voter is read in one transaction.
const maxApprovals = 50

// maxAttached is the most grants that one incident may have, those asked for
// under it too: they are in its record, which closing it writes.
const maxAttached = 200

// AccessRequest is what somebody asks for.
type AccessRequest struct {
	Agent      spiffeid.ID // zero: the caller, who is an agent
	Tool       string
	Params     map[string]string
	Duration   *time.Duration // nil means the rule's maximum; the tool's maximum TTL where there is no rule
	MaxUses    int            // 0 means any number, or 1 where the rule says single_use
	Reason     string         // required
	Ticket     string
	Incident   broker.IncidentID
	OnBehalfOf *broker.User // verified by the caller of this
	UserToken  string       // what tells the user's token apart (IdentityProvider.VerifyUser); empty for none
	UserUntil  time.Time    // the end of that token's validity
	BreakGlass bool
	Key        string // idempotency key; may be empty
}

// requestRecord is a request as the store has it.
type requestRecord struct {
	broker.Request
	BreakGlass bool           `json:",omitempty"`
	Creator    *broker.Person `json:",omitempty"` // nil if the agent asked itself
}

// CreateRequest asks for a tool. Every outcome is evidence: granted at once
// where policy allows it and no approval rule stands before it, pending where
// one does, or refused.
func (e *Engine) CreateRequest(ctx context.Context, caller broker.Caller, req AccessRequest) (RequestView, error) {
	v, err := e.createRequest(ctx, caller, req)
	if err != nil {
		e.Refused(ctx, caller, "create_request", req.Tool, err)
		return RequestView{}, err
	}
	return v, nil
}

func (e *Engine) createRequest(ctx context.Context, caller broker.Caller, req AccessRequest) (RequestView, error) {
	if err := e.giving(); err != nil {
		return RequestView{}, err
	}
	if err := checkRequest(caller, &req); err != nil {
		return RequestView{}, err
	}
	once := asked{caller: caller.Principal(), key: req.Key, kind: "request",
		digest: requestDigest("request", req.Agent, req.Tool, req.Params, req.Duration, req.MaxUses, req.Ticket, req.Incident, req.OnBehalfOf, req.BreakGlass)}
	// What a key has made is shown again whatever has changed since.
	var made broker.RequestID
	err := e.view(ctx, func(r store.Reader) error {
		id, err := once.made(r)
		made = broker.RequestID(id)
		return err
	})
	if err != nil {
		return RequestView{}, err
	}
	if made != "" {
		v, err := e.Request(ctx, caller, made)
		if broker.ReasonOf(err) == broker.ReasonNotFound { // whoever made one sees it for as long as there is one
			err = once.forgotten()
		}
		return v, err
	}
	for range 8 {
		rec, err := e.tryRequest(ctx, e.settled(), caller, req, once)
		if err == errStale {
			continue
		}
		if err != nil {
			return RequestView{}, err
		}
		return e.Request(context.WithoutCancel(ctx), caller, rec)
	}
	return RequestView{}, again(errStale)
}

// checkRequest checks what needs no catalog, and fills in who the agent is.
func checkRequest(caller broker.Caller, req *AccessRequest) error {
	switch {
	case caller.Principal() == "":
		return broker.Refuse(broker.ReasonUnauthenticated, "nobody asks", "connect with an SVID, or sign in")
	case caller.Person == nil && req.Agent.IsZero():
		req.Agent = caller.ID
	case caller.Person == nil && req.Agent != caller.ID:
		return broker.Refusef(broker.ReasonPermissionDenied, "let the agent ask itself, or a person for it",
			"%s may ask for itself alone", caller.ID)
	case req.Agent.IsZero():
		return broker.Refuse(broker.ReasonInvalidArgument, "for which agent is not said", "name it with --agent")
	}
	if err := requireReason(req.Reason, "a request"); err != nil {
		return err
	}
	if err := broker.CheckText("ticket", req.Ticket, broker.MaxReference); err != nil {
		return err
	}
	if err := checkKey(req.Key); err != nil {
		return err
	}
	if len(req.UserToken) > 0 && req.OnBehalfOf == nil {
		return broker.Refuse(broker.ReasonInvalidArgument, "there is a user's token and no user", "this is a fault of the caller within the broker")
	}
	if u := req.OnBehalfOf; u != nil && (u.Name == "" || u.Issuer == "" || u.Subject == "") {
		return broker.Refuse(broker.ReasonTokenInvalid, "the user's token does not say who the user is", "get one of the configured identity provider")
	}
	return nil
}

// ruleOf is the rule that a request waits under; nil if policy alone decides.
func ruleOf(tool broker.Tool, breakGlass bool) *broker.ApprovalRule {
	if breakGlass {
		return tool.BreakGlass
	}
	return tool.Approval
}

// newRequest checks a request against the catalog.
func (ep *epoch) newRequest(caller broker.Caller, req AccessRequest, now time.Time) (requestRecord, *broker.ApprovalRule, error) {
	refuse := func(err error) (requestRecord, *broker.ApprovalRule, error) { return requestRecord{}, nil, err }
	if err := ep.agent(req.Agent); err != nil {
		return refuse(err)
	}
	tool, ok := ep.catalog.Tool(req.Tool)
	if !ok {
		return refuse(broker.Refusef(broker.ReasonToolUnknown, "see `mayfly tools`",
			"there is no tool %q", broker.Clean(broker.Shorten(req.Tool, 64))))
	}
	rule := ruleOf(tool, req.BreakGlass)
	if req.BreakGlass && rule == nil {
		return refuse(broker.Refusef(broker.ReasonInvalidArgument, "ask without --break-glass",
			"tool %s has no rule for emergencies", tool.Name))
	}
	longest, duration := maxGrant, tool.MaxTTL
	if rule != nil {
		longest = min(maxGrant, rule.MaxDuration)
		duration = longest
	}
	if req.Duration != nil {
		duration = *req.Duration
	}
	if duration <= 0 || duration > longest {
		return refuse(broker.Refusef(broker.ReasonInvalidArgument, fmt.Sprintf("ask for more than zero and at most %s", broker.Span(longest)),
			"access for %s was asked for; tool %s is given for %s at most", broker.Span(duration), tool.Name, broker.Span(longest)))
	}
	uses := req.MaxUses
	switch {
	case uses < 0:
		return refuse(broker.Refuse(broker.ReasonInvalidArgument, "the number of uses is negative", "give 0 for any number, or a number above it"))
	case rule != nil && rule.SingleUse && uses > 1:
		return refuse(broker.Refusef(broker.ReasonInvalidArgument, "ask for one use",
			"%d uses were asked for; the rule %s of tool %s gives one at a time", uses, rule.Name, tool.Name))
	case rule != nil && rule.SingleUse:
		uses = 1
	}
	if err := tool.CheckParams(req.Params); err != nil {
		return refuse(err)
	}
	rec := requestRecord{
		Request: broker.Request{
			ID: broker.NewRequestID(now), Agent: req.Agent, Tool: tool.Name, Params: maps.Clone(req.Params),
			Duration: duration, MaxUses: uses, Reason: req.Reason, Ticket: req.Ticket, Incident: req.Incident,
			OnBehalfOf: req.OnBehalfOf, CreatedBy: caller.Principal(), CreatedAt: now, ExpiresAt: now,
			ToolDigest: tool.Digest, PolicyDigest: ep.policies().Digest(), State: broker.RequestPending,
		},
		BreakGlass: req.BreakGlass, Creator: caller.Person,
	}
	if rule != nil {
		rec.Rule, rec.RuleDigest, rec.ExpiresAt = rule.Name, rule.Digest, now.Add(rule.Expires)
	}
	rec.Digest = rec.digest()
	return rec, rule, nil
}

// digest is over everything that an approver agrees to.
func (r requestRecord) digest() string {
	q := r.Request
	return requestDigest("access", q.ID, q.Agent, q.Tool, q.ToolDigest, q.Params, q.Duration, q.MaxUses, q.Reason, q.Ticket,
		q.Incident, q.OnBehalfOf, q.CreatedBy, q.CreatedAt, q.Rule, q.RuleDigest, r.BreakGlass)
}

// tryRequest decides by one epoch and makes the request. errStale means that
// another epoch is to decide.
func (e *Engine) tryRequest(ctx context.Context, ep *epoch, caller broker.Caller, req AccessRequest, once asked) (broker.RequestID, error) {
	now := e.clock.now()
	rec, rule, err := ep.newRequest(caller, req, now)
	if err != nil {
		return "", err
	}
	var in broker.Incident
	var subject policy.Subject
	seesAll := rec.Incident != "" && e.seesAll(ctx, ep, caller)
	err = e.view(ctx, func(r store.Reader) (err error) {
		if subject, err = ep.subject(r, caller); err != nil {
			return err
		}
		if rule == nil {
			if err := fewGiven(r, rec); err != nil {
				return err
			}
		}
		in, err = incidentFor(r, rec, func(in broker.Incident) bool { return seesAll || ep.sees(caller, in) }, now)
		return err
	})
	if err != nil {
		return "", err
	}
	verdict := e.decide(ep, ep.aboutRequest(rec, subject, in, now))
	if !verdict.Allowed {
		return "", verdict.Refusal(callerName(caller), fmt.Sprintf("ask for %s", rec.Tool))
	}
	if rule != nil {
		if err := userFresh(*rule, rec.OnBehalfOf, now); err != nil {
			return "", err
		}
	}
	made := rec
	var grant broker.Grant
	err = e.update(ctx, now, func(t store.Txn) error {
		made, grant = rec, broker.Grant{}
		if err := ep.same(t); err != nil {
			return err
		}
		id, err := once.take(t, string(rec.ID), now)
		if err != nil {
			return err
		}
		if id != "" {
			made.ID = broker.RequestID(id)
			return nil
		}
		if err := e.paces.may(ep, caller, now); err != nil {
			return err
		}
		if err := bindUserToken(t, req, now); err != nil {
			return err
		}
		if e.limbo.closed(rec.Incident) {
			return incidentOver(rec.Incident)
		}
		if _, err := incidentFor(t, rec, func(broker.Incident) bool { return true }, now); err != nil {
			return err
		}
		if err := t.Put(keyRequestOf(rec.Agent, rec.ID), nil); err != nil {
			return err
		}
		if err := appendEvent(t, made.event(now, audit.RequestCreated, caller, verdict)); err != nil {
			return err
		}
		if rule != nil {
			return made.wait(t)
		}
		grant, err = made.give(t, caller, now, made.Duration, nil, verdict)
		return err
	})
	if err != nil {
		return "", err
	}
	if made.ID != rec.ID {
		return made.ID, nil
	}
	e.paces.gave(ep, caller, false, now)
	outcome := "pending"
	if grant.ID != "" {
		outcome = "granted"
		e.house.dueAt(grant.NotAfter)
	} else {
		e.house.dueAt(made.ExpiresAt)
	}
	e.metrics.requests.WithLabelValues(outcome).Inc()
	if rec.BreakGlass {
		e.metrics.breakGlass.WithLabelValues(rec.Tool).Inc()
		e.log.Warn("BREAK-GLASS: access was asked for under a rule for emergencies", "request", rec.ID, "agent", rec.Agent.String(), "tool", rec.Tool, "by", rec.CreatedBy.String())
	}
	e.asks.signal()
	return made.ID, nil
}

// fewGiven refuses an agent that has been given a tool very often already.
func fewGiven(r store.Reader, rec requestRecord) error {
	n := 0
	for _, err := range r.Scan(store.Prefix(prefixGrantsFor(rec.Agent, rec.Tool))) {
		if err != nil {
			return err
		}
		if n++; n == maxGiven {
			return broker.Refusef(broker.ReasonRequestLimit, "use one of them (`mayfly grants`)",
				"%s has %d open grants for %s already", rec.Agent, n, rec.Tool)
		}
	}
	return nil
}

// userFresh refuses a user whose authentication is not what the rule asks for,
// and an agent that acts for nobody where it asks for any.
func userFresh(rule broker.ApprovalRule, u *broker.User, now time.Time) error {
	if rule.UserStepUp.IsZero() {
		return nil
	}
	if u == nil {
		refusal := broker.Refusef(broker.ReasonStepUp, "send the token of the user on whose behalf the agent acts",
			"rule %s needs a user who has just signed in, and the agent acts for nobody", rule.Name)
		refusal.StepUp = rule.UserStepUp
		return refusal
	}
	return policy.StepUp(rule.UserStepUp, u.AuthTime, u.ACR, "", now)
}

// incidentFor is the incident that a request is to belong to: one that is
// open, and that the caller sees or whose window is for the agent.
func incidentFor(r getter, rec requestRecord, sees func(broker.Incident) bool, now time.Time) (broker.Incident, error) {
	if rec.Incident == "" {
		return broker.Incident{}, nil
	}
	in, ok, err := get[broker.Incident](r, keyIncident(rec.Incident))
	if err != nil {
		return in, err
	}
	if ok && !sees(in) {
		if ok, err = forAgent(r, in, rec.Agent); err != nil {
			return in, err
		}
	}
	if !ok {
		return in, policy.NotFound("incident", broker.Clean(broker.Shorten(string(rec.Incident), 40)))
	}
	if in.State != broker.IncidentOpen || !now.Before(in.EndsAt) {
		return in, incidentOver(in.ID)
	}
	return in, nil
}

func incidentOver(id broker.IncidentID) *broker.Error {
	return broker.Refusef(broker.ReasonIncidentClosed, "ask without the incident, or under one that is open", "incident %s is closed", id)
}

// forAgent reports whether one of the grants that an incident was opened with
// is the agent's. The first grants are those of the window.
func forAgent(r getter, in broker.Incident, agent spiffeid.ID) (bool, error) {
	for _, id := range in.Grants[:min(len(in.Grants), maxWindow)] {
		g, ok, err := get[broker.Grant](r, keyGrant(id))
		if err != nil {
			return false, err
		}
		if ok && g.Agent == agent {
			return true, nil
		}
	}
	return false, nil
}

// aboutRequest is the question whether somebody may ask for this.
func (ep *epoch) aboutRequest(rec requestRecord, subject policy.Subject, in broker.Incident, now time.Time) policy.Query {
	return ep.about(policy.ActionRequest, rec, subject, in, now)
}

func (ep *epoch) about(action policy.Action, rec requestRecord, subject policy.Subject, in broker.Incident, now time.Time) policy.Query {
	agent, _ := ep.catalog.Agent(rec.Agent)
	tool, _ := ep.catalog.Tool(rec.Tool)
	return policy.Query{
		Action: action, Subject: subject, Tool: &tool, Agent: &agent, Params: maps.Clone(rec.Params), Duration: rec.Duration,
		Reason: rec.Reason, Ticket: rec.Ticket, Rule: rec.Rule, BreakGlass: rec.BreakGlass, Incident: in,
		OnBehalfOf: rec.OnBehalfOf, Requester: rec.CreatedBy, Now: now,
	}
}

// mayAsk reports whether the caller may ask for a tool for itself, with
// whatever parameters, reason or user it needs.
func (ep *epoch) mayAsk(caller broker.Caller, tool broker.Tool, now time.Time) bool {
	agent, ok := ep.catalog.Agent(caller.ID)
	if !ok || agent.Disabled || caller.Person != nil {
		return false
	}
	rec := requestRecord{Request: broker.Request{Agent: agent.ID, Tool: tool.Name, Duration: tool.MaxTTL, CreatedBy: caller.Principal()}}
	if tool.Approval != nil {
		rec.Rule, rec.Duration = tool.Approval.Name, tool.Approval.MaxDuration
	}
	return ep.policies().Could(ep.aboutRequest(rec, ep.catalog.Subject(caller), broker.Incident{}, now), policy.Asked()...)
}

// userToken is what a user's token is bound to: the first agent that shows it.
type userToken struct {
	Agent spiffeid.ID
	Until time.Time
}

// bindUserToken binds a user's token to the agent, or refuses one that is
// another's: whoever takes a token from an agent's request cannot use it.
func bindUserToken(t store.Txn, req AccessRequest, now time.Time) error {
	if req.UserToken == "" {
		return nil
	}
	if !now.Before(req.UserUntil) {
		return broker.Refuse(broker.ReasonTokenInvalid, "the user's token has expired", "get a new one from the user")
	}
	digest := requestDigest(req.UserToken)
	was, ok, err := get[userToken](t, keyUserToken(digest))
	if err != nil {
		return err
	}
	if ok {
		if was.Agent != req.Agent {
			return broker.Refuse(broker.ReasonTokenReplayed, "the user's token was shown by another agent before", "get a token of the user's for this agent alone")
		}
		return nil
	}
	if err := t.Put(keyHouse(req.UserUntil, houseUserToken, digest), nil); err != nil {
		return err
	}
	return put(t, keyUserToken(digest), userToken{Agent: req.Agent, Until: req.UserUntil})
}

// wait writes a new request that is pending, and counts it.
func (r *requestRecord) wait(t store.Txn) error {
	n, _, err := get[int](t, keyAsking(r.Agent))
	if err != nil {
		return err
	}
	if n >= maxWaiting {
		return broker.Refusef(broker.ReasonRequestLimit, "withdraw one (`mayfly request withdraw`), or wait until one is decided",
			"%s has %d requests waiting, and may have %d", r.Agent, n, maxWaiting)
	}
	if err := put(t, keyAsking(r.Agent), n+1); err != nil {
		return err
	}
	if err := t.Put(keyWaiting(r.ID), []byte(r.Incident)); err != nil {
		return err
	}
	if err := t.Put(keyHouse(r.ExpiresAt, houseRequest, string(r.ID)), nil); err != nil {
		return err
	}
	return put(t, keyRequest(r.ID), r)
}

// give makes the grant that a request asks for, in the commit that decides it.
// caller is whose act that is.
func (r *requestRecord) give(t store.Txn, caller broker.Caller, now time.Time, duration time.Duration, voters []broker.Voter, verdict policy.Verdict) (broker.Grant, error) {
	g := broker.Grant{
		ID: broker.NewGrantID(now), Agent: r.Agent, Tool: r.Tool, ToolDigest: r.ToolDigest, Params: maps.Clone(r.Params),
		NotBefore: now, NotAfter: now.Add(duration), MaxUses: r.MaxUses, Incident: r.Incident, Reason: r.Reason, Ticket: r.Ticket,
		CreatedBy: r.CreatedBy, CreatedAt: now, State: broker.GrantOpen,
		Request: r.ID, OnBehalfOf: r.OnBehalfOf, Rule: r.Rule, RuleDigest: r.RuleDigest, PolicyDigest: verdict.Digest,
		Voters: voters, BreakGlass: r.BreakGlass,
	}
	if r.Incident != "" {
		in, _, err := get[broker.Incident](t, keyIncident(r.Incident))
		if err != nil {
			return g, err
		}
		if in.State != broker.IncidentOpen {
			return g, incidentOver(r.Incident)
		}
		if len(in.Grants) >= maxAttached {
			return g, broker.Refusef(broker.ReasonIncidentLimit, "ask without the incident, or open another",
				"incident %s has %d grants, and may have %d", in.ID, len(in.Grants), maxAttached)
		}
		g.NotAfter = earlier(g.NotAfter, in.EndsAt)
		in.Grants = append(slices.Clone(in.Grants), g.ID)
		if err := put(t, keyIncident(in.ID), in); err != nil {
			return g, err
		}
	}
	r.State, r.Grant, r.DecidedAt, r.DecidedBy = broker.RequestGranted, g.ID, now, caller.Principal()
	if err := put(t, keyRequest(r.ID), r); err != nil {
		return g, err
	}
	if err := t.Put(keyEnded(now, retiredRequest, string(r.ID)), nil); err != nil {
		return g, err
	}
	if err := appendEvent(t, r.event(now, audit.RequestGranted, caller, verdict)); err != nil {
		return g, err
	}
	return g, openGrant(t, g, caller, verdict)
}

// event makes the evidence of what happened to a request.
func (r *requestRecord) event(now time.Time, what audit.Type, caller broker.Caller, verdict policy.Verdict) audit.Event {
	ev := audit.Event{
		Time: now, Type: what, Actor: caller.Principal().String(), Agent: r.Agent.String(), Tool: r.Tool,
		Request: r.ID, Grant: r.Grant, Incident: r.Incident, Reason: r.Reason, Correlation: caller.Correlation,
		Details: tellVerdict(map[string]string{
			"digest": r.Digest, "tool_digest": r.ToolDigest, "duration": r.Duration.String(), "max_uses": fmt.Sprint(r.MaxUses),
			"created_by": r.CreatedBy.String(),
		}, verdict),
	}
	if r.OnBehalfOf != nil {
		ev.OnBehalfOf = r.OnBehalfOf.Principal()
	}
	if r.Rule != "" {
		ev.Details["rule"], ev.Details["rule_digest"] = r.Rule, r.RuleDigest
		ev.Details["expires_at"] = r.ExpiresAt.Format(time.RFC3339)
	}
	if r.BreakGlass {
		ev.Details["break_glass"] = "true"
	}
	if r.Ticket != "" {
		ev.Details["ticket"] = r.Ticket
	}
	for k, v := range r.Params {
		ev.Details["param."+k] = v
	}
	return ev
}
