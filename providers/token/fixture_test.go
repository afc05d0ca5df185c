package token

import (
	"bytes"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/providertest"
)

const (
	issuer   = "https://mayfly.test:8443"
	audience = "https://crm.test"
)

var (
	agent  = spiffeid.RequireFromString("spiffe://test/agent/reader")
	server = spiffeid.RequireFromString("spiffe://test/server/crm")
)

// fixture is a provider with keys in a directory and a clock.
type fixture struct {
	*provider
	clock *providertest.Clock
	dir   string
	log   *logged
}

type logged struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logged) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func configFor(dir string) json.RawMessage {
	return json.RawMessage(fmt.Sprintf(`{"issuer":%q,"keys":%q,"introspectors":[{"id":%q,"audiences":[%q]}]}`, issuer, dir, server, audience))
}

func newFixture(t testing.TB) *fixture {
	t.Helper()
	f := &fixture{
		clock: providertest.NewClock(time.Now().Truncate(time.Second).Add(300 * time.Millisecond)),
		dir:   filepath.Join(t.TempDir(), "keys"),
		log:   &logged{},
	}
	f.newKey(t)
	f.provider = f.open(t, configFor(f.dir))
	return f
}

func (f *fixture) open(t testing.TB, raw json.RawMessage) *provider {
	t.Helper()
	p, err := Driver{}.Open(t.Context(), providers.Config{
		Name: "tokens", Installation: "m1", Raw: raw, Log: slog.New(slog.NewTextHandler(f.log, nil)), Now: f.clock.Now,
	})
	if err != nil {
		t.Fatal(err)
	}
	return p.(*provider)
}

func (f *fixture) newKey(t testing.TB) string {
	t.Helper()
	path, err := NewKey(f.dir, f.clock.Now())
	if err != nil {
		t.Fatal(err)
	}
	return path
}

func tool(scope string) broker.Tool {
	return broker.Tool{
		Name: "crm.read", MaxTTL: time.Hour, Scope: json.RawMessage(scope),
		Params: []broker.Param{
			{Name: "account", Type: broker.ParamString, OneOf: []string{"acme", "other"}, Optional: true},
			{Name: "dry", Type: broker.ParamBoolean, Optional: true},
			{Name: "limit", Type: broker.ParamInteger, Optional: true},
		},
	}
}

const (
	introspectScope = `{"audience":"https://crm.test","scopes":["crm.read","crm.list"],"verification":"introspect"}`
	offlineScope    = `{"audience":"https://crm.test","scopes":["crm.read"],"verification":"offline"}`
	boundScope      = `{"audience":"https://crm.test","scopes":["crm.read"],"verification":"introspect","bind_certificate":true}`
)

func (f *fixture) request(scope string) providers.MintRequest {
	now := f.clock.Now()
	return providers.MintRequest{
		Lease: broker.NewLeaseID(now), Agent: agent, Tool: tool(scope),
		Params:   map[string]string{"account": "acme", "limit": "42", "dry": "true"},
		Incident: broker.NewIncidentID(now), Now: now, End: now.Add(5 * time.Minute),
	}
}

func (f *fixture) mint(t testing.TB, scope string) (providers.MintRequest, providers.Minted, string) {
	t.Helper()
	req := f.request(scope)
	m, err := f.Mint(t.Context(), req, nil)
	if err != nil {
		t.Fatal(err)
	}
	token, ok := m.Secret.Reveal(Field)
	if !ok || token == "" {
		t.Fatal("there is no token")
	}
	return req, m, token
}

func (f *fixture) accepts(t testing.TB, token string) bool {
	t.Helper()
	in, ok := f.Introspect(t.Context(), token, server)
	if !ok && (in.Lease != "" || in.Claims != nil) {
		t.Errorf("a token that is not accepted tells %+v", in)
	}
	return ok
}

// decoded takes a token apart and verifies it by hand, with the published
// keys and nothing of this package.
func decoded(t testing.TB, jwks json.RawMessage, token string) (header, payload map[string]any) {
	t.Helper()
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		t.Fatalf("%d parts", len(parts))
	}
	raw := make([][]byte, 3)
	for i, part := range parts {
		var err error
		if raw[i], err = base64.RawURLEncoding.DecodeString(part); err != nil {
			t.Fatal(err)
		}
	}
	if err := json.Unmarshal(raw[0], &header); err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(raw[1], &payload); err != nil {
		t.Fatal(err)
	}
	x, ok := published(t, jwks)[header["kid"].(string)]
	if !ok {
		t.Fatal("the key is not published")
	}
	if !ed25519.Verify(x, []byte(parts[0]+"."+parts[1]), raw[2]) {
		t.Fatal("the signature does not verify")
	}
	return header, payload
}

// published reads a key set by hand: RFC 7517, RFC 8037 section 2.
func published(t testing.TB, jwks json.RawMessage) map[string]ed25519.PublicKey {
	t.Helper()
	var set struct {
		Keys []map[string]string `json:"keys"`
	}
	if err := json.Unmarshal(jwks, &set); err != nil {
		t.Fatal(err)
	}
	keys := make(map[string]ed25519.PublicKey)
	for _, k := range set.Keys {
		x, err := base64.RawURLEncoding.DecodeString(k["x"])
		if err != nil || k["kty"] != "OKP" || k["crv"] != "Ed25519" || k["alg"] != "EdDSA" || k["use"] != "sig" {
			t.Fatalf("key %v (%v)", k, err)
		}
		if _, private := k["d"]; private {
			t.Fatal("a private key is published")
		}
		keys[k["kid"]] = x
	}
	return keys
}

// forge signs any header and payload with any key, or with none.
func forge(header, payload string, sign func([]byte) []byte) string {
	b64 := base64.RawURLEncoding.EncodeToString
	input := b64([]byte(header)) + "." + b64([]byte(payload))
	return input + "." + b64(sign([]byte(input)))
}
