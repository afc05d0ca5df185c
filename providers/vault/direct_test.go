package vault

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/vault/vaultscope"
)

// unanswered is a lease whose read came back to nobody, and has settled.
func (a *attempt) unanswered() providers.Ending {
	e := a.ending()
	e.Handle, e.Settles = a.recorded[0], time.Now().Add(-time.Second)
	return e
}

// own is a PostgreSQL server for one test.
func own(t *testing.T) *postgres {
	t.Helper()
	pg, err := newPostgres()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { pg.Close() })
	return pg
}

// TestRemoveByName: what was listed is removed whatever has become of the text
// that names its kind, and however long the mount's name is.
func TestRemoveByName(t *testing.T) {
	v, pg := servers(t)
	w := newWorld(t, v, pg)
	w.long = strings.Repeat("x", 60-len(w.mount("database")))
	w.mountDatabase()
	if n := len(w.mount("database")); n != 60 {
		t.Fatalf("the mount's name has %d bytes", n)
	}
	p := w.setup(w.database()).open()
	for name, keep := range map[string]func(string) string{
		"as the engine": func(kind string) string { return broker.Clean(broker.Shorten(kind, maxKind)) },
		"not at all":    func(string) string { return "" },
	} {
		a := w.mint(p, w.database(), time.Minute)
		found, err := p.List(t.Context())
		if err != nil || len(found) != 1 {
			t.Fatalf("%+v, %v", found, err)
		}
		if kind := found[0].Kind; len(kind) > maxKind || keep("") != "" && keep(kind) != kind {
			t.Errorf("the kind is %q", kind)
		}
		found[0].Kind = keep(found[0].Kind)
		for range 2 { // also what is gone already
			if errs := p.Remove(t.Context(), found); errs[0] != nil {
				t.Errorf("%s: %v", name, errs[0])
			}
		}
		if left := w.rolesOf(a.req.Lease); len(left) > 0 {
			t.Errorf("%s: %q is left", name, left)
		}
	}
}

// TestHungDatabase: a server that hangs costs the leases of another nothing.
func TestHungDatabase(t *testing.T) {
	v, pg := servers(t)
	hung := own(t)
	w, far := newWorld(t, v, pg), newWorld(t, v, hung)
	far.installation = w.installation
	remote := far.database()
	remote.Name = "far.read"
	p := w.setup(w.database(), remote).open()
	mount := far.mount("database")
	p.directs[mount] = far.setup(far.database()).open().directs[mount]

	a, b, c := w.mint(p, w.database(), time.Minute), w.mint(p, w.database(), time.Minute), w.mint(p, w.database(), time.Minute)
	d, e := w.mint(p, remote, time.Minute), w.mint(p, remote, time.Minute)
	all, err := p.List(t.Context())
	if err != nil || len(all) != 5 {
		t.Fatalf("%+v, %v", all, err)
	}
	if err := hung.Pause(); err != nil {
		t.Fatal(err)
	}
	// More of the kind, so that whoever asks one after the other comes to a hung one first.
	var more []providers.Ending
	for i := range 7 {
		h := handleOf(t, d.minted.Handle)
		h.Mount = fmt.Sprintf("%s-%d", mount, i)
		p.directs[h.Mount] = p.directs[mount]
		each := d.ending()
		if each.Handle, err = h.encode(); err != nil {
			t.Fatal(err)
		}
		more = append(more, each)
	}
	limited := func() context.Context {
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		t.Cleanup(cancel)
		return ctx
	}
	listed, err := p.List(limited())
	if err == nil || len(listed) != 3 {
		t.Errorf("listed %+v, %v", listed, err)
	}
	name := func(a *attempt) providers.Found { return providers.Found{Name: handleOf(t, a.minted.Handle).User} }
	if errs := p.Remove(limited(), []providers.Found{name(e), name(a)}); errs[0] == nil || errs[1] != nil {
		t.Errorf("removed: %v", errs)
	}
	for what, ask := range map[string]func(context.Context, []providers.Ending) []providers.Death{"Confirm": p.Confirm, "Revoke": p.Revoke} {
		other := a // its role is gone already
		if what == "Revoke" {
			other = b
		}
		deaths := ask(limited(), append([]providers.Ending{d.ending(), e.unanswered(), other.ending()}, more...))
		for i, death := range deaths[:2] {
			if i == 0 && death.Err == nil || death.Progress != broker.ProgressNone || errors.Is(death.Err, providers.ErrAway) {
				t.Errorf("%s, where it hangs: %+v", what, death)
			}
		}
		if death := deaths[2]; death.Err != nil || death.Progress != broker.ProgressVerified {
			t.Errorf("%s, where it does not: %+v", what, death)
		}
	}
	if death := p.Revoke(limited(), append([]providers.Ending{e.unanswered(), c.unanswered()}, more...))[1]; death.Progress != broker.ProgressVerified {
		t.Errorf("of unknown outcome, where it does not hang: %+v", death)
	}
	if err := hung.Resume(); err != nil {
		t.Fatal(err)
	}
	for _, death := range p.Revoke(t.Context(), []providers.Ending{d.ending(), e.ending()}) {
		if death.Progress != broker.ProgressVerified {
			t.Errorf("when it is back: %+v", death)
		}
	}
}

