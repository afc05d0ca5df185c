package vault

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/mayfly-security/mayfly/attestation/devtrust"
	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/deploy/testbed"
	"github.com/mayfly-security/mayfly/providers"
)

// privateCA is an authority that no system trusts, and a server's certificate
// of it for 127.0.0.1 and vault.acme.test.
type privateCA struct {
	caFile, certFile, keyFile string
	pair                      tls.Certificate
}

func newPrivateCA(t testing.TB) privateCA {
	t.Helper()
	dir := t.TempDir()
	key := func() *ecdsa.PrivateKey {
		k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	caKey, serverKey := key(), key()
	ca := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "acme"}, NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	server := &x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "vault"}, NotBefore: ca.NotBefore, NotAfter: ca.NotAfter,
		DNSNames: []string{"vault.acme.test"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
	caDER, err := x509.CreateCertificate(rand.Reader, ca, ca, caKey.Public(), caKey)
	if err != nil {
		t.Fatal(err)
	}
	serverDER, err := x509.CreateCertificate(rand.Reader, server, ca, serverKey.Public(), caKey)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(serverKey)
	if err != nil {
		t.Fatal(err)
	}
	file := func(name, kind string, der []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	p := privateCA{caFile: file("ca.pem", "CERTIFICATE", caDER), certFile: file("cert.pem", "CERTIFICATE", serverDER), keyFile: file("key.pem", "PRIVATE KEY", keyDER)}
	if p.pair, err = tls.LoadX509KeyPair(p.certFile, p.keyFile); err != nil {
		t.Fatal(err)
	}
	return p
}

// TestCertLogin: the broker logs in with its X.509-SVID to a Vault with a
// private authority, and a rotated SVID is shown at the next login.
func TestCertLogin(t *testing.T) {
	_, pg := servers(t)
	v, err := newVault(testbed.VaultConfig{TLS: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { v.Close() })
	caFile := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(caFile, []byte(v.CACert), 0o600); err != nil {
		t.Fatal(err)
	}
	w := newWorld(t, v, pg)
	w.cert, w.extra = true, fmt.Sprintf(`,"ca_file":%q`, caFile)
	p := w.setup(w.database()).open()
	w.cycle(p)

	// A new authority: Vault has both, and sees the new certificate.
	if err := w.trust.RotateCA(); err != nil {
		t.Fatal(err)
	}
	w.setup(w.database())
	p.session.dropped(p.session.token)
	w.cycle(p)

	// Who is not the broker is not let in, with a certificate of the same domain.
	addr, err := w.trust.Add(devtrust.Identity{ID: agentID, DNSNames: []string{"agent.acme.test"}})
	if err != nil {
		t.Fatal(err)
	}
	w.login = source(t, addr)
	a := mint(t.Context(), w.open(), w.request(w.database(), time.Minute))
	wantRefused(t, a, broker.ReasonProvider)

	// Without the authority nothing is sent.
	w.extra = ""
	b := mint(t.Context(), w.open(), w.request(w.database(), time.Minute))
	var unknown *tls.CertificateVerificationError
	if !errors.Is(b.err, providers.ErrAway) || !errors.As(b.err, &unknown) {
		t.Errorf("%v", b.err)
	}
}

// cycle mints a lease, uses it and ends it.
func (w *world) cycle(p *provider) {
	w.t.Helper()
	a := w.mint(p, w.database(), time.Minute)
	if !w.connects(a.minted.Secret) {
		w.t.Error("it does not work")
	}
	if d := p.Revoke(w.t.Context(), []providers.Ending{a.ending()})[0]; d.Progress != broker.ProgressVerified {
		w.t.Errorf("%+v", d)
	}
}

// TestNamespace: every call names the namespace. Namespaces are Vault
// Enterprise's and OpenBao's; a proxy stands in for one, which wants the header
// and takes it off before a real Vault. It has a private authority, too, whose
// certificate bears another name than the address.
func TestNamespace(t *testing.T) {
	v, pg := servers(t)
	ca := newPrivateCA(t)
	target, err := url.Parse(v.address())
	if err != nil {
		t.Fatal(err)
	}
	forward := httputil.NewSingleHostReverseProxy(target)
	standIn := httptest.NewUnstartedServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if r.Header.Get("X-Vault-Namespace") != "team-a/prod" || r.TLS.ServerName != "vault.acme.test" {
			http.Error(rw, `{"errors":["no handler for route"]}`, http.StatusNotFound)
			return
		}
		r.Header.Del("X-Vault-Namespace")
		forward.ServeHTTP(rw, r)
	}))
	standIn.TLS = &tls.Config{Certificates: []tls.Certificate{ca.pair}}
	standIn.StartTLS()
	t.Cleanup(standIn.Close)

	w := newWorld(t, v, pg)
	w.setup(w.database())
	w.address = standIn.URL
	trust := fmt.Sprintf(`,"ca_file":%q,"server_name":"vault.acme.test"`, ca.caFile)
	w.extra = trust + `,"namespace":"team-a/prod/"`
	w.cycle(w.open())
	w.extra = trust
	a := mint(t.Context(), w.open(), w.request(w.database(), time.Minute))
	wantRefused(t, a, broker.ReasonProvider)
}

