package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/jackc/pgx/v5"

	"github.com/mayfly-security/mayfly/providers/vault/vaultscope"
)

// sql is the PostgreSQL side.
const setupSQL = `
CREATE ROLE vault LOGIN CREATEROLE PASSWORD 'vault-password';
GRANT pg_signal_backend TO vault;
CREATE ROLE crm_ro NOLOGIN;
GRANT crm_ro TO vault WITH ADMIN OPTION;
CREATE ROLE mayfly_sweep LOGIN PASSWORD 'sweep-password';
CREATE SCHEMA mayfly;
GRANT USAGE ON SCHEMA mayfly TO mayfly_sweep;
GRANT CREATE, USAGE ON SCHEMA mayfly TO vault;
SET ROLE vault;
CREATE FUNCTION mayfly.roles(installation text) RETURNS TABLE (name text, valid_until timestamptz, sessions integer)
  LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
  SELECT rolname::text, rolvaliduntil, (SELECT count(*)::integer FROM pg_stat_activity a WHERE a.usename = rolname)
  FROM pg_roles WHERE starts_with(rolname, 'mf_' || installation || '-') $$;
CREATE FUNCTION mayfly.drop_roles(installation text, names text[]) RETURNS SETOF text
  LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
  DECLARE each text;
  BEGIN
    FOREACH each IN ARRAY names LOOP
      CONTINUE WHEN NOT starts_with(each, 'mf_' || installation || '-');
      PERFORM pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = each;
      EXECUTE format('DROP ROLE IF EXISTS %I', each);
      RETURN NEXT each;
    END LOOP;
  END $$;
REVOKE ALL ON FUNCTION mayfly.roles(text), mayfly.drop_roles(text, text[]) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION mayfly.roles(text), mayfly.drop_roles(text, text[]) TO mayfly_sweep;
RESET ROLE;
`

// setUp prepares PostgreSQL and Vault as an operator does.
func (w *world) setUp(ctx context.Context, _ string) error {
	if err := os.WriteFile(filepath.Join(w.dir, "sweep-password"), []byte("sweep-password\n"), 0o600); err != nil {
		return err
	}
	if _, err := w.super.Exec(ctx, "CREATE DATABASE crm"); err != nil {
		return err
	}
	crm, err := pgx.Connect(ctx, w.pg.super("crm"))
	if err != nil {
		return err
	}
	defer crm.Close(ctx)
	if _, err := crm.Exec(ctx, setupSQL); err != nil {
		return fmt.Errorf("setting PostgreSQL up: %w", err)
	}
	keys, err := w.jwtKeys()
	if err != nil {
		return err
	}
	type write struct {
		path string
		data map[string]any
	}
	writes := []write{
		{"sys/auth/jwt", map[string]any{"type": "jwt"}},
		{"auth/jwt/config", map[string]any{"jwt_validation_pubkeys": keys}},
		{"auth/jwt/role/mayfly", map[string]any{
			"role_type": "jwt", "user_claim": "sub", "bound_audiences": []string{audience}, "bound_subject": brokerID.String(),
			"token_policies": "mayfly-_broker", "token_ttl": "15m", "token_max_ttl": "15m", "token_no_default_policy": true,
		}},
		{"sys/mounts/database", map[string]any{"type": "database"}},
		{"database/config/crm", map[string]any{
			"plugin_name": "postgresql-database-plugin", "allowed_roles": "*", "username": "vault", "password": "vault-password",
			"connection_url":    fmt.Sprintf("postgresql://{{username}}:{{password}}@127.0.0.1:%d/crm?sslmode=disable", w.pg.port),
			"username_template": vaultscope.UsernameTemplate,
		}},
	}
	var policy strings.Builder
	for tool, roles := range map[string]map[string]int{toolRead: {"crm-read-short": shortTTL, "crm-read": longTTL}, toolWrite: {"crm-write": longTTL}} {
		var rules strings.Builder
		for role, ttl := range roles {
			writes = append(writes, write{"database/roles/" + role, map[string]any{
				"db_name": "crm", "default_ttl": ttl, "max_ttl": ttl,
				"creation_statements":   []string{`CREATE ROLE "{{name}}" LOGIN PASSWORD '{{password}}' VALID UNTIL '{{expiration}}' IN ROLE crm_ro;`},
				"revocation_statements": []string{`SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{{name}}';`, `DROP ROLE IF EXISTS "{{name}}";`},
			}})
			fmt.Fprintf(&rules, "path \"database/creds/%s\" { capabilities = [\"read\"] }\n", role)
			fmt.Fprintf(&policy, "path \"sys/leases/revoke/database/creds/%s/*\" { capabilities = [\"update\"] allowed_parameters = { \"sync\" = [true] } }\n", role)
		}
		writes = append(writes,
			write{"sys/policies/acl/mayfly-" + tool, map[string]any{"policy": rules.String()}},
			write{"auth/token/roles/mayfly-" + tool, map[string]any{
				"allowed_policies": "mayfly-" + tool, "orphan": true, "renewable": false, "token_type": "service",
				"token_no_default_policy": true, "token_explicit_max_ttl": "1h", "token_num_uses": 2,
			}})
		fmt.Fprintf(&policy, "path \"auth/token/create/mayfly-%s\" { capabilities = [\"update\"] required_parameters = [\"explicit_max_ttl\", \"meta\"] allowed_parameters = { \"ttl\" = [] \"explicit_max_ttl\" = [] \"meta\" = [] \"display_name\" = [] } }\n", tool)
	}
	policy.WriteString("path \"auth/token/revoke-accessor\" { capabilities = [\"update\"] }\n")
	writes = append(writes, write{"sys/policies/acl/mayfly-_broker", map[string]any{"policy": policy.String()}})
	for _, each := range writes {
		if _, err := w.vault.client.Logical().WriteWithContext(ctx, each.path, each.data); err != nil {
			return fmt.Errorf("setting Vault up: writing %s: %w", each.path, err)
		}
	}
	return nil
}
