package lease_test

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"testing/synctest"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/audit"
	"github.com/mayfly-security/mayfly/store"
)

func earliest(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}

// storedLease is what the model reads of a lease's record.
type storedLease struct {
	broker.Lease
	Due    time.Time
	Key    string
	Refund bool
}

// spent reports whether the lease has a use of its grant.
func (l *storedLease) spent() bool { return !l.Refund || !l.State.Ended() }

// world is what the store says.
type world struct {
	grants    []*broker.Grant // in the order of their making
	incidents []*broker.Incident
	leases    map[broker.LeaseID]*storedLease
	keys      map[string]broker.LeaseID // idempotency keys of leases, as they stand in the store
	index     map[string]string         // the indexes
	openers   map[string]int
	events    []audit.Event
	loads     uint64 // the catalog's generation
}

func (w world) incident(id broker.IncidentID) broker.Incident {
	for _, in := range w.incidents {
		if in.ID == id {
			return *in
		}
	}
	return broker.Incident{}
}

func (w world) uses(id broker.GrantID) (n int) {
	for _, l := range w.leases {
		if l.Grant == id && l.spent() {
			n++
		}
	}
	return n
}

// holds reports whether everything that a lease of the grant lives on stands.
func (w world) holds(m *model, g *broker.Grant, now time.Time) bool {
	if m.refuses(g.Agent) != "" || m.suspended(g) || g.State != broker.GrantOpen || !now.Before(g.NotAfter) {
		return false
	}
	in := w.incident(g.Incident)
	return g.Incident == "" || in.State == broker.IncidentOpen && now.Before(in.EndsAt)
}

func (w world) grant(id broker.GrantID) *broker.Grant {
	i := slices.IndexFunc(w.grants, func(g *broker.Grant) bool { return g.ID == id })
	if i < 0 {
		return &broker.Grant{}
	}
	return w.grants[i]
}

func (w world) usable(m *model, l *storedLease, now time.Time) bool {
	return l.State == broker.LeaseActive && now.Before(l.End) && w.holds(m, w.grant(l.Grant), now)
}

// read reads the whole store.
func (m *model) read() world {
	w := world{}
	err := m.store.Store.View(context.Background(), func(r store.Reader) error {
		w = world{leases: map[broker.LeaseID]*storedLease{}, keys: map[string]broker.LeaseID{}, index: map[string]string{}, openers: map[string]int{}}
		grants, incidents := map[broker.GrantID]*broker.Grant{}, map[broker.IncidentID]*broker.Incident{}
		for entry, err := range r.Scan("", "") {
			if err != nil {
				return err
			}
			kind, rest, _ := strings.Cut(entry.Key, "|")
			switch kind {
			case "lease":
				w.leases[broker.LeaseID(rest)] = record[storedLease](m, entry)
			case "grant":
				grants[broker.GrantID(rest)] = record[broker.Grant](m, entry)
			case "incident":
				incidents[broker.IncidentID(rest)] = record[broker.Incident](m, entry)
			case "idem":
				w.keys[entry.Key] = record[struct{ ID broker.LeaseID }](m, entry).ID
			case "opener":
				if n := *record[int](m, entry); n != 0 {
					w.openers[rest] = n
				}
			case "held":
				w.index[entry.Key] = fmt.Sprint(*record[int](m, entry))
			case "meta":
				if rest == "catalog" {
					w.loads = record[struct{ Generation uint64 }](m, entry).Generation
				}
			case "house":
				// its own business, until the end
				if strings.Contains(entry.Key, "|lease|") {
					continue
				}
				w.index[entry.Key] = ""
			default:
				w.index[entry.Key] = string(entry.Value)
			}
		}
		for entry, err := range r.Log(audit.Log, 0) {
			if err != nil {
				return err
			}
			ev, err := audit.Decode(entry.Seq, entry.Value)
			if err != nil {
				return err
			}
			w.events = append(w.events, ev)
			if g := grants[ev.Grant]; ev.Type == audit.GrantCreated && g != nil {
				w.grants = append(w.grants, g)
				delete(grants, ev.Grant)
			}
			if in := incidents[ev.Incident]; ev.Type == audit.IncidentOpened && in != nil {
				w.incidents = append(w.incidents, in)
				delete(incidents, ev.Incident)
			}
		}
		if len(grants)+len(incidents) > 0 {
			m.t.Errorf("in the store and not in the evidence: %v %v", slices.Collect(maps.Keys(grants)), slices.Collect(maps.Keys(incidents)))
		}
		return nil
	})
	if err != nil {
		m.t.Fatalf("reading the store: %v", err)
	}
	return w
}