// TestReadOnlyServer: a server that takes no writes, as a standby that may lag
// behind, is not asked what there is.
func TestReadOnlyServer(t *testing.T) {
	v, pg := servers(t)
	standby := own(t)
	w := newWorld(t, v, pg)
	w.pg = standby
	w.setup(w.database())
	for _, sql := range []string{"ALTER SYSTEM SET default_transaction_read_only = on", "SELECT pg_reload_conf()"} {
		if err := standby.exec("postgres", sql); err != nil {
			t.Fatal(err)
		}
	}
	if err := standby.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	w.pg = pg
	p := w.setup(w.database()).open()
	file := filepath.Join(t.TempDir(), "password")
	if err := os.WriteFile(file, []byte("sweep-password"), 0o600); err != nil {
		t.Fatal(err)
	}
	with := func(hosts, ports string) {
		d, err := openDirect(vaultscope.Database{
			Mount: w.mount("database"), Schema: "mayfly_" + w.id, PasswordFile: file,
			DSN: fmt.Sprintf("host=%s port=%s dbname=crm user=%s sslmode=disable", hosts, ports, w.sweep()),
		}, vaultscope.Installation(w.installation))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(d.close)
		p.directs[w.mount("database")].close()
		p.directs[w.mount("database")] = d
	}
	a := w.mint(p, w.database(), time.Minute)
	with("127.0.0.1", fmt.Sprint(standby.port))
	if found, err := p.List(t.Context()); err == nil {
		t.Errorf("listed %+v", found)
	}
	if d := p.Revoke(t.Context(), []providers.Ending{a.unanswered()})[0]; d.Progress == broker.ProgressVerified || d.Err == nil {
		t.Errorf("%+v", d)
	}
	b := w.mint(p, w.database(), time.Minute)
	with("127.0.0.1,127.0.0.1", fmt.Sprintf("%d,%d", standby.port, pg.port))
	if found, err := p.List(t.Context()); err != nil || len(found) == 0 {
		t.Errorf("listed %+v, %v", found, err)
	}
	for _, d := range p.Revoke(t.Context(), []providers.Ending{a.unanswered(), b.unanswered()}) {
		if d.Progress != broker.ProgressVerified {
			t.Errorf("%+v", d)
		}
	}
	if left := w.roles(vaultscope.RolePrefix(w.installation)); len(left) > 0 {
		t.Errorf("%q are left", left)
	}
}

