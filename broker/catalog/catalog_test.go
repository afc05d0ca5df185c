package catalog_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/broker/catalog"
	"github.com/mayfly-security/mayfly/broker/catalog/strictyaml"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/providertest"
	"github.com/mayfly-security/mayfly/providers/token"
)

var drivers = map[string]providers.Driver{"token": token.Driver{}, "world": providertest.Driver{}}

// load writes files into a directory and loads them.
func load(t testing.TB, files ...string) (*catalog.Snapshot, error) {
	t.Helper()
	dir := t.TempDir()
	var names []string
	for i, text := range files {
		name := filepath.Join(dir, string(rune('a'+i))+".yaml")
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		names = append(names, name)
	}
	s, err := catalog.Load(names, drivers)
	if err != nil {
		err = errors.New(strings.ReplaceAll(err.Error(), dir+"/", ""))
	}
	return s, err
}

func acme(t testing.TB) string {
	t.Helper()
	b, err := os.ReadFile("testdata/acme.yaml")
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// with replaces text of the sample catalog, and fails if it is not there.
func with(t testing.TB, pairs ...string) string {
	t.Helper()
	s := acme(t)
	for i := 0; i < len(pairs); i += 2 {
		if !strings.Contains(s, pairs[i]) {
			t.Fatalf("the sample catalog does not contain %q", pairs[i])
		}
		s = strings.Replace(s, pairs[i], pairs[i+1], 1)
	}
	return s
}

func mustLoad(t testing.TB, files ...string) *catalog.Snapshot {
	t.Helper()
	s, err := load(t, files...)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestSampleCatalog(t *testing.T) {
	s := mustLoad(t, acme(t))
	sam := spiffeid.RequireFromString("spiffe://acme.test/operator/sam")
	pager := spiffeid.RequireFromString("spiffe://acme.test/bot/pager")
	support := spiffeid.RequireFromString("spiffe://acme.test/agent/support")
	if len(s.Agents()) != 3 || len(s.Tools()) != 3 || len(s.Providers()) != 1 || len(s.Identities()) != 6 {
		t.Errorf("agents %d, tools %d, providers %d, identities %d", len(s.Agents()), len(s.Tools()), len(s.Providers()), len(s.Identities()))
	}
	if !s.Operator(sam) || s.Operator(support) || s.Operator(pager) || !s.InGroup(sam, "sre") || s.InGroup(sam, "security") {
		t.Error("operators and groups are not as written")
	}
	if o, ok := s.Opener(pager); !ok || o.MaxOpen != 5 || len(o.Agents) != 1 {
		t.Errorf("the opener: %+v, %v", o, ok)
	}
	if got := s.Roles(sam); strings.Join(got, " ") != "operator closer" {
		t.Errorf("sam is %v", got)
	}
	tool, _ := s.Tool("crm.read")
	if err := tool.CheckParams(map[string]string{"customer": "c-17; drop"}); err == nil {
		t.Error("a pattern does not match the whole value")
	}
	if s.ScopeInfo("docs.search").Survives == "" || s.ScopeInfo("crm.read").Survives != "" {
		t.Error("what survives is not told as it is")
	}
}

func TestErrorsNameTheirPlace(t *testing.T) {
	for name, c := range map[string]struct{ text, want string }{
		"unknown key":           {with(t, "max_ttl: 15m", "max_tll: 15m"), `a.yaml:52:5: unknown key "max_tll" in tool; did you mean "max_ttl"?`},
		"unknown scope key":     {with(t, "audience: https://crm.acme.test\n", "audienc: https://crm.acme.test\n"), `a.yaml:59:7: audienc: there is no such field`},
		"bad scope value":       {with(t, "verification: offline", "verification: never"), "a.yaml:84:7: verification:"},
		"unknown provider":      {with(t, "provider: acme-tokens", "provider: acme-token"), `a.yaml:50:5: there is no provider "acme-token"; did you mean "acme-tokens"?`},
		"unknown driver":        {with(t, "driver: token", "driver: tokens"), `a.yaml:36:5: there is no driver "tokens"; did you mean "token"?`},
		"unknown tool":          {with(t, "tools: [crm.read, status.write]", "tools: [crm.raed]"), `there is no tool "crm.raed"; did you mean "crm.read"?`},
		"unknown agent":         {with(t, "agents: [spiffe://acme.test/agent/troubleshooter]", "agents: [spiffe://acme.test/agent/trubleshooter]"), `did you mean "spiffe://acme.test/agent/troubleshooter"?`},
		"unknown group":         {with(t, "closers: sre", "closers: sres"), `there is no group "sres"; did you mean "sre"?`},
		"opener for itself":     {with(t, "agents: [spiffe://acme.test/agent/troubleshooter]", "agents: [spiffe://acme.test/bot/pager]"), "an opener cannot open windows for itself"},
		"agent and operator":    {with(t, "spiffe://acme.test/operator/sam", "spiffe://acme.test/agent/support"), "is an agent and an operator"},
		"agent and opener":      {with(t, "- id: spiffe://acme.test/bot/pager", "- id: spiffe://acme.test/agent/support"), "is an agent and an opener"},
		"wildcard":              {with(t, "spiffe://acme.test/agent/research", "spiffe://acme.test/agent/*"), "has a wildcard"},
		"trust domain alone":    {with(t, "spiffe://acme.test/agent/research", "spiffe://acme.test"), "names a trust domain and nobody in it"},
		"zero ttl":              {with(t, "max_ttl: 15m", "max_ttl: 0s"), "max_ttl is 0s; it must be between 1s and 24h0m0s"},
		"long ttl":              {with(t, "max_ttl: 15m", "max_ttl: 25h"), "max_ttl is 25h0m0s"},
		"negative ttl":          {with(t, "max_ttl: 15m", "max_ttl: -1m"), "max_ttl is -1m0s"},
		"pattern":               {with(t, "pattern: c-[0-9]{1,8}", `pattern: "c-["`), "the pattern is no regular expression (RE2)"},
		"pattern that escapes":  {with(t, "pattern: c-[0-9]{1,8}", `pattern: "a)|(?:.*"`), "the pattern is no regular expression (RE2)"},
		"no pattern":            {with(t, "pattern: c-[0-9]{1,8}", "optional: false"), "a string needs either a pattern or one_of"},
		"param type":            {with(t, "type: string", "type: strin"), `type is "strin"`},
		"bidi in one_of":        {with(t, "pattern: c-[0-9]{1,8}", `one_of: [a, "b\u202e"]`), "a value has control, bidirectional or invisible characters"},
		"one_of twice":          {with(t, "pattern: c-[0-9]{1,8}", "one_of: [a, b, a]"), `value "a" stands twice`},
		"trust variable":        {with(t, "CRM_TOKEN: access_token", "NODE_EXTRA_CA_CERTS: access_token"), "NODE_EXTRA_CA_CERTS changes how programs run"},
		"dangerous variable":    {with(t, "CRM_TOKEN: access_token", "LD_PRELOAD: access_token"), "LD_PRELOAD changes how programs run"},
		"odd variable":          {with(t, "CRM_TOKEN: access_token", "crm-token: access_token"), "is no name for an environment variable"},
		"unknown field":         {with(t, "CRM_TOKEN: access_token", "CRM_TOKEN: token"), `the secret has no field "token"`},
		"agent twice":           {with(t, "spiffe://acme.test/agent/research", "spiffe://acme.test/agent/support"), "agent spiffe://acme.test/agent/support is defined here and at a.yaml:7:5"},
		"no owner":              {with(t, "    owner: data-science@acme.test\n", ""), "owner is missing"},
		"no leases":             {with(t, "    owner: data-science@acme.test\n", "    owner: data-science@acme.test\n    max_leases: 0\n"), "max_leases is 0; it must be between 1 and 100000"},
		"too fast":              {with(t, "    owner: data-science@acme.test\n", "    owner: data-science@acme.test\n    max_per_hour: 1000001\n"), "max_per_hour is 1000001; it must be between 1 and 1000000"},
		"opener too fast":       {with(t, "max_open: 5", "max_open: 5\n    max_per_hour: -1"), "max_per_hour is -1"},
		"unlimited opener":      {with(t, "max_open: 5", "max_open: 0"), "max_open is 0"},
		"control in text":       {with(t, "description: Post to", `description: "\e[31mPost to`, "status page\n", "status page\"\n"), "has control, bidirectional or invisible characters"},
		"nobody may introspect": {with(t, "audiences: [https://crm.acme.test]", "audiences: [https://other.acme.test]"), "a.yaml:59:7: audience: nobody may introspect"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := load(t, c.text)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got  %v\nwant %s", err, c.want)
			}
		})
	}
}

