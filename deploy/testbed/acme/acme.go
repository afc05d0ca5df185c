//go:build unix

// Package acme is the world of the sample catalog with Vault: a real
// PostgreSQL with customers, a real Vault over TLS that can make logins to it,
// and the catalog with their addresses in it. Demonstrations, measurements and
// trials are made in it. What the broker may do there is what `mayfly vault
// setup` prints, and nothing else: see [World.Serve].
package acme

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/jackc/pgx/v5"

	"github.com/mayfly-security/mayfly/deploy/examples"
	"github.com/mayfly-security/mayfly/deploy/testbed"
	"github.com/mayfly-security/mayfly/providers/vault/vaultscope"
)

// Tool is the catalog's tool, and Group the PostgreSQL role that its logins
// are members of.
const (
	Tool  = "crm.query"
	Group = "tool_crm_query"
)

// TokenTool is the tool of the provider that Config.Tokens adds.
const TokenTool = "status.write"

const (
	tokenProvider = `  - name: tokens
    driver: token
    config: {issuer: "https://mayfly.acme.test", keys: %q}
`
	tokenTool = `  - name: ` + TokenTool + `
    provider: tokens
    description: Post to the status page
    max_ttl: 30m
    scope: {audience: "https://status.acme.test", scopes: [status.write], verification: offline, leeway: 30s}

`
)

// sweepLogin is the broker's narrow login to PostgreSQL.
const sweepLogin = "mayfly_sweep"

// World is the servers and the catalog.
type World struct {
	Vault    *testbed.Vault
	Postgres *testbed.Postgres
	Catalog  string // the catalog's file

	dir string
}

// Config says how a World is opened. The zero value is what people would run.
type Config struct {
	// NoSweep leaves out the broker's narrow login to PostgreSQL.
	NoSweep bool
	// NoFsync has PostgreSQL lose commits when the machine fails.
	NoFsync bool
	// RequestLimit is Vault's limit on one request, and the provider's. Zero:
	// 90 s, as Vault has it.
	RequestLimit time.Duration
	// Tokens adds a second provider, the broker's own tokens, with the tool
	// TokenTool.
	Tokens bool
	// VaultAddr is what the catalog says of Vault's address; empty: the truth.
	// A proxy's, where there is one.
	VaultAddr string
}

// Open starts the servers and writes the catalog. Everything lies in dir,
// which the user postgres must be able to enter where we are root.
func Open(ctx context.Context, dir string, c Config) (_ *World, err error) {
	w := &World{dir: dir, Catalog: filepath.Join(dir, "catalog.yaml")}
	defer func() {
		if err != nil {
			err = errors.Join(err, w.Close())
		}
	}()
	w.Postgres, err = testbed.StartPostgres(ctx, testbed.PostgresConfig{NoFsync: c.NoFsync, Settings: map[string]string{"max_connections": "300"}})
	if err != nil {
		return nil, err
	}
	if w.Vault, err = testbed.StartVault(ctx, testbed.VaultConfig{TLS: true, Audit: true, MaxRequestDuration: c.RequestLimit}); err != nil {
		return nil, err
	}
	if err := testbed.VaultPostgres(ctx, w.Vault, w.Postgres); err != nil {
		return nil, err
	}
	return w, w.writeCatalog(c)
}

