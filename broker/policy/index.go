package policy

import (
	"iter"
	"slices"

	"github.com/cedar-policy/cedar-go"
	"github.com/cedar-policy/cedar-go/types"
	"github.com/cedar-policy/cedar-go/x/exp/ast"
)

// index finds the policies that may concern a principal and a resource: by the
// resource (its tool, its provider), then by the principal (itself, its
// groups). The zero UID stands for any.
//
// A policy is left out only where its evaluation would end, without an error,
// at a test of principal or resource that is false: so what the index leaves
// out changes no decision and hides no error.
type index map[types.EntityUID]map[types.EntityUID][]int32

// maxKeys bounds the places of one policy in an index.
const maxKeys = 64

func buildIndex(policies []*member) map[Action]index {
	all := map[Action]index{}
	for _, a := range Actions() {
		all[a] = index{}
	}
	for i, m := range policies {
		p := m.ast()
		principals, resources := keysOf(p)
		for _, a := range Actions() {
			if !concerns(p.Action, actionUID(a)) {
				continue
			}
			for _, r := range resources {
				if all[a][r] == nil {
					all[a][r] = map[types.EntityUID][]int32{}
				}
				for _, pr := range principals {
					all[a][r][pr] = append(all[a][r][pr], int32(i))
				}
			}
		}
	}
	return all
}

// concerns reports whether an action's scope holds an action. Actions have no
// groups.
func concerns(scope ast.IsActionScopeNode, a types.EntityUID) bool {
	switch s := scope.(type) {
	case ast.ScopeTypeEq:
		return s.Entity == a
	case ast.ScopeTypeIn:
		return s.Entity == a
	case ast.ScopeTypeInSet:
		return slices.Contains(s.Entities, a)
	}
	return true
}

// keysOf are the entities of which the principal, and of which the resource,
// is or is in one, if the policy applies.
func keysOf(p *ast.Policy) (principals, resources []types.EntityUID) {
	principals, resources = scopeKeys(p.Principal), scopeKeys(p.Resource)
	// What the first conditions begin with is like a part of the scope.
	for _, c := range p.Conditions {
		if c.Condition != ast.ConditionWhen || !leading(c.Body, &principals, &resources) {
			break
		}
	}
	anybody := []types.EntityUID{{}}
	if principals == nil {
		principals = anybody
	}
	if resources == nil {
		resources = anybody
	}
	if len(principals)*len(resources) > maxKeys {
		if len(resources) <= maxKeys {
			principals = anybody
		} else if resources = anybody; len(principals) > maxKeys {
			principals = anybody
		}
	}
	return principals, resources
}

func scopeKeys(scope ast.IsScopeNode) []types.EntityUID {
	switch s := scope.(type) {
	case ast.ScopeTypeEq:
		return []types.EntityUID{s.Entity}
	case ast.ScopeTypeIn:
		return []types.EntityUID{s.Entity}
	case ast.ScopeTypeIsIn:
		return []types.EntityUID{s.Entity}
	}
	return nil
}

// leading takes keys from a condition, from its beginning on, and reports
// whether it is nothing but tests of principal and resource that cannot err,
// so that what follows it is reached only if it is true.
func leading(n ast.IsNode, principals, resources *[]types.EntityUID) bool {
	if and, ok := n.(ast.NodeTypeAnd); ok {
		return leading(and.Left, principals, resources) && leading(and.Right, principals, resources)
	}
	variable, keys, ok := entityTest(n)
	if !ok {
		return false
	}
	switch {
	case keys == nil:
	case variable == "principal" && *principals == nil:
		*principals = keys
	case variable == "resource" && *resources == nil:
		*resources = keys
	}
	return true
}

// entityTest reads a test of principal or resource that cannot err. It gives
// the entities of which the variable is or is in one where the test is true;
// nil where the test says nothing of that.
func entityTest(n ast.IsNode) (variable string, keys []types.EntityUID, ok bool) {
	switch n := n.(type) {
	case ast.NodeTypeEquals:
		if v, ok := variableOf(n.Left); ok {
			if uid, ok := literal(n.Right); ok {
				return v, []types.EntityUID{uid}, true
			}
		}
	case ast.NodeTypeIn:
		if v, ok := variableOf(n.Left); ok {
			if uid, ok := literal(n.Right); ok {
				return v, []types.EntityUID{uid}, true
			}
			keys, ok := literals(n.Right)
			return v, keys, ok
		}
	case ast.NodeTypeContains:
		if v, ok := variableOf(n.Right); ok {
			keys, ok := literals(n.Left)
			return v, keys, ok
		}
	case ast.NodeTypeIs:
		v, ok := variableOf(n.Left)
		return v, nil, ok
	case ast.NodeTypeIsIn:
		if v, ok := variableOf(n.Left); ok {
			if uid, ok := literal(n.Entity); ok {
				return v, []types.EntityUID{uid}, true
			}
		}
	case ast.NodeTypeOr:
		v, left, ok := entityTest(n.Left)
		w, right, also := entityTest(n.Right)
		if ok && also && v == w {
			if left == nil || right == nil {
				return v, nil, true
			}
			return v, slices.Concat(left, right), true
		}
	}
	return "", nil, false
}

func variableOf(n ast.IsNode) (string, bool) {
	v, ok := n.(ast.NodeTypeVariable)
	return string(v.Name), ok && (v.Name == "principal" || v.Name == "resource")
}

// literals are the elements of a set of named entities; there is at least one.
func literals(n ast.IsNode) ([]types.EntityUID, bool) {
	set, ok := n.(ast.NodeTypeSet)
	if !ok || len(set.Elements) == 0 {
		return nil, false
	}
	var all []types.EntityUID
	for _, e := range set.Elements {
		uid, ok := literal(e)
		if !ok {
			return nil, false
		}
		all = append(all, uid)
	}
	return all, true
}

// candidates are the policies that may concern a question.
func (s *Set) candidates(a Action, f *facts) []int32 {
	var found []int32
	byPrincipal := func(m map[types.EntityUID][]int32) {
		if len(m) == 0 {
			return
		}
		found = append(found, m[types.EntityUID{}]...)
		found = append(found, m[f.principal.UID]...)
		for g := range f.principal.Parents.All() {
			found = append(found, m[g]...)
		}
	}
	x := s.index[a]
	byPrincipal(x[types.EntityUID{}])
	byPrincipal(x[f.resource.UID])
	for p := range f.resource.Parents.All() {
		byPrincipal(x[p])
	}
	slices.Sort(found)
	return slices.Compact(found)
}

// chosen is some of a set's policies, for Cedar.
type chosen struct {
	set   *Set
	which []int32
}

// All lets Cedar see them.
func (c chosen) All() iter.Seq2[cedar.PolicyID, *cedar.Policy] {
	return func(yield func(cedar.PolicyID, *cedar.Policy) bool) {
		for _, i := range c.which {
			m := c.set.policies[i]
			if !yield(cedar.PolicyID(m.id), m.policy) {
				return
			}
		}
	}
}
