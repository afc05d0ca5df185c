package token

import (
	"encoding/json"
	"errors"
	"maps"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
)

func TestConfig(t *testing.T) {
	base := map[string]any{"issuer": issuer, "keys": "/keys"}
	for _, test := range []struct {
		field string // that is wrong; "ok" if none
		with  map[string]any
	}{
		{"ok", nil},
		{"ok", map[string]any{"issuer": "http://localhost:8443"}},
		{"ok", map[string]any{"issuer": "http://[::1]:8443/mayfly"}},
		{"ok", map[string]any{"introspectors": []any{map[string]any{"id": "spiffe://test/a", "audiences": []string{"crm"}}}}},
		{"issuer", map[string]any{"issuer": ""}},
		{"issuer", map[string]any{"issuer": "http://mayfly.test"}},
		{"issuer", map[string]any{"issuer": "https://u:p@mayfly.test"}},
		{"issuer", map[string]any{"issuer": "https://mayfly.test?x"}},
		{"issuer", map[string]any{"issuer": "https://mayfly.test#"}},
		{"issuer", map[string]any{"issuer": "mayfly"}},
		{"keys", map[string]any{"keys": ""}},
		{"keys", map[string]any{"keys": "relative"}},
		{"keys", map[string]any{"signer": "kms"}},
		{"introspectors[0].id", map[string]any{"introspectors": []any{map[string]any{"id": "crm", "audiences": []string{"crm"}}}}},
		{"introspectors[0].audiences", map[string]any{"introspectors": []any{map[string]any{"id": "spiffe://test/a"}}}},
		{"introspectors[0].audiences[1]", map[string]any{"introspectors": []any{map[string]any{"id": "spiffe://test/a", "audiences": []string{"crm", "a b"}}}}},
		{"introspectors[1].id", map[string]any{"introspectors": []any{
			map[string]any{"id": "spiffe://test/a", "audiences": []string{"crm"}},
			map[string]any{"id": "spiffe://test/a", "audiences": []string{"erp"}}}}},
		{"key", map[string]any{"key": "/keys"}},
	} {
		checkField(t, test.field, base, test.with, func(raw json.RawMessage) error { return Driver{}.ValidateConfig(raw) })
	}
}

func TestScope(t *testing.T) {
	base := map[string]any{"audience": audience, "scopes": []string{"crm.read"}, "verification": "offline"}
	long := strings.Repeat("s", maxScope+1)
	for _, test := range []struct {
		field string
		with  map[string]any
	}{
		{"ok", nil},
		{"ok", map[string]any{"leeway": "0s"}},
		{"ok", map[string]any{"leeway": "5m"}},
		{"ok", map[string]any{"verification": "introspect"}},
		{"audience", map[string]any{"audience": ""}},
		{"audience", map[string]any{"audience": []string{audience}}},
		{"audience", map[string]any{"audience": "a b"}},
		{"audience", map[string]any{"audience": "a\u202eb"}},
		{"audience", map[string]any{"audience": "https://nobody.test", "verification": "introspect"}},
		{"scopes", map[string]any{"scopes": nil}},
		{"scopes", map[string]any{"scopes": []string{}}},
		{"scopes", map[string]any{"scopes": make([]string, maxScopes+1)}},
		{"scopes", map[string]any{"scopes": "crm.read"}},
		{"scopes[0]", map[string]any{"scopes": []string{""}}},
		{"scopes[1]", map[string]any{"scopes": []string{"a", "b c"}}},
		{"scopes[0]", map[string]any{"scopes": []string{`a"`}}},
		{"scopes[0]", map[string]any{"scopes": []string{`a\`}}},
		{"scopes[0]", map[string]any{"scopes": []string{"é"}}},
		{"scopes[0]", map[string]any{"scopes": []string{long}}},
		{"scopes[1]", map[string]any{"scopes": []string{"a", "a"}}},
		{"verification", map[string]any{"verification": nil}},
		{"verification", map[string]any{"verification": "both"}},
		{"leeway", map[string]any{"leeway": "-1s"}},
		{"leeway", map[string]any{"leeway": "6m"}},
		{"leeway", map[string]any{"leeway": "soon"}},
		{"leeway", map[string]any{"leeway": 30}},
		{"leeway", map[string]any{"leeway": "30s", "verification": "introspect"}},
		{"bind_certificate", map[string]any{"bind_certificate": "yes"}},
		{"scope", map[string]any{"scope": "crm.read"}},
	} {
		checkField(t, test.field, base, test.with, func(raw json.RawMessage) error {
			_, err := Driver{}.ValidateScope(configFor("/keys"), tool(string(raw)))
			return err
		})
	}
	short := tool(offlineScope)
	short.MaxTTL = 31 * time.Second
	if _, err := (Driver{}).ValidateScope(configFor("/keys"), short); err == nil {
		t.Error("a tool whose tokens would be dead at birth")
	}
	info, err := Driver{}.ValidateScope(configFor("/keys"), tool(offlineScope))
	if err != nil || info.MinTTL != 32*time.Second || !strings.Contains(info.Survives, "verified offline") || len(info.Fields) != 1 || info.Fields[0] != Field {
		t.Errorf("%+v (%v)", info, err)
	}
	if info, err := (Driver{}).ValidateScope(configFor("/keys"), tool(introspectScope)); err != nil || info.MinTTL != 0 || info.Survives != "" {
		t.Errorf("%+v (%v)", info, err)
	}
	if _, err := (Driver{}).ValidateScope(json.RawMessage(`{}`), broker.Tool{Scope: json.RawMessage(offlineScope)}); err == nil {
		t.Error("valid with an invalid configuration")
	}
}

func checkField(t *testing.T, want string, base, with map[string]any, validate func(json.RawMessage) error) {
	t.Helper()
	document := maps.Clone(base)
	maps.Copy(document, with)
	raw, err := json.Marshal(document)
	if err != nil {
		t.Fatal(err)
	}
	err = validate(raw)
	var f *providers.FieldError
	if want == "ok" && err != nil || want != "ok" && (!errors.As(err, &f) || f.Field != want) {
		t.Errorf("%s: %v, want %q", raw, err, want)
	}
}
