package bolt_test

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"go.etcd.io/bbolt"

	"github.com/mayfly-security/mayfly/store"
	"github.com/mayfly-security/mayfly/store/bolt"
)

// content is everything that a store has.
type content struct {
	keys map[string]string
	log  []string
}

func (c content) equal(d content) bool {
	return maps.Equal(c.keys, d.keys) && slices.Equal(c.log, d.log)
}

func contentOf(t *testing.T, db *bolt.DB) (c content, err error) {
	err = db.View(t.Context(), func(r store.Reader) error {
		c = content{keys: map[string]string{}}
		for e, err := range r.Scan("", "") {
			if err != nil {
				return err
			}
			c.keys[e.Key] = string(e.Value)
		}
		for e, err := range r.Log("log", 0) {
			if err != nil {
				return err
			}
			c.log = append(c.log, string(e.Value))
		}
		return nil
	})
	return c, err
}

// tearable makes a store of many pages of each kind, and returns its file, what
// is in it, and how many pages are used. No value is larger than a page: bbolt
// cannot tell what a page without a header of its own should have.
func tearable(t *testing.T) (path string, whole []byte, has content, pages int) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "store.db")
	db, err := bolt.Open(path, bolt.Config{MmapSize: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	for round := range 6 {
		for part := range 10 {
			err := db.Update(t.Context(), func(tx store.Txn) error {
				for i := range 40 {
					key := fmt.Sprintf("key/%04d", (part*40+i)*7%400)
					if err := tx.Put(key, bytes.Repeat([]byte{byte('a' + round)}, 100+i*13)); err != nil {
						return err
					}
				}
				if err := tx.Put(fmt.Sprintf("large/%d", part), bytes.Repeat([]byte("large"), 180)); err != nil {
					return err
				}
				if err := tx.Delete(fmt.Sprintf("large/%d", part-3)); err != nil {
					return err
				}
				return tx.Append("log", fmt.Appendf(nil, "event %d of %d %s", part, round, strings.Repeat("x", 200)))
			})
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	if has, err = contentOf(t, db); err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	raw(t, path, func(tx *bbolt.Tx) error { pages = int(tx.Size()) / os.Getpagesize(); return nil })
	if whole, err = os.ReadFile(path); err != nil {
		t.Fatal(err)
	}
	return path, whole, has, pages
}

// TestTornAtAnyPage damages each page of a store in turn. What is opened has
// everything; what has not is refused, and the words say what to do.
func TestTornAtAnyPage(t *testing.T) {
	path, whole, has, pages := tearable(t)
	size := os.Getpagesize()
	random := rand.New(rand.NewPCG(7, 7))
	noise := func(b []byte) {
		for i := range b {
			b[i] = byte(random.Uint32())
		}
	}
	if pages < 60 || pages*size > len(whole) {
		t.Fatalf("the store has %d pages in %d bytes", pages, len(whole))
	}
	// Of what is garbled within a page, part cannot be noticed: bbolt has no
	// sums of its pages. It may cost what lies there, and never a panic.
	within := func(name string) bool { return strings.HasPrefix(name, "within") }
	damages := map[string]func(b []byte, at int) []byte{
		"cut":                func(b []byte, at int) []byte { return b[:at] },
		"cut in the middle":  func(b []byte, at int) []byte { return b[:at+size/2] },
		"zero":               func(b []byte, at int) []byte { clear(b[at : at+size]); return b },
		"noise":              func(b []byte, at int) []byte { noise(b[at : at+size]); return b },
		"another page":       func(b []byte, at int) []byte { copy(b[at:at+size], b[(at+size)%(pages*size):]); return b },
		"within: the end":    func(b []byte, at int) []byte { noise(b[at+size/2 : at+size]); return b },
		"within: the middle": func(b []byte, at int) []byte { noise(b[at+size/4 : at+size/4+64]); return b },
		"within: the header": func(b []byte, at int) []byte { noise(b[at+8 : at+128]); return b },
		"within: a sector":   func(b []byte, at int) []byte { clear(b[at : at+512]); return b },
	}
	opened, silent := map[string]int{}, map[string]int{}
	for name, damage := range damages {
		for page := range pages {
			if name == "cut" && page == 0 {
				continue // nothing is left: a file that was just created looks the same
			}
			torn := filepath.Join(filepath.Dir(path), fmt.Sprintf("%s-%d.db", strings.ReplaceAll(name, ":", ""), page))
			write(t, torn, damage(bytes.Clone(whole), page*size), 0o600)
			err := openTorn(t, torn, func(db *bolt.DB) {
				opened[name]++
				got, err := contentOf(t, db)
				if err == nil && !got.equal(has) {
					silent[name]++
					if !within(name) {
						t.Errorf("%s of page %d: it has %d keys and %d entries of %d and %d, and does not say so", name, page, len(got.keys), len(got.log), len(has.keys), len(has.log))
					}
				}
			})
			if err != nil && !(strings.Contains(err.Error(), "damaged") && strings.Contains(err.Error(), "restore a backup")) && !within(name) {
				t.Errorf("%s of page %d: %v", name, page, err)
			}
			if err := os.Remove(torn); err != nil {
				t.Fatal(err)
			}
		}
	}
	t.Logf("of %d pages: opened %v, of these not noticed %v", pages, opened, silent)
	if opened["noise"] == 0 {
		t.Error("noise in a free page is no harm, and nothing was opened")
	}
	if opened["noise"] > pages/2 {
		t.Errorf("with noise in one of %d pages %d were opened", pages, opened["noise"])
	}
}

func openTorn(t *testing.T, path string, use func(*bolt.DB)) error {
	t.Helper()
	defer func() {
		if p := recover(); p != nil {
			t.Errorf("%s: panic: %v", filepath.Base(path), p)
		}
	}()
	db, err := bolt.Open(path, bolt.Config{LockWait: -1, MmapSize: 1 << 20})
	if err != nil {
		return err
	}
	defer db.Close()
	use(db)
	return nil
}

// TestDamagedWhileOpen: damage that comes while the store is open is told by
// what comes upon it, and by Check. It ends no process, and nothing is missing
// without a word.
func TestDamagedWhileOpen(t *testing.T) {
	path, whole, has, pages := tearable(t)
	size := os.Getpagesize()
	told, checked := 0, 0
	for page := 2; page < pages; page++ {
		torn := filepath.Join(filepath.Dir(path), fmt.Sprintf("%d.db", page))
		write(t, torn, whole, 0o600)
		err := openTorn(t, torn, func(db *bolt.DB) {
			f, err := os.OpenFile(torn, os.O_WRONLY, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if _, err := f.WriteAt(bytes.Repeat([]byte{0xff}, size), int64(page*size)); err != nil {
				t.Fatal(err)
			}
			got, err := contentOf(t, db)
			switch {
			case err == nil && !got.equal(has):
				t.Errorf("page %d is damaged, and something is missing without a word", page)
			case err != nil:
				told++
				if !errors.Is(err, store.ErrUnavailable) || !strings.Contains(err.Error(), "restore a backup") {
					t.Errorf("page %d: View = %v", page, err)
				}
			}
			errCheck := db.Check(t.Context())
			if errCheck != nil {
				checked++
			} else if err != nil {
				t.Errorf("page %d: View = %v, and Check finds nothing", page, err)
			}
			for key := range has.keys {
				err := db.Update(t.Context(), func(tx store.Txn) error {
					v, ok, err := tx.Get(key)
					if err == nil && (!ok || string(v) != has.keys[key]) {
						t.Errorf("page %d: key %s is not what it was", page, key)
					}
					return err
				})
				if err != nil && !errors.Is(err, store.ErrUnavailable) {
					t.Errorf("page %d: Update = %v", page, err)
				}
			}
			for i := range 5 { // what cannot be applied is not committed by half
				db.Update(t.Context(), func(tx store.Txn) error {
					return errors.Join(tx.Put(fmt.Sprintf("key/%04d", i*90), []byte("new")), tx.Append("log", []byte("new")))
				})
			}
		})
		if err != nil {
			t.Errorf("page %d: %v", page, err)
		}
		if err := os.Remove(torn); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("of %d pages: %d were told of by a View, %d by Check", pages-2, told, checked)
	if told == 0 || checked < told {
		t.Errorf("a View told of %d damaged pages, Check of %d", told, checked)
	}
}

// TestOlderStateIsRefused: bbolt would go on with the state before the last
// commit if the newer of its two first pages is damaged. Copying still works:
// a copy, once restored, gives nothing of before.
func TestOlderStateIsRefused(t *testing.T) {
	for page := range 2 {
		path := filepath.Join(t.TempDir(), "store.db")
		db := open(t, path)
		put(t, db, "k", "open")
		put(t, db, "k", "closed")
		db.Close()
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteAt([]byte{1, 2, 3, 4}, int64(page*os.Getpagesize()+60)); err != nil {
			t.Fatal(err)
		}
		f.Close()
		refused(t, path, nil, "damaged", "last change", "restore a backup", "back this file up")
		var copied bytes.Buffer
		if _, err := bolt.CopyTo(path, &copied); err != nil || copied.Len() == 0 {
			t.Errorf("copying it: %d bytes, %v", copied.Len(), err)
		}
	}
}
