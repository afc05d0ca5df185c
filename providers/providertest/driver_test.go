package providertest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
)

func TestDriverConfig(t *testing.T) {
	inside := Driver{System: NewSystem(SystemConfig{})}
	for _, test := range []struct {
		driver Driver
		config string
		field  string // that is wrong; empty if none is
	}{
		{Driver{}, `{"url":"http://127.0.0.1:1","mode":"planned","mint_timeout":"150ms","late_bound":"1s","batch":2}`, ""},
		{inside, `{"mode":"asked"}`, ""},
		{Driver{}, `{"mode":"planned"}`, "url"},
		{Driver{}, `{"url":"ftp://x","mode":"planned"}`, "url"},
		{inside, `{"url":"http://127.0.0.1:1","mode":"asked"}`, "url"},
		{inside, `{"mode":"hoped"}`, "mode"},
		{inside, `{}`, "mode"},
		{inside, `{"mode":"asked","late_bound":"soon"}`, "late_bound"},
		{inside, `{"mode":"asked","mint_timeout":"-1s"}`, "mint_timeout"},
		{inside, `{"mode":"asked","speed":1}`, "speed"},
	} {
		err := test.driver.ValidateConfig(json.RawMessage(test.config))
		var f *providers.FieldError
		if test.field == "" && err != nil || test.field != "" && (!errors.As(err, &f) || f.Field != test.field) {
			t.Errorf("%s: %v, want an error of %q", test.config, err, test.field)
		}
	}
	p, err := inside.Open(t.Context(), providers.Config{Raw: json.RawMessage(`{"mode":"planned","mint_timeout":"150ms","late_bound":"1s","revoke_timeout":"2s","batch":3,"concurrency":5}`)})
	if err != nil {
		t.Fatal(err)
	}
	want := providers.Traits{MintTimeout: 150 * time.Millisecond, LateBound: time.Second, RevokeTimeout: 2 * time.Second, Batch: 3, Concurrency: 5}
	if p.Traits() != want {
		t.Errorf("traits: %+v, want %+v", p.Traits(), want)
	}
}

// TestAsked walks through the progress of an ending that is only asked for.
func TestAsked(t *testing.T) {
	clock := NewClock(time.Now())
	s := NewSystem(SystemConfig{Now: clock.Now, Settle: 10 * time.Second})
	p := NewProvider(s, Asked, installation, providers.Traits{})
	req := mintRequest(time.Minute)
	m, err := p.Mint(t.Context(), req, nil)
	if err != nil {
		t.Fatal(err)
	}
	ending := []providers.Ending{{Lease: req.Lease, Handle: m.Handle}}
	begin := clock.Now()
	expect := func(d providers.Death, progress broker.Progress, retry time.Duration) {
		t.Helper()
		var at time.Time
		if retry != 0 {
			at = begin.Add(retry)
		}
		if d.Err != nil || d.Progress != progress || !d.RetryAt.Equal(at) {
			t.Errorf("%+v, want %q and %s", d, progress, at)
		}
	}
	expect(p.Confirm(t.Context(), ending)[0], broker.ProgressNone, 0)
	expect(p.Revoke(t.Context(), ending)[0], broker.ProgressRequested, 5*time.Second)
	clock.Advance(5 * time.Second)
	expect(p.Revoke(t.Context(), ending)[0], broker.ProgressWritten, 10*time.Second) // asking again changes nothing
	if len(s.Live()) != 1 {
		t.Error("it died before the ending had settled")
	}
	clock.Advance(5 * time.Second)
	expect(p.Confirm(t.Context(), ending)[0], broker.ProgressVerified, 0)
	if len(s.Live()) != 0 {
		t.Error("it lives after the ending had settled")
	}
}

func TestSystemShortensLife(t *testing.T) {
	s := NewSystem(SystemConfig{MaxTTL: time.Minute})
	p := NewProvider(s, Planned, installation, providers.Traits{})
	req := mintRequest(time.Hour)
	m, err := p.Mint(t.Context(), req, nil)
	if err != nil {
		t.Fatal(err)
	}
	if m.Ends.IsZero() || !m.Ends.Equal(m.DiesAt) || m.Ends.After(req.Now.Add(2*time.Minute)) {
		t.Errorf("ends %s, dies at %s", m.Ends, m.DiesAt)
	}
}

