package oidc_test

import (
	"context"
	"crypto/elliptic"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/mayfly-security/mayfly/attestation/oidc"
	"github.com/mayfly-security/mayfly/broker"
)

// TestProviderAway: the broker starts without its provider, says that it is
// away, and finds it when it comes.
func TestProviderAway(t *testing.T) {
	t.Parallel()
	w, c := certifiedWorld(t, false), newClock()
	raw := w.jwt(t, alice)
	w.stop()
	config := w.config
	config.Now, config.UserAudience = c.Now, "https://agents.mayfly.acme.example"
	p := open(t, config)
	away := func(err error) {
		t.Helper()
		refused(t, err, broker.ReasonSignIn, "the identity provider is away")
		hides(t, err, raw)
	}
	away(p.Ready(t.Context()))
	if u := p.AuthCodeURL(state, nonce, verifier, broker.StepUp{}); u != "" {
		t.Errorf("the browser is sent to %s", u)
	}
	if p.CanDevice() {
		t.Error("it takes device codes")
	}
	_, err := p.Exchange(t.Context(), "code", verifier, nonce, time.Now())
	away(err)
	_, err = p.StartDevice(t.Context(), time.Now())
	away(err)
	_, _, err = p.VerifyBearer(t.Context(), raw, time.Now())
	away(err)
	_, _, _, err = p.VerifyUser(t.Context(), raw, time.Now())
	away(err)
	away(p.CheckResponse(t.Context(), w.config.Issuer))

	w.start()
	away(p.Ready(t.Context())) // within a second of the last try nobody asks
	c.Add(time.Second)
	if err := p.Ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	person, err := exchange(t.Context(), w, p, bring(t, w, p, browser(), broker.StepUp{}, w.answers(alice, "", 0)))
	if err != nil || person.Name != alice {
		t.Fatalf("%+v, %v", person, err)
	}
	got := bring(t, w, p, browser(), broker.StepUp{}, w.answers(alice, "", 0))
	bearer := w.jwt(t, alice)
	if _, _, err := p.VerifyBearer(t.Context(), bearer, time.Now()); err != nil {
		t.Fatal(err)
	}

	// Away again: what is known is used on, and what must be asked is refused.
	w.stop()
	c.Add(2 * time.Hour)
	if _, _, err := p.VerifyBearer(t.Context(), bearer, time.Now()); err != nil {
		t.Errorf("its keys are known: %v", err)
	}
	_, err = exchange(t.Context(), w, p, got)
	away(err)
	hides(t, err, got.code)
	// The keys of the first life are gone, and others cannot be fetched.
	_, _, err = p.VerifyBearer(t.Context(), signWith(t, newEC(t, elliptic.P256()), jose.ES256, map[string]any{"kid": "new"}, nil), time.Now())
	away(err)
}

