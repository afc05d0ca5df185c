package main

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/client/clienttest"
)

// keptWorld is a broker, and calls of mayfly aws credentials that share a file.
type keptWorld struct {
	*rig
	t   *testing.T
	run string // XDG_RUNTIME_DIR

	clock sync.Mutex
	at    time.Time
}

func newKeptWorld(t *testing.T) *keptWorld {
	r, stop, err := newRig()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stop)
	w := &keptWorld{rig: r, t: t, run: t.TempDir(), at: time.Now()}
	r.Lock()
	defer r.Unlock()
	r.Secret, r.TTL, r.Now = awsSecret, 10*time.Minute, w.now
	return w
}

func (w *keptWorld) now() time.Time {
	w.clock.Lock()
	defer w.clock.Unlock()
	return w.at
}

func (w *keptWorld) pass(d time.Duration) {
	w.clock.Lock()
	defer w.clock.Unlock()
	w.at = w.at.Add(d)
}

// call runs mayfly aws credentials in this process.
func (w *keptWorld) call(args ...string) (out, said string, code int) {
	var stdout, stderr bytes.Buffer
	p := &program{args: append([]string{"aws", "credentials", "crm.read"}, args...), environ: append(w.env[:len(w.env):len(w.env)], "XDG_RUNTIME_DIR="+w.run),
		stdin: strings.NewReader(""), stdout: &stdout, stderr: &stderr, now: w.now}
	code = p.run(context.Background())
	return stdout.String(), stderr.String(), code
}

// good is a call that prints something and has nothing to say.
func (w *keptWorld) good(args ...string) string {
	w.t.Helper()
	out, said, code := w.call(args...)
	if code != 0 || out == "" || said != "" {
		w.t.Fatalf("exit code %d, %s", code, said)
	}
	return out
}

func (w *keptWorld) refuse(procedures ...string) {
	w.Lock()
	defer w.Unlock()
	w.Refuse = func(procedure string, _ int) error {
		for _, p := range procedures {
			if name, reason, _ := strings.Cut(p, " "); name == procedure {
				code := connect.CodePermissionDenied
				if reason == string(broker.ReasonShuttingDown) {
					code = connect.CodeUnavailable
				}
				return clienttest.Refusal(code, broker.Reason(reason), "the message", "")
			}
		}
		return nil
	}
}

func (w *keptWorld) files(pattern string) []string {
	paths, err := filepath.Glob(filepath.Join(w.run, "mayfly", "aws", pattern))
	if err != nil {
		w.t.Fatal(err)
	}
	return paths
}

// TestAWSKeptEndedEarly: a kept lease that was ended is printed for some seconds
// at most, and a broker that is away ends none.
func TestAWSKeptEndedEarly(t *testing.T) {
	w := newKeptWorld(t)
	first := w.good()
	w.Lock()
	w.Leases[0].State = string(broker.LeaseRevoking)
	w.Unlock()
	w.pass(awsLook + time.Second)
	out, said, code := w.call()
	if code != 0 || out == first || w.Minted() != 2 || !strings.Contains(said, "was ended") {
		t.Errorf("exit code %d, %d leases: %s", code, w.Minted(), said)
	}
	second := w.good()

	// Until the one who asks knows, nobody else prints it either.
	w.pass(awsLook + time.Second)
	release, holding := make(chan struct{}), make(chan struct{}, 1)
	w.Lock()
	w.Hold = func(_ context.Context, procedure string) {
		if procedure == "GetLease" {
			holding <- struct{}{}
			<-release
		}
	}
	w.Unlock()
	var one sync.WaitGroup
	one.Go(func() {
		if out, said, code := w.call(); code != 0 || out != second {
			t.Errorf("exit code %d: %s", code, said)
		}
	})
	<-holding
	if out, said, code := w.call("--timeout", "100ms"); code != exitUnavailable || out != "" {
		t.Errorf("exit code %d, %q: %s", code, out, said)
	}
	close(release)
	one.Wait()
	w.Lock()
	w.Hold = nil
	w.Unlock()

	// The broker is away: the lease is printed, and not every call waits for it.
	w.pass(awsLook + time.Second)
	w.refuse("GetLease " + string(broker.ReasonShuttingDown))
	asked := w.Calls("GetLease")
	if w.good("--timeout", "100ms") != second {
		t.Error("a broker that is away ended a lease")
	}
	tries := w.Calls("GetLease") - asked
	if w.good() != second || tries == 0 || w.Calls("GetLease")-asked != tries {
		t.Errorf("asked %d times, and then %d", tries, w.Calls("GetLease")-asked-tries)
	}

	// The agent is disabled, and may not even ask.
	w.pass(awsLook + time.Second)
	w.refuse("GetLease "+string(broker.ReasonAgentDisabled), "IssueLease "+string(broker.ReasonAgentDisabled))
	out, said, code = w.call()
	if code != exitRefused || out != "" || !strings.Contains(said, "agent_disabled") || len(w.files("*.json")) != 0 {
		t.Errorf("exit code %d, %q, %v: %s", code, out, w.files("*.json"), said)
	}
}

