package vault

import (
	"context"
	"errors"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/providertest"
	"github.com/mayfly-security/mayfly/providers/vault/vaultscope"
)

// TestCrash goes through what a broker that stops at each step leaves, and
// what is done about it with what was durable then. A stop is a step that
// never returns to us; the provider that ends the lease is another one.
func TestCrash(t *testing.T) {
	v, pg := servers(t)
	stopped := errors.New("the broker stopped")

	t.Run("after the intent", func(t *testing.T) {
		w := newWorld(t, v, pg)
		p := w.setup(w.database()).open()
		settles := time.Now().Add(time.Hour)
		e := providers.Ending{Lease: broker.NewLeaseID(time.Now()), Tool: "crm.read", Settles: settles}
		for _, ask := range []func(context.Context, []providers.Ending) []providers.Death{p.Revoke, p.Confirm} {
			if d := ask(t.Context(), []providers.Ending{e})[0]; d.Progress == broker.ProgressVerified || !d.RetryAt.Equal(settles) {
				t.Errorf("while it settles: %+v", d)
			}
			past := e
			past.Settles = time.Now().Add(-time.Second)
			if d := ask(t.Context(), []providers.Ending{past})[0]; d.Progress != broker.ProgressVerified {
				t.Errorf("when it has settled: %+v", d)
			}
		}
	})

	t.Run("after the token, before its accessor is durable", func(t *testing.T) {
		w := newWorld(t, v, pg)
		p := w.setup(w.database()).open()
		a := &attempt{req: w.request(w.database(), time.Minute)}
		px := newProxy(t, v.address())
		w.address = px.URL
		gone := w.open()
		px.set(func(s step, _ int, _ func() *answer, _ http.ResponseWriter) bool {
			if s == stepAccessor || s == stepRead {
				panic(http.ErrAbortHandler) // nobody is there any more to send these
			}
			return false
		})
		a.minted, a.err = gone.Mint(t.Context(), a.req, func(providers.Handle) error { return stopped })
		if a.err == nil || px.count(stepRead) != 0 {
			t.Fatalf("%v, and %d reads", a.err, px.count(stepRead))
		}
		if n := len(w.tokensOf(a.req.Lease)); n != 1 {
			t.Errorf("%d tokens", n)
		}
		// Nobody holds the token, and it ends by itself.
		token, err := v.client.Auth().Token().LookupAccessor(w.tokensOf(a.req.Lease)[0])
		if err != nil {
			t.Fatal(err)
		}
		if ttl, _ := token.TokenTTL(); ttl <= 0 || ttl > 2*time.Minute {
			t.Errorf("it lives %s", ttl)
		}
		if d := p.Revoke(t.Context(), []providers.Ending{{Lease: a.req.Lease, Tool: "crm.read"}})[0]; d.Progress != broker.ProgressVerified {
			t.Errorf("%+v", d)
		}
	})

	t.Run("after the accessor is durable, before the read", func(t *testing.T) {
		w := newWorld(t, v, pg)
		p := w.setup(w.database()).open()
		a := w.onlyRecorded(p)
		e := a.ending()
		e.Settles = time.Now().Add(time.Hour)
		if d := p.Revoke(t.Context(), []providers.Ending{e})[0]; d.Err != nil || !d.RetryAt.Equal(e.Settles) || len(w.tokensOf(a.req.Lease)) != 1 {
			t.Errorf("while it settles: %+v", d)
		}
		e.Settles = time.Now().Add(-time.Second)
		if d := p.Revoke(t.Context(), []providers.Ending{e})[0]; d.Progress != broker.ProgressVerified || d.Left != "" || len(w.tokensOf(a.req.Lease)) != 0 {
			t.Errorf("when it has settled: %+v", d)
		}
	})

	// The answer of the read is lost: the role is there and nobody holds it.
	for name, noDirect := range map[string]bool{"direct": false, "Vault alone": true} {
		t.Run("in the read/"+name, func(t *testing.T) {
			w := newWorld(t, v, pg)
			clock := providertest.NewClock(time.Now())
			w.now, w.noDirect = clock.Now, noDirect
			px := newProxy(t, v.address())
			p := w.setup(w.database()).open()
			w.address = px.URL
			gone := w.open()
			px.set(func(s step, _ int, forward func() *answer, _ http.ResponseWriter) bool {
				if s == stepRead {
					forward()
					panic(http.ErrAbortHandler)
				}
				return false
			})
			a := mint(t.Context(), gone, w.request(w.database(), time.Minute))
			if a.err == nil || isNothing(a.err) || len(w.rolesOf(a.req.Lease)) != 1 {
				t.Fatalf("%v", a.err)
			}
			e := a.ending()
			e.Settles = clock.Now().Add(time.Hour)
			d := p.Revoke(t.Context(), []providers.Ending{e})[0]
			if d.Progress == broker.ProgressVerified || !d.RetryAt.Equal(e.Settles) || len(w.tokensOf(a.req.Lease)) != 1 {
				t.Errorf("while it settles: %+v", d)
			}
			if left := len(w.rolesOf(a.req.Lease)); (left == 0) == noDirect {
				t.Errorf("while it settles there are %d roles", left)
			}
			clock.AdvanceTo(e.Settles)
			d = p.Revoke(t.Context(), []providers.Ending{e})[0]
			if len(w.tokensOf(a.req.Lease)) != 0 {
				t.Error("the token is left")
			}
			if !noDirect {
				if d.Progress != broker.ProgressVerified || d.Left != "" || len(w.rolesOf(a.req.Lease)) != 0 {
					t.Errorf("when it has settled: %+v", d)
				}
				return
			}
			// Nobody but time can say that no role can log in.
			dead := e.Settles.Add(time.Minute + buffer + clockSkew)
			if d.Err != nil || d.Progress != broker.ProgressRequested || !d.RetryAt.Equal(dead) {
				t.Errorf("when it has settled: %+v, want to look again at %s", d, dead)
			}
			clock.AdvanceTo(dead)
			if d := p.Confirm(t.Context(), []providers.Ending{e})[0]; d.Progress != broker.ProgressVerified || !strings.Contains(d.Left, "cannot log in") {
				t.Errorf("when it has died: %+v", d)
			}
		})
	}

	t.Run("after delivery, and in the ending", func(t *testing.T) {
		w := newWorld(t, v, pg)
		px := newProxy(t, v.address())
		p := w.setup(w.database()).open()
		w.address = px.URL
		gone := w.open()
		a := w.mint(p, w.database(), time.Minute)
		px.set(func(s step, _ int, forward func() *answer, _ http.ResponseWriter) bool {
			if s == stepAccessor {
				panic(http.ErrAbortHandler) // between both
			}
			return false
		})
		d := gone.Revoke(t.Context(), []providers.Ending{a.ending()})[0]
		if d.Err == nil || d.Progress == broker.ProgressVerified || len(w.tokensOf(a.req.Lease)) != 1 {
			t.Errorf("%+v", d)
		}
		for range 2 { // idempotent
			if d := p.Revoke(t.Context(), []providers.Ending{a.ending()})[0]; d.Progress != broker.ProgressVerified || len(w.tokensOf(a.req.Lease)) != 0 {
				t.Errorf("%+v", d)
			}
		}
	})
}

