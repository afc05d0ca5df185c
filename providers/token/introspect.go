package token

import (
	"context"
	"encoding/json"
	"strings"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
)

// maxToken bounds what is parsed at all, in bytes.
const maxToken = 8 << 10

// Introspect implements providers.Introspector. It says yes for tokens of both
// verifications: a resource server that could verify offline may ask too.
func (p *provider) Introspect(_ context.Context, token string, server spiffeid.ID) (providers.Introspection, bool) {
	c, ok := p.verify(token)
	if !ok || !p.mayIntrospect(server, c.Audience) {
		return providers.Introspection{}, false
	}
	lease, err := broker.ParseLeaseID(c.ID)
	if err != nil {
		return providers.Introspection{}, false
	}
	told := map[string]any{
		"scope":      c.Scope,
		"client_id":  c.ClientID,
		"token_type": "Bearer", // also where cnf is present: RFC 8705 section 3
		"exp":        c.Expires,
		"iat":        c.IssuedAt,
		"sub":        c.Subject,
		"aud":        c.Audience,
		"iss":        c.Issuer,
		"jti":        c.ID,
		"tool":       c.Tool,
	}
	if c.Params != nil {
		told["params"] = c.Params
	}
	if c.Incident != "" {
		told["incident"] = c.Incident
	}
	if c.Confirm != nil {
		told["cnf"] = map[string]any{"x5t#S256": c.Confirm.Certificate}
	}
	return providers.Introspection{Lease: lease, Claims: told}, true
}

// isCompact reports whether token has only the characters of RFC 7515 section
// 3.1. Decoders leave out line ends and spaces; a token with some is not the
// one that was minted.
func isCompact(token string) bool {
	for i := range len(token) {
		c := token[i]
		if !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '_' || c == '.') {
			return false
		}
	}
	return true
}

// verify returns the claims of a token that this provider signed and that has
// not expired. The key is one of our own, chosen by kid; nothing in the token
// chooses the algorithm or brings a key.
func (p *provider) verify(token string) (claims, bool) {
	if len(token) > maxToken || !isCompact(token) {
		return claims{}, false
	}
	jws, err := jose.ParseSignedCompact(token, []jose.SignatureAlgorithm{jose.EdDSA})
	if err != nil || len(jws.Signatures) != 1 {
		return claims{}, false
	}
	header := jws.Signatures[0].Protected
	if typ, _ := header.ExtraHeaders[jose.HeaderType].(string); typ != tokenType {
		return claims{}, false
	}
	public, ok := p.keys.current().verifies[header.KeyID]
	if !ok {
		return claims{}, false
	}
	payload, err := jws.Verify(public)
	if err != nil {
		return claims{}, false
	}
	var c claims
	dec := json.NewDecoder(strings.NewReader(string(payload)))
	dec.UseNumber() // an integer parameter comes out as it went in
	if dec.Decode(&c) != nil {
		return claims{}, false
	}
	if c.Issuer != p.config.Issuer || p.now().Unix() >= c.Expires {
		return claims{}, false
	}
	return c, true
}
