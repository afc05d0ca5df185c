package lease

import (
	"context"
	"fmt"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/policy"
	"github.com/mayfly-security/mayfly/store"
)

// Explanation says why an access is or is not possible.
type Explanation struct {
	Possible   bool // now, as it stands: where a grant or an approval is missing, policies alone make it not possible
	Summary    string
	Verdict    policy.Verdict
	WouldAllow []string // nearest first
	Grants     []string // of an issue: the agent's open grants for the tool, and what is wrong with each
}

// ExplainRequest is a question about an access.
type ExplainRequest struct {
	Action    policy.Action
	Principal broker.Principal // empty: the caller
	Groups    []string         // of a person who is not the caller
	Tool      string
	Agent     spiffeid.ID // zero: the principal, if it is an agent
	Params    map[string]string
	Incident  broker.IncidentID
	Verb      policy.Verb
}

// Explain answers why an access is or is not possible now. Anybody asks for
// themselves; for somebody else, who may explain. Nothing is decided by it.
func (e *Engine) Explain(ctx context.Context, caller broker.Caller, req ExplainRequest) (Explanation, error) {
	x, err := e.explain(ctx, caller, req)
	if err != nil {
		e.Refused(ctx, caller, "explain", req.Tool, err)
	}
	return x, err
}

func (e *Engine) explain(ctx context.Context, caller broker.Caller, req ExplainRequest) (Explanation, error) {
	ep := e.current.Load()
	who := caller
	if req.Principal != "" && req.Principal != caller.Principal() {
		if _, err := e.administer(ctx, ep, caller, policy.VerbExplain); err != nil {
			return Explanation{}, err
		}
		var err error
		if who, err = principalCaller(req); err != nil {
			return Explanation{}, err
		}
	}
	if _, agent := ep.catalog.Agent(who.ID); agent && !req.Agent.IsZero() && req.Agent != who.ID {
		return Explanation{}, broker.Refuse(broker.ReasonInvalidArgument, "an agent asks, and is given, for itself alone", "leave out the other agent")
	}
	q := policy.Query{Action: req.Action, Verb: req.Verb, Params: req.Params, Requester: who.Principal(), Now: e.clock.now()}
	var x Explanation
	err := e.view(ctx, func(r store.Reader) (err error) {
		q.Subject = ep.catalog.Subject(who)
		if who.Person == caller.Person {
			if q.Subject, err = ep.subject(r, who); err != nil {
				return err
			}
		}
		if req.Action != policy.ActionAdminister {
			if err := e.fillExplained(ctx, r, ep, caller, who, req, &q); err != nil {
				return err
			}
		}
		if req.Action == policy.ActionIssue && q.Agent != nil && q.Agent.ID == who.ID { // nobody else is given anything
			x.Grants, err = ep.explainGrants(r, q)
		}
		return err
	})
	if err != nil {
		return Explanation{}, err
	}
	said := ep.policies().Explain(q)
	x.Possible, x.Summary, x.Verdict, x.WouldAllow = said.Verdict.Allowed, said.Summary, said.Verdict, said.WouldAllow
	if req.Action == policy.ActionAdminister && !x.Possible && req.Verb != policy.VerbMakeGrant {
		if open, err := e.recovers(ctx, who.Principal()); err == nil && open && q.Subject.Agent == nil {
			x.Possible, x.Summary, x.WouldAllow = true, "allowed while the recovery is open; policies would not: "+said.Summary, nil
		}
	}
	x.more(req.Action, q, ep)
	return x, nil
}

// principalCaller is somebody else, as far as the question tells of them.
func principalCaller(req ExplainRequest) (broker.Caller, error) {
	if id, ok := req.Principal.Workload(); ok {
		return broker.Caller{ID: id}, nil
	}
	name, ok := req.Principal.Person()
	if !ok || name == "" {
		return broker.Caller{}, broker.Refuse(broker.ReasonInvalidArgument, "the principal is neither a person nor a workload",
			`name a person as "person:NAME", or a workload by its SPIFFE ID`)
	}
	if err := broker.CheckText("name", name, broker.MaxPersonName); err != nil {
		return broker.Caller{}, err
	}
	const maxGroups = 200
	if len(req.Groups) > maxGroups {
		return broker.Caller{}, broker.Refusef(broker.ReasonInvalidArgument, "name fewer", "%d groups were given; at most %d are taken", len(req.Groups), maxGroups)
	}
	return broker.Caller{Person: &broker.Person{Name: name, Groups: req.Groups}}, nil
}