// writeCatalog fills the sample catalog with what is true here.
func (w *World) writeCatalog(c Config) error {
	ca, password := filepath.Join(w.dir, "vault-ca.pem"), filepath.Join(w.dir, "sweep-password")
	if err := errors.Join(
		os.WriteFile(ca, []byte(w.Vault.CACert), 0o600),
		os.WriteFile(password, []byte(rand.Text()+"\n"), 0o600),
	); err != nil {
		return err
	}
	address := w.Vault.Addr
	if c.VaultAddr != "" {
		address = c.VaultAddr
	}
	text := examples.VaultCatalog
	for was, is := range map[string]string{
		"address: https://vault.acme.test:8200": "address: " + address,
		"/etc/mayfly/vault-ca.pem":              ca,
		"/etc/mayfly/crm-sweep.password":        password,
		"host=db.acme.test port=5432":           "host=" + w.Postgres.Host + " port=" + strconv.Itoa(w.Postgres.Port),
		"sslmode=verify-full":                   "sslmode=disable", // it is on loopback
		// One agent stands for many.
		"    environment: production\n": "    environment: production\n    max_leases: 100000\n    max_per_hour: 1000000\n",
	} {
		if !strings.Contains(text, was) {
			return fmt.Errorf("the sample catalog does not say %q", was)
		}
		text = strings.ReplaceAll(text, was, is)
	}
	if c.RequestLimit > 0 {
		text = strings.Replace(text, "    config:\n", "    config:\n      request_limit: "+c.RequestLimit.String()+"\n", 1)
	}
	if c.Tokens {
		text = strings.Replace(text, "\nproviders:\n", "\nproviders:\n"+fmt.Sprintf(tokenProvider, filepath.Join(w.dir, "state", "keys")), 1)
		text = strings.Replace(text, "\ntools:\n", "\ntools:\n"+tokenTool, 1)
	}
	if c.NoSweep {
		before, after, _ := strings.Cut(text, "      # A narrow login")
		_, after, _ = strings.Cut(after, "\n\n")
		text = before + "\n" + after
	}
	return os.WriteFile(w.Catalog, []byte(text), 0o600)
}

// applySQL does what an operator does in PostgreSQL with the setup, as `mayfly
// vault setup --output json` prints it, and grants the tool's logins what they
// are for.
func (w *World) applySQL(ctx context.Context, document []byte) error {
	var setup vaultscope.Document
	if err := json.Unmarshal(document, &setup); err != nil {
		return fmt.Errorf("reading the setup: %w", err)
	}
	for _, s := range setup.Scripts {
		if err := w.Postgres.Exec(ctx, testbed.DatabaseName, s.SQL); err != nil {
			return fmt.Errorf("setting PostgreSQL up: %w", err)
		}
	}
	password, err := os.ReadFile(filepath.Join(w.dir, "sweep-password"))
	if err != nil {
		return err
	}
	sql := "GRANT SELECT ON customers TO " + Group + ";"
	if slices.ContainsFunc(setup.Scripts, func(s vaultscope.Script) bool { return strings.Contains(s.SQL, sweepLogin) }) {
		sql += fmt.Sprintf("ALTER ROLE %s PASSWORD '%s';", sweepLogin, strings.TrimSpace(string(password)))
	}
	return w.Postgres.Exec(ctx, testbed.DatabaseName, sql)
}

// apply does what an operator does in Vault with the setup.
func (w *World) apply(ctx context.Context, document []byte) error {
	var setup vaultscope.Document
	if err := json.Unmarshal(document, &setup); err != nil {
		return fmt.Errorf("reading the setup: %w", err)
	}
	for _, each := range setup.Writes {
		_, err := w.Vault.Client().Logical().WriteWithContext(ctx, each.Path, each.Body)
		var answer *api.ResponseError
		if each.Kind == vaultscope.WriteMount && errors.As(err, &answer) && strings.Contains(answer.Error(), "path is already in use") {
			continue
		}
		if err != nil {
			return fmt.Errorf("setting Vault up: writing %s: %w", each.Path, err)
		}
	}
	return nil
}

// Connect opens a session of a login that was made.
func (w *World) Connect(ctx context.Context, user, password string) (*pgx.Conn, error) {
	return pgx.Connect(ctx, w.Postgres.DSN(testbed.DatabaseName, user, password))
}

// Close ends the servers. It leaves the folder.
func (w *World) Close() error {
	var errs []error
	if w.Vault != nil {
		errs = append(errs, w.Vault.Close())
	}
	if w.Postgres != nil {
		errs = append(errs, w.Postgres.Close())
	}
	return errors.Join(errs...)
}
