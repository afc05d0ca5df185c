package oidc

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"slices"
	"strings"
	"time"

	goidc "github.com/coreos/go-oidc/v3/oidc"

	"github.com/mayfly-security/mayfly/broker"
)

const maxToken = 16 << 10 // bytes

// The types of tokens (typ), lowercase and without "application/". A token of
// another kind that the same provider signs (a logout token, a security event)
// is no proof of anybody.
var (
	idTypes     = []string{"", "jwt"}
	bearerTypes = []string{"", "jwt", "at+jwt"} // RFC 9068, section 2.1
)

// VerifyBearer verifies a JWT of the provider's that somebody sent to show who
// they are: a JWT access token (RFC 9068) or one like it.
func (p *Provider) VerifyBearer(ctx context.Context, raw string, now time.Time) (broker.Person, time.Time, error) {
	person, _, until, err := p.shown(ctx, raw, now, p.config.Audience, true)
	if err != nil {
		return broker.Person{}, time.Time{}, bearer.refuse(err)
	}
	return person, until, nil
}

// VerifyUser verifies the token of a user on whose behalf an agent acts. Its id
// is a digest of what is signed, header and claims: whoever has a token can
// write its signature in another way, and it stays the same token.
func (p *Provider) VerifyUser(ctx context.Context, raw string, now time.Time) (broker.User, string, time.Time, error) {
	person, id, until, err := p.shown(ctx, raw, now, p.config.UserAudience, false)
	if err != nil {
		return broker.User{}, "", time.Time{}, user.refuse(err)
	}
	u := broker.User{Name: person.Name, Issuer: person.Issuer, Subject: person.Subject, AuthTime: person.AuthTime, ACR: person.ACR}
	return u, id, until, nil
}

// shown verifies a token for an audience that somebody showed. self says that it is to be the
// person's own, not one that they let somebody else have.
func (p *Provider) shown(ctx context.Context, raw string, now time.Time, audience string, self bool) (broker.Person, string, time.Time, error) {
	refuse := func(err error) (broker.Person, string, time.Time, error) {
		return broker.Person{}, "", time.Time{}, err
	}
	if audience == "" {
		return refuse(fault("this broker has no audience configured for such tokens, and so takes none"))
	}
	t, err := readToken(raw, bearerTypes)
	if err != nil {
		return refuse(err)
	}
	v, _, err := p.verify(ctx, t, now)
	if err != nil {
		return refuse(err)
	}
	if err := v.claims.onlyFor(audience); err != nil {
		return refuse(err)
	}
	if err := v.claims.shows(v.subject, self); err != nil {
		return refuse(err)
	}
	person, err := p.person(v, broker.SignInBearer)
	if err != nil {
		return refuse(err)
	}
	return person, t.id, v.until, nil
}

// shows refuses tokens that prove no person to whoever takes them as bearer
// tokens.
func (c claims) shows(subject string, self bool) error {
	client, err := c.text("client_id")
	switch {
	case err != nil:
		return err
	case client == subject: // RFC 9068, section 2.2: no person was there
		return fault("it is a client's own, and no person's")
	case c.has("events"): // a logout token, or a security event
		return fault("it tells of an event, and proves nobody")
	case c.has("cnf"): // RFC 7800: who shows it is to prove a key, which cannot be done here
		return fault("it is bound to a key, and not to be used as a bearer token")
	case self && c.has("act"): // RFC 8693, section 4.1
		return fault("somebody else acts in it on the person's behalf")
	}
	return nil
}

// token is a JWT in the one way of writing it that is taken.
type token struct {
	raw       string
	algorithm string
	id        string // digest of what is signed, hexadecimal
}

// readToken reads a JWT's form, and judges nothing that is signed. Libraries
// take a token in more than one way of writing (JSON, spaces, line ends, unused
// bits of base64); here one token is one text but for its signature, so that
// its digest names it.
func readToken(raw string, types []string) (token, error) {
	const malformed = fault("it is no signed JWT")
	if len(raw) > maxToken {
		return token{}, fault("it is longer than 16 KiB")
	}
	parts := strings.Split(raw, ".")
	if len(parts) != 3 {
		return token{}, malformed
	}
	var header []byte
	for i, part := range parts {
		decoded, err := base64.RawURLEncoding.Strict().DecodeString(part)
		if err != nil || len(decoded) == 0 || strings.ContainsAny(part, "\r\n") {
			return token{}, malformed
		}
		if i == 0 {
			header = decoded
		}
	}
	h, err := readClaims(header)
	if err != nil {
		return token{}, malformed
	}
	if h.has("crit") { // RFC 7515, section 4.1.11: it is to be refused by whoever does not know it
		return token{}, fault("its header asks for something that is not known here")
	}
	algorithm, err := h.text("alg")
	if err != nil {
		return token{}, malformed
	}
	kind, err := h.text("typ")
	if err != nil {
		return token{}, malformed
	}
	if !slices.Contains(types, strings.TrimPrefix(strings.ToLower(kind), "application/")) {
		return token{}, fault("it is a token of another kind")
	}
	sum := sha256.Sum256([]byte(parts[0] + "." + parts[1]))
	return token{raw: raw, algorithm: algorithm, id: hex.EncodeToString(sum[:])}, nil
}

// verify verifies a token's signature and what every token must say.
func (p *Provider) verify(ctx context.Context, t token, now time.Time) (verdict, *goidc.IDToken, error) {
	f, err := p.discover(ctx)
	if err != nil {
		return verdict{}, nil, err
	}
	if !slices.Contains(f.algorithms, t.algorithm) {
		return verdict{}, nil, fault("it is signed in a way that is not taken")
	}
	// The library verifies the signature, and judge the rest, exactly: the
	// library has exceptions for some issuers and another idea of time.
	j := &judgement{keys: f.keys}
	verified, err := goidc.NewVerifier(p.config.Issuer, j, &goidc.Config{
		SupportedSigningAlgs: f.algorithms, SkipClientIDCheck: true, SkipExpiryCheck: true, SkipIssuerCheck: true,
	}).Verify(ctx, t.raw)
	switch {
	case j.away != nil:
		return verdict{}, nil, j.away
	case err != nil && !j.verified:
		return verdict{}, nil, fault("its signature is not the identity provider's")
	case err != nil:
		return verdict{}, nil, fault("a claim in it is not what it should be")
	}
	var payload json.RawMessage
	if err := verified.Claims(&payload); err != nil {
		return verdict{}, nil, fault("what it says is no JSON object")
	}
	c, err := readClaims(payload)
	if err != nil {
		return verdict{}, nil, err
	}
	v, err := judge(c, p.config.Issuer, now)
	return v, verified, err
}

// person is who a verified token is about.
func (p *Provider) person(v verdict, method broker.SignInMethod) (broker.Person, error) {
	name, err := v.claims.personName(p.config.NameClaim)
	if err != nil {
		return broker.Person{}, err
	}
	groups, err := v.claims.groups(p.config.GroupsClaim)
	if err != nil {
		return broker.Person{}, err
	}
	return broker.Person{
		Name: name, Issuer: p.config.Issuer, Subject: v.subject, Groups: groups,
		AuthTime: v.authTime, ACR: v.acr, Method: method, IssuedAt: v.issued,
	}, nil
}
