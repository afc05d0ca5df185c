package signin_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/mayfly-security/mayfly/attestation"
	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/audit"
	"github.com/mayfly-security/mayfly/broker/signin"
	"github.com/mayfly-security/mayfly/store"
	"github.com/mayfly-security/mayfly/store/bolt"
)

func TestSessionsExpire(t *testing.T) {
	r := newRig(t, func(c *signin.Config) { c.SessionTTL = 10 * time.Minute })
	token, _ := r.signIn()
	r.now = r.now.Add(10*time.Minute - 1)
	r.wantSession(token, "")
	r.late = 1 // the machine's clock is ahead
	r.wantSession(token, broker.ReasonSessionOver)
	r.late = 0
	r.wantSession(token, "")
	r.now = r.now.Add(1)
	r.wantSession(token, broker.ReasonSessionOver)
	if err := r.m.Sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	r.wantSession(token, broker.ReasonSessionOver)
	if diff := cmp.Diff([]string{"expired"}, r.causes()); diff != "" {
		t.Error(diff)
	}
	if left := r.keys(); len(left) != 0 {
		t.Errorf("the store still has %v", left)
	}
}

// keys are the keys of sessions in the store.
func (r *rig) keys() (keys []string) {
	r.t.Helper()
	err := r.store.View(r.t.Context(), func(rd store.Reader) error {
		for e, err := range rd.Scan("session", "sessiont") {
			if err != nil {
				return err
			}
			keys = append(keys, e.Key)
		}
		return nil
	})
	if err != nil {
		r.t.Fatal(err)
	}
	return keys
}

func TestSignOut(t *testing.T) {
	r := newRig(t)
	token, s := r.signIn()
	other, _ := r.signIn()
	changed := r.m.Changed()
	if err := r.m.SignOut(t.Context(), s.Person, "home", "c9"); err != nil {
		t.Fatal(err)
	}
	<-changed
	r.wantSession(token, broker.ReasonSessionOver)
	r.wantSession(other, "")
	err := r.m.SignOut(t.Context(), s.Person, "", "c9")
	wantReason(t, "again", err, broker.ReasonSessionOver)
	p := s.Person
	p.Session = ""
	wantReason(t, "a bearer token", r.m.SignOut(t.Context(), p, "", "c9"), broker.ReasonInvalidArgument)
	wantReason(t, "a reason with a trick", r.m.SignOut(t.Context(), s.Person, "\u202e", "c9"), broker.ReasonInvalidArgument)
	got := r.events()[2]
	got.Sequence = 0
	want := audit.Event{Time: r.now, Type: audit.SessionEnded, Actor: "person:ada@acme.test", Cause: "signed_out", Reason: "home", Correlation: "c9",
		Details: map[string]string{"session": string(s.Person.Session), "person": "person:ada@acme.test"}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

// TestEndSessions ends everything of one person, and nothing of one whose name
// begins alike.
func TestEndSessions(t *testing.T) {
	r := newRig(t)
	var tokens []string
	for range 3 {
		token, _ := r.signIn()
		tokens = append(tokens, token)
	}
	r.idp.person.Name, r.idp.person.Subject = "ada@acme.test.evil", "u2"
	alike, _ := r.signIn()
	n, err := r.m.EndSessions(t.Context(), "person:olga", "ada@acme.test", "she left", "c1")
	if err != nil || n != 3 {
		t.Errorf("%d ended, %v", n, err)
	}
	for _, token := range tokens {
		r.wantSession(token, broker.ReasonSessionOver)
	}
	r.wantSession(alike, "")
	for _, name := range []string{"", strings.Repeat("a", 201)} {
		_, err := r.m.EndSessions(t.Context(), "person:olga", name, "", "c1")
		wantReason(t, name, err, broker.ReasonInvalidArgument)
	}
	if n, err := r.m.EndSessions(t.Context(), "person:olga", "nobody", "", "c1"); n != 0 || err != nil {
		t.Errorf("nobody's: %d, %v", n, err)
	}
}

// TestEndSessionsEndsTokens: a token of the identity provider's that was made
// before a person's sessions were ended is over with them, and so is a code that
// waits to be redeemed. What the person does after is not.
func TestEndSessionsEndsTokens(t *testing.T) {
	for name, restart := range map[string]bool{"": false, "and the broker starts again": true, "while the store cannot be written": false} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			r.idp.until = r.now.Add(6 * time.Hour)
			r.wantSession("good.token", "")
			code := r.code()
			r.now = r.now.Add(time.Second)
			changed := r.m.Changed()
			broken := strings.Contains(name, "store")
			r.store.set(broken)
			n, err := r.m.EndSessions(t.Context(), "person:olga", "ada@acme.test", "laptop stolen", "c1")
			if n != 0 || (err != nil) != broken {
				t.Fatal(n, err)
			}
			select {
			case <-changed:
			default:
				t.Error("streams that live on a token do not hear of it")
			}
			if restart {
				r.restart()
			}
			r.wantSession("good.token", broker.ReasonTokenInvalid)
			r.wantSession("good.token.written.otherwise", broker.ReasonTokenInvalid)
			if !restart { // sign-ins under way are in memory
				_, err = r.redeem(code)
				wantReason(t, "a code of before", err, broker.ReasonSignIn)
			}
			r.store.set(false)
			if err := r.m.Sweep(t.Context()); err != nil {
				t.Fatal(err)
			}
			r.restart()
			r.wantSession("good.token", broker.ReasonTokenInvalid)
			var ended []audit.Event
			for _, e := range r.events() {
				if e.Type == audit.SessionEnded {
					ended = append(ended, e)
				}
			}
			if len(ended) != 1 || ended[0].Cause != "ended" || ended[0].Reason != "laptop stolen" || ended[0].Actor != "person:olga" || ended[0].Details["person"] != "person:ada@acme.test" {
				t.Errorf("the evidence: %+v", ended)
			}

			token, _ := r.signIn()
			r.wantSession(token, "")
			r.idp.person.IssuedAt = r.now.Add(time.Minute) // the identity provider's clock may be ahead by as much
			r.wantSession("good.early", broker.ReasonTokenInvalid)
			r.idp.person.IssuedAt = r.now.Add(time.Minute + time.Second)
			r.now = r.now.Add(2 * time.Minute)
			r.wantSession("good.new", "")
			r.idp.person.Name, r.idp.person.Subject, r.idp.person.IssuedAt = "ada@acme.test.evil", "u2", r.now.Add(-time.Hour)
			r.wantSession("good.alike", "")

			// It is forgotten when no such token is taken any more.
			r.now = r.now.Add(13 * time.Hour)
			r.idp.until = r.now.Add(time.Hour)
			r.wantSession("good.token", broker.ReasonTokenInvalid)
			if err := r.m.Sweep(t.Context()); err != nil {
				t.Fatal(err)
			}
			if keys := r.keys(); len(keys) != 0 {
				t.Errorf("left behind: %v", keys)
			}
		})
	}
}

