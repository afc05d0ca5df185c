package policy

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/cedar-policy/cedar-go"
	cedarast "github.com/cedar-policy/cedar-go/ast"
	"github.com/cedar-policy/cedar-go/types"
	"github.com/cedar-policy/cedar-go/x/exp/ast"
	"github.com/cedar-policy/cedar-go/x/exp/eval"

	"github.com/mayfly-security/mayfly/broker"
)

// Explanation says why a policy set decides as it does.
type Explanation struct {
	Verdict Verdict
	Summary string // one sentence
	// WouldAllow says what would have to be otherwise, the nearest first; empty
	// if it is allowed, or if nothing would.
	WouldAllow []string
}

// maxNearest bounds the policies that an explanation names.
const maxNearest = 5

// Explain decides a query and says why. The text names policies and values of
// the query, and is safe to show.
func (s *Set) Explain(q Query) Explanation {
	x := Explanation{Verdict: s.Decide(q)}
	f, problem := newFacts(q)
	if f != nil {
		f.context(q, map[string]bool{everything: true})
	}
	switch {
	case problem != "":
		x.Summary = "denied: " + problem
	case f == nil:
		x.Summary = fmt.Sprintf("denied: %s never does %s, whatever policies say", kind(q.Subject), q.Action)
	case len(x.Verdict.Errors) > 0:
		x.Summary = "denied, because a policy could not be evaluated: " + strings.Join(x.Verdict.Errors, "; ")
	case x.Verdict.Allowed:
		x.Summary = "allowed by " + s.named(x.Verdict.Policies)
	case len(x.Verdict.Policies) > 0:
		x.Summary = "forbidden by " + s.named(x.Verdict.Policies)
		for _, id := range x.Verdict.Policies {
			x.WouldAllow = append(x.WouldAllow, s.forbidding(s.member(id), f))
		}
	default:
		x.WouldAllow = s.nearest(q.Action, f)
		x.Summary = fmt.Sprintf("denied: no policy permits %s", q.Action)
	}
	return x
}

func kind(s Subject) string {
	switch {
	case s.Agent != nil:
		return "an agent"
	case s.Person != nil:
		return "a person"
	}
	return "a workload that is no agent"
}

// named names policies with their descriptions.
func (s *Set) named(ids []string) string {
	var all []string
	for _, id := range ids {
		m := s.member(id)
		text := m.where()
		if m.description != "" {
			text += ": " + m.description
		}
		all = append(all, text)
	}
	return strings.Join(all, "; ")
}

// forbidding says why a policy that forbids applies.
func (s *Set) forbidding(m *member, f *facts) string {
	var because []string
	for _, c := range m.ast().Conditions {
		if c.Condition == ast.ConditionUnless {
			because = append(because, "not "+text(c.Body)+f.values(c.Body))
			continue
		}
		for _, n := range conjuncts(c.Body) {
			because = append(because, text(n)+f.values(n))
		}
	}
	if len(because) == 0 {
		return m.where() + " forbids it whatever anybody approves"
	}
	return m.where() + " must not apply; it does, because " + strings.Join(because, ", and ")
}

// nearest names the policies that come nearest to permitting it.
func (s *Set) nearest(a Action, f *facts) []string {
	type miss struct {
		far  int
		text string
	}
	var all []miss
	for _, m := range s.policies {
		p := m.ast()
		if p.Effect != ast.EffectPermit || !concerns(p.Action, actionUID(a)) {
			continue
		}
		far, parts := f.misses(p)
		all = append(all, miss{far, fmt.Sprintf("%s would allow it if %s", m.where(), strings.Join(parts, ", and "))})
	}
	slices.SortStableFunc(all, func(a, b miss) int { return cmp.Compare(a.far, b.far) })
	var sentences []string
	for _, m := range all[:min(len(all), maxNearest)] {
		sentences = append(sentences, m.text)
	}
	return sentences
}

