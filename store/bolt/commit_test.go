package bolt

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"

	"go.etcd.io/bbolt"

	"github.com/mayfly-security/mayfly/store"
)

// In a bubble of synctest, synctest.Wait returns when all others wait for
// something in the bubble: a turn, a commit, or a channel of the test.

func newDB(t *testing.T) *DB {
	t.Helper()
	db, err := Open(filepath.Join(t.TempDir(), "store.db"), Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return db
}

// hold begins an Update that keeps the turn until release is closed.
func hold(t *testing.T, db *DB, wg *sync.WaitGroup) (release chan struct{}) {
	t.Helper()
	release = make(chan struct{})
	wg.Go(func() {
		err := db.Update(t.Context(), func(tx store.Txn) error {
			<-release
			return tx.Put("holder", nil)
		})
		if err != nil {
			t.Errorf("the holder of the turn: %v", err)
		}
	})
	synctest.Wait()
	return release
}

func countCommits(db *DB) *int {
	n := new(int)
	db.commit = func(tx *bbolt.Tx) error { *n++; return tx.Commit() }
	return n
}

func keyCount(t *testing.T, db *DB, prefix string) (n int) {
	t.Helper()
	err := db.View(context.Background(), func(r store.Reader) error {
		for _, err := range r.Scan(store.Prefix(prefix)) {
			if err != nil {
				return err
			}
			n++
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	return n
}

func TestCallersShareACommit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db := newDB(t)
		commits := countCommits(db)
		var wg sync.WaitGroup
		release := hold(t, db, &wg)
		const callers = 100
		runs := make([]int, callers)
		errRefused := errors.New("refused")
		for i := range callers {
			wg.Go(func() {
				defer func() { recover() }()
				err := db.Update(t.Context(), func(tx store.Txn) error {
					runs[i]++
					err := tx.Put(fmt.Sprint("k/", i), nil)
					switch i % 4 {
					case 1:
						return errRefused
					case 2:
						panic("in fn")
					case 3:
						runtime.Goexit()
					}
					return err
				})
				if (i%4 == 1) != (err == errRefused) {
					t.Errorf("caller %d: %v", i, err)
				}
			})
		}
		synctest.Wait()
		close(release)
		wg.Wait()
		if *commits != 1 {
			t.Errorf("there were %d commits for callers that all waited, want 1", *commits)
		}
		if got := keyCount(t, db, "k/"); got != callers/4 {
			t.Errorf("there are %d keys, want %d", got, callers/4)
		}
		for i, n := range runs {
			if n != 1 {
				t.Errorf("the function of caller %d ran %d times", i, n)
			}
		}
	})
}

func TestBatchesAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db := newDB(t)
		commits := countCommits(db)
		var wg sync.WaitGroup
		release := hold(t, db, &wg)
		for i := range 2*maxBatchCalls - 1 {
			wg.Go(func() {
				if err := db.Update(t.Context(), func(tx store.Txn) error { return tx.Put(fmt.Sprint("k/", i), nil) }); err != nil {
					t.Error(err)
				}
			})
		}
		synctest.Wait()
		close(release)
		wg.Wait()
		if *commits != 2 {
			t.Errorf("there were %d commits for two full batches", *commits)
		}

		*commits = 0
		release = hold(t, db, &wg)
		for i := range 4 {
			wg.Go(func() {
				if err := db.Update(t.Context(), func(tx store.Txn) error {
					var errs []error
					for j := range 4 {
						errs = append(errs, tx.Put(fmt.Sprint("large/", i, j), make([]byte, maxBatchBytes/8)))
					}
					return errors.Join(errs...)
				}); err != nil {
					t.Error(err)
				}
			})
		}
		synctest.Wait()
		close(release)
		wg.Wait()
		if *commits != 2 {
			t.Errorf("there were %d commits for twice the bytes of a batch, want 2", *commits)
		}
	})
}

// TestNextBatchGathersDuringCommit: a slow disk makes batches larger.
func TestNextBatchGathersDuringCommit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db := newDB(t)
		var commits int
		disk := make(chan struct{})
		db.commit = func(tx *bbolt.Tx) error { commits++; <-disk; return tx.Commit() }
		var wg sync.WaitGroup
		for i := range 20 {
			wg.Go(func() {
				if err := db.Update(t.Context(), func(tx store.Txn) error { return tx.Put(fmt.Sprint("k/", i), nil) }); err != nil {
					t.Error(err)
				}
			})
			if i == 0 {
				synctest.Wait()
			}
		}
		synctest.Wait()
		if n := keyCount(t, db, "k/"); n != 0 {
			t.Errorf("a View sees %d keys before their commit", n)
		}
		close(disk)
		wg.Wait()
		if commits != 2 {
			t.Errorf("there were %d commits, want one and one for all who came during it", commits)
		}
	})
}

