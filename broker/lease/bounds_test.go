package lease_test

import (
	"context"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/audit"
	"github.com/mayfly-security/mayfly/broker/lease"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/store"
)

// TestPaceOfRefusals: what is refused takes nothing of a caller's pace,
// whatever it is refused for.
func TestPaceOfRefusals(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, limited("max_leases: 1"), limited("max_per_hour: 4"))
		r.grant(support, "db.read", time.Hour)
		r.grant(support, "crm.read", time.Hour)
		d := r.mustIssue("db.read")
		for range 5 {
			for _, tool := range []string{"db.read", "crm.read"} {
				_, err := r.issue(tool)
				r.wantReason(err, broker.ReasonLeaseLimit)
			}
		}
		for _, tool := range []string{"crm.read", "db.read"} {
			if _, err := r.engine.RevokeLease(bg, as(support), d.Lease.ID, ""); err != nil {
				t.Fatal(err)
			}
			r.wantState(d.Lease.ID, broker.LeaseRevoked, time.Minute)
			d = r.mustIssue(tool)
		}
		if _, err := r.engine.RevokeLease(bg, as(support), d.Lease.ID, ""); err != nil {
			t.Fatal(err)
		}
		r.wantState(d.Lease.ID, broker.LeaseRevoked, time.Minute)
		// An attempt that the provider came to nothing with is in the store and in
		// the evidence, and counts.
		r.world.SetScript(away)
		if _, err := r.issue("db.read"); err == nil {
			t.Fatal("a provider that is away made something")
		}
		r.world.SetScript(nil)
		_, err := r.issue("crm.read")
		r.wantReason(err, broker.ReasonRateLimited)
	})
}

// TestPaceOfWebhooks: an incident system that tells the same again and again
// opens one incident, and takes no more of its pace than for one.
func TestPaceOfWebhooks(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, func(r *rig) {
			r.yaml = strings.Replace(r.yaml, "max_open: 1000\n    max_per_hour: 1000000", "max_open: 1000\n    max_per_hour: 2", 1)
		})
		open := func(key string) (broker.Incident, error) {
			return r.engine.OpenIncident(bg, as(pager), lease.IncidentRequest{Title: "it broke", Agents: []spiffeid.ID{support}, Tools: []string{"db.read"}, Key: key})
		}
		a, err := open("a")
		if err != nil {
			t.Fatal(err)
		}
		again := func() {
			t.Helper()
			for range 5 {
				if in, err := open("a"); err != nil || in.ID != a.ID {
					t.Fatalf("%s, %v; want %s again", in.ID, err, a.ID)
				}
			}
		}
		again()
		if _, err := open("b"); err != nil {
			t.Fatal(err)
		}
		_, err = open("c")
		r.wantReason(err, broker.ReasonRateLimited)
		again() // also by whom nothing new is opened for
	})
}

// TestPaceOfReplays: the same is given again as often as something new, and
// neither costs the other anything. Each time is evidence.
func TestPaceOfReplays(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, limited("max_per_hour: 12"))
		r.grant(support, "crm.read", time.Hour)
		d := r.mustIssue("crm.read", key("k"))
		for range 12 {
			r.mustIssue("crm.read", key("k"))
		}
		for range 3 {
			_, err := r.issue("crm.read", key("k"))
			r.wantReason(err, broker.ReasonRateLimited)
		}
		for range 11 {
			r.mustIssue("crm.read")
		}
		_, err := r.issue("crm.read")
		r.wantReason(err, broker.ReasonRateLimited)
		time.Sleep(5*time.Minute + time.Second)
		if again := r.mustIssue("crm.read", key("k")); again.Lease.ID != d.Lease.ID {
			t.Errorf("%s; want %s", again.Lease.ID, d.Lease.ID)
		}
		if n := len(r.events(lease.EventFilter{Type: audit.LeaseReplayed})); n != 13 {
			t.Errorf("%d replays are in the evidence; want 13", n)
		}
	})
}

