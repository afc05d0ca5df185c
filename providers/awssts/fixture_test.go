package awssts

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/awssts/awsscope"
	"github.com/mayfly-security/mayfly/providers/awssts/fakeaws"
)

const (
	account      = "123456789012"
	installation = broker.InstallationID("m00000000conformancesuite0")
)

var agent = spiffeid.RequireFromString("spiffe://acme.test/agent/triage")

// clock is a time that a test sets. The fake's and the broker's are the same
// but for what AWS's is behind.
type clock struct {
	mu     sync.Mutex
	now    time.Time
	behind time.Duration
}

func newClock() *clock { return &clock{now: time.Unix(1_800_000_000, 0)} }

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) AWS() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now.Add(-c.behind)
}

func (c *clock) Set(t time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if t.After(c.now) {
		c.now = t
	}
}

func (c *clock) Advance(d time.Duration) { c.Set(c.Now().Add(d)) }

// records is the broker's store, as far as a provider sees it.
type records struct {
	mu     sync.Mutex
	all    map[broker.LeaseID]providers.Known
	broken error
	cuts   []providers.Cut
}

func (r *records) Cuts(context.Context) ([]providers.Cut, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.cuts), nil
}

func (r *records) setCuts(cuts ...providers.Cut) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.cuts = cuts
}

// fail has the store answer nothing but err from now on; nil ends it.
func (r *records) fail(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.broken = err
}

func (r *records) Known(_ context.Context, begun bool) (all []providers.Known, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, k := range r.all {
		if k.Begun || !begun {
			all = append(all, k)
		}
	}
	if r.broken != nil {
		return nil, r.broken
	}
	return all, nil
}

func (r *records) put(k providers.Known) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.all == nil {
		r.all = map[broker.LeaseID]providers.Known{}
	}
	r.all[k.Lease] = k
}

func (r *records) forget(id broker.LeaseID) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.all, id)
}

// world is a fake AWS and a broker's store.
type world struct {
	t      testing.TB
	clock  *clock
	fake   *fakeaws.Fake
	server *httptest.Server
	store  *records
	driver *Driver
	early  string
	roles  []string
}

type option func(*world, *fakeaws.Config)

func roles(n int) option {
	return func(w *world, _ *fakeaws.Config) {
		w.roles = nil
		for i := range n {
			w.roles = append(w.roles, fmt.Sprintf("crm%d", i))
		}
	}
}

func early(text string) option { return func(w *world, _ *fakeaws.Config) { w.early = text } }

func faking(change func(*fakeaws.Config)) option {
	return func(_ *world, c *fakeaws.Config) { change(c) }
}

func newWorld(t testing.TB, options ...option) *world {
	t.Helper()
	w := &world{t: t, clock: newClock(), store: &records{}, driver: New(nil), early: `{"mode":"deny_list","settle":"2s"}`, roles: []string{"crm0"}}
	var c fakeaws.Config
	for _, o := range options {
		o(w, &c)
	}
	c.Now = w.clock.AWS
	w.fake = fakeaws.New(c, w.roles...)
	w.server = httptest.NewServer(w.fake)
	t.Cleanup(func() {
		w.server.Close()
		for _, problem := range w.fake.Problems() {
			t.Errorf("the fake was asked %s", problem)
		}
	})
	return w
}

func (w *world) config() json.RawMessage {
	return json.RawMessage(fmt.Sprintf(`{"region":"eu-central-1","account":%q,"endpoint_url":%q,"credentials":{"method":"key_file","key_file":%q},"early_revoke":%s}`,
		account, w.server.URL, keyFile(w.t, "AKIABROKER", "broker-secret-key-of-the-tests"), w.early))
}

