package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/mayfly-security/mayfly/attestation/oidctest"
	"github.com/mayfly-security/mayfly/broker"
	mayflyv1 "github.com/mayfly-security/mayfly/broker/api/mayfly/v1"
	"github.com/mayfly-security/mayfly/broker/api/mayfly/v1/mayflyv1connect"
)

const (
	loopback = "http://127.0.0.1:54321/callback"
	// The verifier and its SHA-256 as base64url, of RFC 7636, appendix B.
	verifier  = "dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk"
	challenge = "E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM"
)

// comer comes to a broker as a person, with its authority and no token yet.
type comer struct {
	t     testing.TB
	url   string
	http  *http.Client
	token string
}

func newComer(t testing.TB, url, caFile string) *comer {
	t.Helper()
	text, err := os.ReadFile(caFile)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(text) {
		t.Fatalf("%s has no certificate", caFile)
	}
	c := &comer{t: t, url: url}
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}, ForceAttemptHTTP2: true}
	t.Cleanup(transport.CloseIdleConnections)
	c.http = &http.Client{Transport: roundTrip(func(r *http.Request) (*http.Response, error) {
		r = r.Clone(r.Context())
		if c.token != "" {
			r.Header.Set("Authorization", "Bearer "+c.token)
		}
		return transport.RoundTrip(r)
	}), Timeout: 30 * time.Second}
	return c
}

type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// login signs a sample person in by a browser.
func (c *comer) login(person string) {
	c.t.Helper()
	b := oidctest.New(c.http.Transport)
	b.StopAt(loopback)
	page, err := b.Walk(c.t.Context(), c.url+"/signin?redirect_uri="+loopback+"&state=s&code_challenge="+challenge, map[string]string{"person": person, "how": "key"})
	if err != nil || !page.Stopped {
		c.t.Fatalf("the browser is at %+v, %v", page, err)
	}
	res, err := mayflyv1connect.NewSignInServiceClient(c.http, c.url).RedeemCode(c.t.Context(), connect.NewRequest(&mayflyv1.RedeemCodeRequest{
		Code: page.URL.Query().Get("code"), CodeVerifier: verifier, RedirectUri: loopback}))
	if err != nil {
		c.t.Fatal(err)
	}
	c.token = res.Msg.GetToken()
}

func (c *comer) whoami() (*mayflyv1.WhoAmIResponse, error) {
	res, err := mayflyv1connect.NewAccessServiceClient(c.http, c.url).WhoAmI(c.t.Context(), connect.NewRequest(&mayflyv1.WhoAmIRequest{}))
	if err != nil {
		return nil, err
	}
	return res.Msg, nil
}

// said is what a running command has printed.
type said struct {
	mu sync.Mutex
	b  bytes.Buffer
	on chan struct{} // gets a value with each write
}

func (s *said) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	select {
	case s.on <- struct{}{}:
	default:
	}
	return s.b.Write(b)
}

func (s *said) text() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// run runs a command of mayflyd's, and gives what it printed.
func run(t *testing.T, args ...string) (string, error) {
	t.Helper()
	var out strings.Builder
	cmd := rootCommand()
	cmd.SetArgs(args)
	cmd.SetOut(&out)
	cmd.SetErr(&out)
	err := cmd.ExecuteContext(t.Context())
	return out.String(), err
}

