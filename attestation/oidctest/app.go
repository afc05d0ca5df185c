package oidctest

import (
	"context"
	"fmt"

	"golang.org/x/oauth2"
)

// App is an application that people sign in to, and that gets access tokens of
// theirs for somebody else (RFC 8707): a public client of an OpenID provider.
type App struct {
	ClientID, RedirectURI  string
	AuthorizeURL, TokenURL string
	Scopes                 []string
}

// AccessToken has a person sign in, by a browser without cookies that fills in
// answers, and returns their access token for an audience.
func (a App) AccessToken(ctx context.Context, audience string, answers map[string]string) (string, error) {
	config := oauth2.Config{ClientID: a.ClientID, RedirectURL: a.RedirectURI, Scopes: a.Scopes,
		Endpoint: oauth2.Endpoint{AuthURL: a.AuthorizeURL, TokenURL: a.TokenURL, AuthStyle: oauth2.AuthStyleInParams}}
	b := New(nil)
	b.StopAt(a.RedirectURI)
	state, verifier, resource := oauth2.GenerateVerifier(), oauth2.GenerateVerifier(), oauth2.SetAuthURLParam("resource", audience)
	end, err := b.Walk(ctx, config.AuthCodeURL(state, oauth2.S256ChallengeOption(verifier), resource), answers)
	if err != nil {
		return "", err
	}
	q := end.URL.Query()
	if !end.Stopped || q.Get("state") != state || q.Get("code") == "" {
		return "", fmt.Errorf("the browser is at %s, and brought no code: %s %s", end.URL.Host, q.Get("error"), q.Get("error_description"))
	}
	tokens, err := config.Exchange(ctx, q.Get("code"), oauth2.VerifierOption(verifier), resource)
	if err != nil {
		return "", err
	}
	return tokens.AccessToken, nil
}
