package token

import (
	"encoding/json"
	"fmt"
	"net"
	"net/url"
	"path/filepath"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
)

// How a tool's resource servers verify tokens.
const (
	introspect = "introspect"
	offline    = "offline"
)

// Limits on what a configuration or scope may say.
const (
	maxAudience   = 256 // bytes
	maxScopes     = 64
	maxScope      = 128 // bytes of one scope
	defaultLeeway = 30 * time.Second
	maxLeeway     = 5 * time.Minute
)

// config is a provider's configuration.
type config struct {
	Issuer        string         `json:"issuer"`        // the iss claim: an https URL, or http on loopback; required
	Keys          string         `json:"keys"`          // absolute path of the directory of signing keys; either this or signer
	Signer        string         `json:"signer"`        // what Driver.OpenSigner opens
	Introspectors []introspector `json:"introspectors"` // empty: nobody may introspect

	mayIntrospect map[spiffeid.ID]map[string]bool
}

type introspector struct {
	ID        string   `json:"id"`        // SPIFFE ID of a resource server
	Audiences []string `json:"audiences"` // whose tokens it may introspect; not empty
}

func (d Driver) decodeConfig(raw json.RawMessage) (config, error) {
	var c config
	if err := providers.Decode(raw, &c); err != nil {
		return c, err
	}
	if err := checkIssuer(c.Issuer); err != nil {
		return c, err
	}
	switch {
	case (c.Keys == "") == (c.Signer == ""):
		return c, providers.FieldErrorf("keys", "exactly one of keys and signer must be set")
	case c.Signer != "" && d.OpenSigner == nil:
		return c, providers.FieldErrorf("signer", "this mayflyd knows no signers; set keys")
	case c.Keys != "" && !filepath.IsAbs(c.Keys):
		return c, providers.FieldErrorf("keys", "must be the absolute path of a directory, not %q", c.Keys)
	}
	c.mayIntrospect = make(map[spiffeid.ID]map[string]bool)
	for i, in := range c.Introspectors {
		at := fmt.Sprintf("introspectors[%d]", i)
		id, err := spiffeid.FromString(in.ID)
		if err != nil {
			return c, providers.FieldErrorf(at+".id", "%q is no SPIFFE ID: %v", in.ID, err)
		}
		if c.mayIntrospect[id] != nil {
			return c, providers.FieldErrorf(at+".id", "%s is listed twice", id)
		}
		if len(in.Audiences) == 0 {
			return c, providers.FieldErrorf(at+".audiences", "must list at least one audience")
		}
		c.mayIntrospect[id] = make(map[string]bool)
		for n, audience := range in.Audiences {
			if err := checkAudience(fmt.Sprintf("%s.audiences[%d]", at, n), audience); err != nil {
				return c, err
			}
			c.mayIntrospect[id][audience] = true
		}
	}
	return c, nil
}

// introspected reports whether anybody may introspect tokens for audience.
func (c config) introspected(audience string) bool {
	for _, audiences := range c.mayIntrospect {
		if audiences[audience] {
			return true
		}
	}
	return false
}

// checkIssuer keeps RFC 8414 section 2, and lets a broker for one machine have
// an issuer on loopback.
func checkIssuer(issuer string) error {
	u, err := url.Parse(issuer)
	if issuer == "" || err != nil || u.Host == "" || u.User != nil || strings.ContainsAny(issuer, "?#") {
		return providers.FieldErrorf("issuer", "must be an https URL without query and fragment")
	}
	ip := net.ParseIP(u.Hostname())
	loopback := u.Hostname() == "localhost" || ip != nil && ip.IsLoopback()
	if u.Scheme != "https" && !(u.Scheme == "http" && loopback) {
		return providers.FieldErrorf("issuer", "must be an https URL; only a loopback host may have http")
	}
	return nil
}

func checkAudience(field, audience string) error {
	if audience == "" || len(audience) > maxAudience || strings.ContainsAny(audience, " \t\r\n") || broker.Clean(audience) != audience {
		return providers.FieldErrorf(field, "must be one audience: a URL or name of 1 to %d bytes without spaces", maxAudience)
	}
	return nil
}

// scope is what a tool's tokens can do.
type scope struct {
	Audience        string   `json:"audience"`         // the one resource server that accepts the tokens; required
	Scopes          []string `json:"scopes"`           // RFC 6749 section 3.3; at least one
	Verification    string   `json:"verification"`     // "introspect" or "offline"; required
	BindCertificate bool     `json:"bind_certificate"` // tokens work only with the agent's certificate (RFC 8705)
	Leeway          *string  `json:"leeway"`           // offline only: the clock skew that verifiers allow; absent means 30s

	leeway time.Duration // zero for introspect
}

func decodeScope(raw json.RawMessage) (scope, error) {
	var s scope
	if err := providers.Decode(raw, &s); err != nil {
		return s, err
	}
	if err := checkAudience("audience", s.Audience); err != nil {
		return s, err
	}
	if len(s.Scopes) == 0 || len(s.Scopes) > maxScopes {
		return s, providers.FieldErrorf("scopes", "must list 1 to %d scopes", maxScopes)
	}
	seen := make(map[string]bool)
	for i, each := range s.Scopes {
		at := fmt.Sprintf("scopes[%d]", i)
		if !isScopeToken(each) {
			return s, providers.FieldErrorf(at, "%q is no scope: 1 to %d printable ASCII characters without space, \" and \\", each, maxScope)
		}
		if seen[each] {
			return s, providers.FieldErrorf(at, "%q is listed twice", each)
		}
		seen[each] = true
	}
	switch s.Verification {
	case introspect:
		if s.Leeway != nil {
			return s, providers.FieldErrorf("leeway", "is for verification: %s only; the broker's own clock decides introspections", offline)
		}
	case offline:
		s.leeway = defaultLeeway
		if s.Leeway == nil {
			break
		}
		leeway, err := time.ParseDuration(*s.Leeway)
		if err != nil || leeway < 0 || leeway > maxLeeway {
			return s, providers.FieldErrorf("leeway", "must be a duration from 0s to %s", maxLeeway)
		}
		s.leeway = leeway
	default:
		return s, providers.FieldErrorf("verification",
			"must be %q (resource servers ask the broker about each token, and a revocation works at once) or %q (they verify the signature alone, and a token works until it expires)", introspect, offline)
	}
	return s, nil
}

// isScopeToken is scope-token of RFC 6749 section 3.3.
func isScopeToken(s string) bool {
	for i := range len(s) {
		if c := s[i]; c < 0x21 || c > 0x7e || c == '"' || c == '\\' {
			return false
		}
	}
	return len(s) > 0 && len(s) <= maxScope
}
