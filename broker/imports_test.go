package broker_test

import (
	"bytes"
	"encoding/json"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/mayfly-security/mayfly"

// listed is what `go list -json` says of a package. Imports are those of the
// package without its tests: tests may import anything.
type listed struct {
	ImportPath string
	Imports    []string
	Deps       []string
}

// levels is the design's table of imports. A package may import lower levels,
// and nothing else of ours but what is allowed below. The first pattern that
// matches decides; a package without one fails the test.
var levels = []struct {
	pattern string
	level   int
}{
	{"broker", 0},
	{"broker/failpoint", 0}, // nothing, but in the torture test's build
	{"store", 1},
	{"providers", 1},
	{"attestation", 1},
	{"broker/api/...", 1},
	{"store/...", 2},
	{"providers/...", 2},
	{"attestation/...", 2},
	{"broker/policy", 2},
	{"broker/audit/...", 2},
	{"broker/catalog/...", 3},
	{"broker/lease", 4},
	{"broker/signin", 4}, // beside the engine, which it does not know
	{"broker/server", 5},
	{"broker/client", 5},
	{"broker/client/clienttest", 5},
	{"deploy/examples", 0}, // the sample catalog, which imports nothing
	{"deploy/...", 6},
	{"cmd/...", 6},
}

// within names what may import what of its own level: a part of a package may
// be a folder of it, and what several drivers of one system share is in
// providers/internal, where the compiler keeps all others out. It is no
// implementation, and knows none.
var within = map[string][]string{
	"broker/catalog":                       {"broker/catalog/strictyaml"},
	"broker/api/mayfly/v1/mayflyv1connect": {"broker/api/mayfly/v1"},
	"attestation/attestationtest":          {"attestation/devtrust"}, // the suite's callers come from a real trust domain
	"providers/vault":                      {"providers/vault/vaultscope"},
	"providers/awssts":                     {"providers/awssts/awsscope", "providers/awssts/denylist", "providers/internal/awsaccess", "providers/internal/awsclient"},
	"providers/awssts/awsscope":            {"providers/internal/awsaccess"},
	"providers/secretsmanager":             {"providers/internal/awsaccess", "providers/internal/awsclient"},
	"providers/internal/awsclient":         {"providers/internal/awsaccess"},
	"deploy/torture":                       {"deploy/torture/ledger", "deploy/torture/proxy", "deploy/testbed"},
}

// only are packages that may import these of ours and no others, whatever
// their level.
var only = map[string][]string{
	"broker/client":            {"broker", "broker/api/..."},
	"broker/client/clienttest": {"broker", "broker/api/..."},
	// vaultscope is pure: what a catalog says of Vault, and what is printed of
	// it. The catalog is read for `mayfly vault setup`. See decision 0013.
	"cmd/mayfly": {"broker", "broker/api/...", "broker/client", "broker/policy", "broker/audit/...",
		"broker/catalog/...", "providers", "providers/vault/vaultscope"},
	"providers/vault/vaultscope": {"broker", "providers"},
	"providers/awssts/awsscope":  {"broker", "providers", "providers/internal/awsaccess"},
	"providers/awssts/denylist":  {"broker"},
	"providers/awssts/fakeaws":   {}, // a fake of AWS, which knows nothing of us

	"providers/internal/awsaccess": {"broker", "providers"},
	"providers/internal/awsclient": {"broker", "attestation", "providers", "providers/internal/awsaccess"},

	"providers/secretsmanager/fakesecrets": {}, // another
}

func level(pkg string) (int, bool) {
	for _, l := range levels {
		if matches(l.pattern, pkg) {
			return l.level, true
		}
	}
	return 0, false
}

// matches reports whether a pattern as go's commands have it matches pkg.
func matches(pattern, pkg string) bool {
	prefix, all := strings.CutSuffix(pattern, "/...")
	return pkg == pattern || all && (pkg == prefix || strings.HasPrefix(pkg, prefix+"/"))
}

// implementation reports whether pkg is one of several ways to do a thing: it
// is chosen by the wiring, and named by nobody else. Suites for them are for
// tests.
func implementation(pkg string) bool {
	above, _, below := strings.Cut(pkg, "/")
	return below && slices.Contains([]string{"store", "providers", "attestation"}, above)
}

// wrong says what is wrong with one import, or nothing.
func wrong(from, to string) string {
	high, ok := level(from)
	if !ok {
		return from + " is not in the design's table of imports; add it there and here"
	}
	low, ok := level(to)
	switch allowed, limited := only[from]; {
	case !ok:
		return to + " is not in the design's table of imports; add it there and here"
	case slices.Contains(within[from], to), matches("deploy/...", from) && matches("deploy/...", to):
		return "" // what stands around the product shares its parts as it likes
	case limited && !slices.ContainsFunc(allowed, func(p string) bool { return matches(p, to) }):
		return from + " may not import " + to
	case strings.HasSuffix(to, "test"):
		return from + " may not import " + to + ": it is for tests"
	case low >= high:
		return from + " may not import " + to + ": it is not below it"
	case implementation(to) && high < 6:
		return from + " may not import " + to + ": only the wiring chooses implementations"
	case matches("broker/api/...", to) && from == "broker/lease":
		return from + " may not import " + to + ": the engine does not know the API"
	}
	return ""
}

// TestImports holds the packages to the design's table of imports.
func TestImports(t *testing.T) {
	packages := list(t)
	if len(packages) < 15 {
		t.Fatalf("only %d packages were listed", len(packages))
	}
	for _, p := range packages {
		from := strings.TrimPrefix(p.ImportPath, module+"/")
		if _, ok := level(from); !ok {
			t.Errorf("%s is not in the design's table of imports; add it there and here", from)
		}
		for _, i := range p.Imports {
			if to, ours := strings.CutPrefix(i, module+"/"); ours {
				if problem := wrong(from, to); problem != "" {
					t.Error(problem)
				}
			}
		}
	}
}

// TestClientLinks: the command that agents run has no store, no provider and
// no engine in it, not even by way of another package.
func TestClientLinks(t *testing.T) {
	for _, p := range list(t) {
		from := strings.TrimPrefix(p.ImportPath, module+"/")
		allowed, limited := only[from]
		if !limited {
			continue
		}
		for _, d := range p.Deps {
			to, ours := strings.CutPrefix(d, module+"/")
			if ours && !slices.ContainsFunc(allowed, func(p string) bool { return matches(p, to) }) {
				t.Errorf("%s links %s", from, to)
			}
			if slices.ContainsFunc([]string{"go.etcd.io/", "github.com/prometheus/", "github.com/hashicorp/", "github.com/jackc/"},
				func(prefix string) bool { return strings.HasPrefix(d, prefix) }) {
				t.Errorf("%s links %s", from, d)
			}
			if slices.Contains([]string{"providers/vault/vaultscope", "providers/awssts/awsscope", "providers/awssts/denylist", "providers/internal/awsaccess"}, from) && slices.Contains([]string{"net/http", "crypto/tls", "os/exec"}, d) {
				t.Errorf("%s links %s, and is to be pure", from, d)
			}
		}
	}
}

// TestWrong: the table refuses what it is there to refuse.
func TestWrong(t *testing.T) {
	for _, c := range []struct{ from, to string }{
		{"broker", "broker/policy"},
		{"broker", "store"},
		{"store", "providers"},
		{"providers/token", "providers/vault"},
		{"providers/token", "providers/providertest"},
		{"store/etcd", "store/bolt"},
		{"broker/policy", "broker/audit"},
		{"broker/policy", "providers/token"},
		{"broker/catalog", "providers/token"},
		{"broker/lease", "broker/server"},
		{"broker/lease", "broker/api/mayfly/v1"},
		{"broker/lease", "store/bolt"},
		{"broker/server", "broker/client"},
		{"broker/server", "attestation/spiffe"},
		{"broker/server", "attestation/oidc"},
		{"attestation/oidc", "attestation/devidp"},
		{"cmd/mayflyd", "attestation/oidctest"},
		{"broker/client", "broker/policy"},
		{"cmd/mayfly", "broker/lease"},
		{"cmd/mayfly", "store"},
		{"cmd/mayfly", "providers/token"},
		{"cmd/mayfly", "providers/vault"},
		{"broker/catalog", "providers/vault/vaultscope"},
		{"providers/token", "providers/vault/vaultscope"},
		{"providers/vault/vaultscope", "attestation"},
		{"providers/vault", "providers/internal/awsclient"},
		{"providers/secretsmanager", "providers/awssts"},
		{"providers/secretsmanager", "providers/awssts/awsscope"},
		{"providers/internal/awsclient", "providers/awssts"},
		{"providers/internal/awsaccess", "providers/internal/awsclient"},
		{"broker/catalog", "providers/internal/awsaccess"},
		{"cmd/mayfly", "providers/internal/awsaccess"},
		{"cmd/mayflyd", "providers/providertest"},
		{"cmd/mayfly", "broker/client/clienttest"},
		{"broker/util", "broker"},
		{"broker/server", "broker/util"},
	} {
		if wrong(c.from, c.to) == "" {
			t.Errorf("%s may import %s", c.from, c.to)
		}
	}
	for _, c := range []struct{ from, to string }{
		{"broker/server", "broker/lease"}, {"broker/server", "attestation"}, {"broker/client", "broker/api/mayfly/v1"},
		{"cmd/mayflyd", "store/bolt"}, {"cmd/mayflyd", "attestation/devidp"}, {"cmd/mayflyd", "deploy/examples"}, {"cmd/mayfly", "broker/client"}, {"broker/catalog", "broker/policy"},
		{"providers/secretsmanager", "providers/internal/awsclient"}, {"providers/awssts", "providers/internal/awsclient"},
	} {
		if problem := wrong(c.from, c.to); problem != "" {
			t.Error(problem)
		}
	}
}

// list returns every package of the module.
func list(t *testing.T) (all []listed) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", "list", "-json=ImportPath,Imports,Deps", module+"/...")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, stderr.Bytes())
	}
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var p listed
		if err := dec.Decode(&p); err == io.EOF {
			return all
		} else if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
}
