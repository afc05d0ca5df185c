package policy

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/cedar-policy/cedar-go"
	"github.com/cedar-policy/cedar-go/types"

	"github.com/mayfly-security/mayfly/broker"
)

// unknownAge is the age in seconds of an authentication of which nothing is
// known: some 30,000 years.
const unknownAge = 1_000_000_000_000

// maxSkew is how far in the future, by the broker's clock, an identity
// provider's clock may have authenticated somebody.
const maxSkew = 60 * time.Second

// Decide answers a query. It reads nothing but the query: the same query has
// the same answer. Whatever cannot be evaluated denies, and is named.
func (s *Set) Decide(q Query) Verdict {
	f, problem := newFacts(q)
	if problem != "" {
		return Verdict{Errors: []string{problem}, Digest: s.digest}
	}
	if f == nil { // nobody of this kind may do this, whatever policies say
		return Verdict{Digest: s.digest}
	}
	return s.decide(f, s.candidates(q.Action, f))
}

// decide evaluates some of the set's policies.
func (s *Set) decide(f *facts, which []int32) Verdict {
	v := Verdict{Digest: s.digest}
	decision, diagnostic := cedar.Authorize(chosen{s, which}, f, f.request)
	for _, r := range diagnostic.Reasons {
		v.Policies = append(v.Policies, string(r.PolicyID))
	}
	for _, e := range diagnostic.Errors {
		v.Errors = append(v.Errors, fmt.Sprintf("policy %q (%s:%d): %s", e.PolicyID, e.Position.Filename, e.Position.Line,
			broker.Clean(broker.Shorten(e.Message, 200))))
	}
	slices.Sort(v.Policies)
	slices.Sort(v.Errors)
	v.Allowed = decision == cedar.Allow && len(v.Errors) == 0
	if !v.Allowed && decision == cedar.Allow {
		v.Policies = nil // what would have permitted it decided nothing
	}
	return v
}

// facts is a query as Cedar sees it: a request, and the entities that policies
// may read of it.
type facts struct {
	request                                      cedar.Request
	principal, resource, agent, params, integers cedar.Entity
}

// Get gives Cedar an entity.
func (f *facts) Get(uid cedar.EntityUID) (cedar.Entity, bool) {
	switch uid {
	case f.principal.UID:
		return f.principal, true
	case f.resource.UID:
		return f.resource, true
	case f.agent.UID:
		return f.agent, true
	case f.params.UID:
		return f.params, true
	case f.integers.UID:
		return f.integers, true
	}
	return cedar.Entity{}, false
}

// newFacts says what of a query policies read. problem says why it is no
// question at all; nil without one means that the schema lets nobody of the
// subject's kind do this.
func newFacts(q Query) (f *facts, problem string) {
	if q.Now.IsZero() {
		return nil, "the query has no time"
	}
	f = &facts{}
	if f.principal, problem = principalEntity(q.Subject, q.Now); problem != "" {
		return nil, problem
	}
	kind := f.principal.UID.Type
	switch q.Action {
	case ActionRequest:
		if kind != typeAgent && kind != typePerson {
			return nil, ""
		}
	case ActionIssue:
		if kind != typeAgent {
			return nil, ""
		}
	case ActionApprove:
		if kind != typePerson {
			return nil, ""
		}
	case ActionOpenIncident, ActionAdminister:
		if kind == typeAgent {
			return nil, ""
		}
	default:
		return nil, fmt.Sprintf("there is no action %s", show(string(q.Action)))
	}
	f.request = cedar.Request{Principal: f.principal.UID, Action: actionUID(q.Action)}
	if q.Action == ActionAdminister {
		if !slices.Contains(Verbs(), q.Verb) {
			return nil, fmt.Sprintf("there is no verb %s", show(string(q.Verb)))
		}
		f.resource.UID = types.NewEntityUID(typeBroker, BrokerName)
		context := cedar.RecordMap{"verb": types.String(q.Verb)}
		clock(context, q.Now)
		f.request.Resource, f.request.Context = f.resource.UID, cedar.NewRecord(context)
		return f, ""
	}
	agent := q.Agent
	if agent == nil {
		agent = q.Subject.Agent
	}
	switch {
	case q.Tool == nil:
		return nil, "the query names no tool"
	case agent == nil:
		return nil, "the query names no agent"
	}
	f.resource, f.agent = toolEntity(*q.Tool), agentEntity(*agent)
	f.request.Resource = f.resource.UID
	f.params.UID, f.integers.UID = types.NewEntityUID(typeParams, "of the request"), types.NewEntityUID(typeIntegers, "of the request")
	if f.params.Tags, f.integers.Tags, problem = paramTags(*q.Tool, q.Params); problem != "" {
		return nil, problem
	}
	f.request.Context = f.access(q)
	return f, ""
}