func TestSeveralFilesAreOneSet(t *testing.T) {
	whole := acme(t)
	i := strings.Index(whole, "# Tools are")
	a, b := whole[:i], whole[i:]
	one, two, swapped := mustLoad(t, whole), mustLoad(t, a, b), mustLoad(t, b, a)
	if one.Digest() != two.Digest() || one.Digest() != swapped.Digest() {
		t.Error("the digest depends on how the catalog is divided into files")
	}
	if _, err := load(t, whole, b); err == nil || !strings.Contains(err.Error(), "tool crm.read is defined here and at a.yaml") {
		t.Errorf("a tool in two files: %v", err)
	}
}

func TestDigests(t *testing.T) {
	base := mustLoad(t, acme(t))
	tool, _ := base.Tool("crm.read")
	for name, c := range map[string]struct {
		text string
		tool bool // the tool's digest changes
		all  bool // the catalog's digest changes
	}{
		"layout":        {"# nothing\n\n" + with(t, "labels: {team: sre}", "labels:\n      team: sre"), false, false},
		"description":   {with(t, "Read one customer's record", "Read a record"), false, true},
		"maximum TTL":   {with(t, "max_ttl: 15m", "max_ttl: 16m"), true, true},
		"scope":         {with(t, "scopes: [crm.read]", "scopes: [crm.read, crm.write]"), true, true},
		"pattern":       {with(t, "c-[0-9]{1,8}", "c-[0-9]{1,9}"), true, true},
		"verification":  {with(t, "verification: introspect", "verification: offline"), true, true},
		"provider":      {with(t, "issuer: https://mayfly.acme.test", "issuer: https://mayfly2.acme.test"), true, true},
		"introspector":  {with(t, "spiffe://acme.test/service/crm\n", "spiffe://acme.test/service/crm2\n"), false, true},
		"keys":          {with(t, "keys: /var/lib/mayfly/keys", "keys: /srv/keys"), false, true},
		"another agent": {with(t, "environment: research", "environment: lab"), false, true},
		"variable":      {with(t, "CRM_TOKEN: access_token", "CRM_BEARER: access_token"), false, true},
	} {
		t.Run(name, func(t *testing.T) {
			s := mustLoad(t, c.text)
			changed, _ := s.Tool("crm.read")
			if (changed.Digest != tool.Digest) != c.tool {
				t.Errorf("the tool's digest changed: %v; want %v", changed.Digest != tool.Digest, c.tool)
			}
			if (s.Digest() != base.Digest()) != c.all {
				t.Errorf("the catalog's digest changed: %v; want %v", s.Digest() != base.Digest(), c.all)
			}
			if got := len(catalog.Diff(base, s)) > 0; got != c.all {
				t.Errorf("there is a difference: %v; want %v", got, c.all)
			}
		})
	}
}

