package lease_test

import (
	"context"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/lease"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/providertest"
	"github.com/mayfly-security/mayfly/store"
)

// hooks change what providers of a driver do. A nil hook changes nothing.
type hooks struct {
	mint   func(ctx context.Context, req providers.MintRequest, mint func() (providers.Minted, error)) (providers.Minted, error)
	revoke func(endings []providers.Ending, revoke func() []providers.Death) []providers.Death
	// confirm is as revoke.
	confirm func(endings []providers.Ending, confirm func() []providers.Death) []providers.Death
}

// hookedDriver is a driver whose providers go through hooks.
type hookedDriver struct {
	providers.Driver
	hooks *hooks
}

type hookedProvider struct {
	providers.Provider
	hooks *hooks
}

type hookedPlanner struct {
	hookedProvider
	providers.Planner
}

func (d hookedDriver) Open(ctx context.Context, config providers.Config) (providers.Provider, error) {
	p, err := d.Driver.Open(ctx, config)
	if err != nil {
		return nil, err
	}
	h := hookedProvider{p, d.hooks}
	if planner, ok := p.(providers.Planner); ok {
		return hookedPlanner{h, planner}, nil
	}
	return h, nil
}

func (p hookedProvider) Mint(ctx context.Context, req providers.MintRequest, record func(providers.Handle) error) (providers.Minted, error) {
	mint := func() (providers.Minted, error) { return p.Provider.Mint(ctx, req, record) }
	if p.hooks.mint == nil {
		return mint()
	}
	return p.hooks.mint(ctx, req, mint)
}

func (p hookedProvider) Revoke(ctx context.Context, endings []providers.Ending) []providers.Death {
	revoke := func() []providers.Death { return p.Provider.Revoke(ctx, endings) }
	if p.hooks.revoke == nil {
		return revoke()
	}
	return p.hooks.revoke(endings, revoke)
}

func (p hookedProvider) Confirm(ctx context.Context, endings []providers.Ending) []providers.Death {
	confirm := func() []providers.Death { return p.Provider.Confirm(ctx, endings) }
	if p.hooks.confirm == nil {
		return confirm()
	}
	return p.hooks.confirm(endings, confirm)
}

// hooked puts hooks around one of the rig's drivers ("" is "world"), and
// restarts it.
func (r *rig) hooked(driver string, h *hooks) {
	r.t.Helper()
	r.stop()
	if driver == "" {
		driver = "world"
	}
	r.drivers[driver] = hookedDriver{r.drivers[driver], h}
	r.start()
}

// background issues in a goroutine; the channel gets the outcome.
func (r *rig) background(tool string, change ...func(*lease.IssueRequest)) <-chan error {
	done := make(chan error, 1)
	go func() {
		_, err := r.issue(tool, change...)
		done <- err
	}()
	return done
}

// widen gives a tool of the catalog a longer TTL.
func widen(yaml, tool string) string {
	i := strings.Index(yaml, "- name: "+tool)
	return yaml[:i] + strings.Replace(yaml[i:], "max_ttl: 15m", "max_ttl: 16m", 1)
}

// keys are the store's keys with a prefix.
func (r *rig) keys(prefix string) (keys []string) {
	r.t.Helper()
	err := r.db.View(context.Background(), func(rd store.Reader) error {
		keys = nil
		for entry, err := range rd.Scan(store.Prefix(prefix)) {
			if err != nil {
				return err
			}
			keys = append(keys, entry.Key)
		}
		return nil
	})
	if err != nil {
		r.t.Fatal(err)
	}
	return keys
}

