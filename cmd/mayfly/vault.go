package main

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/catalog"
	"github.com/mayfly-security/mayfly/broker/catalog/strictyaml"
	"github.com/mayfly-security/mayfly/broker/client"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/vault/vaultscope"
)

// maxKeyFile is the most that is read of a file of keys or certificates.
const maxKeyFile = 1 << 20

func (p *program) vaultCommand() *cobra.Command {
	return group("vault", "Prepare Vault for a broker", p.vaultSetupCommand())
}

// vaultFlags are the flags of "vault setup" that are not options themselves.
type vaultFlags struct {
	catalog      []string
	provider     string
	format       string
	installation string
	jwksCA       string
	publicKeys   []string
	bundle       string
}

func (p *program) vaultSetupCommand() *cobra.Command {
	var f vaultFlags
	var o vaultscope.Options
	c := &cobra.Command{
		Use:   "setup",
		Short: "Print what Vault and PostgreSQL need for a catalog",
		Long: `Setup prints what an operator applies to Vault and to PostgreSQL, so that a broker
can give the tools of a catalog and can do nothing else there: one policy and one
token role for each tool, the broker's own policy and login, database roles, and the
narrow login that finds what Vault loses. It asks nobody and changes nothing.

  sh         a script of the commands "vault write" and "vault policy write"
  hcl        the policies alone
  terraform  the same as sh, as resources of Terraform's provider hashicorp/vault
  sql        what PostgreSQL needs; to be applied first

With --output json it is the same as data: the writes in their order, and the SQL.

Vault lets in exactly the identity that --broker-id (or MAYFLY_BROKER_ID) names.
"mayflyd check --live" then compares the real Vault with this.`,
		Example: `  mayfly vault setup --catalog acme.yaml --broker-id spiffe://acme.test/mayfly --format sql
  mayfly vault setup --catalog acme.yaml --broker-id spiffe://acme.test/mayfly --jwks-url https://spire.acme.test/keys`,
		Args: none,
	}
	c.Flags().StringArrayVar(&f.catalog, "catalog", nil, "a file of the catalog; may be repeated (needed)")
	c.Flags().StringVar(&f.provider, "provider", "", "the provider of the catalog; default: the only one with driver vault")
	c.Flags().StringVar(&f.format, "format", "sh", "sh, hcl, terraform or sql")
	c.Flags().StringVar(&f.installation, "installation", "", "the installation's ID (\"mayfly whoami\" tells it): binds tokens and roles to its name; default: any")
	c.Flags().StringVar(&o.JWKSURL, "jwks-url", "", "auth method jwt: the URL of the trust domain's keys, such as a SPIFFE bundle endpoint")
	c.Flags().StringVar(&f.jwksCA, "jwks-ca", "", "a PEM file with which that URL's server is verified; default: Vault's system's")
	c.Flags().StringArrayVar(&f.publicKeys, "jwt-pubkey-file", nil, "auth method jwt: a PEM file with a public key, in place of the URL; may be repeated")
	c.Flags().StringVar(&f.bundle, "bundle", "", "the trust domain's bundle, in SPIFFE's format; for auth method cert also a PEM file with its authorities")
	c.Flags().StringVar(&o.Connection, "connection", "mayfly", "the name of the database connection in Vault")
	c.Flags().StringVar(&o.VaultLogin, "vault-login", "vault", "the role as whom Vault logs in to PostgreSQL")
	_ = c.RegisterFlagCompletionFunc("format", cobra.FixedCompletions([]string{"sh", "hcl", "terraform", "sql"}, cobra.ShellCompDirectiveNoFileComp)) // the flag is there: see above
	need(c, "catalog")
	return p.verb(c, func(context.Context, []string) error {
		s, err := p.vaultSetup(f, o)
		if err != nil {
			return err
		}
		if p.output == "json" {
			return writeJSON(p.stdout, s.Document())
		}
		var text string
		switch f.format {
		case "sh":
			text = s.Shell()
		case "hcl":
			text = s.HCL()
		case "terraform":
			text = s.Terraform()
		case "sql":
			if text = s.SQL(); text == "" {
				text = "-- No tool of this provider is of engine database: there is nothing to do in PostgreSQL.\n"
			}
		default:
			return usagef("--format %q is none of sh, hcl, terraform and sql", f.format)
		}
		_, err = io.WriteString(p.stdout, text)
		return err
	})
}

