package vault

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers/vault/vaultscope"
)

// as connects to the tools' database with a password.
func (w *world) as(user, password string) *pgx.Conn {
	w.t.Helper()
	c, err := pgx.Connect(w.t.Context(), fmt.Sprintf("host=127.0.0.1 port=%d dbname=crm sslmode=disable user=%s password=%s", w.pg.port, user, password))
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { c.Close(context.Background()) })
	return c
}

// super runs SQL as PostgreSQL's superuser.
func (w *world) super(sql string, args ...any) {
	w.t.Helper()
	if err := w.pg.exec("crm", fmt.Sprintf(sql, args...)); err != nil {
		w.t.Fatal(err)
	}
}

// leased makes a role as Vault does.
func (w *world) leased(installation broker.InstallationID) (name string) {
	name = vaultscope.LeaseRolePrefix(installation, broker.NewLeaseID(time.Now())) + "AbCd1234"
	c := w.as("vault", "vault-password")
	_, err := c.Exec(w.t.Context(), fmt.Sprintf(`CREATE ROLE %q LOGIN PASSWORD 'pw' VALID UNTIL '2100-01-01' IN ROLE %q`, name, vaultscope.GroupRole("crm.read")))
	if err != nil {
		w.t.Fatal(err)
	}
	return name
}

func (w *world) drop(c *pgx.Conn, installation broker.InstallationID, names ...string) ([]string, error) {
	rows, err := c.Query(w.t.Context(), `SELECT * FROM mayfly_`+w.id+`.drop_roles($1, $2)`, vaultscope.Installation(installation), names)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, pgx.RowTo[string])
}

func sqlState(err error) string {
	var e *pgconn.PgError
	if errors.As(err, &e) {
		return e.Code
	}
	return ""
}

// TestPostgresEscalations: whoever steals the broker's login to PostgreSQL can
// find and drop roles of its installation, and do nothing else. Where the setup
// was printed without an installation, it is those of any installation.
func TestPostgresEscalations(t *testing.T) {
	t.Run("bound", func(t *testing.T) { postgresEscalations(t, true) })
	t.Run("unbound", func(t *testing.T) { postgresEscalations(t, false) })
}

// unbind applies what is printed without --installation to PostgreSQL.
func (w *world) unbind(tools ...broker.Tool) {
	w.t.Helper()
	config, err := vaultscope.ParseConfig(w.config())
	if err != nil {
		w.t.Fatal(err)
	}
	s, err := vaultscope.NewSetup(config, tools, vaultscope.Options{Broker: brokerID, PublicKeys: w.jwtKeys()})
	if err != nil {
		w.t.Fatal(err)
	}
	if err := w.pg.exec("crm", s.SQL()); err != nil {
		w.t.Fatal(err)
	}
}

