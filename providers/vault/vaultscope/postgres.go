package vaultscope

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// GroupRole is the PostgreSQL role, without a login, that a tool's logins are
// members of: what it is granted is what the tool can do. Its name begins with
// "tool_", so that no tool's name can make it a role that is there for
// something else.
func GroupRole(tool string) string {
	return "tool_" + strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' {
			return r
		}
		return '_'
	}, tool)
}

func creationSQL(group string) string {
	return `CREATE ROLE "{{name}}" LOGIN PASSWORD '{{password}}' VALID UNTIL '{{expiration}}' IN ROLE ` + ident(group) + `;`
}

// revocationSQL ends sessions, which Vault's own does not, and does not fail
// for a role that is gone: a failing one halts the revocation of others. A
// client that connects again by itself can come in after the first statement.
// Within the transaction its role is gone already, so the last one ends it, and
// with it what came in while an earlier drop was not committed yet. The
// snapshot of sessions is kept for a transaction, and is thrown away in between.
const revocationSQL = `SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{{name}}'; ` +
	`DROP ROLE IF EXISTS "{{name}}"; SELECT pg_stat_clear_snapshot(); ` +
	`SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usesysid IS NOT NULL AND usename IS NULL;`

// SQLUser is the user that a database login of the configuration names.
func (d Database) SQLUser() string {
	settings, err := parseDSN(d.DSN)
	if err != nil {
		return "" // ParseConfig has read it already
	}
	return settings["user"]
}

// FunctionNames are the functions of the setup with their arguments, as
// regprocedure has them.
func FunctionNames() []string {
	var names []string
	for _, f := range functions("") {
		names = append(names, f.name+"("+f.types+")")
	}
	return names
}

type function struct {
	name, args, types, returns, kind, why, body string
}

// functions are what the broker's login may call. They run with the rights of
// Vault's login, which made the roles and can therefore drop them (PostgreSQL
// 16: with the ADMIN option that making a role gives). Their search_path is
// fixed, they build no statement but with format's %I, and take nothing for a
// name of the installation's but what begins with it.
func functions(installation string) []function {
	check := "IF installation !~ '^[a-z0-9]{9}$' THEN\n    RAISE EXCEPTION 'no installation' USING ERRCODE = 'insufficient_privilege';\n  END IF;"
	if installation != "" {
		check = "IF installation IS DISTINCT FROM '" + installation + "' THEN\n    RAISE EXCEPTION 'another installation' USING ERRCODE = 'insufficient_privilege';\n  END IF;"
	}
	// Not LIKE: '_' is a part of the names, and a pattern in LIKE.
	mine := `starts_with(%s, 'mf_' || installation || '-')`
	return []function{
		{name: "roles", args: "installation text", types: "text", returns: "TABLE (name text, valid_until timestamptz, sessions bigint)", kind: "STABLE",
			why: "Lists the roles of one installation.",
			body: `
BEGIN
  ` + check + `
  RETURN QUERY
    SELECT r.rolname::text, r.rolvaliduntil, coalesce(a.n, 0)
    FROM pg_roles r
    LEFT JOIN (SELECT usesysid, count(*) AS n FROM pg_stat_activity GROUP BY 1) a ON a.usesysid = r.oid
    WHERE ` + fmt.Sprintf(mine, "r.rolname::text") + `
    ORDER BY 1;
END
`},
		{name: "drop_roles", args: "installation text, names text[]", types: "text,text[]", returns: "SETOF text", kind: "VOLATILE",
			why: `Drops roles of one installation and ends their sessions. Returns those of the
names that are gone. Never touches another name, nor a role that Vault would not
have made. A role that owns something leaves it to the role that it is a member
of; if that cannot be done, it stays, and can log in no more.`,
			body: `
DECLARE
  each text;
  target record;
  heir name;
  dropped oid[] := '{}';
BEGIN
  ` + check + `
  FOREACH each IN ARRAY coalesce(names, '{}') LOOP
    CONTINUE WHEN each IS NULL OR NOT ` + fmt.Sprintf(mine, "each") + `;
    SELECT r.oid, r.rolname,
           r.rolsuper OR r.rolcreaterole OR r.rolcreatedb OR r.rolreplication OR r.rolbypassrls AS odd
      INTO target FROM pg_roles r WHERE r.rolname = each;
    IF NOT FOUND THEN
      RETURN NEXT each;
      CONTINUE;
    END IF;
    CONTINUE WHEN target.odd;
    BEGIN
      EXECUTE format('DROP ROLE IF EXISTS %I', each);
      RETURN NEXT each;
    EXCEPTION
    WHEN internal_error THEN  -- "tuple concurrently deleted": Vault drops it, too
      IF NOT EXISTS (SELECT FROM pg_roles r WHERE r.rolname = each) THEN
        RETURN NEXT each;
      END IF;
    WHEN dependent_objects_still_exist THEN
      BEGIN
        SELECT g.rolname INTO STRICT heir FROM pg_auth_members m JOIN pg_roles g ON g.oid = m.roleid
          WHERE m.member = target.oid AND NOT g.rolcanlogin AND NOT g.rolsuper;
        EXECUTE format('GRANT %I TO CURRENT_USER', each);
        EXECUTE format('REASSIGN OWNED BY %I TO %I', each, heir);
        EXECUTE format('DROP OWNED BY %I', each);
        EXECUTE format('DROP ROLE %I', each);
        RETURN NEXT each;
      EXCEPTION WHEN OTHERS THEN
        EXECUTE format('ALTER ROLE %I NOLOGIN PASSWORD NULL', each);
      END;
    END;
    dropped := dropped || target.oid;
  END LOOP;
  PERFORM pg_terminate_backend(a.pid) FROM pg_stat_activity a
    WHERE a.usesysid = ANY (dropped) AND a.pid <> pg_backend_pid();
END
`},
		{name: "end_sessions", args: "", types: "", returns: "bigint", kind: "VOLATILE",
			why: `Ends the sessions of roles that are no longer there, and returns how many. A
client that connects again by itself can come in between the end of its session
and the moment at which the drop of its role counts; it would stay.`,
			body: `
BEGIN
  RETURN (SELECT count(*) FROM (
    SELECT pg_terminate_backend(a.pid) FROM pg_stat_activity a
    WHERE a.usesysid IS NOT NULL AND a.usename IS NULL AND a.pid <> pg_backend_pid()
  ) ended);
END
`},
	}
}

