package server_test

import (
	"bytes"
	"context"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/attestation/devtrust"
	"github.com/mayfly-security/mayfly/attestation/spiffe"
	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/catalog"
	"github.com/mayfly-security/mayfly/broker/lease"
	"github.com/mayfly-security/mayfly/broker/server"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/providertest"
	"github.com/mayfly-security/mayfly/providers/token"
	"github.com/mayfly-security/mayfly/store"
	"github.com/mayfly-security/mayfly/store/bolt"
)

var (
	domain  = spiffeid.RequireTrustDomainFromString("acme.test")
	mayfly  = spiffeid.RequireFromPath(domain, "/mayfly")
	support = spiffeid.RequireFromPath(domain, "/agent/support")
	other   = spiffeid.RequireFromPath(domain, "/agent/other")
	pager   = spiffeid.RequireFromPath(domain, "/bot/pager")
	sam     = spiffeid.RequireFromPath(domain, "/operator/sam")
	crm     = spiffeid.RequireFromPath(domain, "/service/crm")
	billing = spiffeid.RequireFromPath(domain, "/service/billing")
	nobody  = spiffeid.RequireFromPath(domain, "/nobody")
)

// baseCatalog is the catalog of every test. Tests change it by replacing text.
const baseCatalog = `
agents:
  - id: spiffe://acme.test/agent/support
    owner: support@acme.test
    environment: production
    disabled: false # support
  - id: spiffe://acme.test/agent/other
    owner: other@acme.test
    environment: production
    disabled: false # other
groups:
  - name: sre
    members: [spiffe://acme.test/operator/sam]
  - name: closers
    members: [spiffe://acme.test/operator/olga]
operators:
  - group: sre
providers:
  - name: databases
    driver: world
    config: {mode: planned, mint_timeout: 10s, late_bound: 0s, revoke_timeout: 5s}
  - name: hostile
    driver: hostile
    config: {mode: recorded, mint_timeout: 10s, late_bound: 0s, revoke_timeout: 5s}
  - name: tokens
    driver: token
    config:
      issuer: "https://mayfly.acme.test"
      keys: "@KEYS@"
      introspectors:
        - {id: "spiffe://acme.test/service/crm", audiences: ["https://crm.acme.test"]}
        - {id: "spiffe://acme.test/service/billing", audiences: ["https://billing.acme.test"]}
        - {id: "spiffe://acme.test/agent/other", audiences: ["https://other.acme.test"]}
tools:
  - name: db.read
    provider: databases
    description: reads
    max_ttl: 15m
    scope: {}
  - name: hostile.read
    provider: hostile
    description: reads from a provider that nobody should trust
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
  - name: crm.customer
    provider: tokens
    description: reads one customer
    max_ttl: 15m
    params:
      customer: {type: string, pattern: "c-[0-9]{1,8}"}
      depth: {type: integer, min: 1, max: 9, optional: true}
      full: {type: boolean, optional: true}
    scope: {audience: "https://crm.acme.test", scopes: [crm.read], verification: introspect}
openers:
  - id: spiffe://acme.test/bot/pager
    tools: [db.read, crm.read, hostile.read]
    agents: [spiffe://acme.test/agent/support, spiffe://acme.test/agent/other]
    max_duration: 1h
    max_open: 100
    closers: closers
`

