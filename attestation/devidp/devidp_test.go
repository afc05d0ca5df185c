package devidp_test

import (
	"encoding/base64"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/oauth2"

	"github.com/mayfly-security/mayfly/attestation/devidp"
	"github.com/mayfly-security/mayfly/attestation/oidctest"
)

const (
	redirect = "https://mayfly.test/signin/callback"
	alice    = "alice@acme.example"
	verifier = "a-verifier-of-pkce-that-has-at-least-43-characters"
)

// rig is a provider under test and its clock.
type rig struct {
	*devidp.Provider
	t   *testing.T
	mu  sync.Mutex
	now time.Time
}

func (r *rig) clock() time.Time { r.mu.Lock(); defer r.mu.Unlock(); return r.now }

func (r *rig) pass(d time.Duration) { r.mu.Lock(); defer r.mu.Unlock(); r.now = r.now.Add(d) }

func start(t *testing.T) *rig {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{t: t, now: time.Date(2027, 3, 1, 9, 0, 0, 0, time.UTC)}
	r.Provider, err = devidp.New(devidp.Config{
		Listener: l, Audience: "mayfly", Now: r.clock,
		People: []devidp.Person{{Name: alice, FullName: "Alice <b>Doe</b>", Groups: []string{"security"}}, {Name: "bob@acme.example"}},
		Clients: []devidp.Client{
			{ID: "public", RedirectURIs: []string{redirect, redirect + "?x=1"}},
			{ID: "secret", Secret: "a secret", RedirectURIs: []string{redirect}},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
		if err := r.Close(); err != nil {
			t.Errorf("the second time: %v", err)
		}
	})
	return r
}

func (r *rig) config(client, secret string) *oauth2.Config {
	return &oauth2.Config{ClientID: client, ClientSecret: secret, RedirectURL: redirect, Scopes: []string{"openid", "email", "profile", "groups"},
		Endpoint: oauth2.Endpoint{AuthURL: r.Issuer() + "/authorize", TokenURL: r.Issuer() + "/token", AuthStyle: oauth2.AuthStyleInParams}}
}

func (r *rig) url(options ...oauth2.AuthCodeOption) string {
	return r.config("public", "").AuthCodeURL("st", append([]oauth2.AuthCodeOption{oauth2.S256ChallengeOption(verifier)}, options...)...)
}

func browser() *oidctest.Browser {
	b := oidctest.New(nil)
	b.StopAt(redirect)
	return b
}

func (r *rig) walk(b *oidctest.Browser, target string, answers map[string]string) *oidctest.Page {
	r.t.Helper()
	page, err := b.Walk(r.t.Context(), target, answers)
	if err != nil {
		r.t.Fatal(err)
	}
	return page
}

func (r *rig) get(b *oidctest.Browser, target string) *oidctest.Page {
	r.t.Helper()
	page, err := b.Get(r.t.Context(), target)
	if err != nil {
		r.t.Fatal(err)
	}
	return page
}

func param(name, value string) oauth2.AuthCodeOption { return oauth2.SetAuthURLParam(name, value) }

// claims reads a token without verifying it; attestation/oidc's tests do that.
func claims(t *testing.T, raw string) (all map[string]any) {
	t.Helper()
	payload, err := base64.RawURLEncoding.DecodeString(strings.Split(raw, ".")[1])
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(payload, &all); err != nil {
		t.Fatal(err)
	}
	return all
}

func (r *rig) redeem(page *oidctest.Page) map[string]any {
	r.t.Helper()
	tokens, err := r.config("public", "").Exchange(r.t.Context(), page.URL.Query().Get("code"), oauth2.VerifierOption(verifier))
	if err != nil {
		r.t.Fatal(err)
	}
	return claims(r.t, tokens.Extra("id_token").(string))
}

var password = map[string]string{"person": alice, "how": "password"}

// TestRequests: who may be sent where.
func TestRequests(t *testing.T) {
	t.Parallel()
	r := start(t)
	for name, change := range map[string]oauth2.AuthCodeOption{
		"unknown client":          param("client_id", "evil"),
		"another host":            param("redirect_uri", "https://evil.example/"),
		"another path":            param("redirect_uri", redirect+"/"),
		"another query":           param("redirect_uri", redirect+"?x=2"),
		"a fragment":              param("redirect_uri", redirect+"#x"),
		"upper case":              param("redirect_uri", strings.ToUpper(redirect)),
		"no redirect URI":         param("redirect_uri", ""),
		"a redirect of a sibling": param("redirect_uri", redirect+"?x=1&x=1"),
	} {
		page := r.get(oidctest.New(nil), r.url(change))
		if page.Status != 400 || len(page.Forms) != 0 || strings.Contains(page.Body, "evil.example") {
			t.Errorf("%s: status %d\n%s", name, page.Status, page.Body)
		}
	}
	if page := r.get(oidctest.New(nil), r.url()+"&client_id=public"); page.Status != 400 {
		t.Errorf("a parameter twice: %d", page.Status)
	}
	for _, c := range []struct{ name, value, code string }{
		{"response_type", "token", "unsupported_response_type"},
		{"response_type", "code id_token", "unsupported_response_type"},
		{"response_mode", "fragment", "invalid_request"},
		{"code_challenge", "", "invalid_request"},
		{"code_challenge", "short", "invalid_request"},
		{"code_challenge_method", "plain", "invalid_request"},
		{"scope", "email", "invalid_scope"},
		{"max_age", "-1", "invalid_request"},
		{"max_age", "soon", "invalid_request"},
		{"prompt", "none login", "invalid_request"},
		{"prompt", "none", "login_required"},
		{"request", "a.b.c", "request_not_supported"},
		{"request_uri", "https://evil.example", "request_not_supported"},
	} {
		page := r.get(browser(), r.url(param(c.name, c.value)))
		q := page.URL.Query()
		if !page.Stopped || q.Get("error") != c.code || q.Get("state") != "st" || q.Get("iss") != r.Issuer() || q.Has("code") {
			t.Errorf("%s=%s: %s", c.name, c.value, page.URL)
		}
	}
	page := r.walk(browser(), r.url(param("redirect_uri", redirect+"?x=1")), password)
	if q := page.URL.Query(); q.Get("x") != "1" || q.Get("code") == "" {
		t.Errorf("a redirect URI with a query: %s", page.URL)
	}
}

func TestSessions(t *testing.T) {
	t.Parallel()
	r, b := start(t), browser()
	first := r.redeem(r.walk(b, r.url(), password))
	began := float64(r.clock().Unix())
	if first["auth_time"] != began || first["acr"] != devidp.ACRPassword || first["mayfly_dev"] != true || first["email"] != alice || first["email_verified"] != true {
		t.Errorf("%v", first)
	}
	r.pass(10 * time.Minute)
	for _, c := range []struct {
		name, param, value string
		form               bool
	}{
		{"silent", "prompt", "", false},
		{"prompt=none", "prompt", "none", false},
		{"young enough", "max_age", "600", false},
		{"too old", "max_age", "599", true},
		{"always", "max_age", "0", true},
		{"prompt=login", "prompt", "login", true},
		{"prompt=select_account", "prompt", "select_account", true},
		{"class it has", "acr_values", "urn:x " + devidp.ACRPassword, false},
		{"class it has not", "acr_values", devidp.ACRSecurityKey, true},
	} {
		page := r.get(b, r.url(param(c.param, c.value)))
		if page.Stopped == c.form {
			t.Errorf("%s: %s", c.name, page.URL)
		}
		if !c.form && r.redeem(page)["auth_time"] != began {
			t.Errorf("%s: auth_time is not the first sign-in's", c.name)
		}
	}
	again := r.redeem(r.walk(b, r.url(param("max_age", "60")), map[string]string{"person": "bob@acme.example", "how": "key"}))
	if again["auth_time"] != began+600 || again["acr"] != devidp.ACRSecurityKey || again["email"] != "bob@acme.example" || again["sub"] == first["sub"] {
		t.Errorf("%v", again)
	}
	if page := r.get(b, r.url(param("max_age", "0"))); page.Stopped {
		t.Errorf("max_age=0 at the moment of a sign-in: %s", page.URL)
	}
	home := r.get(b, r.Issuer()+"/")
	if !strings.Contains(home.Body, "bob@acme.example") || len(home.Forms) != 1 {
		t.Fatalf("home:\n%s", home.Body)
	}
	if out, err := b.Send(t.Context(), home, home.Forms[0], nil); err != nil || !strings.Contains(out.Body, "Nobody is signed in") {
		t.Errorf("signed out: %v\n%s", err, out.Body)
	}
	if page := r.get(b, r.url(param("prompt", "none"))); page.URL.Query().Get("error") != "login_required" {
		t.Errorf("after signing out: %s", page.URL)
	}
	r.walk(b, r.url(), password)
	r.pass(12 * time.Hour)
	if page := r.get(b, r.url()); page.Stopped {
		t.Errorf("after 12 hours: %s", page.URL)
	}
}

// TestForms: a form is good once, in the browser that was shown it, for a while.
func TestForms(t *testing.T) {
	t.Parallel()
	r := start(t)
	victim, attacker := browser(), browser()
	shown := r.get(victim, r.url())
	if len(shown.Forms) != 1 {
		t.Fatalf("%s", shown.Body)
	}
	forbidden := func(name string, page *oidctest.Page, err error) {
		t.Helper()
		if err != nil || page.Stopped || page.Status != 403 {
			t.Errorf("%s: %+v, %v", name, page, err)
		}
	}
	page, err := attacker.Send(t.Context(), shown, shown.Forms[0], password)
	forbidden("a browser without cookies", page, err)
	own := r.get(attacker, r.url())
	page, err = attacker.Send(t.Context(), shown, shown.Forms[0], password)
	forbidden("another browser", page, err)
	page, err = victim.Send(t.Context(), shown, own.Forms[0], password)
	forbidden("another browser's form", page, err)
	elsewhere := *shown
	elsewhere.URL, _ = url.Parse("http://evil.example/")
	page, err = victim.Send(t.Context(), &elsewhere, shown.Forms[0], password)
	forbidden("from another origin", page, err)
	out := shown.Forms[0]
	out.Action, _ = url.Parse(r.Issuer() + "/sign-out")
	kept := r.get(victim, r.url())
	out.Fields = kept.Forms[0].Fields
	page, err = victim.Send(t.Context(), kept, out, nil)
	forbidden("a sign-in's form to sign out", page, err)
	if page, err := victim.Send(t.Context(), shown, shown.Forms[0], password); err != nil || !page.Stopped {
		t.Errorf("the browser that was shown it: %+v, %v", page, err)
	}
	page, err = victim.Send(t.Context(), shown, shown.Forms[0], password)
	forbidden("the second time", page, err)
	old := r.get(browser(), r.url())
	r.pass(10 * time.Minute)
	page, err = attacker.Send(t.Context(), old, own.Forms[0], password)
	forbidden("too old", page, err)

	for name, answers := range map[string]map[string]string{"nobody": {"person": "x"}, "no way": {"how": "x"}} {
		b := browser()
		page := r.get(b, r.url())
		f := page.Forms[0]
		f.Options, f.Buttons = nil, nil
		f.Fields.Set("how", "password")
		for n, v := range answers {
			f.Fields.Set(n, v)
		}
		if page, err := b.Send(t.Context(), page, f, nil); err != nil || page.Status != 400 {
			t.Errorf("%s: %+v, %v", name, page, err)
		}
	}
}

// TestPages: no script, no frame, and text stays text.
func TestPages(t *testing.T) {
	t.Parallel()
	r := start(t)
	page := r.get(browser(), r.url(param("acr_values", `"><script>alert(1)</script>`), param("max_age", "300")))
	for _, want := range []string{"Sample.", "mayflyd dev", "Alice &lt;b&gt;Doe", "not older than 5m", "security"} {
		if !strings.Contains(page.Body, want) {
			t.Errorf("no %q in\n%s", want, page.Body)
		}
	}
	if strings.Contains(page.Body, "<script") || strings.Contains(page.Body, "<b>") {
		t.Errorf("text became markup:\n%s", page.Body)
	}
	policy := page.Header.Get("Content-Security-Policy")
	if !strings.HasPrefix(policy, "default-src 'none'; style-src 'sha256-") || !strings.Contains(policy, "frame-ancestors 'none'") ||
		page.Header.Get("X-Frame-Options") != "DENY" || page.Header.Get("Cache-Control") != "no-store" {
		t.Errorf("%v", page.Header)
	}
	for _, c := range page.Header.Values("Set-Cookie") {
		if !strings.Contains(c, "HttpOnly") || !strings.Contains(c, "SameSite=Lax") {
			t.Errorf("cookie %s", c)
		}
	}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, r.Issuer()+"/", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Host = "rebound.evil.example"
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusMisdirectedRequest {
		t.Errorf("by another name: %s", resp.Status)
	}
}

func (r *rig) post(path string, form url.Values, basic ...string) (int, map[string]any) {
	r.t.Helper()
	req, err := http.NewRequestWithContext(r.t.Context(), http.MethodPost, r.Issuer()+path, strings.NewReader(form.Encode()))
	if err != nil {
		r.t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	if len(basic) == 2 {
		req.SetBasicAuth(url.QueryEscape(basic[0]), url.QueryEscape(basic[1]))
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		r.t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		r.t.Fatal(err)
	}
	var all map[string]any
	if err := json.Unmarshal(body, &all); err != nil {
		r.t.Fatalf("%s: %s", err, body)
	}
	return resp.StatusCode, all
}

func TestTokenEndpoint(t *testing.T) {
	t.Parallel()
	r, b := start(t), browser()
	fresh := func() url.Values {
		page := r.walk(b, r.url(), password)
		return url.Values{"grant_type": {"authorization_code"}, "client_id": {"public"}, "redirect_uri": {redirect},
			"code": {page.URL.Query().Get("code")}, "code_verifier": {verifier}}
	}
	for _, c := range []struct{ name, value, code string }{
		{"grant_type", "password", "unsupported_grant_type"},
		{"client_id", "evil", "invalid_client"},
		{"client_id", "secret", "invalid_client"},
		{"client_secret", "x", "invalid_client"},
		{"redirect_uri", redirect + "?x=1", "invalid_grant"},
		{"code", "x", "invalid_grant"},
		{"code_verifier", "", "invalid_grant"},
		{"code_verifier", verifier + "x", "invalid_grant"},
	} {
		form := fresh()
		form.Set(c.name, c.value)
		if status, body := r.post("/token", form); status < 400 || body["error"] != c.code || body["id_token"] != nil {
			t.Errorf("%s=%s: %d %v", c.name, c.value, status, body)
		}
	}
	form := fresh()
	form.Del("client_id")
	if _, body := r.post("/token", form, "secret", "a secret"); body["error"] != "invalid_grant" {
		t.Errorf("another client's code: %v", body)
	}
	if _, body := r.post("/token", form, "secret", "another"); body["error"] != "invalid_client" {
		t.Errorf("another secret: %v", body)
	}
	form = fresh()
	if status, body := r.post("/token", form); status != 200 || body["id_token"] == "" {
		t.Errorf("%d %v", status, body)
	}
	if _, body := r.post("/token", form); body["error"] != "invalid_grant" {
		t.Errorf("the second time: %v", body)
	}
	form = fresh()
	r.pass(time.Minute)
	if _, body := r.post("/token", form); body["error"] != "invalid_grant" {
		t.Errorf("after a minute: %v", body)
	}
	// What no scope asks for is not told.
	page := r.walk(b, r.url(param("scope", "openid")), password)
	if got := r.redeem(page); got["email"] != nil || got["groups"] != nil || got["name"] != nil || got["sub"] == nil {
		t.Errorf("for openid alone: %v", got)
	}
}

func TestDevice(t *testing.T) {
	t.Parallel()
	r := start(t)
	begin := func() (string, string) {
		status, body := r.post("/device_authorization", url.Values{"client_id": {"public"}, "scope": {"openid email"}})
		if status != 200 || body["interval"] != 5.0 {
			t.Fatalf("%d %v", status, body)
		}
		return body["device_code"].(string), body["user_code"].(string)
	}
	poll := func(code, client string) any {
		_, body := r.post("/token", url.Values{"grant_type": {"urn:ietf:params:oauth:grant-type:device_code"}, "client_id": {client}, "device_code": {code}})
		if id, ok := body["id_token"].(string); ok {
			return claims(t, id)["email"]
		}
		return body["error"]
	}
	code, user := begin()
	steps := func(want ...any) {
		t.Helper()
		for _, w := range want {
			if got := poll(code, "public"); got != w {
				t.Errorf("got %v, want %v", got, w)
			}
		}
	}
	steps("authorization_pending", "slow_down")
	r.pass(5 * time.Second)
	steps("authorization_pending")
	page := r.walk(browser(), r.Issuer()+"/device", map[string]string{"user_code": strings.ToLower(strings.ReplaceAll(user, "-", "")), "person": alice, "how": "password"})
	if page.Status != 200 || !strings.Contains(page.Body, "Done") {
		t.Errorf("%d\n%s", page.Status, page.Body)
	}
	if page := r.get(browser(), r.Issuer()+"/device?user_code="+user); page.Status != 404 {
		t.Errorf("a used code: %d", page.Status)
	}
	steps(alice, "invalid_grant")

	code, user = begin()
	r.walk(browser(), r.Issuer()+"/device?user_code="+user, map[string]string{"how": "deny"})
	steps("access_denied")
	code, user = begin()
	b := browser()
	shown := r.get(b, r.Issuer()+"/device?user_code="+user)
	r.pass(10*time.Minute - time.Second)
	if page, err := browser().Send(t.Context(), shown, shown.Forms[0], password); err != nil || page.Status != 403 {
		t.Errorf("another browser's form: %+v, %v", page, err)
	}
	r.pass(time.Second)
	steps("expired_token")
	if page := r.get(b, r.Issuer()+"/device?user_code="+user); page.Status != 404 {
		t.Errorf("an old code: %d", page.Status)
	}
	if got := poll("x", "public"); got != "invalid_grant" {
		t.Errorf("nobody's code: %v", got)
	}
	if _, body := r.post("/device_authorization", url.Values{"client_id": {"evil"}, "scope": {"openid"}}); body["error"] != "invalid_client" {
		t.Errorf("%v", body)
	}
	if _, body := r.post("/device_authorization", url.Values{"client_id": {"public"}, "scope": {"email"}}); body["error"] != "invalid_scope" {
		t.Errorf("%v", body)
	}
	code, user = begin()
	r.walk(browser(), r.Issuer()+"/device?user_code="+user, password)
	if _, body := r.post("/token", url.Values{"grant_type": {"urn:ietf:params:oauth:grant-type:device_code"}, "device_code": {code}}, "secret", "a secret"); body["error"] != "invalid_grant" {
		t.Errorf("another client polls: %v", body)
	}
	steps(alice)
}

func TestMint(t *testing.T) {
	t.Parallel()
	r := start(t)
	now := r.clock()
	raw, err := r.MintToken(devidp.Mint{Person: alice})
	if err != nil {
		t.Fatal(err)
	}
	got := claims(t, raw)
	if got["aud"] != "mayfly" || got["exp"] != float64(now.Add(5*time.Minute).Unix()) || got["auth_time"] != float64(now.Unix()) || got["acr"] != devidp.ACRPassword || got["email"] != alice {
		t.Errorf("%v", got)
	}
	raw, err = r.MintToken(devidp.Mint{Person: alice, Audience: "other", TTL: time.Hour, AuthTime: now.Add(-time.Hour), ACR: devidp.ACRSecurityKey})
	if got := claims(t, raw); err != nil || got["aud"] != "other" || got["exp"] != float64(now.Add(time.Hour).Unix()) || got["auth_time"] != float64(now.Add(-time.Hour).Unix()) || got["acr"] != devidp.ACRSecurityKey {
		t.Errorf("%v, %v", got, err)
	}
	for _, m := range []devidp.Mint{{}, {Person: "x"}, {Person: alice, TTL: -1}, {Person: alice, TTL: 13 * time.Hour}} {
		if raw, err := r.MintToken(m); err == nil || raw != "" {
			t.Errorf("%+v: %q", m, raw)
		}
	}
	status, body := r.post("/mint", url.Values{"person": {alice}, "ttl": {"60"}, "auth_age": {"3600"}, "acr": {devidp.ACRSecurityKey}})
	got = claims(t, body["access_token"].(string))
	if status != 200 || body["expires_in"] != 60.0 || got["exp"] != float64(now.Unix()+60) || got["auth_time"] != float64(now.Unix()-3600) || got["acr"] != devidp.ACRSecurityKey {
		t.Errorf("%d %v %v", status, body, got)
	}
	for _, form := range []url.Values{{}, {"person": {"x"}}, {"person": {alice}, "ttl": {"x"}}, {"person": {alice}, "auth_age": {"-1"}}, {"person": {alice}, "ttl": {"99999999"}}} {
		if status, body := r.post("/mint", form); status != 400 || body["access_token"] != nil {
			t.Errorf("%v: %d %v", form, status, body)
		}
	}
	// A page elsewhere cannot have a browser mint.
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, r.Issuer()+"/mint", strings.NewReader("person="+alice))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	req.Header.Set("Sec-Fetch-Site", "cross-site")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusForbidden {
		t.Errorf("from another site: %s", resp.Status)
	}
}

func TestNew(t *testing.T) {
	t.Parallel()
	loopback, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer loopback.Close()
	everywhere, err := net.Listen("tcp", "0.0.0.0:0")
	if err != nil {
		t.Fatal(err)
	}
	defer everywhere.Close()
	people := []devidp.Person{{Name: alice}}
	for why, c := range map[string]devidp.Config{
		"no listener":     {People: people},
		"loopback alone":  {Listener: everywhere, People: people},
		"no people":       {Listener: loopback},
		"is there twice":  {Listener: loopback, People: []devidp.Person{{Name: alice}, {Name: alice}}},
		"has no name":     {Listener: loopback, People: []devidp.Person{{}}},
		"has no ID":       {Listener: loopback, People: people, Clients: []devidp.Client{{}}},
		"no redirect URI": {Listener: loopback, People: people, Clients: []devidp.Client{{ID: "x", RedirectURIs: []string{"javascript:alert(1)"}}}},
		"device interval": {Listener: loopback, People: people, DeviceInterval: -1},
	} {
		if _, err := devidp.New(c); err == nil || !strings.Contains(err.Error(), why) {
			t.Errorf("want %q, got %v", why, err)
		}
	}
}