// TestOldTokens: a token is taken for as long as a session may last, and no
// longer, whatever it says itself.
func TestOldTokens(t *testing.T) {
	r := newRig(t)
	r.idp.until = r.now.Add(30 * 24 * time.Hour)
	r.now = r.now.Add(signin.MaxSessionTTL - time.Second)
	p, until, err := r.m.Authenticate(t.Context(), "good.token")
	if err != nil || !until.Equal(r.now.Add(time.Second)) {
		t.Errorf("%v, %s, %v", p, until, err)
	}
	r.now = r.now.Add(time.Second)
	r.wantSession("good.token", broker.ReasonTokenInvalid)
}

// TestAStoreThatCannotBeWritten: nothing begins without evidence, and what ends
// is over at once.
func TestAStoreThatCannotBeWritten(t *testing.T) {
	r := newRig(t)
	token, s := r.signIn()
	code := r.code()
	r.store.set(true)
	_, err := r.redeem(code)
	wantReason(t, "a new session", err, broker.ReasonStore)
	wantReason(t, "the sign-out", r.m.SignOut(t.Context(), s.Person, "", "c1"), broker.ReasonStore)
	r.wantSession(token, broker.ReasonSessionOver)
	if err := r.m.Sweep(t.Context()); !errors.Is(err, store.ErrUnavailable) {
		t.Errorf("the sweep: %v", err)
	}
	r.wantSession(token, broker.ReasonSessionOver)
	r.store.set(false)
	if err := r.m.Sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	r.wantSession(token, broker.ReasonSessionOver)
	if diff := cmp.Diff([]string{"signed_out"}, r.causes()); diff != "" {
		t.Error(diff)
	}
}

// TestGroupsAreThoseOfTheLastSignIn: a session from before does not keep a
// group that the identity provider has taken away since.
func TestGroupsAreThoseOfTheLastSignIn(t *testing.T) {
	r := newRig(t)
	r.idp.person.Groups = []string{"finance", "support"}
	old, _ := r.signIn()
	r.idp.person.Groups = []string{"support"}
	r.signIn()
	p, _, err := r.m.Authenticate(t.Context(), old)
	if err != nil || p.In("finance") || !p.In("support") {
		t.Errorf("%v, %v", p.Groups, err)
	}
}

