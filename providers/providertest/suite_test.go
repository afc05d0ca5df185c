package providertest

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
)

// TestConformance runs the suite on every mode, within the process and over HTTP.
func TestConformance(t *testing.T) {
	for _, mode := range modes {
		t.Run(string(mode)+"/in process", func(t *testing.T) { Run(t, inProcessHarness(mode, nil)) })
		t.Run(string(mode)+"/over HTTP", func(t *testing.T) {
			Run(t, Harness{
				Driver: Driver{},
				New: func(t *testing.T) Setup {
					clock := NewClock(time.Now())
					s := NewSystem(SystemConfig{Now: clock.Now, Settle: 10 * time.Second})
					server := httptest.NewServer(NewWorld(s))
					t.Cleanup(server.Close)
					return setup(s, clock, fmt.Sprintf(`{"url":%q,"mode":%q}`, server.URL, mode))
				},
			})
		})
	}
	t.Run("asked, and never done", func(t *testing.T) {
		Run(t, Harness{
			Driver: Driver{},
			New: func(t *testing.T) Setup {
				clock := NewClock(time.Now())
				s := NewSystem(SystemConfig{Now: clock.Now, Settle: -1})
				server := httptest.NewServer(NewWorld(s))
				t.Cleanup(server.Close)
				return setup(s, clock, fmt.Sprintf(`{"url":%q,"mode":"asked"}`, server.URL))
			},
		})
	})
}

func setup(s *System, clock *Clock, config string) Setup {
	return Setup{
		Config: json.RawMessage(config),
		Tool:   broker.Tool{Name: "thing.use", Scope: json.RawMessage(`{}`)},
		Public: []string{fieldUsername},
		Now:    clock.Now,
		Until:  clock.AdvanceTo,
		Works: func(_ providers.MintRequest, secret broker.Secret) bool {
			password, _ := secret.Reveal(fieldPassword)
			return s.Works(password)
		},
		Left: func(lease broker.LeaseID) bool {
			for _, c := range s.Live() {
				if c.Lease() == lease {
					return true
				}
			}
			return false
		},
	}
}

// inProcessHarness has a fresh System for each test, and may break the provider.
func inProcessHarness(mode Mode, broken func(providers.Provider) providers.Provider) Harness {
	d := &breakingDriver{broken: broken}
	return Harness{
		Driver: d,
		New: func(*testing.T) Setup {
			clock := NewClock(time.Now())
			s := NewSystem(SystemConfig{Now: clock.Now, Settle: 10 * time.Second})
			d.System = s
			return setup(s, clock, fmt.Sprintf(`{"mode":%q}`, mode))
		},
	}
}

// breakingDriver is Driver, and breaks what it opens.
type breakingDriver struct {
	Driver
	broken func(providers.Provider) providers.Provider
}

func (d *breakingDriver) Open(ctx context.Context, c providers.Config) (providers.Provider, error) {
	p, err := d.Driver.Open(ctx, c)
	if err == nil && d.broken != nil {
		p = d.broken(p)
	}
	return p, err
}

// wrong is a provider with one method broken. It is in mode Recorded, and so
// no Planner.
type wrong struct {
	providers.Provider
	mint    func(p providers.Provider, req providers.MintRequest, record func(providers.Handle) error) (providers.Minted, error)
	revoke  func(p providers.Provider, endings []providers.Ending) []providers.Death
	confirm func(p providers.Provider, endings []providers.Ending) []providers.Death
}

func (w wrong) Mint(ctx context.Context, req providers.MintRequest, record func(providers.Handle) error) (providers.Minted, error) {
	if w.mint == nil {
		return w.Provider.Mint(ctx, req, record)
	}
	return w.mint(w.Provider, req, record)
}

func (w wrong) Revoke(ctx context.Context, endings []providers.Ending) []providers.Death {
	if w.revoke == nil {
		return w.Provider.Revoke(ctx, endings)
	}
	return w.revoke(w.Provider, endings)
}

func (w wrong) Confirm(ctx context.Context, endings []providers.Ending) []providers.Death {
	if w.confirm == nil {
		return w.Provider.Confirm(ctx, endings)
	}
	return w.confirm(w.Provider, endings)
}

// changed breaks what Mint returns.
func changed(change func(*providers.Minted)) wrong {
	return wrong{mint: func(p providers.Provider, req providers.MintRequest, record func(providers.Handle) error) (providers.Minted, error) {
		m, err := p.Mint(context.Background(), req, record)
		if err == nil {
			change(&m)
		}
		return m, err
	}}
}

func verifyAll(_ providers.Provider, endings []providers.Ending) []providers.Death {
	deaths := make([]providers.Death, len(endings))
	for i := range deaths {
		deaths[i].Progress = broker.ProgressVerified
	}
	return deaths
}

