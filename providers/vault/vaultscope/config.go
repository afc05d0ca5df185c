// Package vaultscope is what there is to say about Vault without asking it:
// the configuration of a Vault provider, the scopes of its tools, the names
// that Mayfly gives in Vault and in PostgreSQL, and the setup that an operator
// applies there. It is pure: it reaches for no network and no file.
package vaultscope

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"net/url"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/mayfly-security/mayfly/providers"
)

// Limits on what a configuration or scope may say.
const (
	defaultRequestLimit = 90 * time.Second // Vault's default_max_request_duration
	maxRequestLimit     = 10 * time.Minute
	defaultConcurrency  = 16
	maxConcurrency      = 256
	maxDatabases        = 32
	maxText             = 512 // bytes of an address, a path or a DSN
	// tokenMargin is how much longer than one request a lease's token lives
	// at least: it must not expire while the credential is read with it.
	tokenMargin = 30 * time.Second
)

// How the broker logs in to Vault.
const (
	MethodJWT  = "jwt"  // with a JWT-SVID
	MethodCert = "cert" // with its X.509-SVID, as a TLS client
)

var (
	segmentForm = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._@~:=-]*$`)
	roleForm    = regexp.MustCompile(`^[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?$`) // Vault's own for names of roles
	prefixForm  = regexp.MustCompile(`^[a-z][a-z0-9-]{0,30}-$`)
	schemaForm  = regexp.MustCompile(`^[a-z_][a-z0-9_]{0,62}$`)
)

// Config is a Vault provider's configuration, complete: what was left out has
// its default.
type Config struct {
	Address      string        // URL of Vault's API, without a slash at the end
	Namespace    string        // X-Vault-Namespace; empty: none
	CAFile       string        // absolute path of PEM certificates; empty: the system's
	ServerName   string        // for TLS; empty: the address' host
	Auth         Auth          //
	RequestLimit time.Duration // Vault's own limit on one request
	Prefix       string        // of token roles and policies; ends with "-"
	TokenMount   string        // below auth/; "token"
	Concurrency  int           // the most calls that end leases, at a time
	Databases    []Database    // PostgreSQL logins that end and find roles directly; one for each mount
}

// Auth is how the broker logs in.
type Auth struct {
	Method   string // MethodJWT or MethodCert
	Mount    string // below auth/
	Role     string
	Audience string // of the JWT-SVID; empty with MethodCert
}

// Database is a narrow PostgreSQL login of the broker's own, for one database
// mount of Vault.
type Database struct {
	Mount        string // the mount in Vault
	DSN          string // libpq keywords or a URL, without a password
	PasswordFile string // absolute path; empty: the server asks for none
	Schema       string // where the functions of the setup are
}

// Database returns the login for a mount.
func (c Config) Database(mount string) (Database, bool) {
	for _, d := range c.Databases {
		if d.Mount == mount {
			return d, true
		}
	}
	return Database{}, false
}

// LoginPath is the path that the broker logs in at.
func (c Config) LoginPath() string { return "auth/" + c.Auth.Mount + "/login" }

// CreatePath is the path at which tokens for leases of a tool are made.
func (c Config) CreatePath(tool string) string {
	return "auth/" + c.TokenMount + "/create/" + c.TokenRole(tool)
}

// RevokeAccessorPath is the path at which tokens are ended.
func (c Config) RevokeAccessorPath() string { return "auth/" + c.TokenMount + "/revoke-accessor" }

// TokenTTL is how long the token of a lease lives that lives for ttl: as long,
// and in any case longer than the one request that is made with it.
func (c Config) TokenTTL(ttl time.Duration) time.Duration {
	if rest := ttl % time.Second; rest > 0 {
		ttl += time.Second - rest
	}
	return max(ttl, c.RequestLimit+tokenMargin)
}

// Meaning is the part of the configuration that decides what a lease can do;
// see providers.Meaning.
func (c Config) Meaning() json.RawMessage {
	b, err := json.Marshal(map[string]string{"address": c.Address, "namespace": c.Namespace, "prefix": c.Prefix,
		"token_mount": c.TokenMount, "auth_mount": c.Auth.Mount})
	if err != nil {
		panic(err) // strings always have a JSON form
	}
	return b
}

// ParseConfig reads and checks a provider's configuration. Its errors are
// *providers.FieldError.
func ParseConfig(raw json.RawMessage) (Config, error) {
	var in struct {
		Address    string `json:"address"`
		Namespace  string `json:"namespace"`
		CAFile     string `json:"ca_file"`
		ServerName string `json:"server_name"`
		Auth       struct {
			Method   string `json:"method"`
			Mount    string `json:"mount"`
			Role     string `json:"role"`
			Audience string `json:"audience"`
		} `json:"auth"`
		RequestLimit string `json:"request_limit"`
		Prefix       string `json:"prefix"`
		TokenMount   string `json:"token_mount"`
		Concurrency  *int   `json:"concurrency"`
		Databases    []struct {
			Mount        string `json:"mount"`
			DSN          string `json:"dsn"`
			PasswordFile string `json:"password_file"`
			Schema       string `json:"schema"`
		} `json:"databases"`
	}
	if err := providers.Decode(raw, &in); err != nil {
		return Config{}, err
	}
	c := Config{
		Address: strings.TrimSuffix(in.Address, "/"), Namespace: strings.Trim(in.Namespace, "/"), CAFile: in.CAFile, ServerName: in.ServerName,
		Auth:   Auth{Method: in.Auth.Method, Mount: orElse(in.Auth.Mount, in.Auth.Method), Role: orElse(in.Auth.Role, "mayfly"), Audience: in.Auth.Audience},
		Prefix: orElse(in.Prefix, "mayfly-"), TokenMount: orElse(in.TokenMount, "token"),
		RequestLimit: defaultRequestLimit, Concurrency: defaultConcurrency,
	}
	if err := c.checkAddress(); err != nil {
		return Config{}, err
	}
	if err := c.checkAuth(); err != nil {
		return Config{}, err
	}
	if in.RequestLimit != "" {
		var err error
		if c.RequestLimit, err = time.ParseDuration(in.RequestLimit); err != nil || c.RequestLimit < time.Second || c.RequestLimit > maxRequestLimit {
			return Config{}, providers.FieldErrorf("request_limit", "is %q; it is Vault's max_request_duration, from 1s to %s", in.RequestLimit, maxRequestLimit)
		}
	}
	if !prefixForm.MatchString(c.Prefix) {
		return Config{}, providers.FieldErrorf("prefix", "is %q; it has lowercase letters, digits and '-', begins with a letter and ends with '-', such as \"mayfly-\"", c.Prefix)
	}
	if err := checkPath("token_mount", c.TokenMount); err != nil {
		return Config{}, err
	}
	if in.Concurrency != nil {
		c.Concurrency = *in.Concurrency
	}
	if c.Concurrency < 1 || c.Concurrency > maxConcurrency {
		return Config{}, providers.FieldErrorf("concurrency", "is %d; it is from 1 to %d", c.Concurrency, maxConcurrency)
	}
	if len(in.Databases) > maxDatabases {
		return Config{}, providers.FieldErrorf("databases", "has %d logins; at most %d are taken", len(in.Databases), maxDatabases)
	}
	for i, d := range in.Databases {
		d := Database{Mount: strings.Trim(d.Mount, "/"), DSN: d.DSN, PasswordFile: d.PasswordFile, Schema: orElse(d.Schema, "mayfly")}
		if err := d.check(fmt.Sprintf("databases[%d]", i)); err != nil {
			return Config{}, err
		}
		if _, twice := c.Database(d.Mount); twice {
			return Config{}, providers.FieldErrorf(fmt.Sprintf("databases[%d].mount", i), "%s has a login already", d.Mount)
		}
		c.Databases = append(c.Databases, d)
	}
	return c, nil
}

func (c Config) checkAddress() error {
	u, err := url.Parse(c.Address)
	if c.Address == "" || err != nil || len(c.Address) > maxText || u.Host == "" || u.User != nil || strings.Trim(u.Path, "/") != "" || strings.ContainsAny(c.Address, "?#") {
		return providers.FieldErrorf("address", "must be the URL of Vault's API without a path, such as https://vault.acme.test:8200")
	}
	if u.Scheme != "https" && !(u.Scheme == "http" && loopback(u.Hostname())) {
		return providers.FieldErrorf("address", "must be an https URL; only a loopback host may have http")
	}
	if c.Namespace != "" {
		if err := checkPath("namespace", c.Namespace); err != nil {
			return err
		}
	}
	if c.CAFile != "" && !filepath.IsAbs(c.CAFile) {
		return providers.FieldErrorf("ca_file", "must be an absolute path, not %q", c.CAFile)
	}
	if len(c.ServerName) > 253 || strings.ContainsAny(c.ServerName, " /\t\r\n") {
		return providers.FieldErrorf("server_name", "is no name of a host")
	}
	if u.Scheme == "http" && (c.CAFile != "" || c.ServerName != "") {
		return providers.FieldErrorf("address", "is plain http, and ca_file and server_name are for https")
	}
	return nil
}

func (c *Config) checkAuth() error {
	switch c.Auth.Method {
	case MethodJWT:
		c.Auth.Audience = orElse(c.Auth.Audience, c.Address)
		if len(c.Auth.Audience) > maxText || strings.ContainsFunc(c.Auth.Audience, func(r rune) bool { return r <= ' ' || r > '~' || r == '"' || r == '\\' }) {
			return providers.FieldErrorf("auth.audience", "must be one audience: a URL or name without spaces and quotes")
		}
	case MethodCert:
		if c.Auth.Audience != "" {
			return providers.FieldErrorf("auth.audience", "is for method jwt only")
		}
		if !strings.HasPrefix(c.Address, "https:") {
			return providers.FieldErrorf("auth.method", "is cert, which needs an https address")
		}
	default:
		return providers.FieldErrorf("auth.method", "is %q; it must be jwt (the broker logs in with a JWT-SVID) or cert (with its X.509-SVID)", c.Auth.Method)
	}
	if err := checkPath("auth.mount", c.Auth.Mount); err != nil {
		return err
	}
	if !roleForm.MatchString(c.Auth.Role) || len(c.Auth.Role) > 128 {
		return providers.FieldErrorf("auth.role", "%q is no name of a role in Vault", c.Auth.Role)
	}
	return nil
}

func (d Database) check(at string) error {
	if err := checkPath(at+".mount", d.Mount); err != nil {
		return err
	}
	if err := checkDSN(at+".dsn", d.DSN); err != nil {
		return err
	}
	if d.PasswordFile != "" && !filepath.IsAbs(d.PasswordFile) {
		return providers.FieldErrorf(at+".password_file", "must be an absolute path, not %q", d.PasswordFile)
	}
	if !schemaForm.MatchString(d.Schema) || strings.HasPrefix(d.Schema, "pg_") || d.Schema == "public" {
		return providers.FieldErrorf(at+".schema", "is %q; it is a schema of its own, in lowercase letters, digits and '_', such as \"mayfly\"", d.Schema)
	}
	return nil
}

// checkPath checks a path in Vault that goes into policies. It refuses all
// that means something else there: globs, templates, quotes.
func checkPath(field, path string) error {
	if path == "" {
		return providers.FieldErrorf(field, "is missing")
	}
	if len(path) > maxText {
		return providers.FieldErrorf(field, "has %d bytes; at most %d are taken", len(path), maxText)
	}
	for s := range strings.SplitSeq(path, "/") {
		if !segmentForm.MatchString(s) {
			return providers.FieldErrorf(field, "%q is no plain path in Vault: each part begins with a letter or digit, and has letters, digits and . _ @ ~ : = - alone, without globs, templates and empty parts", path)
		}
	}
	return nil
}

func loopback(host string) bool {
	ip, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && ip.IsLoopback()
}

func orElse(s, other string) string {
	if s == "" {
		return other
	}
	return s
}
