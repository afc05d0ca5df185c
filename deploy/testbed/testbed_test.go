//go:build unix

package testbed

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

func put(t *testing.T, v *Vault, value string) {
	t.Helper()
	if _, err := v.Client().Logical().WriteWithContext(t.Context(), "kept/x", map[string]any{"value": value}); err != nil {
		t.Fatal(err)
	}
}

func get(t *testing.T, v *Vault) string {
	t.Helper()
	s, err := v.Client().Logical().ReadWithContext(t.Context(), "kept/x")
	if err != nil {
		t.Fatal(err)
	}
	if s == nil {
		return ""
	}
	value, _ := s.Data["value"].(string)
	return value
}

func mount(t *testing.T, v *Vault) {
	t.Helper()
	if err := v.Client().Sys().MountWithContext(t.Context(), "kept", &api.MountInput{Type: "kv", Options: map[string]string{"version": "1"}}); err != nil {
		t.Fatal(err)
	}
}

func TestVaultKeepsItsDataThroughKillAndRestart(t *testing.T) {
	t.Parallel()
	v := TestVault(t, VaultConfig{Audit: true})
	mount(t, v)
	put(t, v, "one")
	addr := v.Addr
	if err := v.Kill(); err != nil {
		t.Fatal(err)
	}
	if v.Running() {
		t.Fatal("a killed Vault runs still")
	}
	if _, err := v.Client().Sys().HealthWithContext(t.Context()); err == nil {
		t.Fatal("a killed Vault answers")
	}
	for range 2 { // from being down, and from running
		if err := v.Restart(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := get(t, v); got != "one" || v.Addr != addr {
			t.Fatalf("after a restart %q is at %s; want one at %s", got, v.Addr, addr)
		}
	}
	b, err := os.ReadFile(v.AuditLog)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(b), `"path":"kept/x"`) {
		t.Error("the audit log does not have the requests")
	}
}