// TestDevPeople: in dev one is a sample person as it is printed, by a browser or
// with a token, and the host lets one administer.
func TestDevPeople(t *testing.T) {
	dir, err := os.MkdirTemp("", "mf")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	ctx, cancel := context.WithCancel(t.Context())
	out, ended := &said{on: make(chan struct{}, 1)}, make(chan error, 1)
	go func() {
		cmd := rootCommand()
		cmd.SetArgs([]string{"dev", "--dir", dir, "--listen", "127.0.0.1:0", "--ops-listen", "", "--people-listen", "127.0.0.1:0", "--idp-listen", "127.0.0.1:0"})
		cmd.SetOut(out)
		cmd.SetErr(out)
		ended <- cmd.ExecuteContext(ctx)
	}()
	defer func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("dev ended with %v", err)
		}
	}()
	late := time.After(30 * time.Second)
	for !strings.Contains(out.text(), "Ready.") {
		select {
		case <-out.on:
		case err := <-ended:
			ended <- err
			t.Fatalf("dev ended: %v\n%s", err, out.text())
		case <-late:
			t.Fatalf("dev did not start:\n%s", out.text())
		}
	}
	find := func(pattern string) string {
		t.Helper()
		m := regexp.MustCompile(pattern).FindStringSubmatch(out.text())
		if m == nil {
			t.Fatalf("dev did not print %s:\n%s", pattern, out.text())
		}
		return m[1]
	}
	c := newComer(t, find(`export MAYFLY_PEOPLE_ADDR=(\S+)`), find(`export MAYFLY_PEOPLE_CA=(\S+)`))
	c.login("ada@acme.test")
	me, err := c.whoami()
	if err != nil || me.GetId() != "person:ada@acme.test" || fmt.Sprint(me.GetGroups()) != "[support-leads]" {
		t.Errorf("whoami: %v, %v", me, err)
	}
	text, err := run(t, "dev", "token", "--dir", dir, "--person", "finn@acme.test")
	if err != nil {
		t.Fatal(err)
	}
	c.token = strings.TrimSpace(text)
	if me, err := c.whoami(); err != nil || me.GetId() != "person:finn@acme.test" || me.GetSignInMethod() != "bearer" {
		t.Errorf("whoami: %v, %v", me, err)
	}
	if _, err := run(t, "dev", "token", "--dir", dir, "--person", "nobody"); err == nil || !strings.Contains(err.Error(), "nobody") {
		t.Errorf("a token of nobody's: %v", err)
	}

	evidence := mayflyv1connect.NewAuditServiceClient(c.http, c.url)
	list := func() (*connect.Response[mayflyv1.ListEventsResponse], error) {
		return evidence.ListEvents(t.Context(), connect.NewRequest(&mayflyv1.ListEventsRequest{Type: "recovery.opened"}))
	}
	if _, err := list(); connect.CodeOf(err) != connect.CodePermissionDenied {
		t.Errorf("before the recovery: %v", err)
	}
	for name, args := range map[string][]string{
		"nobody":         {"--principal", "finn", "--reason", "why"},
		"for no time":    {"--principal", "person:finn@acme.test", "--reason", "why", "--for", "0s"},
		"for too long":   {"--principal", "person:finn@acme.test", "--reason", "why", "--for", "61m"},
		"no reason":      {"--principal", "person:finn@acme.test", "--reason", " "},
		"a trick":        {"--principal", "person:finn@acme.test", "--reason", "\u202e"},
		"another broker": {"--principal", "person:finn@acme.test", "--reason", "why", "--dir", filepath.Join(dir, "nothing")},
	} {
		if name != "another broker" {
			args = append(args, "--dir", dir)
		}
		if text, err := run(t, append([]string{"recover"}, args...)...); err == nil {
			t.Errorf("%s: %s", name, text)
		}
	}
	text, err = run(t, "recover", "--dir", dir, "--principal", "person:finn@acme.test", "--for", "5m", "--reason", "locked out")
	if err != nil || !strings.Contains(text, "person:finn@acme.test may administer until") {
		t.Fatalf("%s, %v", text, err)
	}
	res, err := list()
	if err != nil || len(res.Msg.GetEvents()) != 1 {
		t.Fatalf("%v, %v", res, err)
	}
	e := res.Msg.GetEvents()[0]
	if e.GetActor() != fmt.Sprintf("uid:%d", os.Geteuid()) || e.GetReason() != "locked out" || e.GetDetails()["principal"] != "person:finn@acme.test" {
		t.Errorf("evidence: %v", e)
	}
}

// TestSampleTokensAreForDev: a broker with real people makes nobody's tokens.
func TestSampleTokensAreForDev(t *testing.T) {
	b := newBackedUp(t)
	f := storeFlags{file: b.settings.store}
	if text, err := f.ask(t.Context(), "/v1/sample-token", map[string][]string{"person": {"ada@acme.test"}}); err == nil || !strings.Contains(err.Error(), "no sample people") {
		t.Errorf("%q, %v", text, err)
	}
}

