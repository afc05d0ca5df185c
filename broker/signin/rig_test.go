package signin_test

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"log/slog"
	"net/url"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mayfly-security/mayfly/attestation"
	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/audit"
	"github.com/mayfly-security/mayfly/broker/signin"
	"github.com/mayfly-security/mayfly/store"
	"github.com/mayfly-security/mayfly/store/bolt"
)

const (
	loopback = "http://127.0.0.1:54321/callback"
	verifier = "a-verifier-of-the-program-that-is-long-enough-0123456789"
)

func challengeOf(verifier string) string {
	sum := sha256.Sum256([]byte(verifier))
	return base64.RawURLEncoding.EncodeToString(sum[:])
}

// scripted is an identity provider that says what a test wants: the real ones
// cannot be made to say most of it. Those are tested with the broker's server.
type scripted struct {
	mu      sync.Mutex
	person  broker.Person
	err     error // of all that is asked
	pending int   // so many polls are answered ErrPending
	asked   int
	nonces  map[string]bool // that AuthCodeURL was given
	device  attestation.DeviceSignIn
	noCodes bool
	away    bool      // nobody can sign in with a browser
	named   bool      // it says that its answers name it
	until   time.Time // of bearer tokens
}

func (s *scripted) Issuer() string  { return "https://idp.test" }
func (s *scripted) Sample() bool    { return false }
func (s *scripted) CanDevice() bool { return !s.noCodes }

func (s *scripted) AuthCodeURL(state, nonce, verifier string, need broker.StepUp) string {
	if s.nonces == nil {
		s.nonces = map[string]bool{}
	}
	if s.away {
		return ""
	}
	s.nonces[nonce] = true
	return "https://idp.test/authorize?" + url.Values{"state": {state}}.Encode()
}

func (s *scripted) CheckResponse(_ context.Context, iss string) error {
	if iss != s.Issuer() && (iss != "" || s.named) {
		return broker.Refuse(broker.ReasonSignIn, "another's answer", "begin again")
	}
	return nil
}

func (s *scripted) answer() (broker.Person, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked++
	if s.pending > 0 {
		s.pending--
		return broker.Person{}, attestation.ErrPending
	}
	return s.person, s.err
}

func (s *scripted) Exchange(_ context.Context, code, verifier, nonce string, _ time.Time) (broker.Person, error) {
	if code != "idp-code" || !s.nonces[nonce] || len(verifier) < 43 {
		return broker.Person{}, errors.New("not what it was given")
	}
	return s.answer()
}

func (s *scripted) StartDevice(context.Context, time.Time) (attestation.DeviceSignIn, error) {
	return s.device, s.err
}

func (s *scripted) PollDevice(context.Context, attestation.DeviceSignIn, time.Time) (broker.Person, error) {
	return s.answer()
}

func (s *scripted) VerifyBearer(_ context.Context, raw string, _ time.Time) (broker.Person, time.Time, error) {
	if !strings.HasPrefix(raw, "good") {
		return broker.Person{}, time.Time{}, broker.Refuse(broker.ReasonTokenInvalid, "forged", "get another")
	}
	p, err := s.answer()
	return p, s.until, err
}

func (s *scripted) VerifyUser(context.Context, string, time.Time) (broker.User, string, time.Time, error) {
	return broker.User{}, "", time.Time{}, errors.New("not used here")
}

// breakable is a store that can stop being written.
type breakable struct {
	store.Store
	mu     sync.Mutex
	broken bool
}

func (b *breakable) set(broken bool) { b.mu.Lock(); defer b.mu.Unlock(); b.broken = broken }

func (b *breakable) Update(ctx context.Context, fn func(store.Txn) error) error {
	b.mu.Lock()
	broken := b.broken
	b.mu.Unlock()
	if broken {
		return store.ErrUnavailable
	}
	return b.Store.Update(ctx, fn)
}

// rig is a Manager on a real store, with a clock that a test sets.
type rig struct {
	t     *testing.T
	idp   *scripted
	store *breakable
	m     *signin.Manager
	now   time.Time
	late  time.Duration // how far the machine's clock is ahead
	seen  []broker.Person
	deny  error // of PersonSeen
	cfg   signin.Config
}