// TestKeyOfWhatIsForgotten: a key that made something of which no record is
// left is refused, and answers with nothing empty.
func TestKeyOfWhatIsForgotten(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := governedRig(t, func(r *rig) { r.tune = func(c *lease.Config) { c.Retention = time.Hour } })
		short := 10 * time.Minute
		all := map[string]func() (string, error){
			"a grant": func() (string, error) {
				g, err := r.engine.CreateGrant(bg, as(sam), lease.GrantRequest{Agent: support, Tool: "crm.read", For: short, Reason: "x", Key: "g"})
				return string(g.ID), err
			},
			"an incident": func() (string, error) {
				in, err := r.engine.OpenIncident(bg, as(pager), lease.IncidentRequest{Title: "x", Agents: []spiffeid.ID{support}, Tools: []string{"docs.search"}, Duration: &short, Key: "i"})
				return string(in.ID), err
			},
			"a request": func() (string, error) {
				v, err := r.ask("docs.search", func(q *lease.AccessRequest) { q.Key, q.Duration = "q", &short })
				return string(v.ID), err
			},
		}
		was := map[string]string{}
		for what, do := range all {
			id, err := do()
			if err != nil || id == "" {
				t.Fatalf("%s: %q, %v", what, id, err)
			}
			was[what] = id
		}
		time.Sleep(40 * time.Minute)
		for what, do := range all {
			if id, err := do(); err != nil || id != was[what] {
				t.Errorf("%s, while there is a record: %q, %v; want %q", what, id, err, was[what])
			}
		}
		time.Sleep(4 * time.Hour)
		if left := append(append(r.keys("grant|"), r.keys("incident|")...), r.keys("request|")...); len(left) != 0 {
			t.Fatalf("left: %q", left)
		}
		for what, do := range all {
			id, err := do()
			r.wantReason(err, broker.ReasonConflict)
			if id != "" || err != nil && !strings.Contains(err.Error(), "forgotten") {
				t.Errorf("%s: %q, %v", what, id, err)
			}
		}
	})
}

// TestARequestIsKeptWithItsGrant: what says who asked for a grant and why stays
// for as long as there is the grant.
func TestARequestIsKeptWithItsGrant(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := governedRig(t, func(r *rig) {
			r.tune = func(c *lease.Config) { c.Retention = time.Hour }
			r.yaml = strings.Replace(r.yaml, "max_duration: 1h\n    expires: 10m", "max_duration: 12h\n    expires: 10m", 1)
		})
		long := r.mustApprove(r.mustAsk("crm.read", lasting(10*time.Hour)), person("fay", "finance"))
		gone := r.mustApprove(r.mustAsk("crm.read", lasting(10*time.Hour)), person("fay", "finance"))
		if _, _, err := r.engine.WithdrawGrant(bg, as(sam), gone.Grant, ""); err != nil {
			t.Fatal(err)
		}
		time.Sleep(3 * time.Hour)
		_, err := r.engine.Request(bg, as(support), gone.ID)
		r.wantReason(err, broker.ReasonNotFound)
		time.Sleep(6*time.Hour + 30*time.Minute)
		if v := r.request(long.ID); v.Grant != long.Grant {
			t.Errorf("%+v", v)
		}
		if left := r.keys("ended|"); len(left) != 1 {
			t.Errorf("%q", left)
		}
		time.Sleep(3 * time.Hour)
		if left := append(append(r.keys("grant|"), r.keys("request")...), r.keys("ended|")...); len(left) != 0 {
			t.Errorf("left: %q", left)
		}
	})
}

// TestAnIncidentIsKeptWhileItIsSwept: the sweep goes by the incident's grants.
func TestAnIncidentIsKeptWhileItIsSwept(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, func(r *rig) { r.tune = func(c *lease.Config) { c.Retention = time.Hour } })
		in := r.open(30*time.Minute, "db.read")
		if _, _, err := r.engine.CloseIncident(bg, as(pager), in.ID, ""); err != nil {
			t.Fatal(err)
		}
		r.stop()
		time.Sleep(3 * time.Hour)
		r.openStore()
		sweep := func(t store.Txn) error {
			return t.Put("sweep|incident|"+string(in.ID), []byte(`{"v":1,"r":{"Cause":"incident_closed","Actor":"x"}}`))
		}
		if err := r.db.Update(bg, sweep); err != nil {
			t.Fatal(err)
		}
		met := make(chan bool, 1)
		if err := r.db.Close(); err != nil {
			t.Fatal(err)
		}
		r.wrap = func(s store.Store) store.Store { return &sweptLast{Store: s, id: string(in.ID), met: met} }
		r.start()
		time.Sleep(time.Minute)
		select {
		case kept := <-met:
			if !kept {
				t.Error("the incident was forgotten before its sweep was over")
			}
		default:
			t.Fatal("nothing was retired")
		}
		time.Sleep(2 * time.Hour)
		if left := append(r.keys("incident|"), r.keys("ended|")...); len(left) != 0 {
			t.Errorf("left: %q", left)
		}
	})
}

