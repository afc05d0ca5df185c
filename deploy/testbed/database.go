//go:build unix

package testbed

import (
	"context"
	"crypto/rand"
	"fmt"
	"time"
)

// What VaultPostgres sets up.
const (
	DatabaseMount = "database"    // Vault's database engine
	DatabaseName  = "crm"         // the connection in it, and PostgreSQL's database
	AdminLogin    = "vault_admin" // the role that Vault logs in as
	ReadersRole   = "crm_ro"      // may read the table customers; each database role's members are its members

	// maxConnections are what Vault opens at most to PostgreSQL. Vault's own
	// default, 4, would be what measurements measure.
	maxConnections = 16
)

const (
	usernameTemplate = `mf_{{ .DisplayName | replace "token-" "" | truncate 36 }}_{{ random 8 }}`

	creation = `CREATE ROLE "{{name}}" LOGIN PASSWORD '{{password}}' VALID UNTIL '{{expiration}}' IN ROLE ` + ReadersRole + `;`

	// revocation ends the role's sessions and may be repeated. Vault's default
	// does neither.
	revocation = `SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{{name}}'; DROP ROLE IF EXISTS "{{name}}";`

	customers = `
CREATE TABLE customers (id text PRIMARY KEY, name text NOT NULL, city text NOT NULL, note text NOT NULL);
INSERT INTO customers VALUES
  ('c-17', 'Ada Lovelace', 'London', 'open ticket: cannot export invoices'),
  ('c-42', 'Grace Hopper', 'New York', 'no open ticket');
CREATE ROLE ` + ReadersRole + ` NOLOGIN;
GRANT SELECT ON customers TO ` + ReadersRole + `;`
)

// VaultPostgres prepares a PostgreSQL with a database crm, and a Vault whose
// database engine makes logins for it. Vault's own login there may create
// roles and end sessions, and no more.
func VaultPostgres(ctx context.Context, v *Vault, p *Postgres) error {
	if err := p.Exec(ctx, "postgres", "CREATE DATABASE "+DatabaseName); err != nil {
		return err
	}
	if err := p.Exec(ctx, DatabaseName, customers); err != nil {
		return err
	}
	password := rand.Text()
	admin := fmt.Sprintf("CREATE ROLE %s LOGIN CREATEROLE PASSWORD '%s'; GRANT pg_signal_backend TO %[1]s;", AdminLogin, password)
	if p.Version >= 16 { // from there on CREATEROLE alone gives no say over roles that others made
		admin += fmt.Sprintf("GRANT %s TO %s WITH ADMIN TRUE, INHERIT FALSE, SET FALSE;", ReadersRole, AdminLogin)
	}
	if err := p.Exec(ctx, "postgres", admin); err != nil {
		return err
	}
	vault := v.Client().Logical()
	if _, err := vault.WriteWithContext(ctx, "sys/mounts/"+DatabaseMount, map[string]any{"type": "database"}); err != nil {
		return fmt.Errorf("mounting the database engine: %w", err)
	}
	_, err := vault.WriteWithContext(ctx, DatabaseMount+"/config/"+DatabaseName, map[string]any{
		"plugin_name":          "postgresql-database-plugin",
		"allowed_roles":        "*",
		"connection_url":       fmt.Sprintf("postgresql://{{username}}:{{password}}@%s/%s?sslmode=disable", loopback(p.Port), DatabaseName),
		"username":             AdminLogin,
		"password":             password,
		"username_template":    usernameTemplate,
		"max_open_connections": maxConnections,
		"max_idle_connections": maxConnections,
	})
	if err != nil {
		return fmt.Errorf("configuring the database engine: %w", err)
	}
	return nil
}

// DatabaseRole writes a role of the database engine, whose logins read the
// table customers and live for ttl: database/creds/NAME makes them.
func (v *Vault) DatabaseRole(ctx context.Context, name string, ttl time.Duration) error {
	_, err := v.Client().Logical().WriteWithContext(ctx, DatabaseMount+"/roles/"+name, map[string]any{
		"db_name":               DatabaseName,
		"creation_statements":   creation,
		"revocation_statements": revocation,
		"default_ttl":           ttl.String(),
		"max_ttl":               ttl.String(),
	})
	if err != nil {
		return fmt.Errorf("writing the database role %s: %w", name, err)
	}
	return nil
}
