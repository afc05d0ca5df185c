package storetest

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/mayfly-security/mayfly/store"
)

func testScan(t *testing.T, open Open) {
	s := fresh(t, open)
	scan := func(from, to string) (keys []string) {
		view(t, s, func(r store.Reader) error {
			keys = nil
			for e, err := range r.Scan(from, to) {
				if err != nil {
					return err
				}
				if want := "value of " + e.Key; string(e.Value) != want {
					t.Errorf("key %q comes with value %q", e.Key, e.Value)
				}
				keys = append(keys, e.Key)
			}
			return nil
		})
		return keys
	}
	if got := scan("", ""); len(got) != 0 {
		t.Errorf("an empty store has keys %q", got)
	}
	all := []string{"\x00", "a", "a\x00", "a\x00\x00", "ab", "b", "b\xff", "c", "\xfe", "\xff", "\xff\xff"}
	for i := range all { // in another order than theirs
		k := all[(i*7+3)%len(all)]
		put(t, s, k, "value of "+k)
	}
	bounds := append([]string{"", "a\x00\x00\x00", "aa", "bb", "zz", "\xff\xff\xff"}, all...)
	for _, from := range bounds {
		for _, to := range bounds {
			var want []string
			for _, k := range all {
				if k >= from && (to == "" || k < to) {
					want = append(want, k)
				}
			}
			if got := scan(from, to); !slices.Equal(got, want) {
				t.Errorf("Scan(%q, %q) = %q, want %q", from, to, got, want)
			}
		}
	}

	view(t, s, func(r store.Reader) error {
		seq := r.Scan("a", "")
		for range 2 { // an iterator may be used again, and left early
			n := 0
			for e := range seq {
				if n++; n == 3 {
					if e.Key != all[3] {
						t.Errorf("the third key is %q, want %q", e.Key, all[3])
					}
					break
				}
			}
		}
		for outer := range r.Scan("a", "c") { // two at a time
			for inner := range r.Scan(outer.Key, "") {
				if inner.Key != outer.Key {
					t.Errorf("Scan(%q) begins with %q", outer.Key, inner.Key)
				}
				break
			}
		}
		return nil
	})
}

func testScanPrefix(t *testing.T, open Open) {
	s := fresh(t, open)
	all := []string{"a", "lease", "lease/", "lease/1", "lease/\xff", "lease/\xff\xff\xff", "lease0", "m", "\xff", "\xff\x01", "\xff\xff", "\xff\xffz"}
	for _, k := range all {
		put(t, s, k, "")
	}
	for _, prefix := range []string{"", "a", "lease/", "lease/\xff", "lease", "nothing", "\xff", "\xff\xff"} {
		from, to := store.Prefix(prefix)
		var got, want []string
		view(t, s, func(r store.Reader) error {
			got = nil
			for e, err := range r.Scan(from, to) {
				if err != nil {
					return err
				}
				got = append(got, e.Key)
			}
			return nil
		})
		for _, k := range all {
			if strings.HasPrefix(k, prefix) {
				want = append(want, k)
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("Prefix(%q) gives %q, want %q", prefix, got, want)
		}
	}
}

func testLog(t *testing.T, open Open) {
	s := fresh(t, open)
	wantEntries(t, s, "log")
	update(t, s, func(tx store.Txn) error {
		for i := range 3 {
			if err := tx.Append("log", fmt.Append(nil, i)); err != nil {
				return err
			}
		}
		return tx.Append("log/other", []byte("apart"))
	})
	appendTo(t, s, "log", "3")
	put(t, s, "log", "a key of the same name")
	wantEntries(t, s, "log", "0", "1", "2", "3")
	wantEntries(t, s, "log/other", "apart")
	wantEntries(t, s, "lo")
	wantContents(t, s, map[string]string{"log": "a key of the same name"})

	values, numbers := entries(t, s, "log", 0)
	for i, n := range numbers {
		if n == 0 {
			t.Errorf("entry %d has number 0", i)
		}
		if got, _ := entries(t, s, "log", n); !slices.Equal(got, values[i+1:]) {
			t.Errorf("after %d there are %q, want %q", n, got, values[i+1:])
		}
		if got, _ := entries(t, s, "log", n-1); !slices.Equal(got, values[i:]) {
			t.Errorf("after %d there are %q, want %q", n-1, got, values[i:])
		}
	}
	if got, _ := entries(t, s, "log", 1<<64-1); len(got) != 0 {
		t.Errorf("after the last of all numbers there are %q", got)
	}
	view(t, s, func(r store.Reader) error {
		for e := range r.Log("log", 0) {
			if string(e.Value) == "1" {
				break
			}
		}
		return nil
	})
}