// TestI4_AnAnswerIsOfItsAsking: the provider looked while the attempt was under
// way and found nothing; its answer comes when the attempt is over. That
// nothing was there then does not mean that nothing is there now.
func TestI4_AnAnswerIsOfItsAsking(t *testing.T) {
	for _, tool := range []string{"db.read", "cloud.read"} {
		t.Run(tool, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				r := newRig(t)
				driver := map[string]string{"db.read": "world", "cloud.read": "asked"}[tool]
				r.hooked(driver, &hooks{revoke: func(_ []providers.Ending, revoke func() []providers.Death) []providers.Death {
					deaths := revoke()
					time.Sleep(4 * time.Second) // the answer is slow
					return deaths
				}})
				g := r.grant(support, tool, time.Hour)
				r.system(tool).SetScript(providertest.Rules(1, providertest.Rule{Op: providertest.OpCreate, Fault: providertest.Fault{Delay: 3 * time.Second}}))
				done := r.background(tool)
				time.Sleep(time.Second)
				if _, _, err := r.engine.WithdrawGrant(context.Background(), as(sam), g.ID, ""); err != nil {
					t.Fatal(err)
				}
				r.wantReason(<-done, broker.ReasonNoGrant)
				for range 600 {
					synctest.Wait()
					open := len(r.keys("open|"))
					if live := len(r.system(tool).Live()); live != 0 && open == 0 {
						t.Fatalf("said to be over while %d credentials work", live)
					}
					time.Sleep(100 * time.Millisecond)
				}
				if n := len(r.keys("open|")); n != 0 {
					t.Errorf("a minute later %d leases have not ended", n)
				}
			})
		})
	}
}

// slowStore waits before the next Update.
type slowStore struct {
	store.Store
	mu   sync.Mutex
	wait time.Duration
}

func (s *slowStore) wrap(to store.Store) store.Store { s.Store = to; return s }

func (s *slowStore) next(d time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.wait = d
}

func (s *slowStore) Update(ctx context.Context, fn func(store.Txn) error) error {
	s.mu.Lock()
	d := s.wait
	s.wait = 0
	s.mu.Unlock()
	time.Sleep(d)
	return s.Store.Update(ctx, fn)
}

// TestI1_TheAttemptEndsAtItsDeadline: the deadline in the intent, which a
// recovery goes by, is when the attempt ends, however long the commit of the
// intent took.
func TestI1_TheAttemptEndsAtItsDeadline(t *testing.T) {
	eachOutside(t, func(t *testing.T, tool string) {
		slow := &slowStore{}
		r := newRig(t, func(r *rig) { r.wrap = slow.wrap })
		r.grant(support, tool, time.Hour)
		synctest.Wait()
		r.system(tool).SetScript(providertest.Rules(1, providertest.Rule{Op: providertest.OpCreate, Fault: providertest.Fault{Delay: time.Hour}}))
		began := time.Now()
		slow.next(6 * time.Second)
		_, err := r.issue(tool)
		r.wantReason(err, broker.ReasonProvider)
		if took := time.Since(began); took != 10*time.Second {
			t.Errorf("the attempt ended after %s; its deadline was 10s after it began", took)
		}
	})
}

// TestI3_EndedWhileItWasMade: a lease that is ended while it is made, and then
// turns out to end even earlier, leaves nothing in the indexes.
func TestI3_EndedWhileItWasMade(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t)
		r.hooked("world", &hooks{mint: func(_ context.Context, req providers.MintRequest, mint func() (providers.Minted, error)) (providers.Minted, error) {
			minted, err := mint()
			time.Sleep(5 * time.Second)
			minted.Ends = req.Now.Add(time.Second)
			return minted, err
		}})
		g := r.grant(support, "db.read", time.Hour)
		done := r.background("db.read")
		time.Sleep(2 * time.Second)
		if _, _, err := r.engine.WithdrawGrant(context.Background(), as(sam), g.ID, ""); err != nil {
			t.Fatal(err)
		}
		r.wantReason(<-done, broker.ReasonNoGrant)
		time.Sleep(time.Minute)
		if c, err := r.engine.Counts(context.Background()); err != nil || c.Overdue != 0 {
			t.Errorf("Counts = %+v, %v; nothing is overdue", c, err)
		}
		for _, prefix := range []string{"open|", "due|", "revoking|"} {
			if left := r.keys(prefix); len(left) != 0 {
				t.Errorf("left in the index: %q", left)
			}
		}
	})
}