func postgresEscalations(t *testing.T, bound bool) {
	v, pg := servers(t)
	w := newWorld(t, v, pg)
	w.setup(w.database())
	if !bound {
		w.unbind(w.database())
	}
	c := w.as(w.sweep(), "sweep-password")
	other := broker.NewInstallationID(time.Now())
	mine, theirs := w.leased(w.installation), w.leased(other)
	schema, group := "mayfly_"+w.id, vaultscope.GroupRole("crm.read")
	w.super(`CREATE TABLE customers_%s (name text); CREATE SCHEMA theirs_%s; CREATE ROLE victim_%s`, w.id, w.id, w.id)

	keep, err := pgx.Connect(t.Context(), pg.super("crm")) // a session to end
	if err != nil {
		t.Fatal(err)
	}
	defer keep.Close(context.Background())

	for name, sql := range map[string]string{
		"another installation's roles":  fmt.Sprintf(`SELECT * FROM %s.roles('%s')`, schema, vaultscope.Installation(other)),
		"drop another installation's":   fmt.Sprintf(`SELECT * FROM %s.drop_roles('%s', ARRAY['%s'])`, schema, vaultscope.Installation(other), theirs),
		"all installations' roles":      fmt.Sprintf(`SELECT * FROM %s.roles('')`, schema),
		"drop nobody's":                 fmt.Sprintf(`SELECT * FROM %s.drop_roles('', ARRAY['victim_%s'])`, schema, w.id),
		"a pattern":                     fmt.Sprintf(`SELECT * FROM %s.roles('%%')`, schema),
		"create a role":                 `CREATE ROLE x_` + w.id,
		"drop a role":                   fmt.Sprintf(`DROP ROLE %q`, mine),
		"drop Vault's login":            `DROP ROLE vault`,
		"make itself a superuser":       fmt.Sprintf(`ALTER ROLE %s SUPERUSER`, w.sweep()),
		"make itself create roles":      fmt.Sprintf(`ALTER ROLE %s CREATEROLE`, w.sweep()),
		"change a password":             `ALTER ROLE vault PASSWORD 'x'`,
		"give a leased role more time":  fmt.Sprintf(`ALTER ROLE %q VALID UNTIL 'infinity'`, mine),
		"become Vault's login":          `SET ROLE vault`,
		"become the superuser":          `SET SESSION AUTHORIZATION postgres`,
		"become a tool":                 fmt.Sprintf(`SET ROLE %q`, group),
		"become a leased role":          fmt.Sprintf(`SET ROLE %q`, mine),
		"join Vault's login":            fmt.Sprintf(`GRANT vault TO %s`, w.sweep()),
		"join a tool":                   fmt.Sprintf(`GRANT %q TO %s`, group, w.sweep()),
		"read the tools' data":          `SELECT * FROM customers_` + w.id,
		"write the tools' data":         `INSERT INTO customers_` + w.id + ` VALUES ('x')`,
		"read passwords":                `SELECT rolpassword FROM pg_authid`,
		"create a schema":               `CREATE SCHEMA x_` + w.id,
		"create in its schema":          `CREATE TABLE ` + schema + `.t (a int)`,
		"create in public":              `CREATE TABLE public.t_` + w.id + ` (a int)`,
		"create in another's schema":    `CREATE TABLE theirs_` + w.id + `.t (a int)`,
		"replace its function":          `CREATE OR REPLACE FUNCTION ` + schema + `.end_sessions() RETURNS bigint LANGUAGE sql SECURITY DEFINER AS 'SELECT 1::bigint'`,
		"own its function":              fmt.Sprintf(`ALTER FUNCTION %s.end_sessions() OWNER TO %s`, schema, w.sweep()),
		"change its function":           fmt.Sprintf(`ALTER FUNCTION %s.end_sessions() RESET search_path`, schema),
		"drop its function":             fmt.Sprintf(`DROP FUNCTION %s.end_sessions()`, schema),
		"end somebody's session":        `SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'postgres' AND pid <> pg_backend_pid()`,
		"read a file":                   `SELECT pg_read_file('/etc/passwd')`,
		"run a program":                 `COPY (SELECT 1) TO PROGRAM 'true'`,
		"write a file":                  `COPY (SELECT 1) TO '/tmp/mayfly-escalation'`,
		"load a library":                `LOAD '/tmp/x.so'`,
		"create an extension":           `CREATE EXTENSION file_fdw`,
		"create a database":             `CREATE DATABASE x_` + w.id,
		"change the server":             `ALTER SYSTEM SET log_statement = 'all'`,
		"read the server's files":       `SELECT * FROM pg_ls_dir('.')`,
		"create an event trigger":       `CREATE EVENT TRIGGER x ON ddl_command_start EXECUTE FUNCTION ` + schema + `.end_sessions()`,
		"hide from the log":             `SET log_statement = 'none'`,
		"copy the server":               `SELECT pg_create_physical_replication_slot('x')`,
		"switch off replication safety": `SET session_replication_role = replica`,
	} {
		if !bound && strings.Contains(name, "another installation's") {
			continue // this is what binding is for
		}
		_, err := c.Exec(t.Context(), sql)
		if state := sqlState(err); state != "42501" {
			t.Errorf("%s: want SQLSTATE 42501, and it is %q: %v", name, state, err)
		}
	}
	// PostgreSQL answers this one with a warning, and does nothing.
	if _, err := c.Exec(t.Context(), fmt.Sprintf(`GRANT EXECUTE ON FUNCTION %s.end_sessions() TO PUBLIC`, schema)); err != nil {
		t.Error(err)
	}
	if _, err := w.as(theirs, "pw").Exec(t.Context(), `SELECT `+schema+`.end_sessions()`); sqlState(err) != "42501" {
		t.Errorf("an agent's login may end sessions: %v", err)
	}

	// NULL is no installation: without STRICT, too.
	everything := fmt.Sprintf(`ARRAY['victim_%s', 'vault', '%s', '%s', NULL, 'app']`, w.id, theirs, mine)
	for _, strict := range []bool{true, false} {
		if !strict {
			w.super(`ALTER FUNCTION %[1]s.roles(text) CALLED ON NULL INPUT; ALTER FUNCTION %[1]s.drop_roles(text, text[]) CALLED ON NULL INPUT`, schema)
		}
		for _, call := range []string{"roles(NULL)", "drop_roles(NULL, " + everything + ")", "drop_roles(NULL, NULL)"} {
			tag, err := c.Exec(t.Context(), `SELECT * FROM `+schema+`.`+call)
			if strict && (err != nil || tag.RowsAffected() != 0) || !strict && sqlState(err) != "42501" {
				t.Errorf("%s, strict %t: %d rows, %v", call, strict, tag.RowsAffected(), err)
			}
		}
		nulls := fmt.Sprintf(`SELECT * FROM %s.drop_roles('%s', ARRAY[NULL, 'victim_%s', NULL])`, schema, vaultscope.Installation(w.installation), w.id)
		if tag, err := c.Exec(t.Context(), nulls); err != nil || tag.RowsAffected() != 0 {
			t.Errorf("names that are NULL: %d rows, %v", tag.RowsAffected(), err)
		}
		if _, err := c.Exec(t.Context(), `SELECT * FROM `+schema+`.drop_roles($1, NULL)`, vaultscope.Installation(w.installation)); err != nil {
			t.Errorf("no names: %v", err)
		}
	}
	w.super(`ALTER FUNCTION %[1]s.roles(text) STRICT; ALTER FUNCTION %[1]s.drop_roles(text, text[]) STRICT`, schema)
	for _, name := range []string{"victim_" + w.id, "vault", theirs, mine} {
		if !slices.Contains(w.roles(name), name) {
			t.Errorf("role %s was dropped for nobody's installation", name)
		}
	}

	// Names that drop_roles must leave alone, whatever they look like.
	inst := vaultscope.RolePrefix(w.installation)
	w.super(`CREATE ROLE %q SUPERUSER; CREATE ROLE %q CREATEROLE; CREATE ROLE %q REPLICATION`, inst+"super", inst+"creator", inst+"replica")
	injections := []string{
		inst + `x"; DROP ROLE victim_` + w.id + `; --`, inst + `x'; DROP ROLE victim_` + w.id + `; --`,
		inst + `x$mayfly$; DROP ROLE victim_` + w.id + `; --`, inst + `%I%s`, inst + "x\\\"; DROP ROLE victim_" + w.id,
	}
	safe := []string{"postgres", "vault", w.sweep(), group, theirs, "victim_" + w.id, "pg_signal_backend", "PUBLIC", "current_user", "",
		strings.ToUpper(mine), " " + mine, "%", "mf_%", inst[:len(inst)-1] + "%", inst + "super", inst + "creator", inst + "replica"}
	gone, err := w.drop(c, w.installation, append(safe, injections...)...)
	if err != nil {
		t.Fatal(err)
	}
	if slices.Sort(gone); !slices.Equal(gone, slices.Sorted(slices.Values(injections))) {
		t.Errorf("of names that are none of its own, these are said to be gone: %q", gone)
	}
	for _, name := range []string{"postgres", "vault", w.sweep(), group, theirs, mine, "victim_" + w.id, inst + "super", inst + "creator", inst + "replica"} {
		if !slices.Contains(w.roles(name), name) {
			t.Errorf("role %s was dropped", name)
		}
	}
	// A role that has such a name is dropped, and nothing but it.
	evil := injections[0]
	w.super(`CREATE ROLE "%s"`, strings.ReplaceAll(evil, `"`, `""`))
	if gone, err := w.drop(c, w.installation, evil); err != nil || !slices.Equal(gone, []string{evil}) || len(w.roles(evil)) != 0 {
		t.Errorf("%q are gone: %v", gone, err)
	}
	if len(w.roles("victim_"+w.id)) != 1 {
		t.Error("the name of a role was run as SQL")
	}
	w.super(`DROP ROLE %q; DROP ROLE %q; DROP ROLE %q`, inst+"super", inst+"creator", inst+"replica")

	// What it can create for itself must not mislead the functions.
	for _, sql := range []string{
		`CREATE TEMP TABLE pg_roles AS SELECT 1::oid AS oid, 'x'::name AS rolname, false AS rolsuper, false AS rolcreaterole, false AS rolcreatedb, false AS rolreplication, false AS rolbypassrls, NULL::timestamptz AS rolvaliduntil`,
		`CREATE TEMP TABLE pg_stat_activity AS SELECT pid, usesysid FROM pg_catalog.pg_stat_activity`,
		`CREATE FUNCTION pg_temp.starts_with(text, text) RETURNS bool LANGUAGE sql AS 'SELECT true'`,
		`SET search_path = pg_temp, pg_catalog`,
	} {
		if _, err := c.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	if gone, err := w.drop(c, w.installation, "vault", theirs, mine); err != nil || !slices.Equal(gone, []string{mine}) {
		t.Errorf("with tables of its own, %q are gone: %v", gone, err)
	}
	if n := len(w.roles(mine)); n != 0 {
		t.Error("its own role is still there")
	}
}

// TestPostgresSetup: the narrow login does what it is for.
func TestPostgresSetup(t *testing.T) {
	v, pg := servers(t)
	w := newWorld(t, v, pg)
	w.setup(w.database()).setup(w.database()) // it may be run again
	c := w.as(w.sweep(), "sweep-password")
	ctx := t.Context()
	a, b := w.leased(w.installation), w.leased(w.installation)
	session := w.as(a, "pw")
	rows, err := c.Query(ctx, `SELECT name, valid_until IS NOT NULL, sessions FROM mayfly_`+w.id+`.roles($1)`, vaultscope.Installation(w.installation))
	if err != nil {
		t.Fatal(err)
	}
	type found struct {
		Name     string
		Until    bool
		Sessions int64
	}
	all, err := pgx.CollectRows(rows, pgx.RowToStructByPos[found])
	want := []found{{a, true, 1}, {b, true, 0}}
	slices.SortFunc(want, func(x, y found) int { return strings.Compare(x.Name, y.Name) })
	slices.SortFunc(all, func(x, y found) int { return strings.Compare(x.Name, y.Name) })
	if err != nil || !slices.Equal(all, want) {
		t.Fatalf("got %v, %v\nwant %v", all, err, want)
	}

	// An open session ends with the role, and names that are gone are said to be.
	gone, err := w.drop(c, w.installation, a, b, inventName(w))
	if err != nil || len(gone) != 3 {
		t.Errorf("%q are gone: %v", gone, err)
	}
	wantEnded(t, session)
	if gone, err := w.drop(c, w.installation, a); err != nil || len(gone) != 1 {
		t.Errorf("a second time, %q are gone: %v", gone, err)
	}
	if gone, err := w.drop(c, w.installation); err != nil || len(gone) != 0 {
		t.Errorf("of no names, %q are gone: %v", gone, err)
	}
	if _, err := c.Exec(ctx, `SELECT * FROM mayfly_`+w.id+`.drop_roles($1, NULL)`, vaultscope.Installation(w.installation)); err != nil {
		t.Error(err)
	}
}

func inventName(w *world) string {
	return vaultscope.LeaseRolePrefix(w.installation, broker.NewLeaseID(time.Now())) + "ZzZzZzZz"
}

// wantEnded waits until PostgreSQL has ended a session.
func wantEnded(t *testing.T, c *pgx.Conn) {
	t.Helper()
	for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if _, err := c.Exec(t.Context(), `SELECT 1`); err != nil {
			return
		}
	}
	t.Error("the session goes on")
}

