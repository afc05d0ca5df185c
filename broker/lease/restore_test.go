package lease_test

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/audit"
	"github.com/mayfly-security/mayfly/broker/lease"
	"github.com/mayfly-security/mayfly/providers/providertest"
	"github.com/mayfly-security/mayfly/store"
	"github.com/mayfly-security/mayfly/store/bolt"
)

// backUp copies the rig's store while it is in use, marks the copy, and
// returns its path.
func (r *rig) backUp() string {
	r.t.Helper()
	path := filepath.Join(r.t.TempDir(), "backup.db")
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_EXCL, 0o600)
	if err != nil {
		r.t.Fatal(err)
	}
	if _, err := r.db.(*bolt.DB).WriteTo(f); err != nil {
		r.t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		r.t.Fatal(err)
	}
	db, err := bolt.Open(path, bolt.Config{MmapSize: 64 << 20})
	if err != nil {
		r.t.Fatal(err)
	}
	if err := errors.Join(lease.MarkBackup(context.Background(), db, r.engine.Now(), "uid:7"), db.Close()); err != nil {
		r.t.Fatal(err)
	}
	return path
}

// putInPlace puts a copy of the backup in the place of the rig's store, which
// is closed.
func (r *rig) putInPlace(backup string) {
	r.t.Helper()
	data, err := os.ReadFile(backup)
	if err != nil {
		r.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(r.dir, "mayfly.db"), data, 0o600); err != nil {
		r.t.Fatal(err)
	}
}

