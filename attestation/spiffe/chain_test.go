package spiffe_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"net/http"
	"net/url"
	"testing"
	"time"

	"github.com/mayfly-security/mayfly/broker"
)

// TestChainsAreBounded: whoever sends certificates that only cost signatures to
// check is refused before any is checked.
func TestChainsAreBounded(t *testing.T) {
	w := open(t)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	issue := func(serial int64, subject string, padding int) *x509.Certificate {
		template := &x509.Certificate{
			SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: subject},
			NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
			IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
			ExtraExtensions: []pkix.Extension{{Id: []int{1, 2, 3, 4}, Value: append([]byte{4, 0x82, byte(padding >> 8), byte(padding)}, make([]byte, padding)...)}},
		}
		if subject == "leaf" {
			template.IsCA, template.KeyUsage = false, x509.KeyUsageDigitalSignature
			template.URIs = []*url.URL{{Scheme: "spiffe", Host: home.Name(), Path: "/agent"}}
		}
		der, err := x509.CreateCertificate(rand.Reader, template, &x509.Certificate{Subject: pkix.Name{CommonName: "ca"}}, &key.PublicKey, key)
		if err != nil {
			t.Fatal(err)
		}
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		return cert
	}
	leaf := issue(1, "leaf", 1)
	for name, c := range map[string]struct {
		chain []*x509.Certificate
		want  broker.Reason
	}{
		"one authority twice": {[]*x509.Certificate{leaf, issue(2, "ca", 1), issue(3, "ca", 1)}, broker.ReasonSVIDMalformed},
		"too many":            {[]*x509.Certificate{leaf, issue(2, "a", 1), issue(3, "b", 1), issue(4, "c", 1), issue(5, "d", 1), issue(6, "e", 1)}, broker.ReasonSVIDMalformed},
		"too large":           {[]*x509.Certificate{leaf, issue(2, "a", 20_000)}, broker.ReasonSVIDMalformed},
		"just untrusted":      {[]*x509.Certificate{leaf, issue(2, "ca", 1)}, broker.ReasonUntrusted},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := w.Attestor.Attest(&http.Request{TLS: &tls.ConnectionState{PeerCertificates: c.chain}}, time.Now())
			if broker.ReasonOf(err) != c.want {
				t.Errorf("%v; want %s", err, c.want)
			}
		})
	}
}
