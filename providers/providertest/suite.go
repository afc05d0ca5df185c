package providertest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
)

// Harness is what a provider brings to the suite.
type Harness struct {
	Driver providers.Driver
	// New sets up what one test needs; what it starts ends with t.Cleanup. It
	// is called once for each test of the suite.
	New func(t *testing.T) Setup
}

// Setup is one outside system and what the suite asks about it.
type Setup struct {
	Config      json.RawMessage   // of the provider; required
	Tool        broker.Tool       // required
	Params      map[string]string // as the tool wants them
	Agent       spiffeid.ID       // zero means some agent
	Certificate [32]byte
	Public      []string         // fields of the secret that are not secret, such as a user name
	TTL         time.Duration    // of the leases; zero means a minute
	Now         func() time.Time // the broker's clock; nil means time.Now

	// Works tells whether the credential is accepted now, by using it where it
	// is to be used. Required.
	Works func(req providers.MintRequest, secret broker.Secret) bool
	// Left tells whether anything of the lease is there outside: alive or
	// dead, but not an inert thing that dies by itself. Nil for a provider
	// that leaves nothing outside.
	Left func(lease broker.LeaseID) bool
	// Until lets time pass until then: it sets the clock, or waits. Nil means
	// that the test cannot wait; what needs it is then not tested.
	Until func(t time.Time)
	// Ending does what the engine does before it asks for an ending: it takes
	// the lease out of active. Nil unless the provider's credentials are
	// checked with the broker. Confirm is then not asked about live ones.
	Ending func(lease broker.LeaseID)
	// DiesLate says that the provider cannot keep an end exactly, and that
	// DiesAt may lie after what was asked.
	DiesLate bool
	// Static says that the secrets were there before their leases and stay: they
	// are the same for all, do not die, and their leases lapse.
	Static bool
}

// Run runs the suite: the contract of package providers, as every provider
// keeps it. It finds out by itself what a provider is (inert, a Planner).
func Run(t *testing.T, h Harness) {
	for _, each := range []struct {
		name string
		test func(*testing.T, *subject)
	}{
		{"Config", testConfig},
		{"Mint", testMint},
		{"NoSecretAtRest", testNoSecretAtRest},
		{"Record", testRecord},
		{"RecordedHandleEnds", testRecordedHandleEnds},
		{"Revoke", testRevoke},
		{"RevokeInOrder", testRevokeInOrder},
		{"NothingMade", testNothingMade},
		{"MalformedHandle", testMalformedHandle},
		{"ConfirmEndsNothing", testConfirmEndsNothing},
		{"DiesByItself", testDiesByItself},
		{"Cancelled", testCancelled},
		{"Concurrent", testConcurrent},
		{"Close", testClose},
	} {
		t.Run(each.name, func(t *testing.T) { each.test(t, open(t, h)) })
	}
}

const suiteInstallation = broker.InstallationID("m00000000conformancesuite0")

// subject is an opened provider with its Setup.
type subject struct {
	Setup
	driver   providers.Driver
	provider providers.Provider
	logged   *buffer
}

func open(t *testing.T, h Harness) *subject {
	t.Helper()
	s := &subject{Setup: h.New(t), driver: h.Driver, logged: &buffer{}}
	if s.Now == nil {
		s.Now = time.Now
	}
	if s.TTL == 0 {
		s.TTL = time.Minute
	}
	if s.Agent.IsZero() {
		s.Agent = spiffeid.RequireFromString("spiffe://conformance.test/agent")
	}
	if s.Tool.MaxTTL == 0 {
		s.Tool.MaxTTL = time.Hour
	}
	p, err := h.Driver.Open(t.Context(), providers.Config{
		Name:         "conformance",
		Installation: suiteInstallation,
		Raw:          s.Config,
		Log:          slog.New(slog.NewJSONHandler(s.logged, &slog.HandlerOptions{Level: slog.LevelDebug})),
		Now:          s.Now,
	})
	if err != nil {
		t.Fatalf("opening provider: %v", err)
	}
	t.Cleanup(func() { p.Close() })
	s.provider = p
	return s
}

