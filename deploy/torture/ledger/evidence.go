package ledger

import (
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/audit"
)

// Event is one piece of evidence, as much of it as is judged here.
type Event struct {
	Sequence uint64
	Type     audit.Type
	Lease    broker.LeaseID
	Grant    broker.GrantID
	Incident broker.IncidentID
	Cause    string
}

// Evidence follows the evidence from its count event on. Its methods may be
// called from many goroutines.
type Evidence struct {
	mu     sync.Mutex
	next   uint64 // the sequence that must come next
	leases map[broker.LeaseID]*told
	over   map[string]uint64 // incidents and grants that are over, and since which event
	made   map[string]uint64 // incidents and grants that were made
	acked  map[string]string // what was acknowledged and not seen in the evidence yet: how
	ended  map[broker.Cause]int
	cut    int                // attempts to mint that a restart ended since the last start
	cuts   []int              // the same, for each start
	count  map[audit.Type]int // how many events of each type there were
}

// told is the life of one lease as the evidence tells it.
type told struct {
	steps []step
	cause broker.Cause
}

type step struct {
	sequence uint64
	state    broker.LeaseState
}

func (t *told) at(sequence uint64) (broker.LeaseState, int) {
	state, i := broker.LeaseState(""), 0
	for i < len(t.steps) && t.steps[i].sequence <= sequence {
		state = t.steps[i].state
		i++
	}
	return state, i
}

// NewEvidence begins at the count event.
func NewEvidence() *Evidence {
	return &Evidence{
		next: 1, leases: map[broker.LeaseID]*told{},
		over: map[string]uint64{}, made: map[string]uint64{}, acked: map[string]string{},
		ended: map[broker.Cause]int{}, count: map[audit.Type]int{},
	}
}

// states are the states that events of a lease tell of.
var states = map[audit.Type]broker.LeaseState{
	audit.LeaseIntended: broker.LeaseMinting,
	audit.LeaseActive:   broker.LeaseActive,
	audit.LeaseRevoking: broker.LeaseRevoking,
	audit.LeaseRevoked:  broker.LeaseRevoked,
	audit.LeaseExpired:  broker.LeaseExpired,
	audit.LeaseLapsed:   broker.LeaseLapsed,
}

// follows are the states that may follow each; "" is the beginning.
var follows = map[broker.LeaseState][]broker.LeaseState{
	"":                   {broker.LeaseMinting, broker.LeaseActive},
	broker.LeaseMinting:  {broker.LeaseActive, broker.LeaseRevoking, broker.LeaseRevoked},
	broker.LeaseActive:   {broker.LeaseRevoking, broker.LeaseExpired},
	broker.LeaseRevoking: {broker.LeaseRevoked, broker.LeaseExpired, broker.LeaseLapsed},
}

// Add takes the next event.
func (e *Evidence) Add(ev Event) (wrong []Violation) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if ev.Sequence != e.next {
		wrong = append(wrong, violation(NoEvidence, ev.Lease, "event %d follows event %d", ev.Sequence, e.next-1))
	}
	e.next = ev.Sequence + 1
	e.count[ev.Type]++
	e.see(ev)
	if ev.Type == audit.BrokerStarted { // a start count ends what it finds under way, and then says that it started
		e.cuts = append(e.cuts, e.cut)
		e.cut = 0
	}
	state, ok := states[ev.Type]
	if !ok {
		return wrong
	}
	t := e.leases[ev.Lease]
	if t == nil {
		t = &told{}
		e.leases[ev.Lease] = t
	}
	was, _ := t.at(ev.Sequence)
	if !slices.Contains(follows[was], state) {
		wrong = append(wrong, violation(NoEvidence, ev.Lease, "event %d says that lease %s is %s after it was %q", ev.Sequence, ev.Lease, state, was))
	}
	if state == broker.LeaseActive {
		for _, on := range []string{string(ev.Grant), string(ev.Incident)} {
			if since := e.over[on]; since > 0 {
				wrong = append(wrong, violation(Late, ev.Lease, "event %d makes lease %s active, and event %d ended %s", ev.Sequence, ev.Lease, since, on))
			}
		}
	}
	if was != broker.LeaseRevoking && (state == broker.LeaseRevoking || state.Ended()) {
		t.cause = broker.Cause(ev.Cause)
		e.ended[t.cause]++
		if t.cause == broker.CauseRestarted {
			e.cut++
		}
	}
	t.steps = append(t.steps, step{ev.Sequence, state})
	return wrong
}

