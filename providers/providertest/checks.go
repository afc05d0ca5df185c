package providertest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
)

func testConfig(t *testing.T, s *subject) {
	if err := s.driver.ValidateConfig(s.Config); err != nil {
		t.Errorf("the configuration is refused: %v", err)
	}
	info, err := s.driver.ValidateScope(s.Config, s.Tool)
	if err != nil {
		t.Fatalf("the scope is refused: %v", err)
	}
	for _, field := range s.mint(t).minted.Secret.Names() {
		if !slices.Contains(info.Fields, field) {
			t.Errorf("the secret has the field %q, and ValidateScope tells of %q", field, info.Fields)
		}
	}
	if info.Static != s.Static {
		t.Errorf("ValidateScope says static: %v", info.Static)
	}
	if info.MinTTL > s.Tool.MaxTTL {
		t.Errorf("MinTTL is %s, more than the tool's maximum of %s", info.MinTTL, s.Tool.MaxTTL)
	}
	for name, raw := range map[string]string{"an unknown field": `{"no_such_field":1}`, "an array": `[]`, "no JSON": `{`} {
		if err := s.driver.ValidateConfig(json.RawMessage(raw)); !isFieldError(err) {
			t.Errorf("a configuration of %s: %v, want a *FieldError", name, err)
		}
		tool := s.Tool
		tool.Scope = json.RawMessage(raw)
		if _, err := s.driver.ValidateScope(s.Config, tool); !isFieldError(err) {
			t.Errorf("a scope of %s: %v, want a *FieldError", name, err)
		}
	}
}

func testMint(t *testing.T, s *subject) {
	a, b := s.mint(t), s.mint(t)
	for _, m := range []*attempt{a, b} {
		if m.minted.Secret.IsZero() {
			t.Error("there is no secret")
		}
		if len(m.minted.Handle) == 0 {
			t.Error("there is no handle")
		}
		if m.minted.Static != s.Static || s.Static && m.minted.Survives == "" {
			t.Errorf("it is said to be static: %v, and survives: %q", m.minted.Static, m.minted.Survives)
		}
		// I8: everything dies by itself, but for what was there before.
		if m.minted.DiesAt.IsZero() != s.Static {
			t.Errorf("it dies by itself at %s", m.minted.DiesAt)
		}
		if m.minted.DiesAt.After(m.req.End) && !s.DiesLate {
			t.Errorf("it dies by itself at %s, after its end %s", m.minted.DiesAt, m.req.End)
		}
		if m.minted.Ends.After(m.req.End) {
			t.Errorf("it ends at %s, later than was asked: %s", m.minted.Ends, m.req.End)
		}
		if !s.Works(m.req, m.minted.Secret) {
			t.Error("it does not work")
		}
	}
	for _, field := range a.minted.Secret.Names() {
		x, _ := a.minted.Secret.Reveal(field)
		y, _ := b.minted.Secret.Reveal(field)
		if x == y && !s.Static && !slices.Contains(s.Public, field) {
			t.Errorf("two leases have the same %s", field)
		}
	}
}

// testNoSecretAtRest: I7.
func testNoSecretAtRest(t *testing.T, s *subject) {
	a := s.mint(t)
	if FindLeak([]byte(fmt.Sprint(a.minted.Secret.RevealAll())), a.minted.Secret, s.Public...) == "" {
		t.Fatal("the secret is too short to be looked for")
	}
	places := map[string][]byte{"handle": a.minted.Handle, "survives": []byte(a.minted.Survives)}
	for i, h := range a.recorded {
		places[fmt.Sprintf("recorded handle %d", i)] = h
	}
	deaths := s.provider.Confirm(t.Context(), []providers.Ending{a.ending()})
	s.end(t, a.ending())
	deaths = append(deaths, s.provider.Revoke(t.Context(), []providers.Ending{a.ending()})...)
	for i, d := range deaths {
		places[fmt.Sprintf("death %d", i)] = fmt.Appendf(nil, "%+v %v", d, d.Err)
	}
	places["minted, printed"] = fmt.Appendf(nil, "%+v %#v", a.minted, a.minted)
	places["log"] = s.logged.bytes()
	for place, text := range places {
		if found := FindLeak(text, a.minted.Secret, s.Public...); found != "" {
			t.Errorf("the secret is in the %s (%s)", place, found)
		}
	}
}

