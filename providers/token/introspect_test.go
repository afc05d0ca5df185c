package token

import (
	"crypto/ed25519"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/broker"
)

func TestIntrospect(t *testing.T) {
	f := newFixture(t)
	req := f.request(boundScope)
	req.Certificate[0] = 1
	m, err := f.Mint(t.Context(), req, nil)
	if err != nil {
		t.Fatal(err)
	}
	token, _ := m.Secret.Reveal(Field)
	in, ok := f.Introspect(t.Context(), token, server)
	if !ok || in.Lease != req.Lease {
		t.Fatalf("%v, lease %s, want %s", ok, in.Lease, req.Lease)
	}
	got, err := json.Marshal(in.Claims)
	if err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf(`{"aud":%q,"client_id":%q,"cnf":{"x5t#S256":%q},"exp":%d,"iat":%d,"incident":%q,"iss":%q,"jti":%q,"params":{"account":"acme","dry":true,"limit":42},"scope":"crm.read","sub":%q,"token_type":"Bearer","tool":"crm.read"}`,
		audience, agent, base64.RawURLEncoding.EncodeToString(req.Certificate[:]), req.End.Unix(), req.Now.Unix(), req.Incident, issuer, req.Lease, agent)
	if string(got) != want {
		t.Errorf("claims\n%s, want\n%s", got, want)
	}

	for _, other := range []spiffeid.ID{{}, agent, spiffeid.RequireFromString("spiffe://test/server/other"), spiffeid.RequireFromString("spiffe://other/server/crm")} {
		if _, ok := f.Introspect(t.Context(), token, other); ok {
			t.Errorf("%q may introspect", other)
		}
	}
	f.clock.AdvanceTo(time.Unix(req.End.Unix(), 0).Add(-time.Nanosecond))
	if !f.accepts(t, token) {
		t.Error("not accepted just before its exp")
	}
	f.clock.AdvanceTo(time.Unix(req.End.Unix(), 0))
	if f.accepts(t, token) {
		t.Error("accepted at its exp")
	}
}

