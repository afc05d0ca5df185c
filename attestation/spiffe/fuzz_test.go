package spiffe

import (
	"bytes"
	"crypto/ed25519"
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
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/mayfly-security/mayfly/broker"
)

// FuzzAttest hands any certificates to the Attestor: whatever the bytes are, it
// lets only the authority's one SVID through, and refuses the rest in plain
// words. Everything is made from fixed keys, so that each of the fuzzer's
// processes judges alike.
func FuzzAttest(f *testing.F) {
	td := spiffeid.RequireTrustDomainFromString("dev.test")
	id := spiffeid.RequireFromPath(td, "/agent/support-bot")
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	caKey := ed25519.NewKeyFromSeed(bytes.Repeat([]byte{1}, ed25519.SeedSize))
	leafKey := ed25519.NewKeyFromSeed(bytes.Repeat([]byte{2}, ed25519.SeedSize))
	create := func(template, parent *x509.Certificate, key ed25519.PrivateKey) *x509.Certificate {
		template.SerialNumber = big.NewInt(1)
		template.NotBefore, template.NotAfter = now, now.Add(time.Hour)
		template.BasicConstraintsValid = true
		der, err := x509.CreateCertificate(nil, template, parent, key.Public(), caKey)
		if err != nil {
			f.Fatal(err)
		}
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			f.Fatal(err)
		}
		return cert
	}
	caTemplate := &x509.Certificate{URIs: []*url.URL{td.ID().URL()}, IsCA: true, KeyUsage: x509.KeyUsageCertSign}
	ca := create(caTemplate, caTemplate, caKey)
	good := create(&x509.Certificate{URIs: []*url.URL{id.URL()}, KeyUsage: x509.KeyUsageDigitalSignature}, ca, leafKey)
	two := create(&x509.Certificate{URIs: []*url.URL{id.URL(), id.URL()}}, ca, leafKey)
	s := &Source{id: id, current: view{
		svid:    &x509svid.SVID{ID: id, Certificates: []*x509.Certificate{good}, PrivateKey: leafKey},
		bundles: x509bundle.NewSet(x509bundle.FromX509Authorities(td, []*x509.Certificate{ca})),
	}}

	f.Add(good.Raw)
	f.Add(two.Raw)
	f.Add(ca.Raw)
	f.Add(bytes.Join([][]byte{good.Raw, ca.Raw}, nil))
	f.Add(bytes.Replace(good.Raw, []byte("spiffe://dev.test/agent"), []byte("spiffe://dev.test//gent"), 1))
	f.Add(bytes.Replace(good.Raw, []byte("spiffe://dev.test/"), []byte("spiffe://bev.test/"), 1))
	f.Fuzz(func(t *testing.T, der []byte) {
		certs, err := x509.ParseCertificates(der)
		if err != nil {
			return // such a client gets no further than the handshake
		}
		caller, err := s.Attest(&http.Request{TLS: &tls.ConnectionState{PeerCertificates: certs}}, now)
		if len(certs) > 0 && len(certs) <= maxChain && certs[0].Equal(good) != (err == nil) {
			t.Fatalf("the one good SVID: %t; refused with %v", certs[0].Equal(good), err)
		}
		if err == nil {
			if caller.ID != id {
				t.Fatalf("the caller is %s", caller.ID)
			}
			return
		}
		var refusal *broker.Error
		if !errors.As(err, &refusal) || refusal.Message == "" || refusal.Next == "" || broker.Clean(refusal.Message) != refusal.Message {
			t.Fatalf("refused with %#v", err)
		}
	})
}
