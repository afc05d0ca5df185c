package lease

import (
	"context"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/audit"
	"github.com/mayfly-security/mayfly/broker/policy"
	"github.com/mayfly-security/mayfly/store"
)

// MaxPage is the most that one page of a listing holds.
const MaxPage = 1000

// maxLooked bounds how many records one page may look at, so that a filter
// that matches little cannot keep the store busy: such a page comes back
// short, with where to go on.
const maxLooked = 4000

// Page is one part of a listing. Next is where the next part begins; it is
// empty at the end.
type Page[T any] struct {
	Items []T
	Next  string
}

// LeaseFilter says which leases to list. Zero fields match everything.
type LeaseFilter struct {
	Agent    spiffeid.ID
	Tool     string
	Grant    broker.GrantID
	Incident broker.IncidentID
	All      bool // also those that have ended
	Overdue  bool // only the overdue
}

// Leases lists leases in the order of their making, for whoever sees them all;
// for others, see LeasesIn.
func (e *Engine) Leases(ctx context.Context, f LeaseFilter, after string, size int) (Page[broker.Lease], error) {
	prefix := prefixLease
	switch {
	case f.Overdue:
		prefix = prefixRevoking // by end: the longest overdue first
	case f.Grant != "" && !f.All:
		prefix = prefixOpen(f.Grant)
	case !f.Agent.IsZero():
		prefix = prefixLeasesOf(f.Agent)
	}
	now := e.clock.now()
	return page(ctx, e.store, prefix, after, size, func(r store.Reader, key string) (broker.Lease, bool, error) {
		l, ok, err := get[leaseRecord](r, keyLease(broker.LeaseID(lastPart(key))))
		if err != nil || !ok {
			return broker.Lease{}, false, err
		}
		match := (f.Agent.IsZero() || l.Agent == f.Agent) &&
			(f.Tool == "" || l.Tool == f.Tool) &&
			(f.Grant == "" || l.Grant == f.Grant) &&
			(f.Incident == "" || l.Incident == f.Incident) &&
			(f.All || !l.State.Ended()) &&
			(!f.Overdue || l.Overdue(now))
		return l.Lease, match, nil
	})
}

// Lease returns one lease. A lease of an agent that the caller does not see, as
// of SightOf, is not found, like one that does not exist.
func (e *Engine) Lease(ctx context.Context, id broker.LeaseID, s Sight) (broker.Lease, error) {
	var l leaseRecord
	err := e.store.View(ctx, func(r store.Reader) error {
		var ok bool
		var err error
		l, ok, err = get[leaseRecord](r, keyLease(id))
		if err == nil && (!ok || !s.Sees(l.Agent)) {
			err = policy.NotFound("lease", string(id))
		}
		return err
	})
	if err != nil {
		return broker.Lease{}, storeRefusal(err)
	}
	return l.Lease, nil
}

// RevokeLease ends one lease, and waits a moment for its death. The caller is
// its agent, or may end leases; to whoever does not see it it does not exist. Ending what
// has ended changes nothing.
func (e *Engine) RevokeLease(ctx context.Context, caller broker.Caller, id broker.LeaseID, reason string) (broker.Lease, error) {
	l, err := e.revokeLease(ctx, caller, id, reason)
	if err != nil {
		e.Refused(ctx, caller, "revoke_lease", "", err)
	}
	return l, err
}

func (e *Engine) revokeLease(ctx context.Context, caller broker.Caller, id broker.LeaseID, reason string) (broker.Lease, error) {
	if err := broker.CheckText("reason", reason, broker.MaxReason); err != nil {
		return broker.Lease{}, err
	}
	l, err := e.Lease(ctx, id, Sight{All: true})
	if err != nil {
		return broker.Lease{}, err
	}
	var verdict policy.Verdict
	if caller.ID != l.Agent {
		ep := e.current.Load()
		if verdict, err = e.administer(ctx, ep, caller, policy.VerbRevokeLease); err != nil {
			if s, _ := e.SightOf(ctx, caller); !s.Sees(l.Agent) {
				err = policy.NotFound("lease", string(id))
			}
			return broker.Lease{}, err
		}
	}
	if l.State.Ended() {
		return l, nil
	}
	cause := broker.CauseRevoked
	if caller.ID == l.Agent {
		cause = broker.CauseReturned
	}
	why := ending{cause: cause, actor: caller.Principal().String(), reason: reason, correlation: caller.Correlation, by: permissionOf(verdict)}
	if _, err := e.endLeases(ctx, []broker.LeaseID{id}, why); untellable(err) {
		return broker.Lease{}, underWay(err)
	} else if err != nil {
		return broker.Lease{}, err
	}
	if _, err := e.awaitEnd(ctx, []broker.LeaseID{id}); err != nil {
		return broker.Lease{}, err
	}
	return e.Lease(context.WithoutCancel(ctx), id, Sight{All: true})
}