// access is the context of everything but administer.
func (f *facts) access(q Query) cedar.Record {
	in, user := q.Incident, q.OnBehalfOf
	open := in.ID != "" && in.State == broker.IncidentOpen && q.Now.Before(in.EndsAt)
	behalf := cedar.RecordMap{"present": types.Boolean(user != nil), "name": types.String(""), "acr": types.String(""), "auth_age_seconds": types.Long(unknownAge)}
	if user != nil {
		behalf["name"], behalf["acr"] = types.String(user.Name), types.String(user.ACR)
		behalf["auth_age_seconds"] = types.Long(authAge(user.AuthTime, q.Now))
	}
	requester, isPerson := q.Requester.Person()
	if !isPerson {
		requester = string(q.Requester)
	}
	context := cedar.RecordMap{
		"agent":            f.agent.UID,
		"params":           f.params.UID,
		"integers":         f.integers.UID,
		"duration_seconds": types.Long(q.Duration / time.Second),
		"reason":           types.String(q.Reason),
		"ticket":           types.String(q.Ticket),
		"rule":             types.String(q.Rule),
		"break_glass":      types.Boolean(q.BreakGlass),
		"incident": cedar.NewRecord(cedar.RecordMap{"id": types.String(in.ID), "open": types.Boolean(open),
			"title": types.String(in.Title), "reference": types.String(in.Reference)}),
		"on_behalf_of": cedar.NewRecord(behalf),
		"requester":    cedar.NewRecord(cedar.RecordMap{"person": types.Boolean(isPerson), "name": types.String(requester)}),
	}
	clock(context, q.Now)
	return cedar.NewRecord(context)
}

func clock(context cedar.RecordMap, now time.Time) {
	utc := now.UTC()
	context["now"] = types.NewDatetime(utc)
	context["hour"] = types.Long(utc.Hour())
	context["weekday"] = types.Long((utc.Weekday()+6)%7 + 1) // ISO 8601: Monday is 1
}

// principalEntity is the subject, with its groups. A group of the broker's own
// is never taken from elsewhere: who is in it is Subject.Operator alone.
func principalEntity(s Subject, now time.Time) (cedar.Entity, string) {
	if s.Agent != nil {
		if s.Person != nil || !s.Service.IsZero() {
			return cedar.Entity{}, "the query names more than one subject"
		}
		return agentEntity(*s.Agent), ""
	}
	var e cedar.Entity
	switch {
	case s.Person != nil && !s.Service.IsZero():
		return e, "the query names more than one subject"
	case s.Person != nil:
		p := s.Person
		age := int64(unknownAge)
		if p.Method != broker.SignInDevice {
			age = authAge(p.AuthTime, now)
		}
		e.UID = types.NewEntityUID(typePerson, types.String(p.Name))
		e.Attributes = cedar.NewRecord(cedar.RecordMap{"name": types.String(p.Name), "issuer": types.String(p.Issuer), "method": types.String(p.Method),
			"acr": types.String(p.ACR), "auth_age_seconds": types.Long(age)})
	case !s.Service.IsZero():
		e.UID = types.NewEntityUID(typeService, types.String(s.Service.String()))
		e.Attributes = cedar.NewRecord(cedar.RecordMap{"operator": types.Boolean(s.Operator)})
	}
	if e.UID.ID == "" {
		return e, "the query names nobody"
	}
	groups := make([]cedar.EntityUID, 0, len(s.Groups)+1)
	for _, g := range s.Groups {
		if !strings.HasPrefix(g, ReservedGroups) {
			groups = append(groups, types.NewEntityUID(typeGroup, types.String(g)))
		}
	}
	if s.Operator {
		groups = append(groups, types.NewEntityUID(typeGroup, OperatorsGroup))
	}
	e.Parents = cedar.NewEntityUIDSet(groups...)
	return e, ""
}

// authAge is the age of an authentication in seconds, rounded up.
func authAge(at, now time.Time) int64 {
	if at.IsZero() || at.After(now.Add(maxSkew)) {
		return unknownAge
	}
	age := max(0, now.Sub(at)) // at most 292 years: to round before dividing would overflow
	seconds := int64(age / time.Second)
	if age%time.Second > 0 {
		seconds++
	}
	return seconds
}

func agentEntity(a broker.Agent) cedar.Entity {
	return cedar.Entity{
		UID: types.NewEntityUID(typeAgent, types.String(a.ID.String())),
		Attributes: cedar.NewRecord(cedar.RecordMap{"owner": types.String(a.Owner), "environment": types.String(a.Environment),
			"disabled": types.Boolean(a.Disabled)}),
		Tags: tags(a.Labels),
	}
}

func toolEntity(t broker.Tool) cedar.Entity {
	return cedar.Entity{
		UID:     types.NewEntityUID(typeTool, types.String(t.Name)),
		Parents: cedar.NewEntityUIDSet(types.NewEntityUID(typeProvider, types.String(t.Provider))),
		Attributes: cedar.NewRecord(cedar.RecordMap{"name": types.String(t.Name), "provider": types.String(t.Provider),
			"sensitivity": types.String(t.Sensitivity), "max_ttl_seconds": types.Long(t.MaxTTL / time.Second)}),
		Tags: tags(t.Labels),
	}
}

func tags(labels map[string]string) cedar.Record {
	m := make(cedar.RecordMap, len(labels))
	for k, v := range labels {
		m[types.String(k)] = types.String(v)
	}
	return cedar.NewRecord(m)
}

// paramTags are the parameters as text and, where the tool says that they are
// integers, as numbers.
func paramTags(t broker.Tool, params map[string]string) (text, numbers cedar.Record, problem string) {
	integers := cedar.RecordMap{}
	for _, p := range t.Params {
		value, given := params[p.Name]
		if p.Type != broker.ParamInteger || !given {
			continue
		}
		n, err := strconv.ParseInt(value, 10, 64)
		if err != nil {
			return text, numbers, fmt.Sprintf("parameter %s of tool %s is no integer", p.Name, t.Name)
		}
		integers[types.String(p.Name)] = types.Long(n)
	}
	return tags(params), cedar.NewRecord(integers), ""
}
