// Package oidc signs people in at an OpenID provider (OpenID Connect Core 1.0).
// Any provider that keeps to the standard works: it needs discovery, the
// authorization code flow with PKCE, and signatures that are not symmetric.
//
// The broker is the only relying party: one client registration, one redirect
// URI. What the package returns was verified: signature, issuer, audience,
// nonce, times. Whether an authentication is fresh or strong enough is its
// caller's to say, from Person.AuthTime and Person.ACR (RFC 9470): the package
// asks the provider for it, and tells what the provider answered.
//
// The provider may be away: New does not ask it, and every method finds it
// when it is needed, so that the broker starts without it.
package oidc

import (
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/mayfly-security/mayfly/attestation"
)

const (
	defaultTimeout = 10 * time.Second
	maxSecret      = 4 << 10 // bytes of a client secret's file
)

// Config says which provider, and how the broker is known there.
type Config struct {
	// Issuer is the provider's URL, exactly as its discovery document has it.
	// Required. https, but on loopback.
	Issuer string
	// ClientID is the broker's at the provider. Required.
	ClientID string
	// ClientSecretFile is the file that holds the client's secret. It must be
	// readable by its owner alone, and is read at each use, so that it can be
	// replaced. Empty: a public client, which PKCE protects.
	ClientSecretFile string
	// RedirectURL is where the provider sends browsers back to, as it was
	// registered: https://HOST/signin/callback. Empty: nobody signs in with a
	// browser; AuthCodeURL and Exchange refuse.
	RedirectURL string
	// Audience is what the broker is called in the tokens that others show it.
	// It must be the broker's alone. Empty: VerifyBearer refuses every token. If
	// it is ClientID, ID tokens are taken as bearer tokens too: for providers
	// that issue no others.
	Audience string
	// UserAudience is what the broker is called in the tokens of users that
	// agents show. It must be the broker's alone, and another than Audience and
	// ClientID: or the agent, and whoever sees its request, could come as the
	// user, and approve what it asks for. Empty: VerifyUser refuses every token.
	UserAudience string
	// Scopes are asked for at a sign-in; "openid" must be among them. Empty:
	// openid, email, profile, and groups where the provider knows that scope.
	Scopes []string
	// GroupsClaim is the claim that holds a person's groups: an array of
	// strings, or one string. Empty: "groups". A person without the claim is in
	// no group; one with more than 200 is refused.
	GroupsClaim string
	// NameClaim is the claim that people are called by in policies and
	// evidence: "email", "sub", "preferred_username" or another. It must be one
	// that nobody can choose for themselves at the provider. Empty: "email".
	// An e-mail address counts only if email_verified is true.
	NameClaim string
	// CAFile has the certificates, PEM, of the authorities that the provider's
	// certificate is judged by. Empty: the system's.
	CAFile string
	// Timeout bounds each request to the provider. Zero: 10 s.
	Timeout time.Duration
	// Sample says that the provider is mayflyd dev's own, whose people are made
	// up. False: such a provider is refused, because anybody may be anybody
	// there. True: every other is.
	Sample bool
	// Now is the clock by which discovery is repeated. It judges no token: the
	// methods' now does. Nil: time.Now.
	Now func() time.Time
}

// Provider is an OpenID provider as the broker sees it. Its methods may be
// called from many goroutines. Errors are *broker.Error and hold no token, no
// code and no text of the provider's, and neither do their causes.
type Provider struct {
	config    Config
	client    *http.Client
	discovery discovery
}

var _ attestation.IdentityProvider = (*Provider)(nil)

// New checks the configuration, and does not ask the provider.
func New(config Config) (*Provider, error) {
	if err := checkURL(config.Issuer, false); err != nil {
		return nil, fmt.Errorf("identity provider: issuer: %w", err)
	}
	if config.ClientID == "" {
		return nil, errors.New("identity provider: there is no client ID")
	}
	if config.RedirectURL != "" {
		if err := checkURL(config.RedirectURL, true); err != nil {
			return nil, fmt.Errorf("identity provider: redirect URL: %w", err)
		}
	}
	if config.UserAudience != "" && (config.UserAudience == config.Audience || config.UserAudience == config.ClientID) {
		return nil, errors.New("identity provider: the audience of users' tokens is that of others: an agent that is shown such a token could come as its user")
	}
	if len(config.Scopes) > 0 && !slices.Contains(config.Scopes, "openid") {
		return nil, errors.New(`identity provider: "openid" is not among the scopes, and without it nobody is told who signed in`)
	}
	if config.Timeout < 0 {
		return nil, fmt.Errorf("identity provider: the time-out is %s", config.Timeout)
	}
	config.Scopes = slices.Clone(config.Scopes)
	if config.GroupsClaim == "" {
		config.GroupsClaim = "groups"
	}
	if config.NameClaim == "" {
		config.NameClaim = "email"
	}
	if config.Timeout == 0 {
		config.Timeout = defaultTimeout
	}
	if config.Now == nil {
		config.Now = time.Now
	}
	roots, err := readRoots(config.CAFile)
	if err != nil {
		return nil, fmt.Errorf("identity provider: %w", err)
	}
	p := &Provider{config: config, client: newClient(roots, config.Timeout)}
	if _, err := p.secret(); err != nil {
		return nil, fmt.Errorf("identity provider: %w", err)
	}
	return p, nil
}

// Issuer is the provider's.
func (p *Provider) Issuer() string { return p.config.Issuer }

// Sample reports that the provider is mayflyd dev's own.
func (p *Provider) Sample() bool { return p.config.Sample }

// secret is the client's at this moment; empty for a public client.
func (p *Provider) secret() (string, error) {
	if p.config.ClientSecretFile == "" {
		return "", nil
	}
	f, err := os.Open(p.config.ClientSecretFile)
	if err != nil {
		return "", fmt.Errorf("reading the client secret: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return "", fmt.Errorf("reading the client secret: %w", err)
	}
	if info.Mode().Perm()&0o077 != 0 {
		return "", fmt.Errorf("others than its owner may open %s, the client secret's file: chmod 600 it", p.config.ClientSecretFile)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxSecret+1))
	if err != nil {
		return "", fmt.Errorf("reading the client secret: %w", err)
	}
	secret := strings.TrimRight(string(b), "\r\n")
	if secret == "" || len(b) > maxSecret {
		return "", fmt.Errorf("%s, the client secret's file, is empty or has more than %d bytes", p.config.ClientSecretFile, maxSecret)
	}
	return secret, nil
}

func readRoots(file string) (*x509.CertPool, error) {
	if file == "" {
		return nil, nil // the system's
	}
	pem, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("reading the CA certificates: %w", err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%s has no CA certificate in PEM", file)
	}
	return roots, nil
}

// checkURL refuses what tokens and codes must not travel to. A redirect URL
// may have a query; an issuer has none (OpenID Connect Discovery, section 3).
func checkURL(s string, query bool) error {
	u, err := url.Parse(s)
	switch {
	case err != nil || u.Host == "" || u.Opaque != "":
		return fmt.Errorf("%q is no URL like https://HOST/PATH", s)
	case u.User != nil || u.Fragment != "" || !query && (u.RawQuery != "" || u.ForceQuery):
		return fmt.Errorf("%q has a part that does not belong there: a user, a query or a fragment", s)
	case u.Scheme == "https", u.Scheme == "http" && onLoopback(u.Hostname()):
		return nil
	}
	return fmt.Errorf("%q is not https; http is for loopback only", s)
}

func onLoopback(host string) bool {
	if host == "localhost" {
		return true
	}
	addr, err := netip.ParseAddr(host)
	return err == nil && addr.IsLoopback()
}