func TestDiff(t *testing.T) {
	next := mustLoad(t, with(t, "max_ttl: 15m", "max_ttl: 1h",
		"  - id: spiffe://acme.test/agent/research\n    owner: data-science@acme.test\n    environment: research\n", "",
		"    labels: {team: support}\n", "    disabled: true\n"))
	got := strings.Join(catalog.Diff(mustLoad(t, acme(t)), next), "\n")
	want := `tool crm.read: max_ttl 15m0s -> 1h0m0s
agent spiffe://acme.test/agent/research removed
agent spiffe://acme.test/agent/support: disabled false -> true
agent spiffe://acme.test/agent/support: labels {"team":"support"} -> null`
	if got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

// TestDiffHidesNoPower: a difference that is cut still tells of operators.
func TestDiffHidesNoPower(t *testing.T) {
	var agents strings.Builder
	for i := range 150 {
		fmt.Fprintf(&agents, "  - {id: \"spiffe://acme.test/agent/n%d\", owner: x, environment: y}\n", i)
	}
	next := mustLoad(t, with(t, "agents:\n", "agents:\n"+agents.String(), "operators:\n", "operators:\n  - id: spiffe://acme.test/operator/mallory\n"))
	changes := catalog.Diff(mustLoad(t, acme(t)), next)
	if !strings.Contains(changes[0], "mallory") || !strings.HasPrefix(changes[len(changes)-1], "and ") {
		t.Errorf("the difference begins with %q and ends with %q", changes[0], changes[len(changes)-1])
	}
}

func TestMissingFile(t *testing.T) {
	if _, err := catalog.Load([]string{"/nowhere/catalog.yaml"}, drivers); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%v", err)
	}
	if _, err := catalog.Load(nil, drivers); err == nil {
		t.Error("no file is a catalog")
	}
}

func FuzzLoad(f *testing.F) {
	f.Add(acme(f))
	f.Add("agents:\n- id: spiffe://a/b\n  owner: x\n  environment: y\n")
	f.Fuzz(func(t *testing.T, text string) {
		name := filepath.Join(t.TempDir(), "c.yaml")
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		s, err := catalog.Load([]string{name}, drivers)
		var errs strictyaml.Errors
		if (s == nil) == (err == nil) || err != nil && !errors.As(err, &errs) {
			t.Fatalf("%v, %v", s, err)
		}
	})
}
