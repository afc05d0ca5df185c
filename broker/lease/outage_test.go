package lease_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/lease"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/providertest"
	"github.com/mayfly-security/mayfly/store"
)

// countingStore counts Updates.
type countingStore struct {
	store.Store
	updates atomic.Int64
}

func (s *countingStore) wrap(to store.Store) store.Store { s.Store = to; return s }

func (s *countingStore) Update(ctx context.Context, fn func(store.Txn) error) error {
	s.updates.Add(1)
	return s.Store.Update(ctx, fn)
}

// calls counts requests to a system and says, of each, what becomes of it.
type calls struct {
	mu   sync.Mutex
	of   map[providertest.Op]int
	away bool
}

func (c *calls) script(call providertest.Call) providertest.Fault {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.of == nil {
		c.of = map[providertest.Op]int{}
	}
	c.of[call.Op]++
	if c.away {
		return providertest.Fault{Effect: providertest.Away}
	}
	return providertest.Fault{}
}

func (c *calls) is(away bool) { c.mu.Lock(); defer c.mu.Unlock(); c.away = away }

// took returns the calls since the last time.
func (c *calls) took() (minting, ending int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	minting, ending = c.of[providertest.OpSession]+c.of[providertest.OpCreate], c.of[providertest.OpEnd]+c.of[providertest.OpStatus]
	clear(c.of)
	return minting, ending
}

// issueMany issues n leases at once.
func (r *rig) issueMany(tool string, n int, ttlOf func(i int) time.Duration) (leases []broker.Lease) {
	r.t.Helper()
	leases = make([]broker.Lease, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			d, err := r.issue(tool, ttl(ttlOf(i)))
			if err != nil {
				r.t.Error(err)
				return
			}
			leases[i] = d.Lease
		})
	}
	wg.Wait()
	return leases
}

// TestI3_Outage: a provider is away for ten minutes while 1,000 leases end.
// Each is dead soon after its return, none was given up, nobody else noticed,
// and what was overdue was said to be so at each instant.
func TestI3_Outage(t *testing.T) {
	for _, tool := range []string{"db.read", "vault.read"} {
		t.Run(tool, func(t *testing.T) {
			bubble(t, func(t *testing.T) { testOutage(t, tool) })
		})
	}
}

