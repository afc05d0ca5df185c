package policy

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/broker"
)

// CaseFile is a file of a team's own cases, as it is written in YAML.
type CaseFile struct {
	Cases []Case `yaml:"cases"`
}

// Case is a question to a policy set, and the answer that a team expects.
type Case struct {
	Name      string            `yaml:"name"`      // for people; required
	Principal string            `yaml:"principal"` // a SPIFFE ID, or a person's name; required
	Groups    []string          `yaml:"groups"`    // of a person, by the identity provider; the catalog's come by themselves
	AuthAge   *time.Duration    `yaml:"auth_age"`  // of a person's sign-in; unknown
	ACR       string            `yaml:"acr"`       // of a person's sign-in
	Method    string            `yaml:"method"`    // browser, device or bearer; browser
	Action    string            `yaml:"action"`    // required
	Verb      string            `yaml:"verb"`      // of administer
	Tool      string            `yaml:"tool"`      // of everything but administer; required there
	Agent     string            `yaml:"agent"`     // who gets the credential; the principal, if it is an agent
	Params    map[string]string `yaml:"params"`    // none
	Duration  time.Duration     `yaml:"duration"`  // 0
	Reason    string            `yaml:"reason"`    // empty
	Ticket    string            `yaml:"ticket"`    // empty
	// BreakGlass: the request names the tool's rule for emergencies, and not
	// its ordinary one.
	BreakGlass bool          `yaml:"break_glass"`
	Incident   *CaseIncident `yaml:"incident"`     // none
	OnBehalfOf *CaseUser     `yaml:"on_behalf_of"` // nobody
	Requester  string        `yaml:"requester"`    // a SPIFFE ID or a person's name; the principal of a request, otherwise the agent
	Time       time.Time     `yaml:"time"`         // of the decision, as in RFC 3339; the time of the run
	Expect     string        `yaml:"expect"`       // allow or deny; required
	Policies   []string      `yaml:"policies"`     // the IDs that must have decided, all of them; any
}

// CaseIncident is the incident that a case belongs to.
type CaseIncident struct {
	ID        string `yaml:"id"` // required
	Title     string `yaml:"title"`
	Reference string `yaml:"reference"`
	Closed    bool   `yaml:"closed"` // it is open
}

// CaseUser is the user on whose behalf the agent acts.
type CaseUser struct {
	Name    string         `yaml:"name"` // required
	ACR     string         `yaml:"acr"`
	AuthAge *time.Duration `yaml:"auth_age"` // unknown
}

// CaseResult is what became of a case.
type CaseResult struct {
	Name    string
	Passed  bool
	Problem string // what went otherwise; empty if it passed
	Verdict Verdict
}

// Facts is what cases need of a catalog. A catalog's Snapshot has it.
type Facts interface {
	Agent(id spiffeid.ID) (broker.Agent, bool)
	Agents() []broker.Agent
	Tool(name string) (broker.Tool, bool)
	Tools() []broker.Tool
	Subject(c broker.Caller) Subject
}

// RunCases asks a policy set each case. now is the time of those that say none.
func RunCases(s *Set, facts Facts, cases []Case, now time.Time) []CaseResult {
	results := make([]CaseResult, 0, len(cases))
	for i, c := range cases {
		r := CaseResult{Name: c.Name}
		if r.Name == "" {
			r.Name = fmt.Sprintf("case %d", i+1)
		}
		if q, problem := c.query(facts, now); problem != "" {
			r.Problem = problem
		} else {
			r.Problem, r.Verdict = c.compare(s, q)
		}
		r.Passed = r.Problem == ""
		results = append(results, r)
	}
	return results
}

// compare asks, and says what is otherwise than expected.
func (c Case) compare(s *Set, q Query) (string, Verdict) {
	x := s.Explain(q)
	v := x.Verdict
	switch {
	case v.Allowed != (c.Expect == "allow"):
		text := fmt.Sprintf("expected %s, but it is %s", c.Expect, x.Summary)
		for _, w := range x.WouldAllow {
			text += "\n  " + w
		}
		return text, v
	case len(v.Errors) > 0:
		return "denied as expected, but only because a policy could not be evaluated: " + strings.Join(v.Errors, "; "), v
	case len(c.Policies) > 0:
		if want := slices.Sorted(slices.Values(c.Policies)); !slices.Equal(want, v.Policies) {
			return fmt.Sprintf("%s as expected, but decided by %s and not by %s", c.Expect, ids(v.Policies), ids(want)), v
		}
	}
	return "", v
}

func ids(all []string) string {
	if len(all) == 0 {
		return "no policy"
	}
	return strings.Join(all, ", ")
}