// TestSetupTakesNothingOver: the SQL stops at what is somebody else's.
func TestSetupTakesNothingOver(t *testing.T) {
	v, pg := servers(t)
	w := newWorld(t, v, pg)
	c, err := vaultscope.ParseConfig(w.config())
	if err != nil {
		t.Fatal(err)
	}
	tool := w.database()
	tool.Name = "take." + w.id
	s, err := vaultscope.NewSetup(c, []broker.Tool{tool}, vaultscope.Options{Broker: brokerID})
	if err != nil {
		t.Fatal(err)
	}
	group, schema := vaultscope.GroupRole(tool.Name), "mayfly_"+w.id
	w.super(`DO $$ BEGIN IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'mayfly_left') THEN CREATE ROLE mayfly_left; END IF; END $$`)
	for name, each := range map[string][3]string{
		"a superuser for the login":     {"CREATE ROLE " + w.sweep() + " SUPERUSER", "DROP ROLE " + w.sweep(), "rights of its own"},
		"a superuser for a tool":        {"CREATE ROLE " + group + " SUPERUSER", "DROP ROLE " + group, "rights of its own"},
		"rights for what is left":       {"CREATE ROLE held; GRANT held TO mayfly_left", "DROP ROLE held", "is a member of others"},
		"a login for what is left":      {"ALTER ROLE mayfly_left LOGIN", "ALTER ROLE mayfly_left NOLOGIN", "rights of its own"},
		"somebody's login for a tool":   {"CREATE ROLE " + group + " LOGIN", "DROP ROLE " + group, "rights of its own"},
		"somebody's schema":             {"CREATE SCHEMA " + schema, "DROP SCHEMA " + schema, "somebody else's"},
		"a superuser for Vault's login": {"ALTER ROLE vault SUPERUSER", "ALTER ROLE vault NOSUPERUSER", "rights of its own"},
	} {
		w.super("%s", each[0])
		if err := pg.exec("crm", s.SQL()); err == nil || !strings.Contains(err.Error(), each[2]) {
			t.Errorf("%s: %v", name, err)
		}
		w.super("%s", each[1])
	}
	if err := pg.exec("crm", s.SQL()); err != nil {
		t.Error(err)
	}
}