func keyFile(t testing.TB, id, secret string) string {
	path := filepath.Join(t.TempDir(), "keys.json")
	if err := os.WriteFile(path, fmt.Appendf(nil, `{"access_key_id":%q,"secret_access_key":%q}`, id, secret), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func arn(role string) string { return "arn:aws:iam::" + account + ":role/mayfly/" + role }

func (w *world) tool() broker.Tool {
	var arns []string
	for _, r := range w.roles {
		arns = append(arns, arn(r))
	}
	scope, _ := json.Marshal(map[string]any{"roles": arns, "statements": []any{map[string]any{"Effect": "Allow", "Action": "s3:GetObject", "Resource": "arn:aws:s3:::crm/*"}}})
	return broker.Tool{Name: "crm.read", Provider: "aws", Scope: scope, MaxTTL: time.Hour}
}

func (w *world) open() *provider {
	w.t.Helper()
	p, err := w.driver.Open(w.t.Context(), w.opening("aws"))
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { p.Close() })
	return p.(*provider)
}

// opening is what the engine opens a provider of that name with.
func (w *world) opening(name string) providers.Config {
	return providers.Config{
		Name: name, Installation: installation, Raw: w.config(), Log: slog.New(slog.DiscardHandler), Now: w.clock.Now, Known: w.store.Known, Cuts: w.store.Cuts,
	}
}

// lease is one lease as the engine has it.
type lease struct {
	req    providers.MintRequest
	minted providers.Minted
	key    string
	ending providers.Ending
}

func (w *world) request(ttl time.Duration, incident broker.IncidentID) providers.MintRequest {
	now := w.clock.Now()
	return providers.MintRequest{Lease: broker.NewLeaseID(now), Agent: agent, Tool: w.tool(), Incident: incident, Now: now, End: now.Add(ttl)}
}

func (w *world) try(p *provider, ttl time.Duration, incident broker.IncidentID) (*lease, error) {
	req := w.request(ttl, incident)
	planned, err := p.Plan(req)
	if err != nil {
		return nil, err
	}
	l := &lease{req: req, ending: providers.Ending{Lease: req.Lease, Tool: req.Tool.Name, Handle: planned}}
	w.store.put(providers.Known{Ending: l.ending, Incident: incident})
	if l.minted, err = p.Mint(w.t.Context(), req, func(providers.Handle) error { return nil }); err != nil {
		return l, err
	}
	l.key, _ = l.minted.Secret.Reveal(awsscope.FieldAccessKeyID)
	l.ending.Handle, l.ending.DiesAt = l.minted.Handle, l.minted.DiesAt
	w.store.put(providers.Known{Ending: l.ending, Incident: incident})
	return l, nil
}

func (w *world) mint(p *provider, ttl time.Duration, incident broker.IncidentID) *lease {
	w.t.Helper()
	l, err := w.try(p, ttl, incident)
	if err != nil {
		w.t.Fatal(err)
	}
	return l
}

// revoke ends a lease as the engine does: the store first.
func (w *world) revoke(p *provider, l *lease, cause broker.Cause) providers.Death {
	w.begin(l, cause)
	return p.Revoke(w.t.Context(), []providers.Ending{l.ending})[0]
}

// reconcile compares the lists with what is in IAM, as is done every minute.
func (w *world) reconcile(p *provider) {
	w.t.Helper()
	if err := p.reconcile(w.t.Context()); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) begin(l *lease, cause broker.Cause) {
	w.store.put(providers.Known{Ending: l.ending, Incident: l.req.Incident, Begun: true, Cause: cause})
}

// confirm looks again and again, as the engine does, until the end is verified.
func (w *world) confirm(p *provider, l *lease) providers.Death {
	w.t.Helper()
	for range 100 {
		d := p.Confirm(w.t.Context(), []providers.Ending{l.ending})[0]
		if d.Err != nil || d.Progress == broker.ProgressVerified {
			return d
		}
		w.clock.Set(d.RetryAt)
		w.clock.Advance(time.Millisecond)
	}
	w.t.Fatal("no end is verified")
	return providers.Death{}
}

var _ http.Handler = (*fakeaws.Fake)(nil)

// contextWith is a context to give up with.
func contextWith(t testing.TB) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(cancel)
	return ctx, cancel
}

// waitFor waits until the fake has acted upon so many writes of policies.
func (w *world) waitFor(writes int) {
	w.t.Helper()
	for range 1000 {
		if w.fake.Count("PutRolePolicy") >= writes {
			return
		}
		time.Sleep(time.Millisecond)
	}
	w.t.Fatalf("there were %d writes, not %d", w.fake.Count("PutRolePolicy"), writes)
}
