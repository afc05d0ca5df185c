package vault

import (
	"net/http"
	"testing"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/vault/vaultscope"
)

// TestDatabase is one database lease from end to end.
func TestDatabase(t *testing.T) {
	v, pg := servers(t)
	for name, noDirect := range map[string]bool{"direct": false, "Vault alone": true} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, v, pg)
			w.noDirect = noDirect
			p := w.setup(w.database()).open()
			a := w.mint(p, w.database(), 2*time.Minute)
			if !w.connects(a.minted.Secret) {
				t.Fatal("it does not work")
			}
			if n := len(w.rolesOf(a.req.Lease)); n != 1 {
				t.Errorf("%d roles bear the lease's name", n)
			}
			accessor := handleOf(t, a.minted.Handle).Accessor
			if !w.tokenLives(accessor) {
				t.Error("the token is gone already")
			}
			if want := a.req.Now.Add(time.Minute); a.minted.Ends.Before(want) || a.minted.Ends.After(want.Add(3*time.Second)) {
				t.Errorf("it ends at %s, and Vault's role gives one minute from %s on", a.minted.Ends, a.req.Now)
			}
			d := p.Revoke(t.Context(), []providers.Ending{a.ending()})
			if d[0].Progress != broker.ProgressVerified || d[0].Err != nil {
				t.Fatalf("%+v", d)
			}
			if w.connects(a.minted.Secret) || len(w.rolesOf(a.req.Lease)) > 0 || w.tokenLives(accessor) {
				t.Error("something is left of it")
			}
		})
	}
}

// TestManyEnd: the access of a whole batch ends before anything else, however
// slow Vault is, and what Vault has to be told is told in slices of time.
func TestManyEnd(t *testing.T) {
	v, pg := servers(t)
	w := newWorld(t, v, pg)
	px := newProxy(t, v.address())
	w.address, w.extra = px.URL, `,"concurrency":1`
	p := w.setup(w.database()).open()
	var endings []providers.Ending
	for range 24 {
		endings = append(endings, w.mint(p, w.database(), time.Minute).ending())
	}
	left := -1
	px.set(func(s step, n int, _ func() *answer, _ http.ResponseWriter) bool {
		if s == stepLease && n == 1 {
			left = len(w.roles(vaultscope.RolePrefix(w.installation)))
		}
		time.Sleep(slice / 20)
		return false
	})
	open := endings
	for round := 0; len(open) > 0; round++ {
		ask := p.Revoke
		if round > 0 {
			ask = p.Confirm // as the engine, which has written how far it came
		}
		begun := time.Now()
		deaths := ask(t.Context(), open)
		if took := time.Since(begun); took > 5*slice {
			t.Errorf("one batch took %s", took)
		}
		var still []providers.Ending
		for i, d := range deaths {
			switch {
			case d.Err != nil:
				t.Fatal(d.Err)
			case d.Progress == broker.ProgressVerified:
			case d.Progress == broker.ProgressWritten && d.RetryAt.After(begun):
				still = append(still, open[i])
			default:
				t.Fatalf("%+v", d)
			}
		}
		if round == 0 && len(still) == 0 || len(still) == len(open) {
			t.Fatalf("round %d left %d of %d", round, len(still), len(open))
		}
		open = still
	}
	if left != 0 {
		t.Errorf("when Vault was first asked to end a lease, %d roles were there", left)
	}
	for _, e := range endings {
		if len(w.tokensOf(e.Lease)) > 0 {
			t.Errorf("the token of %s is left", e.Lease)
		}
	}
}
