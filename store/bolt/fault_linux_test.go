package bolt_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/mayfly-security/mayfly/store"
	"github.com/mayfly-security/mayfly/store/bolt"
)

const childDir = "MAYFLY_BOLT_TEST_DIR" // in the environment of a child: where its store is

// inChild runs the rest of the test in a process of its own, because what it
// does there cannot be undone, or would disturb other tests. It returns the
// directory of the store, and false in the parent when the child has passed.
func inChild(t *testing.T) (dir string, child bool) {
	t.Helper()
	if dir := os.Getenv(childDir); dir != "" {
		return dir, true
	}
	dir = t.TempDir()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self, "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), childDir+"="+dir, "GORACE=atexit_sleep_ms=0")
	out, err := cmd.CombinedOutput()
	if err != nil || !bytes.Contains(out, []byte("--- PASS: "+t.Name())) {
		t.Fatalf("in the child: %v\n%s", err, out)
	}
	return dir, false
}

func try(t *testing.T, db *bolt.DB, key string, size int) error {
	t.Helper()
	return db.Update(t.Context(), func(tx store.Txn) error {
		return errors.Join(tx.Put(key, make([]byte, size)), tx.Append("log", []byte(key)))
	})
}

// wantKept wants exactly the keys, each with its entry in the log.
func wantKept(t *testing.T, db *bolt.DB, want []string) {
	t.Helper()
	var log []string
	err := db.View(t.Context(), func(r store.Reader) error {
		for e, err := range r.Log("log", 0) {
			if err != nil {
				return err
			}
			log = append(log, string(e.Value))
			if _, ok, err := r.Get(string(e.Value)); err != nil || !ok {
				return fmt.Errorf("key %s: %v, %w", e.Value, ok, err)
			}
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	if strings.Join(log, " ") != strings.Join(want, " ") {
		t.Errorf("the store has %q, want %q", log, want)
	}
	if err := db.Check(t.Context()); err != nil {
		t.Errorf("Check: %v", err)
	}
}

// TestDiskFull makes the disk full with a limit on the size of files: writes
// and growth beyond it fail, as they do on a full disk.
func TestDiskFull(t *testing.T) {
	dir, child := inChild(t)
	path := filepath.Join(dir, "store.db")
	if !child {
		wantKept(t, open(t, path), []string{"first", "small", "after", "grown"})
		return
	}
	signal.Ignore(syscall.SIGXFSZ)
	db := open(t, path)
	var before unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_FSIZE, &before); err != nil {
		t.Fatal(err)
	}
	limit := func(bytes uint64) {
		t.Helper()
		l := before
		l.Cur = bytes
		if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &l); err != nil {
			t.Fatal(err)
		}
	}
	wantFull := func(err error) {
		t.Helper()
		if !errors.Is(err, store.ErrUnavailable) || errors.Is(err, store.ErrUnknown) || !strings.Contains(err.Error(), "file too large") {
			t.Errorf("Update on a full disk = %v, want %v, and nothing unknown", err, store.ErrUnavailable)
		}
	}
	if err := try(t, db, "first", 100_000); err != nil {
		t.Fatal(err)
	}

	// The pages cannot be written.
	limit(64 << 10)
	for range 3 {
		wantFull(try(t, db, "large", 500_000))
		wantKept(t, db, []string{"first"})
	}
	limit(before.Cur)
	if err := try(t, db, "small", 500_000); err != nil {
		t.Errorf("Update when there is room again = %v", err)
	}

	// The file cannot grow.
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	limit(uint64(info.Size()))
	large := func() error {
		return db.Update(t.Context(), func(tx store.Txn) error {
			var errs []error
			for i := range 20 {
				errs = append(errs, tx.Put(fmt.Sprint("large/", i), make([]byte, store.MaxValue)))
			}
			return errors.Join(errs...)
		})
	}
	wantFull(large())
	wantKept(t, db, []string{"first", "small"})
	if err := try(t, db, "after", 100); err != nil {
		t.Errorf("a small Update, for which there is room = %v", err)
	}
	limit(before.Cur)
	if err := large(); err != nil {
		t.Errorf("a large Update when there is room again = %v", err)
	}
	if err := try(t, db, "grown", 100); err != nil {
		t.Error(err)
	}
	wantKept(t, db, []string{"first", "small", "after", "grown"})
}

func TestDiskFullAtOpen(t *testing.T) {
	dir, child := inChild(t)
	path := filepath.Join(dir, "store.db")
	if !child {
		put(t, open(t, path), "k", "v") // what the failure left is no obstacle
		return
	}
	signal.Ignore(syscall.SIGXFSZ)
	if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: 64 << 10, Max: 64 << 10}); err != nil {
		t.Fatal(err)
	}
	refused(t, path, store.ErrUnavailable, "file too large")
}

