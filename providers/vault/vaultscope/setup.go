package vaultscope

import (
	"fmt"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/broker"
)

// loginTTL is how long the broker's own login is good. It logs in again before.
const loginTTL = 15 * time.Minute

// numUses is how often the token of a lease can be used: for the one request
// for its credential, and one to spare. Vault revokes a token at its last use,
// and the credential with it, so that one use cannot be the limit.
const numUses = 2

// Options are what a setup needs to know that no catalog says.
type Options struct {
	Broker       spiffeid.ID           // the broker's; required
	Installation broker.InstallationID // empty: what the broker makes is not bound to one installation's names

	// How Vault verifies the broker's JWT-SVIDs, with method jwt: at most one
	// of both. Without, the configuration of the mount is left as it is.
	JWKSURL    string   // of the trust domain's bundle
	JWKSCA     string   // PEM certificates that JWKSURL's server is verified with; empty: the system's
	PublicKeys []string // in PEM

	Bundle string // with method cert: the trust domain's authorities in PEM; required

	Connection string // the name of the database connection in Vault; empty: "mayfly"
	VaultLogin string // as whom Vault logs in to PostgreSQL; empty: "vault"
}

// ScopedTool is a tool with its scope.
type ScopedTool struct {
	Tool  broker.Tool
	Scope Scope
}

// Setup is what an operator applies to Vault and PostgreSQL, as data. What is
// printed is made of this.
type Setup struct {
	Config  Config
	Tools   []ScopedTool // in the order of their names
	Writes  []Write      // in the order in which they are applied
	Scripts []Script     // run them in PostgreSQL before the writes
	options Options
}

// WriteKind is what a write is about.
type WriteKind string

// The kinds of writes.
const (
	WritePolicy       WriteKind = "policy"
	WriteTokenRole    WriteKind = "token role"
	WriteMount        WriteKind = "auth mount" // Vault answers 400 "path is already in use" if it is there, and that is fine
	WriteAuthConfig   WriteKind = "auth config"
	WriteAuthRole     WriteKind = "auth role"
	WriteConnection   WriteKind = "database connection" // changes one that is there: its URL, login and password stay
	WriteDatabaseRole WriteKind = "database role"
)

// Write is one write to Vault's API.
type Write struct {
	Kind WriteKind      `json:"kind"`
	Path string         `json:"path"` // without v1/
	Body map[string]any `json:"body"` // as JSON
	Why  string         `json:"why"`  // lines for people

	name string // what is written, without its mount
	at   string // the mount
}

// Script is SQL for one PostgreSQL database.
type Script struct {
	Mount string `json:"mount"` // Vault's, whose roles live there
	SQL   string `json:"sql"`   // for a superuser, or for a role that may create roles and schemas
}

// maxIdent is how long a name in PostgreSQL can be: longer ones are cut.
const maxIdent = 63

var identForm = regexp.MustCompile(`^[a-z_][a-z0-9_]{0,62}$`)

// NewSetup makes the setup for a provider and those of the tools that are its.
func NewSetup(c Config, tools []broker.Tool, o Options) (*Setup, error) {
	o.Connection, o.VaultLogin = orElse(o.Connection, "mayfly"), orElse(o.VaultLogin, "vault")
	if err := o.check(c); err != nil {
		return nil, err
	}
	s := &Setup{Config: c, options: o}
	groups := map[string]string{} // PostgreSQL group role -> tool
	for _, t := range tools {
		scope, err := ParseScope(c, t)
		if err != nil {
			return nil, fmt.Errorf("reading the scope of tool %s: %w", t.Name, err)
		}
		if group := GroupRole(t.Name); scope.Engine == EngineDatabase {
			if len(group) > maxIdent {
				return nil, fmt.Errorf("tool %s: its role in PostgreSQL would be %s, and names there have at most %d characters; choose a shorter name", t.Name, group, maxIdent)
			}
			if other, taken := groups[group]; taken {
				return nil, fmt.Errorf("tools %s and %s would both be the PostgreSQL role %s; rename one of them", other, t.Name, group)
			}
			groups[group] = t.Name
		}
		s.Tools = append(s.Tools, ScopedTool{t, scope})
	}
	if len(s.Tools) == 0 {
		return nil, fmt.Errorf("no tool of the catalog is of this provider: there is nothing to set up")
	}
	slices.SortFunc(s.Tools, func(a, b ScopedTool) int { return strings.Compare(a.Tool.Name, b.Tool.Name) })
	for _, t := range s.Tools {
		s.tool(t)
	}
	s.broker()
	s.databases()
	return s, nil
}