// TestRevocationStatements: what Vault runs to end a lease also ends a session
// that came in while it ran, and those that came in while an earlier role was
// dropped.
func TestRevocationStatements(t *testing.T) {
	h := newThief(t)
	ctx := t.Context()
	secret, err := h.v.client.Logical().Read(h.mount("database") + "/roles/crm-read-1m")
	if err != nil {
		t.Fatal(err)
	}
	name, now := h.leased(h.installation), h.leased(h.installation)
	vault := h.as("vault", "vault-password")
	tx, err := vault.Begin(ctx)
	if err != nil {
		t.Fatal(err)
	}
	var during, after *pgx.Conn
	before := h.as(name, "pw")
	for statement := range strings.SplitSeq(texts(secret.Data["revocation_statements"])[0], ";") {
		if strings.Contains(statement, "clear_snapshot") {
			during = h.as(name, "pw") // the drop does not count yet
		}
		if _, err := tx.Exec(ctx, strings.ReplaceAll(statement, "{{name}}", name), pgx.QueryExecModeSimpleProtocol); err != nil {
			t.Fatal(err)
		}
	}
	after = h.as(name, "pw") // nor now: this one is for the next revocation
	if err := tx.Commit(ctx); err != nil {
		t.Fatal(err)
	}
	wantEnded(t, before)
	wantEnded(t, during)
	if _, err := after.Exec(ctx, `SELECT 1`); err != nil {
		t.Fatalf("the session ended with its role; then there is nothing to test: %v", err)
	}
	if err := h.cycle(h.creds("crm-read-1m"), h.tool); err != nil {
		t.Fatal(err)
	}
	wantEnded(t, after)
	if len(h.roles(now)) != 1 {
		t.Error("another lease's role is gone")
	}
}