func TestReadersDoNotCommit(t *testing.T) {
	db := newDB(t)
	commits := countCommits(db)
	errRefused := errors.New("refused")
	err := db.Update(t.Context(), func(tx store.Txn) error { _, _, err := tx.Get("k"); return err })
	err2 := db.Update(t.Context(), func(tx store.Txn) error { tx.Put("k", nil); return errRefused })
	if err != nil || err2 != errRefused || *commits != 0 {
		t.Errorf("reading gave %v, a refusal %v, with %d commits", err, err2, *commits)
	}
}

func TestContextBoundsTheWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db := newDB(t)
		var wg sync.WaitGroup
		release := hold(t, db, &wg)
		ctx, cancel := context.WithCancel(t.Context())
		results := make(chan error, 3)
		try := func(ctx context.Context, key string) {
			go func() {
				results <- db.Update(ctx, func(tx store.Txn) error { return tx.Put(key, nil) })
			}()
			synctest.Wait()
		}
		try(ctx, "k/impatient")
		try(t.Context(), "k/patient")
		go func() { results <- db.Check(ctx) }()
		synctest.Wait()
		cancel()
		synctest.Wait()
		for range 2 { // while the turn is still held
			if err := <-results; !errors.Is(err, context.Canceled) {
				t.Errorf("Update = %v, want %v", err, context.Canceled)
			}
		}
		close(release)
		wg.Wait()
		if err := <-results; err != nil {
			t.Errorf("who waited behind the one that gave up: %v", err)
		}
		if n := keyCount(t, db, "k/"); n != 1 {
			t.Errorf("there are %d keys, want 1", n)
		}
	})
}

func TestFirstComeFirstServed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db := newDB(t)
		var wg sync.WaitGroup
		release := hold(t, db, &wg)
		var want []string
		for i := range 10 {
			want = append(want, fmt.Sprint(i))
			wg.Go(func() {
				if err := db.Update(t.Context(), func(tx store.Txn) error { return tx.Append("log", fmt.Append(nil, i)) }); err != nil {
					t.Error(err)
				}
			})
			synctest.Wait()
		}
		var found error
		wg.Go(func() { found = db.Check(t.Context()) }) // in the same batch, after writers
		synctest.Wait()
		close(release)
		wg.Wait()
		if found != nil {
			t.Errorf("Check in a batch of others: %v", found)
		}
		var got []string
		db.View(t.Context(), func(r store.Reader) error {
			for e := range r.Log("log", 0) {
				got = append(got, string(e.Value))
			}
			return nil
		})
		if !slices.Equal(got, want) {
			t.Errorf("the order was %q, want %q", got, want)
		}
	})
}

// TestCloseWaitsForTheQueue: who has called before Close is served.
func TestCloseWaitsForTheQueue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db := newDB(t)
		var wg sync.WaitGroup
		release := hold(t, db, &wg)
		for i := range 5 {
			wg.Go(func() {
				if err := db.Update(t.Context(), func(tx store.Txn) error { return tx.Put(fmt.Sprint("k/", i), nil) }); err != nil {
					t.Error(err)
				}
			})
		}
		synctest.Wait()
		var closed atomic.Int32
		for range 2 {
			wg.Go(func() {
				if err := db.Close(); err != nil {
					t.Error(err)
				}
				closed.Add(1)
			})
			synctest.Wait()
		}
		if n := closed.Load(); n != 0 {
			t.Errorf("%d calls of Close returned while others ran", n)
		}
		if err := db.Update(t.Context(), func(store.Txn) error { return nil }); err != store.ErrClosed {
			t.Errorf("Update while Close waits = %v, want %v", err, store.ErrClosed)
		}
		close(release)
		wg.Wait()
		again, err := Open(db.path, Config{LockWait: -1})
		if err != nil {
			t.Fatal(err)
		}
		defer again.Close()
		if n := keyCount(t, again, "k/"); n != 5 {
			t.Errorf("there are %d keys, want 5", n)
		}
	})
}

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
