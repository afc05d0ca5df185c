package token

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"math"
	"reflect"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
)

// TestClaims reads a token by hand and compares all that is in it.
func TestClaims(t *testing.T) {
	f := newFixture(t)
	req := f.request(boundScope)
	req.Certificate = sha256.Sum256([]byte("a certificate"))
	m, err := f.Mint(t.Context(), req, nil)
	if err != nil {
		t.Fatal(err)
	}
	token, _ := m.Secret.Reveal(Field)
	header, payload := decoded(t, f.JWKS(), token)
	kid := header["kid"]
	if want := map[string]any{"typ": "at+jwt", "alg": "EdDSA", "kid": kid}; !reflect.DeepEqual(header, want) {
		t.Errorf("header %v, want %v", header, want)
	}
	want := map[string]any{
		"iss": issuer, "sub": agent.String(), "client_id": agent.String(), "aud": audience,
		"exp": float64(req.End.Unix()), "iat": float64(req.Now.Unix()), "jti": string(req.Lease),
		"scope": "crm.read", "tool": "crm.read", "incident": string(req.Incident),
		"params": map[string]any{"account": "acme", "limit": float64(42), "dry": true},
		"cnf":    map[string]any{"x5t#S256": base64.RawURLEncoding.EncodeToString(req.Certificate[:])},
	}
	if !reflect.DeepEqual(payload, want) {
		t.Errorf("payload %v, want %v", payload, want)
	}
	// The kid is the RFC 7638 thumbprint, made by hand.
	for id, x := range published(t, f.JWKS()) {
		sum := sha256.Sum256([]byte(`{"crv":"Ed25519","kty":"OKP","x":"` + base64.RawURLEncoding.EncodeToString(x) + `"}`))
		if id != kid || id != base64.RawURLEncoding.EncodeToString(sum[:]) {
			t.Errorf("kid %q is not the thumbprint", id)
		}
	}
	if !m.DiesAt.Equal(req.End) || m.Survives != "" || !m.Ends.IsZero() {
		t.Errorf("minted %+v", m)
	}
}

// TestJOSEVerifies: a resource server with go-jose, as its documentation tells to use it.
func TestJOSEVerifies(t *testing.T) {
	f := newFixture(t)
	req, _, token := f.mint(t, offlineScope)
	var set jose.JSONWebKeySet
	if err := json.Unmarshal(f.JWKS(), &set); err != nil {
		t.Fatal(err)
	}
	parsed, err := jwt.ParseSigned(token, []jose.SignatureAlgorithm{jose.EdDSA})
	if err != nil {
		t.Fatal(err)
	}
	var c jwt.Claims
	if err := parsed.Claims(set, &c); err != nil {
		t.Fatal(err)
	}
	expected := jwt.Expected{Issuer: issuer, AnyAudience: jwt.Audience{audience}, Subject: agent.String(), ID: string(req.Lease)}
	for _, test := range []struct {
		at time.Time
		ok bool
	}{
		{req.Now, true},
		{req.End.Add(-31 * time.Second), true},
		{req.End.Add(-time.Millisecond), false}, // the fraction of a second that exp has not
		{req.End, false},
	} {
		expected.Time = test.at
		// The leeway is what the tool allows for; the token must be dead by
		// its End even so.
		if err := c.ValidateWithLeeway(expected, 30*time.Second); (err == nil) != test.ok {
			t.Errorf("%s before the end: %v", req.End.Sub(test.at), err)
		}
	}
}

func TestOffline(t *testing.T) {
	f := newFixture(t)
	req, m, token := f.mint(t, strings.Replace(offlineScope, "}", `,"leeway":"45s"}`, 1))
	_, payload := decoded(t, f.JWKS(), token)
	if want := float64(req.End.Add(-45 * time.Second).Unix()); payload["exp"] != want {
		t.Errorf("exp %v, want %v", payload["exp"], want)
	}
	if !m.DiesAt.Equal(req.End) {
		t.Errorf("dies at %s, want %s", m.DiesAt, req.End)
	}
	for _, word := range []string{"verified offline", stamp(req.End), stamp(req.End.Add(-45 * time.Second)), "45s"} {
		if !strings.Contains(m.Survives, word) {
			t.Errorf("survives %q does not say %q", m.Survives, word)
		}
	}
	ending := []providers.Ending{{Lease: req.Lease, Handle: m.Handle}} // DiesAt comes from the handle
	for name, ask := range map[string]func() providers.Death{
		"Revoke":  func() providers.Death { return f.Revoke(t.Context(), ending)[0] },
		"Confirm": func() providers.Death { return f.Confirm(t.Context(), ending)[0] },
	} {
		if d := ask(); d.Progress != broker.ProgressNone || d.Err != nil || !d.RetryAt.Equal(req.End) {
			t.Errorf("%s of a live token: %+v", name, d)
		}
	}
	f.clock.AdvanceTo(req.End.Add(-time.Nanosecond))
	if d := f.Revoke(t.Context(), ending)[0]; d.Progress == broker.ProgressVerified {
		t.Error("verified before it died")
	}
	f.clock.AdvanceTo(req.End)
	if d := f.Revoke(t.Context(), ending)[0]; d.Progress != broker.ProgressVerified || d.Err != nil {
		t.Errorf("dead, and %+v", d)
	}
}

