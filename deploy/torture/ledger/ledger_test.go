package ledger

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/audit"
)

var t0 = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func at(seconds float64) time.Time { return t0.Add(time.Duration(seconds * float64(time.Second))) }

func lease(id string, state broker.LeaseState) broker.Lease {
	l := broker.Lease{ID: broker.LeaseID(id), Tool: "crm.read", State: state, CreatedAt: at(-5), End: at(60)}
	switch {
	case state == broker.LeaseRevoking:
		l.End = at(-1)
	case state.Ended():
		l.End, l.EndedAt = at(-2), at(-1)
	}
	return l
}

func open(leases ...broker.Lease) map[broker.LeaseID]broker.Lease {
	m := map[broker.LeaseID]broker.Lease{}
	for _, l := range leases {
		m[l.ID] = l
	}
	return m
}

func kinds(wrong []Violation) string {
	var k []string
	for _, v := range wrong {
		k = append(k, string(v.Kind))
	}
	slices.Sort(k)
	return strings.Join(k, " ")
}

// TestLook plants each contradiction, and each thing that only looks like one.
func TestLook(t *testing.T) {
	minting, active, revoking := lease("m", broker.LeaseMinting), lease("a", broker.LeaseActive), lease("r", broker.LeaseRevoking)
	role := func(id string) Thing { return Thing{Name: "mf_x-" + id, Lease: broker.LeaseID(id)} }
	roleA := role("a")
	endedLater := lease("e", broker.LeaseRevoked)
	endedLater.EndedAt = at(0.1)
	pastEnd := lease("a", broker.LeaseActive)
	pastEnd.End = at(0.2)
	old := lease("r", broker.LeaseRevoking)
	old.End = at(-40)
	for _, c := range []struct {
		name          string
		before, after []broker.Lease
		ended         []broker.Lease // what Lookup knows besides
		roles, tokens []Thing
		away          bool
		excused       string
		outage        time.Time
		want          string
		unsettled     int
	}{
		{name: "nothing"},
		{name: "all in order", before: []broker.Lease{minting, active, revoking}, after: []broker.Lease{minting, active, revoking},
			roles: []Thing{role("m"), roleA, role("r")}, tokens: []Thing{role("m"), roleA, role("r")}, unsettled: 2},
		{name: "a role that no lease knows", roles: []Thing{role("x")}, want: "orphan"},
		{name: "a token that no lease knows", tokens: []Thing{role("x")}, want: "orphan"},
		{name: "a role of a lease that is revoked", ended: []broker.Lease{lease("e", broker.LeaseRevoked)}, roles: []Thing{role("e")}, want: "orphan"},
		{name: "a role of a lease that has expired", ended: []broker.Lease{lease("e", broker.LeaseExpired)}, roles: []Thing{role("e")}, want: "orphan"},
		{name: "a token of a lease that is revoked", ended: []broker.Lease{lease("e", broker.LeaseRevoked)}, tokens: []Thing{role("e")}, want: "orphan"},
		{name: "a role of a lease that ended while it was looked", ended: []broker.Lease{endedLater}, roles: []Thing{role("e")}},
		{name: "an active lease without a role", before: []broker.Lease{active}, after: []broker.Lease{active}, want: "missing"},
		{name: "one that became active while it was looked", before: []broker.Lease{lease("a", broker.LeaseMinting)}, after: []broker.Lease{active}},
		{name: "one that was made while it was looked", after: []broker.Lease{active}},
		{name: "one whose end has come and was not acted on yet", before: []broker.Lease{pastEnd}, after: []broker.Lease{pastEnd}},
		{name: "one whose request the network repeated", before: []broker.Lease{active}, after: []broker.Lease{active}, excused: "a"},
		{name: "one while PostgreSQL cannot be read", before: []broker.Lease{active}, after: []broker.Lease{active}, away: true},
		{name: "an active lease with two roles", before: []broker.Lease{active}, after: []broker.Lease{active}, roles: []Thing{roleA, role("a")}, want: "duplicate"},
		{name: "one that is revoking for too long", before: []broker.Lease{old}, after: []broker.Lease{old}, want: "over_bound"},
		{name: "one that is revoking since an outage", before: []broker.Lease{old}, after: []broker.Lease{old}, outage: at(-10)},
	} {
		t.Run(c.name, func(t *testing.T) {
			known := open(c.ended...)
			look := Look{
				Before: open(c.before...), After: open(c.after...), Began: at(0), Now: at(0.5),
				Lookup: func(id broker.LeaseID) (broker.Lease, bool, error) { l, ok := known[id]; return l, ok, nil },
				Roles:  c.roles, RolesRead: !c.away, Tokens: c.tokens, Bound: 30 * time.Second, OutageEnd: c.outage,
				Excused: func(id broker.LeaseID) bool { return string(id) == c.excused },
				Roled:   func(string) bool { return true },
			}
			count, wrong, err := look.Check()
			if err != nil {
				t.Fatal(err)
			}
			if got := kinds(wrong); got != c.want {
				t.Errorf("found %q and not %q: %v", got, c.want, wrong)
			}
			if count.Unsettled != c.unsettled {
				t.Errorf("%d unsettled roles and not %d", count.Unsettled, c.unsettled)
			}
		})
	}
}

