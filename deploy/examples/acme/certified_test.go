//go:build unix

package acme_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/attestation/devtrust"
	"github.com/mayfly-security/mayfly/attestation/oidctest"
	"github.com/mayfly-security/mayfly/broker/catalog"
	"github.com/mayfly-security/mayfly/broker/catalog/strictyaml"
	"github.com/mayfly-security/mayfly/deploy/examples"
	"github.com/mayfly-security/mayfly/deploy/examples/story"
	"github.com/mayfly-security/mayfly/deploy/testbed"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/token"
)

const (
	certifiedSecret = "a secret: with %signs & plus+"
	appRedirect     = "http://127.0.0.1:9/app" // no browser of ours goes there
)

// TestCertifiedProvider runs `mayflyd server` as in production, with people whom
// a certified OpenID provider of somebody else's signs in: sign-in and groups,
// step-up, device codes, and tokens of the provider's.
func TestCertifiedProvider(t *testing.T) {
	if err := story.LookAtSources("../../.."); err != nil {
		t.Fatal(err)
	}
	cmds := map[string]func(*testscript.TestScript, bool, []string){"apptoken": appTokenCommand, "provider": providerCommand}
	for name, cmd := range commands {
		cmds[name] = cmd
	}
	testscript.Run(t, testscript.Params{Dir: "testdata/certified", Setup: setUpCertified, Cmds: cmds})
}

// setUpCertified starts the provider, the trust domain and the broker.
func setUpCertified(env *testscript.Env) error {
	a, ports, err := newAcme(env)
	if err != nil {
		return err
	}
	a.how = "in"
	if err := os.MkdirAll(filepath.Join(a.dir, "keys"), 0o700); err != nil {
		return err
	}
	workload, err := a.trust(env)
	if err != nil {
		return err
	}
	accounts, err := sampleAccounts()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	o, err := testbed.StartOIDC(ctx, testbed.OIDCConfig{
		Accounts: accounts, ACR: []string{"pwd", "mfa"},
		Audiences: []string{a.people, a.people + "/on-behalf-of"},
		Clients: []testbed.OIDCClient{
			{ID: "mayfly", Secret: certifiedSecret, RedirectURIs: []string{a.people + "/signin/callback"}},
			{ID: "app", RedirectURIs: []string{appRedirect}},
		},
	})
	if err != nil {
		return err
	}
	env.Defer(func() {
		if err := o.Close(); err != nil {
			env.T().Fatal(err)
		}
	})
	env.Values["provider"] = o
	if err := a.configure(ports, workload, o.Issuer); err != nil {
		return err
	}
	return a.tell(env, `"serving people"`, "server", "--config", filepath.Join(a.dir, "mayflyd.yaml"))
}

// trust serves the catalog's identities, in sockets that are named as those of
// mayflyd dev, and returns the broker's.
func (a *acme) trust(env *testscript.Env) (workload string, err error) {
	snapshot, err := catalog.Load([]string{"catalog.yaml", "policies.cedar"}, map[string]providers.Driver{"token": token.Driver{}})
	if err != nil {
		return "", err
	}
	td := spiffeid.RequireTrustDomainFromString("acme.test")
	trust, err := devtrust.New(devtrust.Config{TrustDomain: td, Dir: filepath.Join(a.dir, "sockets")})
	if err != nil {
		return "", err
	}
	env.Defer(func() {
		if err := trust.Close(); err != nil {
			env.T().Fatal(err)
		}
	})
	ids := snapshot.Identities()
	for _, path := range examples.Services() {
		ids = append(ids, spiffeid.RequireFromPath(td, path))
	}
	for _, id := range ids {
		if _, err := trust.Add(devtrust.Identity{ID: id}); err != nil {
			return "", err
		}
	}
	return trust.Add(devtrust.Identity{ID: spiffeid.RequireFromPath(td, "/mayfly"), DNSNames: []string{"localhost"}})
}