func testOutage(t *testing.T, tool string) {
	const byTTL, withdrawn = 700, 300
	counting, calls := &countingStore{}, &calls{}
	r := newRig(t, func(r *rig) { r.wrap = counting.wrap })
	r.world.SetScript(calls.script)
	r.grant(support, tool, 2*time.Hour)
	g := r.grant(other, tool, 2*time.Hour)
	r.grant(support, "cloud.read", 2*time.Hour)
	r.grant(support, "crm.read", 2*time.Hour)
	ends := map[broker.LeaseID]time.Time{}
	for _, l := range r.issueMany(tool, byTTL, func(i int) time.Duration { return time.Minute + time.Duration(i)*500*time.Millisecond }) {
		ends[l.ID] = l.End
	}
	var mine sync.WaitGroup
	for range withdrawn {
		mine.Go(func() {
			d, err := r.engine.Issue(context.Background(), as(other), lease.IssueRequest{Tool: tool})
			if err != nil {
				t.Error(err)
				return
			}
			d.Done()
		})
	}
	mine.Wait()
	synctest.Wait()
	calls.took()
	calls.is(true)
	began := time.Now()
	second := began
	tick := func(until time.Duration, check func()) {
		for ; time.Since(began) < until; time.Sleep(time.Until(second)) {
			second = second.Add(time.Second)
			_, err := r.issue(tool)
			r.wantReason(err, broker.ReasonProvider)
			if second.Sub(began)%(10*time.Second) == 0 {
				for _, well := range []string{"cloud.read", "crm.read"} {
					at := time.Now()
					d, err := r.issue(well)
					if err != nil || time.Since(at) > 0 {
						t.Fatalf("%s, of another provider, after %s: %v", well, time.Since(at), err)
					}
					if _, err := r.engine.RevokeLease(context.Background(), as(support), d.Lease.ID, ""); err != nil {
						t.Fatal(err)
					}
				}
				check()
			}
		}
	}
	overdue := func(more int) func() {
		return func() {
			t.Helper()
			now, want := time.Now(), more
			for _, end := range ends {
				if now.After(end) {
					want++
				}
			}
			// What the refused attempts left is dead, or settles within a moment.
			if c, err := r.engine.Counts(context.Background()); err != nil || c.Overdue < want || c.Overdue > want+20 {
				t.Errorf("after %s %d are said to be overdue, %v; want %d", time.Since(began), c.Overdue, err, want)
			}
		}
	}
	tick(5*time.Minute, overdue(0))
	if _, _, err := r.engine.WithdrawGrant(context.Background(), as(sam), g.ID, ""); err != nil {
		t.Fatal(err)
	}
	second = time.Now()
	tick(9*time.Minute, overdue(withdrawn))
	before := counting.updates.Load()
	tick(10*time.Minute, overdue(withdrawn))
	// In the last minute nothing ends. What is written is housekeeping, the
	// refusals and the other providers' leases.
	if n := counting.updates.Load() - before; n > 250 {
		t.Errorf("in a minute in which nothing ended %d transactions were made", n)
	}
	minting, ending := calls.took()
	t.Logf("while it was away, the provider was asked %d times to mint and %d times to end", minting, ending)
	if minting == 0 || minting > 120 || ending < 100 || ending > 700 {
		t.Errorf("while it was away, the provider was asked %d times to mint and %d times to end", minting, ending)
	}
	if n := len(r.keys("open|")); n < byTTL+withdrawn {
		t.Errorf("%d leases have not ended; want at least %d", n, byTTL+withdrawn)
	}

	for id := range ends { // it says nothing of the leases, and costs them nothing
		if n := r.attempts(id); n != 0 {
			t.Errorf("lease %s is said to have been tried %d times", id, n)
		}
	}
	calls.is(false)
	back := time.Now()
	for len(r.keys("open|")) > 0 && time.Since(back) < 2*time.Minute {
		time.Sleep(100 * time.Millisecond)
	}
	took := time.Since(back)
	_, ending = calls.took()
	t.Logf("all were confirmed dead %s after the return, with %d calls", took, ending)
	if took > time.Minute || len(r.world.Live()) != 0 {
		t.Errorf("after %s there are %d live credentials", took, len(r.world.Live()))
	}
	if ending > 300 {
		t.Errorf("%d calls ended %d leases", ending, byTTL+withdrawn)
	}
	for id := range ends {
		if l := r.lease(id); l.State != broker.LeaseExpired && l.State != broker.LeaseRevoked {
			t.Fatalf("lease %s is %s", id, l.State)
		}
	}
	for time.Since(back) < 20*time.Second {
		if _, err := r.issue(tool); err == nil {
			return
		}
		time.Sleep(time.Second)
	}
	t.Error("20s after the return nothing is given")
}

// attempts is how often the store says that a lease was tried in vain.
func (r *rig) attempts(id broker.LeaseID) int {
	r.t.Helper()
	var rec struct {
		R struct{ Attempts int } `json:"r"`
	}
	err := r.db.View(context.Background(), func(rd store.Reader) error {
		value, _, err := rd.Get("lease|" + string(id))
		return errors.Join(err, json.Unmarshal(value, &rec))
	})
	if err != nil {
		r.t.Fatal(err)
	}
	return rec.R.Attempts
}

// TestI3_PausesEndWithTheTrouble: leases that failed for a while are not left
// to their own long pauses when their provider ends leases again, whether it
// was away at last or not.
func TestI3_PausesEndWithTheTrouble(t *testing.T) {
	for name, away := range map[string]bool{"it fails": false, "it is away": true} {
		t.Run(name, func(t *testing.T) {
			eachOutside(t, func(t *testing.T, tool string) {
				r := newRig(t)
				g := r.grant(support, tool, 2*time.Hour)
				r.issueMany(tool, 50, func(int) time.Duration { return 15 * time.Minute })
				r.system(tool).SetScript(providertest.Rules(1, providertest.Rule{Fault: providertest.Fault{Effect: providertest.FailBefore}}))
				if _, _, err := r.engine.WithdrawGrant(context.Background(), as(sam), g.ID, ""); err != nil {
					t.Fatal(err)
				}
				time.Sleep(10 * time.Minute)
				if away {
					r.system(tool).SetScript(providertest.Rules(1, providertest.Rule{Fault: providertest.Fault{Effect: providertest.Away}}))
					time.Sleep(90 * time.Second) // until one is due, and finds out
				}
				r.system(tool).SetScript(nil)
				time.Sleep(20 * time.Second)
				if left := r.keys("open|"); len(left) != 0 {
					t.Errorf("twenty seconds after the return %d of 50 have not ended", len(left))
				}
			})
		})
	}
}

