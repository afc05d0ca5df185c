package providertest

import (
	"context"
	"errors"
	"net/http/httptest"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
)

var modes = []Mode{Planned, Recorded, Asked}

const installation = broker.InstallationID("minstallation0000000000000")

func mintRequest(ttl time.Duration) providers.MintRequest {
	now := time.Now()
	return providers.MintRequest{
		Lease: broker.NewLeaseID(now),
		Agent: spiffeid.RequireFromString("spiffe://test/agent"),
		Tool:  broker.Tool{Name: "thing.use"},
		Now:   now,
		End:   now.Add(ttl),
	}
}

// overWorld opens a provider that reaches s over HTTP.
func overWorld(t *testing.T, s *System, mode Mode) providers.Provider {
	t.Helper()
	server := httptest.NewServer(NewWorld(s))
	t.Cleanup(server.Close)
	p := newProvider(overHTTP(server.URL), mode, installation, providers.Traits{}, "")
	t.Cleanup(func() { p.Close() })
	return p
}

// recorder holds the handle that the engine would have stored by now.
type recorder struct{ handle providers.Handle }

func (r *recorder) record(h providers.Handle) error {
	r.handle = h
	return nil
}

func planned(t *testing.T, p providers.Provider, req providers.MintRequest) *recorder {
	t.Helper()
	r := &recorder{}
	if planner, ok := p.(providers.Planner); ok {
		h, err := planner.Plan(req)
		if err != nil {
			t.Fatal(err)
		}
		r.handle = h
	}
	return r
}

// TestFaults checks, for each mode and way to the System, what is really there
// after each fault, what Mint says of it, and that the handle which the engine
// has by then ends it.
func TestFaults(t *testing.T) {
	type want struct {
		err     bool
		nothing bool // ErrNothingMade
		refused bool
		away    bool
		live    int // credentials
	}
	for _, test := range []struct {
		name  string
		op    Op
		fault Fault
		want  want
	}{
		{"none", OpCreate, Fault{}, want{live: 1}},
		{"slow", OpCreate, Fault{Delay: time.Millisecond}, want{live: 1}},
		{"late but in time", OpCreate, Fault{Late: time.Millisecond}, want{live: 1}},
		{"fail before", OpCreate, Fault{Effect: FailBefore}, want{err: true}},
		{"act then fail", OpCreate, Fault{Effect: ActThenFail}, want{err: true, live: 1}},
		{"act then cut", OpCreate, Fault{Effect: ActThenCut}, want{err: true, live: 1}},
		{"duplicate", OpCreate, Fault{Effect: Duplicate}, want{live: 2}},
		{"refuse", OpCreate, Fault{Effect: Refuse}, want{err: true, nothing: true, refused: true}},
		{"away", OpCreate, Fault{Effect: Away}, want{err: true, nothing: true, away: true}},
		{"session away", OpSession, Fault{Effect: Away}, want{err: true, nothing: true, away: true}},
		{"deaf", OpCreate, Fault{Deaf: time.Millisecond}, want{live: 1}},
		{"session fails", OpSession, Fault{Effect: FailBefore}, want{err: true, nothing: true}},
		{"session lies", OpSession, Fault{Effect: ActThenFail}, want{err: true, nothing: true}},
		{"session refused", OpSession, Fault{Effect: Refuse}, want{err: true, nothing: true, refused: true}},
	} {
		for _, mode := range modes {
			if test.op == OpSession && mode != Recorded {
				continue
			}
			for way, open := range map[string]func(*System) providers.Provider{
				"in process": func(s *System) providers.Provider {
					return NewProvider(s, mode, installation, providers.Traits{})
				},
				"over HTTP": func(s *System) providers.Provider { return overWorld(t, s, mode) },
			} {
				t.Run(test.name+"/"+string(mode)+"/"+way, func(t *testing.T) {
					s := NewSystem(SystemConfig{Script: Rules(1, Rule{Op: test.op, N: 1, Fault: test.fault})})
					p := open(s)
					req := mintRequest(time.Hour)
					r := planned(t, p, req)
					minted, err := p.Mint(t.Context(), req, r.record)
					got := want{err != nil, errors.Is(err, providers.ErrNothingMade), errors.Is(err, providers.ErrRefused), errors.Is(err, providers.ErrAway), len(s.Live())}
					if got != test.want {
						t.Fatalf("mint: %+v (%v), want %+v", got, err, test.want)
					}
					if password, _ := minted.Secret.Reveal("password"); err == nil && !s.Works(password) {
						t.Error("the minted secret does not work")
					}
					for _, c := range s.Live() {
						if c.Lease() != req.Lease {
							t.Errorf("credential of lease %s, want %s", c.Lease(), req.Lease)
						}
					}
					was := s.faults.script
					s.SetScript(Rules(1, Rule{Fault: Fault{Effect: Away}}))
					d := p.Revoke(t.Context(), []providers.Ending{{Lease: req.Lease, Handle: r.handle}})
					if r.handle != nil && !errors.Is(d[0].Err, providers.ErrAway) {
						t.Errorf("revoke while it is away: %+v", d[0])
					}
					s.SetScript(was)
					d = p.Revoke(t.Context(), []providers.Ending{{Lease: req.Lease, Handle: r.handle}})
					if d[0].Err != nil || d[0].Progress != broker.ProgressVerified || len(s.Live()) != 0 {
						t.Errorf("revoke: %+v, %d live", d[0], len(s.Live()))
					}
				})
			}
		}
	}
}