// GrantFilter says which grants to list. Zero fields match everything.
type GrantFilter struct {
	Agent    spiffeid.ID
	Tool     string
	Incident broker.IncidentID
	All      bool // also those that have ended
}

// GrantView is a grant, and whether it is suspended by the catalog as it is now.
type GrantView struct {
	broker.Grant
	Suspended bool
}

// Grants lists grants in the order of their making, for whoever sees them all;
// for others, see GrantsIn.
func (e *Engine) Grants(ctx context.Context, f GrantFilter, after string, size int) (Page[GrantView], error) {
	prefix := prefixGrant
	if !f.All {
		prefix = prefixGrants // the open ones, by agent and tool
		if !f.Agent.IsZero() {
			prefix = prefixGrantsOf(f.Agent)
		}
	}
	ep := e.current.Load()
	now := e.clock.now()
	return page(ctx, e.store, prefix, after, size, func(r store.Reader, key string) (GrantView, bool, error) {
		g, ok, err := get[broker.Grant](r, keyGrant(broker.GrantID(lastPart(key))))
		if err != nil || !ok {
			return GrantView{}, false, err
		}
		match := (f.Agent.IsZero() || g.Agent == f.Agent) &&
			(f.Tool == "" || g.Tool == f.Tool) &&
			(f.Incident == "" || g.Incident == f.Incident)
		if !match {
			return GrantView{}, false, nil
		}
		v, err := ep.grantView(r, g, now)
		return v, true, err
	})
}

// grantView is a grant by this epoch's catalog.
func (ep *epoch) grantView(r getter, g broker.Grant, now time.Time) (GrantView, error) {
	v := GrantView{Grant: g}
	if g.State != broker.GrantOpen {
		return v, nil
	}
	f, err := ep.read(r, g.ID, nil, now)
	v.Suspended = ep.couldGive(f, now).Suspended()
	return v, err
}

// couldGive is what is known of a grant, for those who list it: where it leaves
// values to its leases, policies are taken to allow what they allow with some.
func (ep *epoch) couldGive(f policy.GrantFacts, now time.Time) policy.GrantFacts {
	if f.AgentKnown && f.ToolKnown && !f.Policy.Allowed && free(f) {
		f.Policy.Allowed = ep.policies().Could(ep.aboutGrant(f, nil, now), policy.Chosen()...)
	}
	return f
}

// IncidentView is an incident with its grants and how many of its leases have
// not ended.
type IncidentView struct {
	broker.Incident
	Grants []GrantView
	Open   int
}

// Incident returns one incident to whoever may see it: its opener, its closers
// and those who see all. To anybody else it does not exist.
func (e *Engine) Incident(ctx context.Context, caller broker.Caller, id broker.IncidentID) (IncidentView, error) {
	ep := e.current.Load()
	all, now := e.seesAll(ctx, ep, caller), e.clock.now()
	var v IncidentView
	err := e.store.View(ctx, func(r store.Reader) error {
		in, ok, err := get[broker.Incident](r, keyIncident(id))
		if err != nil {
			return err
		}
		if !ok || !all && !ep.sees(caller, in) {
			return policy.NotFound("incident", string(id))
		}
		v, err = ep.view(r, in, now)
		return err
	})
	return v, storeRefusal(err)
}