// onlyRecorded makes an attempt that stops when its accessor is durable.
func (w *world) onlyRecorded(p *provider) *attempt {
	w.t.Helper()
	ctx, stop := context.WithCancel(w.t.Context())
	a := &attempt{req: w.request(w.database(), time.Minute)}
	func() {
		defer func() { recover() }()
		p.Mint(ctx, a.req, func(h providers.Handle) error {
			a.recorded = append(a.recorded, h)
			stop()
			panic("the broker stopped")
		})
	}()
	return a
}

// TestLost: what Vault has lost track of is found by name, and removed: of our
// installation, and of no other.
func TestLost(t *testing.T) {
	v, pg := servers(t)
	w, other := newWorld(t, v, pg), newWorld(t, v, pg)
	p := w.setup(w.database()).open()
	q := other.setup(other.database()).open()
	a, b := w.mint(p, w.database(), time.Minute), other.mint(q, other.database(), time.Minute)
	// Vault forgets the lease, as after sys/leases/tidy or a restore.
	lost := handleOf(t, a.minted.Handle)
	if err := pg.exec("crm", `CREATE ROLE "`+vaultscope.LeaseRolePrefix(w.installation, a.req.Lease)+`lost0000" LOGIN VALID UNTIL 'infinity' IN ROLE "`+vaultscope.GroupRole("crm.read")+`"; GRANT "`+
		vaultscope.LeaseRolePrefix(w.installation, a.req.Lease)+`lost0000" TO vault WITH ADMIN OPTION`); err != nil {
		t.Fatal(err)
	}
	found, err := p.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, f := range found {
		names = append(names, f.Name)
		if f.Lease != a.req.Lease || f.Kind == "" {
			t.Errorf("%+v", f)
		}
		if f.Name == lost.User && (f.DiesAt.Before(a.req.Now.Add(time.Minute)) || f.DiesAt.After(a.minted.DiesAt.Add(clockSkew))) {
			t.Errorf("it dies at %s, and the lease says %s", f.DiesAt, a.minted.DiesAt)
		}
		if f.Name != lost.User && !f.DiesAt.IsZero() {
			t.Errorf("%+v lives for ever", f)
		}
	}
	if len(names) != 2 || !slices.Contains(names, lost.User) {
		t.Fatalf("found %q", names)
	}
	// Another's is neither found nor removed, whoever asks for it.
	foreign := found[0]
	foreign.Name = handleOf(t, b.minted.Handle).User
	unknown := found[0]
	unknown.Name = "vault"
	errs := p.Remove(t.Context(), append(found, foreign, unknown))
	for i, err := range errs {
		if (err == nil) != (i < 2) {
			t.Errorf("removing %d of %d: %v", i, len(errs), err)
		}
	}
	if !w.connects(b.minted.Secret) || len(w.rolesOf(a.req.Lease)) != 0 {
		t.Error("the wrong one is gone")
	}
	if errs := p.Remove(t.Context(), found); errs[0] != nil || errs[1] != nil {
		t.Errorf("again: %v", errs)
	}
}