// TestLateCommit: a create that is held while its caller dies, and an ending
// that comes before it lands.
func TestLateCommit(t *testing.T) {
	for _, mode := range modes {
		for way, http := range map[string]bool{"in process": false, "over HTTP": true} {
			t.Run(string(mode)+"/"+way, func(t *testing.T) {
				s := NewSystem(SystemConfig{Script: Rules(1, Rule{Op: OpCreate, Fault: Fault{Held: true}})})
				p := NewProvider(s, mode, installation, providers.Traits{})
				if http {
					p = overWorld(t, s, mode)
				}
				req := mintRequest(time.Hour)
				r := planned(t, p, req)
				ctx, cancel := context.WithCancel(t.Context())
				done := make(chan error)
				go func() {
					_, err := p.Mint(ctx, req, r.record)
					done <- err
				}()
				if err := s.AwaitPending(t.Context()); err != nil {
					t.Fatal(err)
				}
				cancel()
				if err := <-done; err == nil || errors.Is(err, providers.ErrNothingMade) {
					t.Fatalf("mint: %v, want an unknown outcome", err)
				}
				ending := []providers.Ending{{Lease: req.Lease, Handle: r.handle}}
				if d := p.Revoke(t.Context(), ending); d[0].Progress != broker.ProgressVerified {
					t.Fatalf("revoke before it landed: %+v", d[0])
				}
				if s.ReleaseLate() != 1 || s.Pending() != 0 {
					t.Fatal("nothing was held")
				}
				// A session that has ended gives nothing; elsewhere the late one lives.
				want := 1
				if mode == Recorded {
					want = 0
				}
				if n := len(s.Live()); n != want {
					t.Fatalf("%d live after the late commit, want %d", n, want)
				}
				if d := p.Confirm(t.Context(), ending); (d[0].Progress == broker.ProgressVerified) != (want == 0) {
					t.Errorf("confirm after it landed: %+v", d[0])
				}
				p.Revoke(t.Context(), ending)
				if n := len(s.Live()); n != 0 {
					t.Errorf("%d live after the second revoke", n)
				}
			})
		}
	}
}

func TestLateCommitInBubble(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewSystem(SystemConfig{Script: Rules(1, Rule{Op: OpCreate, Fault: Fault{Late: 3 * time.Second}})})
		p := NewProvider(s, Planned, installation, providers.Traits{})
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := p.Mint(ctx, mintRequest(time.Minute), nil); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("mint: %v", err)
		}
		time.Sleep(1999 * time.Millisecond)
		if synctest.Wait(); len(s.Live()) != 0 {
			t.Fatal("it landed early")
		}
		time.Sleep(time.Millisecond)
		if synctest.Wait(); len(s.Live()) != 1 {
			t.Fatal("it did not land")
		}
		time.Sleep(time.Minute)
		if len(s.Live()) != 0 {
			t.Fatal("it did not die by itself")
		}
	})
}
