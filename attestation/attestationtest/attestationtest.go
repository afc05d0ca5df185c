// Package attestationtest is the contract of the package attestation as a test
// suite. Every implementation that judges X.509-SVIDs passes it:
//
//	func TestAttestor(t *testing.T)       { attestationtest.Attestor(t, open) }
//	func TestIdentitySource(t *testing.T) { attestationtest.IdentitySource(t, open) }
//	func TestI10_Connections(t *testing.T) { attestationtest.Connections(t, open) }
package attestationtest

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"math/big"
	"net/http"
	"net/url"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/attestation"
	"github.com/mayfly-security/mayfly/broker"
)

// Authority signs certificates of any form for one trust domain.
// devtrust.Server is one.
type Authority interface {
	TrustDomain() spiffeid.TrustDomain
	// Issue signs the template as it is, good or odd.
	Issue(template *x509.Certificate, public crypto.PublicKey) (*x509.Certificate, error)
}

// World is an implementation under test and what is around it.
type World struct {
	Attestor attestation.Attestor
	// Identity is the broker's own. Its certificate has the DNS SAN
	// "localhost" and is valid for an hour at least.
	Identity attestation.IdentitySource
	// Own is the authority of the broker's trust domain.
	Own Authority
	// Federated is the authority of a trust domain that the Attestor is
	// configured to accept besides.
	Federated Authority
	// Stranger is the authority of a trust domain whose bundle the broker's
	// Workload API gives, but that the Attestor is not configured to accept.
	Stranger Authority
	// Bundle returns the present bundle of the broker's trust domain.
	Bundle func() *x509bundle.Bundle
	// Replace puts a new authority in the place of Own's, takes the old one out
	// of the bundle, and returns when the implementation has heard of both. Own
	// issues by the new authority afterwards.
	Replace func()
}

// Open makes a fresh World that ends with the test.
type Open func(t *testing.T) World

// agent is a SPIFFE ID of the authority's trust domain.
func agent(a Authority) spiffeid.ID {
	return spiffeid.RequireFromPath(a.TrustDomain(), "/agent/support-bot")
}

// present is an instant of this hour in whole seconds, as certificates count.
func present() time.Time { return time.Now().Truncate(time.Second) }

// pair is a certificate with its key.
type pair struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// tls returns the pair as a TLS certificate, followed by a chain.
func (p pair) tls(chain ...*x509.Certificate) *tls.Certificate {
	c := &tls.Certificate{Certificate: [][]byte{p.cert.Raw}, PrivateKey: p.key, Leaf: p.cert}
	for _, cert := range chain {
		c.Certificate = append(c.Certificate, cert.Raw)
	}
	return c
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// svid is the template of a flawless SVID that is valid for ten minutes.
func svid(id spiffeid.ID) *x509.Certificate {
	return &x509.Certificate{
		URIs:                  []*url.URL{id.URL()},
		NotBefore:             present(), // authorities are no older than the test
		NotAfter:              present().Add(10 * time.Minute),
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		BasicConstraintsValid: true,
	}
}

// signing is the template of an intermediate authority of a trust domain.
func signing(td spiffeid.TrustDomain) *x509.Certificate {
	c := svid(td.ID())
	c.IsCA = true
	c.KeyUsage = x509.KeyUsageCertSign
	return c
}

// issue has the authority sign the template for a new key.
func issue(t *testing.T, a Authority, template *x509.Certificate) pair {
	t.Helper()
	key := newKey(t)
	cert, err := a.Issue(template, key.Public())
	if err != nil {
		t.Fatal(err)
	}
	return pair{cert, key}
}

// sign has the parent sign the template for a new key. Nobody asks whether the
// parent may.
func sign(t *testing.T, parent pair, template *x509.Certificate) pair {
	t.Helper()
	return create(t, template, parent.cert, newKey(t), parent.key)
}

// signSelf makes a certificate that is its own authority.
func signSelf(t *testing.T, template *x509.Certificate) pair {
	t.Helper()
	key := newKey(t)
	return create(t, template, template, key, key)
}

func create(t *testing.T, template, parent *x509.Certificate, key, by *ecdsa.PrivateKey) pair {
	t.Helper()
	template.SerialNumber = big.NewInt(time.Now().UnixNano())
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), by)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return pair{cert, key}
}

// request is one that came over a connection with these client certificates.
func request(certs ...*x509.Certificate) *http.Request {
	return &http.Request{TLS: &tls.ConnectionState{HandshakeComplete: true, PeerCertificates: certs}}
}

// refused checks that Attest refused for the reason, in words that can be shown.
func refused(t *testing.T, caller broker.Caller, err error, want broker.Reason) {
	t.Helper()
	if caller != (broker.Caller{}) {
		t.Errorf("a caller goes with the refusal: %+v", caller)
	}
	var refusal *broker.Error
	if !errors.As(err, &refusal) {
		t.Errorf("got the error %v (%T), not a refusal for %s", err, err, want)
		return
	}
	if refusal.Reason != want {
		t.Errorf("refused for %v, not for %s", err, want)
	}
	if refusal.Message == "" || refusal.Next == "" {
		t.Errorf("the refusal says not what happened and what to do: %+v", refusal)
	}
	for _, text := range []string{refusal.Message, refusal.Next} {
		if broker.Clean(text) != text || len(text) > 4096 {
			t.Errorf("the refusal's text is not fit to be shown: %.200q", text)
		}
	}
}

// accepted checks that Attest named the certificate's holder.
func accepted(t *testing.T, caller broker.Caller, err error, id spiffeid.ID) {
	t.Helper()
	if err != nil {
		t.Errorf("refused: %v", err)
	} else if caller.ID != id {
		t.Errorf("the caller is %s, not %s", caller.ID, id)
	}
}
