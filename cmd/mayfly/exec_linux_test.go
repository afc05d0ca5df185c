package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mayfly-security/mayfly/broker"
)

// child is the command that exec runs in the tests. "env" prints its
// environment. "signals" says that it is ready and tells every signal that it
// gets; TERM ends it with 7, and so does the end of its input.
func child() {
	switch os.Args[1] {
	case "env":
		for _, e := range os.Environ() {
			fmt.Println(e)
		}
	case "signals":
		c := make(chan os.Signal, 4000) // more than any test sends, or it would lose some itself
		signal.Notify(c, syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGTERM, syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGWINCH)
		fmt.Println("ready", os.Getenv("CRM_USER"))
		for s := range c {
			fmt.Println("got", unix.SignalName(s.(syscall.Signal)))
			if s == syscall.SIGTERM {
				os.Exit(7)
			}
		}
	}
}

// running is a mayfly exec under way.
type running struct {
	t   *testing.T
	cmd *exec.Cmd
	out *bufio.Scanner
	err *strings.Builder
}

func (r *rig) start(t *testing.T, prepare func(*exec.Cmd), args ...string) *running {
	t.Helper()
	cmd := exec.Command("mayfly", args...)
	cmd.Env = append(os.Environ(), r.env...)
	run := &running{t: t, cmd: cmd, err: &strings.Builder{}}
	cmd.Stderr = run.err
	if prepare != nil {
		prepare(cmd)
	}
	if cmd.Stdout == nil {
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		run.out = bufio.NewScanner(out)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill() })
	return run
}

func (r *running) expect(line string) {
	r.t.Helper()
	if !r.out.Scan() {
		r.t.Fatalf("the output ended; %q was expected; on standard error: %s", line, r.err)
	}
	if got := strings.TrimRight(r.out.Text(), "\r"); got != line {
		r.t.Fatalf("the command says %q; %q was expected", got, line)
	}
}

func (r *running) ends(code int) {
	r.t.Helper()
	var exit *exec.ExitError
	if err := r.cmd.Wait(); err != nil && !errors.As(err, &exit) {
		r.t.Fatal(err)
	}
	if got := r.cmd.ProcessState.ExitCode(); got != code {
		r.t.Errorf("mayfly exits with %d; %d was expected; on standard error: %s", got, code, r.err)
	}
}

func testRig(t *testing.T) *rig {
	t.Helper()
	r, stop, err := newRig()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stop)
	return r
}

func (r *rig) revoked(t *testing.T) {
	t.Helper()
	r.Lock()
	defer r.Unlock()
	if len(r.Leases) != 1 || r.Leases[0].GetState() != string(broker.LeaseRevoked) {
		t.Errorf("the leases are %v", r.Leases)
	}
}

// Every signal that mayfly gets reaches the command, once; mayfly stays until
// the command has ended, and gives the credential back.
func TestExecPassesSignals(t *testing.T) {
	r := testRig(t)
	// In a session of its own there is no terminal, so that nobody else sends.
	run := r.start(t, func(c *exec.Cmd) { c.SysProcAttr = &syscall.SysProcAttr{Setsid: true} },
		"exec", "crm.read", "--", "child", "signals")
	run.expect("ready ada")
	for _, s := range []syscall.Signal{syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGWINCH, syscall.SIGTERM} {
		if err := run.cmd.Process.Signal(s); err != nil {
			t.Fatal(err)
		}
		run.expect("got " + unix.SignalName(s))
	}
	if run.out.Scan() {
		t.Errorf("and then %q", run.out.Text())
	}
	run.ends(7)
	r.revoked(t)
	if run.err.Len() > 0 {
		t.Errorf("on standard error: %s", run.err)
	}
}

// A command that dies of the signal gives 128+n.
func TestExecTellsTheSignal(t *testing.T) {
	r := testRig(t)
	run := r.start(t, nil, "exec", "crm.read", "--", "sh", "-c", "echo ready; exec sleep 60")
	run.expect("ready")
	if err := run.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	run.ends(128 + 15)
	r.revoked(t)
}