func (o Options) check(c Config) error {
	switch {
	case o.Broker.IsZero():
		return fmt.Errorf("the broker's SPIFFE ID is missing: Vault lets in exactly that one")
	case c.Auth.Method == MethodCert && o.Bundle == "":
		return fmt.Errorf("the trust domain's bundle is missing: Vault verifies the broker's certificate with it")
	case c.Auth.Method == MethodCert && (o.JWKSURL != "" || len(o.PublicKeys) > 0):
		return fmt.Errorf("keys of JWT-SVIDs are for auth method jwt; the provider has cert")
	case c.Auth.Method == MethodJWT && o.Bundle != "":
		return fmt.Errorf("a bundle of certificates is for auth method cert; the provider has jwt")
	case o.JWKSURL != "" && len(o.PublicKeys) > 0:
		return fmt.Errorf("a URL of keys and keys exclude each other")
	case o.JWKSURL == "" && o.JWKSCA != "":
		return fmt.Errorf("the authorities of a URL of keys are given without the URL")
	case !identForm.MatchString(o.VaultLogin):
		return fmt.Errorf("%q is no plain name of a role in PostgreSQL", o.VaultLogin)
	case slices.ContainsFunc(c.Databases, func(d Database) bool { return d.SQLUser() == o.VaultLogin }):
		return fmt.Errorf("the broker would log in to PostgreSQL as %s, which is Vault's login; it needs a narrow one of its own", o.VaultLogin)
	case !roleForm.MatchString(o.Connection):
		return fmt.Errorf("%q is no name of a database connection in Vault", o.Connection)
	}
	if o.Installation != "" && !installationForm.MatchString(Installation(o.Installation)) {
		return fmt.Errorf("%q is no installation ID", o.Installation)
	}
	if u, err := url.Parse(o.JWKSURL); o.JWKSURL != "" && (err != nil || u.Host == "" || u.Scheme != "https" && !loopback(u.Hostname())) {
		return fmt.Errorf("%q is no https URL: whoever can change the keys on their way can log in as the broker", o.JWKSURL)
	}
	return nil
}

var installationForm = regexp.MustCompile(`^[a-z0-9]{9}$`)

// tool adds a tool's policy and its token role.
func (s *Setup) tool(t ScopedTool) {
	c, name := s.Config, t.Tool.Name
	s.Writes = append(s.Writes, Write{Kind: WritePolicy, name: c.Policy(name), Path: policyPath(c.Policy(name)),
		Body: map[string]any{"policy": c.ToolPolicy(t.Tool, t.Scope)},
		Why:  fmt.Sprintf("Tool %s: what the token of one lease can do.", name)})
	s.Writes = append(s.Writes, Write{Kind: WriteTokenRole, name: c.TokenRole(name), at: "auth/" + c.TokenMount, Path: c.roleWritePath(name), Body: c.TokenRoleBody(t.Tool),
		Why: fmt.Sprintf(`Tool %s: the only way in which the broker makes tokens for it. They have this
one policy and cannot be given another (without allowed_policies a token could
have the broker's own), are nobody's children (they outlive the broker's login,
which is shorter than a lease may be), end at the latest after %s, and can be
used %d times.`, name, broker.Span(c.TokenTTL(t.Tool.MaxTTL)), numUses)})
}

// TokenRoleBody is what the token role of a tool is written with.
func (c Config) TokenRoleBody(tool broker.Tool) map[string]any {
	return map[string]any{
		"allowed_policies":        []string{c.Policy(tool.Name)},
		"orphan":                  true,
		"renewable":               false,
		"token_type":              "service",
		"token_no_default_policy": true,
		"token_explicit_max_ttl":  seconds(c.TokenTTL(tool.MaxTTL)),
		"token_num_uses":          numUses,
	}
}

