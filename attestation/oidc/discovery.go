package oidc

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"sync"
	"time"

	goidc "github.com/coreos/go-oidc/v3/oidc"
	"golang.org/x/oauth2"
)

const (
	freshFor   = time.Hour   // what was discovered is asked for again after this
	retryFresh = time.Minute // after a failure, while there is an old answer
	retryAway  = time.Second // after a failure, while there is none
)

// algorithms are the signatures that are taken, where the provider says that it
// uses them. None is symmetric: a client's secret signs for nobody.
var algorithms = []string{goidc.RS256, goidc.PS256, goidc.ES256, goidc.EdDSA}

// discovery is what was last heard of the provider.
type discovery struct {
	asking sync.Mutex // held by who asks while nothing is known

	mu    sync.Mutex
	found *found
	err   error // of the last try, while found is nil
	next  time.Time
}

// found is what a provider's discovery document says. It is never changed.
type found struct {
	provider   *goidc.Provider // for userinfo
	keys       *keys
	jwks       string
	algorithms []string
	auth       string // the authorization endpoint
	token      string
	device     string // empty: it takes no device codes
	userinfo   string
	style      oauth2.AuthStyle
	scopes     []string // that it knows
	claims     bool     // it takes the parameter "claims"
	responses  bool     // its answers name it (RFC 9207)
}

// document has the fields of a discovery document that are used here (OpenID
// Connect Discovery 1.0, section 3; RFC 8414; RFC 8628, section 4; RFC 9207,
// section 3).
type document struct {
	Auth        string   `json:"authorization_endpoint"`
	Token       string   `json:"token_endpoint"`
	Device      string   `json:"device_authorization_endpoint"`
	UserInfo    string   `json:"userinfo_endpoint"`
	JWKS        string   `json:"jwks_uri"`
	Algorithms  []string `json:"id_token_signing_alg_values_supported"`
	TokenAuth   []string `json:"token_endpoint_auth_methods_supported"`
	Scopes      []string `json:"scopes_supported"`
	Challenges  []string `json:"code_challenge_methods_supported"`
	Claims      bool     `json:"claims_parameter_supported"`
	ResponseIss bool     `json:"authorization_response_iss_parameter_supported"`
	Sample      bool     `json:"mayfly_dev"`
}

// discover returns what is known of the provider, and asks it where nothing is
// or where that is old. Where nothing is known, one goroutine at a time asks,
// and the others are told what it was told; an old answer serves meanwhile.
func (p *Provider) discover(ctx context.Context) (*found, error) {
	d := &p.discovery
	old, err, due := d.look(p.config.Now())
	if !due {
		return old, err
	}
	if old == nil {
		d.asking.Lock()
		defer d.asking.Unlock()
		if old, err, due = d.look(p.config.Now()); !due {
			return old, err
		}
	}
	next, err := p.ask(ctx, old)
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case err == nil:
		d.found, d.err, d.next = next, nil, p.config.Now().Add(freshFor)
	case d.found != nil: // look has put the next try off
	case ctx.Err() != nil: // the caller went away, which says nothing about the provider
		return nil, err
	default:
		d.err, d.next = err, p.config.Now().Add(retryAway)
	}
	return d.found, d.err
}

// look says what is known, and whether it is time to ask. Whoever is told that
// there is an old answer and that it is time asks alone.
func (d *discovery) look(now time.Time) (_ *found, err error, due bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if due = !now.Before(d.next); due && d.found != nil {
		d.next = now.Add(retryFresh)
	}
	return d.found, d.err, due
}

func (p *Provider) ask(ctx context.Context, old *found) (*found, error) {
	ctx, cancel := context.WithTimeout(goidc.ClientContext(ctx, p.client), p.config.Timeout)
	defer cancel()
	provider, err := goidc.NewProvider(ctx, p.config.Issuer)
	var other *goidc.IssuerMismatchError
	if errors.As(err, &other) {
		return nil, away{errors.New("discovering the identity provider: its document names another issuer than the configuration does")}
	}
	if err != nil {
		return nil, away{cause("discovering the identity provider", err)}
	}
	var doc document
	if err := provider.Claims(&doc); err != nil {
		return nil, away{cause("discovering the identity provider", err)}
	}
	f, err := p.read(doc)
	if err != nil {
		return nil, away{fmt.Errorf("discovering the identity provider: %w", err)}
	}
	f.provider = provider
	if old != nil && old.jwks == f.jwks {
		f.keys = old.keys
	} else {
		f.keys = newKeys(p.client, f.jwks, p.config.Now)
	}
	return f, nil
}

// read judges a discovery document.
func (p *Provider) read(doc document) (*found, error) {
	if doc.Sample != p.config.Sample {
		if doc.Sample {
			return nil, errors.New("it is mayflyd dev's own, with sample people, and only mayflyd dev takes it")
		}
		return nil, errors.New("it is not mayflyd dev's own, which the configuration says that it is")
	}
	for _, e := range []struct {
		name, url string
		required  bool
	}{
		{"authorization_endpoint", doc.Auth, true},
		{"token_endpoint", doc.Token, true},
		{"jwks_uri", doc.JWKS, true},
		{"userinfo_endpoint", doc.UserInfo, false},
		{"device_authorization_endpoint", doc.Device, false},
	} {
		if e.url == "" && !e.required {
			continue
		}
		if p.checkEndpoint(e.url) != nil { // which quotes it; it is not ours to repeat
			return nil, fmt.Errorf("its %s is missing, or is no URL of https (http is for loopback only)", e.name)
		}
	}
	// A provider that lists no method may still know S256: the list is optional.
	if len(doc.Challenges) > 0 && !slices.Contains(doc.Challenges, "S256") {
		return nil, errors.New("it does not know PKCE's S256 (RFC 7636)")
	}
	advertised := doc.Algorithms
	if len(advertised) == 0 {
		advertised = []string{goidc.RS256} // Core, section 3.1.3.7
	}
	f := &found{
		jwks: doc.JWKS, auth: doc.Auth, token: doc.Token, device: doc.Device, userinfo: doc.UserInfo,
		scopes: doc.Scopes, claims: doc.Claims, responses: doc.ResponseIss, style: oauth2.AuthStyleInParams,
	}
	for _, a := range algorithms {
		if slices.Contains(advertised, a) {
			f.algorithms = append(f.algorithms, a)
		}
	}
	if len(f.algorithms) == 0 {
		return nil, fmt.Errorf("it signs with none of %v", algorithms)
	}
	if p.config.ClientSecretFile != "" {
		// The default is Basic (Discovery, section 3). A library that tries both
		// would spend the code at the first try.
		if len(doc.TokenAuth) == 0 || slices.Contains(doc.TokenAuth, "client_secret_basic") {
			f.style = oauth2.AuthStyleInHeader
		} else if !slices.Contains(doc.TokenAuth, "client_secret_post") {
			return nil, errors.New("it takes no client secret, neither as client_secret_basic nor as client_secret_post")
		}
	}
	return f, nil
}

// checkEndpoint refuses a step down: an issuer of https has endpoints of https.
func (p *Provider) checkEndpoint(endpoint string) error {
	if err := checkURL(endpoint, true); err != nil {
		return err
	}
	from, err := url.Parse(p.config.Issuer)
	if err != nil {
		return err
	}
	to, err := url.Parse(endpoint)
	if err != nil {
		return err
	}
	if from.Scheme == "https" && to.Scheme != "https" {
		return errors.New("it is not https")
	}
	return nil
}
