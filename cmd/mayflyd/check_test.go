package main

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/mayfly-security/mayfly/attestation/devtrust"
	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/catalog"
	"github.com/mayfly-security/mayfly/deploy/testbed"
	"github.com/mayfly-security/mayfly/providers/vault/vaultscope"
)

// liveWorld is a Vault, a PostgreSQL and a trust domain that are set up for a
// catalog of two providers, one for each way to log in.
type liveWorld struct {
	t      *testing.T
	vault  *testbed.Vault
	config string
}

func newLiveWorld(t *testing.T) *liveWorld {
	t.Helper()
	w := &liveWorld{t: t}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	pg := testbed.TestPostgres(t, testbed.PostgresConfig{NoFsync: true})
	w.vault = testbed.TestVault(t, testbed.VaultConfig{TLS: true})
	must(testbed.VaultPostgres(t.Context(), w.vault, pg))

	dir, err := os.MkdirTemp("", "mf") // a socket's path must be short
	must(err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	td := spiffeid.RequireTrustDomainFromString("acme.test")
	id := spiffeid.RequireFromPath(td, "/mayfly")
	trust, err := devtrust.New(devtrust.Config{TrustDomain: td, Dir: filepath.Join(dir, "s")})
	must(err)
	t.Cleanup(func() { trust.Close() })
	socket, err := trust.Add(devtrust.Identity{ID: id, DNSNames: []string{"mayfly.acme.test"}})
	must(err)
	t.Setenv(workloadapi.SocketEnv, socket)
	t.Setenv(envVaultToken, "")
	t.Setenv(envVaultAddr, "")

	ca, password := filepath.Join(dir, "ca.pem"), filepath.Join(dir, "password")
	must(os.WriteFile(ca, []byte(w.vault.CACert), 0o600))
	must(os.WriteFile(password, []byte("sweep-password\n"), 0o600))
	files := filepath.Join(dir, "catalog.yaml")
	must(os.WriteFile(files, fmt.Appendf(nil, `
providers:
  - name: vault-jwt
    driver: vault
    config:
      address: %[1]s
      ca_file: %[2]s
      auth: {method: jwt, audience: vault}
      databases:
        - {mount: database, dsn: "host=127.0.0.1 port=%[3]d dbname=%[4]s user=mayfly_sweep sslmode=disable", password_file: %[5]s}
  - name: vault-cert
    driver: vault
    config: {address: "%[1]s", ca_file: %[2]s, prefix: c-, auth: {method: cert}}
tools:
  - {name: crm.query, provider: vault-jwt, description: Query, max_ttl: 5m, scope: {engine: database, path: database/creds/crm-query}}
  - {name: web.cert, provider: vault-cert, description: A certificate, max_ttl: 1h, scope: {engine: pki, path: pki/issue/web}}
`, w.vault.Addr, ca, pg.Port, testbed.DatabaseName, password), 0o600))
	w.config = filepath.Join(dir, "mayflyd.yaml")
	must(os.WriteFile(w.config, []byte("store: state.db\ncatalog: [catalog.yaml]\n"), 0o600))

	snapshot, err := catalog.Load([]string{files}, drivers(nil))
	must(err)
	for _, p := range snapshot.Providers() {
		c, err := vaultscope.ParseConfig(p.Config)
		must(err)
		o := vaultscope.Options{Broker: id, VaultLogin: testbed.AdminLogin, Connection: testbed.DatabaseName}
		if c.Auth.Method == vaultscope.MethodCert {
			for _, cert := range trust.Bundle().X509Authorities() {
				o.Bundle += string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}))
			}
		} else {
			for _, key := range trust.Bundle().JWTAuthorities() {
				der, err := x509.MarshalPKIXPublicKey(key)
				must(err)
				o.PublicKeys = append(o.PublicKeys, string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})))
			}
		}
		var tools []broker.Tool
		for _, tool := range snapshot.Tools() {
			if tool.Provider == p.Name {
				tools = append(tools, tool)
			}
		}
		setup, err := vaultscope.NewSetup(c, tools, o)
		must(err)
		for _, script := range setup.Scripts {
			must(pg.Exec(t.Context(), testbed.DatabaseName, script.SQL+"ALTER ROLE mayfly_sweep PASSWORD 'sweep-password';"))
		}
		for _, each := range setup.Writes {
			w.write(each.Path, each.Body)
		}
	}
	return w
}

