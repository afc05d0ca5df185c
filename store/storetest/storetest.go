// Package storetest is the contract of package store as tests. Every
// implementation passes it, so that the engine works on each alike.
package storetest

import (
	"context"
	"errors"
	"maps"
	"os"
	"slices"
	"testing"

	"github.com/mayfly-security/mayfly/store"
)

// Open opens the store that lives in dir, which exists. A later call with the
// same dir, when the store before is closed or its process is dead, opens what
// that one left. It ends the test if it cannot. The suite closes the store.
type Open func(t testing.TB, dir string) store.Store

// Run runs the suite, as subtests of t.
//
// It starts the test binary again, to run only the test that called Run in a
// process that it then kills; what that test does before it calls Run is done
// there too.
//
// Where the store has a method Check(context.Context) error that looks for
// damage, it is called after what could do any.
func Run(t *testing.T, open Open) {
	if dir := os.Getenv(victimDir); dir != "" {
		victim(t, open(t, dir))
		return
	}
	for _, c := range []struct {
		name string
		test func(*testing.T, Open)
	}{
		{"Values", testValues},
		{"OwnWrites", testOwnWrites},
		{"Copies", testCopies},
		{"Limits", testLimits},
		{"LimitIsSticky", testLimitIsSticky},
		{"Scan", testScan},
		{"ScanPrefix", testScanPrefix},
		{"Log", testLog},
		{"LogOrder", testLogOrder},
		{"Snapshot", testSnapshot},
		{"ViewSeesReturnedUpdates", testViewSeesReturnedUpdates},
		{"Increments", testIncrements},
		{"WriteSkew", testWriteSkew},
		{"GuardKey", testGuardKey},
		{"ErrorRollsBackOnlyItself", testErrorRollsBackOnlyItself},
		{"PanicRollsBackOnlyItself", testPanicRollsBackOnlyItself},
		{"Context", testContext},
		{"AfterItsFunction", testAfterItsFunction},
		{"Close", testClose},
		{"CloseWaits", testCloseWaits},
		{"Reopen", testReopen},
		{"Crash", testCrash},
		{"Model", testModel},
		{"Linearizable", testLinearizable},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			c.test(t, open)
		})
	}
}

// fresh opens a new store that is closed, and found whole, at the end of the test.
func fresh(t *testing.T, open Open) store.Store {
	t.Helper()
	s := open(t, t.TempDir())
	t.Cleanup(func() {
		checkWhole(t, s)
		if err := s.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return s
}

func checkWhole(t testing.TB, s store.Store) {
	t.Helper()
	c, ok := s.(interface{ Check(context.Context) error })
	if !ok {
		return
	}
	if err := c.Check(context.Background()); err != nil && !errors.Is(err, store.ErrClosed) {
		t.Errorf("Check: %v", err)
	}
}

func update(t testing.TB, s store.Store, fn func(store.Txn) error) {
	t.Helper()
	if err := s.Update(t.Context(), fn); err != nil {
		t.Errorf("Update: %v", err)
	}
}

func view(t testing.TB, s store.Store, fn func(store.Reader) error) {
	t.Helper()
	if err := s.View(t.Context(), fn); err != nil {
		t.Errorf("View: %v", err)
	}
}

func put(t testing.TB, s store.Store, key, value string) {
	t.Helper()
	update(t, s, func(tx store.Txn) error { return tx.Put(key, []byte(value)) })
}

func appendTo(t testing.TB, s store.Store, log, value string) {
	t.Helper()
	update(t, s, func(tx store.Txn) error { return tx.Append(log, []byte(value)) })
}

// contents are all keys with their values, by one snapshot.
func contents(t testing.TB, s store.Store) map[string]string {
	t.Helper()
	m := make(map[string]string)
	view(t, s, func(r store.Reader) error {
		for e, err := range r.Scan("", "") {
			if err != nil {
				return err
			}
			m[e.Key] = string(e.Value)
		}
		return nil
	})
	return m
}

// entries are the values of a log's entries after a number. It also checks
// that the numbers grow.
func entries(t testing.TB, s store.Store, log string, after uint64) (values []string, numbers []uint64) {
	t.Helper()
	view(t, s, func(r store.Reader) error {
		values, numbers = nil, nil
		last := after
		for e, err := range r.Log(log, after) {
			if err != nil {
				return err
			}
			if e.Seq <= last {
				t.Errorf("log %s: number %d comes after %d", log, e.Seq, last)
			}
			last = e.Seq
			values = append(values, string(e.Value))
			numbers = append(numbers, e.Seq)
		}
		return nil
	})
	return values, numbers
}

func wantContents(t testing.TB, s store.Store, want map[string]string) {
	t.Helper()
	if got := contents(t, s); !maps.Equal(got, want) {
		t.Errorf("the store has %q, want %q", got, want)
	}
}

func wantEntries(t testing.TB, s store.Store, log string, want ...string) {
	t.Helper()
	if got, _ := entries(t, s, log, 0); !slices.Equal(got, want) {
		t.Errorf("log %s has %q, want %q", log, got, want)
	}
}