// TestKeys: a new key is found at once, and forgeries have nobody ask for keys
// more often than the interval.
func TestKeys(t *testing.T) {
	t.Parallel()
	f, c := newForge(t), newClock()
	p := open(t, f.config(c))
	verify := func(raw string) error {
		_, _, err := p.VerifyBearer(t.Context(), raw, c.Now())
		return err
	}
	if err := verify(f.sign(jose.ES256, nil, shown(f, c))); err != nil {
		t.Fatal(err)
	}
	forged := signWith(t, newEC(t, elliptic.P256()), jose.ES256, nil, shown(f, c))
	for range 50 {
		refused(t, verify(forged), broker.ReasonTokenInvalid, "signature")
	}
	if n := f.count("/keys"); n != 1 {
		t.Errorf("asked for keys %d times", n)
	}
	f.mu.Lock()
	f.keys[jose.ES256] = newEC(t, elliptic.P256())
	f.mu.Unlock()
	c.Add(5 * time.Second)
	fresh := f.sign(jose.ES256, nil, shown(f, c))
	err := again(func() error { return verify(fresh) })
	if err != nil {
		t.Errorf("a new key: %v", err)
	}
	if n := f.count("/.well-known/openid-configuration"); n != 1 {
		t.Errorf("discovered %d times", n)
	}
	for _, a := range map[string]answer{
		"an error":    {status: 500, body: "secret trouble"},
		"no JSON":     {status: 200, body: "secret trouble"},
		"elsewhere":   {status: 302, header: http.Header{"Location": {"http://127.0.0.1:1/keys"}}},
		"far too big": {status: 200, body: `"` + strings.Repeat("a", 2<<20) + `"`},
	} {
		f.mu.Lock()
		f.answers["/keys"] = a
		f.mu.Unlock()
		c.Add(5 * time.Second)
		err := again(func() error { return verify(forged) })
		refused(t, err, broker.ReasonSignIn, "away")
		if err != nil {
			hides(t, err, "secret trouble")
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	c.Add(5 * time.Second)
	_, _, err = p.VerifyBearer(ctx, forged, c.Now())
	refused(t, err, broker.ReasonSignIn, "away")
}

// again asks until the signature is not refused. The library may still be
// putting its last answer away and give it once more; whoever asks after that
// is told of the new one.
func again(ask func() error) error {
	err := ask()
	for range 1000 {
		if broker.ReasonOf(err) != broker.ReasonTokenInvalid {
			break
		}
		runtime.Gosched()
		err = ask()
	}
	return err
}

func TestDocuments(t *testing.T) {
	t.Parallel()
	for _, a := range []struct {
		name    string
		changes map[string]any
		config  func(*oidc.Config)
		why     string // in the log; empty: it works
	}{
		{name: "as it is"},
		{name: "no algorithms", changes: map[string]any{"id_token_signing_alg_values_supported": nil}},
		{name: "no S256 listed", changes: map[string]any{"code_challenge_methods_supported": nil}},
		{name: "another issuer", changes: map[string]any{"issuer": "https://evil.example"}, why: "names another issuer"},
		{name: "issuer with a slash", changes: map[string]any{"issuer": "SLASH"}, why: "names another issuer"},
		{name: "only symmetric", changes: map[string]any{"id_token_signing_alg_values_supported": []string{"HS256", "none", "RS384"}}, why: "it signs with none of"},
		{name: "plain PKCE", changes: map[string]any{"code_challenge_methods_supported": []string{"plain"}}, why: "S256"},
		{name: "no keys", changes: map[string]any{"jwks_uri": nil}, why: "jwks_uri"},
		{name: "no token endpoint", changes: map[string]any{"token_endpoint": ""}, why: "token_endpoint"},
		{name: "plain http elsewhere", changes: map[string]any{"token_endpoint": "http://evil.example/token"}, why: "token_endpoint"},
		{name: "script", changes: map[string]any{"authorization_endpoint": "javascript:alert(1)"}, why: "authorization_endpoint"},
		{name: "endpoint with a password", changes: map[string]any{"userinfo_endpoint": "https://u:p@x.example"}, why: "userinfo_endpoint"},
		{name: "sample", changes: map[string]any{"mayfly_dev": true}, why: "only mayflyd dev takes it"},
		{name: "no sample", config: func(c *oidc.Config) { c.Sample = true }, why: "it is not mayflyd dev's own"},
		{name: "sample for dev", changes: map[string]any{"mayfly_dev": true}, config: func(c *oidc.Config) { c.Sample = true }},
		{name: "wrong type", changes: map[string]any{"jwks_uri": []string{"secret trouble"}}, why: "makes no sense"},
		{name: "client secret not taken", changes: map[string]any{"token_endpoint_auth_methods_supported": []string{"private_key_jwt"}}, config: withSecret(t), why: "takes no client secret"},
		{name: "client secret by Basic", config: withSecret(t)},
	} {
		f, c := newForge(t), newClock()
		for name, value := range a.changes {
			if value == "SLASH" {
				value = f.issuer + "/"
			}
			f.set(name, value)
		}
		config := f.config(c)
		if a.config != nil {
			a.config(&config)
		}
		err := open(t, config).Ready(t.Context())
		if a.why == "" {
			if err != nil {
				t.Errorf("%s: %v", a.name, err)
			}
			continue
		}
		refused(t, err, broker.ReasonSignIn, "away, or does not work")
		if err == nil || !strings.Contains(err.Error(), a.why) {
			t.Errorf("%s: want %q for the log, got %v", a.name, a.why, err)
			continue
		}
		hides(t, err, "secret trouble", "evil.example")
	}
}

// TestDiscoveryAnswers: what comes in the place of a document.
func TestDiscoveryAnswers(t *testing.T) {
	t.Parallel()
	const path = "/.well-known/openid-configuration"
	for name, a := range map[string]answer{
		"an error":           {status: 500, body: "secret trouble"},
		"no JSON":            {status: 200, body: "secret trouble"},
		"a list":             {status: 200, body: `["secret trouble"]`},
		"far too big":        {status: 200, body: `{"issuer":"` + strings.Repeat("a", 2<<20) + `"}`},
		"another host":       {status: 302, header: http.Header{"Location": {"http://localhost:1/secret-trouble"}}},
		"redirects for ever": {status: 302, header: http.Header{"Location": {path}}},
	} {
		f, c := newForge(t), newClock()
		f.answers[path] = a
		err := open(t, f.config(c)).Ready(t.Context())
		refused(t, err, broker.ReasonSignIn, "away")
		if err != nil {
			hides(t, err, "secret trouble", "secret-trouble")
		}
		if n := f.count(path); n > 5 {
			t.Errorf("%s: asked %d times", name, n)
		}
	}
}

// TestSecret: how the client's secret travels, and that it is read anew.
func TestSecret(t *testing.T) {
	t.Parallel()
	f, c := newForge(t), newClock()
	config := f.config(c)
	config.ClientSecretFile = secretFile(t)
	redeem := func(methods []string) {
		t.Helper()
		f.set("token_endpoint_auth_methods_supported", methods)
		f.answer("/token", 400, map[string]any{"error": "invalid_grant"})
		_, err := open(t, config).Exchange(t.Context(), "code", verifier, nonce, c.Now())
		refused(t, err, broker.ReasonSignIn, "does not take the code")
		if err != nil {
			hides(t, err, clientSecret)
		}
	}
	before := f.count("/token")
	redeem([]string{"client_secret_post"})
	if f.sent("client_secret") != clientSecret || f.sent("Authorization") != "" {
		t.Errorf("sent %+v", f.form)
	}
	redeem([]string{"client_secret_post", "client_secret_basic"})
	if f.sent("client_secret") != "" || !strings.HasPrefix(f.sent("Authorization"), "Basic ") {
		t.Errorf("sent %+v", f.form)
	}
	if n := f.count("/token") - before; n != 2 {
		t.Errorf("%d requests for two codes: a second try spends the code", n)
	}
	p := open(t, config)
	if err := os.WriteFile(config.ClientSecretFile, []byte("another"), 0o600); err != nil {
		t.Fatal(err)
	}
	f.set("token_endpoint_auth_methods_supported", []string{"client_secret_post"})
	_, err := p.Exchange(t.Context(), "code", verifier, nonce, c.Now())
	refused(t, err, broker.ReasonSignIn, "does not take the code")
	if f.sent("client_secret") != "another" {
		t.Errorf("sent %q", f.sent("client_secret"))
	}
	if err := os.Chmod(config.ClientSecretFile, 0o640); err != nil {
		t.Fatal(err)
	}
	_, err = p.Exchange(t.Context(), "code", verifier, nonce, c.Now())
	refused(t, err, broker.ReasonSignIn, "does not work with this broker")
	_, err = p.StartDevice(t.Context(), c.Now())
	refused(t, err, broker.ReasonSignIn, "does not work with this broker")
	if !strings.Contains(err.Error(), "chmod 600") {
		t.Errorf("the log is not told: %v", err)
	}
}

func withSecret(t *testing.T) func(*oidc.Config) {
	file := secretFile(t)
	return func(c *oidc.Config) { c.ClientSecretFile = file }
}

func TestNew(t *testing.T) {
	t.Parallel()
	good := oidc.Config{Issuer: "https://id.acme.example/realm", ClientID: clientID, RedirectURL: "https://mayfly.acme.example/signin/callback"}
	p := open(t, good)
	if p.Issuer() != good.Issuer || p.Sample() {
		t.Errorf("issuer %s, sample %t", p.Issuer(), p.Sample())
	}
	dir := t.TempDir()
	file := func(name, text string, mode os.FileMode) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	for _, a := range []struct {
		why    string
		change func(*oidc.Config)
	}{
		{"issuer", func(c *oidc.Config) { c.Issuer = "" }},
		{"http is for loopback only", func(c *oidc.Config) { c.Issuer = "http://id.acme.example" }},
		{"a user, a query", func(c *oidc.Config) { c.Issuer += "?x=1" }},
		{"a user, a query", func(c *oidc.Config) { c.Issuer = "https://a:b@id.acme.example" }},
		{"no URL like", func(c *oidc.Config) { c.Issuer = "id.acme.example" }},
		{"no client ID", func(c *oidc.Config) { c.ClientID = "" }},
		{"redirect URL", func(c *oidc.Config) { c.RedirectURL = "http://mayfly.acme.example/cb" }},
		{"redirect URL", func(c *oidc.Config) { c.RedirectURL += "#f" }},
		{"not among the scopes", func(c *oidc.Config) { c.Scopes = []string{"email"} }},
		{"time-out", func(c *oidc.Config) { c.Timeout = -1 }},
		{"CA certificates", func(c *oidc.Config) { c.CAFile = filepath.Join(dir, "missing") }},
		{"no CA certificate", func(c *oidc.Config) { c.CAFile = file("ca", "x", 0o600) }},
		{"client secret", func(c *oidc.Config) { c.ClientSecretFile = filepath.Join(dir, "missing") }},
		{"chmod 600", func(c *oidc.Config) { c.ClientSecretFile = file("open", "x", 0o644) }},
		{"is empty", func(c *oidc.Config) { c.ClientSecretFile = file("empty", "\n", 0o600) }},
		{"or has more than", func(c *oidc.Config) { c.ClientSecretFile = file("long", strings.Repeat("x", 5000), 0o600) }},
	} {
		config := good
		a.change(&config)
		if _, err := oidc.New(config); err == nil || !strings.Contains(err.Error(), a.why) {
			t.Errorf("want %q, got %v", a.why, err)
		}
	}
	// Without a redirect URL nobody signs in with a browser.
	config := good
	config.RedirectURL = ""
	p = open(t, config)
	if u := p.AuthCodeURL(state, nonce, verifier, broker.StepUp{}); u != "" {
		t.Errorf("the browser is sent to %s", u)
	}
	_, err := p.Exchange(t.Context(), "code", verifier, nonce, time.Now())
	refused(t, err, broker.ReasonSignIn, "no redirect URL")
}
