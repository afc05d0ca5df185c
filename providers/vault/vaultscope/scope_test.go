package vaultscope_test

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/vault/vaultscope"
)

const plain = `{"address":"https://vault.acme.test:8200/","auth":{"method":"jwt"}}`

func config(t testing.TB, raw string) vaultscope.Config {
	t.Helper()
	c, err := vaultscope.ParseConfig(json.RawMessage(raw))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func tool(scope string) broker.Tool {
	return broker.Tool{Name: "crm.read", MaxTTL: 15 * time.Minute, Scope: json.RawMessage(scope), Params: []broker.Param{
		{Name: "host", Type: broker.ParamString}, {Name: "extra", Type: broker.ParamString, Optional: true}}}
}

func TestConfigDefaults(t *testing.T) {
	got := config(t, plain)
	want := vaultscope.Config{Address: "https://vault.acme.test:8200", Prefix: "mayfly-", TokenMount: "token", Concurrency: 16, RequestLimit: 90 * time.Second,
		Auth: vaultscope.Auth{Method: "jwt", Mount: "jwt", Role: "mayfly", Audience: "https://vault.acme.test:8200"}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	full := config(t, `{"address":"https://v.test","namespace":"team-a/","ca_file":"/etc/ca.pem","server_name":"v","auth":{"method":"cert","mount":"c/x","role":"r"},
		"request_limit":"30s","prefix":"mf-","token_mount":"tokens","concurrency":2,
		"databases":[{"mount":"database","dsn":"host=/var/run/postgresql dbname=crm user=mayfly_sweep"},
			{"mount":"db/two","dsn":"postgres://sweep@db.test/crm?sslmode=verify-full","password_file":"/run/p","schema":"mine"}]}`)
	if d, ok := full.Database("db/two"); !ok || d.Schema != "mine" || full.LoginPath() != "auth/c/x/login" || full.CreatePath("a.b") != "auth/tokens/create/mf-a.b" {
		t.Errorf("%+v", full)
	}
	if full.TokenTTL(time.Second) != time.Minute || full.TokenTTL(90*time.Second+1) != 91*time.Second {
		t.Error("a token's TTL does not cover its one request, or is not rounded up")
	}
}

// TestConfigErrors: each mistake is told at its field.
func TestConfigErrors(t *testing.T) {
	database := func(d string) string {
		return `{"address":"https://v.test","auth":{"method":"jwt"},"databases":[` + d + `]}`
	}
	for name, c := range map[string]struct{ raw, field, message string }{
		"unknown":           {`{"adress":"https://v.test"}`, "adress", "no such field"},
		"address":           {`{"auth":{"method":"jwt"}}`, "address", "must be the URL"},
		"http":              {`{"address":"http://v.test","auth":{"method":"jwt"}}`, "address", "only a loopback host"},
		"user in address":   {`{"address":"https://a:b@v.test","auth":{"method":"jwt"}}`, "address", "must be the URL"},
		"path in address":   {`{"address":"https://v.test/v1","auth":{"method":"jwt"}}`, "address", "must be the URL"},
		"http with CA":      {`{"address":"http://127.0.0.1:1","ca_file":"/x","auth":{"method":"jwt"}}`, "address", "plain http"},
		"relative CA":       {`{"address":"https://v.test","ca_file":"x","auth":{"method":"jwt"}}`, "ca_file", "absolute"},
		"namespace":         {`{"address":"https://v.test","namespace":"a/../b","auth":{"method":"jwt"}}`, "namespace", "no plain path"},
		"method":            {`{"address":"https://v.test","auth":{"method":"token"}}`, "auth.method", "jwt"},
		"cert over http":    {`{"address":"http://127.0.0.1:1","auth":{"method":"cert"}}`, "auth.method", "https"},
		"cert audience":     {`{"address":"https://v.test","auth":{"method":"cert","audience":"x"}}`, "auth.audience", "jwt only"},
		"auth mount":        {`{"address":"https://v.test","auth":{"method":"jwt","mount":"a/+"}}`, "auth.mount", "no plain path"},
		"auth role":         {`{"address":"https://v.test","auth":{"method":"jwt","role":"a/b"}}`, "auth.role", "no name"},
		"audience":          {`{"address":"https://v.test","auth":{"method":"jwt","audience":"a b"}}`, "auth.audience", "one audience"},
		"request limit":     {`{"address":"https://v.test","auth":{"method":"jwt"},"request_limit":"1h"}`, "request_limit", "max_request_duration"},
		"prefix":            {`{"address":"https://v.test","auth":{"method":"jwt"},"prefix":"*"}`, "prefix", "ends with"},
		"token mount":       {`{"address":"https://v.test","auth":{"method":"jwt"},"token_mount":"*"}`, "token_mount", "no plain path"},
		"concurrency":       {`{"address":"https://v.test","auth":{"method":"jwt"},"concurrency":0}`, "concurrency", "from 1"},
		"no mount":          {database(`{"dsn":"host=/s dbname=d user=u"}`), "databases[0].mount", "missing"},
		"no dsn":            {database(`{"mount":"d"}`), "databases[0].dsn", "missing"},
		"password":          {database(`{"mount":"d","dsn":"host=/s dbname=d user=u password=hunter2"}`), "databases[0].dsn", "holds a password"},
		"password, spaced":  {database(`{"mount":"d","dsn":"host=/s dbname=d user=u password = 'hunter2'"}`), "databases[0].dsn", "holds a password"},
		"password in URL":   {database(`{"mount":"d","dsn":"postgres://u:hunter2@127.0.0.1/d"}`), "databases[0].dsn", "holds a password"},
		"password in query": {database(`{"mount":"d","dsn":"postgres://u@127.0.0.1/d?password=hunter2"}`), "databases[0].dsn", "holds a password"},
		"broken URL":        {database(`{"mount":"d","dsn":"postgres://u:hunter2@%zz/d"}`), "databases[0].dsn", "no URL"},
		"broken quote":      {database(`{"mount":"d","dsn":"host=/s password='hunter2"}`), "databases[0].dsn", "cannot be read"},
		"garbage":           {database(`{"mount":"d","dsn":"hunter2"}`), "databases[0].dsn", "neither"},
		"twice":             {database(`{"mount":"d","dsn":"host=/s dbname=d user=u user=postgres"}`), "databases[0].dsn", "twice"},
		"service":           {database(`{"mount":"d","dsn":"service=x"}`), "databases[0].dsn", "keyword"},
		"no TLS":            {database(`{"mount":"d","dsn":"host=db.test dbname=d user=u sslmode=require"}`), "databases[0].dsn", "verify-full"},
		"one host no TLS":   {database(`{"mount":"d","dsn":"host=/s,db.test dbname=d user=u"}`), "databases[0].dsn", "verify-full"},
		"no user":           {database(`{"mount":"d","dsn":"host=/s dbname=d"}`), "databases[0].dsn", "no user"},
		"no database":       {database(`{"mount":"d","dsn":"host=/s user=u"}`), "databases[0].dsn", "no dbname"},
		"schema":            {database(`{"mount":"d","dsn":"host=/s dbname=d user=u","schema":"public"}`), "databases[0].schema", "of its own"},
		"mount twice":       {database(`{"mount":"d","dsn":"host=/s dbname=d user=u"},{"mount":"d","dsn":"host=/s dbname=d user=u"}`), "databases[1].mount", "already"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := vaultscope.ParseConfig(json.RawMessage(c.raw))
			wantField(t, err, c.field, c.message)
			if strings.Contains(err.Error(), "hunter2") {
				t.Error("the error tells the password")
			}
		})
	}
}

func wantField(t *testing.T, err error, field, message string) {
	t.Helper()
	var f *providers.FieldError
	if !errors.As(err, &f) || f.Field != field || !strings.Contains(f.Message, message) {
		t.Errorf("got %v; want field %s: %s", err, field, message)
	}
}

func TestScopes(t *testing.T) {
	c := config(t, plain)
	swept := config(t, `{"address":"https://v.test","auth":{"method":"jwt"},"databases":[{"mount":"database","dsn":"host=/s dbname=d user=u"}]}`)
	for name, tt := range map[string]struct {
		scope  string
		want   vaultscope.Scope
		min    time.Duration
		static bool
	}{
		"database": {`{"engine":"database","path":"database/creds/crm-read"}`, vaultscope.Scope{Engine: "database", Mount: "database",
			Classes: []vaultscope.Class{{Path: "database/creds/crm-read", TTL: 15 * time.Minute}}, Fields: []string{"username", "password"}}, 15 * time.Minute, false},
		"classes": {`{"engine":"database","mount":"db/crm","classes":[{"path":"db/crm/creds/b","ttl":"10m"},{"path":"db/crm/creds/a","ttl":"1m"}]}`,
			vaultscope.Scope{Engine: "database", Mount: "db/crm", Classes: []vaultscope.Class{{"db/crm/creds/a", time.Minute}, {"db/crm/creds/b", 10 * time.Minute}},
				Fields: []string{"username", "password"}}, time.Minute, false},
		"pki": {`{"engine":"pki","path":"pki/issue/web","data":{"common_name":"${params.host}.acme.test"}}`, vaultscope.Scope{Engine: "pki", Mount: "pki", Write: true,
			Classes: []vaultscope.Class{{Path: "pki/issue/web"}}, Data: map[string]any{"common_name": "${params.host}.acme.test"},
			Fields: []string{"certificate", "private_key", "issuing_ca", "serial_number"}}, time.Second, false},
		"ssh": {`{"engine":"ssh","path":"ssh/sign/ops"}`, vaultscope.Scope{Engine: "ssh", Mount: "ssh", Write: true,
			Classes: []vaultscope.Class{{Path: "ssh/sign/ops"}}, Fields: []string{"signed_key", "serial_number"}}, time.Second, false},
		"sts": {`{"engine":"aws","path":"aws/sts/ops","credential_type":"assumed_role"}`, vaultscope.Scope{Engine: "aws", Mount: "aws", CredentialType: "assumed_role",
			Classes: []vaultscope.Class{{Path: "aws/sts/ops"}}, Fields: []string{"access_key", "secret_key", "session_token"}}, 15 * time.Minute, false},
		"iam": {`{"engine":"aws","path":"aws/creds/ops","credential_type":"iam_user"}`, vaultscope.Scope{Engine: "aws", Mount: "aws", CredentialType: "iam_user",
			Classes: []vaultscope.Class{{Path: "aws/creds/ops"}}, Fields: []string{"access_key", "secret_key"}}, time.Second, false},
		"kv": {`{"engine":"kv","path":"kv/data/crm/key","fields":["key"]}`, vaultscope.Scope{Engine: "kv", Mount: "kv", Version: 2,
			Classes: []vaultscope.Class{{Path: "kv/data/crm/key"}}, Fields: []string{"key"}}, time.Second, true},
		"other": {`{"engine":"other","path":"rabbitmq/creds/x","fields":["u"]}`, vaultscope.Scope{Engine: "other", Mount: "rabbitmq",
			Classes: []vaultscope.Class{{Path: "rabbitmq/creds/x"}}, Fields: []string{"u"}}, time.Second, false},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := vaultscope.ParseScope(c, tool(tt.scope))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got, cmp.FilterPath(func(p cmp.Path) bool { return p.String() == "optional" }, cmp.Ignore())); diff != "" {
				t.Error(diff)
			}
			info := got.Info(c)
			if info.MinTTL != tt.min || info.Static != tt.static || info.Survives == "" {
				t.Errorf("%+v", info)
			}
			if info := got.Info(swept); (info.Survives == "") != (name == "database") {
				t.Errorf("with a login for the mount, what survives is %q", info.Survives)
			}
		})
	}
}

