package oidc_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"maps"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

	"github.com/go-jose/go-jose/v4"

	"github.com/mayfly-security/mayfly/attestation/oidc"
)

// forge is an OpenID provider that a test has in its hand: it answers what it
// is told, and signs what no real provider would.
type forge struct {
	t      *testing.T
	issuer string
	keys   map[jose.SignatureAlgorithm]crypto.Signer

	mu       sync.Mutex
	document map[string]any
	answers  map[string]answer // by path; in the place of its own
	asked    map[string]int    // by path
	form     map[string]string // the last one that was sent
}

type answer struct {
	status int
	body   string
	header http.Header
}

func newForge(t *testing.T) *forge {
	t.Helper()
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	f := &forge{t: t, answers: map[string]answer{}, asked: map[string]int{}, keys: map[jose.SignatureAlgorithm]crypto.Signer{
		jose.ES256: newEC(t, elliptic.P256()), jose.ES384: newEC(t, elliptic.P384()), jose.RS256: newRSA(), jose.EdDSA: ed,
	}}
	f.keys[jose.PS256] = f.keys[jose.RS256]
	srv := httptest.NewServer(f)
	t.Cleanup(srv.Close)
	f.issuer = srv.URL
	f.document = map[string]any{
		"issuer": f.issuer, "authorization_endpoint": f.issuer + "/auth", "token_endpoint": f.issuer + "/token",
		"jwks_uri": f.issuer + "/keys", "device_authorization_endpoint": f.issuer + "/device",
		"id_token_signing_alg_values_supported": []string{"ES256", "RS256", "PS256", "EdDSA", "ES384", "HS256", "none"},
	}
	return f
}

func newEC(t *testing.T, curve elliptic.Curve) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// newRSA is made once: it takes a second under the race detector.
var newRSA = sync.OnceValue(func() *rsa.PrivateKey {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		panic(err)
	}
	return key
})

func (f *forge) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.asked[r.URL.Path]++
	if r.Method == http.MethodPost {
		_ = r.ParseForm()
		f.form = map[string]string{"Authorization": r.Header.Get("Authorization")}
		for name := range r.PostForm {
			f.form[name] = r.PostForm.Get(name)
		}
	}
	w.Header().Set("Content-Type", "application/json")
	if a, ok := f.answers[r.URL.Path]; ok {
		maps.Copy(w.Header(), a.header)
		w.WriteHeader(a.status)
		_, _ = w.Write([]byte(a.body))
		return
	}
	switch r.URL.Path {
	case "/.well-known/openid-configuration":
		_ = json.NewEncoder(w).Encode(f.document)
	case "/keys":
		var set jose.JSONWebKeySet
		for alg, key := range f.keys {
			set.Keys = append(set.Keys, jose.JSONWebKey{Key: key.Public(), KeyID: string(alg), Algorithm: string(alg), Use: "sig"})
		}
		// A symmetric key that a careless provider publishes: nobody is to use it.
		set.Keys = append(set.Keys, jose.JSONWebKey{Key: hmacKey, KeyID: "HS256", Algorithm: "HS256"})
		_ = json.NewEncoder(w).Encode(set)
	default:
		http.NotFound(w, r)
	}
}

var hmacKey = []byte("a secret of 32 bytes at the least")

func (f *forge) answer(path string, status int, body any) {
	text, ok := body.(string)
	if !ok {
		b, err := json.Marshal(body)
		if err != nil {
			f.t.Fatal(err)
		}
		text = string(b)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.answers[path] = answer{status: status, body: text}
}

func (f *forge) count(path string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.asked[path]
}

func (f *forge) sent(name string) string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.form[name]
}

func (f *forge) set(name string, value any) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.document[name] = value; value == nil {
		delete(f.document, name)
	}
}

func (f *forge) config(c *clock) oidc.Config {
	return oidc.Config{Issuer: f.issuer, ClientID: clientID, RedirectURL: redirectURL, Audience: audience, Now: c.Now}
}

// sign signs claims with the provider's key for alg. header overrides.
func (f *forge) sign(alg jose.SignatureAlgorithm, header, claims map[string]any) string {
	f.t.Helper()
	var key any = f.keys[alg]
	if alg == jose.HS256 {
		key = hmacKey
	}
	return signWith(f.t, key, alg, header, claims)
}

func signWith(t *testing.T, key any, alg jose.SignatureAlgorithm, header, claims map[string]any) string {
	t.Helper()
	options := &jose.SignerOptions{ExtraHeaders: map[jose.HeaderKey]any{"kid": string(alg)}}
	for name, value := range header {
		options.ExtraHeaders[jose.HeaderKey(name)] = value
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: alg, Key: key}, options)
	if err != nil {
		t.Fatal(err)
	}
	payload, err := json.Marshal(claims)
	if err != nil {
		t.Fatal(err)
	}
	signed, err := signer.Sign(payload)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := signed.CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// unsigned is a token of algorithm none.
func unsigned(t *testing.T, header, claims map[string]any, signature string) string {
	t.Helper()
	var parts []string
	for _, part := range []any{header, claims} {
		b, err := json.Marshal(part)
		if err != nil {
			t.Fatal(err)
		}
		parts = append(parts, base64.RawURLEncoding.EncodeToString(b))
	}
	return strings.Join(append(parts, signature), ".")
}

// with is claims with some of them changed; nil takes one out.
func with(claims map[string]any, changes map[string]any) map[string]any {
	all := maps.Clone(claims)
	for name, value := range changes {
		if all[name] = value; value == nil {
			delete(all, name)
		}
	}
	return all
}
