package testbed

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// remains is what a process that is about to be killed has running.
type remains struct {
	Place    string
	Pids     []int
	Segments []int // of shared memory
}

const victim = "MAYFLY_TESTBED_VICTIM"

// A process with a Vault, a PostgreSQL and a paused PostgreSQL is killed:
// everything that it started ends, and the next one removes its folder.
func TestNothingStaysBehindWhenKilled(t *testing.T) {
	if os.Getenv(victim) != "" {
		beVictim(t)
		return
	}
	t.Parallel()
	// The orphans become ours, and so stay in a session where somebody could
	// continue them: without that, Linux itself would continue a stopped
	// orphan, as it does on a machine but not in many a container.
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0) }()
	root, err := os.MkdirTemp("/tmp", "mayfly-victim-") // short, for sockets
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(root)
	if err := os.Chmod(root, 0o711); err != nil { // PostgreSQL's user passes through it
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0], "-test.run=^TestNothingStaysBehindWhenKilled$")
	cmd.Env = append(os.Environ(), victim+"=1", "TMPDIR="+root)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var left remains
	err = json.NewDecoder(out).Decode(&left)
	lived := 0 // a worker of PostgreSQL's may have ended by itself
	for _, pid := range left.Pids {
		if state, _ := stat(pid); state != 0 {
			lived++
		}
	}
	if err := errors.Join(err, cmd.Process.Kill()); err != nil {
		t.Fatalf("%v: %s", err, &stderr)
	}
	_ = cmd.Wait()
	for _, pid := range left.Pids {
		if err := gone(pid); err != nil {
			t.Error(err)
		}
	}
	if lived < 10 || len(left.Segments) != 2 {
		t.Fatalf("the process had %d servers' processes and %d segments; want more", lived, len(left.Segments))
	}
	for deadline := time.Now().Add(stopTime); ; time.Sleep(10 * time.Millisecond) {
		held := slices.DeleteFunc(slices.Clone(left.Segments), func(id int) bool { return !segmentExists(t, id) })
		if len(held) == 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the shared memory segments %v are there still", held)
		}
	}

	sweep(root)
	if _, err := os.Stat(left.Place); err != nil {
		t.Fatalf("a folder that is young enough to be without its lock still: %v; want it kept", err)
	}
	age(t, left.Place)
	sweep(root)
	if _, err := os.Stat(left.Place); !os.IsNotExist(err) {
		t.Errorf("the folder of the killed process: %v; want it removed", err)
	}
}

func beVictim(t *testing.T) {
	v := TestVault(t, VaultConfig{})
	left := remains{Place: places.dir, Pids: []int{v.process.pid()}}
	for _, paused := range []bool{false, true} {
		p := TestPostgres(t, PostgresConfig{NoFsync: true})
		if _, err := p.Superuser(t.Context()); err != nil { // a session that is there at the kill
			t.Fatal(err)
		}
		children, err := childrenOf(p.process.pid())
		if err != nil {
			t.Fatal(err)
		}
		left.Pids = append(append(left.Pids, p.process.pid()), children...)
		if id, ok := sharedMemory(p.data()); ok {
			left.Segments = append(left.Segments, id)
		}
		if paused {
			if err := p.Pause(); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := json.NewEncoder(os.Stdout).Encode(left); err != nil {
		t.Fatal(err)
	}
	select {} // until it is killed
}

// segmentExists reads the list of proc_sysvipc(5): a line for each, its ID the
// second word.
func segmentExists(t *testing.T, id int) bool {
	t.Helper()
	b, err := os.ReadFile("/proc/sysvipc/shm")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if words := strings.Fields(line); len(words) > 1 && words[1] == strconv.Itoa(id) {
			return true
		}
	}
	return false
}

// A folder that its process has locked stays, however old it is.
func TestSweepSparesWhatIsUsed(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	dir, lock, err := lockedFolder(root)
	if err != nil {
		t.Fatal(err)
	}
	age(t, dir)
	sweep(root)
	if _, err := os.Stat(dir); err != nil {
		t.Errorf("a locked folder: %v; want it kept", err)
	}
	lock.Close()
	sweep(root)
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Errorf("a folder that nobody has locked: %v; want it removed", err)
	}
}

// age makes a folder old enough to be swept.
func age(t *testing.T, dir string) {
	t.Helper()
	old := time.Now().Add(-2 * placeAge)
	if err := os.Chtimes(dir, old, old); err != nil {
		t.Fatal(err)
	}
}