// TestEnvironment: what the environment says of Vault and PostgreSQL is for
// others. Of what vault/api reads, nothing reaches a request.
func TestEnvironment(t *testing.T) {
	v, pg := servers(t)
	seen := make(chan http.Header, 100)
	spy := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		t.Errorf("the environment's proxy or address was asked for %s", r.URL)
	}))
	t.Cleanup(spy.Close)
	for name, value := range map[string]string{
		"VAULT_TOKEN": "hvs.environment", "VAULT_ADDR": spy.URL, "VAULT_AGENT_ADDR": spy.URL, "VAULT_NAMESPACE": "environment", "VAULT_SKIP_VERIFY": "true",
		"VAULT_HEADERS": `{"X-Environment":"1"}`, "VAULT_WRAP_TTL": "5m", "VAULT_MAX_RETRIES": "5", "VAULT_CLIENT_TIMEOUT": "1ms", "VAULT_PROXY_ADDR": spy.URL,
		"VAULT_HTTP_PROXY": spy.URL, "VAULT_RATE_LIMIT": "1", "HTTP_PROXY": spy.URL, "HTTPS_PROXY": spy.URL, "VAULT_TLS_SERVER_NAME": "environment", "VAULT_SRV_LOOKUP": "true",
		"PGPASSWORD": "environment", "PGUSER": "environment", "PGHOST": "192.0.2.1",
	} {
		t.Setenv(name, value)
	}
	target, _ := url.Parse(v.address())
	forward := httputil.NewSingleHostReverseProxy(target)
	watch := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		seen <- r.Header.Clone()
		forward.ServeHTTP(rw, r)
	}))
	t.Cleanup(watch.Close)
	w := newWorld(t, v, pg)
	w.setup(w.database())
	w.address = watch.URL
	w.cycle(w.open())
	for range len(seen) {
		h := <-seen
		for _, name := range []string{"X-Environment", "X-Vault-Namespace", "X-Vault-Wrap-TTL"} {
			if h.Get(name) != "" {
				t.Errorf("%s: %s", name, h.Get(name))
			}
		}
		if h.Get("X-Vault-Token") == "hvs.environment" {
			t.Error("the environment's token was sent")
		}
		if h.Get("X-Vault-Request") != "true" {
			t.Error("the header that keeps forged requests from an agent of Vault is missing")
		}
	}
	ca := newPrivateCA(t)
	standIn := httptest.NewUnstartedServer(http.NotFoundHandler())
	standIn.TLS = &tls.Config{Certificates: []tls.Certificate{ca.pair}}
	standIn.StartTLS()
	t.Cleanup(standIn.Close)
	w.address = standIn.URL
	a := mint(t.Context(), w.open(), w.request(w.database(), time.Minute))
	var unknown *tls.CertificateVerificationError
	if !errors.As(a.err, &unknown) {
		t.Errorf("VAULT_SKIP_VERIFY counts: %v", a.err)
	}
}