// buffer is a log that many goroutines write.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) bytes() []byte {
	b.mu.Lock()
	defer b.mu.Unlock()
	return bytes.Clone(b.b.Bytes())
}

func (s *subject) request() providers.MintRequest {
	now := s.Now()
	return providers.MintRequest{
		Lease:       broker.NewLeaseID(now),
		Agent:       s.Agent,
		Certificate: s.Certificate,
		Tool:        s.Tool,
		Params:      s.Params,
		Now:         now,
		End:         now.Add(s.TTL),
	}
}

// attempt is one Mint as the engine would do it: what was recorded first, what
// came of it.
type attempt struct {
	req      providers.MintRequest
	recorded []providers.Handle // by Plan and by record, in order
	minted   providers.Minted
	err      error
}

func (s *subject) attempt(ctx context.Context, req providers.MintRequest, recordErr error) *attempt {
	a := &attempt{req: req}
	if planner, ok := s.provider.(providers.Planner); ok {
		h, err := planner.Plan(req)
		if err != nil {
			a.err = fmt.Errorf("planning: %w", err)
			return a
		}
		a.recorded = append(a.recorded, h)
	}
	record := func(h providers.Handle) error {
		if recordErr == nil {
			a.recorded = append(a.recorded, slices.Clone(h))
		}
		return recordErr
	}
	if s.provider.Traits().Inert {
		record = nil
	}
	a.minted, a.err = s.provider.Mint(ctx, req, record)
	return a
}

func (s *subject) mint(t *testing.T) *attempt {
	t.Helper()
	a := s.attempt(t.Context(), s.request(), nil)
	if a.err != nil {
		t.Fatalf("minting: %v", a.err)
	}
	return a
}

// ending is the attempt's Ending with the best handle that the engine has.
func (a *attempt) ending() providers.Ending {
	e := providers.Ending{Lease: a.req.Lease, Tool: a.req.Tool.Name, Handle: a.minted.Handle, DiesAt: a.minted.DiesAt}
	if e.Handle == nil && len(a.recorded) > 0 {
		e.Handle = a.recorded[len(a.recorded)-1]
	}
	return e
}

// end revokes until every ending is verified, as the engine does, and fails
// the test if that needs more time than it may take.
func (s *subject) end(t *testing.T, endings ...providers.Ending) {
	t.Helper()
	if s.Ending != nil {
		for _, e := range endings {
			s.Ending(e.Lease)
		}
	}
	deaths := s.provider.Revoke(t.Context(), endings)
	for range 10 {
		if len(deaths) != len(endings) {
			t.Fatalf("%d deaths for %d endings", len(deaths), len(endings))
		}
		var again time.Time
		for i, d := range deaths {
			if d.Err != nil {
				t.Fatalf("revoking ending %d: %v", i, d.Err)
			}
			if s.Static && endings[i].Handle != nil && d.Progress == broker.ProgressVerified {
				t.Fatalf("ending %d is verified, and a static secret stays", i)
			}
			if d.Lapsed && !s.Static {
				t.Fatalf("ending %d lapses, and its secret is not static", i)
			}
			if d.Progress != broker.ProgressVerified && !d.Lapsed {
				if d.RetryAt.IsZero() {
					t.Fatalf("ending %d is %q without an error and without a time to look again", i, d.Progress)
				}
				if d.RetryAt.After(again) {
					again = d.RetryAt
				}
			}
		}
		if again.IsZero() {
			return
		}
		if s.Until == nil {
			t.Fatalf("the ending needs until %s, and the Setup has no Until", again)
		}
		s.Until(again)
		deaths = s.provider.Confirm(t.Context(), endings)
	}
	t.Fatal("the endings are not verified after ten looks")
}

// mustBeDead checks that verified was true.
func (s *subject) mustBeDead(t *testing.T, a *attempt) {
	t.Helper()
	if s.Static {
		return // nobody said that it is
	}
	if !a.minted.Secret.IsZero() && s.Works(a.req, a.minted.Secret) {
		t.Error("its death was verified, and it works")
	}
	if s.Left != nil && s.Left(a.req.Lease) {
		t.Error("its death was verified, and something of it is left outside")
	}
}

func isFieldError(err error) bool {
	var f *providers.FieldError
	return errors.As(err, &f)
}