// Incidents lists the incidents that the caller may see, in the order of their
// opening; all says whether closed ones are among them.
func (e *Engine) Incidents(ctx context.Context, caller broker.Caller, all bool, after string, size int) (Page[IncidentView], error) {
	ep := e.current.Load()
	seesAll, now := e.seesAll(ctx, ep, caller), e.clock.now()
	return page(ctx, e.store, prefixIncident, after, size, func(r store.Reader, key string) (IncidentView, bool, error) {
		in, ok, err := get[broker.Incident](r, key)
		if err != nil || !ok || !seesAll && !ep.sees(caller, in) || !all && in.State != broker.IncidentOpen {
			return IncidentView{}, false, err
		}
		v, err := ep.view(r, in, now)
		return v, true, err
	})
}

// sees reports whether an incident is the caller's to see, other than by seeing all.
func (ep *epoch) sees(caller broker.Caller, in broker.Incident) bool {
	return in.OpenedBy == caller.Principal() || ep.isCloser(caller.ID, in)
}

func (ep *epoch) view(r store.Reader, in broker.Incident, now time.Time) (IncidentView, error) {
	v := IncidentView{Incident: in}
	for _, id := range in.Grants {
		g, ok, err := get[broker.Grant](r, keyGrant(id))
		if err != nil {
			return v, err
		}
		if !ok {
			continue // it ended long before its incident, and was forgotten
		}
		gv, err := ep.grantView(r, g, now)
		if err != nil {
			return v, err
		}
		v.Grants = append(v.Grants, gv)
		from, to := store.Prefix(prefixOpen(id))
		for _, err := range r.Scan(from, to) {
			if err != nil {
				return v, err
			}
			v.Open++
		}
	}
	return v, nil
}

// ToolView is a tool as one agent sees it.
type ToolView struct {
	broker.Tool
	Survives string
	Static   bool          // only a rotation ends its secret
	Granted  *broker.Grant // the grant that would be used now; nil if there is none
	Refusal  broker.Reason // why there is none
	// Requestable: the policy set lets the caller ask for it, with some
	// parameters if not with all.
	Requestable bool
}

// Tools lists the tools that an agent has an open grant for, those that it
// may ask for, and, for whoever sees all, all tools.
func (e *Engine) Tools(ctx context.Context, caller broker.Caller) ([]ToolView, error) {
	ep := e.current.Load()
	all := e.seesAll(ctx, ep, caller)
	now := e.clock.now()
	facts := map[string][]policy.GrantFacts{}
	err := e.store.View(ctx, func(r store.Reader) error {
		clear(facts)
		from, to := store.Prefix(prefixGrantsOf(caller.ID))
		for entry, err := range r.Scan(from, to) {
			if err != nil {
				return err
			}
			f, err := ep.read(r, broker.GrantID(lastPart(entry.Key)), nil, now)
			if err != nil {
				return err
			}
			facts[f.Grant.Tool] = append(facts[f.Grant.Tool], ep.couldGive(f, now))
		}
		return nil
	})
	if err != nil {
		return nil, storeRefusal(err)
	}
	var views []ToolView
	for _, tool := range ep.catalog.Tools() {
		candidates, has := facts[tool.Name]
		info := ep.catalog.ScopeInfo(tool.Name)
		v := ToolView{Tool: tool, Survives: info.Survives, Static: info.Static, Requestable: ep.mayAsk(caller, tool, now)}
		if !has && !all && !v.Requestable {
			continue
		}
		best := broker.Grant{}
		for _, f := range candidates {
			f.Grant.Params = nil // which values will be asked for is not known here
			ask := policy.Ask{TTL: tool.MaxTTL}
			if _, d := f.Issue(ask, now); d.Err() != nil {
				v.Refusal = d.Refusal.Reason
			} else if f.Grant.NotAfter.After(best.NotAfter) {
				best = f.Grant
			}
		}
		if best.ID != "" {
			v.Granted, v.Refusal = &best, ""
		}
		views = append(views, v)
	}
	return views, nil
}

// EventFilter says which events to list. Zero fields match everything.
type EventFilter struct {
	Agent, Tool string
	Lease       broker.LeaseID
	Grant       broker.GrantID
	Incident    broker.IncidentID
	Request     broker.RequestID
	Type        audit.Type
}