// TestRestore: a backup that is put in place brings nothing back to life. What
// it knows is ended, what was made after it is listed, and what was withdrawn
// after it stays withdrawn.
func TestRestore(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := inventoryRig(t, nil)
		ctx := context.Background()
		withdrawn := r.grant(support, "db.read", 12*time.Hour)
		kept := r.grant(support, "vault.read", 12*time.Hour)
		in := r.open(time.Hour, "db.read", "crm.read")
		r.grant(support, "docs.search", 12*time.Hour)
		inDB, inVault := r.mustIssue("db.read"), r.mustIssue("vault.read", key("once"))
		token := r.mustIssue("crm.read", key("token"))
		ended := r.mustIssue("vault.read")
		if _, err := r.engine.RevokeLease(ctx, as(sam), ended.Lease.ID, ""); err != nil {
			t.Fatal(err)
		}
		installation := r.engine.InstallationID()
		madeAt := r.engine.Now()
		backup := r.backUp()

		// Life goes on after the backup.
		time.Sleep(time.Second)
		if _, _, err := r.engine.WithdrawGrant(ctx, as(sam), withdrawn.ID, "misused"); err != nil {
			t.Fatal(err)
		}
		if _, _, err := r.engine.CloseIncident(ctx, as(pager), in.ID, "over"); err != nil {
			t.Fatal(err)
		}
		r.grant(support, "db.read", 12*time.Hour)
		later := r.mustIssue("db.read")
		laterVault := r.mustIssue("vault.read")
		time.Sleep(10 * time.Second)

		// The store is lost.
		r.stop()
		r.putInPlace(backup)
		r.start()

		if got := r.engine.InstallationID(); got != installation {
			t.Errorf("the installation is %s; it was %s", got, installation)
		}
		// Nothing of before gives.
		for _, tool := range []string{"db.read", "vault.read", "crm.read", "docs.search"} {
			_, err := r.issue(tool)
			r.wantReason(err, broker.ReasonNoGrant)
		}
		grants, err := r.engine.Grants(ctx, lease.GrantFilter{}, "", 0)
		if err != nil || len(grants.Items) != 0 {
			t.Errorf("open grants: %+v, %v", grants.Items, err)
		}
		if v, err := r.engine.Incident(ctx, as(pager), in.ID); err != nil || v.State != broker.IncidentClosed || v.Grants[0].State != broker.GrantClosed {
			t.Errorf("the incident: %+v, %v", v, err)
		}
		if _, usable, err := r.engine.Usable(ctx, token.Lease.ID); err != nil || usable {
			t.Errorf("a token of before is usable: %v, %v", usable, err)
		}
		for _, g := range []broker.GrantID{withdrawn.ID, kept.ID} {
			events := r.events(lease.EventFilter{Grant: g, Type: audit.GrantEnded})
			if len(events) != 1 || events[0].Cause != string(broker.CauseRestored) {
				t.Errorf("the end of grant %s: %+v", g, events)
			}
		}
		// Every lease that had not ended is ended, and dies.
		for _, d := range []*lease.Delivery{inDB, inVault, token} {
			l := r.wantState(d.Lease.ID, broker.LeaseRevoked, time.Minute)
			if l.Cause != broker.CauseRestored {
				t.Errorf("%s ended for %q", l.Tool, l.Cause)
			}
		}
		if l := r.lease(ended.Lease.ID); l.State != broker.LeaseRevoked || l.Cause != broker.CauseRevoked {
			t.Errorf("what had ended is %s for %q", l.State, l.Cause)
		}
		for _, d := range []*lease.Delivery{inDB, inVault} {
			if r.world.Works(d.Secret.RevealAll()["password"]) {
				t.Errorf("a credential of before works: %s", d.Lease.Tool)
			}
		}
		// An idempotency key of before gives nothing, under a new grant either.
		r.grant(support, "vault.read", time.Hour)
		r.grant(support, "crm.read", time.Hour)
		if d, err := r.issue("vault.read", key("once")); err == nil {
			t.Errorf("an idempotency key of before gave lease %s", d.Lease.ID)
		}
		if d, err := r.issue("crm.read", key("token")); err == nil {
			t.Errorf("an idempotency key of before gave lease %s", d.Lease.ID)
		}
		// The evidence, once.
		events := r.events(lease.EventFilter{Type: audit.StoreRestored})
		if len(events) != 1 || events[0].Details["made_at"] != madeAt.Format(time.RFC3339) || events[0].Details["made_by"] != "uid:7" {
			t.Errorf("evidence of the restore: %+v", events)
		}

		// What was made after the backup lives, and is listed for a decision.
		time.Sleep(61 * time.Second)
		strays := map[broker.LeaseID]lease.Stray{}
		for _, s := range r.strays() {
			strays[s.Lease] = s
		}
		if len(strays) != 2 {
			t.Fatalf("strays: %+v", strays)
		}
		for _, d := range []*lease.Delivery{later, laterVault} {
			s, listed := strays[d.Lease.ID]
			if !listed || s.Why != lease.StrayUnknown || !s.DiesAt.Equal(d.Lease.DiesAt) {
				t.Errorf("what was made later: %+v, %v", s, listed)
			}
			if !r.world.Works(d.Secret.RevealAll()["password"]) {
				t.Errorf("what was made later was ended without a decision")
			}
			if _, removed, err := r.engine.EndStray(ctx, as(sam), s.Provider, s.Name, "after the restore"); err != nil || !removed {
				t.Errorf("ending it: %v, %v", removed, err)
			}
			if r.world.Works(d.Secret.RevealAll()["password"]) {
				t.Errorf("it still works")
			}
		}
		if live := r.world.Live(); len(live) != 0 {
			t.Errorf("alive at the end: %+v", live)
		}

		// It was a restore once: what is given now stays.
		d := r.mustIssue("vault.read")
		r.restart()
		if l := r.lease(d.Lease.ID); l.State != broker.LeaseActive {
			t.Errorf("after a restart a new lease is %s", l.State)
		}
		if n := len(r.events(lease.EventFilter{Type: audit.StoreRestored})); n != 1 {
			t.Errorf("it was restored %d times", n)
		}
	})
}

