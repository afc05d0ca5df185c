package oidc

import (
	"context"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	goidc "github.com/coreos/go-oidc/v3/oidc"
	"golang.org/x/oauth2"

	"github.com/mayfly-security/mayfly/broker"
)

// AuthCodeURL is where the browser goes to sign in. It is empty where the
// provider is away or RedirectURL is not configured: Ready says why.
func (p *Provider) AuthCodeURL(state, nonce, verifier string, need broker.StepUp) string {
	if p.config.RedirectURL == "" || state == "" || nonce == "" || verifier == "" {
		return ""
	}
	ctx, cancel := context.WithTimeout(context.Background(), p.config.Timeout)
	defer cancel()
	f, err := p.discover(ctx)
	if err != nil {
		return ""
	}
	options := []oauth2.AuthCodeOption{oauth2.S256ChallengeOption(verifier), goidc.Nonce(nonce)}
	if need.MaxAge > 0 {
		seconds := max(1, int64(need.MaxAge/time.Second)) // 0 has some providers ask, and others not
		options = append(options, oauth2.SetAuthURLParam("max_age", strconv.FormatInt(seconds, 10)))
	}
	if len(need.ACR) > 0 {
		options = append(options, oauth2.SetAuthURLParam("acr_values", strings.Join(need.ACR, " ")))
	}
	if f.claims {
		// Without it, many say nothing of auth_time unless max_age is asked; so
		// the age of an ordinary sign-in would not be known.
		options = append(options, oauth2.SetAuthURLParam("claims", `{"id_token":{"auth_time":null,"acr":null}}`))
	}
	return p.oauth(f, "").AuthCodeURL(state, options...)
}

// Ready reports whether the provider was heard: nil, or the refusal that every
// sign-in gets at present.
func (p *Provider) Ready(ctx context.Context) error {
	if _, err := p.discover(ctx); err != nil {
		return signIn.refuse(err)
	}
	return nil
}

// CheckResponse compares the parameter iss of the provider's answer at the
// redirect URI (RFC 9207). Where the provider says that it sends it, it must be
// there: its lack, or another's name, is an answer of somebody else.
func (p *Provider) CheckResponse(ctx context.Context, iss string) error {
	f, err := p.discover(ctx)
	if err != nil {
		return signIn.refuse(err)
	}
	if iss != p.config.Issuer && (iss != "" || f.responses) {
		return signIn.refuse(fault("the answer that the browser brought is not the identity provider's"))
	}
	return nil
}

// Exchange redeems the code that the browser brought back. Its caller compares
// AuthTime and ACR with what was asked for: a provider may not have done it.
func (p *Provider) Exchange(ctx context.Context, code, verifier, nonce string, now time.Time) (broker.Person, error) {
	person, err := p.exchange(ctx, code, verifier, nonce, now)
	if err != nil {
		return broker.Person{}, signIn.refuse(err)
	}
	return person, nil
}

func (p *Provider) exchange(ctx context.Context, code, verifier, nonce string, now time.Time) (broker.Person, error) {
	if p.config.RedirectURL == "" {
		return broker.Person{}, fault("this broker has no redirect URL configured, so nobody signs in with a browser")
	}
	if code == "" || verifier == "" || nonce == "" {
		return broker.Person{}, fault("the code, its verifier or the nonce is missing")
	}
	f, err := p.discover(ctx)
	if err != nil {
		return broker.Person{}, err
	}
	secret, err := p.secret()
	if err != nil {
		return broker.Person{}, away{err}
	}
	tokens, err := p.oauth(f, secret).Exchange(goidc.ClientContext(ctx, p.client), code, oauth2.VerifierOption(verifier))
	var answer *oauth2.RetrieveError
	switch {
	case errors.As(err, &answer) && answer.ErrorCode == "invalid_grant":
		return broker.Person{}, fault("the identity provider does not take the code: it was used, is too old, or is another sign-in's")
	case err != nil:
		return broker.Person{}, away{cause("redeeming the code", err)}
	}
	return p.tokens(ctx, f, tokens, nonce, broker.SignInBrowser, now)
}