func TestVaultSealed(t *testing.T) {
	t.Parallel()
	v := TestVault(t, VaultConfig{})
	mount(t, v)
	put(t, v, "one")
	if err := v.Seal(t.Context()); err != nil {
		t.Fatal(err)
	}
	var refused *api.ResponseError
	if _, err := v.Client().Logical().ReadWithContext(t.Context(), "kept/x"); !errors.As(err, &refused) || refused.StatusCode != 503 {
		t.Fatalf("a sealed Vault said %v; want 503", err)
	}
	if err := v.Unseal(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := get(t, v); got != "one" {
		t.Errorf("after unsealing there is %q; want one", got)
	}
	// Start leaves it sealed, as a real restart does.
	if err := v.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := v.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	if status, err := v.Client().Sys().SealStatusWithContext(t.Context()); err != nil || !status.Sealed {
		t.Fatalf("after Start: %+v, %v; want a sealed Vault", status, err)
	}
}

func TestVaultPaused(t *testing.T) {
	t.Parallel()
	v := TestVault(t, VaultConfig{})
	if err := v.Pause(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if _, err := v.Client().Sys().HealthWithContext(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a paused Vault: %v; want no answer", err)
	}
	if err := v.Resume(); err != nil {
		t.Fatal(err)
	}
	if _, err := v.Client().Sys().HealthWithContext(t.Context()); err != nil {
		t.Error(err)
	}
	if err := v.Pause(); err != nil {
		t.Fatal(err)
	}
	if err := v.Stop(t.Context()); err != nil { // a frozen process sees no other signal
		t.Error(err)
	}
}

func TestVaultSpeaksTLS(t *testing.T) {
	t.Parallel()
	v := TestVault(t, VaultConfig{TLS: true, Names: []string{"vault.acme.test"}})
	if !strings.HasPrefix(v.Addr, "https://") || !strings.Contains(v.CACert, "BEGIN CERTIFICATE") {
		t.Fatalf("it is at %s with the authority %q", v.Addr, v.CACert)
	}
	if err := v.Client().Auth().Token().RevokeSelfWithContext(t.Context(), ""); err != nil {
		t.Error(err)
	}
	stranger, err := api.NewClient(&api.Config{Address: v.Addr})
	if err != nil {
		t.Fatal(err)
	}
	stranger.SetMaxRetries(0)
	if _, err := stranger.Sys().HealthWithContext(t.Context()); err == nil || !strings.Contains(err.Error(), "unknown authority") {
		t.Errorf("a client that does not know the authority: %v", err)
	}
}

// A database role whose creation sleeps shows how long Vault gives a request.
func TestVaultEndsLongRequests(t *testing.T) {
	t.Parallel()
	p := TestPostgres(t, PostgresConfig{NoFsync: true})
	v := TestVault(t, VaultConfig{})
	if err := VaultPostgres(t.Context(), v, p); err != nil {
		t.Fatal(err)
	}
	_, err := v.Client().Logical().WriteWithContext(t.Context(), DatabaseMount+"/roles/slow", map[string]any{
		"db_name": DatabaseName, "creation_statements": "SELECT pg_sleep(60);",
	})
	if err != nil {
		t.Fatal(err)
	}
	v.config.MaxRequestDuration = time.Second // not before: on a busy machine a mount takes long
	if err := v.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 40*time.Second)
	defer cancel()
	_, err = v.Client().Logical().ReadWithContext(ctx, DatabaseMount+"/creds/slow")
	var refused *api.ResponseError
	if !errors.As(err, &refused) {
		t.Errorf("a request of 60 s at a Vault that gives 1 s: %v; want an answer of Vault's", err)
	}
}

func TestMissingBinary(t *testing.T) {
	t.Parallel()
	_, err := StartVault(t.Context(), VaultConfig{Binary: filepath.Join(t.TempDir(), "vault")})
	if err == nil || !strings.Contains(err.Error(), "run `make testbed-vault`") {
		t.Errorf("without its binary: %v; want what to do", err)
	}
	_, err = StartOIDC(t.Context(), OIDCConfig{Server: filepath.Join(t.TempDir(), "server.mjs")})
	if err == nil || !strings.Contains(err.Error(), "run `make testbed-oidc`") {
		t.Errorf("without its program: %v; want what to do", err)
	}
	if _, err := findBinary("no-such-server", ""); err == nil || !strings.Contains(err.Error(), "make testbed-no-such-server") {
		t.Errorf("without its binary: %v; want what to do", err)
	}
}

func count(t *testing.T, p *Postgres) (n int) {
	t.Helper()
	c, err := p.Superuser(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close(t.Context())
	if err := c.QueryRow(t.Context(), "SELECT count(*) FROM kept").Scan(&n); err != nil {
		t.Fatal(err)
	}
	return n
}

func TestPostgresKeepsItsDataThroughKillAndRestart(t *testing.T) {
	t.Parallel()
	p := TestPostgres(t, PostgresConfig{})
	if err := p.Exec(t.Context(), "postgres", "CREATE TABLE kept (x int); INSERT INTO kept VALUES (1), (2)"); err != nil {
		t.Fatal(err)
	}
	session, err := p.Superuser(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer session.Close(context.WithoutCancel(t.Context()))
	pid := int(session.PgConn().PID())
	if err := p.Kill(); err != nil {
		t.Fatal(err)
	}
	if state, _ := stat(pid); state != 0 && state != 'Z' {
		t.Errorf("a session of a killed server is in state %c", state)
	}
	for range 2 { // from being down, and from running
		if err := p.Restart(t.Context()); err != nil {
			t.Fatal(err)
		}
		if n := count(t, p); n != 2 {
			t.Errorf("after a restart there are %d rows; want 2", n)
		}
	}
}

func TestPostgresPaused(t *testing.T) {
	t.Parallel()
	p := TestPostgres(t, PostgresConfig{NoFsync: true})
	session, err := p.Superuser(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer session.Close(context.WithoutCancel(t.Context()))
	for range 2 {
		if err := p.Pause(); err != nil {
			t.Fatal(err)
		}
		answer := make(chan error, 1)
		go func() { _, err := session.Exec(t.Context(), "SELECT 1"); answer <- err }()
		select {
		case err := <-answer:
			t.Fatalf("a session of a paused server answered: %v", err)
		case <-time.After(200 * time.Millisecond):
		}
		if err := p.Resume(); err != nil {
			t.Fatal(err)
		}
		if err := <-answer; err != nil {
			t.Error(err)
		}
	}
	if err := p.Pause(); err != nil { // Close has to end a paused one too
		t.Fatal(err)
	}
}

func TestPostgresWantsPasswords(t *testing.T) {
	t.Parallel()
	p := TestPostgres(t, PostgresConfig{NoFsync: true})
	if err := p.Exec(t.Context(), "postgres", "CREATE ROLE sam LOGIN PASSWORD 's3cret'"); err != nil {
		t.Fatal(err)
	}
	c, err := pgx.Connect(t.Context(), p.DSN("postgres", "sam", "s3cret"))
	if err != nil {
		t.Fatal(err)
	}
	c.Close(t.Context())
	for _, dsn := range []string{p.DSN("postgres", "sam", "wrong"), p.SocketDSN("postgres", "sam") + " password=wrong", p.DSN("postgres", "postgres", "")} {
		var refused *pgconn.PgError
		if _, err := pgx.Connect(t.Context(), dsn); !errors.As(err, &refused) || refused.Code != "28P01" {
			t.Errorf("%s: %v; want the password to be refused", dsn, err)
		}
	}
}

func TestCredentialsOfVaultsDatabaseEngine(t *testing.T) {
	t.Parallel()
	p := TestPostgres(t, PostgresConfig{NoFsync: true})
	v := TestVault(t, VaultConfig{})
	if err := VaultPostgres(t.Context(), v, p); err != nil {
		t.Fatal(err)
	}
	if err := v.DatabaseRole(t.Context(), "crm-read", 10*time.Minute); err != nil {
		t.Fatal(err)
	}
	cred, err := v.Client().Logical().ReadWithContext(t.Context(), DatabaseMount+"/creds/crm-read")
	if err != nil {
		t.Fatal(err)
	}
	user, password := cred.Data["username"].(string), cred.Data["password"].(string)
	if !strings.HasPrefix(user, "mf_") || cred.LeaseDuration != 600 {
		t.Errorf("the login is %s for %d s; want mf_… for 600", user, cred.LeaseDuration)
	}
	session, err := pgx.Connect(t.Context(), p.DSN(DatabaseName, user, password))
	if err != nil {
		t.Fatal(err)
	}
	defer session.Close(context.WithoutCancel(t.Context()))
	var name string
	if err := session.QueryRow(t.Context(), "SELECT name FROM customers WHERE id = 'c-17'").Scan(&name); err != nil || name != "Ada Lovelace" {
		t.Errorf("reading as %s: %q, %v", user, name, err)
	}
	if _, err := session.Exec(t.Context(), "DELETE FROM customers"); err == nil {
		t.Error("a reader may delete")
	}
	if roles, err := p.Roles(t.Context(), "mf\\_%"); err != nil || len(roles) != 1 || roles[0] != user {
		t.Errorf("roles: %v, %v; want %s alone", roles, err, user)
	}
	end := v.Client().Sys().RevokeWithOptionsWithContext
	if err := end(t.Context(), &api.RevokeOptions{LeaseID: cred.LeaseID, Sync: true}); err != nil {
		t.Fatal(err)
	}
	if roles, err := p.Roles(t.Context(), "mf\\_%"); err != nil || len(roles) != 0 {
		t.Errorf("roles after the revocation: %v, %v; want none", roles, err)
	}
	if _, err := session.Exec(t.Context(), "SELECT 1"); err == nil {
		t.Error("the session lives after the revocation")
	}
}

func TestVaultsLoginIsNarrow(t *testing.T) {
	t.Parallel()
	p := TestPostgres(t, PostgresConfig{NoFsync: true})
	v := TestVault(t, VaultConfig{})
	if err := VaultPostgres(t.Context(), v, p); err != nil {
		t.Fatal(err)
	}
	c, err := p.Superuser(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close(t.Context())
	var super, createRole, createDB, replication, bypass bool
	err = c.QueryRow(t.Context(), "SELECT rolsuper, rolcreaterole, rolcreatedb, rolreplication, rolbypassrls FROM pg_roles WHERE rolname = $1",
		AdminLogin).Scan(&super, &createRole, &createDB, &replication, &bypass)
	if err != nil {
		t.Fatal(err)
	}
	if super || !createRole || createDB || replication || bypass {
		t.Errorf("it is superuser %t, createrole %t, createdb %t, replication %t, bypassrls %t; want createrole alone",
			super, createRole, createDB, replication, bypass)
	}
	rows, err := c.Query(t.Context(), "SELECT rolname::text FROM pg_roles WHERE pg_has_role($1, oid, 'USAGE') AND rolname <> $1", AdminLogin)
	if err != nil {
		t.Fatal(err)
	}
	if roles, err := pgx.CollectRows(rows, pgx.RowTo[string]); err != nil || len(roles) != 1 || roles[0] != "pg_signal_backend" {
		t.Errorf("it has the rights of %v, %v; want pg_signal_backend's alone", roles, err)
	}
}
