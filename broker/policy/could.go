package policy

import (
	"slices"

	"github.com/cedar-policy/cedar-go"
	"github.com/cedar-policy/cedar-go/types"
	"github.com/cedar-policy/cedar-go/x/exp/ast"
	"github.com/cedar-policy/cedar-go/x/exp/eval"
)

// Asked are the attributes of a request's context that whoever asks chooses.
func Asked() []string {
	return []string{"params", "integers", "duration_seconds", "reason", "ticket", "incident", "on_behalf_of"}
}

// Chosen are the attributes of the context that are the parameters.
func Chosen() []string { return []string{"params", "integers"} }

// Could reports whether a query would be allowed with other values of these
// attributes of the context, as far as that can be told: it is false only where
// whatever values they had would not change that it is denied. It allows nothing.
func (s *Set) Could(q Query, open ...string) bool {
	f, _ := newFacts(q)
	if f == nil {
		return false
	}
	f.context(q, map[string]bool{everything: true})
	context := cedar.RecordMap{}
	for name, value := range f.request.Context.All() {
		if slices.Contains(open, string(name)) {
			value = eval.Variable(name)
		}
		context[name] = value
	}
	f.request.Context = cedar.NewRecord(context)
	could := false
	for _, i := range s.candidates(q.Action, f) {
		p := s.policies[i].ast()
		rest, keep := eval.PartialPolicy(f.env(), p)
		switch {
		case !keep:
		case len(rest.Conditions) == 1 && isError(rest.Conditions[0].Body):
			return false
		case p.Effect == ast.EffectPermit:
			could = true
		case len(rest.Conditions) == 0:
			return false
		}
	}
	return could
}

func isError(n ast.IsNode) bool {
	_, is := eval.ToPartialError(n)
	return is
}

// ReadsTime reports whether the passing of time alone can turn a decision about
// an action: a policy reads the time, or the age of a user's sign-in.
func (s *Set) ReadsTime(a Action) bool { return s.timed[a] }

// readsTime reports whether a policy's conditions read the time of the context.
func readsTime(p *ast.Policy) (reads bool) {
	for _, c := range p.Conditions {
		ast.Inspect(ast.NewNode(c.Body), func(n ast.IsNode) bool {
			switch n := n.(type) {
			case ast.NodeTypeAccess:
				switch of := accessOf(n.Arg); {
				case of == "context":
					timeless := n.Value != "now" && n.Value != "hour" && n.Value != "weekday" && n.Value != "on_behalf_of"
					reads = reads || !timeless
					return false
				case of == "on_behalf_of" && n.Value != "auth_age_seconds":
					return false
				}
			case ast.NodeTypeVariable:
				reads = reads || n.Name == "context" // as a whole
			}
			return true
		})
	}
	return reads
}

// accessOf names the context, or an attribute of it; empty for anything else.
func accessOf(n ast.IsNode) types.String {
	switch n := n.(type) {
	case ast.NodeTypeVariable:
		if n.Name == "context" {
			return "context"
		}
	case ast.NodeTypeAccess:
		if v, ok := n.Arg.(ast.NodeTypeVariable); ok && v.Name == "context" {
			return n.Value
		}
	}
	return ""
}