// sql is the script for the PostgreSQL server of one mount.
func (s *Setup) sql(mount string) string {
	var b strings.Builder
	vault := ident(s.options.VaultLogin)
	b.WriteString(comment("--", fmt.Sprintf(`PostgreSQL of Vault's mount %s. Run it as a superuser, in the database of the tools;
it may be run again. PostgreSQL 14 to 18; it was tested with 15.

%s is as whom Vault logs in. It makes and drops roles and ends their sessions; it
need not be a superuser, and should not be one.`, mount, s.options.VaultLogin)))
	fmt.Fprintf(&b, "BEGIN;\n\n%sALTER ROLE %s CREATEROLE;\nGRANT pg_signal_backend TO %s;\n", ensureRole(s.options.VaultLogin, "LOGIN"), vault, vault)
	var groups []string
	for _, t := range s.Tools {
		if t.Scope.Engine == EngineDatabase && t.Scope.Mount == mount && !slices.Contains(groups, GroupRole(t.Tool.Name)) {
			group := GroupRole(t.Tool.Name)
			groups = append(groups, group)
			b.WriteString("\n" + comment("--", fmt.Sprintf(`Tool %s: its logins are members of this role, so that it decides what they can do.
Grant it what the tool needs, and no more, such as: GRANT SELECT ON customers TO %s;`, t.Tool.Name, ident(group))))
			fmt.Fprintf(&b, "%sGRANT %s TO %s WITH ADMIN OPTION;\n", ensureRole(group, "NOLOGIN"), ident(group), vault)
		}
	}
	if login, ok := s.Config.Database(mount); ok {
		s.sweepSQL(&b, login)
	}
	b.WriteString("\nCOMMIT;\n")
	return b.String()
}