// Whoever is told to stop while the credential is being asked for runs nothing
// and shows nothing, and what was made by then is given back.
func TestStoppedWhileAsking(t *testing.T) {
	for _, args := range [][]string{
		{"exec", "crm.read", "--", "echo", "ran"},
		{"get", "crm.read", "--format", "env"},
	} {
		t.Run(args[0], func(t *testing.T) {
			r := testRig(t)
			ctx, stop := context.WithCancelCause(t.Context())
			r.Lock()
			r.Hold = func(_ context.Context, procedure string) {
				if procedure == "IssueLease" {
					stop(stopped{syscall.SIGTERM}) // and only then is the credential made
				}
			}
			r.Unlock()
			var out, errs strings.Builder
			p := &program{args: args, environ: append(os.Environ(), r.env...), stdin: strings.NewReader(""), stdout: &out, stderr: &errs, now: time.Now}
			if code := p.run(ctx); code != exitSignal+15 || out.Len() > 0 {
				t.Errorf("it exits with %d and says %q; on standard error: %s", code, out.String(), errs.String())
			}
			r.revoked(t)
		})
	}
}

// A flood of one signal does not push another out.
func TestExecLosesNoSignalToOthers(t *testing.T) {
	r := testRig(t)
	run := r.start(t, func(c *exec.Cmd) { c.SysProcAttr = &syscall.SysProcAttr{Setsid: true} },
		"exec", "crm.read", "--", "child", "signals")
	run.expect("ready ada")
	for range 2000 {
		if err := run.cmd.Process.Signal(syscall.SIGWINCH); err != nil {
			t.Fatal(err)
		}
	}
	if err := run.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	for run.out.Scan() && run.out.Text() == "got SIGWINCH" {
	}
	if got := run.out.Text(); got != "got SIGTERM" {
		t.Errorf("the last signal is %q", got)
	}
	run.ends(7)
	r.revoked(t)
}

// The real program takes TERM, INT and HUP while it asks, and exits with 128+n.
func TestExitsWithTheSignal(t *testing.T) {
	for _, signal := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP} {
		r := testRig(t)
		asked := make(chan struct{})
		r.Lock()
		r.Hold = func(ctx context.Context, _ string) { close(asked); <-ctx.Done() }
		r.Unlock()
		run := r.start(t, nil, "whoami")
		<-asked
		if err := run.cmd.Process.Signal(signal); err != nil {
			t.Fatal(err)
		}
		run.ends(exitSignal + int(signal))
	}
}

// In a terminal, Ctrl-C reaches the command once: the terminal sends it, and
// mayfly does not send it again. TERM still comes through mayfly.
func TestExecInATerminal(t *testing.T) {
	r := testRig(t)
	master, slave := terminal(t)
	run := r.start(t, func(c *exec.Cmd) {
		c.Stdin, c.Stdout, c.Stderr = slave, slave, slave
		c.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	}, "exec", "crm.read", "--", "child", "signals")
	slave.Close()
	run.out = bufio.NewScanner(master)
	run.expect("ready ada")
	// A signal that comes while one of its kind is pending is one with it, so
	// doing this once would show little.
	for range 100 {
		for key, signal := range map[string]string{"\x03": "SIGINT", "\x1c": "SIGQUIT"} { // Ctrl-C, Ctrl-\
			if _, err := io.WriteString(master, key); err != nil {
				t.Fatal(err)
			}
			run.expect("got " + signal)
		}
	}
	if err := run.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	run.expect("got SIGTERM") // and no second SIGINT or SIGQUIT before it
	run.ends(7)
	r.revoked(t)
}

// terminal opens a pseudo-terminal.
func terminal(t *testing.T) (master, slave *os.File) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { master.Close() })
	if err := unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	slave, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	// By itself a terminal throws away, on Ctrl-C, what is being written to it:
	// the child's very answer, if that is quick. And what was typed is not shown.
	mode, err := unix.IoctlGetTermios(int(slave.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	mode.Lflag |= unix.NOFLSH
	mode.Lflag &^= unix.ECHO
	if err := unix.IoctlSetTermios(int(slave.Fd()), unix.TCSETS, mode); err != nil {
		t.Fatal(err)
	}
	return master, slave
}
