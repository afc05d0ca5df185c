// Package token is the driver "token": access tokens that the broker signs
// itself, as JWTs with EdDSA (RFC 9068, RFC 8037).
//
// A token has one audience, the tool's scopes, the lease's parameters and, if
// the tool says so, the fingerprint of the agent's certificate (RFC 8705
// section 3.1). A tool says how its resource servers verify tokens:
//
//   - "introspect": they ask the broker about each token (RFC 7662). The
//     broker answers from its store, and takes a lease out of active there
//     before it calls Revoke. By then no introspection accepts the token, so
//     Revoke and Confirm have nothing to do and say verified at once. They say
//     nothing about a lease that is active still: the engine does not ask.
//   - "offline": they verify the signature alone, with the published keys.
//     Nothing that the broker does reaches them. Revoke and Confirm say so
//     (no progress, look again when it dies) until the token has died by
//     itself. A verifier that allows for clock skew accepts a token a little
//     after its exp; so exp lies before the lease's end by the tool's leeway.
//
// A token is inert: it has no effect until somebody holds it, so that a lease
// without a handle is one of which nobody ever saw the token.
//
// Keys are files in one directory. Adding one rotates: the newest signs, all
// that are there verify. No configuration changes with it.
package token

import (
	"context"
	"crypto"
	"encoding/json"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
)

// Field is the one field of the secret: the token.
const Field = "access_token"

// Driver is the driver "token". The zero value signs with keys in files.
type Driver struct {
	// OpenSigner opens the signer that the configuration's "signer" names, for
	// installations whose key is in a KMS. The signer's public key is an
	// ed25519.PublicKey, and it signs messages unhashed (crypto.Hash(0)). It
	// may be used from many goroutines. If nil, only keys in files can be
	// configured.
	OpenSigner func(ctx context.Context, name string) (crypto.Signer, error)
}

var (
	_ providers.Driver  = Driver{}
	_ providers.Meaning = Driver{}
)

// ValidateConfig implements providers.Driver. It does not look at the keys.
func (d Driver) ValidateConfig(raw json.RawMessage) error {
	_, err := d.decodeConfig(raw)
	return err
}

// Meaning implements providers.Meaning. The issuer is what resource servers
// trust. Who may introspect, and where the keys lie, gives a token no more.
func (d Driver) Meaning(raw json.RawMessage) (json.RawMessage, error) {
	c, err := d.decodeConfig(raw)
	if err != nil {
		return nil, err
	}
	return json.Marshal(map[string]string{"issuer": c.Issuer})
}

// ValidateScope implements providers.Driver.
func (d Driver) ValidateScope(raw json.RawMessage, tool broker.Tool) (providers.ScopeInfo, error) {
	c, err := d.decodeConfig(raw)
	if err != nil {
		return providers.ScopeInfo{}, err
	}
	s, err := decodeScope(tool.Scope)
	if err != nil {
		return providers.ScopeInfo{}, err
	}
	info := providers.ScopeInfo{Fields: []string{Field}}
	if s.Verification == introspect {
		if !c.introspected(s.Audience) {
			return info, providers.FieldErrorf("audience",
				"nobody may introspect tokens for %q; list it at an introspector of the provider, or say verification: %s", s.Audience, offline)
		}
		return info, nil
	}
	info.Survives = "verified offline: works until its own expiry (exp), whatever is revoked"
	// The whole seconds of exp cost up to one, and the least useful life is another.
	info.MinTTL = s.leeway + 2*time.Second
	if tool.MaxTTL != 0 && tool.MaxTTL < info.MinTTL {
		return info, providers.FieldErrorf("leeway", "%s leaves nothing of the tool's maximum TTL of %s, which must be at least %s", s.leeway, tool.MaxTTL, info.MinTTL)
	}
	return info, nil
}

// Open implements providers.Driver. It reads the keys and refuses any that
// others could read.
func (d Driver) Open(ctx context.Context, config providers.Config) (providers.Provider, error) {
	c, err := d.decodeConfig(config.Raw)
	if err != nil {
		return nil, err
	}
	keys, err := d.openKeys(ctx, c, config)
	if err != nil {
		return nil, err
	}
	return &provider{config: c, keys: keys, now: config.Now}, nil
}

// provider is one issuer of tokens.
type provider struct {
	config config
	keys   keys
	now    func() time.Time
}

var (
	_ providers.Provider     = (*provider)(nil)
	_ providers.Introspector = (*provider)(nil)
	_ providers.KeySet       = (*provider)(nil)
)

// Traits implements providers.Provider.
func (p *provider) Traits() providers.Traits { return providers.Traits{Inert: true} }

// JWKS implements providers.KeySet: every key that verifies now.
func (p *provider) JWKS() json.RawMessage { return p.keys.current().jwks }

// Close implements providers.Provider.
func (p *provider) Close() error { return nil }

// mayIntrospect reports whether server may ask about tokens for audience.
func (p *provider) mayIntrospect(server spiffeid.ID, audience string) bool {
	return p.config.mayIntrospect[server][audience]
}