// vaultSetup reads the files that the flags name and makes the setup.
func (p *program) vaultSetup(f vaultFlags, o vaultscope.Options) (*vaultscope.Setup, error) {
	id := p.brokerID
	if id == "" {
		id = p.getenv(client.EnvBrokerID)
	}
	if id == "" {
		return nil, usagef("mayfly vault setup needs --broker-id: Vault lets in exactly that identity")
	}
	var err error
	if o.Broker, err = parseID("--broker-id", id); err != nil {
		return nil, err
	}
	o.Installation = broker.InstallationID(f.installation)
	if o.JWKSCA, err = readPEM("--jwks-ca", f.jwksCA, "CERTIFICATE"); err != nil {
		return nil, err
	}
	for _, name := range f.publicKeys {
		key, err := readPEM("--jwt-pubkey-file", name, "PUBLIC KEY")
		if err != nil {
			return nil, err
		}
		o.PublicKeys = append(o.PublicKeys, key)
	}
	provider, tools, err := p.vaultTools(f)
	if err != nil {
		return nil, err
	}
	c, err := vaultscope.ParseConfig(provider.Config)
	if err != nil {
		return nil, fmt.Errorf("reading provider %s: %w", provider.Name, err)
	}
	if err := readBundle(f.bundle, c.Auth.Method, &o); err != nil {
		return nil, err
	}
	s, err := vaultscope.NewSetup(c, tools, o)
	if err != nil {
		return nil, usagef("%w", err)
	}
	return s, nil
}

// vaultTools loads the catalog and picks one provider and its tools.
func (p *program) vaultTools(f vaultFlags) (catalog.Provider, []broker.Tool, error) {
	snapshot, err := catalog.Load(f.catalog, vaultDrivers(f.catalog))
	if errs := (strictyaml.Errors)(nil); errors.As(err, &errs) {
		return catalog.Provider{}, nil, p.wrongCatalog(errs)
	} else if err != nil {
		return catalog.Provider{}, nil, usagef("%w", err)
	}
	found := map[string]catalog.Provider{}
	scopes := map[string]string{} // where a provider's names live -> its name
	for _, each := range snapshot.Providers() {
		if each.Driver != "vault" {
			continue
		}
		found[each.Name] = each
		c, err := vaultscope.ParseConfig(each.Config)
		if err != nil {
			return catalog.Provider{}, nil, fmt.Errorf("reading provider %s: %w", each.Name, err)
		}
		// Two setups of one name would overwrite each other's policies.
		where := strings.Join([]string{c.Address, c.Namespace, c.Prefix}, "\x00")
		if other, taken := scopes[where]; taken {
			return catalog.Provider{}, nil, usagef("providers %s and %s have one Vault, namespace and prefix: give each its own prefix, and its own auth.role", other, each.Name)
		}
		scopes[where] = each.Name
	}
	names := slices.Sorted(maps.Keys(found))
	switch {
	case len(names) == 0:
		return catalog.Provider{}, nil, usagef("the catalog has no provider with driver vault")
	case f.provider == "" && len(names) > 1:
		return catalog.Provider{}, nil, usagef("the catalog has several providers with driver vault; choose one with --provider: %s", strings.Join(names, ", "))
	case f.provider == "":
		f.provider = names[0]
	}
	provider, ok := found[f.provider]
	if !ok {
		return catalog.Provider{}, nil, usagef("the catalog has no provider %q with driver vault; it has %s", f.provider, strings.Join(names, ", "))
	}
	var tools []broker.Tool
	for _, t := range snapshot.Tools() {
		if t.Provider == provider.Name {
			tools = append(tools, t)
		}
	}
	return provider, tools, nil
}

// wrongCatalog tells everything that is wrong with the catalog, a line each.
func (p *program) wrongCatalog(errs strictyaml.Errors) error {
	if len(errs) == 1 || p.output == "json" {
		return usagef("%s", strings.ReplaceAll(errs.Error(), "\n", "; "))
	}
	for line := range strings.Lines(errs.Error()) {
		p.warn("%s", strings.TrimSpace(line))
	}
	return usagef("the catalog has errors: %d", len(errs))
}

