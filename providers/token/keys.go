package token

import (
	"context"
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/go-jose/go-jose/v4"

	"github.com/mayfly-security/mayfly/providers"
)

// tokenType is the typ of every token (RFC 9068 section 2.1).
const tokenType = "at+jwt"

// keys are a provider's keys, as they are now.
type keys interface {
	// current returns the keys as of now. It never returns nil; there may be
	// none that signs.
	current() *keySet
}

// keySet is immutable.
type keySet struct {
	signer   jose.Signer // nil if no key signs
	verifies map[string]ed25519.PublicKey
	jwks     json.RawMessage
}

// fixed are keys that do not change while the provider is open.
type fixed struct{ set *keySet }

func (f fixed) current() *keySet { return f.set }

func (d Driver) openKeys(ctx context.Context, c config, config providers.Config) (keys, error) {
	if c.Keys != "" {
		return openDirectory(c.Keys, config.Now, config.Log)
	}
	signer, err := d.OpenSigner(ctx, c.Signer)
	if err != nil {
		return nil, fmt.Errorf("opening signer: %w", err)
	}
	if err := probe(signer); err != nil {
		return nil, fmt.Errorf("trying signer: %w", err)
	}
	set, err := newKeySet([]crypto.Signer{signer})
	if err != nil {
		return nil, err
	}
	return fixed{set}, nil
}

// probe has the signer sign once, so that one that cannot is found before the
// first agent needs it. What is signed is no JWT.
func probe(s crypto.Signer) error {
	public, ok := s.Public().(ed25519.PublicKey)
	if !ok {
		return fmt.Errorf("its key is a %T and not an Ed25519 key", s.Public())
	}
	message := []byte("mayfly signer probe")
	signature, err := s.Sign(rand.Reader, message, crypto.Hash(0))
	if err != nil {
		return err
	}
	if !ed25519.Verify(public, message, signature) {
		return errors.New("its signature does not verify with its public key")
	}
	return nil
}

// newKeySet makes a set of signers; the last one signs. All are Ed25519.
func newKeySet(signers []crypto.Signer) (*keySet, error) {
	set := &keySet{verifies: make(map[string]ed25519.PublicKey)}
	jwks := jose.JSONWebKeySet{Keys: []jose.JSONWebKey{}}
	for i, s := range signers {
		jwk := jose.JSONWebKey{Key: s.Public(), Algorithm: string(jose.EdDSA), Use: "sig"}
		thumbprint, err := jwk.Thumbprint(crypto.SHA256) // RFC 7638, RFC 8037 appendix A.3
		if err != nil {
			return nil, fmt.Errorf("naming key: %w", err)
		}
		jwk.KeyID = base64.RawURLEncoding.EncodeToString(thumbprint)
		if _, ok := set.verifies[jwk.KeyID]; !ok {
			set.verifies[jwk.KeyID] = s.Public().(ed25519.PublicKey)
			jwks.Keys = append(jwks.Keys, jwk)
		}
		if i < len(signers)-1 {
			continue
		}
		set.signer, err = jose.NewSigner(
			jose.SigningKey{Algorithm: jose.EdDSA, Key: opaque{s, jwk}},
			(&jose.SignerOptions{}).WithType(tokenType))
		if err != nil {
			return nil, fmt.Errorf("making signer: %w", err)
		}
	}
	var err error
	if set.jwks, err = json.Marshal(jwks); err != nil {
		return nil, fmt.Errorf("encoding key set: %w", err)
	}
	return set, nil
}

// opaque lets go-jose sign with any crypto.Signer that has an Ed25519 key.
type opaque struct {
	signer crypto.Signer
	public jose.JSONWebKey
}

func (o opaque) Public() *jose.JSONWebKey { return &o.public }

func (o opaque) Algs() []jose.SignatureAlgorithm { return []jose.SignatureAlgorithm{jose.EdDSA} }

func (o opaque) SignPayload(payload []byte, _ jose.SignatureAlgorithm) ([]byte, error) {
	return o.signer.Sign(rand.Reader, payload, crypto.Hash(0))
}
