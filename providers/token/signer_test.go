package token

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/providertest"
)

// remote is a signer as a KMS would be: its key cannot be had.
type remote struct {
	private ed25519.PrivateKey
	fail    error
	wrong   bool
}

func (r *remote) Public() crypto.PublicKey { return r.private.Public() }

func (r *remote) Sign(random io.Reader, message []byte, opts crypto.SignerOpts) ([]byte, error) {
	if r.wrong {
		message = append(message, '!')
	}
	if r.fail != nil {
		return nil, r.fail
	}
	return r.private.Sign(random, message, opts)
}

func TestOpenSigner(t *testing.T) {
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ecKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	raw := json.RawMessage(strings.Replace(string(configFor("/x")), `"keys":"/x"`, `"signer":"kms:key/1"`, 1))
	clock := providertest.NewClock(time.Now())
	openWith := func(s crypto.Signer, err error) (providers.Provider, error) {
		d := Driver{OpenSigner: func(_ context.Context, name string) (crypto.Signer, error) {
			if name != "kms:key/1" {
				t.Errorf("asked for %q", name)
			}
			return s, err
		}}
		return d.Open(t.Context(), providers.Config{Raw: raw, Log: slog.New(slog.DiscardHandler), Now: clock.Now})
	}
	r := &remote{private: private}
	p, err := openWith(r, nil)
	if err != nil {
		t.Fatal(err)
	}
	f := &fixture{provider: p.(*provider), clock: clock}
	_, _, token := f.mint(t, introspectScope)
	decoded(t, f.JWKS(), token)
	if !f.accepts(t, token) {
		t.Error("not accepted")
	}
	r.fail = errors.New("the KMS is away")
	m, err := f.Mint(t.Context(), f.request(introspectScope), nil)
	if !errors.Is(err, providers.ErrNothingMade) || !errors.Is(err, r.fail) || errors.Is(err, providers.ErrRefused) || !m.Secret.IsZero() {
		t.Errorf("mint: %v", err)
	}
	for name, s := range map[string]crypto.Signer{"failing": r, "wrong": &remote{private: private, wrong: true}, "ECDSA": ecKey} {
		if _, err := openWith(s, nil); err == nil {
			t.Errorf("opened with a %s signer", name)
		}
	}
	if _, err := openWith(nil, errors.New("no such key")); err == nil || !strings.Contains(err.Error(), "no such key") {
		t.Errorf("%v", err)
	}
	if err := (Driver{}).ValidateConfig(raw); err == nil {
		t.Error("a signer was configured, and there is nothing to open it with")
	}
}