func (f EventFilter) match(e audit.Event) bool {
	return (f.Agent == "" || e.Agent == f.Agent) && (f.Tool == "" || e.Tool == f.Tool) &&
		(f.Lease == "" || e.Lease == f.Lease) && (f.Grant == "" || e.Grant == f.Grant) &&
		(f.Incident == "" || e.Incident == f.Incident) && (f.Request == "" || e.Request == f.Request) && (f.Type == "" || e.Type == f.Type)
}

// Events lists the evidence after a sequence number, to those who may read it;
// latest means the last events that match instead. looked is how far it
// looked: the after of the next call.
func (e *Engine) Events(ctx context.Context, caller broker.Caller, f EventFilter, after uint64, size int, latest bool) (events []audit.Event, looked uint64, err error) {
	if _, err := e.administer(ctx, e.current.Load(), caller, policy.VerbReadEvidence); err != nil {
		e.Refused(ctx, caller, "list_events", "", err)
		return nil, 0, err
	}
	size = pageSize(size)
	err = e.store.View(ctx, func(r store.Reader) (err error) {
		if latest {
			events, looked, err = f.last(r, size)
		} else {
			events, looked, err = f.read(r, after, size)
		}
		return err
	})
	return events, looked, storeRefusal(err)
}

// read lists up to size events after a sequence number that match.
func (f EventFilter) read(r store.Reader, after uint64, size int) (events []audit.Event, looked uint64, err error) {
	looked = after
	n := 0
	for entry, err := range r.Log(audit.Log, after) {
		if err != nil {
			return nil, 0, err
		}
		ev, err := audit.Decode(entry.Seq, entry.Value)
		if err != nil {
			return nil, 0, err
		}
		looked = entry.Seq
		if f.match(ev) {
			events = append(events, ev)
		}
		if n++; len(events) == size || n == maxLooked {
			break
		}
	}
	return events, looked, nil
}

// last lists the last size events that match, by reading ever longer ends of
// the log, up to maxLooked.
func (f EventFilter) last(r store.Reader, size int) (events []audit.Event, looked uint64, err error) {
	end, err := lastOf(r, audit.Log)
	if err != nil || end == 0 {
		return nil, 0, err
	}
	for span := uint64(size); ; span = min(4*span, maxLooked) {
		after := end - min(span, end)
		if events, looked, err = f.read(r, after, maxLooked+1); err != nil {
			return nil, 0, err
		}
		if len(events) >= size || after == 0 || span == maxLooked {
			return events[max(len(events)-size, 0):], looked, nil
		}
	}
}

// lastOf is the sequence number of a log's last entry, 0 if it has none. It is
// found bit by bit: a bit belongs to it if there is an entry from there on.
func lastOf(r store.Reader, log string) (last uint64, err error) {
	for bit := uint64(1) << 62; bit > 0; bit >>= 1 {
		for _, err := range r.Log(log, (last|bit)-1) {
			if err != nil {
				return 0, err
			}
			last |= bit
			break
		}
	}
	return last, nil
}

// page reads one page of a listing: keys of a prefix, after a key, as many as
// match. read turns a key into an item and says whether it matches.
func page[T any](ctx context.Context, s store.Store, prefix, after string, size int, read func(r store.Reader, key string) (T, bool, error)) (Page[T], error) {
	size = pageSize(size)
	var p Page[T]
	err := s.View(ctx, func(r store.Reader) error {
		p = Page[T]{}
		from, to := store.Prefix(prefix)
		if after != "" {
			from = prefix + after + "\x00"
		}
		looked := 0
		for entry, err := range r.Scan(from, to) {
			if err != nil {
				return err
			}
			if len(p.Items) == size || looked == maxLooked {
				return nil
			}
			looked++
			item, ok, err := read(r, entry.Key)
			if err != nil {
				return err
			}
			if ok {
				p.Items = append(p.Items, item)
			}
			p.Next = entry.Key[len(prefix):]
		}
		p.Next = "" // everything was looked at
		return nil
	})
	return p, storeRefusal(err)
}

func pageSize(size int) int {
	if size <= 0 {
		return 100
	}
	return min(size, MaxPage)
}
