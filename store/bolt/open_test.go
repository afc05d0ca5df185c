package bolt_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.etcd.io/bbolt"

	"github.com/mayfly-security/mayfly/store"
	"github.com/mayfly-security/mayfly/store/bolt"
	"github.com/mayfly-security/mayfly/store/storetest"
)

func TestStore(t *testing.T) {
	storetest.Run(t, func(t testing.TB, dir string) store.Store {
		return open(t, filepath.Join(dir, "store.db"))
	})
}

func open(t testing.TB, path string) *bolt.DB {
	t.Helper()
	db, err := bolt.Open(path, bolt.Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return db
}

func put(t testing.TB, db *bolt.DB, key, value string) {
	t.Helper()
	err := db.Update(t.Context(), func(tx store.Txn) error { return tx.Put(key, []byte(value)) })
	if err != nil {
		t.Fatal(err)
	}
}

func get(t testing.TB, db *bolt.DB, key string) string {
	t.Helper()
	var value []byte
	err := db.View(t.Context(), func(r store.Reader) (err error) {
		value, _, err = r.Get(key)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return string(value)
}

// refused opens what must be refused, and looks for words that help.
func refused(t *testing.T, path string, is error, words ...string) {
	t.Helper()
	db, err := bolt.Open(path, bolt.Config{LockWait: -1})
	if err == nil {
		db.Close()
		t.Fatalf("%s was opened", path)
	}
	if is != nil && !errors.Is(err, is) {
		t.Errorf("Open = %v, want %v", err, is)
	}
	for _, w := range append(words, path) {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("Open = %v, want it to say %q", err, w)
		}
	}
}

func TestFileModeIs0600(t *testing.T) {
	path := filepath.Join(t.TempDir(), "store.db")
	open(t, path)
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode() != 0o600 {
		t.Errorf("the file has mode %v", info.Mode())
	}
}

func TestOpenRefuses(t *testing.T) {
	t.Run("no directory", func(t *testing.T) {
		refused(t, filepath.Join(t.TempDir(), "missing", "store.db"), os.ErrNotExist, "create", "missing with mode 0700")
	})
	t.Run("a file as directory", func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "file")
		write(t, file, nil, 0o600)
		refused(t, filepath.Join(file, "store.db"), nil, "is not a directory")
	})
	t.Run("a directory", func(t *testing.T) {
		refused(t, t.TempDir(), nil, "not a regular file")
	})
	t.Run("no path", func(t *testing.T) {
		refused(t, "", nil, "no path")
	})
	t.Run("a file for everybody", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "store.db")
		open(t, path).Close()
		for _, mode := range []os.FileMode{0o604, 0o602} {
			if err := os.Chmod(path, mode); err != nil {
				t.Fatal(err)
			}
			refused(t, path, nil, "chmod 600")
		}
		if err := os.Chmod(path, 0o660); err != nil {
			t.Fatal(err)
		}
		open(t, path) // as Kubernetes leaves it
	})
	t.Run("another kind of file", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "store.db")
		write(t, path, bytes.Repeat([]byte("not a store "), 10000), 0o600)
		refused(t, path, nil, "damaged", "not a store", "restore a backup")
	})
	t.Run("another program's bbolt file", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "store.db")
		raw(t, path, func(tx *bbolt.Tx) error {
			_, err := tx.CreateBucket([]byte("theirs"))
			return err
		})
		refused(t, path, nil, "not a store")
	})
	t.Run("an unknown part", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "store.db")
		open(t, path).Close()
		raw(t, path, func(tx *bbolt.Tx) error {
			_, err := tx.CreateBucket([]byte("theirs"))
			return err
		})
		refused(t, path, nil, "unknown part", "theirs")
	})
	t.Run("a newer format", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "store.db")
		db := open(t, path)
		put(t, db, "k", "v")
		db.Close()
		setFormat(t, path, "2")
		refused(t, path, store.ErrNewer, "format 2", "up to 1", "run the newer version again", "backup")
		setFormat(t, path, "one")
		refused(t, path, nil, "damaged", "one")
		setFormat(t, path, "1")
		if got := get(t, open(t, path), "k"); got != "v" {
			t.Errorf("after the refusals the key has %q", got)
		}
	})
	t.Run("a file cut short", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "store.db")
		db := open(t, path)
		for i := range 20 {
			put(t, db, strings.Repeat("k", i+1), strings.Repeat("v", 100_000))
		}
		for range 10 { // moves what is read first to free pages near the beginning
			put(t, db, "k", "v")
		}
		db.Close()
		var used int64 // of the file, which is larger
		raw(t, path, func(tx *bbolt.Tx) error { used = tx.Size(); return nil })
		whole, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		lastPage := path + "-last"
		write(t, lastPage, whole[:used-1], 0o600)
		refused(t, lastPage, nil, "damaged", "bytes of")
		for i, size := range []int{1 << 20, 16 << 10, 8 << 10, 100} {
			short := fmt.Sprint(path, i) // bbolt leaves some of them locked
			write(t, short, whole[:size], 0o600)
			refused(t, short, nil, "damaged", "restore a backup")
		}
	})
}