// hanging is a driver whose providers hang where they end leases of one tool,
// as a Vault does of which one database hangs. Those of other tools are ended.
type hanging struct {
	providers.Driver
	tool string
	on   *atomic.Bool
	deaf chan struct{} // if not nil: those calls wait for it, whatever their time limit
}

type hangingProvider struct {
	providers.Provider
	h hanging
}

type hangingPlanner struct {
	hangingProvider
	providers.Planner
}

func (h hanging) Open(ctx context.Context, config providers.Config) (providers.Provider, error) {
	p, err := h.Driver.Open(ctx, config)
	if err != nil {
		return nil, err
	}
	if planner, ok := p.(providers.Planner); ok {
		return hangingPlanner{hangingProvider{p, h}, planner}, nil
	}
	return hangingProvider{p, h}, nil
}

func (p hangingProvider) Revoke(ctx context.Context, endings []providers.Ending) []providers.Death {
	return p.ask(ctx, endings, p.Provider.Revoke)
}

func (p hangingProvider) Confirm(ctx context.Context, endings []providers.Ending) []providers.Death {
	return p.ask(ctx, endings, p.Provider.Confirm)
}

func (p hangingProvider) ask(ctx context.Context, endings []providers.Ending, call func(context.Context, []providers.Ending) []providers.Death) []providers.Death {
	deaths := make([]providers.Death, len(endings))
	var well []providers.Ending
	var at []int
	for i, e := range endings {
		if e.Tool == p.h.tool && p.h.on.Load() {
			deaths[i].Err = errors.New("the database does not answer")
			continue
		}
		well, at = append(well, e), append(at, i)
	}
	if len(well) > 0 {
		for n, d := range call(ctx, well) {
			deaths[at[n]] = d
		}
	}
	if len(well) < len(endings) {
		if p.h.deaf != nil {
			<-p.h.deaf
		}
		<-ctx.Done()
	}
	return deaths
}

// hang puts a hanging driver in the place of "world", with a second tool.
func (r *rig) hang(deaf chan struct{}) *atomic.Bool {
	r.t.Helper()
	r.stop()
	on := &atomic.Bool{}
	r.drivers["world"] = hanging{Driver: r.drivers["world"], tool: "db.hung", on: on, deaf: deaf}
	const tool = "  - name: db.read\n    provider: planned\n    description: reads\n    max_ttl: 15m\n    scope: {}\n"
	r.yaml = strings.Replace(r.yaml, tool, tool+strings.Replace(tool, "db.read", "db.hung", 1), 1)
	r.start()
	return on
}

// TestI3_OneDatabaseHangs: leases that time out again and again keep the others
// of their provider waiting no longer than it takes to notice, and are ended
// soon when they can be.
func TestI3_OneDatabaseHangs(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t)
		on := r.hang(nil)
		r.grant(support, "db.read", 2*time.Hour)
		g := r.grant(support, "db.hung", 2*time.Hour)
		const many = 400
		r.issueMany("db.hung", many, func(int) time.Duration { return 15 * time.Minute })
		on.Store(true)
		if _, _, err := r.engine.WithdrawGrant(context.Background(), as(sam), g.ID, ""); err != nil {
			t.Fatal(err)
		}
		time.Sleep(20 * time.Second) // four calls of five seconds at a time find out
		var longest time.Duration
		for range 300 {
			d := r.mustIssue("db.read")
			began := time.Now()
			l, err := r.engine.RevokeLease(context.Background(), as(support), d.Lease.ID, "")
			if err != nil {
				t.Fatal(err)
			}
			if took := time.Since(began); !l.State.Ended() {
				t.Errorf("after %s a lease of a database that is well is %s", took, l.State)
			} else {
				longest = max(longest, took)
			}
			time.Sleep(time.Second)
		}
		t.Logf("the longest wait beside %d leases that hang was %s", many, longest)
		if longest > time.Second {
			t.Errorf("the longest wait was %s", longest)
		}
		if n := len(r.keys("open|")); n != many {
			t.Errorf("%d have not ended; want %d", n, many)
		}
		on.Store(false)
		back := time.Now()
		for len(r.keys("open|")) > 0 && time.Since(back) < 5*time.Minute {
			time.Sleep(time.Second)
		}
		t.Logf("all were dead %s after the database answered again", time.Since(back))
		if took := time.Since(back); took > 30*time.Second {
			t.Errorf("they were dead %s after the database answered again", took)
		}
	})
}

