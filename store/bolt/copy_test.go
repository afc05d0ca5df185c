package bolt_test

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/mayfly-security/mayfly/store"
	"github.com/mayfly-security/mayfly/store/bolt"
)

// TestCopyTo: a store that nobody has open is copied whole and not touched;
// what is in use, damaged, empty or not there is told.
func TestCopyTo(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "store.db")
	db := open(t, path)
	put(t, db, "a", "1")
	if _, err := bolt.CopyTo(path, io.Discard); !errors.Is(err, store.ErrInUse) {
		t.Errorf("a store in use: %v", err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, 0o400); err != nil {
		t.Fatal(err)
	}
	var copied bytes.Buffer
	if n, err := bolt.CopyTo(path, &copied); err != nil || n != int64(copied.Len()) || n == 0 {
		t.Fatalf("%d bytes, %v", n, err)
	}
	if after, err := os.ReadFile(path); err != nil || !bytes.Equal(before, after) {
		t.Errorf("the store was changed (%v)", err)
	}
	again := filepath.Join(dir, "again.db")
	if err := os.WriteFile(again, copied.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := get(t, open(t, again), "a"); got != "1" {
		t.Errorf("the copy has %q", got)
	}

	if _, err := bolt.CopyTo(path, failing{}); err == nil {
		t.Error("a writer that fails is no error")
	}
	if _, err := bolt.CopyTo(filepath.Join(dir, "nothing.db"), io.Discard); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("what is not there: %v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, "nothing.db")); err == nil {
		t.Error("it was created")
	}
	torn := filepath.Join(dir, "torn.db")
	if err := os.WriteFile(torn, before[:3*os.Getpagesize()], 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := bolt.CopyTo(torn, io.Discard); err == nil {
		t.Error("a torn file was copied")
	}
}

type failing struct{}

func (failing) Write([]byte) (int, error) { return 0, errors.New("no room") }
