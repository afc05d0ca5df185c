//go:build unix

package main

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/catalog"
	"github.com/mayfly-security/mayfly/deploy/torture/ledger"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/token"
	"github.com/mayfly-security/mayfly/providers/vault"
	"github.com/mayfly-security/mayfly/providers/vault/vaultscope"
)

// realWorld is a world with its servers, set up for an installation.
func realWorld(t *testing.T) (*world, broker.InstallationID) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	t.Cleanup(cancel)
	p, err := newPeople(ctx)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.close(); err != nil {
			t.Error(err)
		}
	})
	w, err := newWorld(ctx, t.TempDir(), "", p)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.close(); err != nil {
			t.Error(err)
		}
	})
	file := filepath.Join(w.dir, "catalog.yaml")
	if err := os.WriteFile(file, []byte(catalogText(variant{disabled: -1}, w.providerEntry(w.vaultAddr()), w.dir)), 0o600); err != nil {
		t.Fatal(err)
	}
	installation := broker.NewInstallationID(time.Now())
	if err := w.setUp(ctx, file, installation); err != nil {
		t.Fatal(err)
	}
	return w, installation
}

// look is one look at the real world, with a store that has these leases.
func look(t *testing.T, w *world, installation broker.InstallationID, open map[broker.LeaseID]broker.Lease) (kinds []ledger.Kind, unused int) {
	t.Helper()
	ctx := t.Context()
	l := ledger.Look{
		Before: open, After: open, Began: time.Now(), Now: time.Now(), RolesRead: true, Bound: time.Minute,
		Lookup:  func(broker.LeaseID) (broker.Lease, bool, error) { return broker.Lease{}, false, nil },
		Excused: func(broker.LeaseID) bool { return false }, Roled: func(string) bool { return true },
	}
	seen := w.look(ctx, installation)
	if seen.rolesErr != nil || seen.tokensErr != nil {
		t.Fatal(seen.rolesErr, seen.tokensErr)
	}
	var err error
	l.Roles = seen.roles
	if l.Tokens, unused, err = w.spent(ctx, seen.tokens, func(id broker.LeaseID) bool { _, is := open[id]; return is }); err != nil {
		t.Fatal(err)
	}
	_, wrong, err := l.Check()
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range wrong {
		kinds = append(kinds, v.Kind)
	}
	return kinds, unused
}

