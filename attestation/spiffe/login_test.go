package spiffe_test

import (
	"bytes"
	"crypto/tls"
	"log/slog"
	"slices"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"

	"github.com/mayfly-security/mayfly/attestation/devtrust"
	"github.com/mayfly-security/mayfly/attestation/spiffe"
)

func opened(t *testing.T, addr string) *spiffe.Source {
	t.Helper()
	src, err := spiffe.Open(bounded(t), spiffe.Config{Addr: addr, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { src.Close() })
	return src
}

// TestJWTSVID: a token to log in with is the broker's, for the one audience
// that was named, and is verified by the trust domain's keys.
func TestJWTSVID(t *testing.T) {
	s := serve(t, devtrust.Config{TrustDomain: home})
	src := opened(t, add(t, s))
	token, expires, err := src.JWTSVID(bounded(t), "https://vault.test")
	if err != nil {
		t.Fatal(err)
	}
	got, err := jwtsvid.ParseAndValidate(token, s.Bundle(), []string{"https://vault.test"})
	if err != nil {
		t.Fatal(err)
	}
	if got.ID != src.ID() || !slices.Equal(got.Audience, []string{"https://vault.test"}) || !got.Expiry.Equal(expires) {
		t.Errorf("got a token of %s for %q until %s; its expiry was said to be %s", got.ID, got.Audience, got.Expiry, expires)
	}
	if _, err := jwtsvid.ParseAndValidate(token, s.Bundle(), []string{"https://other.test"}); err == nil {
		t.Error("the token is good for another audience")
	}
	if _, _, err := src.JWTSVID(bounded(t), ""); err == nil {
		t.Error("a token without an audience")
	}
	src.Close()
	if _, _, err := src.JWTSVID(bounded(t), "https://vault.test"); err == nil {
		t.Error("a closed source gave a token")
	}
}

// TestClientCertificate: a handshake after a rotation shows the new SVID.
func TestClientCertificate(t *testing.T) {
	s := serve(t, devtrust.Config{TrustDomain: home})
	src := opened(t, add(t, s))
	shown := func() []byte {
		t.Helper()
		cert, err := src.ClientCertificate(&tls.CertificateRequestInfo{})
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(cert.Certificate[0], own(t, src).Raw) || cert.PrivateKey == nil {
			t.Error("the certificate is not the present SVID with its key")
		}
		return cert.Certificate[0]
	}
	before, updated := shown(), src.Updated()
	if err := s.RotateSVIDs(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-updated:
	case <-time.After(10 * time.Second):
		t.Fatal("the rotation did not arrive")
	}
	if bytes.Equal(before, shown()) {
		t.Error("the certificate of before the rotation is still shown")
	}
}