// TestTooManyRoles: a list that was cut off says of nothing that it is gone, and
// what it has is removed all the same.
func TestTooManyRoles(t *testing.T) {
	v, pg := servers(t)
	w := newWorld(t, v, pg)
	p := w.setup(w.database()).open()
	d := p.directs[w.mount("database")]
	a, b := w.mint(p, w.database(), time.Minute), w.mint(p, w.database(), time.Minute)
	d.most = 2 // exactly
	if found, err := p.List(t.Context()); err != nil || len(found) != 2 {
		t.Errorf("listed %+v, %v", found, err)
	}
	d.most = 1
	listed, err := p.List(t.Context())
	if err == nil || len(listed) != 1 {
		t.Fatalf("listed %+v, %v", listed, err)
	}
	// Neither that it is there nor that it is not is known, of the other one.
	first, other := a, b
	if listed[0].Lease == b.req.Lease {
		first, other = b, a
	}
	if death := p.Confirm(t.Context(), []providers.Ending{other.ending()})[0]; death.Err == nil || death.Progress == broker.ProgressVerified {
		t.Errorf("%+v", death)
	}
	c := w.mint(p, w.database(), time.Minute)
	w.mint(p, w.database(), time.Minute)
	w.mint(p, w.database(), time.Minute)
	later := other.unanswered()
	later.Settles = time.Now().Add(time.Hour)
	deaths := p.Revoke(t.Context(), []providers.Ending{other.unanswered(), first.ending(), later})
	if deaths[0].Err == nil || deaths[0].Progress == broker.ProgressVerified {
		t.Errorf("of unknown outcome: %+v", deaths[0])
	}
	if deaths[1].Progress != broker.ProgressVerified {
		t.Errorf("of a known role: %+v", deaths[1])
	}
	if listed, err = p.List(t.Context()); err == nil || len(listed) != 1 {
		t.Fatalf("listed %+v, %v", listed, err)
	}
	unlisted := providers.Found{Name: handleOf(t, c.minted.Handle).User + "x"}
	if errs := p.Remove(t.Context(), append(listed, unlisted)); errs[0] != nil || errs[1] == nil {
		t.Errorf("removed: %v", errs)
	}
}

// TestFullServer: an agent that takes every connection that the server has does
// not keep its own end out.
func TestFullServer(t *testing.T) {
	v, _ := servers(t)
	pg := own(t)
	if err := pg.exec("postgres", "ALTER SYSTEM SET max_connections = 12"); err != nil {
		t.Fatal(err)
	}
	if err := pg.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	w := newWorld(t, v, pg)
	p := w.setup(w.database()).open()
	for deadline := time.Now().Add(10 * time.Second); p.directs[w.mount("database")].pool.Stat().IdleConns() == 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("there is no connection")
		}
	}
	a := w.mint(p, w.database(), time.Minute)
	user, _ := a.minted.Secret.Reveal("username")
	password, _ := a.minted.Secret.Reveal("password")
	taken := 0
	for ; ; taken++ {
		c, err := pgx.Connect(t.Context(), fmt.Sprintf("host=127.0.0.1 port=%d dbname=crm sslmode=disable user=%s password=%s", pg.port, user, password))
		if err != nil {
			break
		}
		defer c.Close(context.Background())
	}
	if taken == 0 {
		t.Fatal("no connection was to be had")
	}
	if d := p.Revoke(t.Context(), []providers.Ending{a.ending()})[0]; d.Err != nil || d.Progress != broker.ProgressVerified || w.connects(a.minted.Secret) {
		t.Errorf("%+v", d)
	}
}

// TestHeldWhileItSettles: a role that cannot be dropped at the moment is not
// left until the attempt has settled.
func TestHeldWhileItSettles(t *testing.T) {
	v, pg := servers(t)
	w := newWorld(t, v, pg)
	p := w.setup(w.database()).open()
	a := w.mint(p, w.database(), time.Minute)
	name := handleOf(t, a.minted.Handle).User
	super, err := pgx.Connect(t.Context(), pg.super("crm"))
	if err != nil {
		t.Fatal(err)
	}
	defer super.Close(context.Background())
	if _, err := super.Exec(t.Context(), fmt.Sprintf(`BEGIN; CREATE TABLE held_%s (a int); ALTER TABLE held_%[1]s OWNER TO %q`, w.id, name)); err != nil {
		t.Fatal(err)
	}
	e := a.unanswered()
	e.Settles = time.Now().Add(time.Hour)
	if d := p.Revoke(t.Context(), []providers.Ending{e})[0]; d.Err == nil || d.Progress == broker.ProgressVerified {
		t.Errorf("while somebody holds it: %+v", d)
	}
	if _, err := super.Exec(t.Context(), `ROLLBACK`); err != nil {
		t.Fatal(err)
	}
	if d := p.Revoke(t.Context(), []providers.Ending{e})[0]; d.Err != nil || !d.RetryAt.Equal(e.Settles) {
		t.Errorf("when it is let go: %+v", d)
	}
	if left := w.rolesOf(a.req.Lease); len(left) > 0 {
		t.Errorf("roles are left: %q", left)
	}
}