// sweepSQL is the broker's own narrow login.
func (s *Setup) sweepSQL(b *strings.Builder, login Database) {
	user, schema, vault := ident(login.SQLUser()), ident(login.Schema), ident(s.options.VaultLogin)
	b.WriteString("\n" + comment("--", `The broker's own login: it can call the functions below and do nothing else. It finds
and drops roles that Vault lost track of, and ends access while Vault is away. Give
it a certificate, peer authentication, or a password (\password, and password_file).`))
	fmt.Fprintf(b, "%sALTER ROLE %s LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOINHERIT NOREPLICATION NOBYPASSRLS CONNECTION LIMIT 16;\n",
		ensureRole(login.SQLUser(), "LOGIN"), user)
	fmt.Fprintf(b, `DO $$ BEGIN
  IF EXISTS (SELECT FROM pg_namespace n JOIN pg_roles o ON o.oid = n.nspowner WHERE nspname = %s AND o.rolname <> %s) THEN
    RAISE EXCEPTION 'schema %% is somebody else''s; Mayfly needs one of its own', %s;
  END IF;
END $$;
`, literal(login.Schema), literal(s.options.VaultLogin), literal(login.Schema))
	fmt.Fprintf(b, "CREATE SCHEMA IF NOT EXISTS %s;\nALTER SCHEMA %s OWNER TO %s;\nREVOKE ALL ON SCHEMA %s FROM PUBLIC;\nGRANT USAGE ON SCHEMA %s TO %s;\n", schema, schema, vault, schema, schema, user)
	if s.options.Installation == "" {
		b.WriteString("\n" + comment("--", `They take any installation's name. Where several installations use this server, print
the setup again with --installation once the broker has been started, and give each
a schema and a login of its own.`))
	}
	installation := ""
	if s.options.Installation != "" {
		installation = Installation(s.options.Installation)
	}
	for _, f := range functions(installation) {
		b.WriteString("\n" + comment("--", f.why))
		name := schema + "." + f.name
		fmt.Fprintf(b, "CREATE OR REPLACE FUNCTION %s(%s) RETURNS %s\n  LANGUAGE plpgsql %s SECURITY DEFINER SET search_path = pg_catalog, pg_temp\nAS $mayfly$%s$mayfly$;\n",
			name, f.args, f.returns, f.kind, f.body)
		fmt.Fprintf(b, "ALTER FUNCTION %s(%s) OWNER TO %s;\nREVOKE ALL ON FUNCTION %s(%s) FROM PUBLIC;\nGRANT EXECUTE ON FUNCTION %s(%s) TO %s;\n",
			name, f.types, vault, name, f.types, name, f.types, user)
	}
}

// ensureRole makes a role, with or without a login, unless it is there. It
// stops at one that is a superuser, or is for something else: what follows would
// take from it what it is, or give it away.
func ensureRole(name, options string) string {
	wrong := "rolsuper"
	if options == "NOLOGIN" {
		wrong = "(rolsuper OR rolcanlogin OR rolcreaterole)"
	}
	return fmt.Sprintf(`DO $$ BEGIN
  IF EXISTS (SELECT FROM pg_roles WHERE rolname = %s AND `+wrong+`) THEN
    RAISE EXCEPTION 'role %% is there and has rights of its own; Mayfly needs one that has none', %s;
  ELSIF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = %s) THEN
    CREATE ROLE %s %s;
  END IF;
END $$;
`, literal(name), literal(name), literal(name), ident(name), options)
}

// ident quotes a name for PostgreSQL.
func ident(name string) string { return `"` + strings.ReplaceAll(name, `"`, `""`) + `"` }

// literal quotes text for PostgreSQL with standard_conforming_strings on.
func literal(text string) string { return "'" + strings.ReplaceAll(text, "'", "''") + "'" }

// comment makes lines of comment.
func comment(mark, text string) string {
	var b strings.Builder
	for line := range strings.Lines(text) {
		b.WriteString(strings.TrimRight(mark+" "+strings.TrimRight(line, "\n"), " ") + "\n")
	}
	return b.String()
}

// SameFunction reports whether a body, as PostgreSQL has it, is that of a
// function of the setup, for any installation.
func SameFunction(name, body string) bool {
	for _, f := range functions("") {
		if f.name == name {
			return strings.TrimSpace(unbound(body)) == strings.TrimSpace(unbound(f.body))
		}
	}
	return false
}

var installationCheck = regexp.MustCompile(`IF installation (?:!~ '\^\[a-z0-9\]\{9\}\$'|IS DISTINCT FROM '[a-z0-9]{9}') THEN\n    RAISE EXCEPTION '(?:no|another) installation' `)

// unbound takes from a body which installation it is bound to.
func unbound(body string) string { return installationCheck.ReplaceAllString(body, "IF installation ") }