// misses says what of a policy does not fit, and how far off that is: a
// condition is nearer than another group, and that than another tool.
func (f *facts) misses(p *ast.Policy) (far int, parts []string) {
	scope := func(what string, s ast.IsScopeNode, e cedar.Entity, group, other int) {
		switch s := s.(type) {
		case ast.ScopeTypeEq:
			if e.UID != s.Entity {
				far += other
				parts = append(parts, fmt.Sprintf("%s were %s", what, s.Entity))
			}
		case ast.ScopeTypeIn:
			if !within(e, s.Entity) {
				far += group
				parts = append(parts, fmt.Sprintf("%s were in %s", what, s.Entity))
			}
		case ast.ScopeTypeIs:
			if e.UID.Type != s.Type {
				far += 2 * other
				parts = append(parts, fmt.Sprintf("%s were %s", what, article(s.Type)))
			}
		case ast.ScopeTypeIsIn:
			if e.UID.Type != s.Type {
				far += 2 * other
				parts = append(parts, fmt.Sprintf("%s were %s in %s", what, article(s.Type), s.Entity))
			} else if !within(e, s.Entity) {
				far += group
				parts = append(parts, fmt.Sprintf("%s were in %s", what, s.Entity))
			}
		}
	}
	scope("the principal", p.Principal, f.principal.Entity, 10, 20)
	scope("the resource", p.Resource, f.resource.Entity, 30, 30)
	env := f.env()
	for _, c := range p.Conditions {
		if c.Condition == ast.ConditionUnless {
			if v, err := eval.Eval(c.Body, env); err == nil && v == types.True {
				far++
				parts = append(parts, "not "+text(c.Body)+f.values(c.Body))
			}
			continue
		}
		for _, n := range conjuncts(c.Body) {
			v, err := eval.Eval(n, env)
			if err != nil {
				break // what comes before guards it, and is missing
			}
			if v != types.True {
				far++
				parts = append(parts, text(n)+f.values(n))
			}
		}
	}
	return far, parts
}

func (f *facts) env() eval.Env {
	return eval.Env{Entities: f, Principal: f.request.Principal, Action: f.request.Action, Resource: f.request.Resource, Context: f.request.Context}
}

func within(e cedar.Entity, uid types.EntityUID) bool { return e.UID == uid || e.Parents.Contains(uid) }

func article(t types.EntityType) string {
	if strings.ContainsRune("AEIOU", rune(t[0])) {
		return "an " + string(t)
	}
	return "a " + string(t)
}

// conjuncts takes an expression apart at its outermost &&.
func conjuncts(n ast.IsNode) []ast.IsNode {
	if and, ok := n.(ast.NodeTypeAnd); ok {
		return append(conjuncts(and.Left), conjuncts(and.Right)...)
	}
	return []ast.IsNode{n}
}

// text is an expression in Cedar's language.
func text(n ast.IsNode) string {
	p := cedar.NewPolicyFromAST((*cedarast.Policy)(ast.Permit().When(ast.NewNode(n))))
	_, after, _ := strings.Cut(string(p.MarshalCedar()), "when { ")
	return "`" + broker.Clean(broker.Shorten(strings.TrimSuffix(after, " };"), 200)) + "`"
}

// values tells what an expression reads: " (context.hour is 6)".
func (f *facts) values(n ast.IsNode) string {
	var said []string
	env := f.env()
	ast.Inspect(ast.NewNode(n), func(n ast.IsNode) bool {
		switch n.(type) {
		case ast.NodeTypeAccess, ast.NodeTypeGetTag:
		default:
			return true
		}
		v, err := eval.Eval(n, env)
		if err != nil {
			return true
		}
		switch v.(type) {
		case types.Record, types.EntityUID:
			return true // what is read of it comes by itself
		}
		one := fmt.Sprintf("%s is %s", strings.Trim(text(n), "`"), broker.Clean(broker.Shorten(string(v.MarshalCedar()), 80)))
		if !slices.Contains(said, one) {
			said = append(said, one)
		}
		return false
	})
	if len(said) == 0 {
		return ""
	}
	return " (" + strings.Join(said, ", ") + ")"
}