// TestInstallationsAreApart: one installation's handle and lease end nothing of another's.
func TestInstallationsAreApart(t *testing.T) {
	for _, mode := range []Mode{Planned, Asked} {
		s := NewSystem(SystemConfig{})
		mine := NewProvider(s, mode, "mine", providers.Traits{})
		theirs := NewProvider(s, mode, "theirs", providers.Traits{})
		req := mintRequest(time.Hour)
		m, err := mine.Mint(t.Context(), req, nil)
		if err != nil {
			t.Fatal(err)
		}
		d := theirs.Revoke(t.Context(), []providers.Ending{{Lease: req.Lease, Handle: m.Handle}, {Lease: req.Lease}})
		if d[0].Err == nil || len(s.Live()) != 1 {
			t.Errorf("%s: %+v, %d live", mode, d, len(s.Live()))
		}
	}
}

func TestRules(t *testing.T) {
	rules := []Rule{
		{Op: OpEnd, N: 2, Fault: Fault{Effect: Refuse}},
		{Op: OpEnd, Name: "a", Times: 1, Fault: Fault{Effect: ActThenCut}},
		{Op: OpCreate, Probability: 0.5, Fault: Fault{Effect: FailBefore}},
	}
	run := func(seed uint64) (effects []Effect) {
		script := Rules(seed, rules...)
		for n := 1; n <= 3; n++ {
			effects = append(effects, script(Call{Op: OpEnd, N: n, Names: []string{"b", "a"}}).Effect)
		}
		for n := range 64 {
			effects = append(effects, script(Call{Op: OpCreate, N: n}).Effect)
		}
		return effects
	}
	got := run(7)
	if !slices.Equal(got[:3], []Effect{ActThenCut, Refuse, Act}) {
		t.Errorf("ends: %v", got[:3])
	}
	if failed := count(got[3:], FailBefore); failed < 16 || failed > 48 {
		t.Errorf("%d of 64 creates failed with probability 0.5", failed)
	}
	if !slices.Equal(got, run(7)) || slices.Equal(got, run(8)) {
		t.Error("the seed does not decide")
	}
}

func count(effects []Effect, e Effect) (n int) {
	for _, each := range effects {
		if each == e {
			n++
		}
	}
	return n
}

// TestSlowCallerLeaves: a request that is only slow leaves nothing behind when
// its caller leaves, on both ways.
func TestSlowCallerLeaves(t *testing.T) {
	t.Run("in process", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s := NewSystem(SystemConfig{Script: Rules(1, Rule{Fault: Fault{Delay: time.Minute}})})
			p := NewProvider(s, Planned, installation, providers.Traits{})
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			if _, err := p.Mint(ctx, mintRequest(time.Hour), nil); !errors.Is(err, context.DeadlineExceeded) || errors.Is(err, providers.ErrNothingMade) {
				t.Errorf("mint: %v, want an unknown outcome", err)
			}
			time.Sleep(2 * time.Minute)
			if len(s.All()) != 0 {
				t.Error("it was made after its caller had left")
			}
		})
	})
	t.Run("over HTTP", func(t *testing.T) {
		asked := make(chan struct{})
		s := NewSystem(SystemConfig{Script: func(Call) Fault { close(asked); return Fault{Delay: time.Hour} }})
		served := make(chan struct{})
		world := NewWorld(s)
		server := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
			defer close(served)
			world.ServeHTTP(rw, r)
		}))
		defer server.Close()
		p := newProvider(overHTTP(server.URL), Planned, installation, providers.Traits{}, "")
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() {
			_, err := p.Mint(ctx, mintRequest(time.Hour), nil)
			done <- err
		}()
		<-asked
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("mint: %v", err)
		}
		<-served // the World noticed, an hour early
		if len(s.All()) != 0 {
			t.Error("it was made after its caller had left")
		}
	})
}

