package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/durationpb"

	mayflyv1 "github.com/mayfly-security/mayfly/broker/api/mayfly/v1"
	"github.com/mayfly-security/mayfly/providers/providertest"
)

// What the crash tests are bounded by: a mint's deadline, and how late after
// it the outside system may still act.
const (
	mintTimeout = 1500 * time.Millisecond
	lateBound   = 500 * time.Millisecond
	// settle is the stated bound: after so long from the restart nothing lives
	// that the store does not show. It is the mint's deadline, the late bound,
	// and time for a few tries on a busy machine.
	settle = mintTimeout + lateBound + 3*time.Second
)

const crashCatalog = `
agents:
  - {id: "spiffe://acme.test/agent/support", owner: support, environment: production, max_leases: 100000, max_per_hour: 1000000}
groups:
  - {name: sre, members: ["spiffe://acme.test/operator/sam"]}
operators: [{group: sre}]
providers:
  - {name: planned, driver: world, config: {mode: planned, url: "@URL@", mint_timeout: 1500ms, late_bound: 500ms, revoke_timeout: 1s}}
  - {name: recorded, driver: world, config: {mode: recorded, url: "@URL@", mint_timeout: 1500ms, late_bound: 500ms, revoke_timeout: 1s}}
  - {name: asked, driver: world, config: {mode: asked, url: "@URL@", mint_timeout: 1500ms, late_bound: 500ms, revoke_timeout: 1s}}
  - {name: token, driver: token, config: {issuer: "https://mayfly.acme.test", keys: "@KEYS@", introspectors: [{id: "spiffe://acme.test/service/crm", audiences: ["https://crm.acme.test"]}]}}
tools:
  - {name: planned, provider: planned, description: x, max_ttl: 10m}
  - {name: recorded, provider: recorded, description: x, max_ttl: 10m}
  - {name: asked, provider: asked, description: x, max_ttl: 10m}
  - {name: token, provider: token, description: x, max_ttl: 10m, scope: {audience: "https://crm.acme.test", scopes: [crm.read], verification: introspect}}
openers:
  - {id: "spiffe://acme.test/bot/pager", tools: [planned, recorded, asked, token], agents: ["spiffe://acme.test/agent/support"], max_duration: 1h, max_open: 1000, max_per_hour: 1000000}
`

// TestEveryCrashPoint kills a real broker with SIGKILL before and after every
// store commit and every provider call of issue, close, revoke and expire, and
// once with each provider call taking effect after the kill. After each
// restart, and the stated bound, the world is compared with the store.
func TestEveryCrashPoint(t *testing.T) {
	people := newPeople(t)
	clients := [3]*http.Client{people.httpClient("/agent/support"), people.httpClient("/operator/sam"), people.httpClient("/bot/pager")}
	var kills atomic.Int64
	t.Run("all", func(t *testing.T) {
		for _, op := range []string{"issue", "close", "revoke", "expire"} {
			for _, tool := range []string{"planned", "recorded", "asked", "token"} {
				t.Run(op+"/"+tool, func(t *testing.T) {
					t.Parallel()
					c := newCrash(t, people, clients, tool)
					defer func() { c.child.kill() }()
					commits := c.everyCommit(op)
					calls := 0
					if tool != "token" {
						calls = c.everyCall(op)
					}
					kills.Add(int64(c.kills))
					t.Logf("%d commits and %d provider calls; %d kills", commits, calls, c.kills)
					if commits == 0 || tool != "token" && calls == 0 {
						t.Error("nothing was found to crash at")
					}
				})
			}
		}
	})
	t.Logf("%d kills altogether", kills.Load())
}

// crash is one daemon that is killed again and again, with its outside world.
type crash struct {
	t        *testing.T
	clients  [3]*http.Client
	settings childSettings
	system   *providertest.System
	tool     string
	child    *child
	api      callers
	kills    int

	mu      sync.Mutex
	onCall  func() providertest.Fault // what happens at a provider's call; nil: nothing
	release bool                      // after the restart something lands late
}

func newCrash(t *testing.T, p *people, clients [3]*http.Client, tool string) *crash {
	c := &crash{t: t, clients: clients, tool: tool}
	c.system = providertest.NewSystem(providertest.SystemConfig{Settle: 100 * time.Millisecond, Script: func(providertest.Call) providertest.Fault {
		c.mu.Lock()
		f := c.onCall
		c.mu.Unlock()
		if f == nil {
			return providertest.Fault{}
		}
		return f()
	}})
	world := httptest.NewServer(providertest.NewWorld(c.system))
	t.Cleanup(world.Close)
	dir := t.TempDir()
	c.settings = childSettings{
		Store: filepath.Join(dir, "mayfly.db"), Workload: p.sockets["/mayfly"],
		Catalog: writeCatalog(t, dir, strings.ReplaceAll(crashCatalog, "@URL@", world.URL)),
	}
	c.start()
	return c
}

