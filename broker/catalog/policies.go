package catalog

import (
	"errors"
	"path/filepath"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/policy"
)

// reserved begins the names of groups that are the broker's own.
const reserved = policy.ReservedGroups

// isPolicies reports whether a file of the catalog is one of policies.
func isPolicies(name string) bool { return filepath.Ext(name) == ".cedar" }

// policies loads the policy set, and checks the names in it that only the
// catalog knows. Groups may be the identity provider's, and people too.
func (l *loader) policies(sources []policy.Source) {
	if len(sources) == 0 {
		l.snapshot.policies = policy.Builtin()
		return
	}
	set, err := policy.Load(sources)
	var wrong policy.Errors
	switch {
	case errors.As(err, &wrong):
		l.errs = append(l.errs, wrong...)
		return
	case err != nil:
		l.errs = append(l.errs, &policy.Error{Position: policy.Position{File: sources[0].Name, Line: 1, Column: 1}, Message: err.Error()})
		return
	}
	l.snapshot.policies = set
	if len(l.errs) > 0 {
		return // a tool that is there but was refused is one error already
	}
	l.errs = append(l.errs, l.snapshot.CheckPolicies(set)...)
}

// LoadPolicies reads a policy set as it would be read beside this catalog's
// other files, and refuses what names something that the catalog does not
// have. No source gives the built-in set, as in a catalog without policies.
// The error is policy.Errors.
func (s *Snapshot) LoadPolicies(sources []policy.Source) (*policy.Set, error) {
	if len(sources) == 0 {
		return policy.Builtin(), nil
	}
	set, err := policy.Load(sources)
	if err != nil {
		return nil, err
	}
	if wrong := s.CheckPolicies(set); len(wrong) > 0 {
		return nil, wrong
	}
	return set, nil
}

// CheckPolicies finds the tools, agents and providers that policies name and
// the catalog does not have.
func (s *Snapshot) CheckPolicies(set *policy.Set) policy.Errors {
	var wrong policy.Errors
	for _, n := range set.Names() {
		var known bool
		var candidates []string
		switch n.Type {
		case "Tool":
			_, known = s.tools[n.ID]
			candidates = keys(s.tools)
		case "Provider":
			_, known = s.providers[n.ID]
			candidates = keys(s.providers)
		case "Agent":
			id, err := spiffeid.FromString(n.ID)
			_, known = s.agents[id]
			known = known && err == nil
			for _, a := range s.Agents() {
				candidates = append(candidates, a.ID.String())
			}
		default:
			continue
		}
		if !known {
			wrong = append(wrong, &policy.Error{Position: n.Position,
				Message: "the catalog has no " + n.Type + " " + show(n.ID) + broker.Suggest(n.ID, "names", candidates)})
		}
	}
	return wrong
}

func keys[T any](m map[string]T) []string {
	var all []string
	for k := range m {
		all = append(all, k)
	}
	slices.Sort(all)
	return all
}