func record[T any](m *model, e store.Entry) *T {
	var r struct{ R T }
	if err := json.Unmarshal(e.Value, &r); err != nil {
		m.t.Fatalf("reading %s: %v", e.Key, err)
	}
	return &r.R
}

func (m *model) delivered() []*given {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.given)
}

// check compares the store, the outside systems and the model.
func (m *model) check(w world) {
	now := time.Now()
	for _, c := range slices.Concat(m.r.world.Live(), m.r.asked.Live()) {
		switch l := w.leases[c.Lease()]; {
		case l == nil:
			m.t.Errorf("I1: a credential of lease %s works, and the store knows of no such lease", c.Lease())
		case l.State.Ended():
			m.t.Errorf("I4: lease %s (%s) is said to be %s, and a credential of it works", l.ID, l.Tool, l.State)
		}
	}
	keys := map[string]broker.LeaseID{}
	for _, l := range w.leases {
		m.checkLease(l, w, now)
		if l.Key == "" {
			continue
		}
		key := l.Agent.String() + "|" + l.Key
		if twice := keys[key]; twice != "" {
			m.t.Errorf("key %s made two leases: %s and %s", key, twice, l.ID)
		}
		keys[key] = l.ID
	}
	m.checkGrants(w)
	m.checkIndex(w)
	m.checkEvidence(w)
}

