package oidc_test

import (
	"context"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/mayfly-security/mayfly/attestation/devidp"
	"github.com/mayfly-security/mayfly/attestation/oidc"
	"github.com/mayfly-security/mayfly/attestation/oidctest"
	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/deploy/testbed"
)

const (
	clientID     = "mayfly"
	clientSecret = "a secret: with %signs & plus+"
	redirectURL  = "http://127.0.0.1:9/signin/callback" // no browser of ours goes there
	audience     = "https://mayfly.acme.example"
	alice        = "alice@acme.example"
	bob          = "bob@acme.example"
)

// world is a provider that runs, and how people sign in there.
type world struct {
	name   string
	config oidc.Config
	now    func() time.Time
	// answers are for the forms of a sign-in; the built-in provider has no "ago",
	// so its clock moves by it.
	answers          func(person, acr string, ago time.Duration) map[string]string
	password, strong string // classes of authentication
	stop, start      func()
	// jwt is a JWT access token for the audience.
	jwt func(t *testing.T, person string) string
}

// worlds runs a test at the built-in provider and at a certified one.
func worlds(t *testing.T, test func(*testing.T, world)) {
	t.Run("devidp", func(t *testing.T) { t.Parallel(); test(t, devWorld(t)) })
	t.Run("oidc-provider", func(t *testing.T) { t.Parallel(); test(t, certifiedWorld(t, false)) })
}

func secretFile(t *testing.T) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "client-secret")
	if err := os.WriteFile(file, []byte(clientSecret+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// clock is a time that a test moves.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func newClock() *clock { return &clock{now: time.Date(2027, 3, 1, 9, 0, 0, 0, time.UTC)} }

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) Add(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

func startDev(t *testing.T, c *clock) *devidp.Provider {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p, err := devidp.New(devidp.Config{
		Listener: l, Audience: audience, Now: c.Now,
		People: []devidp.Person{
			{Name: alice, FullName: "Alice Doe", Groups: []string{"security", "finance", "security"}},
			{Name: bob},
		},
		Clients: []devidp.Client{{ID: clientID, Secret: clientSecret, RedirectURIs: []string{redirectURL}}, {ID: "public", RedirectURIs: []string{redirectURL}}},
	})
	if err != nil {
		l.Close()
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	return p
}

func devWorld(t *testing.T) world {
	c := newClock()
	p := startDev(t, c)
	return world{
		name: "devidp", now: c.Now, password: devidp.ACRPassword, strong: devidp.ACRSecurityKey,
		config: oidc.Config{
			Issuer: p.Issuer(), ClientID: clientID, ClientSecretFile: secretFile(t), RedirectURL: redirectURL,
			Audience: audience, Sample: true, Now: c.Now,
		},
		answers: func(person, acr string, ago time.Duration) map[string]string {
			how := "password"
			if acr == devidp.ACRSecurityKey {
				how = "key"
			}
			c.Add(ago)
			return map[string]string{"person": person, "how": how}
		},
		jwt: func(t *testing.T, person string) string {
			t.Helper()
			raw, err := p.MintToken(devidp.Mint{Person: person, ACR: devidp.ACRPassword})
			if err != nil {
				t.Fatal(err)
			}
			return raw
		},
	}
}

func certifiedWorld(t *testing.T, claimsInIDToken bool) world {
	const app = "http://127.0.0.1:9/app"
	o := testbed.TestOIDC(t, testbed.OIDCConfig{
		Audiences: []string{audience}, ACR: []string{"pwd", "mfa"}, ClaimsInIDToken: claimsInIDToken,
		Accounts: []testbed.OIDCAccount{
			{Subject: "a-1", Email: alice, EmailVerified: true, Name: "Alice Doe", Groups: []string{"security", "finance", "security"}},
			{Subject: "b-2", Email: bob, EmailVerified: true},
			{Subject: "m-3", Email: "mallory@acme.example", EmailVerified: false},
		},
		Clients: []testbed.OIDCClient{
			{ID: clientID, Secret: clientSecret, RedirectURIs: []string{redirectURL}},
			{ID: "public", RedirectURIs: []string{redirectURL}},
			{ID: "app", RedirectURIs: []string{app}},
		},
	})
	return world{
		name: "oidc-provider", now: time.Now, password: "pwd", strong: "mfa",
		config: oidc.Config{
			Issuer: o.Issuer, ClientID: clientID, ClientSecretFile: secretFile(t), RedirectURL: redirectURL, Audience: audience,
		},
		answers: func(person, acr string, ago time.Duration) map[string]string {
			return map[string]string{"person": person, "acr": acr, "how": "in", "ago": strconv.Itoa(int(ago.Seconds()))}
		},
		stop: func() {
			if err := o.Stop(t.Context()); err != nil {
				t.Fatal(err)
			}
		},
		start: func() {
			if err := o.Start(t.Context()); err != nil {
				t.Fatal(err)
			}
		},
		jwt: func(t *testing.T, person string) string {
			t.Helper()
			return appToken(t, o.Issuer, app, map[string]string{"person": person, "acr": "pwd", "how": "in"})
		},
	}
}

func open(t *testing.T, config oidc.Config) *oidc.Provider {
	t.Helper()
	p, err := oidc.New(config)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func browser() *oidctest.Browser {
	b := oidctest.New(nil)
	b.StopAt(redirectURL)
	return b
}

// came is what a browser brought back to the redirect URI.
type came struct {
	code, verifier, nonce string
	params                url.Values
	forms                 bool // the person was shown something
}

const (
	state    = "the state of this sign-in"
	nonce    = "the nonce of this sign-in"
	verifier = "a-verifier-of-pkce-that-has-at-least-43-characters"
)

// bring has a person go through a sign-in.
func bring(t *testing.T, w world, p *oidc.Provider, b *oidctest.Browser, need broker.StepUp, answers map[string]string) came {
	t.Helper()
	start := p.AuthCodeURL(state, nonce, verifier, need)
	if start == "" {
		t.Fatal("there is nowhere to sign in:", p.Ready(t.Context()))
	}
	first, err := b.Get(t.Context(), start)
	if err != nil {
		t.Fatal(err)
	}
	end, forms := first, !first.Stopped
	if forms {
		if end, err = b.Walk(t.Context(), start, answers); err != nil {
			t.Fatal(err)
		}
	}
	if !end.Stopped {
		t.Fatalf("the browser ended at %s, status %d:\n%s", end.URL, end.Status, end.Body)
	}
	q := end.URL.Query()
	if q.Get("state") != state {
		t.Errorf("state = %q", q.Get("state"))
	}
	if err := p.CheckResponse(t.Context(), q.Get("iss")); err != nil {
		t.Error(err)
	}
	return came{code: q.Get("code"), verifier: verifier, nonce: nonce, params: q, forms: forms}
}

func exchange(ctx context.Context, w world, p *oidc.Provider, c came) (broker.Person, error) {
	return p.Exchange(ctx, c.code, c.verifier, c.nonce, w.now())
}