// testRecord: nothing that only a handle can end is made before the handle is
// recorded, and nothing at all if it cannot be.
func testRecord(t *testing.T, s *subject) {
	planner, plans := s.provider.(providers.Planner)
	switch a := s.mint(t); {
	case s.provider.Traits().Inert:
		if plans {
			t.Error("an inert provider needs no plan")
		}
		return
	case len(a.recorded) == 0 || len(a.recorded[0]) == 0:
		t.Fatal("it made a credential, and no handle was recorded before")
	}
	if plans {
		req := s.request()
		first, err := planner.Plan(req)
		again, err2 := planner.Plan(req)
		if err != nil || err2 != nil || string(first) != string(again) {
			t.Errorf("planning twice gives %q and %q (%v, %v)", first, again, err, err2)
		}
		return
	}
	refusal := errors.New("the store is away")
	a := s.attempt(t.Context(), s.request(), refusal)
	if !errors.Is(a.err, refusal) {
		t.Errorf("record failed, and Mint says %v", a.err)
	}
	if !a.minted.Secret.IsZero() {
		t.Error("record failed, and there is a secret")
	}
	if s.Left != nil && s.Left(a.req.Lease) {
		t.Error("record failed, and there is a credential outside")
	}
}

// testRecordedHandleEnds: the first handle that was recorded is enough, as
// after a crash.
func testRecordedHandleEnds(t *testing.T, s *subject) {
	a := s.mint(t)
	if s.provider.Traits().Inert {
		return // nothing is recorded
	}
	if len(a.recorded) == 0 {
		t.Fatal("no handle was recorded")
	}
	s.end(t, providers.Ending{Lease: a.req.Lease, Tool: a.req.Tool.Name, Handle: a.recorded[0]})
	s.mustBeDead(t, a)
}

func testRevoke(t *testing.T, s *subject) {
	a, other := s.mint(t), s.mint(t)
	if deaths := s.provider.Revoke(t.Context(), nil); len(deaths) != 0 {
		t.Errorf("%d deaths of no endings", len(deaths))
	}
	s.end(t, a.ending())
	s.mustBeDead(t, a)
	s.end(t, a.ending()) // what is gone is verified
	s.mustBeDead(t, a)
	if s.Now().Before(other.minted.DiesAt) && !s.Works(other.req, other.minted.Secret) {
		t.Error("another lease was ended with it")
	}
	s.end(t, other.ending())
}

// testRevokeInOrder: one Death for each Ending, in order, whatever is between.
func testRevokeInOrder(t *testing.T, s *subject) {
	a, b := s.mint(t), s.mint(t)
	malformed := providers.Ending{Lease: broker.NewLeaseID(s.Now()), Tool: s.Tool.Name,
		Handle: garbage, DiesAt: s.Now().Add(time.Hour)}
	nothing := providers.Ending{Lease: broker.NewLeaseID(s.Now()), Tool: s.Tool.Name}
	endings := []providers.Ending{a.ending(), malformed, nothing, b.ending()}
	if s.Ending != nil {
		s.Ending(a.req.Lease)
		s.Ending(b.req.Lease)
	}
	deaths := s.provider.Revoke(t.Context(), endings)
	if len(deaths) != len(endings) {
		t.Fatalf("%d deaths for %d endings", len(deaths), len(endings))
	}
	if deaths[1].Err == nil || deaths[1].Progress == broker.ProgressVerified {
		t.Errorf("the malformed handle, second of four: %+v", deaths[1])
	}
	for _, i := range []int{0, 2, 3} {
		if deaths[i].Err != nil {
			t.Errorf("ending %d of four, beside a malformed one: %v", i, deaths[i].Err)
		}
	}
	s.end(t, endings[0], endings[2], endings[3])
	s.mustBeDead(t, a)
	s.mustBeDead(t, b)
}

// testNothingMade: a lease of which nothing was made is verified, by the
// handle that was planned or by none.
func testNothingMade(t *testing.T, s *subject) {
	req := s.request()
	s.end(t, providers.Ending{Lease: req.Lease, Tool: s.Tool.Name})
	if planner, ok := s.provider.(providers.Planner); ok {
		h, err := planner.Plan(req)
		if err != nil {
			t.Fatal(err)
		}
		s.end(t, providers.Ending{Lease: req.Lease, Tool: s.Tool.Name, Handle: h})
	}
}

var garbage = providers.Handle("\x00garbage\xff{")