// see notes what an event tells of grants and incidents, and what was waited for.
func (e *Evidence) see(ev Event) {
	switch ev.Type {
	case audit.IncidentOpened:
		e.made[string(ev.Incident)] = ev.Sequence
	case audit.GrantCreated:
		e.made[string(ev.Grant)] = ev.Sequence
	case audit.IncidentClosed:
		e.over[string(ev.Incident)] = ev.Sequence
	case audit.GrantEnded:
		e.over[string(ev.Grant)] = ev.Sequence
	}
	for _, id := range []string{string(ev.Incident), string(ev.Grant), string(ev.Lease)} {
		if id != "" {
			delete(e.acked, string(ev.Type)+" "+id)
		}
	}
}

// Acknowledged notes that the broker answered that something was done, so that
// the evidence must tell of it. how says for people what was answered.
func (e *Evidence) Acknowledged(what audit.Type, id, how string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	switch what {
	case audit.IncidentOpened, audit.GrantCreated:
		if e.made[id] > 0 {
			return
		}
	case audit.IncidentClosed, audit.GrantEnded:
		if e.over[id] > 0 {
			return
		}
	default:
		for state, t := range states {
			if state == what && e.leases[broker.LeaseID(id)] != nil {
				for _, s := range e.leases[broker.LeaseID(id)].steps {
					if s.state == t {
						return
					}
				}
			}
		}
	}
	e.acked[string(what)+" "+id] = how
}

// Pending is what was acknowledged before now and has not been told of. A look
// at the evidence that begins after it must tell of it.
func (e *Evidence) Pending() map[string]string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return maps.Clone(e.acked)
}

// Untold are those of what was pending that the evidence, read to its end
// since, does not tell of.
func (e *Evidence) Untold(pending map[string]string) (wrong []Violation) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for key, how := range pending {
		if _, still := e.acked[key]; still {
			what, id, _ := strings.Cut(key, " ")
			lease := broker.LeaseID("")
			if strings.HasPrefix(what, "lease.") {
				lease = broker.LeaseID(id)
			}
			wrong = append(wrong, violation(NoEvidence, lease, "no event %s tells of %s: %s", what, id, how))
			delete(e.acked, key) // told once
		}
	}
	return wrong
}

// Last is the sequence of the last event.
func (e *Evidence) Last() uint64 {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.next - 1
}

// Agrees compares the leases that the store said had not ended with the
// evidence up to an event that was there before the store was read, and up to
// one that was read after. all says that leases holds ended ones, too.
func (e *Evidence) Agrees(leases map[broker.LeaseID]broker.Lease, before, after uint64, all bool) (wrong []Violation) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for id, l := range leases {
		t := e.leases[id]
		if t == nil || t.steps[0].sequence > after {
			wrong = append(wrong, violation(NoEvidence, id, "lease %s is %s in the store, and the evidence does not tell of it", id, l.State))
			continue
		}
		state, from := t.at(before)
		_, to := t.at(after)
		agrees := state == l.State
		for _, s := range t.steps[from:to] {
			agrees = agrees || s.state == l.State
		}
		if !agrees {
			wrong = append(wrong, violation(NoEvidence, id, "lease %s is %s in the store, and the evidence says %q", id, l.State, state))
		}
	}
	for id, t := range e.leases {
		if _, listed := leases[id]; listed {
			continue
		}
		was, _ := t.at(before)
		is, _ := t.at(after)
		if was != "" && (all || !was.Ended() && !is.Ended()) {
			wrong = append(wrong, violation(Lost, id, "the evidence says that lease %s is %s, and the store does not list it", id, is))
		}
	}
	return wrong
}

// Totals are counts over the evidence.
type Totals struct {
	Events   uint64               `json:"events"`
	Intended int                  `json:"intended"` // leases that were begun
	Active   int                  `json:"active"`   // leases that were made
	Ended    map[broker.Cause]int `json:"ended_by_cause"`
	Cuts     []int                `json:"-"` // attempts to mint that were under way, as each start found and ended them
	Strays   int                  `json:"strays_removed"`
}

// Totals returns the counts so far.
func (e *Evidence) Totals() Totals {
	e.mu.Lock()
	defer e.mu.Unlock()
	return Totals{
		Events: e.next - 1, Intended: e.count[audit.LeaseIntended], Active: e.count[audit.LeaseActive],
		Ended: maps.Clone(e.ended), Cuts: slices.Clone(e.cuts), Strays: e.count[audit.StrayRemoved],
	}
}