// broker adds the broker's policy and its way to log in.
func (s *Setup) broker() {
	c, o := s.Config, s.options
	bound := "Its tokens are not bound to one installation: print\nthe setup again with --installation once the broker has been started."
	if o.Installation != "" {
		bound = "All tokens that it makes bear this installation's name."
	}
	s.Writes = append(s.Writes, Write{Kind: WritePolicy, name: c.BrokerPolicy(), Path: policyPath(c.BrokerPolicy()),
		Body: map[string]any{"policy": c.BrokerPolicyText(s.Tools, o.Installation)},
		Why:  "The broker's own policy. " + bound})
	mount, at := c.Auth.Mount, "auth/"+c.Auth.Mount
	enable := Write{Kind: WriteMount, name: mount, Path: "sys/auth/" + mount, Body: map[string]any{"type": c.Auth.Method},
		Why: "Where the broker logs in. Give Mayfly a mount of its own: what follows replaces\nthe mount's configuration."}
	login := map[string]any{
		"token_policies":          []string{c.BrokerPolicy()},
		"token_ttl":               seconds(loginTTL),
		"token_max_ttl":           seconds(loginTTL),
		"token_no_default_policy": true,
		"token_type":              "service",
	}
	why := fmt.Sprintf("The broker, and nobody else. A login lives for %s and cannot be kept alive\n(no token_period): a stolen one is soon worthless.", broker.Span(loginTTL))
	if c.Auth.Method == MethodCert {
		login["certificate"], login["allowed_uri_sans"], login["display_name"] = o.Bundle, []string{o.Broker.String()}, "mayfly"
		s.Writes = append(s.Writes, enable, Write{Kind: WriteAuthRole, name: c.Auth.Role, at: at, Path: at + "/certs/" + c.Auth.Role, Body: login,
			Why: why + "\nVault wants a common name in the certificate: the broker's registration entry needs\na DNS name. When the trust domain's authorities change, write them here again."})
		return
	}
	config := map[string]any{}
	switch {
	case o.JWKSURL != "":
		config["jwks_url"] = o.JWKSURL
		if o.JWKSCA != "" {
			config["jwks_ca_pem"] = o.JWKSCA
		}
	case len(o.PublicKeys) > 0:
		config["jwt_validation_pubkeys"] = o.PublicKeys
	}
	if len(config) > 0 {
		s.Writes = append(s.Writes, enable, Write{Kind: WriteAuthConfig, name: mount, at: at, Path: at + "/config", Body: config,
			Why: "The keys that the trust domain signs JWT-SVIDs with."})
	} else {
		why += "\nThe auth mount must be there already and know the trust domain's keys: nothing is\nsaid of them here (see --jwks-url and --jwt-pubkey-file)."
	}
	login["role_type"], login["user_claim"], login["bound_subject"], login["bound_audiences"] = "jwt", "sub", o.Broker.String(), []string{c.Auth.Audience}
	s.Writes = append(s.Writes, Write{Kind: WriteAuthRole, name: c.Auth.Role, at: at, Path: at + "/role/" + c.Auth.Role, Body: login, Why: why})
}

// databases adds the database connections and roles, and the SQL.
func (s *Setup) databases() {
	var mounts []string
	roles := map[string][]string{}
	var writes []Write
	for _, t := range s.Tools {
		if t.Scope.Engine != EngineDatabase {
			continue
		}
		mount := t.Scope.Mount
		if !slices.Contains(mounts, mount) {
			mounts = append(mounts, mount)
		}
		for _, class := range t.Scope.Classes {
			role := strings.TrimPrefix(class.Path, mount+"/creds/")
			if slices.Contains(roles[mount], role) {
				continue // two tools of one path: the tools differ in what they allow for it, and the first one's is as good
			}
			roles[mount] = append(roles[mount], role)
			writes = append(writes, Write{Kind: WriteDatabaseRole, name: role, at: mount, Path: mount + "/roles/" + role,
				Body: map[string]any{
					"db_name":               s.options.Connection,
					"creation_statements":   []string{creationSQL(GroupRole(t.Tool.Name))},
					"revocation_statements": []string{revocationSQL},
					"default_ttl":           seconds(class.TTL),
					"max_ttl":               seconds(class.TTL),
				},
				Why: fmt.Sprintf(`Tool %s, for leases of %s and longer. default_ttl decides until when PostgreSQL
lets the role log in, whatever becomes of Vault and of Mayfly: it is no longer than
the lease. Revoking ends open sessions, too, and does not fail when the role is
gone already.`, t.Tool.Name, broker.Span(class.TTL))})
		}
	}
	for _, mount := range mounts {
		slices.Sort(roles[mount])
		s.Writes = append(s.Writes, Write{Kind: WriteConnection, name: s.options.Connection, at: mount, Path: mount + "/config/" + s.options.Connection,
			Body: map[string]any{"plugin_name": "postgresql-database-plugin", "username_template": UsernameTemplate, "allowed_roles": roles[mount]},
			Why: fmt.Sprintf(`The connection to PostgreSQL, which must be there already, with its URL and
password (it logs in as %s): this makes names of roles tell whose they are, and
lets no other role of Vault use it. Give Mayfly a connection of its own.`, s.options.VaultLogin)})
	}
	s.Writes = append(s.Writes, writes...)
	for _, mount := range mounts {
		s.Scripts = append(s.Scripts, Script{Mount: mount, SQL: s.sql(mount)})
	}
}

// seconds is a duration as Vault's API takes it.
func seconds(d time.Duration) int64 { return int64(d / time.Second) }