// testMalformedHandle: deny when in doubt. A handle that cannot be read is an
// error, and no death.
func testMalformedHandle(t *testing.T, s *subject) {
	for _, h := range []providers.Handle{garbage, {}, providers.Handle("{}"), providers.Handle(`{"v":99}`)} {
		endings := []providers.Ending{{Lease: broker.NewLeaseID(s.Now()), Tool: s.Tool.Name, Handle: h, DiesAt: s.Now().Add(time.Hour)}}
		for name, ask := range map[string]func(context.Context, []providers.Ending) []providers.Death{
			"Revoke": s.provider.Revoke, "Confirm": s.provider.Confirm,
		} {
			deaths := ask(t.Context(), endings)
			if len(deaths) != 1 || deaths[0].Err == nil || deaths[0].Progress == broker.ProgressVerified {
				t.Errorf("%s of the handle %q: %+v, want an error", name, h, deaths)
			}
		}
	}
}

func testConfirmEndsNothing(t *testing.T, s *subject) {
	a := s.mint(t)
	for range 2 {
		deaths := s.provider.Confirm(t.Context(), []providers.Ending{a.ending()})
		if len(deaths) != 1 {
			t.Fatalf("%d deaths for one ending", len(deaths))
		}
		if s.Ending == nil && deaths[0].Progress != broker.ProgressNone {
			t.Errorf("a credential that lives, and that nobody ended, is %q", deaths[0].Progress)
		}
	}
	if !s.Works(a.req, a.minted.Secret) {
		t.Error("Confirm ended it")
	}
}

// testDiesByItself: I8, without anybody asking.
func testDiesByItself(t *testing.T, s *subject) {
	a := s.mint(t)
	if s.Static {
		return
	}
	if s.Until == nil {
		t.Log("not tested: the Setup has no Until")
		return
	}
	s.Until(a.minted.DiesAt)
	if s.Works(a.req, a.minted.Secret) {
		t.Errorf("it works at its DiesAt %s", a.minted.DiesAt)
	}
	s.end(t, a.ending()) // and what is left of it can be removed
	s.mustBeDead(t, a)
}

// testCancelled: with a deadline that has passed nothing hangs, and what is
// said is true.
func testCancelled(t *testing.T, s *subject) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	a := s.attempt(ctx, s.request(), nil)
	if a.err != nil {
		if !a.minted.Secret.IsZero() {
			t.Error("an error and a secret")
		}
		if errors.Is(a.err, providers.ErrNothingMade) && s.Left != nil && s.Left(a.req.Lease) {
			t.Errorf("%v, and something is there", a.err)
		}
	}
	live := s.mint(t)
	if s.Ending != nil {
		s.Ending(live.req.Lease)
	}
	for name, ask := range map[string]func(context.Context, []providers.Ending) []providers.Death{
		"Confirm": s.provider.Confirm, "Revoke": s.provider.Revoke,
	} {
		deaths := ask(ctx, []providers.Ending{live.ending()})
		if len(deaths) != 1 {
			t.Fatalf("%s: %d deaths for one ending", name, len(deaths))
		}
		if deaths[0].Progress == broker.ProgressVerified {
			s.mustBeDead(t, live)
		}
	}
	s.end(t, live.ending(), a.ending())
	s.mustBeDead(t, live)
	s.mustBeDead(t, a)
}

func testConcurrent(t *testing.T, s *subject) {
	const workers = 8
	attempts := make([]*attempt, workers)
	var wg sync.WaitGroup
	for i := range workers {
		wg.Go(func() {
			a := s.attempt(t.Context(), s.request(), nil)
			if a.err != nil {
				t.Errorf("minting: %v", a.err)
				return
			}
			attempts[i] = a
			s.provider.Confirm(t.Context(), []providers.Ending{a.ending()})
			s.provider.Traits()
			if i%2 == 0 {
				if s.Ending != nil {
					s.Ending(a.req.Lease)
				}
				s.provider.Revoke(t.Context(), []providers.Ending{a.ending()})
			}
		})
	}
	wg.Wait()
	if t.Failed() {
		return
	}
	var endings []providers.Ending
	for i, a := range attempts {
		if i%2 == 1 && !s.Works(a.req, a.minted.Secret) {
			t.Errorf("lease %d does not work", i)
		}
		endings = append(endings, a.ending())
	}
	s.end(t, endings...)
	for _, a := range attempts {
		s.mustBeDead(t, a)
	}
}

func testClose(t *testing.T, s *subject) {
	for range 3 {
		if err := s.provider.Close(); err != nil {
			t.Errorf("closing: %v", err)
		}
	}
}
