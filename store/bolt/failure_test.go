package bolt

import (
	"errors"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"

	"go.etcd.io/bbolt"

	"github.com/mayfly-security/mayfly/store"
)

// failure is what three callers of one batch are told when its commit fails.
type failure struct {
	writer, refused, reader error
}

var errRefused = errors.New("refused because of what a neighbour wrote")

func failTogether(t *testing.T, db *DB, commit func(*bbolt.Tx) error) (f failure) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		db.commit = commit
		release := make(chan struct{})
		var wg sync.WaitGroup
		wg.Go(func() {
			f.writer = db.Update(t.Context(), func(tx store.Txn) error {
				<-release
				return tx.Put("k", []byte("new"))
			})
		})
		synctest.Wait()
		wg.Go(func() {
			f.refused = db.Update(t.Context(), func(tx store.Txn) error {
				if v, _, _ := tx.Get("k"); string(v) != "new" {
					t.Errorf("a neighbour reads %q", v)
				}
				tx.Put("other", nil)
				return errRefused
			})
		})
		wg.Go(func() {
			f.reader = db.Update(t.Context(), func(tx store.Txn) error {
				_, _, err := tx.Get("k")
				return err
			})
		})
		synctest.Wait()
		close(release)
		wg.Wait()
	})
	db.commit = (*bbolt.Tx).Commit
	return f
}

func wantError(t *testing.T, who string, err error, is ...error) {
	t.Helper()
	for _, e := range []error{store.ErrUnavailable, store.ErrUnknown, errRefused} {
		want := false
		for _, w := range is {
			want = want || w == e
		}
		if errors.Is(err, e) != want {
			t.Errorf("%s: %v: is it %q? %v, want %v", who, err, e, !want, want)
		}
	}
}

// TestRefusalWaitsForItsReason: a caller who is refused because of what a
// neighbour wrote is not told so before that is committed.
func TestRefusalWaitsForItsReason(t *testing.T) {
	f := failTogether(t, newDB(t), (*bbolt.Tx).Commit)
	wantError(t, "writer", f.writer)
	wantError(t, "refused", f.refused, errRefused)
	wantError(t, "reader", f.reader)
}

func TestCommitFailsBeforeTheMetaPage(t *testing.T) {
	db := newDB(t)
	f := failTogether(t, db, func(tx *bbolt.Tx) error { return errors.Join(tx.Rollback(), syscall.ENOSPC) })
	wantError(t, "writer", f.writer, store.ErrUnavailable)
	wantError(t, "refused", f.refused, store.ErrUnavailable)
	wantError(t, "reader", f.reader, store.ErrUnavailable)
	if !errors.Is(f.writer, syscall.ENOSPC) {
		t.Errorf("the writer's error does not have its cause: %v", f.writer)
	}
	f = failTogether(t, db, (*bbolt.Tx).Commit)
	wantError(t, "writer, when there is room again", f.writer)
}

// TestCommitFailsAfterTheMetaPage stands in for a sync of the meta page that
// fails: the kernel has the page, and bbolt returns an error.
func TestCommitFailsAfterTheMetaPage(t *testing.T) {
	db := newDB(t)
	f := failTogether(t, db, func(tx *bbolt.Tx) error { return errors.Join(tx.Commit(), syscall.EIO) })
	wantError(t, "writer", f.writer, store.ErrUnavailable, store.ErrUnknown)
	wantError(t, "refused", f.refused, store.ErrUnavailable)
	wantError(t, "reader", f.reader, store.ErrUnavailable)
	wantBroken(t, db)
}

func TestCommitPanics(t *testing.T) {
	db := newDB(t)
	f := failTogether(t, db, func(*bbolt.Tx) error { panic("page 7 already freed") })
	wantError(t, "writer", f.writer, store.ErrUnavailable, store.ErrUnknown)
	wantError(t, "refused", f.refused, store.ErrUnavailable)
	wantBroken(t, db)
}

// wantBroken wants everything to be refused until the store is opened again.
func wantBroken(t *testing.T, db *DB) {
	t.Helper()
	_, errBackup := db.WriteTo(nil)
	for what, err := range map[string]error{
		"Update":  db.Update(t.Context(), func(tx store.Txn) error { return tx.Put("k", nil) }),
		"View":    db.View(t.Context(), func(store.Reader) error { return nil }),
		"Check":   db.Check(t.Context()),
		"WriteTo": errBackup,
	} {
		wantError(t, what, err, store.ErrUnavailable)
		if err == nil || !strings.Contains(err.Error(), "restart") {
			t.Errorf("%s = %v, want it to say what to do", what, err)
		}
	}
	if err := db.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
	again, err := Open(db.path, Config{LockWait: -1})
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if err := again.Update(t.Context(), func(tx store.Txn) error { return tx.Put("k", nil) }); err != nil {
		t.Errorf("Update after opening again: %v", err)
	}
	if err := again.Check(t.Context()); err != nil {
		t.Errorf("Check after opening again: %v", err)
	}
}

// TestWaitersOfABrokenStore: who waited for a turn while the store broke does
// not get to use it.
func TestWaitersOfABrokenStore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db := newDB(t)
		disk := make(chan struct{})
		db.commit = func(tx *bbolt.Tx) error { <-disk; return errors.Join(tx.Commit(), syscall.EIO) }
		var first error
		var wg sync.WaitGroup
		wg.Go(func() {
			first = db.Update(t.Context(), func(tx store.Txn) error { return tx.Put("k", nil) })
		})
		synctest.Wait()
		errs := make([]error, 5)
		for i := range errs {
			wg.Go(func() {
				errs[i] = db.Update(t.Context(), func(store.Txn) error {
					t.Error("a function ran in a broken store")
					return nil
				})
			})
		}
		synctest.Wait()
		close(disk)
		wg.Wait()
		wantError(t, "first", first, store.ErrUnavailable, store.ErrUnknown)
		for _, err := range errs {
			wantError(t, "a waiter", err, store.ErrUnavailable)
		}
	})
}