// TestI3_ACallThatNeverReturns: it holds up neither other leases nor a stop,
// and its lease is ended by another call.
func TestI3_ACallThatNeverReturns(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t)
		deaf := make(chan struct{})
		on := r.hang(deaf)
		r.grant(support, "db.read", 2*time.Hour)
		r.grant(support, "db.hung", 2*time.Hour)
		on.Store(true)
		for i := range 40 {
			d := r.mustIssue("db.hung", ttl(time.Second))
			time.Sleep(5 * time.Second)
			if i == 20 {
				d := r.mustIssue("db.read")
				r.wantRevoked(d.Lease.ID)
			}
			if c, err := r.engine.Counts(context.Background()); err != nil || c.Overdue != i+1 {
				t.Fatalf("%d are overdue, %v; the last is %s", c.Overdue, err, d.Lease.ID)
			}
		}
		time.Sleep(10 * time.Minute)
		on.Store(false)
		began := time.Now()
		for len(r.keys("open|")) > 0 && time.Since(began) < 3*time.Minute {
			time.Sleep(time.Second)
		}
		t.Logf("they were dead %s after new calls were answered", time.Since(began))
		if n := len(r.keys("open|")); n > 0 {
			t.Errorf("%d have not ended", n)
		}
		on.Store(true)
		r.mustIssue("db.hung", ttl(time.Second))
		time.Sleep(5 * time.Second)
		began = time.Now()
		r.stop()
		if took := time.Since(began); took > 5*time.Second {
			t.Errorf("the stop took %s", took)
		}
		close(deaf)
		if log := string(r.logs.Bytes()); strings.Count(log, "left behind") < 2 {
			t.Error("the log does not tell of calls that were left behind")
		}
	})
}

// wantRevoked ends a lease and wants its death at once.
func (r *rig) wantRevoked(id broker.LeaseID) {
	r.t.Helper()
	if l, err := r.engine.RevokeLease(context.Background(), as(support), id, ""); err != nil || !l.State.Ended() {
		r.t.Errorf("the lease is %s, %v", l.State, err)
	}
}

// TestI5_ALateMintIsEnded: an attempt that goes on after its time is given up
// on. What it records is refused, what it makes is never delivered, its lease
// is overdue until it has come back, and what it made is ended then.
func TestI5_ALateMintIsEnded(t *testing.T) {
	eachOutside(t, func(t *testing.T, tool string) {
		r := newRig(t)
		r.grant(support, tool, time.Hour)
		op := providertest.OpCreate
		if tool == "vault.read" {
			op = providertest.OpSession // so that the handle comes late, too
		}
		r.system(tool).SetScript(providertest.Rules(1, providertest.Rule{Op: op, Times: 1, Fault: providertest.Fault{Deaf: 5 * time.Minute}}))
		began := time.Now()
		done := r.background(tool, ttl(time.Minute))
		r.wantReason(<-done, broker.ReasonProvider)
		if took := time.Since(began); took != 12*time.Second {
			t.Errorf("the caller waited %s; the limit is 10s and a little", took)
		}
		for range 4 {
			time.Sleep(time.Minute)
			l := r.onlyLease()
			c, err := r.engine.Counts(context.Background())
			if l.State != broker.LeaseRevoking || err != nil || c.Overdue != 1 {
				t.Errorf("after %s the lease is %s, and %d are overdue (%v)", time.Since(began), l.State, c.Overdue, err)
			}
		}
		time.Sleep(time.Minute)
		r.wantState(r.onlyLease().ID, broker.LeaseRevoked, 10*time.Second)
		if live := r.system(tool).Live(); len(live) != 0 {
			t.Errorf("left: %+v", live)
		}
		if n := len(r.system(tool).All()); tool == "vault.read" && n != 0 {
			t.Errorf("%d credentials were made although the record was refused", n)
		}
		r.mustIssue(tool)
	})
}

