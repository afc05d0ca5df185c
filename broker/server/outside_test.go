package server_test

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/pem"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/server"
)

// TestCurl is what the user guide says that curl can do.
func TestCurl(t *testing.T) {
	t.Parallel()
	curl, err := exec.LookPath("curl")
	if err != nil {
		t.Fatal("curl is missing; install it (Debian: apt-get install curl)")
	}
	r := newRig(t)
	r.grant(support, "crm.read")
	dir := t.TempDir()
	write := func(name, kind string, der ...[]byte) string {
		var text []byte
		for _, d := range der {
			text = append(text, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: d})...)
		}
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	cert := svid(t, r.trust, support)
	key, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	var roots [][]byte
	for _, a := range r.trust.Bundle().X509Authorities() {
		roots = append(roots, a.Raw)
	}
	_, port, err := net.SplitHostPort(r.addr)
	if err != nil {
		t.Fatal(err)
	}
	base := []string{"--silent", "--show-error", "--max-time", "20", "--noproxy", "*", "--cacert", write("roots.pem", "CERTIFICATE", roots...),
		"--write-out", "\n%{http_code} %{http_version}"}
	me := append(base, "--cert", write("svid.pem", "CERTIFICATE", cert.Certificate...), "--key", write("key.pem", "PRIVATE KEY", key))
	run := func(args ...string) (body, status string) {
		t.Helper()
		cmd := exec.CommandContext(bounded(t), curl, args...)
		cmd.Env = []string{"HOME=" + dir} // no curlrc, no proxies
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("curl: %v\n%s", err, out)
		}
		i := bytes.LastIndexByte(out, '\n')
		return string(out[:i]), string(out[i+1:])
	}
	at := "https://localhost:" + port
	json := []string{"--header", "Content-Type: application/json", "--data"}
	post := func(who []string, method, data string) (string, string) {
		t.Helper()
		return run(append(append(append([]string{}, who...), json...), data, at+"/mayfly.v1."+method)...)
	}
	if body, status := post(me, issue, `{"tool": "crm.read"}`); status != "200 2" || !strings.Contains(body, `"access_token"`) {
		t.Errorf("issuing: %s %s", status, body)
	}
	if body, status := post(append(me, "--http1.1"), "AccessService/WhoAmI", `{}`); status != "200 1.1" || !strings.Contains(body, support.String()) {
		t.Errorf("whoami: %s %s", status, body)
	}
	if body, status := post(me, issue, `{"tool": "db.read"}`); status != "403 2" || !strings.Contains(body, `"reason":"no_grant"`) {
		t.Errorf("without a grant: %s %s", status, body)
	}
	if body, status := post(me, issue, `{"tool": "crm.read", "tll": "60s"}`); status != "400 2" || !strings.Contains(body, `"reason":"invalid_argument"`) || !strings.Contains(body, "tll") {
		t.Errorf("a misspelt field: %s %s", status, body)
	}
	if body, status := post(base, "AccessService/WhoAmI", `{}`); status != "401 2" || !strings.Contains(body, `"reason":"unauthenticated"`) {
		t.Errorf("without a certificate: %s %s", status, body)
	}
	if body, status := run(append(append([]string{}, me...), "--data-urlencode", "token=x", at+"/oauth2/introspect")...); status != "200 2" || strings.TrimSpace(body) != `{"active":false}` {
		t.Errorf("introspection: %s %s", status, body)
	}
}

// TestOps reads what operators' machines read.
func TestOps(t *testing.T) {
	r := newRig(t)
	r.grant(support, "crm.read")
	agent := r.client(support)
	agent.issue("crm.read")
	agent.post(issue, `{"tool": "db.read"}`)
	ops, err := server.NewOps(server.OpsConfig{Metrics: r.metrics, Log: r.log(), Ready: []func(context.Context) error{r.engine.Ready, r.identity.Ready}})
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- ops.Serve(ln) }()
	get := func(path string) (int, string) {
		t.Helper()
		res, err := http.Get((&url.URL{Scheme: "http", Host: ln.Addr().String(), Path: path}).String())
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		body, err := io.ReadAll(res.Body)
		if err != nil {
			t.Fatal(err)
		}
		return res.StatusCode, string(body)
	}
	_, metrics := get("/metrics")
	for _, line := range []string{
		`mayfly_leases{state="active"} 1`, `mayfly_leases{state="minting"} 0`, `mayfly_leases{state="revoking"} 0`,
		`mayfly_refusals_total{reason="no_grant"} 1`, `mayfly_leases_issued_total{provider="tokens",tool="crm.read"} 1`,
		`mayfly_mint_seconds_count{outcome="ok",provider="tokens"} 1`,
	} {
		if !strings.Contains(metrics, line+"\n") {
			t.Errorf("the metrics lack %s", line)
		}
	}
	if !strings.Contains(metrics, "\nmayfly_leases_overdue") {
		t.Error("the metrics do not say how many leases are overdue")
	}
	want := func(path string, status int, body string) {
		t.Helper()
		if s, b := get(path); s != status || b != body {
			t.Errorf("%s: %d %q; want %d %q", path, s, b, status, body)
		}
	}
	want("/healthz", 200, "ok\n")
	want("/readyz", 200, "ready\n")
	want("/nothing", 404, "404 page not found\n")
	r.ahead.Store(int64(time.Minute)) // the clock jumps, by less than the life of an SVID
	want("/readyz", 503, "clock_untrusted\n")
	agent.post(issue, `{"tool": "crm.read"}`).wantRefused(t, "while the clock is not trusted", 503, broker.ReasonClock)
	r.ahead.Store(0)
	want("/readyz", 200, "ready\n")
	r.engine.Close()
	want("/readyz", 503, "shutting_down\n")
	want("/healthz", 200, "ok\n")
	if err := ops.Shutdown(bounded(t)); err != nil {
		t.Error(err)
	}
	if err := <-served; err != nil {
		t.Error(err)
	}
}

// TestNilDependencies: what security rests on has no default.
func TestNilDependencies(t *testing.T) {
	r := newRig(t)
	whole := server.Config{Engine: r.engine, Attestor: r.identity, Identity: r.identity, Log: r.log()}
	if _, err := server.New(whole); err != nil {
		t.Fatal(err)
	}
	for name, take := range map[string]func(*server.Config){
		"engine": func(c *server.Config) { c.Engine = nil }, "attestor": func(c *server.Config) { c.Attestor = nil },
		"identity": func(c *server.Config) { c.Identity = nil }, "log": func(c *server.Config) { c.Log = nil },
	} {
		c := whole
		take(&c)
		if _, err := server.New(c); err == nil {
			t.Errorf("without its %s, the server was made", name)
		}
	}
}