// breaches are the ways of breaking the contract that the suite must notice,
// and the test of the suite that does.
var breaches = map[string]struct {
	wrong wrong
	in    string
}{
	"never dies by itself": {changed(func(m *providers.Minted) { m.DiesAt = time.Time{} }), "Mint"},
	"dies after its end":   {changed(func(m *providers.Minted) { m.DiesAt = m.DiesAt.Add(time.Second) }), "Mint"},
	"no secret":            {changed(func(m *providers.Minted) { m.Secret = broker.Secret{} }), "Mint"},
	"no handle":            {changed(func(m *providers.Minted) { m.Handle = nil }), "Mint"},
	"field untold": {changed(func(m *providers.Minted) {
		all := m.Secret.RevealAll()
		all["other"] = all[fieldPassword]
		m.Secret = broker.NewSecret(all)
	}), "Config"},
	"secret in handle": {changed(func(m *providers.Minted) {
		password, _ := m.Secret.Reveal(fieldPassword)
		m.Handle = append(m.Handle, fmt.Sprintf("%x", password)...)
	}), "NoSecretAtRest"},
	"record is not called": {wrong{mint: func(p providers.Provider, req providers.MintRequest, _ func(providers.Handle) error) (providers.Minted, error) {
		return p.Mint(context.Background(), req, func(providers.Handle) error { return nil })
	}}, "Record"},
	"record is called too late": {wrong{mint: func(p providers.Provider, req providers.MintRequest, record func(providers.Handle) error) (providers.Minted, error) {
		m, err := p.Mint(context.Background(), req, func(providers.Handle) error { return nil })
		if err != nil {
			return m, err
		}
		if err := record(m.Handle); err != nil {
			return providers.Minted{}, err
		}
		return m, nil
	}}, "Record"},
	"record's error is ignored": {wrong{mint: func(p providers.Provider, req providers.MintRequest, record func(providers.Handle) error) (providers.Minted, error) {
		return p.Mint(context.Background(), req, func(h providers.Handle) error { record(h); return nil })
	}}, "Record"},
	"recorded handle of no use": {wrong{mint: func(p providers.Provider, req providers.MintRequest, record func(providers.Handle) error) (providers.Minted, error) {
		return p.Mint(context.Background(), req, func(providers.Handle) error {
			return record(providers.Handle("accessor-" + strings.Repeat("0", 32)))
		})
	}}, "RecordedHandleEnds"},
	"claims death": {wrong{revoke: verifyAll}, "Revoke"},
	"fewer deaths": {wrong{revoke: func(p providers.Provider, endings []providers.Ending) []providers.Death {
		return p.Revoke(context.Background(), endings)[:max(0, len(endings)-1)]
	}}, "RevokeInOrder"},
	"deaths out of order": {wrong{revoke: func(p providers.Provider, endings []providers.Ending) []providers.Death {
		d := p.Revoke(context.Background(), endings)
		if len(d) > 1 {
			d[0], d[1] = d[1], d[0]
		}
		return d
	}}, "RevokeInOrder"},
	"gone is an error": {wrong{revoke: func(p providers.Provider, endings []providers.Ending) []providers.Death {
		before := p.Confirm(context.Background(), endings)
		d := p.Revoke(context.Background(), endings)
		for i := range d {
			if before[i].Progress == broker.ProgressVerified {
				d[i] = providers.Death{Err: fmt.Errorf("not found")}
			}
		}
		return d
	}}, "Revoke"},
	"malformed is dead": {wrong{confirm: verifyAll}, "MalformedHandle"},
	"confirm ends": {wrong{confirm: func(p providers.Provider, endings []providers.Ending) []providers.Death {
		d := p.Confirm(context.Background(), endings)
		p.Revoke(context.Background(), endings)
		return d
	}}, "ConfirmEndsNothing"},
	"cancelled is dead": {wrong{}, "Cancelled"}, // see TestBreach
}

// cancelledIsDead claims death where it could not ask.
type cancelledIsDead struct{ providers.Provider }

func (p cancelledIsDead) Revoke(ctx context.Context, endings []providers.Ending) []providers.Death {
	if ctx.Err() != nil {
		return verifyAll(p, endings)
	}
	return p.Provider.Revoke(ctx, endings)
}

const breachVariable = "PROVIDERTEST_BREACH"

// TestBreach runs the suite on a broken provider if the environment names one,
// and then must fail. It is TestSuiteNotices that names one.
func TestBreach(t *testing.T) {
	name := os.Getenv(breachVariable)
	if name == "" {
		return
	}
	Run(t, inProcessHarness(Recorded, func(p providers.Provider) providers.Provider {
		if name == "cancelled is dead" {
			return cancelledIsDead{p}
		}
		w := breaches[name].wrong
		w.Provider = p
		return w
	}))
}

// TestSuiteNotices runs the suite on providers that break the contract, each
// in a process of its own, and checks that the right test fails.
func TestSuiteNotices(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for name, breach := range breaches {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			command := exec.Command(self, "-test.run=^TestBreach$", "-test.timeout=30s")
			command.Env = append(os.Environ(), breachVariable+"="+name)
			out, err := command.CombinedOutput()
			if err == nil || !strings.Contains(string(out), "--- FAIL: TestBreach/"+breach.in+" ") {
				t.Errorf("TestBreach/%s did not notice (%v):\n%s", breach.in, err, out)
			}
			if strings.Contains(string(out), "panic:") {
				t.Errorf("the suite panicked:\n%s", out)
			}
		})
	}
}

// TestWorldAway: what never left is certain to have made nothing, and an
// ending that could not be asked for is no death.
func TestWorldAway(t *testing.T) {
	server := httptest.NewServer(http.NotFoundHandler())
	url := server.URL
	server.Close()
	for _, mode := range modes {
		p := newProvider(overHTTP(url), mode, installation, providers.Traits{}, "")
		req := mintRequest(time.Minute)
		r := planned(t, p, req)
		if _, err := p.Mint(t.Context(), req, r.record); err == nil || !strings.Contains(err.Error(), providers.ErrNothingMade.Error()) {
			t.Errorf("%s: mint: %v", mode, err)
		}
		handle := r.handle
		if handle == nil {
			handle = providers.Handle("accessor-" + strings.Repeat("0", 32))
		}
		d := p.Revoke(t.Context(), []providers.Ending{{Lease: req.Lease, Handle: handle}})
		if d[0].Err == nil || d[0].Progress != broker.ProgressNone {
			t.Errorf("%s: revoke: %+v", mode, d[0])
		}
	}
}
