package vault

import (
	"testing"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
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