// TestI8_NothingLivesForEver: a credential without an end of its own is never
// delivered, whatever kind of provider made it.
func TestI8_NothingLivesForEver(t *testing.T) {
	for tool, driver := range map[string]string{"db.read": "world", "vault.read": "world", "cloud.read": "asked", "crm.read": "token"} {
		t.Run(tool, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				r := newRig(t)
				r.hooked(driver, &hooks{mint: func(_ context.Context, _ providers.MintRequest, mint func() (providers.Minted, error)) (providers.Minted, error) {
					minted, err := mint()
					minted.DiesAt = time.Time{}
					return minted, err
				}})
				r.grant(support, tool, time.Hour)
				_, err := r.issue(tool)
				r.wantReason(err, broker.ReasonProvider)
				time.Sleep(time.Minute)
				if left := r.keys("open|"); len(left) != 0 {
					t.Errorf("leases that have not ended: %q", left)
				}
				if n := len(r.world.Live()) + len(r.asked.Live()); n != 0 {
					t.Errorf("%d credentials are left", n)
				}
			})
		})
	}
}

// TestI3_ASlowTakerHoldsUpNoHousekeeping: a delivery that never ends keeps
// nothing else from ending.
func TestI3_ASlowTakerHoldsUpNoHousekeeping(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t)
		r.open(time.Minute, "db.read")
		d, err := r.engine.Issue(context.Background(), as(support), lease.IssueRequest{Tool: "db.read"})
		if err != nil {
			t.Fatal(err)
		}
		defer d.Done()
		later := r.open(2*time.Minute, "crm.read")
		time.Sleep(3 * time.Minute)
		v, err := r.engine.Incident(context.Background(), as(pager), later.ID)
		if err != nil || v.State != broker.IncidentClosed {
			t.Errorf("the incident whose time is over is %s, %v", v.State, err)
		}
	})
}

// raceStore lets the first Update after race wait until the second has come,
// and then go before it.
type raceStore struct {
	store.Store
	mu    sync.Mutex
	calls int // 0: no race
	came  chan struct{}
	went  chan struct{}
}

func (s *raceStore) wrap(to store.Store) store.Store { s.Store = to; return s }

func (s *raceStore) race() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls, s.came, s.went = 1, make(chan struct{}), make(chan struct{})
}

func (s *raceStore) Update(ctx context.Context, fn func(store.Txn) error) error {
	s.mu.Lock()
	call, came, went := s.calls, s.came, s.went
	if call == 1 || call == 2 {
		s.calls++
	}
	s.mu.Unlock()
	switch call {
	case 1:
		<-came
		defer close(went)
	case 2:
		close(came)
		<-went
	}
	return s.Store.Update(ctx, fn)
}

// TestI3_AProviderLeavesAfterItsLeases: a reload that takes a provider out
// races an attempt to mint there. Whichever comes first, nothing is left that
// nobody can end.
func TestI3_AProviderLeavesAfterItsLeases(t *testing.T) {
	bubble(t, func(t *testing.T) {
		race := &raceStore{}
		r := newRig(t, func(r *rig) { r.wrap = race.wrap })
		r.grant(support, "db.read", time.Hour)
		synctest.Wait()
		without := strings.NewReplacer(
			"  - name: planned\n    driver: world\n    config: {mode: planned, mint_timeout: 10s, late_bound: 5s, revoke_timeout: 5s}\n", "",
			"  - name: db.read\n    provider: planned\n    description: reads\n    max_ttl: 15m\n    scope: {}\n", "",
			"tools: [db.read, ", "tools: [",
		).Replace(r.yaml)
		if strings.Contains(without, "planned") || strings.Contains(without, "db.read") {
			t.Fatal("the catalog was not changed")
		}
		r.yaml = without
		next := r.snapshot()
		race.race()
		done := r.background("db.read")
		synctest.Wait() // it waits with its intent
		if err := r.engine.Load(context.Background(), next, "test"); err != nil {
			t.Fatal(err)
		}
		<-done // delivered just before the reload, or refused just after
		time.Sleep(time.Minute)
		if left := r.keys("due|"); len(left) != 0 {
			t.Errorf("a minute later these have not ended: %q", left)
		}
		if n := len(r.world.Live()); n != 0 {
			t.Errorf("%d credentials are left", n)
		}
		if err := r.engine.Load(context.Background(), r.snapshot(), "test"); err != nil {
			t.Errorf("the next reload: %v", err)
		}
	})
}
