package lease_test

import (
	"bytes"
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/audit"
	"github.com/mayfly-security/mayfly/broker/catalog"
	"github.com/mayfly-security/mayfly/broker/lease"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/providertest"
	"github.com/mayfly-security/mayfly/providers/token"
	"github.com/mayfly-security/mayfly/store"
	"github.com/mayfly-security/mayfly/store/bolt"
)

var (
	support = spiffeid.RequireFromString("spiffe://acme.test/agent/support")
	other   = spiffeid.RequireFromString("spiffe://acme.test/agent/other")
	pager   = spiffeid.RequireFromString("spiffe://acme.test/bot/pager")
	sam     = spiffeid.RequireFromString("spiffe://acme.test/operator/sam")
)

// baseCatalog is the catalog of most tests: one provider of each kind, and a
// tool of each. Tests change it by replacing text.
const baseCatalog = `
agents:
  - id: spiffe://acme.test/agent/support
    owner: support@acme.test
    environment: production
    disabled: false # support
    max_leases: 100000 # support
    max_per_hour: 1000000 # support
  - id: spiffe://acme.test/agent/other
    owner: other@acme.test
    environment: production
    max_leases: 100000
    max_per_hour: 1000000
groups:
  - name: sre
    members: [spiffe://acme.test/operator/sam]
  - name: closers
    members: [spiffe://acme.test/operator/olga]
operators:
  - group: sre
providers:
  - name: planned
    driver: world
    config: {mode: planned, mint_timeout: 10s, late_bound: 5s, revoke_timeout: 5s}
  - name: recorded
    driver: world
    config: {mode: recorded, mint_timeout: 10s, late_bound: 5s, revoke_timeout: 5s}
  - name: asked
    driver: asked
    config: {mode: asked, mint_timeout: 10s, late_bound: 5s, revoke_timeout: 5s}
  - name: tokens
    driver: token
    config: {issuer: "https://mayfly.acme.test", keys: "@KEYS@", introspectors: [{id: "spiffe://acme.test/service/crm", audiences: ["https://crm.acme.test"]}]}
tools:
  - name: db.read
    provider: planned
    description: reads
    max_ttl: 15m
    scope: {}
  - name: vault.read
    provider: recorded
    description: reads
    max_ttl: 15m
    scope: {}
  - name: cloud.read
    provider: asked
    description: reads
    max_ttl: 15m
    scope: {}
  - name: crm.read
    provider: tokens
    description: reads
    max_ttl: 15m
    params:
      customer: {type: string, pattern: "c-[0-9]{1,8}", optional: true}
    scope: {audience: "https://crm.acme.test", scopes: [crm.read], verification: introspect}
    env: {CRM_TOKEN: access_token}
  - name: docs.search
    provider: tokens
    description: reads offline
    max_ttl: 15m
    scope: {audience: "https://docs.acme.test", scopes: [docs.read], verification: offline}
openers:
  - id: spiffe://acme.test/bot/pager
    tools: [db.read, vault.read, cloud.read, crm.read, docs.search]
    agents: [spiffe://acme.test/agent/support, spiffe://acme.test/agent/other]
    max_duration: 1h
    max_open: 1000
    max_per_hour: 1000000
    closers: closers
`

// rig is an engine on a real store with outside systems. A restart keeps the
// store and the systems, as a crash does.
type rig struct {
	t       testing.TB
	dir     string
	yaml    string
	cedar   string // policies; empty for the built-in ones
	db      store.Store
	engine  *lease.Engine
	world   *providertest.System // of the planned and recorded providers
	asked   *providertest.System
	logs    *syncBuffer
	drivers map[string]providers.Driver
	tune    func(*lease.Config)
	wrap    func(store.Store) store.Store
}

// syncBuffer is a bytes.Buffer for many goroutines.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) Bytes() []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	return bytes.Clone(s.b.Bytes())
}

func newRig(t testing.TB, options ...func(*rig)) *rig {
	t.Helper()
	r := &rig{t: t, dir: t.TempDir(), yaml: baseCatalog, logs: &syncBuffer{}}
	r.world = providertest.NewSystem(providertest.SystemConfig{})
	r.asked = providertest.NewSystem(providertest.SystemConfig{Settle: 2 * time.Second})
	for _, o := range options {
		o(r)
	}
	keys := filepath.Join(r.dir, "keys")
	if _, err := token.NewKey(keys, time.Now()); err != nil {
		t.Fatal(err)
	}
	r.drivers = map[string]providers.Driver{
		"world": providertest.Driver{System: r.world},
		"asked": providertest.Driver{System: r.asked},
		"token": token.Driver{},
	}
	r.start()
	t.Cleanup(func() { r.stop() })
	return r
}

// snapshot loads the rig's catalog as it stands.
func (r *rig) snapshot() *catalog.Snapshot {
	r.t.Helper()
	file := filepath.Join(r.dir, "catalog.yaml")
	text := strings.ReplaceAll(r.yaml, "@KEYS@", filepath.Join(r.dir, "keys"))
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		r.t.Fatal(err)
	}
	files := []string{file}
	if r.cedar != "" {
		policies := filepath.Join(r.dir, "policies.cedar")
		if err := os.WriteFile(policies, []byte(r.cedar), 0o600); err != nil {
			r.t.Fatal(err)
		}
		files = append(files, policies)
	}
	s, err := catalog.Load(files, r.drivers)
	if err != nil {
		r.t.Fatal(err)
	}
	return s
}

