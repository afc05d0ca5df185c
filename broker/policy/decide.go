package policy

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/cedar-policy/cedar-go"
	"github.com/cedar-policy/cedar-go/types"
	"github.com/cedar-policy/cedar-go/x/exp/ast"

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
	which := s.candidates(q.Action, f)
	var reads map[string]bool
	for _, i := range which {
		reads = union(reads, s.policies[i].reads)
	}
	f.context(q, reads)
	return s.decide(f, which)
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
// may read of it. Each entity has its UID and parents from the beginning, and
// the rest once a policy comes to it: most policies read little. It is used by
// one decision.
type facts struct {
	request                                      cedar.Request
	principal, resource, agent, params, integers lazy
}

// lazy is an entity whose attributes and tags are made when they are needed.
type lazy struct {
	cedar.Entity
	fill func(*cedar.Entity) // nil once it is done
}

func (l *lazy) get() (cedar.Entity, bool) {
	if l.fill != nil {
		l.fill(&l.Entity)
		l.fill = nil
	}
	return l.Entity, true
}

// Get gives Cedar an entity.
func (f *facts) Get(uid cedar.EntityUID) (cedar.Entity, bool) {
	switch uid {
	case f.principal.UID:
		return f.principal.get()
	case f.resource.UID:
		return f.resource.get()
	case f.agent.UID:
		return f.agent.get()
	case f.params.UID:
		return f.params.get()
	case f.integers.UID:
		return f.integers.get()
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
		f.request.Resource = f.resource.UID
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
	f.resource, f.agent = toolEntity(q.Tool), agentEntity(agent)
	f.request.Resource = f.resource.UID
	f.params.UID, f.integers.UID = types.NewEntityUID(typeParams, "of the request"), types.NewEntityUID(typeIntegers, "of the request")
	numbers, problem := integers(q.Tool, q.Params)
	if problem != "" {
		return nil, problem
	}
	f.params.fill = func(e *cedar.Entity) { e.Tags = tags(q.Params) }
	f.integers.fill = func(e *cedar.Entity) { e.Tags = cedar.NewRecord(numbers) }
	return f, ""
}

// context fills the request's context, or that part of it that is read: to
// make a record is most of what a decision costs. What would be missing by
// mistake would be an error, and deny.
func (f *facts) context(q Query, reads map[string]bool) {
	context := cedar.RecordMap{}
	set := func(name types.String, value func() types.Value) {
		if reads[everything] || reads[string(name)] {
			context[name] = value()
		}
	}
	utc := q.Now.UTC()
	set("now", func() types.Value { return types.NewDatetime(utc) })
	set("hour", func() types.Value { return types.Long(utc.Hour()) })
	set("weekday", func() types.Value { return types.Long((utc.Weekday()+6)%7 + 1) }) // ISO 8601: Monday is 1
	if q.Action == ActionAdminister {
		set("verb", func() types.Value { return types.String(q.Verb) })
	} else {
		set("agent", func() types.Value { return f.agent.UID })
		set("params", func() types.Value { return f.params.UID })
		set("integers", func() types.Value { return f.integers.UID })
		set("duration_seconds", func() types.Value { return types.Long(q.Duration / time.Second) })
		set("reason", func() types.Value { return types.String(q.Reason) })
		set("ticket", func() types.Value { return types.String(q.Ticket) })
		set("rule", func() types.Value { return types.String(q.Rule) })
		set("break_glass", func() types.Value { return types.Boolean(q.BreakGlass) })
		set("incident", func() types.Value { return incidentRecord(q) })
		set("on_behalf_of", func() types.Value { return userRecord(q) })
		set("requester", func() types.Value { return requesterRecord(q.Requester) })
	}
	f.request.Context = cedar.NewRecord(context)
}

func incidentRecord(q Query) cedar.Record {
	in := q.Incident
	open := in.ID != "" && in.State == broker.IncidentOpen && q.Now.Before(in.EndsAt)
	return cedar.NewRecord(cedar.RecordMap{"id": types.String(in.ID), "open": types.Boolean(open),
		"title": types.String(in.Title), "reference": types.String(in.Reference)})
}

func userRecord(q Query) cedar.Record {
	user, age := broker.User{}, int64(unknownAge)
	if q.OnBehalfOf != nil {
		user, age = *q.OnBehalfOf, authAge(q.OnBehalfOf.AuthTime, q.Now)
	}
	return cedar.NewRecord(cedar.RecordMap{"present": types.Boolean(q.OnBehalfOf != nil), "name": types.String(user.Name),
		"acr": types.String(user.ACR), "auth_age_seconds": types.Long(age)})
}

func requesterRecord(p broker.Principal) cedar.Record {
	name, isPerson := p.Person()
	if !isPerson {
		name = string(p)
	}
	return cedar.NewRecord(cedar.RecordMap{"person": types.Boolean(isPerson), "name": types.String(name)})
}

// everything stands for all of the context, where a policy reads it as a whole.
const everything = "*"

// contextOf are the attributes of the context that a policy reads; nil for none.
func contextOf(p *ast.Policy) map[string]bool {
	var reads map[string]bool
	add := func(name string) {
		if reads == nil {
			reads = map[string]bool{}
		}
		reads[name] = true
	}
	for _, c := range p.Conditions {
		ast.Inspect(ast.NewNode(c.Body), func(n ast.IsNode) bool {
			switch n := n.(type) {
			case ast.NodeTypeAccess:
				if v, ok := n.Arg.(ast.NodeTypeVariable); ok && v.Name == "context" {
					add(string(n.Value))
					return false
				}
			case ast.NodeTypeVariable:
				if n.Name == "context" {
					add(everything)
				}
			}
			return true
		})
	}
	return reads
}

func union(a, b map[string]bool) map[string]bool {
	if a == nil && b != nil {
		a = make(map[string]bool, 8)
	}
	for name := range b {
		a[name] = true
	}
	return a
}

// principalEntity is the subject, with its groups. A group of the broker's own
// is never taken from elsewhere: who is in it is Subject.Operator alone.
func principalEntity(s Subject, now time.Time) (lazy, string) {
	if s.Agent != nil {
		if s.Person != nil || !s.Service.IsZero() {
			return lazy{}, "the query names more than one subject"
		}
		return agentEntity(s.Agent), ""
	}
	var e lazy
	switch {
	case s.Person != nil && !s.Service.IsZero():
		return e, "the query names more than one subject"
	case s.Person != nil:
		e.UID = types.NewEntityUID(typePerson, types.String(s.Person.Name))
		e.fill = func(e *cedar.Entity) { e.Attributes = personAttributes(*s.Person, now) }
	case !s.Service.IsZero():
		e.UID = types.NewEntityUID(typeService, types.String(s.Service.String()))
		e.fill = func(e *cedar.Entity) {
			e.Attributes = cedar.NewRecord(cedar.RecordMap{"operator": types.Boolean(s.Operator)})
		}
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

func personAttributes(p broker.Person, now time.Time) cedar.Record {
	age := int64(unknownAge)
	if p.Method != broker.SignInDevice {
		age = authAge(p.AuthTime, now)
	}
	return cedar.NewRecord(cedar.RecordMap{"name": types.String(p.Name), "issuer": types.String(p.Issuer), "method": types.String(p.Method),
		"acr": types.String(p.ACR), "auth_age_seconds": types.Long(age)})
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

func agentEntity(a *broker.Agent) lazy {
	return lazy{cedar.Entity{UID: types.NewEntityUID(typeAgent, types.String(a.ID.String()))}, func(e *cedar.Entity) {
		e.Attributes = cedar.NewRecord(cedar.RecordMap{"owner": types.String(a.Owner), "environment": types.String(a.Environment),
			"disabled": types.Boolean(a.Disabled)})
		e.Tags = tags(a.Labels)
	}}
}

func toolEntity(t *broker.Tool) lazy {
	return lazy{cedar.Entity{UID: types.NewEntityUID(typeTool, types.String(t.Name)),
		Parents: cedar.NewEntityUIDSet(types.NewEntityUID(typeProvider, types.String(t.Provider)))}, func(e *cedar.Entity) {
		e.Attributes = cedar.NewRecord(cedar.RecordMap{"name": types.String(t.Name), "provider": types.String(t.Provider),
			"sensitivity": types.String(t.Sensitivity), "max_ttl_seconds": types.Long(t.MaxTTL / time.Second)})
		e.Tags = tags(t.Labels)
	}}
}

func tags(labels map[string]string) cedar.Record {
	if len(labels) == 0 {
		return cedar.Record{}
	}
	m := make(cedar.RecordMap, len(labels))
	for k, v := range labels {
		m[types.String(k)] = types.String(v)
	}
	return cedar.NewRecord(m)
}

// integers are the parameters that are integers by the tool's word.
func integers(t *broker.Tool, params map[string]string) (numbers cedar.RecordMap, problem string) {
	for _, p := range t.Params {
		value, given := params[p.Name]
		if p.Type != broker.ParamInteger || !given {
			continue
		}
		n, err := strconv.ParseInt(value, 10, 64)
		if err != nil {
			return nil, fmt.Sprintf("parameter %s of tool %s is no integer", p.Name, t.Name)
		}
		if numbers == nil {
			numbers = cedar.RecordMap{}
		}
		numbers[types.String(p.Name)] = types.Long(n)
	}
	return numbers, ""
}