// tell makes events "type lease grant incident cause" with growing sequences.
func tell(t *testing.T, e *Evidence, lines ...string) []Violation {
	t.Helper()
	var wrong []Violation
	for _, line := range lines {
		f := append(strings.Fields(line), "", "", "", "")
		seq := e.Last() + 1
		if rest, skips := strings.CutPrefix(f[0], "+"); skips {
			f[0], seq = rest, seq+1
		}
		wrong = append(wrong, e.Add(Event{Sequence: seq, Type: audit.Type(f[0]), Lease: broker.LeaseID(f[1]),
			Grant: broker.GrantID(f[2]), Incident: broker.IncidentID(f[3]), Cause: f[4]})...)
	}
	return wrong
}

func TestEvidenceOrder(t *testing.T) {
	for _, c := range []struct {
		name   string
		events []string
		want   string
	}{
		{"a life", []string{"lease.intended a", "lease.active a", "lease.revoking a", "lease.progressed a", "lease.revoked a"}, ""},
		{"an inert lease's", []string{"lease.active a", "lease.expired a"}, ""},
		{"one that was not made", []string{"lease.intended a", "lease.revoked a"}, ""},
		{"a gap", []string{"lease.intended a", "+lease.active a"}, "without_evidence"},
		{"active again", []string{"lease.intended a", "lease.active a", "lease.active a"}, "without_evidence"},
		{"dead without an end", []string{"lease.active a", "lease.revoked a"}, "without_evidence"},
		{"ended before it began", []string{"lease.revoking a"}, "without_evidence"},
		{"alive after its death", []string{"lease.intended a", "lease.revoked a", "lease.active a"}, "without_evidence"},
		{"active after the close", []string{"lease.intended a g i", "incident.closed - - i", "lease.active a g i"}, "delivered_late"},
		{"active after the withdrawal", []string{"lease.intended a g", "grant.ended - g", "lease.active a g"}, "delivered_late"},
		{"active beside another's close", []string{"lease.intended a g i", "incident.closed - - j", "lease.active a g i"}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			if wrong := tell(t, NewEvidence(), c.events...); kinds(wrong) != c.want {
				t.Errorf("found %v and not %q", wrong, c.want)
			}
		})
	}
}

func TestEvidenceAgrees(t *testing.T) {
	for _, c := range []struct {
		name   string
		before []string // events before the store was read
		during []string // events until after
		store  []broker.Lease
		all    bool
		want   string
	}{
		{name: "the same", before: []string{"lease.intended a"}, store: []broker.Lease{lease("a", broker.LeaseMinting)}},
		{name: "on its way", before: []string{"lease.intended a"}, during: []string{"lease.active a", "lease.revoking a"}, store: []broker.Lease{lease("a", broker.LeaseActive)}},
		{name: "made meanwhile", during: []string{"lease.intended a"}, store: []broker.Lease{lease("a", broker.LeaseMinting)}},
		{name: "ended meanwhile", before: []string{"lease.active a"}, during: []string{"lease.expired a"}},
		{name: "another state", before: []string{"lease.intended a"}, store: []broker.Lease{lease("a", broker.LeaseActive)}, want: "without_evidence"},
		{name: "no events", store: []broker.Lease{lease("a", broker.LeaseActive)}, want: "without_evidence"},
		{name: "not in the store", before: []string{"lease.intended a"}, want: "lost_acknowledged"},
		{name: "ended, and not listed", before: []string{"lease.intended a", "lease.revoked a"}},
		{name: "ended, and not there", before: []string{"lease.intended a", "lease.revoked a"}, all: true, want: "lost_acknowledged"},
	} {
		t.Run(c.name, func(t *testing.T) {
			e := NewEvidence()
			tell(t, e, c.before...)
			first := e.Last()
			tell(t, e, c.during...)
			if wrong := e.Agrees(open(c.store...), first, e.Last(), c.all); kinds(wrong) != c.want {
				t.Errorf("found %v and not %q", wrong, c.want)
			}
		})
	}
}