// TestMalformedHandleDies: what cannot be read is dead when the engine's
// DiesAt says so, and no sooner.
func TestMalformedHandleDies(t *testing.T) {
	f := newFixture(t)
	e := providers.Ending{Lease: "l1", Handle: providers.Handle(`{"v":2,"verification":"offline"}`), DiesAt: f.clock.Now().Add(time.Minute)}
	d := f.Revoke(t.Context(), []providers.Ending{e})[0]
	if d.Err == nil || !strings.Contains(d.Err.Error(), "newer Mayfly") || !d.RetryAt.Equal(e.DiesAt) {
		t.Errorf("%+v", d)
	}
	f.clock.AdvanceTo(e.DiesAt)
	if d := f.Revoke(t.Context(), []providers.Ending{e})[0]; d.Err != nil || d.Progress != broker.ProgressVerified {
		t.Errorf("after DiesAt: %+v", d)
	}
}

func TestMintRefuses(t *testing.T) {
	f := newFixture(t)
	for _, test := range []struct {
		name   string
		change func(*providers.MintRequest)
		reason broker.Reason
	}{
		{"no certificate to bind to", func(r *providers.MintRequest) { r.Tool = tool(boundScope) }, broker.ReasonProviderRefused},
		{"no time left after the leeway", func(r *providers.MintRequest) {
			r.Tool = tool(offlineScope)
			r.End = r.Now.Add(30 * time.Second)
		}, broker.ReasonTTL},
		{"end in the past", func(r *providers.MintRequest) { r.End = r.Now.Add(-time.Second) }, broker.ReasonTTL},
		{"unknown parameter", func(r *providers.MintRequest) { r.Params = map[string]string{"admin": "true"} }, broker.ReasonParameter},
		{"not a number", func(r *providers.MintRequest) { r.Params = map[string]string{"limit": "1e3"} }, broker.ReasonParameter},
		{"not a boolean", func(r *providers.MintRequest) { r.Params = map[string]string{"dry": "yes"} }, broker.ReasonParameter},
		{"not in the list", func(r *providers.MintRequest) { r.Params = map[string]string{"account": "evil"} }, broker.ReasonParameter},
		{"inexact number", func(r *providers.MintRequest) {
			r.Params = map[string]string{"limit": strconv.FormatInt(math.MaxInt64, 10)}
		}, broker.ReasonParameter},
		{"a broken scope", func(r *providers.MintRequest) { r.Tool.Scope = json.RawMessage(`{}`) }, broker.ReasonInternal},
		{"too large", func(r *providers.MintRequest) {
			r.Tool.Params = nil
			r.Params = make(map[string]string)
			for i := range 10 {
				name := strings.Repeat("p", 10) + strconv.Itoa(i)
				value := strings.Repeat("v", 1000)
				r.Tool.Params = append(r.Tool.Params, broker.Param{Name: name, Type: broker.ParamString, OneOf: []string{value}})
				r.Params[name] = value
			}
		}, broker.ReasonInternal},
	} {
		t.Run(test.name, func(t *testing.T) {
			req := f.request(introspectScope)
			test.change(&req)
			m, err := f.Mint(t.Context(), req, nil)
			if !errors.Is(err, providers.ErrNothingMade) || !errors.Is(err, providers.ErrRefused) || broker.ReasonOf(err) != test.reason {
				t.Errorf("%v (%s)", err, broker.ReasonOf(err))
			}
			if !m.Secret.IsZero() || m.Handle != nil {
				t.Errorf("refused, and %+v", m)
			}
		})
	}
}

// TestShortestTTL: what ValidateScope promises as the shortest TTL can be minted,
// wherever in a second it falls.
func TestShortestTTL(t *testing.T) {
	f := newFixture(t)
	for scope, least := range map[string]time.Duration{introspectScope: time.Second, offlineScope: 0} {
		info, err := Driver{}.ValidateScope(configFor(f.dir), tool(scope))
		if err != nil {
			t.Fatal(err)
		}
		ttl := max(info.MinTTL, least)
		for range 20 {
			f.clock.Advance(77 * time.Millisecond)
			req := f.request(scope)
			req.End = req.Now.Add(ttl)
			if _, err := f.Mint(t.Context(), req, nil); err != nil {
				t.Errorf("TTL of %s at %s: %v", ttl, req.Now, err)
			}
		}
	}
}