func (c *crash) start() {
	c.t.Helper()
	c.child = startChild(c.t, c.settings)
	c.api = newCallers(c.child.addr, c.clients[0], c.clients[1], c.clients[2])
}

func (c *crash) script(f func() providertest.Fault) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.onCall = f
}

// scene is what an operation works on.
type scene struct {
	incident string
	lease    string
}

// set prepares the scene of an operation: a window and, for all but issue, a lease.
func (c *crash) set(op string) scene {
	c.t.Helper()
	ctx := context.Background()
	in, err := c.api.bot.OpenIncident(ctx, connect.NewRequest(&mayflyv1.OpenIncidentRequest{
		Title: "crash", Agents: []string{"spiffe://acme.test/agent/support"}, Tools: []string{c.tool},
	}))
	if err != nil {
		c.t.Fatalf("opening: %v", err)
	}
	s := scene{incident: in.Msg.GetId()}
	if op == "close" || op == "revoke" {
		l, err := c.issue(ctx, time.Minute)
		if err != nil {
			c.t.Fatalf("issuing: %v", err)
		}
		s.lease = l
	}
	return s
}

func (c *crash) issue(ctx context.Context, ttl time.Duration) (string, error) {
	res, err := c.api.agent.IssueLease(ctx, connect.NewRequest(&mayflyv1.IssueLeaseRequest{Tool: c.tool, Ttl: durationpb.New(ttl)}))
	if err != nil {
		return "", err
	}
	return res.Msg.GetLease().GetId(), nil
}

// do carries the operation out. Its error is of no interest where the broker
// is killed on the way.
func (c *crash) do(op string, s scene) error {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	var err error
	switch op {
	case "issue":
		_, err = c.issue(ctx, time.Minute)
	case "close":
		_, err = c.api.bot.CloseIncident(ctx, connect.NewRequest(&mayflyv1.CloseIncidentRequest{Id: s.incident}))
	case "revoke":
		_, err = c.api.agent.RevokeLease(ctx, connect.NewRequest(&mayflyv1.RevokeLeaseRequest{Id: s.lease}))
	case "expire":
		var id string
		if id, err = c.issue(ctx, 3*time.Second); err != nil { // long enough to be delivered on a busy machine
			return err
		}
		err = c.await(10*time.Second, func() error {
			l, err := c.api.operator.GetLease(ctx, connect.NewRequest(&mayflyv1.GetLeaseRequest{Id: id}))
			if err != nil {
				return err
			}
			if st := l.Msg.GetState(); st != "revoked" && st != "expired" {
				return fmt.Errorf("the lease is %s after its end", st)
			}
			return nil
		})
	}
	return err
}

// await repeats check until it succeeds, the daemon is gone, or time is up.
func (c *crash) await(most time.Duration, check func() error) error {
	for deadline := time.Now().Add(most); ; time.Sleep(20 * time.Millisecond) {
		err := check()
		if err == nil || time.Now().After(deadline) || !c.child.alive() {
			return err
		}
	}
}

// survived reports whether the broker lives after an operation. Its end may be
// seen a moment after the connection's.
func (c *crash) survived(err error) bool {
	if err == nil {
		return c.child.alive()
	}
	select {
	case <-c.child.gone:
		return false
	case <-time.After(2 * time.Second):
		return true
	}
}

// everyCommit kills the broker before and after its nth commit of the
// operation, for each n, until the operation ends before there are n commits.
func (c *crash) everyCommit(op string) int {
	for n := 1; ; n++ {
		for _, when := range []string{"before", "after"} {
			s := c.set(op)
			if err := c.child.arm(n, when); err != nil {
				c.t.Fatal(err)
			}
			err := c.do(op, s)
			// A commit may come after the operation has been answered.
			if c.survived(err) && c.child.arm(0, when) == nil {
				if err != nil {
					c.t.Fatalf("without a crash at commit %d: %v", n, err)
				}
				c.strike(op, s)
				return n - 1
			}
			c.recover(fmt.Sprintf("%s commit %d of %s", when, n, op), s)
		}
	}
}