// configure writes what a broker in production has: its configuration, a
// certificate, a signing key, the client's secret, and the catalog. Payments
// want a sign-in with two factors, besides a fresh one.
func (a *acme) configure(ports []string, workload, issuer string) error {
	keys := filepath.Join(a.dir, "keys")
	if _, err := token.NewKey(keys, time.Now()); err != nil {
		return err
	}
	ca, err := testbed.WriteCertificate(a.dir, nil)
	if err != nil {
		return err
	}
	const payment = "    reauthenticate_within: 5m\n    max_duration: 15m\n"
	if strings.Count(examples.Catalog, payment) != 1 {
		return errors.New("the sample catalog's rule for payments is another")
	}
	sample := strings.ReplaceAll(examples.Catalog, examples.KeysPath, keys)
	sample = strings.Replace(sample, payment, "    acr: [mfa]\n"+payment, 1)
	config := fmt.Sprintf(`store: mayfly.db
catalog: [catalog.yaml, policies.cedar]
listen: 127.0.0.1:%s
workload_api: %s
people:
  url: %s
  listen: 127.0.0.1:%s
  tls: {certificate: cert.pem, key: key.pem}
  identity_provider:
    issuer: %s
    client_id: mayfly
    client_secret_file: client-secret
    audience: %s
    user_audience: %s/on-behalf-of
`, ports[0], workload, a.people, ports[1], issuer, a.people, a.people)
	for name, text := range map[string]string{
		"catalog.yaml": sample, "policies.cedar": examples.Policies, "mayflyd.yaml": config,
		"people-ca.pem": ca, "client-secret": certifiedSecret + "\n",
	} {
		if err := os.WriteFile(filepath.Join(a.dir, name), []byte(text), 0o600); err != nil {
			return err
		}
	}
	return nil
}

// sampleAccounts are the sample people, as the provider knows them: by a subject
// that is no name, and with groups that it alone says.
func sampleAccounts() (accounts []testbed.OIDCAccount, err error) {
	var file struct {
		People []struct {
			Name     string   `yaml:"name"`
			FullName string   `yaml:"full_name"`
			Groups   []string `yaml:"groups"`
		} `yaml:"people"`
	}
	if _, err := strictyaml.Decode("people.yaml", []byte(examples.People), &file); err != nil {
		return nil, err
	}
	for i, p := range file.People {
		accounts = append(accounts, testbed.OIDCAccount{
			Subject: fmt.Sprintf("u-%03d", i), Email: p.Name, EmailVerified: true, Name: p.FullName, Groups: p.Groups,
		})
	}
	// Whoever gave an address that nobody has looked at is nobody.
	return append(accounts, testbed.OIDCAccount{Subject: "m-666", Email: "mallory@acme.test", Groups: []string{"finance", "security"}}), nil
}

// provider stop|start: the identity provider goes away, or comes back, with
// keys that nobody has seen.
func providerCommand(ts *testscript.TestScript, _ bool, args []string) {
	o := ts.Value("provider").(*testbed.OIDC)
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	switch {
	case len(args) == 1 && args[0] == "stop":
		ts.Check(o.Stop(ctx))
	case len(args) == 1 && args[0] == "start":
		ts.Check(o.Start(ctx))
	default:
		ts.Fatalf("usage: provider stop|start")
	}
}

// apptoken WHO AUDIENCE FILE: an application gets a JWT access token of WHO's at
// the certified provider, for the broker ("people") or for agents that act for
// WHO ("users"), and writes it into FILE and VAR TOKEN.
func appTokenCommand(ts *testscript.TestScript, _ bool, args []string) {
	audiences := map[string]string{"people": acmeOf(ts).people, "users": acmeOf(ts).people + "/on-behalf-of"}
	if len(args) != 3 || audiences[args[1]] == "" {
		ts.Fatalf("usage: apptoken WHO people|users FILE")
	}
	issuer := ts.Value("provider").(*testbed.OIDC).Issuer
	app := oidctest.App{ClientID: "app", RedirectURI: appRedirect, AuthorizeURL: issuer + "/auth", TokenURL: issuer + "/token", Scopes: []string{"openid", "email", "groups"}}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	raw, err := app.AccessToken(ctx, audiences[args[1]], map[string]string{"person": args[0] + "@acme.test", "acr": "mfa", "how": "in"})
	ts.Check(err)
	ts.Check(os.WriteFile(ts.MkAbs(args[2]), []byte(raw+"\n"), 0o600))
	ts.Setenv("TOKEN", raw)
}