func TestEvidenceAcknowledged(t *testing.T) {
	e := NewEvidence()
	tell(t, e, "incident.opened - - i", "lease.intended a")
	e.Acknowledged(audit.IncidentOpened, "i", "told before")
	e.Acknowledged(audit.LeaseActive, "a", "delivered")
	e.Acknowledged(audit.IncidentClosed, "i", "closed")
	pending := e.Pending()
	tell(t, e, "lease.active a - i")
	wrong := e.Untold(pending)
	if len(wrong) != 1 || !strings.Contains(wrong[0].What, "incident.closed") {
		t.Errorf("found %v: only the close is missing", wrong)
	}
}

func TestCuts(t *testing.T) {
	e := NewEvidence()
	tell(t, e, "broker.started", "lease.intended a", "lease.intended b", "lease.active b",
		"lease.revoking a - - broker_restarted", "broker.started", "broker.started")
	if got := e.Totals().Cuts; !slices.Equal(got, []int{0, 1, 0}) {
		t.Errorf("the starts found %v attempts under way", got)
	}
}

func TestDeliveries(t *testing.T) {
	g := func(asked, got float64) Delivered {
		return Delivered{Lease: broker.Lease{ID: "a", Incident: "i", Grant: "g"}, User: "u", Asked: at(asked), Got: at(got)}
	}
	for _, c := range []struct {
		name string
		g    Delivered
		over float64
		want string
	}{
		{"before", g(0, 1), 2, ""},
		{"seen a moment later", g(0, 2.5), 2, ""},
		{"too late", g(0, 3.5), 2, "delivered_late"},
		{"asked for afterwards", g(2.1, 2.2), 2, "delivered_late"},
	} {
		for _, on := range []string{"i", "g"} {
			for _, first := range []bool{true, false} {
				d := NewDeliveries()
				var wrong []Violation
				if first {
					wrong = d.Add(c.g)
				}
				delivered, more := d.Over(on, at(c.over))
				if first && len(delivered) != 1 {
					t.Errorf("%s: %d deliveries are known", c.name, len(delivered))
				}
				wrong = append(wrong, more...)
				if !first {
					wrong = append(wrong, d.Add(c.g)...)
				}
				if kinds(wrong) != c.want {
					t.Errorf("%s (%s, %t): found %v and not %q", c.name, on, first, wrong, c.want)
				}
			}
		}
	}
}

func TestDisabled(t *testing.T) {
	agent := spiffeid.RequireFromString("spiffe://torture.test/agent/a")
	for _, c := range []struct {
		name       string
		asked, got float64
		want       string
	}{
		{"before", 0, 1, ""},
		{"while it is disabled", 3, 4, "delivered_late"},
		{"in flight at the reload, and too late", 1, 4, "delivered_late"},
		{"after it was enabled", 6, 7, ""},
		{"asked for meanwhile and given after it was enabled", 3, 7, ""},
	} {
		d := NewDeliveries()
		d.Disabled(agent.String(), at(2))
		d.Enabled(agent.String(), at(5))
		wrong := d.Add(Delivered{Lease: broker.Lease{ID: "a", Agent: agent}, Asked: at(c.asked), Got: at(c.got)})
		if kinds(wrong) != c.want {
			t.Errorf("%s: found %v and not %q", c.name, wrong, c.want)
		}
	}
}

func TestTwoSecrets(t *testing.T) {
	d := NewDeliveries()
	l := broker.Lease{ID: "a"}
	if wrong := append(d.Add(Delivered{Lease: l, User: "u"}), d.Add(Delivered{Lease: l, User: "u"})...); len(wrong) > 0 {
		t.Errorf("the same again is no violation: %v", wrong)
	}
	if wrong := d.Add(Delivered{Lease: l, User: "v"}); kinds(wrong) != "duplicate" {
		t.Errorf("found %v", wrong)
	}
}
