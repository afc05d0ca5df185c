package vaultscope_test

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers/vault/vaultscope"
)

var brokerID = spiffeid.RequireFromString("spiffe://acme.test/mayfly")

const swept = `{"address":"https://v.test","auth":{"method":"jwt"},"databases":[{"mount":"database","dsn":"host=/s dbname=d user=mayfly_sweep"}]}`

func named(name, scope string) broker.Tool {
	t := tool(scope)
	t.Name = name
	return t
}

func setup(t testing.TB, raw string, o vaultscope.Options, tools ...broker.Tool) *vaultscope.Setup {
	t.Helper()
	o.Broker = brokerID
	s, err := vaultscope.NewSetup(config(t, raw), tools, o)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// text finds the text of a policy of a setup.
func text(t testing.TB, s *vaultscope.Setup, policy string) string {
	t.Helper()
	for _, w := range s.Writes {
		if w.Path == "sys/policies/acl/"+policy {
			return w.Body["policy"].(string)
		}
	}
	t.Fatalf("there is no policy %s", policy)
	return ""
}

// TestPolicies: what the policies say, word for word but for comments.
func TestPolicies(t *testing.T) {
	s := setup(t, plain, vaultscope.Options{Installation: "m0abcdefgh1234567890123456"},
		named("crm.read", `{"engine":"database","path":"database/creds/a"}`),
		named("web", `{"engine":"ssh","path":"ssh/sign/ops","data":{"public_key":"${params.host}","valid_principals":"deploy","key_id":"${params.extra}","extensions":{"permit-pty":""},"host_ok":false,"bits":2048}}`),
		named("keys", `{"engine":"aws","path":"aws/sts/x","credential_type":"assumed_role"}`))
	for name, want := range map[string]string{
		"mayfly-crm.read": `path "database/creds/a" { capabilities = ["read"] }`,
		"mayfly-keys":     `path "aws/sts/x" { capabilities = ["read"] }`,
		"mayfly-web": `path "ssh/sign/ops" { capabilities = ["update"]
			required_parameters = ["bits", "extensions", "host_ok", "public_key", "ttl", "valid_principals"]
			allowed_parameters = { "bits" = [] "extensions" = [] "host_ok" = [false] "key_id" = [] "public_key" = [] "ttl" = [] "valid_principals" = ["deploy"] } }`,
		"mayfly-_broker": `
			path "auth/token/create/mayfly-crm.read" { capabilities = ["update"] required_parameters = ["display_name", "explicit_max_ttl", "meta"]
				allowed_parameters = { "display_name" = ["890123456-*"] "explicit_max_ttl" = [] "meta" = [] "ttl" = [] } }
			path "sys/leases/revoke/database/creds/a/*" { capabilities = ["update"] required_parameters = ["sync"] allowed_parameters = { "sync" = [true] } }
			path "auth/token/create/mayfly-keys" { capabilities = ["update"] required_parameters = ["display_name", "explicit_max_ttl", "meta"]
				allowed_parameters = { "display_name" = ["890123456-*"] "explicit_max_ttl" = [] "meta" = [] "ttl" = [] } }
			path "auth/token/create/mayfly-web" { capabilities = ["update"] required_parameters = ["display_name", "explicit_max_ttl", "meta"]
				allowed_parameters = { "display_name" = ["890123456-*"] "explicit_max_ttl" = [] "meta" = [] "ttl" = [] } }
			path "auth/token/revoke-accessor" { capabilities = ["update"] allowed_parameters = { "accessor" = [] } }
			path "auth/token/roles/mayfly-crm.read" { capabilities = ["read"] } path "sys/policies/acl/mayfly-crm.read" { capabilities = ["read"] }
			path "auth/token/roles/mayfly-keys" { capabilities = ["read"] } path "sys/policies/acl/mayfly-keys" { capabilities = ["read"] }
			path "auth/token/roles/mayfly-web" { capabilities = ["read"] } path "sys/policies/acl/mayfly-web" { capabilities = ["read"] }
			path "sys/policies/acl/mayfly-_broker" { capabilities = ["read"] }
			path "sys/capabilities-self" { capabilities = ["update"] }`,
	} {
		if got := text(t, s, name); !vaultscope.SamePolicy(got, want) {
			t.Errorf("policy %s is\n%s", name, got)
		}
	}
	unbound := setup(t, plain, vaultscope.Options{}, named("crm.read", `{"engine":"database","path":"database/creds/a"}`))
	bound := setup(t, plain, vaultscope.Options{Installation: "m0abcdefgh1234567890123456"}, named("crm.read", `{"engine":"database","path":"database/creds/a"}`))
	if a, b := text(t, unbound, "mayfly-_broker"), text(t, bound, "mayfly-_broker"); a == b || !vaultscope.SamePolicy(a, b) {
		t.Error("a policy that is bound to an installation is taken for another, or is none")
	}
}

func TestSamePolicy(t *testing.T) {
	const a = "# words\npath \"x\" {\n  capabilities = [\"read\"]\n}\n"
	for b, want := range map[string]bool{
		a:                          true,
		strings.ToUpper(a):         false,
		strings.Trim(a, "# words"): true,
		"  #other\n\n" + strings.ReplaceAll(a, " = ", "   =  "): true,
		strings.ReplaceAll(a, "read", "read\", \"list"):         false,
		strings.ReplaceAll(a, `"x"`, `"x#"`):                    false,
		a + a:                                                   false,
		"":                                                      false,
		a + "path \"display\" { \"display_name\" = [\"*\"] }": false,
	} {
		if got := vaultscope.SamePolicy(a, b); got != want {
			t.Errorf("same: %v; want %v\n%s", got, want, b)
		}
	}
}

func TestSameFunction(t *testing.T) {
	sql := func(o vaultscope.Options) string {
		return setup(t, swept, o, named("crm.read", `{"engine":"database","path":"database/creds/a"}`)).SQL()
	}
	body := func(sql, name string) string {
		_, rest, ok := strings.Cut(sql, `FUNCTION "mayfly".`+name+"(")
		_, rest, ok2 := strings.Cut(rest, "$mayfly$")
		body, _, ok3 := strings.Cut(rest, "$mayfly$")
		if !ok || !ok2 || !ok3 {
			t.Fatalf("there is no function %s in\n%s", name, sql)
		}
		return body
	}
	open, bound := sql(vaultscope.Options{}), sql(vaultscope.Options{Installation: "m0abcdefgh1234567890123456"})
	for _, name := range []string{"roles", "drop_roles", "end_sessions"} {
		a, b := body(open, name), body(bound, name)
		if !vaultscope.SameFunction(name, a) || !vaultscope.SameFunction(name, b) {
			t.Errorf("%s is not taken for itself", name)
		}
		if name != "end_sessions" && (a == b || !strings.Contains(b, "'890123456'")) {
			t.Errorf("%s is not bound to the installation", name)
		}
		if !vaultscope.FunctionBound(b) || vaultscope.FunctionBound(a) != (name == "end_sessions") {
			t.Errorf("%s: whether it is bound to an installation is not told", name)
		}
		if name != "end_sessions" && vaultscope.SameFunction(name, strings.Replace(a, "installation IS NULL OR ", "", 1)) {
			t.Errorf("%s that lets NULL pass is taken for it", name)
		}
		if vaultscope.SameFunction(name, strings.Replace(a, "BEGIN", "BEGIN\n  RETURN;", 1)) {
			t.Errorf("another %s is taken for it", name)
		}
		if vaultscope.SameFunction(name, strings.Replace(a, "!~ '^[a-z0-9]{9}$'", "!~ '.'", 1)) && name != "end_sessions" {
			t.Errorf("%s without its check is taken for it", name)
		}
	}
	if len(vaultscope.FunctionNames()) != 3 || vaultscope.SameFunction("other", "") {
		t.Error("there are other functions")
	}
}

func TestSetupRefuses(t *testing.T) {
	jwt, cert, withSweep := config(t, plain), config(t, `{"address":"https://v.test","auth":{"method":"cert"}}`), config(t, swept)
	a := named("crm.read", `{"engine":"database","path":"database/creds/a"}`)
	for name, c := range map[string]struct {
		config vaultscope.Config
		o      vaultscope.Options
		tools  []broker.Tool
		want   string
	}{
		"no broker":           {jwt, vaultscope.Options{}, []broker.Tool{a}, "SPIFFE ID is missing"},
		"no tools":            {jwt, vaultscope.Options{Broker: brokerID}, nil, "nothing to set up"},
		"a bad scope":         {jwt, vaultscope.Options{Broker: brokerID}, []broker.Tool{named("x", `{}`)}, "tool x"},
		"no bundle":           {cert, vaultscope.Options{Broker: brokerID}, []broker.Tool{a}, "bundle is missing"},
		"keys for cert":       {cert, vaultscope.Options{Broker: brokerID, Bundle: "x", JWKSURL: "https://x"}, []broker.Tool{a}, "has cert"},
		"bundle for jwt":      {jwt, vaultscope.Options{Broker: brokerID, Bundle: "x"}, []broker.Tool{a}, "has jwt"},
		"both kinds of keys":  {jwt, vaultscope.Options{Broker: brokerID, JWKSURL: "https://x", PublicKeys: []string{"x"}}, []broker.Tool{a}, "exclude each other"},
		"plain http":          {jwt, vaultscope.Options{Broker: brokerID, JWKSURL: "http://x"}, []broker.Tool{a}, "no https URL"},
		"CA without a URL":    {jwt, vaultscope.Options{Broker: brokerID, JWKSCA: "x"}, []broker.Tool{a}, "without the URL"},
		"an installation":     {jwt, vaultscope.Options{Broker: brokerID, Installation: "m0'; DROP x"}, []broker.Tool{a}, "no installation ID"},
		"a login with quotes": {jwt, vaultscope.Options{Broker: brokerID, VaultLogin: `va"ult`}, []broker.Tool{a}, "no plain name"},
		"one login for both":  {withSweep, vaultscope.Options{Broker: brokerID, VaultLogin: "mayfly_sweep"}, []broker.Tool{a}, "narrow one of its own"},
		"a connection":        {jwt, vaultscope.Options{Broker: brokerID, Connection: "a/b"}, []broker.Tool{a}, "no name of a database connection"},
		"one group":           {jwt, vaultscope.Options{Broker: brokerID}, []broker.Tool{a, named("crm-read", `{"engine":"database","path":"database/creds/b"}`)}, "both be the PostgreSQL role tool_crm_read"},
		"a long name":         {jwt, vaultscope.Options{Broker: brokerID}, []broker.Tool{named(strings.Repeat("a", 60), `{"engine":"database","path":"database/creds/b"}`)}, "at most 63"},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := vaultscope.NewSetup(c.config, c.tools, c.o); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v; want %s", err, c.want)
			}
		})
	}
}

