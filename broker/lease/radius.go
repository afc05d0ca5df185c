package lease

import (
	"context"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/store"
)

// Selector says what the kill switch is about. Exactly one field is set.
type Selector struct {
	Agent    spiffeid.ID       `json:",omitzero"`
	Tool     string            `json:",omitempty"`
	Provider string            `json:",omitempty"`
	Owner    string            `json:",omitempty"` // of agents, as the catalog has it
	Incident broker.IncidentID `json:",omitempty"`
	Person   string            `json:",omitempty"` // whose votes or requests, or on whose behalf
	All      bool              `json:",omitempty"`
}

// Radius is what a Selector matches, and what has become of it.
type Radius struct {
	Grants, Requests, Leases    int            // that there were at the beginning
	Alive, Overdue, Lapsed      int            // of the leases: not yet known to be dead, of these past their end; over and not known to be dead
	ByAgent, ByTool, ByProvider map[string]int // leases that there were at the beginning
	Survives                    []string       // what outlives a revocation, for people; at most maxSurvives
	Done                        bool           // none is alive; never set by a dry run
}

// maxSurvives bounds Radius.Survives.
const maxSurvives = 20

// check refuses a selector that selects by none or more than one thing.
func (s Selector) check() error {
	n := 0
	for _, set := range []bool{!s.Agent.IsZero(), s.Tool != "", s.Provider != "", s.Owner != "", s.Incident != "", s.Person != "", s.All} {
		if set {
			n++
		}
	}
	if n != 1 {
		return broker.Refusef(broker.ReasonInvalidArgument, "give exactly one of --agent, --tool, --provider, --owner, --incident, --person and --all",
			"%d things were given to select by", n)
	}
	for name, text := range map[string]string{"tool": s.Tool, "provider": s.Provider, "owner": s.Owner, "person": s.Person} {
		if err := broker.CheckText(name, text, broker.MaxPersonName); err != nil {
			return err
		}
	}
	return nil
}

// String names what is selected, for the evidence.
func (s Selector) String() string {
	switch {
	case !s.Agent.IsZero():
		return "agent=" + s.Agent.String()
	case s.Tool != "":
		return "tool=" + s.Tool
	case s.Provider != "":
		return "provider=" + s.Provider
	case s.Owner != "":
		return "owner=" + s.Owner
	case s.Incident != "":
		return "incident=" + string(s.Incident)
	case s.Person != "":
		return "person=" + s.Person
	}
	return "all"
}

// ofAccess reports whether what an agent has, or asks for, is selected by what
// grants, requests and leases have in common.
func (s Selector) ofAccess(ep *epoch, agent spiffeid.ID, tool, provider string, incident broker.IncidentID) bool {
	switch {
	case s.All:
		return true
	case !s.Agent.IsZero():
		return agent == s.Agent
	case s.Tool != "":
		return tool == s.Tool
	case s.Provider != "":
		if provider == "" {
			t, _ := ep.catalog.Tool(tool)
			provider = t.Provider
		}
		return provider == s.Provider
	case s.Owner != "":
		a, _ := ep.catalog.Agent(agent)
		return strings.EqualFold(a.Owner, s.Owner)
	case s.Incident != "":
		return incident == s.Incident
	}
	return false
}

func (s Selector) grant(ep *epoch, g broker.Grant) bool {
	if s.Person == "" {
		return s.ofAccess(ep, g.Agent, g.Tool, "", g.Incident)
	}
	return s.person(g.CreatedBy) || g.OnBehalfOf != nil && s.named(g.OnBehalfOf.Name) ||
		slices.ContainsFunc(g.Voters, func(v broker.Voter) bool { return s.named(v.Name) })
}

// named reports whether a person is called as the selector says. As everywhere
// that is for the worse of them, case says nothing.
func (s Selector) named(name string) bool { return strings.EqualFold(name, s.Person) }

func (s Selector) person(p broker.Principal) bool {
	name, is := p.Person()
	return is && s.named(name)
}

func (s Selector) request(ep *epoch, r requestRecord) bool {
	if s.Person == "" {
		return s.ofAccess(ep, r.Agent, r.Tool, "", r.Incident)
	}
	return s.person(r.CreatedBy) || r.OnBehalfOf != nil && s.named(r.OnBehalfOf.Name) ||
		slices.ContainsFunc(r.Approvals, func(a broker.Approval) bool { return a.Approved && s.named(a.Person.Name) })
}