// query is the case as a question; problem says what is wrong with the case.
func (c Case) query(facts Facts, now time.Time) (q Query, problem string) {
	if c.Expect != "allow" && c.Expect != "deny" {
		return q, fmt.Sprintf("expect is %s; it must be allow or deny", show(c.Expect))
	}
	var actions []string
	for _, a := range Actions() {
		actions = append(actions, string(a))
	}
	if !slices.Contains(actions, c.Action) {
		return q, fmt.Sprintf("there is no action %s%s", show(c.Action), broker.Suggest(c.Action, "actions", actions))
	}
	q = Query{Action: Action(c.Action), Verb: Verb(c.Verb), Params: c.Params, Duration: c.Duration, Reason: c.Reason, Ticket: c.Ticket,
		BreakGlass: c.BreakGlass, Now: c.Time}
	if q.Now.IsZero() {
		q.Now = now
	}
	if q.Subject, problem = c.subject(facts, q.Now); problem != "" {
		return q, problem
	}
	if q.Action == ActionAdminister {
		if known := values()["verb"]; !slices.Contains(known, c.Verb) {
			return q, fmt.Sprintf("there is no verb %s%s", show(c.Verb), broker.Suggest(c.Verb, "verbs", known))
		}
		return q, ""
	}
	if c.Verb != "" {
		return q, "verb is for administer alone"
	}
	return q, c.about(&q, facts)
}

// about fills what a case of everything but administer has.
func (c Case) about(q *Query, facts Facts) (problem string) {
	t, ok := facts.Tool(c.Tool)
	if !ok {
		var known []string
		for _, t := range facts.Tools() {
			known = append(known, t.Name)
		}
		return fmt.Sprintf("the catalog has no tool %s%s", show(c.Tool), broker.Suggest(c.Tool, "tools", known))
	}
	q.Tool = &t
	if err := t.CheckParams(c.Params); err != nil {
		return err.Error()
	}
	switch {
	case c.BreakGlass && t.BreakGlass == nil:
		return fmt.Sprintf("tool %s has no rule for emergencies", t.Name)
	case c.BreakGlass:
		q.Rule = t.BreakGlass.Name
	case t.Approval != nil:
		q.Rule = t.Approval.Name
	}
	if q.Agent = q.Subject.Agent; c.Agent != "" {
		id, err := spiffeid.FromString(c.Agent)
		a, known := facts.Agent(id)
		if err != nil || !known {
			var all []string
			for _, a := range facts.Agents() {
				all = append(all, a.ID.String())
			}
			return fmt.Sprintf("the catalog has no agent %s%s", show(c.Agent), broker.Suggest(c.Agent, "agents", all))
		}
		q.Agent = &a
	}
	if q.Agent == nil {
		return "agent is missing: say who gets the credential"
	}
	if c.Requester != "" {
		q.Requester = principal(c.Requester)
	} else if q.Requester = broker.WorkloadPrincipal(q.Agent.ID); q.Action == ActionRequest {
		q.Requester = q.Subject.Principal()
	}
	if in := c.Incident; in != nil {
		q.Incident = broker.Incident{ID: broker.IncidentID(in.ID), Title: in.Title, Reference: in.Reference, State: broker.IncidentOpen, EndsAt: q.Now.Add(time.Hour)}
		if in.Closed {
			q.Incident.State = broker.IncidentClosed
		}
		if in.ID == "" {
			return "incident has no id"
		}
	}
	if u := c.OnBehalfOf; u != nil {
		if u.Name == "" {
			return "on_behalf_of has no name"
		}
		q.OnBehalfOf = &broker.User{Name: u.Name, ACR: u.ACR, AuthTime: ago(q.Now, u.AuthAge)}
	}
	return ""
}

func ago(now time.Time, age *time.Duration) time.Time {
	if age == nil {
		return time.Time{}
	}
	return now.Add(-*age)
}

func principal(name string) broker.Principal {
	if id, err := spiffeid.FromString(name); err == nil {
		return broker.WorkloadPrincipal(id)
	}
	return broker.PersonPrincipal(name)
}

// subject is who acts.
func (c Case) subject(facts Facts, now time.Time) (Subject, string) {
	if c.Principal == "" {
		return Subject{}, "principal is missing"
	}
	if strings.Contains(c.Principal, "://") {
		id, err := spiffeid.FromString(c.Principal)
		if err != nil {
			return Subject{}, fmt.Sprintf("principal %s is no SPIFFE ID", show(c.Principal))
		}
		if len(c.Groups) > 0 || c.AuthAge != nil || c.ACR != "" || c.Method != "" {
			return Subject{}, "groups, auth_age, acr and method are for people"
		}
		return facts.Subject(broker.Caller{ID: id}), ""
	}
	method := c.Method
	if method == "" {
		method = string(broker.SignInBrowser)
	}
	if known := values()["method"]; !slices.Contains(known, method) {
		return Subject{}, fmt.Sprintf("there is no method %s%s", show(method), broker.Suggest(method, "methods", known))
	}
	return facts.Subject(broker.Caller{Person: &broker.Person{Name: c.Principal, Issuer: "https://issuer.invalid", Subject: c.Principal,
		Groups: slices.Sorted(slices.Values(c.Groups)), AuthTime: ago(now, c.AuthAge), ACR: c.ACR, Method: broker.SignInMethod(method)}}), ""
}