// TestOrder: nothing is named before it is there.
func TestOrder(t *testing.T) {
	s := setup(t, swept, vaultscope.Options{JWKSURL: "https://x.test", Connection: "crm"},
		named("b", `{"engine":"database","classes":[{"path":"database/creds/b","ttl":"1m"},{"path":"database/creds/c","ttl":"5m"}]}`),
		named("a", `{"engine":"kv","path":"kv/data/x","fields":["x"]}`))
	var got []string
	for _, w := range s.Writes {
		got = append(got, string(w.Kind)+" "+w.Path)
		if w.Why == "" {
			t.Errorf("nothing is said of %s", w.Path)
		}
		for line := range strings.Lines(w.Why) {
			if len(line) > 90 {
				t.Errorf("a line about %s is long: %s", w.Path, line)
			}
		}
	}
	want := []string{
		"policy sys/policies/acl/mayfly-a", "token role auth/token/roles/mayfly-a",
		"policy sys/policies/acl/mayfly-b", "token role auth/token/roles/mayfly-b",
		"policy sys/policies/acl/mayfly-_broker",
		"auth mount sys/auth/jwt", "auth config auth/jwt/config", "auth role auth/jwt/role/mayfly",
		"database connection database/config/crm", "database role database/roles/b", "database role database/roles/c",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if got := setup(t, plain, vaultscope.Options{}, named("a", `{"engine":"kv","path":"kv/data/x","fields":["x"]}`)); len(got.Writes) != 4 || got.SQL() != "" {
		t.Errorf("without keys and databases there are %d writes", len(got.Writes))
	}
}

// TestTerraform: everything that the script writes is a resource, and nothing
// in a text begins one of Terraform's expressions.
func TestTerraform(t *testing.T) {
	for _, method := range []string{"jwt", "cert"} {
		raw := fmt.Sprintf(`{"address":"https://v.test","namespace":"team-a","auth":{"method":%q,"mount":"logins/%s"}}`, method, method)
		o := vaultscope.Options{PublicKeys: []string{"-----BEGIN PUBLIC KEY-----\nx\n-----END PUBLIC KEY-----\n"}}
		if method == "cert" {
			o = vaultscope.Options{Bundle: "-----BEGIN CERTIFICATE-----\nx\n-----END CERTIFICATE-----\n"}
		}
		s := setup(t, raw, o, named("a.b", `{"engine":"ssh","path":"ssh/sign/x","data":{"a":"100%{x}"}}`), named("a-b", `{"engine":"database","path":"d/creds/x"}`))
		got := s.Terraform()
		for _, w := range s.Writes {
			if w.Kind == vaultscope.WriteAuthConfig || w.Kind == vaultscope.WriteConnection {
				continue
			}
			if !strings.Contains(got, "# "+strings.Split(w.Why, "\n")[0]) {
				t.Errorf("%s: there is no resource for %s", method, w.Path)
			}
		}
		for _, text := range []string{"${", "%{x}\"]"} {
			for rest := got; ; {
				before, after, found := strings.Cut(rest, text)
				if !found {
					break
				}
				if !strings.HasSuffix(before, "$") && !strings.HasSuffix(before, "%") {
					t.Errorf("%s: a text begins an expression: %s", method, text)
				}
				rest = after
			}
		}
		if n, resources := strings.Count(got, `namespace`), strings.Count(got, "\nresource "); n != resources {
			t.Errorf("%s: %d of %d resources have the namespace", method, n, resources)
		}
		seen := map[string]bool{}
		for line := range strings.Lines(got) {
			if strings.HasPrefix(line, "resource ") {
				if seen[line] {
					t.Errorf("%s: there are two of %s", method, line)
				}
				seen[line] = true
			}
		}
		if !strings.Contains(got, map[string]string{"jwt": "vault_jwt_auth_backend.logins_2f_jwt.path", "cert": "vault_auth_backend.logins_2f_cert.path"}[method]) {
			t.Errorf("%s: the role does not wait for its mount", method)
		}
	}
}

func TestDocument(t *testing.T) {
	s := setup(t, swept, vaultscope.Options{}, named("a", `{"engine":"database","path":"database/creds/x"}`))
	b, err := json.Marshal(s.Document())
	if err != nil {
		t.Fatal(err)
	}
	var d vaultscope.Document
	if err := json.Unmarshal(b, &d); err != nil || len(d.Writes) != len(s.Writes) || len(d.Scripts) != 1 || d.Writes[0].Body["policy"] == "" {
		t.Errorf("%v, %s", err, b)
	}
}

// FuzzScope: no scope that is taken can mean more in a policy than it says.
func FuzzScope(f *testing.F) {
	f.Add(`{"engine":"database","path":"database/creds/a"}`)
	f.Add(`{"engine":"kv","path":"kv/data/{{identity.entity.id}}","fields":["x"]}`)
	f.Add(`{"engine":"other","path":"a/+/b*","method":"write","data":{"a":"${params.host}"},"fields":["x"]}`)
	f.Add(`{"engine":"pki","mount":"p/q","path":"p/q/issue/x\" { capabilities = [\"sudo\"] } path \"","data":{"\"":"x"}}`)
	f.Fuzz(func(t *testing.T, scope string) {
		c := config(t, plain)
		tool := tool(scope)
		s, err := vaultscope.ParseScope(c, tool)
		if err != nil {
			return
		}
		for _, p := range s.Paths() {
			if strings.ContainsAny(p, "*+{}\"\\$ \n") || strings.Contains(p, "..") && !strings.Contains(p, "a..") && strings.Contains("/"+p+"/", "/../") || strings.HasPrefix(p, "sys/") || strings.HasPrefix(p, "auth/") {
				t.Errorf("path %q is taken", p)
			}
		}
		if text := c.ToolPolicy(tool, s); strings.Count(text, "path \"") != len(s.Paths()) || strings.Count(text, "capabilities") != len(s.Paths()) {
			t.Errorf("the policy has other paths than the scope:\n%s", text)
		}
		if _, err := s.Body(map[string]string{"host": "h"}, 0); err != nil {
			t.Errorf("a scope that is taken has no body: %v", err)
		}
	})
}