// sweptLast is a store in which the sweep of an incident is still there when
// the incident is first looked at to be retired.
type sweptLast struct {
	store.Store
	id  string
	met chan bool
}

func (s *sweptLast) Update(ctx context.Context, fn func(store.Txn) error) error {
	return s.Store.Update(ctx, func(t store.Txn) error { return fn(sweptLastTxn{t, s}) })
}

type sweptLastTxn struct {
	store.Txn
	s *sweptLast
}

// Get shows the sweep to whoever asks for it the first time.
func (t sweptLastTxn) Get(key string) ([]byte, bool, error) {
	if key == "sweep|incident|"+t.s.id {
		select {
		case t.s.met <- true:
			return []byte("x"), true, nil
		default:
		}
	}
	return t.Txn.Get(key)
}

func (t sweptLastTxn) Delete(key string) error {
	if key == "incident|"+t.s.id {
		select {
		case t.s.met <- false: // without having asked
		default:
		}
	}
	return t.Txn.Delete(key)
}

// tardyStore is a store of which each commit takes its time.
type tardyStore struct {
	store.Store
	pause atomic.Int64
}

func (s *tardyStore) Update(ctx context.Context, fn func(store.Txn) error) error {
	time.Sleep(time.Duration(s.pause.Load()))
	return s.Store.Update(ctx, fn)
}

// TestRetiringKeepsNothingWaiting: what must end does not wait for very much
// that is only to be forgotten.
func TestRetiringKeepsNothingWaiting(t *testing.T) {
	bubble(t, func(t *testing.T) {
		slow := &tardyStore{}
		r := newRig(t, func(r *rig) {
			r.tune = func(c *lease.Config) { c.Retention = time.Hour }
			r.wrap = func(s store.Store) store.Store { slow.Store = s; return slow }
		})
		g := r.grant(support, "db.read", time.Minute)
		time.Sleep(40 * time.Second)
		slow.pause.Store(int64(time.Second))
		const old = 3000 // 125 commits to forget them
		for i := 0; i < old; i += 100 {
			err := slow.Store.Update(bg, func(t store.Txn) error {
				for j := range 100 {
					if err := t.Put(fmt.Sprintf("ended|%016x|request|r%06d", time.Now().Add(-2*time.Hour).UnixNano(), i+j), nil); err != nil {
						return err
					}
				}
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(time.Until(g.NotAfter) + 30*time.Second)
		if n := len(r.events(lease.EventFilter{Grant: g.ID, Type: audit.GrantEnded})); n != 1 {
			t.Errorf("the grant's end is in the evidence %d times, half a minute later", n)
		}
		slow.pause.Store(0)
		time.Sleep(time.Minute)
		if left := r.keys("ended|"); len(left) != 1 {
			t.Errorf("%d are left", len(left))
		}
	})
}

// answering is a driver that tells when its provider has ended something, and
// in whose provider what ends a lease stands.
type answering struct {
	providers.Driver
	answered func()
}

func (d answering) Open(ctx context.Context, config providers.Config) (providers.Provider, error) {
	p, err := d.Driver.Open(ctx, config)
	if planner, ok := p.(providers.Planner); ok {
		return answers{stands{p, planner}, d.answered}, err
	}
	return p, err
}

type answers struct {
	stands
	answered func()
}

func (a answers) Revoke(ctx context.Context, endings []providers.Ending) []providers.Death {
	defer a.answered()
	return a.stands.Revoke(ctx, endings)
}

// TestToldOfManyAtOnce: a store that can be written again is told of all that
// was ended without it, however much there is to tell of each.
func TestToldOfManyAtOnce(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r, faulty := newFaultyRig(t)
		r.stop()
		r.drivers["world"] = answering{r.drivers["world"], func() { faulty.failAll(false) }}
		r.start()
		g := r.grant(support, "db.read", time.Hour)
		for range 30 {
			r.mustIssue("db.read")
		}
		faulty.failAll(true)
		_, _, err := r.engine.WithdrawGrant(bg, as(sam), g.ID, "")
		r.wantReason(err, broker.ReasonStore)
		time.Sleep(10 * time.Second)
		if left := append(r.keys("due|"), r.keys("held|")...); len(left) != 0 {
			t.Errorf("left: %q", left)
		}
		if strings.Contains(string(r.logs.Bytes()), store.ErrLimit.Error()) {
			t.Error("a transaction was too large")
		}
	})
}
