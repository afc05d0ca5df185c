package vault

import (
	"context"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"

	"github.com/mayfly-security/mayfly/providers/vault/vaultscope"
)

// postgres looks, as the narrow login, at that login and at its functions.
func (c *check) postgres(ctx context.Context, db vaultscope.Database) {
	d, err := openDirect(db, vaultscope.Installation(c.installation))
	if err != nil {
		c.bad("", "correct databases in the provider's configuration", "the login for mount %s cannot be used: %v", db.Mount, err)
		return
	}
	defer d.close()
	ctx, cancel := context.WithTimeout(ctx, checkLimit)
	defer cancel()
	conn, err := d.pool.Acquire(ctx)
	if err != nil {
		c.bad("", "see that the server is up and lets this login in, and "+fixSQL, "PostgreSQL of mount %s does not let the broker in: %v", db.Mount, err)
		return
	}
	defer conn.Release()
	p := &postgresCheck{check: c, db: db, conn: conn.Conn(), login: db.SQLUser()}
	for _, step := range []func(context.Context) error{p.attributes, p.functions, p.reach, p.try} {
		if err := step(ctx); err != nil {
			c.bad("", "see that the server is up, and "+fixSQL, "PostgreSQL of mount %s could not be asked as %s: %v", db.Mount, p.login, err)
			return
		}
	}
}

type postgresCheck struct {
	*check
	db    vaultscope.Database
	conn  *pgx.Conn
	login string
}

func (p *postgresCheck) fault(format string, args ...any) {
	p.bad("", fixSQL, "PostgreSQL of mount "+p.db.Mount+": "+format, args...)
}

// attributes looks at what the login is.
func (p *postgresCheck) attributes(ctx context.Context) error {
	var super, roles, databases, replication, bypass bool
	var member []string
	err := p.conn.QueryRow(ctx, `SELECT rolsuper, rolcreaterole, rolcreatedb, rolreplication, rolbypassrls,
		ARRAY(SELECT g.rolname::text FROM pg_auth_members m JOIN pg_roles g ON g.oid = m.roleid WHERE m.member = r.oid ORDER BY 1)
		FROM pg_roles r WHERE rolname = current_user`).Scan(&super, &roles, &databases, &replication, &bypass, &member)
	if err != nil {
		return err
	}
	for _, each := range []struct {
		has  bool
		what string
	}{{super, "is a superuser"}, {roles, "may create roles (CREATEROLE)"}, {databases, "may create databases (CREATEDB)"},
		{replication, "may copy the server (REPLICATION)"}, {bypass, "passes row security (BYPASSRLS)"}} {
		if each.has {
			p.fault("login %s %s; it is to call three functions and to do nothing else", p.login, each.what)
		}
	}
	if len(member) > 0 {
		p.fault("login %s is a member of %s; it is to be a member of nothing", p.login, strings.Join(member, ", "))
	}
	return nil
}

// functions looks at the functions of the setup.
func (p *postgresCheck) functions(ctx context.Context) error {
	schema, bound := pgx.Identifier{p.db.Schema}.Sanitize(), true
	for _, name := range vaultscope.FunctionNames() {
		full := schema + "." + name
		var owner, body string
		var settings []string
		var ownerSuper, definer, mine, public, callable bool
		err := p.conn.QueryRow(ctx, `SELECT o.rolname, o.rolsuper, f.prosecdef, o.rolname = current_user, f.prosrc, coalesce(f.proconfig, '{}'),
			has_function_privilege('public', f.oid, 'EXECUTE'), has_function_privilege(f.oid, 'EXECUTE') AND has_schema_privilege(f.pronamespace, 'USAGE')
			FROM pg_proc f JOIN pg_roles o ON o.oid = f.proowner WHERE f.oid = to_regprocedure($1)`, full).
			Scan(&owner, &ownerSuper, &definer, &mine, &body, &settings, &public, &callable)
		if err == pgx.ErrNoRows {
			p.fault("there is no function %s", full)
			continue
		}
		if err != nil {
			return err
		}
		if !callable {
			p.fault("login %s cannot call %s", p.login, full)
		}
		if public {
			p.fault("everybody can call %s", full)
		}
		if !definer || mine {
			p.fault("function %s runs with the rights of %s, and is to run with those of Vault's login", full, p.login)
		}
		if ownerSuper {
			p.fault("function %s belongs to the superuser %s, and is to belong to Vault's login", full, owner)
		}
		short, _, _ := strings.Cut(name, "(")
		if !slices.ContainsFunc(settings, func(s string) bool { return strings.HasPrefix(s, "search_path=") }) {
			p.fault("function %s has no fixed search_path: whoever calls it could choose what it calls", full)
		} else if !vaultscope.SameSettings(short, settings) {
			p.fault("function %s has other settings than the setup's: %s", full, strings.Join(settings, "; "))
		}
		if !vaultscope.SameFunction(short, body) {
			p.fault("function %s is not what the setup says", full)
		} else if !vaultscope.FunctionBound(body) {
			bound = false
		}
	}
	if !bound {
		p.unbound("PostgreSQL of mount %s: the functions of schema %s are not bound to this installation: login %s can list and drop any installation's roles", p.db.Mount, p.db.Schema, p.login)
	}
	return nil
}

// reach looks at what else the login can get at.
func (p *postgresCheck) reach(ctx context.Context) error {
	var create, own bool
	var readable []string
	err := p.conn.QueryRow(ctx, `SELECT has_database_privilege(current_database(), 'CREATE'),
		coalesce((SELECT has_schema_privilege(oid, 'CREATE') FROM pg_namespace WHERE nspname = $1), false),
		ARRAY(SELECT n.nspname || '.' || c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
			WHERE c.relkind IN ('r', 'v', 'm', 'p', 'f') AND n.nspname NOT LIKE 'pg\_%' AND n.nspname <> 'information_schema'
			AND has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, 'SELECT, INSERT, UPDATE, DELETE, TRUNCATE') ORDER BY 1 LIMIT 5)`,
		p.db.Schema).Scan(&create, &own, &readable)
	if err != nil {
		return err
	}
	if create {
		p.fault("login %s may create schemas", p.login)
	}
	if own {
		p.fault("login %s may create things in schema %s", p.login, p.db.Schema)
	}
	if len(readable) > 0 {
		// Most often what PUBLIC may, such as the views of an extension.
		p.note("", "PostgreSQL of mount %s: login %s can read or write %s, perhaps as everybody can", p.db.Mount, p.login, strings.Join(readable, ", "))
	}
	return nil
}

// try calls the function that changes nothing, where the installation is known.
func (p *postgresCheck) try(ctx context.Context) error {
	if p.installation == "" {
		return nil
	}
	_, err := p.conn.Exec(ctx, `SELECT * FROM `+pgx.Identifier{p.db.Schema}.Sanitize()+`.roles($1)`, vaultscope.Installation(p.installation))
	if err != nil {
		p.fault("calling roles for this installation fails: %v", err)
	}
	return nil
}