// TestNoAcknowledgementWithoutSync lets the kernel refuse every sync of a file.
func TestNoAcknowledgementWithoutSync(t *testing.T) {
	dir, child := inChild(t)
	path := filepath.Join(dir, "store.db")
	if !child {
		wantKept(t, open(t, path), []string{"first"})
		return
	}
	db := open(t, path)
	if err := try(t, db, "first", 10); err != nil {
		t.Fatal(err)
	}
	kernelRefuses(t, []unix.SockFilter{
		load(0),
		jumpUnless(unix.SYS_FDATASYNC, 1),
		refuse(unix.EIO),
		allow(),
	})
	wantCleanFailure(t, db)
	db.Close()
	refused(t, path, store.ErrUnavailable, "syncing") // what the process before left may not be on the disk
}

// TestMetaPageCannotBeWritten lets the kernel refuse writes to the beginning
// of a file, where bbolt has its meta pages.
func TestMetaPageCannotBeWritten(t *testing.T) {
	dir, child := inChild(t)
	path := filepath.Join(dir, "store.db")
	if !child {
		wantKept(t, open(t, path), []string{"first"})
		return
	}
	db := open(t, path)
	if err := try(t, db, "first", 10); err != nil {
		t.Fatal(err)
	}
	const offset = 16 + 3*8 // of the fourth argument, in struct seccomp_data
	kernelRefuses(t, []unix.SockFilter{
		load(0),
		jumpUnless(unix.SYS_PWRITE64, 4),
		load(offset), // the lower half, on little-endian machines; the file is small
		{Code: unix.BPF_JMP | unix.BPF_JGE | unix.BPF_K, K: uint32(2 * os.Getpagesize()), Jt: 2},
		refuse(unix.EIO),
		allow(),
		allow(),
	})
	wantCleanFailure(t, db)
}

func wantCleanFailure(t *testing.T, db *bolt.DB) {
	t.Helper()
	for range 3 {
		err := try(t, db, "second", 10)
		if !errors.Is(err, store.ErrUnavailable) || errors.Is(err, store.ErrUnknown) || !errors.Is(err, syscall.EIO) {
			t.Errorf("Update = %v, want %v, and nothing unknown", err, store.ErrUnavailable)
		}
		wantKept(t, db, []string{"first"})
	}
}

// kernelRefuses installs a seccomp filter for this process, for good. It needs
// no privilege.
func kernelRefuses(t *testing.T, filter []unix.SockFilter) {
	t.Helper()
	runtime.LockOSThread() // prctl holds for the thread, and the filter below for all
	defer runtime.UnlockOSThread()
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		t.Fatal(err)
	}
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	_, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&prog)))
	if errno != 0 {
		t.Fatalf("seccomp: %v", errno)
	}
}

func load(offset uint32) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: offset}
}

func jumpUnless(value uint32, skip uint8) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: value, Jf: skip}
}

func refuse(errno syscall.Errno) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(errno)}
}

func allow() unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW}
}

// TestUnwritableFile opens a file that may only be read, as a user who is not
// its owner's superior: the user of file accesses belongs to the thread.
func TestUnwritableFile(t *testing.T) {
	dir := t.TempDir()
	for _, d := range []string{dir, filepath.Dir(dir)} {
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	path := filepath.Join(dir, "store.db")
	open(t, path).Close()
	if err := os.Chmod(path, 0o440); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // not unlocked: the thread ends with the goroutine
		if os.Getuid() == 0 {
			if err := unix.Setfsuid(65534); err != nil {
				t.Error(err)
			}
		}
		refused(t, path, store.ErrUnavailable, "permission denied")
		refused(t, filepath.Join(dir, "new.db"), store.ErrUnavailable, "permission denied")
	}()
	<-done
}
