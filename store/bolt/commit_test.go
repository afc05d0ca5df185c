package bolt

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
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
		errNo := errors.New("no")
		for i := range callers {
			wg.Go(func() {
				defer func() { recover() }()
				err := db.Update(t.Context(), func(tx store.Txn) error {
					runs[i]++
					err := tx.Put(fmt.Sprint("k/", i), nil)
					switch i % 4 {
					case 1:
						return errNo
					case 2:
						panic("in fn")
					case 3:
						runtime.Goexit()
					}
					return err
				})
				if (i%4 == 1) != (err == errNo) {
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
	errNo := errors.New("no")
	err := db.Update(t.Context(), func(tx store.Txn) error { _, _, err := tx.Get("k"); return err })
	err2 := db.Update(t.Context(), func(tx store.Txn) error { tx.Put("k", nil); return errNo })
	if err != nil || err2 != errNo || *commits != 0 {
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