// TestPlanted plants in the real servers what a torture must find there.
func TestPlanted(t *testing.T) {
	w, installation := realWorld(t)
	ctx := t.Context()
	lease := broker.NewLeaseID(time.Now())
	store := map[broker.LeaseID]broker.Lease{lease: {ID: lease, State: broker.LeaseActive, Tool: toolRead, End: time.Now().Add(time.Hour)}}
	expect := func(what string, store map[broker.LeaseID]broker.Lease, wantUnused int, want ...ledger.Kind) {
		t.Helper()
		got, unused := look(t, w, installation, store)
		if len(got) != len(want) || len(got) > 0 && got[0] != want[0] || unused != wantUnused {
			t.Errorf("%s: found %v and %d unused tokens, not %v and %d", what, got, unused, want, wantUnused)
		}
	}
	expect("nothing", nil, 0)
	expect("an active lease of which nothing lives", store, 0, ledger.Missing)

	role := vaultscope.LeaseRolePrefix(installation, lease) + "planted1"
	if err := w.plant(ctx, role, time.Now().Add(time.Hour)); err != nil {
		t.Fatal(err)
	}
	expect("its role", store, 0)
	expect("a role that no lease accounts for", nil, 0, ledger.Orphan)
	if err := w.plant(ctx, vaultscope.LeaseRolePrefix(installation, lease)+"planted2", time.Now().Add(time.Hour)); err != nil {
		t.Fatal(err)
	}
	expect("two roles of one lease", store, 0, ledger.Duplicate)
	if works, err := w.login(ctx, role, "lost"); err != nil || !works {
		t.Errorf("a login that works: %t, %v", works, err)
	}
	if works, err := w.login(ctx, role, "wrong"); err != nil || works {
		t.Errorf("a wrong password: %t, %v", works, err)
	}
	for _, name := range []string{"planted1", "planted2"} {
		if err := w.pg.Exec(ctx, "postgres", `DROP ROLE "`+vaultscope.LeaseRolePrefix(installation, lease)+name+`"`); err != nil {
			t.Fatal(err)
		}
	}
	if works, err := w.login(ctx, role, "lost"); err != nil || works {
		t.Errorf("a role that is gone: %t, %v", works, err)
	}

	s, err := w.vault.Client().Auth().Token().CreateWithRoleWithContext(ctx, &api.TokenCreateRequest{
		DisplayName: vaultscope.DisplayName(installation, lease), TTL: "1m", ExplicitMaxTTL: "1m",
		Metadata: map[string]string{"mayfly_lease": string(lease), "mayfly_installation": string(installation)},
	}, "mayfly-"+toolRead)
	if err != nil {
		t.Fatal(err)
	}
	expect("a token that nobody used", nil, 1)
	holder := w.vault.Client()
	holder.SetToken(s.Auth.ClientToken)
	if _, err := holder.Logical().ReadWithContext(ctx, "database/creds/crm-read"); err != nil {
		t.Fatal(err)
	}
	expect("a token that was used, and its role", nil, 0, ledger.Orphan, ledger.Orphan)
	expect("those of an active lease", store, 0)
	if err := w.vault.Client().Auth().Token().RevokeAccessorWithContext(ctx, s.Auth.Accessor); err != nil {
		t.Fatal(err)
	}

	if err := w.pg.Stop(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := w.login(ctx, role, "lost"); err == nil {
		t.Error("a PostgreSQL that is away refused a login")
	}
	if seen := w.look(ctx, installation); seen.rolesErr == nil {
		t.Error("a PostgreSQL that is away listed roles")
	}
}

func TestCatalogs(t *testing.T) {
	dir := t.TempDir()
	w := &world{dir: dir}
	entry := `  - name: vault
    driver: vault
    config: {address: "http://127.0.0.1:1", auth: {method: jwt}, request_limit: 5s}
`
	digests := map[string]bool{}
	for _, v := range []variant{{disabled: -1}, {disabled: -1, words: 1}, {disabled: -1, longer: true}, {disabled: 2}} {
		file := filepath.Join(dir, "catalog.yaml")
		if err := replace(file, catalogText(v, entry, w.dir)); err != nil {
			t.Fatal(err)
		}
		s, err := catalog.Load([]string{file}, map[string]providers.Driver{"token": token.Driver{}, "vault": vault.Driver{}})
		if err != nil {
			t.Fatal(err)
		}
		digests[s.Digest()] = true
	}
	if len(digests) != 4 {
		t.Errorf("four variants are %d catalogs", len(digests))
	}
}

func TestStrays(t *testing.T) {
	now := time.Now()
	for _, c := range []struct {
		name      string
		planted   time.Duration // before the look
		there     bool
		outage    time.Duration // its end, before the look; 0: none
		wrong     int
		swept     int
		stillOurs bool
	}{
		{name: "there for a while", planted: 20 * time.Second, there: true, stillOurs: true},
		{name: "gone", planted: 20 * time.Second, swept: 1},
		{name: "planted after the look began", planted: -time.Second, stillOurs: true},
		{name: "there for too long", planted: sweepBound + time.Second, there: true, wrong: 1},
		{name: "there for long, and Vault was away", planted: sweepBound + time.Second, there: true, outage: time.Second, stillOurs: true},
		{name: "there for too long after an outage", planted: 3 * sweepBound, there: true, outage: sweepBound + time.Second, wrong: 1},
	} {
		s := &strays{planted: map[string]time.Time{"x": now.Add(-c.planted)}}
		roles := []ledger.Thing{{Name: "other"}}
		if c.there {
			roles = append(roles, ledger.Thing{Name: "x"})
		}
		var outage time.Time
		if c.outage > 0 {
			outage = now.Add(-c.outage)
		}
		others, wrong := s.judge(roles, now, outage)
		_, still := s.planted["x"]
		if len(others) != 1 || len(wrong) != c.wrong || s.swept != c.swept || still != c.stillOurs {
			t.Errorf("%s: %v and %v, %d swept, still there %t", c.name, others, wrong, s.swept, still)
		}
	}
}
