package lease

import (
	"context"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/policy"
	"github.com/mayfly-security/mayfly/store"
)

// Sight is whose leases and grants a caller may see. The zero Sight sees none.
type Sight struct {
	All    bool
	Agents []spiffeid.ID // unless All; sorted
}

// Sees reports whether an agent's leases and grants are seen.
func (s Sight) Sees(agent spiffeid.ID) bool { return s.All || slices.Contains(s.Agents, agent) }

// of narrows a Sight to one agent, if it is not the zero ID.
func (s Sight) of(agent spiffeid.ID) Sight {
	switch {
	case agent.IsZero():
		return s
	case s.Sees(agent):
		return Sight{Agents: []spiffeid.ID{agent}}
	}
	return Sight{}
}

// SightOf tells whose leases and grants the caller may see: everybody's, for
// whoever may see all; a workload's own; those of the agents that a person owns.
// A person who owns none is refused.
func (e *Engine) SightOf(ctx context.Context, caller broker.Caller) (Sight, error) {
	ep := e.current.Load()
	if e.seesAll(ctx, ep, caller) {
		return Sight{All: true}, nil
	}
	if caller.Person == nil {
		return Sight{Agents: []spiffeid.ID{caller.ID}}, nil
	}
	var who policy.Subject
	err := e.view(ctx, func(r store.Reader) (err error) {
		who, err = ep.subject(r, caller)
		return err
	})
	if err != nil {
		return Sight{}, err
	}
	var s Sight
	for _, a := range ep.catalog.Agents() {
		if policy.Owns(a.Owner, *who.Person, who.Groups) {
			s.Agents = append(s.Agents, a.ID)
		}
	}
	if len(s.Agents) == 0 {
		return s, broker.Refuse(broker.ReasonPermissionDenied,
			"a person has no leases or grants of their own, owns no agent, and may not see everybody's", "ask an operator; `mayfly policy explain --verb all.see` says what would allow it")
	}
	slices.SortFunc(s.Agents, func(a, b spiffeid.ID) int { return strings.Compare(a.String(), b.String()) })
	return s, nil
}

// owned reports whether the caller is a person who owns the agent.
func (ep *epoch) owned(r getter, caller broker.Caller, agent spiffeid.ID) (bool, error) {
	if caller.Person == nil {
		return false, nil
	}
	who, err := ep.subject(r, caller)
	if err != nil {
		return false, err
	}
	a, known := ep.catalog.Agent(agent)
	return known && policy.Owns(a.Owner, *who.Person, who.Groups), nil
}

// LeasesIn is Leases within a Sight: agent after agent, if there are several.
func (e *Engine) LeasesIn(ctx context.Context, s Sight, f LeaseFilter, after string, size int) (Page[broker.Lease], error) {
	return inSight(s.of(f.Agent), after, size, func(agent spiffeid.ID, after string, size int) (Page[broker.Lease], error) {
		f.Agent = agent
		return e.Leases(ctx, f, after, size)
	})
}

// GrantsIn is Grants within a Sight: agent after agent, if there are several.
func (e *Engine) GrantsIn(ctx context.Context, s Sight, f GrantFilter, after string, size int) (Page[GrantView], error) {
	return inSight(s.of(f.Agent), after, size, func(agent spiffeid.ID, after string, size int) (Page[GrantView], error) {
		f.Agent = agent
		return e.Grants(ctx, f, after, size)
	})
}

// inSight lists what is of each agent of a Sight. Where there are several, the
// token of a page names the agent that it goes on with.
func inSight[T any](s Sight, after string, size int, list func(agent spiffeid.ID, after string, size int) (Page[T], error)) (Page[T], error) {
	switch {
	case s.All:
		return list(spiffeid.ID{}, after, size)
	case len(s.Agents) == 0:
		return Page[T]{}, nil
	case len(s.Agents) == 1:
		return list(s.Agents[0], after, size)
	}
	size = pageSize(size)
	from, rest, _ := strings.Cut(after, "|")
	var all Page[T]
	for i, agent := range s.Agents {
		name := agent.String()
		if name < from {
			continue
		}
		if name != from {
			rest = ""
		}
		p, err := list(agent, rest, size-len(all.Items))
		if err != nil {
			return Page[T]{}, err
		}
		all.Items = append(all.Items, p.Items...)
		switch {
		case p.Next != "":
			all.Next = name + "|" + p.Next
			return all, nil
		case len(all.Items) == size && i+1 < len(s.Agents):
			all.Next = s.Agents[i+1].String() + "|"
			return all, nil
		}
	}
	return all, nil
}