// TestUse is how something that is not the broker finds out whether a
// credential works.
func TestUse(t *testing.T) {
	s := NewSystem(SystemConfig{})
	server := httptest.NewServer(NewWorld(s))
	defer server.Close()
	p := newProvider(overHTTP(server.URL), Planned, installation, providers.Traits{}, "")
	req := mintRequest(time.Hour)
	m, err := p.Mint(t.Context(), req, nil)
	if err != nil {
		t.Fatal(err)
	}
	use := func(secret string) int {
		r, _ := http.NewRequest(http.MethodGet, server.URL+"/use", nil)
		r.Header.Set("Authorization", "Bearer "+secret)
		response, err := http.DefaultClient.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		response.Body.Close()
		return response.StatusCode
	}
	password, _ := m.Secret.Reveal(fieldPassword)
	if got := use(password); got != http.StatusNoContent {
		t.Errorf("a live secret: %d", got)
	}
	p.Revoke(t.Context(), []providers.Ending{{Lease: req.Lease, Handle: m.Handle}})
	for _, secret := range []string{password, "", "other"} {
		if got := use(secret); got != http.StatusUnauthorized {
			t.Errorf("a secret that does not work: %d", got)
		}
	}
}

// TestManyFaultsAtOnce: under faults of every kind and many callers, ending
// until it is verified leaves nothing alive once no late commit is to come.
func TestManyFaultsAtOnce(t *testing.T) {
	for _, mode := range modes {
		t.Run(string(mode), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				const late = 3 * time.Second
				s := NewSystem(SystemConfig{Settle: time.Second, Script: Rules(42,
					Rule{Probability: 0.15, Fault: Fault{Effect: FailBefore}},
					Rule{Probability: 0.15, Fault: Fault{Effect: ActThenFail}},
					Rule{Probability: 0.15, Fault: Fault{Effect: ActThenCut}},
					Rule{Probability: 0.1, Fault: Fault{Effect: Refuse}},
					Rule{Op: OpCreate, Probability: 0.2, Fault: Fault{Effect: Duplicate}},
					Rule{Op: OpCreate, Probability: 0.3, Fault: Fault{Late: late}},
					Rule{Probability: 0.2, Fault: Fault{Delay: 2 * time.Second}})})
				p := NewProvider(s, mode, installation, providers.Traits{LateBound: late})
				var wg sync.WaitGroup
				for range 50 {
					wg.Go(func() {
						req := mintRequest(time.Hour)
						r := planned(t, p, req)
						ctx, cancel := context.WithTimeout(t.Context(), time.Second)
						defer cancel()
						m, err := p.Mint(ctx, req, r.record)
						if errors.Is(err, providers.ErrNothingMade) {
							time.Sleep(2 * late)
							for _, c := range s.Live() {
								if c.Lease() == req.Lease {
									t.Errorf("%v, and there is one", err)
								}
							}
							return
						}
						if err == nil && string(m.Handle) != string(r.handle) {
							t.Errorf("handle %q, recorded %q", m.Handle, r.handle)
						}
						ending := []providers.Ending{{Lease: req.Lease, Handle: r.handle}}
						for deadline := time.Now().Add(2 * late); ; time.Sleep(500 * time.Millisecond) {
							ask, cancel := context.WithTimeout(t.Context(), 5*time.Second)
							d := p.Revoke(ask, ending)
							cancel()
							if d[0].Progress == broker.ProgressVerified && time.Now().After(deadline) {
								return
							}
						}
					})
				}
				wg.Wait()
				if live := s.Live(); len(live) != 0 || s.Pending() != 0 {
					t.Errorf("%d live, %d to come: %v", len(live), s.Pending(), live)
				}
				if len(s.All()) == 0 {
					t.Error("nothing was ever made")
				}
			})
		})
	}
}

func ExampleRules() {
	s := NewSystem(SystemConfig{Script: Rules(1,
		Rule{Op: OpCreate, N: 1, Fault: Fault{Effect: ActThenFail}})})
	p := NewProvider(s, Planned, "m1", providers.Traits{})
	now := time.Now()
	_, err := p.Mint(context.Background(), providers.MintRequest{Lease: "l1", End: now.Add(time.Minute)}, nil)
	fmt.Println(err)
	fmt.Println(len(s.Live()), "live")
	// Output:
	// creating credential: the outside system answered an error
	// 1 live
}