// everyCall kills the broker at the nth call that reaches the outside system:
// before it acts, so that it acts and nobody hears of it, and so that it acts
// only after the broker has come back and looked.
func (c *crash) everyCall(op string) int {
	for n := int64(1); ; n++ {
		for _, when := range []string{"before", "after", "late"} {
			s := c.set(op)
			var calls atomic.Int64
			c.script(func() providertest.Fault {
				if calls.Add(1) != n {
					return providertest.Fault{}
				}
				c.child.kill()
				switch when {
				case "before":
					return providertest.Fault{Effect: providertest.FailBefore}
				case "late":
					return providertest.Fault{Held: true}
				}
				return providertest.Fault{}
			})
			err := c.do(op, s)
			c.script(nil)
			// A call may come after the operation has been answered.
			if c.survived(err) && calls.Load() < n {
				if err != nil {
					c.t.Fatalf("without a crash at call %d: %v", n, err)
				}
				c.strike(op, s)
				return int(n) - 1
			}
			c.release = when == "late"
			c.recover(fmt.Sprintf("%s provider call %d of %s", when, n, op), s)
		}
	}
}

// recover starts the broker again and compares the world with the store.
func (c *crash) recover(where string, s scene) {
	c.t.Helper()
	c.kills++
	<-c.child.gone
	c.start()
	if c.release {
		// The broker has recovered and looked; now what was under way lands.
		time.Sleep(200 * time.Millisecond)
		c.system.ReleaseLate()
		c.release = false
	}
	err := c.await(settle, c.agrees)
	if err != nil {
		c.t.Fatalf("killed %s; %v after the restart: %v", where, settle, err)
	}
	c.strike(where, s)
}

// strike ends what is left of a scene, which must work as ever and leave nothing.
func (c *crash) strike(where string, s scene) {
	c.t.Helper()
	if _, err := c.api.bot.CloseIncident(context.Background(), connect.NewRequest(&mayflyv1.CloseIncidentRequest{Id: s.incident})); err != nil {
		c.t.Fatalf("%s: closing: %v", where, err)
	}
	err := c.await(settle, func() error {
		if live := c.system.Live(); len(live) > 0 {
			return fmt.Errorf("after the close these live: %+v", live)
		}
		return c.agrees()
	})
	if err != nil {
		c.t.Fatalf("%s: %v", where, err)
	}
}

// agrees compares the outside world with what the broker says.
func (c *crash) agrees() error {
	ctx := context.Background()
	leases := map[string]*mayflyv1.Lease{}
	token := ""
	for {
		page, err := c.api.operator.ListLeases(ctx, connect.NewRequest(&mayflyv1.ListLeasesRequest{All: true, PageSize: 1000, PageToken: token}))
		if err != nil {
			return err
		}
		for _, l := range page.Msg.GetLeases() {
			leases[l.GetId()] = l
		}
		if token = page.Msg.GetNextPageToken(); token == "" {
			break
		}
	}
	live := map[string]int{}
	for _, cred := range c.system.Live() {
		id := string(cred.Lease())
		live[id]++
		l := leases[id]
		switch {
		case l == nil:
			return fmt.Errorf("a credential of lease %s lives, which the store does not know", id)
		case l.GetState() != "active":
			return fmt.Errorf("a credential of lease %s lives, which is %s", id, l.GetState())
		case live[id] > 1:
			return fmt.Errorf("%d credentials of lease %s live", live[id], id)
		}
	}
	for id, l := range leases {
		switch st := l.GetState(); {
		case st == "minting" || st == "revoking":
			return fmt.Errorf("lease %s is still %s (%s)", id, st, l.GetCause())
		case l.GetOverdue():
			return fmt.Errorf("lease %s is overdue", id)
		case st == "active" && c.tool != "token" && live[id] != 1:
			return fmt.Errorf("lease %s is said to be active and nothing of it lives", id)
		}
	}
	return c.told(leases)
}

// told checks that the evidence tells of each lease's life as the store has it.
func (c *crash) told(leases map[string]*mayflyv1.Lease) error {
	ctx := context.Background()
	last := map[string]string{}
	var after uint64
	for {
		page, err := c.api.audit.ListEvents(ctx, connect.NewRequest(&mayflyv1.ListEventsRequest{After: after, PageSize: 1000}))
		if err != nil {
			return err
		}
		for _, e := range page.Msg.GetEvents() {
			if what, ok := strings.CutPrefix(e.GetType(), "lease."); ok {
				last[e.GetLeaseId()] = what
			}
		}
		if page.Msg.GetNextAfter() == after {
			break
		}
		after = page.Msg.GetNextAfter()
	}
	var errs []error
	for id, l := range leases {
		if last[id] != l.GetState() {
			errs = append(errs, fmt.Errorf("lease %s is %s and its last event says %q", id, l.GetState(), last[id]))
		}
		delete(last, id)
	}
	for id := range last {
		errs = append(errs, fmt.Errorf("the evidence tells of lease %s, which the store does not have", id))
	}
	return errors.Join(errs...)
}