func newRig(t *testing.T, change ...func(*signin.Config)) *rig {
	t.Helper()
	db, err := bolt.Open(filepath.Join(t.TempDir(), "mayfly.db"), bolt.Config{MmapSize: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	r := &rig{t: t, store: &breakable{Store: db}, now: time.Date(2026, 5, 6, 7, 8, 9, 0, time.UTC)}
	r.idp = &scripted{person: broker.Person{Name: "ada@acme.test", Issuer: "https://idp.test", Subject: "u1", Groups: []string{"support-leads"}, AuthTime: r.now, IssuedAt: r.now},
		until: r.now.Add(time.Hour)}
	cfg := signin.Config{
		Store: r.store, Provider: r.idp, Log: slog.New(slog.DiscardHandler),
		Now: func() time.Time { return r.now }, Late: func() time.Time { return r.now.Add(r.late) },
		PersonSeen: func(_ context.Context, p broker.Person) error { r.seen = append(r.seen, p); return r.deny },
	}
	for _, c := range change {
		c(&cfg)
	}
	r.cfg = cfg
	if r.m, err = signin.New(cfg); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.m.Close() })
	return r
}

// restart is another Manager on the same store.
func (r *rig) restart() {
	r.t.Helper()
	r.m.Close()
	var err error
	if r.m, err = signin.New(r.cfg); err != nil {
		r.t.Fatal(err)
	}
}

func start() signin.Start {
	return signin.Start{RedirectURI: loopback, State: "the-program's-state", Challenge: challengeOf(verifier)}
}

// begin begins a sign-in and returns the state that went to the identity provider.
func (r *rig) begin(s signin.Start) (state, browser string) {
	r.t.Helper()
	b, err := r.m.Begin(s)
	if err != nil {
		r.t.Fatal(err)
	}
	u, err := url.Parse(b.URL)
	if err != nil {
		r.t.Fatal(err)
	}
	return u.Query().Get("state"), b.Browser
}

// back is the browser's return with what the identity provider gave, and the
// person's yes; it gives what the program is told.
func (r *rig) back(state, browser string) url.Values {
	r.t.Helper()
	l, err := r.m.Callback(r.t.Context(), signin.Return{State: state, Code: "idp-code", Browser: browser})
	if err != nil {
		r.t.Fatal(err)
	}
	to := l.To
	if l.Ask != nil {
		if to, _, _, err = r.m.Agree(r.t.Context(), signin.Answer{Secret: l.Ask.Secret, Browser: browser, Yes: true}); err != nil {
			r.t.Fatal(err)
		}
	}
	query, ok := strings.CutPrefix(to, loopback+"?")
	if !ok {
		r.t.Fatalf("the browser was sent to %s", to)
	}
	q, err := url.ParseQuery(query)
	if err != nil {
		r.t.Fatal(err)
	}
	if q.Get("state") != "the-program's-state" {
		r.t.Fatalf("the program's state did not come back: %v", q)
	}
	return q
}

// code does all of the browser's part.
func (r *rig) code() string {
	r.t.Helper()
	code := r.back(r.begin(start())).Get("code")
	if code == "" {
		r.t.Fatal("there is no code")
	}
	return code
}

func (r *rig) redeem(code string) (signin.Session, error) {
	return r.m.Redeem(r.t.Context(), code, verifier, loopback, "c1")
}

// signIn is a whole sign-in; it gives the token.
func (r *rig) signIn() (token string, s signin.Session) {
	r.t.Helper()
	s, err := r.redeem(r.code())
	if err != nil {
		r.t.Fatal(err)
	}
	token, _ = s.Token.Reveal("token")
	return token, s
}

func (r *rig) wantSession(token string, want broker.Reason) {
	r.t.Helper()
	_, _, err := r.m.Authenticate(r.t.Context(), token)
	wantReason(r.t, "the session", err, want)
}

func wantReason(t *testing.T, what string, err error, want broker.Reason) {
	t.Helper()
	if got := broker.ReasonOf(err); got != want {
		t.Errorf("%s: %v; want %q", what, err, want)
	}
}

// events are the evidence, without times.
func (r *rig) events() (events []audit.Event) {
	r.t.Helper()
	err := r.store.View(r.t.Context(), func(rd store.Reader) error {
		for e, err := range rd.Log(audit.Log, 0) {
			if err != nil {
				return err
			}
			ev, err := audit.Decode(e.Seq, e.Value)
			if err != nil {
				return err
			}
			events = append(events, ev)
		}
		return nil
	})
	if err != nil {
		r.t.Fatal(err)
	}
	return events
}

// causes are the causes of the ends in the evidence.
func (r *rig) causes() (causes []string) {
	for _, e := range r.events() {
		if e.Type == audit.SessionEnded {
			causes = append(causes, e.Cause)
		}
	}
	return causes
}
