// Package catalog reads who is who and what there is: agents, groups,
// operators, providers, tools and incident openers, from YAML files into one
// immutable, validated Snapshot with a digest. Drivers come in as a map, so
// that a provider's configuration and a tool's scope are validated here
// without knowing any provider.
package catalog

import (
	"encoding/json"
	"maps"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/policy"
	"github.com/mayfly-security/mayfly/providers"
)

// Provider is a configured provider.
type Provider struct {
	Name   string
	Driver string
	Config json.RawMessage // canonical JSON, as the driver validated it
}

// Snapshot is one loaded catalog. It never changes; its methods may be called
// from many goroutines, and what they return is the caller's to keep but not
// to change.
type Snapshot struct {
	digest    string
	agents    map[spiffeid.ID]broker.Agent
	groups    map[string]map[spiffeid.ID]bool
	people    map[string]map[string]bool // group -> names of people that the catalog puts into it
	operating map[string]bool            // groups whose members are operators
	rules     map[string]broker.ApprovalRule
	policies  *policy.Set
	operators map[spiffeid.ID]bool
	providers map[string]Provider
	tools     map[string]broker.Tool
	scopes    map[string]providers.ScopeInfo
	openers   map[spiffeid.ID]policy.Opener
}

// Digest is the SHA-256, in hex, of everything in the catalog. It does not
// depend on the order or the layout of the files.
func (s *Snapshot) Digest() string { return s.digest }

// Agent returns one agent.
func (s *Snapshot) Agent(id spiffeid.ID) (broker.Agent, bool) {
	a, ok := s.agents[id]
	return a, ok
}

// Agents returns every agent, in the order of their IDs.
func (s *Snapshot) Agents() []broker.Agent {
	all := slices.Collect(maps.Values(s.agents))
	slices.SortFunc(all, func(a, b broker.Agent) int { return compareIDs(a.ID, b.ID) })
	return all
}

// Tool returns one tool.
func (s *Snapshot) Tool(name string) (broker.Tool, bool) {
	t, ok := s.tools[name]
	return t, ok
}

// Tools returns every tool, in the order of their names.
func (s *Snapshot) Tools() []broker.Tool {
	var all []broker.Tool
	for _, name := range slices.Sorted(maps.Keys(s.tools)) {
		all = append(all, s.tools[name])
	}
	return all
}

// ScopeInfo returns what the driver told of a tool's scope; the zero value for
// a tool that is not there.
func (s *Snapshot) ScopeInfo(tool string) providers.ScopeInfo { return s.scopes[tool] }

// Providers returns every provider, in the order of their names.
func (s *Snapshot) Providers() []Provider {
	var all []Provider
	for _, name := range slices.Sorted(maps.Keys(s.providers)) {
		all = append(all, s.providers[name])
	}
	return all
}

// Operator reports whether id may do what operators do.
func (s *Snapshot) Operator(id spiffeid.ID) bool { return s.operators[id] }

// InGroup reports whether id is a member of the group.
func (s *Snapshot) InGroup(id spiffeid.ID, group string) bool { return s.groups[group][id] }

// Opener returns what id may do about incidents.
func (s *Snapshot) Opener(id spiffeid.ID) (policy.Opener, bool) {
	o, ok := s.openers[id]
	return o, ok
}

// Roles returns what id is to this catalog, for people: none, or some of
// "agent", "operator", "opener" and "closer".
func (s *Snapshot) Roles(id spiffeid.ID) []string {
	var roles []string
	if _, ok := s.agents[id]; ok {
		roles = append(roles, "agent")
	}
	if s.operators[id] {
		roles = append(roles, "operator")
	}
	if _, ok := s.openers[id]; ok {
		roles = append(roles, "opener")
	}
	for _, o := range s.openers {
		if o.Closers != "" && s.InGroup(id, o.Closers) {
			roles = append(roles, "closer")
			break
		}
	}
	return roles
}

// Identities returns every SPIFFE ID that the catalog names, in order.
func (s *Snapshot) Identities() []spiffeid.ID {
	seen := map[spiffeid.ID]bool{}
	for id := range s.agents {
		seen[id] = true
	}
	for id := range s.operators {
		seen[id] = true
	}
	for id := range s.openers {
		seen[id] = true
	}
	for _, members := range s.groups {
		for id := range members {
			seen[id] = true
		}
	}
	return slices.SortedFunc(maps.Keys(seen), compareIDs)
}

func compareIDs(a, b spiffeid.ID) int { return strings.Compare(a.String(), b.String()) }
