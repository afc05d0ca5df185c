package attestationtest

import (
	"crypto/tls"
	"crypto/x509"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// IdentitySource runs the contract of attestation.IdentitySource.
func IdentitySource(t *testing.T, open Open) {
	t.Run("is ready", func(t *testing.T) { testReady(t, open(t)) })
	t.Run("is pinned by its ID", func(t *testing.T) { testPinned(t, open(t)) })
	t.Run("is known to web clients", func(t *testing.T) { testWebClient(t, open(t)) })
	t.Run("follows rotation", func(t *testing.T) { testFollows(t, open(t)) })
	t.Run("wants a certificate", func(t *testing.T) { testWants(t, open(t)) })
	t.Run("wants the key", func(t *testing.T) { testWantsKey(t, open(t)) })
	t.Run("gives its own configuration to each", func(t *testing.T) { testOwnConfig(t, open(t)) })
}

func testReady(t *testing.T, w World) {
	if err := w.Identity.Ready(t.Context()); err != nil {
		t.Errorf("not ready: %v", err)
	}
	if !w.Identity.ID().MemberOf(w.Own.TrustDomain()) {
		t.Errorf("the broker is %s", w.Identity.ID())
	}
}

func testPinned(t *testing.T, w World) {
	s := serve(t, w, w.Identity.ServerTLS())
	me := issue(t, w.Own, svid(agent(w.Own)))
	newClient(t, s, "HTTP/2.0", agentTLS(w, me.tls())).ask(false).want(t, true, agent(w.Own).String())
	wrong := agentTLS(w, me.tls())
	other := spiffeid.RequireFromPath(w.Own.TrustDomain(), "/other")
	wrong.VerifyPeerCertificate = tlsconfig.VerifyPeerCertificate(w.Bundle(), tlsconfig.AuthorizeID(other))
	if _, err := newClient(t, s, "HTTP/2.0", wrong).try(); err == nil {
		t.Error("a client that wants another server is content")
	}
}

// testWebClient connects as curl does: with the bundle as authorities, and the
// DNS SAN as the name.
func testWebClient(t *testing.T, w World) {
	s := serve(t, w, w.Identity.ServerTLS())
	roots := x509.NewCertPool()
	for _, a := range w.Bundle().X509Authorities() {
		roots.AddCert(a)
	}
	me := issue(t, w.Own, svid(agent(w.Own)))
	config := &tls.Config{RootCAs: roots, ServerName: "localhost", Certificates: []tls.Certificate{*me.tls()}}
	for _, protocol := range []string{"HTTP/1.1", "HTTP/2.0"} {
		newClient(t, s, protocol, config.Clone()).ask(false).want(t, true, agent(w.Own).String())
	}
	config.ServerName = "example.org"
	if _, err := newClient(t, s, "HTTP/2.0", config).try(); err == nil {
		t.Error("the certificate is good for any name")
	}
}

// testFollows has one configuration serve through a change of authority.
func testFollows(t *testing.T, w World) {
	s := serve(t, w, w.Identity.ServerTLS())
	id := w.Identity.ID()
	show := func() []*x509.Certificate {
		t.Helper()
		conn, err := tls.Dial("tcp", s.addr, agentTLS(w, issue(t, w.Own, svid(agent(w.Own))).tls()))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		return conn.ConnectionState().PeerCertificates
	}
	before := show()
	w.Replace()
	after := show() // by the bundle of now
	if before[0].Equal(after[0]) {
		t.Error("the old certificate is shown")
	}
	if _, _, err := x509svid.Verify(before, w.Bundle()); err == nil {
		t.Error("the old certificate is valid still: the authority was not replaced")
	}
	if w.Identity.ID() != id {
		t.Errorf("the broker was %s and is %s", id, w.Identity.ID())
	}
}

// testWants connects without a certificate: in the handshake or by the Attestor,
// nobody is let in.
func testWants(t *testing.T, w World) {
	s := serve(t, w, w.Identity.ServerTLS())
	for _, protocol := range []string{"HTTP/1.1", "HTTP/2.0"} {
		if got, err := newClient(t, s, protocol, agentTLS(w, &tls.Certificate{})).try(); err == nil && got.ok {
			t.Errorf("by %s, a client without certificate is %q", protocol, got.body)
		}
	}
}

// testWantsKey shows an agent's certificate without having its key.
func testWantsKey(t *testing.T, w World) {
	s := serve(t, w, w.Identity.ServerTLS())
	stolen := issue(t, w.Own, svid(agent(w.Own)))
	stolen.key = newKey(t)
	for _, protocol := range []string{"HTTP/1.1", "HTTP/2.0"} {
		if got, err := newClient(t, s, protocol, agentTLS(w, stolen.tls())).try(); err == nil {
			t.Errorf("by %s, a client with another key gets the answer %q", protocol, got.body)
		}
	}
}

func testOwnConfig(t *testing.T, w World) {
	spoilt := w.Identity.ServerTLS()
	spoilt.SessionTicketsDisabled = false
	spoilt.ClientAuth = tls.NoClientCert
	spoilt.NextProtos[0] = "spoilt"
	config := w.Identity.ServerTLS()
	if !config.SessionTicketsDisabled {
		t.Error("session tickets are on")
	}
	if config.ClientAuth == tls.NoClientCert {
		t.Error("no client certificate is asked for")
	}
	if config.NextProtos[0] != "h2" {
		t.Errorf("the protocols are %q", config.NextProtos)
	}
}