// TestRestoreIsResumed: a restore that fails, or is cut off, at any commit is
// carried through by the next start, and nothing is given before.
func TestRestoreIsResumed(t *testing.T) {
	for _, unknown := range []bool{false, true} {
		for n := 1; ; n++ {
			done := false
			bubble(t, func(t *testing.T) {
				r := newRig(t)
				r.grant(support, "db.read", 12*time.Hour)
				r.grant(support, "vault.read", 12*time.Hour)
				r.open(time.Hour, "crm.read", "db.read")
				var ids []broker.LeaseID
				for _, tool := range []string{"db.read", "vault.read", "crm.read"} {
					ids = append(ids, r.mustIssue(tool).Lease.ID)
				}
				backup := r.backUp()
				r.stop()
				r.putInPlace(backup)

				faulty := &faultyStore{}
				r.wrap = faulty.wrap
				r.openStore()
				faulty.failNth(n, unknown)
				e, err := lease.New(context.Background(), lease.Config{Store: r.db, Catalog: r.snapshot(), Drivers: r.drivers,
					Log: slog.New(slog.NewJSONHandler(r.logs, nil))})
				marked := false
				if verr := r.db.View(context.Background(), func(rd store.Reader) (err error) {
					_, marked, err = rd.Get("meta|restored")
					return err
				}); verr != nil {
					t.Fatal(verr)
				}
				if err == nil {
					if marked {
						t.Error("the engine serves, and the restore is not done")
					}
					done = true
					e.Close()
				}
				if err := r.db.Close(); err != nil {
					t.Fatal(err)
				}
				r.wrap = nil
				r.start()
				for _, tool := range []string{"db.read", "vault.read", "crm.read"} {
					_, err := r.issue(tool)
					r.wantReason(err, broker.ReasonNoGrant)
				}
				for _, id := range ids {
					if l := r.wantState(id, broker.LeaseRevoked, time.Minute); l.Cause != broker.CauseRestored {
						t.Errorf("failure of commit %d: %s ended for %q", n, l.Tool, l.Cause)
					}
					if events := r.events(lease.EventFilter{Lease: id, Type: audit.LeaseRevoking}); len(events) != 1 {
						t.Errorf("failure of commit %d: %d events of its end", n, len(events))
					}
				}
				if events := r.events(lease.EventFilter{Type: audit.StoreRestored}); len(events) != 1 {
					t.Errorf("failure of commit %d: %d events of the restore", n, len(events))
				}
			})
			if done {
				if n < 5 {
					t.Errorf("only %d commits were made to fail", n-1)
				}
				break
			}
		}
	}
}

// TestRestoreOfWhatWasBeingMade: a lease that was being made when the backup
// was, and whose handle came later, is not said to be dead while it may live,
// although a provider without its handle knows of nothing.
func TestRestoreOfWhatWasBeingMade(t *testing.T) {
	for _, listing := range []bool{false, true} {
		bubble(t, func(t *testing.T) {
			r := newRig(t)
			if listing {
				r = inventoryRig(t, nil)
			}
			r.grant(support, "vault.read", 12*time.Hour)
			r.world.SetScript(providertest.Rules(1, providertest.Rule{Op: providertest.OpSession, Fault: providertest.Fault{Delay: 5 * time.Second}}))
			made := make(chan *lease.Delivery, 1)
			go func() { d, _ := r.issue("vault.read", ttl(10*time.Minute)); made <- d }()
			time.Sleep(time.Second)
			backup := r.backUp()
			d := <-made
			if d == nil {
				t.Fatal("no lease was made")
			}
			secret := d.Secret.RevealAll()["password"]
			r.stop()
			r.putInPlace(backup)
			r.start()
			for range 10 {
				time.Sleep(30 * time.Second)
				if l := r.lease(d.Lease.ID); r.world.Works(secret) && l.State != broker.LeaseRevoking {
					t.Fatalf("the credential works and its lease is %s", l.State)
				}
			}
			if r.world.Works(secret) == listing {
				t.Errorf("with an inventory %v: the credential works: %v", listing, !listing)
			}
			if l := r.lease(d.Lease.ID); l.State != broker.LeaseRevoking || !l.Overdue(r.engine.Now()) {
				t.Errorf("it is %s", l.State)
			}
			time.Sleep(6*time.Minute + 10*time.Second)
			if l := r.lease(d.Lease.ID); l.State != broker.LeaseExpired || r.world.Works(secret) {
				t.Errorf("after its end it is %s", l.State)
			}
		})
	}
}

// TestMarkBackup: only what a broker has used is a backup.
func TestMarkBackup(t *testing.T) {
	db, err := bolt.Open(filepath.Join(t.TempDir(), "new.db"), bolt.Config{MmapSize: 64 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if err := lease.MarkBackup(context.Background(), db, time.Now(), "uid:7"); err == nil {
		t.Error("an empty store was marked")
	}
}