func TestSessionsOfOnePersonAreBounded(t *testing.T) {
	r := newRig(t)
	var tokens []string
	for range signin.MaxSessions + 3 {
		r.now = r.now.Add(time.Second) // the order of sessions is that of time
		token, _ := r.signIn()
		tokens = append(tokens, token)
	}
	for i, token := range tokens {
		want := broker.Reason("")
		if i < 3 {
			want = broker.ReasonSessionOver
		}
		_, _, err := r.m.Authenticate(t.Context(), token)
		wantReason(t, fmt.Sprint("session ", i), err, want)
	}
	if diff := cmp.Diff([]string{"too_many", "too_many", "too_many"}, r.causes()); diff != "" {
		t.Error(diff)
	}
}

func TestBearerTokens(t *testing.T) {
	r := newRig(t)
	for range 3 {
		p, until, err := r.m.Authenticate(t.Context(), "good.token.x")
		if err != nil || p.Method != broker.SignInBearer || p.Session != "" || !until.Equal(r.idp.until) {
			t.Errorf("%+v %v %v", p, until, err)
		}
	}
	if r.idp.asked != 3 || len(r.seen) != 1 {
		t.Errorf("verified %d times, told %d times", r.idp.asked, len(r.seen))
	}
	for token, want := range map[string]broker.Reason{
		"":                        broker.ReasonUnauthenticated,
		"forged":                  broker.ReasonTokenInvalid,
		"mayfly_session_":         broker.ReasonSessionOver,
		"mayfly_session_forged":   broker.ReasonSessionOver,
		strings.Repeat("a", 8193): broker.ReasonTokenInvalid,
	} {
		_, _, err := r.m.Authenticate(t.Context(), token)
		wantReason(t, token, err, want)
	}
	r.deny = broker.Refuse(broker.ReasonStore, "no", "no")
	_, _, err := r.m.Authenticate(t.Context(), "good.other")
	wantReason(t, "an engine that does not hear of the person", err, broker.ReasonStore)
	r.deny = nil
	r.late = time.Hour
	_, _, err = r.m.Authenticate(t.Context(), "good.token.x")
	wantReason(t, "a token that is over by the later clock", err, broker.ReasonTokenInvalid)
	r.late = 0
	r.idp.person.Name = "a|b"
	_, _, err = r.m.Authenticate(t.Context(), "good.token.y")
	wantReason(t, "a name that divides keys", err, broker.ReasonSignIn)
}

