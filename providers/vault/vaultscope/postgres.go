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

// LeftRole is the PostgreSQL role that what agents leave behind goes to. It can
// do nothing, so that a view or a SECURITY DEFINER function of theirs cannot.
const LeftRole = "mayfly_left"

// maxSessions is how many sessions one lease can have, so that no agent uses up
// those of the server (max_connections).
const maxSessions = 10

func creationSQL(group string) string {
	return fmt.Sprintf(`CREATE ROLE "{{name}}" LOGIN CONNECTION LIMIT %d PASSWORD '{{password}}' VALID UNTIL '{{expiration}}' IN ROLE %s;`, maxSessions, ident(group))
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
	lockTimeout                                 string // empty: the caller's
}

const searchPath = "pg_catalog, pg_temp"

// settings are those of a function, as pg_proc.proconfig has them.
func (f function) settings() []string {
	all := []string{"search_path=" + searchPath}
	if f.lockTimeout != "" {
		all = append(all, "lock_timeout="+f.lockTimeout)
	}
	return all
}

// functions are what the broker's login may call. They run with the rights of
// Vault's login, which made the roles and can therefore drop them (PostgreSQL
// 16: with the ADMIN option that making a role gives). Their search_path is
// fixed, they build no statement but with format's %I, and take nothing for a
// name of the installation's but what begins with it.
func functions(installation string) []function {
	// NULL must not pass: a comparison with it is neither true nor false.
	check := "IF installation IS NULL OR installation !~ '^[a-z0-9]{9}$' THEN\n    RAISE EXCEPTION 'no installation' USING ERRCODE = 'insufficient_privilege';\n  END IF;"
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
		{name: "drop_roles", args: "installation text, names text[]", types: "text,text[]", returns: "SETOF text", kind: "VOLATILE", lockTimeout: "500ms",
			why: `Drops roles of one installation and ends their sessions. Returns those of the
names that are gone. Never touches another name, nor a role that Vault would not
have made. What a role owns goes to ` + LeftRole + `, which can do nothing. One
that cannot be dropped stays, can log in no more, and is a member of nothing.`,
			body: `
DECLARE
  each text;
  granted name;
  target record;
  ours oid[];
  n bigint;
  begun timestamptz := clock_timestamp();
BEGIN
  ` + check + `
  ours := ARRAY(SELECT r.oid FROM pg_roles r
    WHERE r.rolname::text = ANY (names) AND ` + fmt.Sprintf(mine, "r.rolname::text") + `
      AND NOT (r.rolsuper OR r.rolcreaterole OR r.rolcreatedb OR r.rolreplication OR r.rolbypassrls));

  -- Sessions first: an open transaction holds locks that keep its role.
  LOOP
    PERFORM pg_stat_clear_snapshot();
    SELECT count(pg_terminate_backend(a.pid)) INTO n FROM pg_stat_activity a
      WHERE a.usesysid = ANY (ours) AND a.pid <> pg_backend_pid();
    EXIT WHEN n = 0 OR clock_timestamp() > begun + interval '1 second';
    PERFORM pg_sleep(0.01);
  END LOOP;

  -- Then logins, so that this counts whatever becomes of the drops.
  FOR each IN SELECT r.rolname FROM pg_roles r WHERE r.oid = ANY (ours) ORDER BY 1 LOOP
    EXIT WHEN clock_timestamp() > begun + interval '2 seconds';
    BEGIN
      EXECUTE format('ALTER ROLE %I NOLOGIN', each);
    EXCEPTION WHEN OTHERS THEN
      NULL;  -- Vault drops it, too, or a session that came back changes it
    END;
  END LOOP;

  FOREACH each IN ARRAY coalesce(names, '{}') LOOP
    CONTINUE WHEN ` + fmt.Sprintf(mine, "each") + ` IS NOT TRUE;
    SELECT r.oid INTO target FROM pg_roles r WHERE r.rolname::text = each;
    IF NOT FOUND THEN
      RETURN NEXT each;
      CONTINUE;
    END IF;
    -- A caller that gives up undoes everything: rather leave some for the next call.
    CONTINUE WHEN (target.oid = ANY (ours)) IS NOT TRUE OR clock_timestamp() > begun + interval '3 seconds';
    BEGIN
      BEGIN
        EXECUTE format('DROP ROLE IF EXISTS %I', each);
      EXCEPTION WHEN dependent_objects_still_exist THEN
        EXECUTE format('GRANT %I TO CURRENT_USER', each);
        EXECUTE format('REASSIGN OWNED BY %I TO ` + ident(LeftRole) + `', each);
        EXECUTE format('DROP OWNED BY %I', each);
        EXECUTE format('DROP ROLE %I', each);
      END;
      RETURN NEXT each;
    EXCEPTION WHEN OTHERS THEN
      -- Locked, not to be reassigned, or dropped by Vault in the meantime.
      IF NOT EXISTS (SELECT FROM pg_roles r WHERE r.rolname::text = each) THEN
        RETURN NEXT each;
        CONTINUE;
      END IF;
      BEGIN
        FOR granted IN SELECT g.rolname FROM pg_auth_members m JOIN pg_roles g ON g.oid = m.roleid WHERE m.member = target.oid LOOP
          EXECUTE format('REVOKE %I FROM %I', granted, each);
        END LOOP;
        EXECUTE format('ALTER ROLE %I NOLOGIN PASSWORD NULL', each);
      EXCEPTION WHEN OTHERS THEN
        NULL;  -- it is not said to be gone, and the next call tries again
      END;
    END;
  END LOOP;

  PERFORM pg_stat_clear_snapshot();
  PERFORM pg_terminate_backend(a.pid) FROM pg_stat_activity a
    WHERE a.usesysid = ANY (ours) AND a.pid <> pg_backend_pid();
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
	_, swept := s.Config.Database(mount)
	if swept {
		leftSQL(&b, vault)
	}
	var groups []string
	for _, t := range s.Tools {
		if t.Scope.Engine == EngineDatabase && t.Scope.Mount == mount && !slices.Contains(groups, GroupRole(t.Tool.Name)) {
			group := GroupRole(t.Tool.Name)
			groups = append(groups, group)
			b.WriteString("\n" + comment("--", fmt.Sprintf(`Tool %s: its logins are members of this role, so that it decides what they can do.
Grant it what the tool needs, and no more, such as: GRANT SELECT ON customers TO %s;`, t.Tool.Name, ident(group))))
			fmt.Fprintf(&b, "%sGRANT %s TO %s WITH ADMIN OPTION;\n", ensureRole(group, "NOLOGIN"), ident(group), vault)
			if swept {
				// A function changes its owner only if the new one may create in its schema.
				fmt.Fprintf(&b, `DO $$ DECLARE each name; BEGIN
  FOR each IN SELECT nspname FROM pg_namespace WHERE has_schema_privilege(%s, oid, 'CREATE') AND NOT has_schema_privilege(%s, oid, 'CREATE') LOOP
    EXECUTE format('GRANT CREATE ON SCHEMA %%I TO %s', each);
  END LOOP;
END $$;
`, literal(group), literal(LeftRole), ident(LeftRole))
			}
		}
	}
	if login, ok := s.Config.Database(mount); ok {
		s.sweepSQL(&b, login)
	}
	b.WriteString("\nCOMMIT;\n")
	return b.String()
}

// leftSQL makes the role that what agents leave goes to. It is one for all
// installations at a server. Vault's login must have its rights to give it things;
// it has none.
func leftSQL(b *strings.Builder, vault string) {
	b.WriteString("\n" + comment("--", `What a role of a lease owns when it is dropped goes to this one, which is a member
of nothing: grant it nothing. What an agent made cannot act for the tool then. Run
this again after a GRANT CREATE ON SCHEMA to a tool: this role needs it there, too,
to take functions over.`))
	fmt.Fprintf(b, `%sDO $$ BEGIN
  IF EXISTS (SELECT FROM pg_auth_members m JOIN pg_roles r ON r.oid = m.member WHERE r.rolname = %s) THEN
    RAISE EXCEPTION 'role %% is a member of others and has rights of its own; it must have none', %s;
  END IF;
END $$;
GRANT %s TO %s;
`, ensureRole(LeftRole, "NOLOGIN"), literal(LeftRole), literal(LeftRole), ident(LeftRole), vault)
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
		name, settings := schema+"."+f.name, " SET search_path = "+searchPath
		if f.lockTimeout != "" {
			settings += " SET lock_timeout = " + literal(f.lockTimeout)
		}
		fmt.Fprintf(b, "CREATE OR REPLACE FUNCTION %s(%s) RETURNS %s\n  LANGUAGE plpgsql %s STRICT SECURITY DEFINER%s\nAS $mayfly$%s$mayfly$;\n",
			name, f.args, f.returns, f.kind, settings, f.body)
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

// SameSettings reports whether the settings of a function, as PostgreSQL has
// them (pg_proc.proconfig), are those of the setup.
func SameSettings(name string, settings []string) bool {
	for _, f := range functions("") {
		if f.name == name {
			return slices.Equal(slices.Sorted(slices.Values(settings)), slices.Sorted(slices.Values(f.settings())))
		}
	}
	return false
}

// FunctionBound reports whether the body of a function of the setup serves one
// installation alone. It is true of one that takes no installation.
func FunctionBound(body string) bool {
	found := installationCheck.FindString(body)
	return found == "" || strings.Contains(found, "IS DISTINCT FROM")
}

var installationCheck = regexp.MustCompile(`IF installation (?:IS NULL OR installation !~ '\^\[a-z0-9\]\{9\}\$'|IS DISTINCT FROM '[a-z0-9]{9}') THEN\n    RAISE EXCEPTION '(?:no|another) installation' `)

// unbound takes from a body which installation it is bound to.
func unbound(body string) string { return installationCheck.ReplaceAllString(body, "IF installation ") }