// tokens judges what the token endpoint gave. nonce is empty for a sign-in by
// device code, which has none.
func (p *Provider) tokens(ctx context.Context, f *found, tokens *oauth2.Token, nonce string, method broker.SignInMethod, now time.Time) (broker.Person, error) {
	raw, ok := tokens.Extra("id_token").(string)
	if !ok || raw == "" {
		return broker.Person{}, fault("the identity provider gave no ID token")
	}
	t, err := readToken(raw, idTypes)
	if err != nil {
		return broker.Person{}, err
	}
	v, verified, err := p.verify(ctx, t, now)
	if err != nil {
		return broker.Person{}, err
	}
	if err := v.claims.issuedTo(p.config.ClientID); err != nil {
		return broker.Person{}, err
	}
	if nonce != "" {
		got, err := v.claims.text("nonce")
		if err != nil {
			return broker.Person{}, err
		}
		if subtle.ConstantTimeCompare([]byte(got), []byte(nonce)) != 1 {
			return broker.Person{}, fault("it is another sign-in's: the nonce differs")
		}
	}
	if v.claims.has("at_hash") && verified.VerifyAccessToken(tokens.AccessToken) != nil {
		return broker.Person{}, fault("the access token that came with it is another's")
	}
	if v.claims, err = p.complete(ctx, f, v, tokens.AccessToken); err != nil {
		return broker.Person{}, err
	}
	return p.person(v, method)
}

// complete fetches from the userinfo endpoint what the ID token leaves out: a
// provider that keeps to the letter (Core, section 5.4) puts what the scopes
// ask for only there.
func (p *Provider) complete(ctx context.Context, f *found, v verdict, access string) (claims, error) {
	name, groups := v.claims.has(p.config.NameClaim), v.claims.has(p.config.GroupsClaim)
	if name && groups || f.userinfo == "" {
		return v.claims, nil
	}
	info, err := f.provider.UserInfo(goidc.ClientContext(ctx, p.client), oauth2.StaticTokenSource(&oauth2.Token{AccessToken: access}))
	if err != nil {
		return nil, away{cause("asking for the person's claims", err)}
	}
	var payload json.RawMessage
	if info.Claims(&payload) != nil {
		return nil, fault("the person's claims are no JSON object")
	}
	more, err := readClaims(payload)
	if err != nil {
		return nil, err
	}
	subject, err := more.text("sub")
	if err != nil {
		return nil, err
	}
	if subject != v.subject { // Core, section 5.3.2
		return nil, fault("the person's claims are another person's")
	}
	return v.claims.with(more, p.config.NameClaim, p.config.GroupsClaim), nil
}

// with is c, with what it lacks of a person's name and groups from more.
func (c claims) with(more claims, name, groups string) claims {
	all := maps.Clone(c)
	if !c.has(name) { // an address and whether it was verified are of one source
		all.replace("email_verified", more)
		all.replace(name, more)
	}
	if !c.has(groups) && (more.has(groups) || more.has("_claim_names")) {
		all.replace("_claim_names", more)
		all.replace(groups, more)
	}
	return all
}

func (c claims) replace(name string, from claims) {
	delete(c, name)
	if value, ok := from[name]; ok {
		c[name] = value
	}
}

func (p *Provider) oauth(f *found, secret string) *oauth2.Config {
	return &oauth2.Config{
		ClientID: p.config.ClientID, ClientSecret: secret, RedirectURL: p.config.RedirectURL,
		Endpoint: oauth2.Endpoint{AuthURL: f.auth, TokenURL: f.token, AuthStyle: f.style},
		Scopes:   p.scopes(f),
	}
}

func (p *Provider) scopes(f *found) []string {
	if len(p.config.Scopes) > 0 {
		return p.config.Scopes
	}
	scopes := []string{"openid", "email", "profile"}
	if slices.Contains(f.scopes, "groups") {
		scopes = append(scopes, "groups")
	}
	return scopes
}