// TestRestoredSessions: a session that was signed out after the backup was made
// does not come back with it.
func TestRestoredSessions(t *testing.T) {
	b := newBackedUp(t)
	b.stop()
	sample, err := openDevPeople(devFlags{dir: t.TempDir(), people: "127.0.0.1:0", idp: "127.0.0.1:0"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { sample.close() })
	b.settings.people = sample.settings
	b.start()
	c := newComer(t, sample.settings.url, sample.caFile)
	c.login("ada@acme.test")
	out := filepath.Join(t.TempDir(), "copy.db")
	if err := b.backup(out); err != nil {
		t.Fatal(err)
	}
	if _, err := mayflyv1connect.NewSignInServiceClient(c.http, c.url).SignOut(t.Context(), connect.NewRequest(&mayflyv1.SignOutRequest{})); err != nil {
		t.Fatal(err)
	}
	b.stop()
	if err := os.Rename(out, b.settings.store); err != nil {
		t.Fatal(err)
	}
	sample.settings.ln, sample.settings.listen = nil, strings.TrimPrefix(sample.settings.url, "https://")
	b.start()
	if me, err := c.whoami(); connect.CodeOf(err) != connect.CodeUnauthenticated {
		t.Errorf("%v, %v", me, err)
	}
	ended := b.events("session.ended")
	if len(ended) != 1 || ended[0].GetCause() != string(broker.CauseRestored) {
		t.Errorf("evidence: %v", ended)
	}
}

// writePair writes a certificate and its key, for localhost.
func writePair(t *testing.T, dir string) (cert, key string) {
	t.Helper()
	pair, err := devCertificate(filepath.Join(dir, "ca.pem"), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(pair.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	cert, key = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	for file, b := range map[string]*pem.Block{cert: {Type: "CERTIFICATE", Bytes: pair.Certificate[0]}, key: {Type: "PRIVATE KEY", Bytes: der}} {
		if err := os.WriteFile(file, pem.EncodeToMemory(b), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return cert, key
}

const peopleConfig = `
store: mayfly.db
catalog: [catalog.yaml]
people:
  url: https://localhost:8446
  tls: {certificate: cert.pem, key: key.pem}
  session_ttl: 30m
  identity_provider:
    issuer: https://idp.acme.test
    client_id: mayfly
    client_secret_file: secret
    audience: https://mayfly.acme.test
    groups_claim: roles
    name_claim: preferred_username
    scopes: [openid, profile]
    ca_file: ca.pem
`

func TestPeopleConfig(t *testing.T) {
	dir := t.TempDir()
	writePair(t, dir)
	file := filepath.Join(dir, "mayflyd.yaml")
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("secret", "s3cret\n")
	write("mayflyd.yaml", peopleConfig)
	s, err := readConfig(file)
	if err != nil {
		t.Fatal(err)
	}
	if p := s.people; p.url != "https://localhost:8446" || p.listen != "127.0.0.1:8446" || p.sessionTTL != 30*time.Minute || p.provider.Issuer() != "https://idp.acme.test" || p.provider.Sample() {
		t.Errorf("settings: %+v", p)
	}
	for name, c := range map[string]struct{ old, new, want string }{
		"a misspelt key":           {"session_ttl", "sesion_ttl", "session_ttl"},
		"a misspelt claim":         {"groups_claim", "group_claim", "groups_claim"},
		"no url":                   {"  url: https://localhost:8446\n", "", "url is"},
		"a url with a path":        {"https://localhost:8446", "https://localhost:8446/mayfly", "without a path"},
		"a plain url":              {"https://localhost:8446", "http://localhost:8446", "must be https"},
		"another host":             {"https://localhost:8446", "https://mayfly.acme.test", "not for the host"},
		"no certificate":           {"certificate: cert.pem, ", "", "needs certificate and key"},
		"a certificate that is no": {"certificate: cert.pem", "certificate: secret", "cannot be used"},
		"a key that is not there":  {"key: key.pem", "key: nothing.pem", "cannot be used"},
		"sessions too long":        {"session_ttl: 30m", "session_ttl: 13h", "from 1m0s to 12h0m0s"},
		"sessions too short":       {"session_ttl: 30m", "session_ttl: 1s", "from 1m0s to 12h0m0s"},
		"no issuer":                {"    issuer: https://idp.acme.test\n", "", "issuer is missing"},
		"a plain issuer":           {"https://idp.acme.test", "http://idp.acme.test", "identity_provider"},
		"no client":                {"    client_id: mayfly\n", "", "client_id is missing"},
		"scopes without openid":    {"[openid, profile]", "[profile]", `must hold "openid"`},
		"no secret":                {"client_secret_file: secret", "client_secret_file: nothing", "nothing"},
		"no authorities":           {"ca_file: ca.pem", "ca_file: secret", "identity_provider"},
	} {
		if !strings.Contains(peopleConfig, c.old) {
			t.Fatalf("%s: the configuration does not contain %q", name, c.old)
		}
		write("mayflyd.yaml", strings.Replace(peopleConfig, c.old, c.new, 1))
		_, err := readConfig(file)
		if err == nil || !strings.Contains(err.Error(), c.want) && name != "a plain issuer" && name != "no authorities" {
			t.Errorf("%s: %v; want %q", name, err, c.want)
		} else if !strings.Contains(err.Error(), "mayflyd.yaml:") {
			t.Errorf("%s: no line is named: %v", name, err)
		}
	}
	write("mayflyd.yaml", peopleConfig)
	if err := os.Chmod(filepath.Join(dir, "key.pem"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := readConfig(file); err == nil || !strings.Contains(err.Error(), "everybody") {
		t.Errorf("a key for everybody: %v", err)
	}
}

// TestCertificateIsExchanged: a renewed certificate is used, and one that is
// half written keeps nobody out.
func TestCertificateIsExchanged(t *testing.T) {
	dir := t.TempDir()
	certFile, keyFile := writePair(t, dir)
	c := &certificate{certFile: certFile, keyFile: keyFile, log: slog.New(slog.DiscardHandler)}
	get := func() []byte {
		t.Helper()
		c.asked = time.Time{} // it is time to look again
		pair, err := c.get(nil)
		if err != nil {
			t.Fatal(err)
		}
		return pair.Certificate[0]
	}
	first := get()
	if again := get(); !bytes.Equal(first, again) {
		t.Error("it was exchanged without a change")
	}
	if err := os.WriteFile(certFile, []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	if again := get(); !bytes.Equal(first, again) {
		t.Error("half a certificate took its place")
	}
	writePair(t, dir)
	if second := get(); bytes.Equal(first, second) {
		t.Error("it was not exchanged")
	}
}