// TestForgotten: Vault says 204 also for a lease that it does not know. With a
// login of our own that is no proof.
func TestForgotten(t *testing.T) {
	v, pg := servers(t)
	w := newWorld(t, v, pg)
	p := w.setup(w.database()).open()
	a := w.mint(p, w.database(), time.Minute)
	for _, role := range []string{"crm-read-10s", "crm-read-1m"} {
		w.write(w.mount("database")+"/roles/"+role, map[string]any{"db_name": "mayfly", "revocation_statements": []string{"SELECT 1;"}})
	}
	if err := v.client.Sys().RevokePrefix(w.mount("database") + "/creds/"); err != nil {
		t.Fatal(err)
	}
	if err := pg.exec("crm", "REVOKE EXECUTE ON FUNCTION mayfly_"+w.id+".drop_roles(text, text[]) FROM "+w.sweep()); err != nil {
		t.Fatal(err)
	}
	d := p.Revoke(t.Context(), []providers.Ending{a.ending()})[0]
	if d.Progress == broker.ProgressVerified || d.Err == nil || !w.connects(a.minted.Secret) {
		t.Errorf("%+v, and it works: %v", d, w.connects(a.minted.Secret))
	}
	if err := pg.exec("crm", "GRANT EXECUTE ON FUNCTION mayfly_"+w.id+".drop_roles(text, text[]) TO "+w.sweep()); err != nil {
		t.Fatal(err)
	}
	if d := p.Revoke(t.Context(), []providers.Ending{a.ending()})[0]; d.Progress != broker.ProgressVerified || len(w.rolesOf(a.req.Lease)) > 0 {
		t.Errorf("%+v", d)
	}
}