func write(t *testing.T, path string, b []byte, mode os.FileMode) {
	t.Helper()
	if err := os.WriteFile(path, b, mode); err != nil {
		t.Fatal(err)
	}
}

// raw changes a file past the store.
func raw(t *testing.T, path string, fn func(*bbolt.Tx) error) {
	t.Helper()
	db, err := bbolt.Open(path, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if err := db.Update(fn); err != nil {
		t.Fatal(err)
	}
}

func setFormat(t *testing.T, path, format string) {
	t.Helper()
	raw(t, path, func(tx *bbolt.Tx) error { return tx.Bucket([]byte("meta")).Put([]byte("format"), []byte(format)) })
}

func TestOneProcessAtATime(t *testing.T) {
	path := filepath.Join(t.TempDir(), "store.db")
	db := open(t, path)
	put(t, db, "k", "v")
	refused(t, path, store.ErrInUse, "stop the other process")

	opened := make(chan *bolt.DB)
	go func() {
		second, err := bolt.Open(path, bolt.Config{LockWait: time.Minute})
		if err != nil {
			t.Errorf("waiting for the lock: %v", err)
		}
		opened <- second
	}()
	put(t, db, "k", "last")
	db.Close()
	second := <-opened
	defer second.Close()
	if got := get(t, second, "k"); got != "last" {
		t.Errorf("who waited for the lock reads %q", got)
	}
}

// TestEmptyFile: the process before may have died between creating the file
// and filling it.
func TestEmptyFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "store.db")
	write(t, path, nil, 0o600)
	open(t, path).Close()

	path = filepath.Join(t.TempDir(), "store.db")
	raw(t, path, func(*bbolt.Tx) error { return nil })
	put(t, open(t, path), "k", "v")
}

func TestBackup(t *testing.T) {
	dir := t.TempDir()
	db := open(t, filepath.Join(dir, "store.db"))
	put(t, db, "before", strings.Repeat("v", 50_000))

	// Others go on while it is written: the writer below is one of them.
	var backup bytes.Buffer
	n, err := db.WriteTo(writerFunc(func(b []byte) (int, error) {
		put(t, db, "after", "v")
		put(t, db, "before", "changed")
		return backup.Write(b)
	}))
	if err != nil || n != int64(backup.Len()) {
		t.Fatalf("WriteTo = %d, %v; it wrote %d bytes", n, err, backup.Len())
	}
	path := filepath.Join(dir, "restored.db")
	write(t, path, backup.Bytes(), 0o600)
	restored := open(t, path)
	if got := get(t, restored, "before"); got != strings.Repeat("v", 50_000) {
		t.Errorf("the restored key has %d bytes", len(got))
	}
	if got := get(t, restored, "after"); got != "" {
		t.Errorf("the backup has %q, which came after it began", got)
	}
	if err := restored.Check(context.Background()); err != nil {
		t.Errorf("Check of the restored store: %v", err)
	}

	errFull := errors.New("tape is full")
	if _, err := db.WriteTo(writerFunc(func([]byte) (int, error) { return 0, errFull })); err == nil || !strings.Contains(err.Error(), errFull.Error()) {
		t.Errorf("WriteTo to a full tape = %v", err)
	}
	db.Close()
	if _, err := db.WriteTo(&backup); !errors.Is(err, store.ErrClosed) {
		t.Errorf("WriteTo after Close = %v, want %v", err, store.ErrClosed)
	}
	if err := db.Check(t.Context()); !errors.Is(err, store.ErrClosed) {
		t.Errorf("Check after Close = %v, want %v", err, store.ErrClosed)
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(b []byte) (int, error) { return f(b) }

func TestCheckFindsDamage(t *testing.T) {
	path := filepath.Join(t.TempDir(), "store.db")
	db := open(t, path)
	err := db.Update(t.Context(), func(tx store.Txn) error { return tx.Append("log", []byte("v")) })
	if err != nil {
		t.Fatal(err)
	}
	if err := db.Check(t.Context()); err != nil {
		t.Errorf("Check = %v", err)
	}
	db.Close()
	raw(t, path, func(tx *bbolt.Tx) error {
		return tx.Bucket([]byte("log/log")).Put(bytes.Repeat([]byte{9}, 8), nil)
	})
	refused(t, path, nil, "damaged", "sequence")
}