func TestScopeErrors(t *testing.T) {
	c := config(t, plain)
	for name, tt := range map[string]struct{ scope, field, message string }{
		"unknown":          {`{"engin":"pki"}`, "engin", "no such field"},
		"engine":           {`{"engine":"mysql"}`, "engine", "one of aws, database"},
		"no path":          {`{"engine":"database"}`, "path", "missing"},
		"glob":             {`{"engine":"database","path":"database/creds/*"}`, "path", "no plain path"},
		"plus":             {`{"engine":"database","path":"database/+/x"}`, "path", "no plain path"},
		"template":         {`{"engine":"kv","path":"kv/data/{{identity.entity.id}}"}`, "path", "no plain path"},
		"parameter":        {`{"engine":"kv","path":"kv/data/${params.host}"}`, "path", "no plain path"},
		"quote":            {`{"engine":"kv","path":"kv/data/a\"b"}`, "path", "no plain path"},
		"dots":             {`{"engine":"kv","path":"kv/data/../../sys/x"}`, "path", "no plain path"},
		"leading slash":    {`{"engine":"kv","path":"/kv/data/x"}`, "path", "no plain path"},
		"sys":              {`{"engine":"other","path":"sys/raw/x","fields":["x"]}`, "path", "part of Vault itself"},
		"auth":             {`{"engine":"other","path":"auth/token/create","fields":["x"]}`, "path", "part of Vault itself"},
		"identity":         {`{"engine":"other","path":"identity/oidc/token/x","fields":["x"]}`, "path", "part of Vault itself"},
		"mount alone":      {`{"engine":"other","path":"x","fields":["x"]}`, "path", "mount alone"},
		"other mount":      {`{"engine":"database","mount":"db","path":"database/creds/x"}`, "path", "not below"},
		"database config":  {`{"engine":"database","path":"database/config/x"}`, "path", "no path at which"},
		"static role":      {`{"engine":"database","path":"database/static-creds/x"}`, "path", "no path at which"},
		"pki root":         {`{"engine":"pki","path":"pki/root/generate/exported"}`, "path", "no path at which"},
		"sign verbatim":    {`{"engine":"pki","path":"pki/sign-verbatim/x"}`, "path", "no path at which"},
		"kv metadata":      {`{"engine":"kv","path":"kv/metadata/x","fields":["x"]}`, "path", "no path at which"},
		"kv no fields":     {`{"engine":"kv","path":"kv/data/x"}`, "fields", "missing"},
		"kv version":       {`{"engine":"kv","version":3,"path":"kv/data/x"}`, "version", "1 or 2"},
		"version of pki":   {`{"engine":"pki","version":2,"path":"pki/issue/x"}`, "version", "kv only"},
		"field twice":      {`{"engine":"kv","path":"kv/data/x","fields":["a","a"]}`, "fields[1]", "twice"},
		"credential type":  {`{"engine":"aws","path":"aws/creds/x"}`, "credential_type", "one of"},
		"type of database": {`{"engine":"database","path":"database/creds/x","credential_type":"iam_user"}`, "credential_type", "aws only"},
		"long class":       {`{"engine":"database","path":"database/creds/x","ttl":"1h"}`, "ttl", "longer than the tool's"},
		"zero class":       {`{"engine":"database","path":"database/creds/x","ttl":"0s"}`, "ttl", "default_ttl"},
		"class of pki":     {`{"engine":"pki","path":"pki/issue/x","ttl":"1m"}`, "ttl", "database only"},
		"path and classes": {`{"engine":"database","path":"database/creds/x","classes":[]}`, "classes", "set either"},
		"no class":         {`{"engine":"database","classes":[]}`, "classes", "1 to"},
		"same class":       {`{"engine":"database","classes":[{"path":"database/creds/x","ttl":"1m"},{"path":"database/creds/y","ttl":"60s"}]}`, "classes", "two of ttl"},
		"same path":        {`{"engine":"database","classes":[{"path":"database/creds/x","ttl":"1m"},{"path":"database/creds/x","ttl":"2m"}]}`, "classes[1].path", "twice"},
		"method":           {`{"engine":"database","path":"database/creds/x","method":"write"}`, "method", "has its own"},
		"odd method":       {`{"engine":"other","path":"a/b","method":"list","fields":["x"]}`, "method", "read or write"},
		"data of a read":   {`{"engine":"other","path":"a/b","data":{"a":"b"},"fields":["x"]}`, "data", "this one is read"},
		"no mapping":       {`{"engine":"pki","path":"pki/issue/x","data":["a"]}`, "data", "mapping"},
		"ttl in data":      {`{"engine":"pki","path":"pki/issue/x","data":{"ttl":"9h"}}`, "data.ttl", "set by the broker"},
		"unknown param":    {`{"engine":"pki","path":"pki/issue/x","data":{"a":["${params.hots}"]}}`, "data.a[0]", "no parameter"},
		"open reference":   {`{"engine":"pki","path":"pki/issue/x","data":{"a":"${params.host"}}`, "data.a", "begins no"},
		"other reference":  {`{"engine":"pki","path":"pki/issue/x","data":{"a":"${env.HOME}"}}`, "data.a", "begins no"},
		"part optional":    {`{"engine":"pki","path":"pki/issue/x","data":{"a":"x${params.extra}"}}`, "data.a", "optional"},
		"glob in key":      {`{"engine":"pki","path":"pki/issue/x","data":{"*":"x"}}`, "data", "no name"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := vaultscope.ParseScope(c, tool(tt.scope))
			wantField(t, err, tt.field, tt.message)
		})
	}
	odd := tool(`{"engine":"database","path":"database/creds/x"}`)
	odd.Name = "crm."
	_, err := vaultscope.ParseScope(c, odd)
	wantField(t, err, "", "ends with")
}