// openStore opens the rig's store, without an engine.
func (r *rig) openStore() {
	r.t.Helper()
	db, err := bolt.Open(filepath.Join(r.dir, "mayfly.db"), bolt.Config{MmapSize: 64 << 20})
	if err != nil {
		r.t.Fatal(err)
	}
	r.db = db
	if r.wrap != nil {
		r.db = r.wrap(db)
	}
}

func (r *rig) start() {
	r.t.Helper()
	r.openStore()
	var err error
	config := lease.Config{
		Store: r.db, Catalog: r.snapshot(), Drivers: r.drivers,
		Log: slog.New(slog.NewJSONHandler(r.logs, &slog.HandlerOptions{Level: slog.LevelDebug})),
	}
	if r.tune != nil {
		r.tune(&config)
	}
	if r.engine, err = lease.New(context.Background(), config); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) stop() {
	if r.engine == nil {
		return
	}
	r.engine.Close()
	r.engine = nil
	if err := r.db.Close(); err != nil {
		r.t.Error(err)
	}
}

func (r *rig) restart() { r.t.Helper(); r.stop(); r.start() }

// reload changes the catalog by replacing text, and loads it.
func (r *rig) reload(old, new string) error {
	r.t.Helper()
	if !strings.Contains(r.yaml, old) {
		r.t.Fatalf("the catalog does not contain %q", old)
	}
	r.yaml = strings.Replace(r.yaml, old, new, 1)
	return r.engine.Load(context.Background(), r.snapshot(), "test")
}

func as(id spiffeid.ID) broker.Caller {
	return broker.Caller{ID: id, ValidUntil: time.Now().Add(time.Hour), Correlation: broker.NewCorrelationID(time.Now())}
}

func (r *rig) grant(agent spiffeid.ID, tool string, d time.Duration, change ...func(*lease.GrantRequest)) broker.Grant {
	r.t.Helper()
	req := lease.GrantRequest{Agent: agent, Tool: tool, For: d, Reason: "a test"}
	for _, c := range change {
		c(&req)
	}
	g, err := r.engine.CreateGrant(context.Background(), as(sam), req)
	if err != nil {
		r.t.Fatal(err)
	}
	return g
}

func (r *rig) open(d time.Duration, tools ...string) broker.Incident {
	r.t.Helper()
	in, err := r.engine.OpenIncident(context.Background(), as(pager), lease.IncidentRequest{
		Title: "something broke", Agents: []spiffeid.ID{support}, Tools: tools, Duration: &d,
	})
	if err != nil {
		r.t.Fatal(err)
	}
	return in
}

// issue gets a lease and hands it over at once.
func (r *rig) issue(tool string, change ...func(*lease.IssueRequest)) (*lease.Delivery, error) {
	req := lease.IssueRequest{Tool: tool}
	for _, c := range change {
		c(&req)
	}
	d, err := r.engine.Issue(context.Background(), as(support), req)
	if err == nil {
		d.Done()
	}
	return d, err
}

func (r *rig) mustIssue(tool string, change ...func(*lease.IssueRequest)) *lease.Delivery {
	r.t.Helper()
	d, err := r.issue(tool, change...)
	if err != nil {
		r.t.Fatalf("issuing %s: %v", tool, err)
	}
	return d
}

func ttl(d time.Duration) func(*lease.IssueRequest) {
	return func(r *lease.IssueRequest) { r.TTL = &d }
}

func key(k string) func(*lease.IssueRequest) {
	return func(r *lease.IssueRequest) { r.Key = k }
}

func (r *rig) lease(id broker.LeaseID) broker.Lease {
	r.t.Helper()
	l, err := r.engine.Lease(context.Background(), id, lease.Sight{All: true})
	if err != nil {
		r.t.Fatal(err)
	}
	return l
}

// wantState waits, in the bubble's time, for at most d until the lease is in
// the state, and fails if it is not.
func (r *rig) wantState(id broker.LeaseID, state broker.LeaseState, d time.Duration) broker.Lease {
	r.t.Helper()
	for deadline := time.Now().Add(d); ; time.Sleep(max(10*time.Millisecond, d/200)) {
		l := r.lease(id)
		if l.State == state {
			return l
		}
		if time.Now().After(deadline) {
			r.t.Fatalf("lease %s is %s (progress %q, cause %q) after %s; want %s", id, l.State, l.Progress, l.Cause, d, state)
		}
	}
}

func (r *rig) events(f lease.EventFilter) []audit.Event {
	r.t.Helper()
	var all []audit.Event
	var after uint64
	for {
		events, looked, err := r.engine.Events(context.Background(), as(sam), f, after, lease.MaxPage, false)
		if err != nil {
			r.t.Fatal(err)
		}
		all = append(all, events...)
		if looked == after {
			return all
		}
		after = looked
	}
}

func (r *rig) wantReason(err error, want broker.Reason) {
	r.t.Helper()
	if got := broker.ReasonOf(err); got != want {
		r.t.Errorf("reason %q (%v); want %q", got, err, want)
	}
}