// TestIntrospectRefuses forges tokens with the real signing key, but for one
// thing each, and then with other keys.
func TestIntrospectRefuses(t *testing.T) {
	f := newFixture(t)
	_, _, genuine := f.mint(t, introspectScope)
	header, payload := decoded(t, f.JWKS(), genuine)
	var private ed25519.PrivateKey
	for _, file := range f.keys.(*directory).files {
		private = file.signer
	}
	public := private.Public().(ed25519.PublicKey)
	_, other, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ours := func(input []byte) []byte { return ed25519.Sign(private, input) }
	with := func(from map[string]any, name string, value any) string {
		changed := maps.Clone(from)
		changed[name] = value
		if value == nil {
			delete(changed, name)
		}
		text, err := json.Marshal(changed)
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	same := func(from map[string]any) string { return with(from, "none", nil) }
	if !f.accepts(t, forge(same(header), same(payload), ours)) {
		t.Fatal("the forgery that changes nothing is refused, so the others say nothing")
	}

	parts := strings.Split(genuine, ".")
	for name, token := range map[string]string{
		"empty":              "",
		"dots":               "..",
		"typ JWT":            forge(with(header, "typ", "JWT"), same(payload), ours),
		"typ missing":        forge(with(header, "typ", nil), same(payload), ours),
		"typ logout":         forge(with(header, "typ", "logout+jwt"), same(payload), ours),
		"kid missing":        forge(with(header, "kid", nil), same(payload), ours),
		"kid empty":          forge(with(header, "kid", ""), same(payload), ours),
		"kid unknown":        forge(with(header, "kid", "nobody"), same(payload), ours),
		"kid a path":         forge(with(header, "kid", "../../etc/passwd"), same(payload), ours),
		"issuer other":       forge(same(header), with(payload, "iss", "https://evil.test"), ours),
		"issuer missing":     forge(same(header), with(payload, "iss", nil), ours),
		"audience other":     forge(same(header), with(payload, "aud", "https://payments.test"), ours),
		"audience missing":   forge(same(header), with(payload, "aud", nil), ours),
		"audiences":          forge(same(header), with(payload, "aud", []string{audience, "https://payments.test"}), ours),
		"exp past":           forge(same(header), with(payload, "exp", f.clock.Now().Unix()), ours),
		"exp missing":        forge(same(header), with(payload, "exp", nil), ours),
		"exp text":           forge(same(header), with(payload, "exp", "9999999999"), ours),
		"jti no lease":       forge(same(header), with(payload, "jti", "1"), ours),
		"payload no object":  forge(same(header), `[]`, ours),
		"critical extension": forge(strings.Replace(with(header, "crit", []string{"exp"}), "{", `{"exp":1,`, 1), same(payload), ours),
		"alg none":           forge(with(header, "alg", "none"), same(payload), func([]byte) []byte { return nil }),
		"alg none, signed":   forge(with(header, "alg", "none"), same(payload), ours),
		"alg None":           forge(with(header, "alg", "None"), same(payload), func([]byte) []byte { return nil }),
		"unsigned":           forge(same(header), same(payload), func([]byte) []byte { return nil }),
		"HS256 with the public key": forge(with(header, "alg", "HS256"), same(payload), func(input []byte) []byte {
			mac := hmac.New(sha256.New, public)
			mac.Write(input)
			return mac.Sum(nil)
		}),
		"another key, our kid": forge(same(header), same(payload), func(input []byte) []byte { return ed25519.Sign(other, input) }),
		"another key in jwk": forge(with(header, "jwk", map[string]string{"kty": "OKP", "crv": "Ed25519",
			"x": base64.RawURLEncoding.EncodeToString(other.Public().(ed25519.PublicKey))}), same(payload),
			func(input []byte) []byte { return ed25519.Sign(other, input) }),
		"changed payload":      parts[0] + "." + base64.RawURLEncoding.EncodeToString([]byte(with(payload, "scope", "admin"))) + "." + parts[2],
		"cut":                  genuine[:len(genuine)-1],
		"longer":               genuine + "A",
		"another part":         genuine + ".AAAA",
		"JSON serialization":   fmt.Sprintf(`{"payload":%q,"protected":%q,"signature":%q}`, parts[1], parts[0], parts[2]),
		"line end":             genuine + "\n",
		"oversized":            forge(same(header), with(payload, "scope", strings.Repeat("s", maxToken)), ours),
		"oversized by garbage": strings.Repeat("a", 10<<20),
	} {
		if f.accepts(t, token) {
			t.Errorf("%s: accepted", name)
		}
	}
	if strings.Contains(f.log.String(), parts[1]) {
		t.Error("a token is in the log")
	}
}

// TestOtherProviderSameKeys: an issuer's tokens are not another's.
func TestOtherProviderSameKeys(t *testing.T) {
	f := newFixture(t)
	_, _, token := f.mint(t, introspectScope)
	other := f.open(t, json.RawMessage(strings.Replace(string(configFor(f.dir)), issuer, "https://other.test", 1)))
	if _, ok := other.Introspect(t.Context(), token, server); ok {
		t.Error("another issuer with the same keys accepts the token")
	}
}

// FuzzIntrospect: nothing but a token that was minted is accepted, and nothing
// panics.
func FuzzIntrospect(f *testing.F) {
	x := newFixture(f)
	_, _, token := x.mint(f, introspectScope)
	parts := strings.Split(token, ".")
	f.Add(token)
	f.Add("")
	f.Add(parts[0] + ".." + parts[2])
	f.Add(parts[0] + "." + parts[1] + ".")
	f.Add("eyJhbGciOiJub25lIn0." + parts[1] + ".")
	f.Add(`{"payload":"","signatures":[]}`)
	f.Fuzz(func(t *testing.T, s string) {
		in, ok := x.Introspect(t.Context(), s, server)
		if !ok {
			if in.Claims != nil || in.Lease != "" {
				t.Error("it is refused, and something is told")
			}
			return
		}
		// An accepted text is ours: its header and payload are, character by character.
		if got := strings.Split(s, "."); !slices.Equal(got[:2], parts[:2]) {
			t.Errorf("accepted %q", s)
		}
		if in.Lease == "" || in.Lease != broker.LeaseID(in.Claims["jti"].(string)) {
			t.Errorf("accepted as %+v", in)
		}
	})
}