func (w *liveWorld) write(path string, body map[string]any) {
	w.t.Helper()
	if _, err := w.vault.Client().Logical().WriteWithContext(w.t.Context(), path, body); err != nil {
		w.t.Fatalf("writing %s: %v", path, err)
	}
}

// check runs `mayflyd check --live`.
func (w *liveWorld) check() (string, error) {
	var out bytes.Buffer
	root := rootCommand()
	root.SetArgs([]string{"check", "--config", w.config, "--live"})
	root.SetOut(&out)
	err := root.ExecuteContext(w.t.Context())
	return out.String(), err
}

// TestCheckLive: mayflyd compares the real Vault with the setup, as the broker
// that it is, by both ways to log in, and exits with 1 if anything is bad.
func TestCheckLive(t *testing.T) {
	w := newLiveWorld(t)
	want := func(what string, err error, wantErr, out string, wants ...string) {
		t.Helper()
		if (err == nil) != (wantErr == "") || err != nil && !strings.Contains(err.Error(), wantErr) {
			t.Errorf("%s: the error is %v; want %q", what, err, wantErr)
		}
		for _, text := range wants {
			if !strings.Contains(out, text) {
				t.Errorf("%s: nothing says %q:\n%s", what, text, out)
			}
		}
	}
	good := []string{"provider vault-jwt: nothing is missing, and nothing is too wide", "provider vault-cert: nothing is missing, and nothing is too wide"}
	out, err := w.check()
	want("a good one", err, "", out, append(good, "looking as spiffe://acme.test/mayfly", "looked as the broker alone",
		"note: provider vault-jwt: the broker's policy mayfly-_broker is not bound", "note: provider vault-jwt: PostgreSQL of mount database: the functions",
		"  do: print the setup again with --installation")...)

	t.Setenv(envVaultToken, w.vault.RootToken)
	for _, elsewhere := range []string{"", "https://vault.acme.test:8200"} {
		t.Setenv(envVaultAddr, elsewhere)
		out, err = w.check()
		want("with another Vault's token", err, "", out, append(good, "note: provider vault-jwt: VAULT_TOKEN is not used", "looked as the broker alone")...)
		if strings.Contains(out, "with an operator's token (VAULT_TOKEN) at") {
			t.Errorf("VAULT_ADDR=%s: the token was shown to another Vault:\n%s", elsewhere, out)
		}
	}
	t.Setenv(envVaultAddr, w.vault.Addr+"/")
	out, err = w.check()
	want("with an operator's token", err, "", out, append(good, "with an operator's token (VAULT_TOKEN)")...)
	if strings.Contains(out, w.vault.RootToken) {
		t.Error("the token is told")
	}
	socket := os.Getenv(workloadapi.SocketEnv)
	t.Setenv(workloadapi.SocketEnv, "")
	out, err = w.check()
	want("without a Workload API", err, "", out, append(good, "note: there is no Workload API")...)
	t.Setenv(envVaultToken, "")
	out, err = w.check()
	want("with neither", err, "needs its SVID", out)
	t.Setenv(workloadapi.SocketEnv, socket)

	w.write("auth/token/roles/mayfly-crm.query", map[string]any{"allowed_policies": []string{}})
	w.write("sys/policies/acl/c-web.cert", map[string]any{"policy": `path "pki/*" { capabilities = ["update"] }`})
	out, err = w.check()
	want("a bad one", err, "missing or too wide: 2", out,
		"bad: provider vault-jwt, tool crm.query: token role mayfly-crm.query has no allowed_policies",
		"bad: provider vault-cert, tool web.cert: policy c-web.cert is not what the setup says",
		`  do: apply what "mayfly vault setup" prints`)

	if err := w.vault.Client().Sys().Seal(); err != nil {
		t.Fatal(err)
	}
	out, err = w.check()
	want("a sealed one", err, "could not ask some providers: 2", out, "provider vault-jwt: could not be asked: ")
}