// wantShut: a role that could not be dropped can log in no more, and is a member
// of nothing.
func (w *world) wantShut(name string) {
	w.t.Helper()
	var login bool
	var member int
	c, err := pgx.Connect(w.t.Context(), w.pg.super("crm"))
	if err != nil {
		w.t.Fatal(err)
	}
	defer c.Close(context.Background())
	if err := c.QueryRow(w.t.Context(), `SELECT rolcanlogin, (SELECT count(*) FROM pg_auth_members WHERE member = r.oid) FROM pg_roles r WHERE rolname = $1`, name).Scan(&login, &member); err != nil || login || member != 0 {
		w.t.Errorf("what cannot be dropped can log in: %t, is a member of %d roles: %v", login, member, err)
	}
}

// TestDropRolesThatHoldOn: an agent cannot keep its role by what it does with it.
func TestDropRolesThatHoldOn(t *testing.T) {
	v, pg := servers(t)
	w := newWorld(t, v, pg)
	w.setup(w.database())
	ctx := t.Context()
	group := vaultscope.GroupRole("crm.read")
	w.super(`CREATE SCHEMA work_%s; GRANT ALL ON SCHEMA work_%s TO %q`, w.id, w.id, group)
	c := w.as(w.sweep(), "sweep-password")

	denied := func(t *testing.T, c *pgx.Conn, what, sql string) {
		t.Helper()
		if _, err := c.Exec(ctx, sql); sqlState(err) != "42501" {
			t.Errorf("%s that it left: want SQLSTATE 42501, and it is %v", what, err)
		}
	}
	owns := fmt.Sprintf(`CREATE TABLE work_%[1]s.t (a int); INSERT INTO work_%[1]s.t VALUES (7); CREATE TYPE work_%[1]s.e AS ENUM ('x'); GRANT SELECT ON work_%[1]s.t TO PUBLIC;
		CREATE FUNCTION work_%[1]s.f() RETURNS text LANGUAGE sql SECURITY DEFINER AS 'SELECT name FROM public.kept_%[1]s';
		CREATE VIEW work_%[1]s.v AS SELECT name FROM public.kept_%[1]s; GRANT SELECT ON work_%[1]s.v TO PUBLIC`, w.id)
	w.super(`CREATE TABLE kept_%[1]s (name text); INSERT INTO kept_%[1]s VALUES ('secret'); GRANT SELECT ON kept_%[1]s TO %[2]q;
		CREATE ROLE friend_%[1]s LOGIN PASSWORD 'pw'; GRANT USAGE ON SCHEMA work_%[1]s TO friend_%[1]s`, w.id, group)
	friend := w.as("friend_"+w.id, "pw")

	t.Run("it owns things that cannot be given away", func(t *testing.T) {
		name, free := w.leased(w.installation), w.leased(w.installation)
		agent := w.as(name, "pw")
		if _, err := agent.Exec(ctx, owns); err != nil {
			t.Fatal(err)
		}
		if _, err := friend.Exec(ctx, fmt.Sprintf(`SELECT work_%[1]s.f(), * FROM work_%[1]s.v`, w.id)); err != nil {
			t.Fatalf("it gives nothing to begin with; then there is nothing to test: %v", err)
		}
		// The tool was granted CREATE after the setup, which is to be run again.
		gone, err := w.drop(c, w.installation, name, free)
		if err != nil || !slices.Equal(gone, []string{free}) {
			t.Errorf("%q are gone: %v", gone, err)
		}
		wantEnded(t, agent)
		w.wantShut(name)
		denied(t, friend, "a function", fmt.Sprintf(`SELECT work_%s.f()`, w.id))
		denied(t, friend, "a view", fmt.Sprintf(`SELECT * FROM work_%s.v`, w.id))
		w.setup(w.database())
		if gone, err := w.drop(c, w.installation, name); err != nil || len(gone) != 1 {
			t.Errorf("with the setup run again, %q are gone: %v", gone, err)
		}
		w.super(`DROP SCHEMA work_%[1]s CASCADE; CREATE SCHEMA work_%[1]s; GRANT ALL ON SCHEMA work_%[1]s TO %[2]q; GRANT USAGE ON SCHEMA work_%[1]s TO friend_%[1]s`, w.id, group)
	})
	t.Run("it owns things", func(t *testing.T) {
		w.setup(w.database())
		name := w.leased(w.installation)
		agent := w.as(name, "pw")
		if _, err := agent.Exec(ctx, owns); err != nil {
			t.Fatal(err)
		}
		gone, err := w.drop(c, w.installation, name)
		if err != nil || !slices.Equal(gone, []string{name}) || len(w.roles(name)) != 0 {
			t.Errorf("%q are gone: %v", gone, err)
		}
		wantEnded(t, agent)
		// What it made is still there, and can do nothing.
		denied(t, friend, "a function", fmt.Sprintf(`SELECT work_%s.f()`, w.id))
		denied(t, friend, "a view", fmt.Sprintf(`SELECT * FROM work_%s.v`, w.id))
		var a int
		if err := friend.QueryRow(ctx, fmt.Sprintf(`SELECT a FROM work_%s.t`, w.id)).Scan(&a); err != nil || a != 7 {
			t.Errorf("what it wrote is lost: %d, %v", a, err)
		}
	})
	t.Run("it has a transaction open", func(t *testing.T) {
		name, free := w.leased(w.installation), w.leased(w.installation)
		agents := []*pgx.Conn{w.as(name, "pw"), w.as(name, "pw")}
		for i, sql := range []string{`BEGIN; CREATE TEMP TABLE t (a int)`, `BEGIN; ALTER ROLE CURRENT_USER PASSWORD 'other'`} {
			if _, err := agents[i].Exec(ctx, sql); err != nil {
				t.Fatal(err)
			}
		}
		gone, err := w.drop(c, w.installation, name, free)
		if err != nil || !slices.Equal(gone, []string{name, free}) || len(w.roles(name)) != 0 {
			t.Errorf("%q are gone: %v", gone, err)
		}
		for _, agent := range agents {
			wantEnded(t, agent)
		}
	})
	t.Run("somebody else holds it", func(t *testing.T) {
		name, free := w.leased(w.installation), w.leased(w.installation)
		agent := w.as(name, "pw")
		super, err := pgx.Connect(ctx, pg.super("crm"))
		if err != nil {
			t.Fatal(err)
		}
		defer super.Close(context.Background())
		if _, err := super.Exec(ctx, fmt.Sprintf(`BEGIN; CREATE TABLE held_%s (a int); ALTER TABLE held_%s OWNER TO %q`, w.id, w.id, name)); err != nil {
			t.Fatal(err)
		}
		gone, err := w.drop(c, w.installation, name, free)
		if err != nil || !slices.Equal(gone, []string{free}) {
			t.Errorf("%q are gone: %v", gone, err)
		}
		wantEnded(t, agent)
		w.wantShut(name)
		if _, err := super.Exec(ctx, `ROLLBACK`); err != nil {
			t.Fatal(err)
		}
		if gone, err := w.drop(c, w.installation, name); err != nil || len(gone) != 1 {
			t.Errorf("when it is let go, %q are gone: %v", gone, err)
		}
	})
	t.Run("somebody else holds many", func(t *testing.T) {
		super, err := pgx.Connect(ctx, pg.super("crm"))
		if err != nil {
			t.Fatal(err)
		}
		defer super.Close(context.Background())
		names := []string{w.leased(w.installation)} // free
		if _, err := super.Exec(ctx, `BEGIN`); err != nil {
			t.Fatal(err)
		}
		for i := range 20 {
			names = append(names, w.leased(w.installation))
			if _, err := super.Exec(ctx, fmt.Sprintf(`CREATE TABLE held_%s_%d (a int); ALTER TABLE held_%[1]s_%[2]d OWNER TO %[3]q`, w.id, i, names[i+1])); err != nil {
				t.Fatal(err)
			}
		}
		// The broker's own limit: beyond it everything would be undone.
		if _, err := c.Exec(ctx, `SET statement_timeout = '7s'`); err != nil {
			t.Fatal(err)
		}
		gone, err := w.drop(c, w.installation, names...)
		if err != nil || !slices.Equal(gone, names[:1]) {
			t.Errorf("%q are gone: %v", gone, err)
		}
		for _, name := range names[1:] {
			if _, err := pgx.Connect(ctx, fmt.Sprintf("host=127.0.0.1 port=%d dbname=crm sslmode=disable user=%s password=pw", w.pg.port, name)); err == nil {
				t.Errorf("%s, which is held, can still log in", name)
			}
		}
		if _, err := super.Exec(ctx, `ROLLBACK`); err != nil {
			t.Fatal(err)
		}
		if gone, err := w.drop(c, w.installation, names...); err != nil || len(gone) != len(names) {
			t.Errorf("when they are let go, %d of %d are gone: %v", len(gone), len(names), err)
		}
	})
	t.Run("it has members", func(t *testing.T) {
		name, friend := w.leased(w.installation), w.leased(w.installation)
		agent := w.as(name, "pw")
		_, err := agent.Exec(ctx, fmt.Sprintf(`GRANT %q TO %q`, name, friend))
		t.Logf("an agent gives its role to another: %v", err)
		if gone, err := w.drop(c, w.installation, name); err != nil || len(gone) != 1 {
			t.Errorf("%q are gone: %v", gone, err)
		}
	})
	t.Run("it cannot be dropped", func(t *testing.T) {
		name, free := w.leased(w.installation), w.leased(w.installation)
		agent := w.as(name, "pw")
		if err := pg.exec("postgres", fmt.Sprintf(`CREATE TABLE mine_%s (a int); ALTER TABLE mine_%s OWNER TO %q`, w.id, w.id, name)); err != nil { // another database
			t.Fatal(err)
		}
		gone, err := w.drop(c, w.installation, name, free)
		if err != nil || !slices.Equal(gone, []string{free}) {
			t.Errorf("%q are gone: %v", gone, err)
		}
		wantEnded(t, agent)
		w.wantShut(name)
		if err := pg.exec("postgres", fmt.Sprintf(`DROP TABLE mine_%s; DROP ROLE %q`, w.id, name)); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("Vault drops it, too", func(t *testing.T) {
		name, free := w.leased(w.installation), w.leased(w.installation)
		vault := w.as("vault", "vault-password")
		tx, err := vault.Begin(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := tx.Exec(ctx, fmt.Sprintf(`DROP ROLE %q`, name)); err != nil {
			t.Fatal(err)
		}
		type answer struct {
			gone []string
			err  error
		}
		answered := make(chan answer)
		go func() {
			gone, err := w.drop(c, w.installation, name, free)
			answered <- answer{gone, err}
		}()
		watch, err := pgx.Connect(ctx, pg.super("crm"))
		if err != nil {
			t.Fatal(err)
		}
		defer watch.Close(context.Background())
		for waiting := false; !waiting; { // until it waits for Vault
			if err := watch.QueryRow(ctx, `SELECT EXISTS (SELECT FROM pg_locks WHERE pid = $1 AND NOT granted)`, c.PgConn().PID()).Scan(&waiting); err != nil {
				t.Fatal(err)
			}
		}
		if err := tx.Commit(ctx); err != nil {
			t.Fatal(err)
		}
		if a := <-answered; a.err != nil || len(a.gone) != 2 {
			t.Errorf("%q are gone: %v", a.gone, a.err)
		}
	})
	t.Run("it comes back at once", func(t *testing.T) {
		name := w.leased(w.installation)
		tx, err := c.Begin(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := tx.Exec(ctx, `SELECT * FROM mayfly_`+w.id+`.drop_roles($1, $2)`, vaultscope.Installation(w.installation), []string{name}); err != nil {
			t.Fatal(err)
		}
		back := w.as(name, "pw") // the drop does not count yet
		if err := tx.Commit(ctx); err != nil {
			t.Fatal(err)
		}
		if _, err := back.Exec(ctx, `SELECT 1`); err != nil {
			t.Fatalf("the session ended with its role; then end_sessions is for nothing: %v", err)
		}
		var n int64
		if err := c.QueryRow(ctx, `SELECT mayfly_`+w.id+`.end_sessions()`).Scan(&n); err != nil || n < 1 {
			t.Errorf("%d sessions were ended: %v", n, err)
		}
		wantEnded(t, back)
	})
}

// TestSetupLimitsPostgresSessions: one lease does not use up the server's sessions.
func TestSetupLimitsPostgresSessions(t *testing.T) {
	v, pg := servers(t)
	w := newWorld(t, v, pg)
	w.setup(w.database())
	a := w.mint(w.open(), w.database(), time.Minute)
	user, _ := a.minted.Secret.Reveal("username")
	password, _ := a.minted.Secret.Reveal("password")
	for range 10 {
		w.as(user, password)
	}
	c, err := pgx.Connect(t.Context(), fmt.Sprintf("host=127.0.0.1 port=%d dbname=crm sslmode=disable user=%s password=%s", w.pg.port, user, password))
	if sqlState(err) != "53300" {
		t.Errorf("an eleventh session: want SQLSTATE 53300, and it is %v", err)
	}
	if c != nil {
		c.Close(context.Background())
	}
}