// fillExplained fills in the tool, the agent, the rule and the incident.
func (e *Engine) fillExplained(ctx context.Context, r store.Reader, ep *epoch, caller, who broker.Caller, req ExplainRequest, q *policy.Query) error {
	tool, ok := ep.catalog.Tool(req.Tool)
	if !ok {
		return broker.Refusef(broker.ReasonToolUnknown, "see `mayfly tools`", "there is no tool %q", broker.Clean(broker.Shorten(req.Tool, 64)))
	}
	q.Tool = &tool
	id := req.Agent
	if id.IsZero() {
		id = who.ID
	}
	if agent, ok := ep.catalog.Agent(id); ok {
		q.Agent = &agent
	} else if !req.Agent.IsZero() {
		return policy.AgentRefusal(req.Agent.String(), false)
	}
	q.Duration = tool.MaxTTL
	if tool.Approval != nil {
		q.Rule, q.Duration = tool.Approval.Name, tool.Approval.MaxDuration
	}
	if req.Action == policy.ActionApprove && q.Agent != nil {
		q.Requester = broker.WorkloadPrincipal(q.Agent.ID)
	}
	if req.Incident == "" {
		return nil
	}
	in, ok, err := get[broker.Incident](r, keyIncident(req.Incident))
	if err != nil {
		return err
	}
	if ok && !ep.sees(caller, in) && !e.seesAll(ctx, ep, caller) {
		ok = false
		if !caller.ID.IsZero() {
			if ok, err = forAgent(r, in, caller.ID); err != nil {
				return err
			}
		}
	}
	if !ok {
		return policy.NotFound("incident", broker.Clean(broker.Shorten(string(req.Incident), 40)))
	}
	q.Incident = in
	return nil
}

// explainGrants says of each open grant of the agent for the tool what it is
// good for.
func (ep *epoch) explainGrants(r store.Reader, q policy.Query) (all []string, err error) {
	for entry, err := range r.Scan(store.Prefix(prefixGrantsFor(q.Agent.ID, q.Tool.Name))) {
		if err != nil {
			return nil, err
		}
		const most = 20
		if len(all) == most {
			return append(all, "and more"), nil
		}
		f, err := ep.read(r, broker.GrantID(lastPart(entry.Key)), q.Params, q.Now)
		if err != nil {
			return nil, err
		}
		text := fmt.Sprintf("%s: good until %s", f.Grant.ID, f.Grant.NotAfter.Format("2006-01-02T15:04:05Z07:00"))
		if _, d := f.Issue(policy.Ask{Params: q.Params, TTL: q.Tool.MaxTTL}, q.Now); d.Err() != nil {
			text = fmt.Sprintf("%s: %s", f.Grant.ID, d.Refusal.Message)
		}
		all = append(all, text)
	}
	return all, nil
}

// more says what is needed besides the policies' yes.
func (x *Explanation) more(action policy.Action, q policy.Query, ep *epoch) {
	if !x.Possible {
		return
	}
	if q.Agent != nil && q.Agent.Disabled {
		x.Possible, x.Summary = false, fmt.Sprintf("%s is disabled in the catalog; policies: %s", q.Agent.ID, x.Summary)
		return
	}
	switch action {
	case policy.ActionRequest:
		if rule := q.Tool.Approval; rule != nil {
			x.Summary += fmt.Sprintf("; the request waits for approval under rule %s (%s)", rule.Name, needs(*rule))
		}
	case policy.ActionIssue:
		if len(x.Grants) == 0 {
			x.Possible, x.Summary = false, "there is no grant; policies: "+x.Summary
		}
	case policy.ActionApprove:
		if rule := q.Tool.Approval; rule != nil && q.Subject.Person != nil {
			rec := requestRecord{Request: broker.Request{CreatedBy: q.Requester}}
			b := basis{rule: *rule}
			if q.Agent != nil {
				b.agent = *q.Agent
			}
			if err := b.eligible(rec, *q.Subject.Person, q.Subject.Groups); err != nil {
				x.Possible, x.Summary = false, fmt.Sprintf("the approval rule does not let them: %s; policies: %s", messageOf(err), x.Summary)
			}
		}
	case policy.ActionOpenIncident:
		if _, is := ep.catalog.Opener(q.Subject.Service); !is {
			x.Possible, x.Summary = false, "the catalog does not list them as an opener; policies: "+x.Summary
		}
	}
}

// needs says whom a rule asks.
func needs(rule broker.ApprovalRule) string {
	all := make([]string, len(rule.Need))
	for i, n := range rule.Need {
		all[i] = fmt.Sprintf("%d of %s", n.Count, n.Group)
	}
	return strings.Join(all, " and ")
}
