package storetest

import (
	"errors"
	"strings"
	"testing"

	"github.com/mayfly-security/mayfly/store"
)

func testValues(t *testing.T, open Open) {
	s := fresh(t, open)
	wantContents(t, s, map[string]string{})
	put(t, s, "b", "2")
	put(t, s, "a", "1")
	put(t, s, "a\x00", "nul")
	put(t, s, "\xff\xff", "high")
	wantContents(t, s, map[string]string{"a": "1", "a\x00": "nul", "b": "2", "\xff\xff": "high"})

	put(t, s, "a", "")
	view(t, s, func(r store.Reader) error {
		if v, ok, err := r.Get("a"); !ok || len(v) != 0 || err != nil {
			t.Errorf("an empty value: Get = %q, %v, %v; want it to be there", v, ok, err)
		}
		if v, ok, err := r.Get("absent"); ok || err != nil {
			t.Errorf("an absent key: Get = %q, %v, %v", v, ok, err)
		}
		return nil
	})

	update(t, s, func(tx store.Txn) error {
		return errors.Join(tx.Delete("b"), tx.Delete("never there"))
	})
	wantContents(t, s, map[string]string{"a": "", "a\x00": "nul", "\xff\xff": "high"})
	put(t, s, "b", "again")
	wantContents(t, s, map[string]string{"a": "", "a\x00": "nul", "b": "again", "\xff\xff": "high"})
}

func testOwnWrites(t *testing.T, open Open) {
	s := fresh(t, open)
	put(t, s, "old", "1")
	update(t, s, func(tx store.Txn) error {
		want := func(key, value string, there bool) {
			t.Helper()
			if v, ok, err := tx.Get(key); string(v) != value || ok != there || err != nil {
				t.Errorf("Get(%s) = %q, %v, %v; want %q, %v", key, v, ok, err, value, there)
			}
		}
		want("old", "1", true)
		want("new", "", false)
		err := errors.Join(tx.Put("new", []byte("2")), tx.Put("old", nil))
		want("new", "2", true)
		want("old", "", true)
		err = errors.Join(err, tx.Delete("old"), tx.Delete("new"))
		want("old", "", false)
		want("new", "", false)
		err = errors.Join(err, tx.Put("new", []byte("3")))
		want("new", "3", true)
		return err
	})
	wantContents(t, s, map[string]string{"new": "3"})
}

// testCopies changes what it gave and what it got.
func testCopies(t *testing.T, open Open) {
	s := fresh(t, open)
	value, entry := []byte("value"), []byte("entry")
	update(t, s, func(tx store.Txn) error {
		copy(value, "value")
		copy(entry, "entry")
		err := errors.Join(tx.Put("k", value), tx.Append("log", entry))
		copy(value, "XXXXX")
		copy(entry, "XXXXX")
		got, _, _ := tx.Get("k")
		copy(got, "YYYYY")
		return err
	})
	var kept []byte
	view(t, s, func(r store.Reader) error {
		got, _, err := r.Get("k")
		copy(got, "ZZZZZ")
		kept, _, _ = r.Get("k")
		return err
	})
	update(t, s, func(tx store.Txn) error {
		got, _, err := tx.Get("k")
		copy(got, "ZZZZZ")
		return err
	})
	put(t, s, "other", "1")
	if string(kept) != "value" {
		t.Errorf("a value kept after View is %q", kept)
	}
	wantContents(t, s, map[string]string{"k": "value", "other": "1"})
	wantEntries(t, s, "log", "entry")
}

func testLimits(t *testing.T, open Open) {
	s := fresh(t, open)
	longest, largest := strings.Repeat("k", store.MaxKey), []byte(strings.Repeat("v", store.MaxValue))
	update(t, s, func(tx store.Txn) error {
		return errors.Join(tx.Put(longest, largest), tx.Append(longest, largest))
	})
	update(t, s, func(tx store.Txn) error {
		var errs []error
		for range store.MaxOps {
			errs = append(errs, tx.Append("log", nil))
		}
		return errors.Join(errs...)
	})

	for name, fn := range map[string]func(store.Txn) error{
		"Put of a long key":      func(tx store.Txn) error { return tx.Put(longest+"k", nil) },
		"Put of no key":          func(tx store.Txn) error { return tx.Put("", nil) },
		"Put of a large value":   func(tx store.Txn) error { return tx.Put("k", append(largest, 'v')) },
		"Get of a long key":      func(tx store.Txn) error { _, _, err := tx.Get(longest + "k"); return err },
		"Get of no key":          func(tx store.Txn) error { _, _, err := tx.Get(""); return err },
		"Delete of a long key":   func(tx store.Txn) error { return tx.Delete(longest + "k") },
		"Delete of no key":       func(tx store.Txn) error { return tx.Delete("") },
		"Append to a long name":  func(tx store.Txn) error { return tx.Append(longest+"k", nil) },
		"Append to no name":      func(tx store.Txn) error { return tx.Append("", nil) },
		"Append of a large one":  func(tx store.Txn) error { return tx.Append("log", append(largest, 'v')) },
		"one operation too many": func(tx store.Txn) error { return operations(tx, store.MaxOps+1) },
	} {
		if err := s.Update(t.Context(), fn); !errors.Is(err, store.ErrLimit) {
			t.Errorf("%s: Update = %v, want %v", name, err, store.ErrLimit)
		}
	}

	view(t, s, func(r store.Reader) error {
		if _, _, err := r.Get(longest + "k"); !errors.Is(err, store.ErrLimit) {
			t.Errorf("Get of a long key in View = %v, want %v", err, store.ErrLimit)
		}
		for e, err := range r.Log("", 0) {
			if !errors.Is(err, store.ErrLimit) {
				t.Errorf("Log of no name yields %v, %v; want %v", e, err, store.ErrLimit)
			}
		}
		return nil
	})
	wantContents(t, s, map[string]string{longest: string(largest)})
	wantEntries(t, s, longest, string(largest))
	wantEntries(t, s, "log", make([]string, store.MaxOps)...)
}

// operations makes n operations, of every kind.
func operations(tx store.Txn, n int) error {
	for i := range n {
		var err error
		switch i % 4 {
		case 0:
			err = tx.Put("k", nil)
		case 1:
			_, _, err = tx.Get("k")
		case 2:
			err = tx.Delete("k")
		case 3:
			err = tx.Append("log", nil)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// testLimitIsSticky: who overlooks an error must not get half of what it wanted.
func testLimitIsSticky(t *testing.T, open Open) {
	s := fresh(t, open)
	err := s.Update(t.Context(), func(tx store.Txn) error {
		tx.Put("half", nil)
		tx.Put("", nil)
		tx.Put("other half", nil)
		return nil
	})
	if !errors.Is(err, store.ErrLimit) {
		t.Errorf("Update = %v, want %v", err, store.ErrLimit)
	}
	wantContents(t, s, map[string]string{})
}