func (m *model) checkLease(l *storedLease, w world, now time.Time) {
	const slack = time.Minute // for what is in trouble at the provider
	g := w.grant(l.Grant)
	if l.State == broker.LeaseActive {
		if !w.holds(m, g, earliest(now, l.End.Add(-1))) { // that its time is over is looked at below
			m.t.Errorf("I5: lease %s (%s) is active, and its grant does not hold: %+v", l.ID, l.Tool, g)
		}
		if late := min(now.Sub(l.End), now.Sub(m.began)); late > slack {
			m.t.Errorf("I3: lease %s (%s) is still active %s after its end", l.ID, l.Tool, late)
		}
	}
	if l.State == broker.LeaseExpired && (l.DiesAt.IsZero() || l.EndedAt.Before(l.DiesAt)) {
		m.t.Errorf("I4: lease %s (%s) is said to be expired at %s, and dies at %s", l.ID, l.Tool, l.EndedAt, l.DiesAt)
	}
	if l.State == broker.LeaseRevoked && l.Survives != "" {
		m.t.Errorf("I4: lease %s (%s) is said to be revoked, and %q", l.ID, l.Tool, l.Survives)
	}
	_, usable, err := m.r.engine.Usable(context.Background(), l.ID)
	if want := w.usable(m, l, now); err != nil || usable != want {
		m.t.Errorf("lease %s (%s, %s): Usable = %v, %v; want %v", l.ID, l.Tool, l.State, usable, err, want)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	i := slices.IndexFunc(m.given, func(g *given) bool { return g.lease.ID == l.ID })
	if i < 0 {
		return
	}
	mine := m.given[i]
	if l.ActiveAt.IsZero() {
		m.t.Errorf("I2: lease %s (%s) was delivered, and the store does not know it", l.ID, l.Tool)
	}
	if l.Refund {
		m.t.Errorf("lease %s (%s) was delivered, and its use is given back", l.ID, l.Tool)
	}
	if want := now.Before(l.End) && !mine.over && w.holds(m, g, now); !mine.unsure && usable != want && (want || mine.over) {
		m.t.Errorf("lease %s (%s, %s, %s), which was delivered: Usable = %v; want %v", l.ID, l.Tool, l.State, l.Cause, usable, want)
	}
}

func (m *model) checkGrants(w world) {
	open := map[string]int{}
	for _, in := range w.incidents {
		if in.State == broker.IncidentOpen {
			open[in.OpenedBy.String()]++
		}
	}
	if !maps.Equal(open, w.openers) {
		m.t.Errorf("open incidents are counted as %v; there are %v", w.openers, open)
	}
	for _, g := range w.grants {
		if g.State == broker.GrantOpen && g.Incident != "" && w.incident(g.Incident).State != broker.IncidentOpen {
			m.t.Errorf("grant %s is open, and its incident is closed", g.ID)
		}
		want := 0
		if g.MaxUses > 0 {
			want = w.uses(g.ID)
		}
		if g.Uses != want || g.Uses > g.MaxUses {
			m.t.Errorf("grant %s has %d of %d uses; its leases have %d", g.ID, g.Uses, g.MaxUses, want)
		}
		kept := 0
		for _, d := range m.delivered() {
			if d.lease.Grant == g.ID {
				kept++
			}
		}
		if g.MaxUses > 0 && kept > g.MaxUses {
			m.t.Errorf("grant %s allows %d uses, and %d were delivered", g.ID, g.MaxUses, kept)
		}
	}
}

// checkIndex compares the indexes with the records.
func (m *model) checkIndex(w world) {
	stamp := func(t time.Time) string { return fmt.Sprintf("%016x", t.UnixNano()) }
	want := map[string]string{}
	for id, l := range w.leases {
		want["leases|"+l.Agent.String()+"|"+string(id)] = ""
		if l.State.Ended() {
			continue
		}
		want["open|"+string(l.Grant)+"|"+string(id)] = ""
		// Counted by state without reading the lease.
		want["due|"+l.Provider+"|"+stamp(l.Due)+"|"+string(id)] = string(l.State)
		if l.State == broker.LeaseRevoking {
			want["revoking|"+stamp(l.End)+"|"+string(id)] = ""
		}
	}
	held := map[string]int{}
	for _, l := range w.leases {
		if !l.State.Ended() {
			held["held|"+l.Agent.String()]++
		}
	}
	for key, n := range held {
		want[key] = fmt.Sprint(n)
	}
	for _, g := range w.grants {
		if g.State == broker.GrantOpen {
			want["grants|"+g.Agent.String()+"|"+g.Tool+"|"+string(g.ID)] = ""
		} else {
			want["ended|"+stamp(g.EndedAt)+"|grant|"+string(g.ID)] = ""
		}
	}
	for _, in := range w.incidents {
		if in.State != broker.IncidentOpen {
			want["ended|"+stamp(in.ClosedAt)+"|incident|"+string(in.ID)] = ""
		}
	}
	for key, value := range w.index {
		if strings.HasPrefix(key, "house|") || strings.HasPrefix(key, "ended|") && strings.Contains(key, "|key|") {
			continue
		}
		if v, ok := want[key]; !ok || v != value && !strings.HasPrefix(key, "revoking|") {
			m.t.Errorf("in the index, and should not be: %s = %q", key, value)
		}
	}
	for key := range want {
		if _, ok := w.index[key]; !ok {
			m.t.Errorf("not in the index: %s", key)
		}
	}
}

// The evidence of one lease's life, a letter an event.
var (
	letters = map[audit.Type]string{audit.LeaseIntended: "I", audit.LeaseActive: "A", audit.LeaseRevoking: "R",
		audit.LeaseProgressed: "P", audit.LeaseRevoked: "D", audit.LeaseExpired: "X", audit.LeaseReplayed: ""}
	lifeOutside = regexp.MustCompile(`^I(D|A?(X|RP*[DX]?)?)$`)
	lifeInert   = regexp.MustCompile(`^A(X|RP*[DX]?)?$`)
)

// checkEvidence compares the evidence with the records: each change has its
// event, in an order that a life allows.
func (m *model) checkEvidence(w world) {
	lives, made, ended := map[broker.LeaseID]string{}, map[broker.GrantID]int{}, map[broker.GrantID]int{}
	opened, closed := map[broker.IncidentID]int{}, map[broker.IncidentID]int{}
	loads := uint64(0)
	for _, ev := range w.events {
		switch ev.Type {
		case audit.GrantCreated:
			made[ev.Grant]++
		case audit.GrantEnded:
			ended[ev.Grant]++
		case audit.IncidentOpened:
			opened[ev.Incident]++
		case audit.IncidentClosed:
			closed[ev.Incident]++
		case audit.CatalogLoaded:
			loads++
		default:
			if letter, ok := letters[ev.Type]; ok {
				lives[ev.Lease] += letter
			}
		}
	}
	if loads != w.loads || loads < uint64(m.loads) {
		m.t.Errorf("%d loads are in the evidence, the store counts %d, and %d have returned", loads, w.loads, m.loads)
	}
	for id, life := range lives {
		l := w.leases[id]
		if l == nil {
			m.t.Errorf("the evidence tells %s of lease %s, which is nowhere", life, id)
			continue
		}
		form := lifeInert
		if slices.Contains(outsideTools, l.Tool) {
			form = lifeOutside
		}
		last := map[broker.LeaseState]string{broker.LeaseMinting: "I", broker.LeaseActive: "A", broker.LeaseRevoking: "RP", broker.LeaseRevoked: "D", broker.LeaseExpired: "X"}[l.State]
		if !form.MatchString(life) || !strings.Contains(last, life[len(life)-1:]) || l.ActiveAt.IsZero() == strings.Contains(life, "A") {
			m.t.Errorf("the evidence of lease %s (%s, %s) is %s", id, l.Tool, l.State, life)
		}
	}
	for id := range w.leases {
		if lives[id] == "" {
			m.t.Errorf("lease %s is not in the evidence", id)
		}
	}
	for _, g := range w.grants {
		if over := g.State != broker.GrantOpen; made[g.ID] != 1 || ended[g.ID] > 1 || over != (ended[g.ID] == 1) {
			m.t.Errorf("grant %s is %s, and in the evidence made %d times and ended %d times", g.ID, g.State, made[g.ID], ended[g.ID])
		}
	}
	for _, in := range w.incidents {
		if over := in.State != broker.IncidentOpen; opened[in.ID] != 1 || closed[in.ID] > 1 || over != (closed[in.ID] == 1) {
			m.t.Errorf("incident %s is %s, and in the evidence opened %d times and closed %d times", in.ID, in.State, opened[in.ID], closed[in.ID])
		}
	}
}

// finish lets the providers work again and the time of everything run out:
// nothing may be left.
func (m *model) finish() {
	m.store.arm(0, false)
	m.mu.Lock()
	m.ends = nil
	m.mu.Unlock()
	time.Sleep(15 * time.Minute)
	m.under.Wait()
	synctest.Wait()
	w := m.read()
	m.check(w)
	for _, l := range w.leases {
		if !l.State.Ended() {
			m.t.Errorf("I3: in the end lease %s (%s) is %s", l.ID, l.Tool, l.State)
		}
	}
	if live := slices.Concat(m.r.world.Live(), m.r.asked.Live()); len(live) > 0 {
		m.t.Errorf("in the end these work: %+v", live)
	}
	for key := range w.index {
		if !strings.HasPrefix(key, "leases|") && !strings.HasPrefix(key, "ended|") {
			m.t.Errorf("in the end there is %s", key)
		}
	}
	counts, err := m.r.engine.Counts(context.Background())
	if err != nil || counts.Overdue != 0 {
		m.t.Errorf("in the end: Counts = %+v, %v", counts, err)
	}
	for state, n := range counts.ByState {
		if n != 0 {
			m.t.Errorf("in the end %d leases are %s", n, state)
		}
	}
}