func TestClass(t *testing.T) {
	s, err := vaultscope.ParseScope(config(t, plain), tool(`{"engine":"database","classes":[{"path":"d/creds/a","ttl":"1m"},{"path":"d/creds/b","ttl":"5m"}]}`))
	if err != nil {
		t.Fatal(err)
	}
	for ttl, want := range map[time.Duration]string{time.Minute: "d/creds/a", 5*time.Minute - 1: "d/creds/a", 5 * time.Minute: "d/creds/b", time.Hour: "d/creds/b", time.Minute - 1: ""} {
		if c, ok := s.Class(ttl); c.Path != want || ok != (want != "") {
			t.Errorf("for %s it is %q", ttl, c.Path)
		}
	}
}

func TestBody(t *testing.T) {
	c := config(t, plain)
	s, err := vaultscope.ParseScope(c, tool(`{"engine":"pki","path":"pki/issue/x","data":{"cn":"${params.host}.t","n":18446744073709551615,"list":["a","${params.host}${params.host}"],"m":{"k":"${params.host}"},"o":"${params.extra}"}}`))
	if err != nil {
		t.Fatal(err)
	}
	got, err := s.Body(map[string]string{"host": "${params.extra}"}, 90*time.Second+time.Millisecond)
	if err != nil {
		t.Fatal(err)
	}
	h := "${params.extra}" // a value is never expanded itself
	want := map[string]any{"cn": h + ".t", "n": json.Number("18446744073709551615"), "list": []any{"a", h + h}, "m": map[string]any{"k": h}, "ttl": "90s"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if got, err := s.Body(map[string]string{"host": "h", "extra": "e"}, time.Minute); err != nil || got["o"] != "e" {
		t.Errorf("%v, %v", got, err)
	}
	if _, err := s.Body(nil, time.Minute); err == nil {
		t.Error("a needed parameter was left out, and its part of the data with it")
	}
	if s.Data["cn"] != "${params.host}.t" {
		t.Error("filling changed the scope")
	}
	s, err = vaultscope.ParseScope(c, tool(`{"engine":"database","path":"database/creds/x"}`))
	if body, bodyErr := s.Body(nil, time.Minute); err != nil || bodyErr != nil || body != nil {
		t.Errorf("%v, %v, %v", body, err, bodyErr)
	}
}

func TestNames(t *testing.T) {
	now := time.Now()
	installation, lease := broker.NewInstallationID(now), broker.NewLeaseID(now)
	if n := len(vaultscope.DisplayName(installation, lease)); n != 36 {
		t.Errorf("a display name has %d characters", n)
	}
	role := vaultscope.LeaseRolePrefix(installation, lease) + "AbCd1234"
	if len(role) > 63 || !strings.HasPrefix(role, vaultscope.RolePrefix(installation)) {
		t.Errorf("a role's name is %s", role)
	}
	if got, ok := vaultscope.LeaseOfRole(installation, role); !ok || got != lease {
		t.Errorf("the lease of %s is %s, %v", role, got, ok)
	}
	for _, other := range []string{"", "postgres", "mf_", vaultscope.RolePrefix(installation), strings.ToUpper(role), "x" + role,
		vaultscope.LeaseRolePrefix(broker.NewInstallationID(now), lease) + "AbCd1234"} {
		if _, ok := vaultscope.LeaseOfRole(installation, other); ok {
			t.Errorf("%s is taken for ours", other)
		}
	}
}