func TestDevice(t *testing.T) {
	r := newRig(t)
	r.idp.device = attestation.DeviceSignIn{UserCode: "ABCD", VerificationURI: "https://idp.test/device", ExpiresAt: r.now.Add(5 * time.Minute), Interval: 5 * time.Second}
	r.idp.pending = 1
	d, err := r.m.StartDevice(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	handle, _ := d.Handle.Reveal("handle")
	poll := func() (signin.Session, error) { return r.m.PollDevice(t.Context(), handle, "c1") }
	_, err = poll()
	wantReason(t, "before the person is done", err, broker.ReasonSignInPending)
	_, err = poll()
	wantReason(t, "too fast", err, broker.ReasonSignInPending)
	if r.idp.asked != 1 {
		t.Errorf("the identity provider was asked %d times", r.idp.asked)
	}
	r.now = r.now.Add(5 * time.Second)
	s, err := poll()
	if err != nil || s.Person.Method != broker.SignInDevice {
		t.Fatalf("%+v, %v", s.Person, err)
	}
	token, _ := s.Token.Reveal("token")
	if p, _, err := r.m.Authenticate(t.Context(), token); err != nil || p.Method != broker.SignInDevice {
		t.Errorf("%+v, %v", p, err)
	}
	r.now = r.now.Add(5 * time.Second)
	_, err = poll()
	wantReason(t, "after it", err, broker.ReasonSignIn)

	for name, change := range map[string]func(){
		"the person said no": func() { r.idp.err = broker.Refuse(broker.ReasonSignIn, "no", "no") },
		"no name":            func() { r.idp.person.Name = "" },
		"over":               func() { r.now = r.now.Add(10 * time.Minute) },
	} {
		r = newRig(t)
		d, err := r.m.StartDevice(t.Context(), "")
		if err != nil {
			t.Fatal(err)
		}
		if d.ExpiresAt.After(r.now.Add(10*time.Minute)) || d.Interval != time.Second {
			t.Errorf("a provider that says neither: %v, %v", d.ExpiresAt, d.Interval)
		}
		handle, _ = d.Handle.Reveal("handle")
		change()
		for range 2 {
			_, err = poll()
			wantReason(t, name, err, broker.ReasonSignIn)
			r.now = r.now.Add(time.Second)
		}
	}
	r.idp.noCodes = true
	_, err = r.m.StartDevice(t.Context(), "")
	wantReason(t, "a provider without device codes", err, broker.ReasonSignIn)
	_, err = r.m.PollDevice(t.Context(), "x", "c1")
	wantReason(t, "a handle that nobody gave", err, broker.ReasonSignIn)
}

// TestNoSecretInTheStore: of a session the store has the digest of its token,
// and of a sign-in nothing.
func TestNoSecretInTheStore(t *testing.T) {
	dir := t.TempDir()
	db, err := bolt.Open(filepath.Join(dir, "mayfly.db"), bolt.Config{MmapSize: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	r := newRig(t, func(c *signin.Config) { c.Store = db })
	code := r.code()
	s, err := r.redeem(code)
	if err != nil {
		t.Fatal(err)
	}
	token, _ := s.Token.Reveal("token")
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	file, err := os.ReadFile(filepath.Join(dir, "mayfly.db"))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(file, []byte(s.Person.Session)) {
		t.Fatal("this is not the store")
	}
	for what, secret := range map[string]string{"token": token, "the token's random part": token[len(token)-43:], "code": code, "verifier": verifier} {
		if bytes.Contains(file, []byte(secret)) {
			t.Errorf("the %s is in the store", what)
		}
	}
	if text := fmt.Sprintf("%v %+v %#v", s, s, s); strings.Contains(text, token) {
		t.Error("a session prints its token")
	}
}

// TestEndAll: the sessions of a store that came back from a backup are over.
func TestEndAll(t *testing.T) {
	r := newRig(t)
	var tokens []string
	for i := range 2 * signin.MaxSessions {
		r.idp.person.Name, r.idp.person.Subject = fmt.Sprint("p", i), fmt.Sprint(i)
		token, _ := r.signIn()
		tokens = append(tokens, token)
	}
	r.wantSession("good.token", "")
	n, err := signin.EndAll(t.Context(), r.store, r.now)
	if err != nil || n != len(tokens) {
		t.Fatalf("%d, %v", n, err)
	}
	for _, token := range tokens {
		r.wantSession(token, broker.ReasonSessionOver)
	}
	r.wantSession("good.token", broker.ReasonTokenInvalid)
	if c := slices.Compact(r.causes()); !slices.Equal(c, []string{"store_restored"}) {
		t.Errorf("causes: %v", c)
	}
	if n, err := signin.EndAll(t.Context(), r.store, r.now); err != nil || n != 0 {
		t.Errorf("again: %d, %v", n, err)
	}
}

func TestNewRefuses(t *testing.T) {
	good := func() signin.Config {
		var c signin.Config
		newRig(t, func(rc *signin.Config) { c = *rc })
		return c
	}
	for name, change := range map[string]func(*signin.Config){
		"no store":           func(c *signin.Config) { c.Store = nil },
		"no provider":        func(c *signin.Config) { c.Provider = nil },
		"no log":             func(c *signin.Config) { c.Log = nil },
		"no clock":           func(c *signin.Config) { c.Now = nil },
		"nobody to tell":     func(c *signin.Config) { c.PersonSeen = nil },
		"sessions too long":  func(c *signin.Config) { c.SessionTTL = 12*time.Hour + 1 },
		"sessions too short": func(c *signin.Config) { c.SessionTTL = -1 },
	} {
		c := good()
		change(&c)
		if m, err := signin.New(c); err == nil {
			m.Close()
			t.Errorf("%s: no error", name)
		}
	}
}

func TestMetrics(t *testing.T) {
	reg := prometheus.NewRegistry()
	r := newRig(t, func(c *signin.Config) { c.Metrics = reg })
	r.signIn()
	r.begin(start())
	if _, err := r.m.Redeem(context.Background(), "x", verifier, loopback, "c1"); err == nil {
		t.Fatal("no error")
	}
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]float64{}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			name := f.GetName()
			for _, l := range m.GetLabel() {
				name += " " + l.GetValue()
			}
			got[name] = m.GetCounter().GetValue() + m.GetGauge().GetValue()
		}
	}
	want := map[string]float64{"mayfly_sessions": 1, "mayfly_sign_ins_pending": 1, "mayfly_sign_ins_total browser ok": 1, "mayfly_sign_ins_total browser unknown": 1}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}