// TestBusy: a provider is asked for so many at a time; who comes then waits for
// a moment, and is refused if no place comes free. Others are not affected.
func TestBusy(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, func(r *rig) {
			r.yaml = strings.ReplaceAll(r.yaml, "{mode: planned, ", "{mode: planned, mint_concurrency: 4, ")
		})
		r.grant(support, "db.read", time.Hour)
		r.grant(support, "vault.read", time.Hour)
		r.world.SetScript(func(c providertest.Call) providertest.Fault {
			if c.Op != providertest.OpCreate {
				return providertest.Fault{}
			}
			return providertest.Fault{Delay: map[int]time.Duration{1: 3 * time.Second, 2: 8 * time.Second}[c.N]}
		})
		first := r.background("db.read")
		synctest.Wait()
		second := r.background("db.read")
		synctest.Wait()
		began := time.Now()
		_, err := r.issue("db.read")
		r.wantReason(err, broker.ReasonProvider)
		if took := time.Since(began); took != 2*time.Second || !strings.Contains(fmt.Sprint(err), "busy") {
			t.Errorf("after %s: %v", took, err)
		}
		if _, err := r.issue("db.read"); err != nil { // the first is done in a second
			t.Errorf("while one place is free: %v", err)
		}
		if _, err := r.issue("vault.read"); err != nil {
			t.Errorf("another provider: %v", err)
		}
		if err := errors.Join(<-first, <-second); err != nil {
			t.Error(err)
		}
	})
}

// TestI3_OverdueWhileItIsMade: a lease whose end comes while it is still being
// made is overdue.
func TestI3_OverdueWhileItIsMade(t *testing.T) {
	eachOutside(t, func(t *testing.T, tool string) {
		r := newRig(t)
		r.grant(support, tool, time.Hour)
		r.system(tool).SetScript(providertest.Rules(1, providertest.Rule{Op: providertest.OpCreate, Times: 1, Fault: providertest.Fault{Deaf: 9 * time.Second}}))
		done := r.background(tool, ttl(3*time.Second))
		time.Sleep(5 * time.Second)
		l := r.onlyLease()
		if c, err := r.engine.Counts(context.Background()); err != nil || c.Overdue != 1 || l.State != broker.LeaseMinting {
			t.Errorf("the lease is %s, and %d are overdue (%v)", l.State, c.Overdue, err)
		}
		if err := <-done; err == nil {
			t.Error("what is over was delivered")
		}
		time.Sleep(30 * time.Second)
		if l = r.lease(l.ID); !l.State.Ended() {
			t.Errorf("half a minute later the lease is %s", l.State)
		}
	})
}

// TestProviderMetrics: that a provider is away, and that it is back, shows.
func TestProviderMetrics(t *testing.T) {
	bubble(t, func(t *testing.T) {
		reg := prometheus.NewRegistry()
		r := newRig(t, func(r *rig) { r.tune = func(c *lease.Config) { c.Metrics = reg } })
		r.grant(support, "db.read", time.Hour)
		d := r.mustIssue("db.read")
		value := func(metric, provider string) float64 {
			t.Helper()
			families, err := reg.Gather()
			if err != nil {
				t.Fatal(err)
			}
			for _, f := range families {
				for _, m := range f.GetMetric() {
					if f.GetName() == metric && len(m.GetLabel()) == 1 && m.GetLabel()[0].GetValue() == provider {
						return m.GetGauge().GetValue()
					}
				}
			}
			t.Fatalf("there is no %s of %s", metric, provider)
			return 0
		}
		want := func(when string, up, open float64) {
			t.Helper()
			for _, provider := range []string{"planned", "recorded"} {
				if provider == "recorded" {
					up, open = 1, 0
				}
				if got := value("mayfly_provider_up", provider); got != up {
					t.Errorf("%s %s is up: %v", when, provider, got)
				}
				if got := value("mayfly_provider_breaker_open", provider); got != open {
					t.Errorf("%s the breaker of %s is open: %v", when, provider, got)
				}
			}
		}
		want("at first", 1, 0)
		r.world.SetScript(providertest.Rules(1, providertest.Rule{Fault: providertest.Fault{Effect: providertest.Away}}))
		if _, err := r.engine.RevokeLease(context.Background(), as(sam), d.Lease.ID, ""); err != nil {
			t.Fatal(err)
		}
		want("when it ends nothing", 0, 0)
		_, err := r.issue("db.read")
		r.wantReason(err, broker.ReasonProvider)
		want("when it is away", 0, 1)
		r.world.SetScript(nil)
		r.wantState(d.Lease.ID, broker.LeaseRevoked, 10*time.Second)
		r.mustIssue("db.read") // it ends leases, and so is tried at once
		want("when it is back", 1, 0)
		if n := value("mayfly_mints_in_flight", "planned"); n != 0 {
			t.Errorf("%v mints are under way", n)
		}
	})
}
