package storetest

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"

	"github.com/mayfly-security/mayfly/store"
)

const (
	// victimDir, in the environment, tells a test binary to be the victim of
	// testCrash, and where its store is.
	victimDir = "MAYFLY_STORETEST_VICTIM_DIR"

	victimWorkers = 16
)

// testCrash kills a process that writes, several times, and looks whether all
// that was acknowledged is there, and all transactions are whole.
//
// The kernel lives on, so this does not show that an acknowledged write is on
// the disk: an implementation shows that by itself.
func testCrash(t *testing.T, open Open) {
	dir := t.TempDir()
	done := make([]int, victimWorkers) // by worker: its transactions, of which each has been found in the store
	for round := range 6 {
		acknowledged := killVictim(t, dir, 40+round*130)
		s := open(t, dir)
		checkWhole(t, s)
		checkAfterCrash(t, s, done, acknowledged)
		if err := s.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
		if t.Failed() {
			t.Fatalf("in round %d", round)
		}
	}
}

// victim writes until it is killed. It tells of each Update that has returned,
// as "worker number", on the pipe that is its file 3.
func victim(t *testing.T, s store.Store) {
	pipe := os.NewFile(3, "acknowledgements")
	together(victimWorkers, func(w int) {
		for {
			var mine int
			err := s.Update(t.Context(), func(tx store.Txn) error {
				var err1, err2 error
				var total int
				mine, err1 = number(tx, fmt.Sprint("worker/", w))
				total, err2 = number(tx, "total")
				mine, total = mine+1, total+1
				padding := make([]byte, (mine*w*37)%3000)
				return errors.Join(err1, err2,
					setNumber(tx, fmt.Sprint("worker/", w), mine),
					setNumber(tx, "total", total),
					tx.Put(fmt.Sprintf("a/%d/%d", w, mine), padding),
					tx.Append("log", fmt.Appendf(nil, "%d %d %d", total, w, mine)),
					tx.Put(fmt.Sprintf("z/%d/%d", w, mine), padding))
			})
			if err == nil {
				_, err = fmt.Fprintf(pipe, "%d %d\n", w, mine) // short enough to be whole
			}
			if err != nil {
				t.Errorf("worker %d: %v", w, err)
				return
			}
		}
	})
}

// killVictim starts a victim, kills it after n acknowledgements, and returns
// the last of each worker.
func killVictim(t *testing.T, dir string, n int) []int {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer read.Close()
	// The test that called Run, without the suite's own "/Crash".
	parts := strings.Split(t.Name(), "/")
	for i, p := range parts {
		parts[i] = "^" + regexp.QuoteMeta(p) + "$"
	}
	cmd := exec.Command(self, "-test.run="+strings.Join(parts[:len(parts)-1], "/"))
	cmd.Env = append(os.Environ(), victimDir+"="+dir)
	cmd.ExtraFiles = []*os.File{write}
	var output bytes.Buffer
	cmd.Stdout, cmd.Stderr = &output, &output
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	write.Close()

	acknowledged := make([]int, victimWorkers)
	lines := bufio.NewScanner(read)
	for i := 0; lines.Scan(); i++ {
		if i == n {
			cmd.Process.Kill()
		}
		var worker, number int
		if _, err := fmt.Sscan(lines.Text(), &worker, &number); err != nil {
			t.Fatalf("the victim says %q: %v", lines.Text(), err)
		}
		acknowledged[worker] = number
	}
	err = cmd.Wait()
	if cmd.ProcessState.Exited() {
		t.Fatalf("the victim was not killed but ended: %v\n%s", err, output.Bytes())
	}
	return acknowledged
}

func checkAfterCrash(t *testing.T, s store.Store, done, acknowledged []int) {
	t.Helper()
	got := contents(t, s)
	sum := 0
	for w := range victimWorkers {
		var n int
		view(t, s, func(r store.Reader) (err error) { n, err = number(r, fmt.Sprint("worker/", w)); return err })
		least := max(done[w], acknowledged[w])
		if n < least || n > least+1 {
			t.Errorf("worker %d: the store has %d transactions; %d were acknowledged, and one was under way", w, n, least)
		}
		for i := 1; i <= n+1; i++ {
			a, okA := got[fmt.Sprintf("a/%d/%d", w, i)]
			z, okZ := got[fmt.Sprintf("z/%d/%d", w, i)]
			if want := i <= n; okA != want || okZ != want || a != z || want && len(a) != (i*w*37)%3000 {
				t.Errorf("worker %d, transaction %d of %d: it is there in part: %v, %v", w, i, n, okA, okZ)
			}
		}
		done[w] = n
		sum += n
	}
	if total := got["total"]; total != fmt.Sprint(sum) {
		t.Errorf("the total is %s, want %d", total, sum)
	}
	log, _ := entries(t, s, "log", 0)
	if len(log) != sum {
		t.Errorf("the log has %d entries, want %d", len(log), sum)
	}
	seen := make([]int, victimWorkers)
	for i, e := range log {
		var total, worker, number int
		if _, err := fmt.Sscan(e, &total, &worker, &number); err != nil {
			t.Fatalf("entry %q: %v", e, err)
		}
		seen[worker]++
		if total != i+1 || number != seen[worker] {
			t.Errorf("entry %d of the log is %q, want total %d and number %d", i+1, e, i+1, seen[worker])
		}
	}
}