// lease needs the grant where leases are selected by a person.
func (s Selector) lease(r getter, ep *epoch, l *leaseRecord) (bool, error) {
	if s.Person == "" {
		return s.ofAccess(ep, l.Agent, l.Tool, l.Provider, l.Incident), nil
	}
	g, ok, err := get[broker.Grant](r, keyGrant(l.Grant))
	return ok && s.grant(ep, g), err
}

// lookPage is how many records one snapshot looks at: a long look must not keep
// the store from reusing its pages.
const lookPage = 5000

// matching calls each with the leases that have not ended, and were made before
// a time, that the selector matches, until each says that it has seen enough.
func (s Selector) matching(ctx context.Context, e *Engine, before time.Time, each func(l *leaseRecord) (more bool)) error {
	prefix := prefixDue
	if s.Provider != "" {
		if strings.Contains(s.Provider, "|") {
			return nil
		}
		prefix = prefixDueOf(s.Provider)
	}
	// A lease moves in the due index while it is looked through, and may be met
	// twice; one that is passed over had been moved, and is looked for again by
	// those who must be certain.
	return e.paged(ctx, prefix, func(r store.Reader, key string) (bool, error) {
		ep := e.current.Load()
		l, ok, err := get[leaseRecord](r, keyLease(broker.LeaseID(lastPart(key))))
		if err != nil || !ok || l.State.Ended() || l.CreatedAt.After(before) {
			return true, err
		}
		if ok, err = s.lease(r, ep, &l); err != nil || !ok {
			return true, err
		}
		return each(&l), nil
	})
}

// paged looks through the keys of a prefix, a page to a snapshot.
func (e *Engine) paged(ctx context.Context, prefix string, each func(r store.Reader, key string) (more bool, err error)) error {
	from, to := store.Prefix(prefix)
	for {
		next := ""
		err := e.view(ctx, func(r store.Reader) error {
			next = ""
			n := 0
			for entry, err := range r.Scan(from, to) {
				if err != nil {
					return err
				}
				if n++; n > lookPage {
					next = entry.Key
					return nil
				}
				more, err := each(r, entry.Key)
				if err != nil || !more {
					return err
				}
			}
			return nil
		})
		if err != nil || next == "" {
			return err
		}
		from = next
	}
}

// radius counts what the selector matches now, and returns the leases.
func (e *Engine) radius(ctx context.Context, s Selector, before time.Time) (rad Radius, ids []broker.LeaseID, err error) {
	rad = Radius{ByAgent: map[string]int{}, ByTool: map[string]int{}, ByProvider: map[string]int{}}
	now := e.clock.now()
	if rad.Grants, err = e.countOf(ctx, prefixGrants, func(r store.Reader, key string) (bool, error) {
		g, ok, err := get[broker.Grant](r, keyGrant(broker.GrantID(lastPart(key))))
		return ok && s.grant(e.current.Load(), g), err
	}); err != nil {
		return rad, nil, err
	}
	if rad.Requests, err = e.countOf(ctx, prefixWaiting, func(r store.Reader, key string) (bool, error) {
		rec, ok, err := get[requestRecord](r, keyRequest(broker.RequestID(lastPart(key))))
		return ok && s.request(e.current.Load(), rec), err
	}); err != nil {
		return rad, nil, err
	}
	met := map[broker.LeaseID]struct{}{}
	survives := map[string]struct{}{}
	err = s.matching(ctx, e, before, func(l *leaseRecord) bool {
		if _, twice := met[l.ID]; twice {
			return true
		}
		met[l.ID] = struct{}{}
		ids = append(ids, l.ID)
		rad.ByAgent[l.Agent.String()]++
		rad.ByTool[l.Tool]++
		rad.ByProvider[l.Provider]++
		if l.Overdue(now) {
			rad.Overdue++
		}
		if l.Survives != "" && len(survives) < maxSurvives {
			survives[l.Tool+": "+l.Survives] = struct{}{}
		}
		return true
	})
	rad.Leases, rad.Alive = len(ids), len(ids)
	rad.Survives = slices.Sorted(maps.Keys(survives))
	return rad, ids, err
}

func (e *Engine) countOf(ctx context.Context, prefix string, is func(r store.Reader, key string) (bool, error)) (n int, err error) {
	err = e.paged(ctx, prefix, func(r store.Reader, key string) (bool, error) {
		ok, err := is(r, key)
		if ok {
			n++
		}
		return true, err
	})
	return n, err
}