// readBundle reads what Vault verifies the broker's SVIDs with: out of a bundle
// in SPIFFE's format (SPIFFE Trust Domain and Bundle, section 4), which has both
// kinds, or out of a file of certificates.
func readBundle(path, method string, o *vaultscope.Options) error {
	if path == "" {
		return nil
	}
	raw, err := readKeyFile("--bundle", path)
	if err != nil {
		return err
	}
	if !strings.HasPrefix(strings.TrimSpace(string(raw)), "{") {
		o.Bundle, err = pemOf("--bundle", path, raw, "CERTIFICATE")
		return err
	}
	bundle, err := spiffebundle.Parse(o.Broker.TrustDomain(), raw)
	if err != nil {
		return usagef("--bundle: %s is no SPIFFE bundle: %w", path, err)
	}
	var found bytes.Buffer
	if method == vaultscope.MethodCert {
		for _, authority := range bundle.X509Authorities() {
			found.Write(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: authority.Raw}))
		}
		o.Bundle = found.String()
	} else {
		keys := bundle.JWTAuthorities()
		for _, id := range slices.Sorted(maps.Keys(keys)) {
			der, err := x509.MarshalPKIXPublicKey(keys[id])
			if err != nil {
				return usagef("--bundle: %s has a key for JWT-SVIDs that cannot be written: %w", path, err)
			}
			key := pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})
			found.Write(key)
			o.PublicKeys = append(o.PublicKeys, string(key))
		}
	}
	if found.Len() == 0 {
		return usagef("--bundle: %s has nothing that SVIDs for auth method %s are verified with", path, method)
	}
	return nil
}

// readPEM reads a file whose content is put into what is printed.
func readPEM(flag, path, kind string) (string, error) {
	if path == "" {
		return "", nil
	}
	raw, err := readKeyFile(flag, path)
	if err != nil {
		return "", err
	}
	return pemOf(flag, path, raw, kind)
}

// pemOf takes only the kind of block that is asked for, so that no private key
// gets to what is printed.
func pemOf(flag, path string, raw []byte, kind string) (string, error) {
	text, err := vaultscope.PEM(raw, kind)
	if err != nil {
		return "", usagef("%s: %s: %w", flag, path, err)
	}
	return text, nil
}

func readKeyFile(flag, path string) ([]byte, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, usagef("%s: %w", flag, err)
	}
	defer file.Close()
	raw, err := io.ReadAll(io.LimitReader(file, maxKeyFile+1))
	if err != nil || len(raw) > maxKeyFile {
		return nil, usagef("%s: %s cannot be read, or has more than %d bytes", flag, path, maxKeyFile)
	}
	return raw, nil
}

// vaultDrivers are the drivers for reading a catalog of which only Vault's part
// is looked at: the other drivers that the files name are stood in for.
func vaultDrivers(files []string) map[string]providers.Driver {
	drivers := map[string]providers.Driver{}
	for _, name := range files {
		var f struct {
			Agents    json.RawMessage `yaml:"agents"`
			Groups    json.RawMessage `yaml:"groups"`
			Operators json.RawMessage `yaml:"operators"`
			Providers []struct {
				Name   string          `yaml:"name"`
				Driver string          `yaml:"driver"`
				Config json.RawMessage `yaml:"config"`
			} `yaml:"providers"`
			Tools   json.RawMessage `yaml:"tools"`
			Openers json.RawMessage `yaml:"openers"`
			Rules   json.RawMessage `yaml:"approval_rules"`
		}
		if _, err := strictyaml.ReadFile(name, &f); err != nil {
			continue // catalog.Load says what is wrong with it, in full
		}
		for _, p := range f.Providers {
			drivers[p.Driver] = anyDriver{}
		}
	}
	drivers["vault"] = vaultDriver{}
	return drivers
}

// vaultDriver reads what belongs to Vault. It opens nothing.
type vaultDriver struct{ anyDriver }

func (vaultDriver) ValidateConfig(config json.RawMessage) error {
	_, err := vaultscope.ParseConfig(config)
	return err
}

func (vaultDriver) ValidateScope(config json.RawMessage, tool broker.Tool) (providers.ScopeInfo, error) {
	c, err := vaultscope.ParseConfig(config)
	if err != nil {
		return providers.ScopeInfo{}, err
	}
	s, err := vaultscope.ParseScope(c, tool)
	if err != nil {
		return providers.ScopeInfo{}, err
	}
	return s.Info(c), nil
}

// anyDriver stands in for a driver that is not linked here: it takes everything.
type anyDriver struct{}

func (anyDriver) ValidateConfig(json.RawMessage) error { return nil }

func (anyDriver) ValidateScope(_ json.RawMessage, tool broker.Tool) (providers.ScopeInfo, error) {
	return providers.ScopeInfo{Fields: slices.Collect(maps.Values(tool.Env))}, nil
}

func (anyDriver) Open(context.Context, providers.Config) (providers.Provider, error) {
	return nil, fmt.Errorf("this command opens no provider")
}