// rig is a whole broker on loopback: a real store, a real trust domain, a real
// listener. The outside system of the world driver is the only thing made up.
type rig struct {
	t        *testing.T
	dir      string
	yaml     string
	limits   server.Limits
	tune     func(*lease.Config)
	db       store.Store
	engine   *lease.Engine
	world    *providertest.System
	hostile  *hostile
	logs     *syncBuffer
	drivers  map[string]providers.Driver
	metrics  *prometheus.Registry
	trust    *devtrust.Server
	identity *spiffe.Source
	server   *server.Server
	addr     string
	served   chan error
	ahead    atomic.Int64 // how far the machine's clock is set ahead, for the engine
	people   *peopleRig   // nil: no people come in
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

func newRig(t *testing.T, options ...func(*rig)) *rig {
	t.Helper()
	r := &rig{t: t, dir: t.TempDir(), yaml: baseCatalog, logs: &syncBuffer{}}
	r.world = providertest.NewSystem(providertest.SystemConfig{})
	for _, o := range options {
		o(r)
	}
	if _, err := token.NewKey(filepath.Join(r.dir, "keys"), time.Now()); err != nil {
		t.Fatal(err)
	}
	r.hostile = &hostile{Driver: providertest.Driver{System: r.world}}
	r.drivers = map[string]providers.Driver{
		"world": providertest.Driver{System: r.world}, "hostile": r.hostile, "token": token.Driver{},
	}
	r.trust = newTrust(t, domain)
	addr, err := r.trust.Add(devtrust.Identity{ID: mayfly, DNSNames: []string{"localhost"}})
	if err != nil {
		t.Fatal(err)
	}
	r.identity, err = spiffe.Open(bounded(t), spiffe.Config{Addr: addr, Log: r.log()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.identity.Close() })
	r.start()
	t.Cleanup(r.stop)
	return r
}

// newTrust starts a trust domain whose sockets have short paths.
func newTrust(t *testing.T, name spiffeid.TrustDomain) *devtrust.Server {
	t.Helper()
	dir, err := os.MkdirTemp("", "mf")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	s, err := devtrust.New(devtrust.Config{TrustDomain: name, Dir: filepath.Join(dir, "td")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// bounded is a context for what takes a moment, and must not take for ever.
func bounded(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func (r *rig) log() *slog.Logger {
	return slog.New(slog.NewJSONHandler(r.logs, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

func (r *rig) wall() time.Time { return time.Now().Add(time.Duration(r.ahead.Load())) }

// snapshot loads the rig's catalog as it stands.
func (r *rig) snapshot() *catalog.Snapshot {
	r.t.Helper()
	file := filepath.Join(r.dir, "catalog.yaml")
	text := strings.ReplaceAll(r.yaml, "@KEYS@", filepath.Join(r.dir, "keys"))
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		r.t.Fatal(err)
	}
	s, err := catalog.Load([]string{file}, r.drivers)
	if err != nil {
		r.t.Fatal(err)
	}
	return s
}

func (r *rig) storeFile() string { return filepath.Join(r.dir, "mayfly.db") }

func (r *rig) start() {
	r.t.Helper()
	db, err := bolt.Open(r.storeFile(), bolt.Config{MmapSize: 1 << 20})
	if err != nil {
		r.t.Fatal(err)
	}
	r.db = db
	r.metrics = prometheus.NewRegistry()
	config := lease.Config{Store: r.db, Catalog: r.snapshot(), Drivers: r.drivers, Log: r.log(), Metrics: r.metrics, Wall: r.wall}
	if r.tune != nil {
		r.tune(&config)
	}
	if r.engine, err = lease.New(context.Background(), config); err != nil {
		r.t.Fatal(err)
	}
	face := server.Config{Engine: r.engine, Attestor: r.identity, Identity: r.identity, Log: r.log(), Limits: r.limits}
	if r.people != nil {
		face.People = r.people.open(r)
	}
	if r.server, err = server.New(face); err != nil {
		r.t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		r.t.Fatal(err)
	}
	r.addr, r.served = ln.Addr().String(), make(chan error, 2)
	go func() { r.served <- r.server.Serve(ln) }()
	if r.people != nil {
		go func() { r.served <- r.server.ServePeople(r.people.ln) }()
	}
}

// stop ends the broker as the daemon does, and may be called again.
func (r *rig) stop() {
	if r.engine == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := r.server.Shutdown(ctx); err != nil {
		r.t.Errorf("shutting down: %v", err)
	}
	if err := <-r.served; err != nil {
		r.t.Errorf("serving: %v", err)
	}
	if r.people != nil {
		if err := <-r.served; err != nil {
			r.t.Errorf("serving people: %v", err)
		}
		r.people.signIn.Close()
	}
	r.engine.Close()
	r.engine = nil
	if err := r.db.Close(); err != nil {
		r.t.Error(err)
	}
}

// reload changes the catalog by replacing text, and loads it.
func (r *rig) reload(old, new string) {
	r.t.Helper()
	if !strings.Contains(r.yaml, old) {
		r.t.Fatalf("the catalog does not contain %q", old)
	}
	r.yaml = strings.ReplaceAll(r.yaml, old, new)
	if err := r.engine.Load(context.Background(), r.snapshot(), "test"); err != nil {
		r.t.Fatal(err)
	}
}

// grant gives an agent a tool, without the API.
func (r *rig) grant(agent spiffeid.ID, tool string) broker.Grant {
	r.t.Helper()
	caller := broker.Caller{ID: sam, Correlation: broker.NewCorrelationID(time.Now())}
	g, err := r.engine.CreateGrant(context.Background(), caller,
		lease.GrantRequest{Agent: agent, Tool: tool, For: time.Hour, Reason: "a test"})
	if err != nil {
		r.t.Fatal(err)
	}
	return g
}