// TestAWSKeptNoConvoy: while one asks a broker that does not answer, the others
// print the lease that lives; and where there is none, they wait no longer than
// one call may take. A refused renewal is not tried with each call.
func TestAWSKeptNoConvoy(t *testing.T) {
	w := newKeptWorld(t)
	first := w.good()
	w.pass(10*time.Minute - 30*time.Second) // within the margin
	release, holding := make(chan struct{}), make(chan struct{}, 100)
	w.Lock()
	w.Hold = func(ctx context.Context, procedure string) {
		if procedure == "IssueLease" {
			holding <- struct{}{}
			select {
			case <-release:
			case <-ctx.Done():
			}
		}
	}
	w.Unlock()
	var one sync.WaitGroup
	one.Go(func() {
		if out, said, code := w.call(); code != 0 || out == first {
			t.Errorf("exit code %d: %s", code, said)
		}
	})
	<-holding
	for range 5 {
		if w.good() != first {
			t.Error("another lease")
		}
	}
	close(release)
	one.Wait()

	// There is none.
	release = make(chan struct{})
	one.Go(func() { w.call("--ttl", "3m") })
	<-holding
	out, said, code := w.call("--ttl", "3m", "--timeout", "200ms")
	if code != exitUnavailable || out != "" || !strings.Contains(said, "another mayfly") {
		t.Errorf("exit code %d: %s", code, said)
	}
	close(release)
	one.Wait()

	w.pass(10*time.Minute - 30*time.Second)
	w.refuse("IssueLease " + string(broker.ReasonNoGrant))
	asked := w.Calls("IssueLease")
	if _, said, code := w.call(); code != 0 || !strings.Contains(said, "is not renewed") {
		t.Errorf("exit code %d: %s", code, said)
	}
	w.good()
	if n := w.Calls("IssueLease") - asked; n != 1 {
		t.Errorf("asked %d times", n)
	}
	w.pass(awsKeptPause)
	w.call()
	if n := w.Calls("IssueLease") - asked; n != 2 {
		t.Errorf("asked %d times after the pause", n)
	}
}

// TestAWSKeptNever: what would be good for longer than the lease is in no file,
// and neither is what comes too late.
func TestAWSKeptNever(t *testing.T) {
	w := newKeptWorld(t)
	w.Lock()
	w.Static = true
	w.Unlock()
	w.good()
	if files := w.files("*"); len(files) != 1 || !strings.HasSuffix(files[0], lockEnd) {
		t.Errorf("a static secret is in %v", files)
	}
	w.Lock()
	w.Static = false
	w.Now = func() time.Time { return w.now().Add(-time.Hour) }
	w.Unlock()
	out, said, code := w.call()
	if code != exitUnexpected || out != "" || !strings.Contains(said, "compare this machine's clock") || len(w.files("*.json")) != 0 {
		t.Errorf("exit code %d: %s", code, said)
	}
	if state, _ := w.Lease(w.Leases[1].GetId()); state != string(broker.LeaseRevoked) {
		t.Errorf("it is %s", state)
	}
}

// TestAWSKeptTidies: what ended, and what a process that was killed has left, goes
// with the next lease that is kept; what others hold stays.
func TestAWSKeptTidies(t *testing.T) {
	w := newKeptWorld(t)
	w.good("--ttl", "1m")
	path := w.files("*.json")[0]
	dir := filepath.Dir(path)
	left := filepath.Join(dir, "."+filepath.Base(path)+".12345")
	held := filepath.Join(dir, strings.Repeat("a", 32)+lockEnd)
	if err := os.WriteFile(left, []byte("secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	unlock, taken, err := tryLock(held)
	if err != nil || !taken {
		t.Fatal(err)
	}
	defer unlock()
	w.pass(2 * time.Minute)
	w.good()
	if files := append(w.files("*"), w.files(".*")...); len(files) != 3 {
		t.Errorf("%v", files)
	}
	if _, taken, err := tryLock(held); err != nil || taken {
		t.Errorf("what is held was taken: %v", err)
	}
	// Who may write beside the place could put another there.
	if err := os.Chmod(filepath.Join(w.run, "mayfly"), 0o770); err != nil {
		t.Fatal(err)
	}
	if _, said, code := w.call(); code != exitUsage || !strings.Contains(said, "not a directory of yours alone") {
		t.Errorf("exit code %d: %s", code, said)
	}
}

// TestAWSLock: whoever removes a lock's file while they hold it leaves no two with
// the lock.
func TestAWSLock(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x"+lockEnd)
	var holders, rounds atomic.Int32
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() {
			for rounds.Load() < 2000 {
				unlock, taken, err := tryLock(path)
				if err != nil {
					t.Error(err)
					return
				}
				if !taken {
					continue
				}
				if rounds.Add(1); holders.Add(1) != 1 {
					t.Error("two have it")
				}
				for range 100 {
					runtime.Gosched() // to others, who would take it now
				}
				holders.Add(-1)
				_ = os.Remove(path) // what comes after this is another lock's
				unlock()
			}
		})
	}
	all.Wait()
}

// TestRuntimeDir: a place that others may write to, or that is no directory of
// ours, is not used.
func TestRuntimeDir(t *testing.T) {
	dir := t.TempDir()
	shared, link := filepath.Join(dir, "shared"), filepath.Join(dir, "link")
	if err := errors.Join(os.Mkdir(shared, 0o700), os.Chmod(shared, 0o777), os.Symlink(dir, link), os.Chmod(dir, 0o700)); err != nil {
		t.Fatal(err)
	}
	for given, want := range map[string]string{dir: dir, shared: "", link: "", "": "", "relative": "", filepath.Join(dir, "none"): ""} {
		p := &program{environ: []string{"XDG_RUNTIME_DIR=" + given}}
		if got := p.runtimeDir(); got != want {
			t.Errorf("%q: %q", given, got)
		}
	}
	// A file's directory is looked at as it is put to use.
	w := newKeptWorld(t)
	if err := os.Chmod(w.run, 0o777); err != nil {
		t.Fatal(err)
	}
	home := t.TempDir()
	w.env = append(w.env, "HOME="+home)
	w.good()
	if files, _ := filepath.Glob(filepath.Join(home, ".cache", "mayfly", "aws", "*.json")); len(files) != 1 || len(w.files("*")) != 0 {
		t.Errorf("%v, %v", files, w.files("*"))
	}
}
