// Package story is what the demonstrations are told with: real programs that
// are started, shown, checked and stopped again.
package story

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"
)

// Story is a demonstration under way. It is told by one goroutine.
type Story struct {
	Ctx  context.Context
	Bin  string // the directory of mayfly and mayflyd
	Dir  string // of this telling's own; gone at its end
	Addr string // the broker's URL

	started []*exec.Cmd
}

// Tell makes a directory, has tell tell the story, and clears up.
func Tell(ctx context.Context, bin string, tell func(*Story) error) (err error) {
	bin, err = filepath.Abs(bin)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "mayfly-demo-")
	if err != nil {
		return err
	}
	s := &Story{Ctx: ctx, Bin: bin, Dir: dir}
	defer func() { err = errors.Join(err, s.end()) }()
	return tell(s)
}

// StartBroker starts `mayflyd dev` in the story's directory and returns when it
// serves.
func (s *Story) StartBroker() error {
	ports, err := FreePorts(1)
	if err != nil {
		return err
	}
	s.Addr = "https://localhost:" + ports[0]
	if err := s.Daemon("Ready.", nil, filepath.Join(s.Bin, "mayflyd"), "dev", "--dir", s.State(),
		"--listen", "127.0.0.1:"+ports[0], "--ops-listen", "", "--people-listen", "127.0.0.1:0", "--idp-listen", "127.0.0.1:0"); err != nil {
		return err
	}
	s.Say("mayflyd dev serves " + s.Addr)
	return nil
}

// State is the broker's state directory.
func (s *Story) State() string { return filepath.Join(s.Dir, "state") }

// Socket is the Workload API socket that makes a process somebody, named by the
// path of the SPIFFE ID: "agent/support".
func (s *Story) Socket(who string) string {
	return "unix://" + filepath.Join(s.State(), "sockets", strings.ReplaceAll(who, "/", "-")+".sock")
}

// As is the environment that makes a process somebody.
func (s *Story) As(who string) []string {
	return append(os.Environ(), "MAYFLY_ADDR="+s.Addr, "SPIFFE_ENDPOINT_SOCKET="+s.Socket(who))
}

// Daemon starts a process in the background and returns when it has printed sign.
func (s *Story) Daemon(sign string, env []string, name string, args ...string) error {
	cmd := exec.Command(name, args...)
	cmd.Env, cmd.Stderr = env, os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	s.started = append(s.started, cmd)
	ready := make(chan error, 1)
	go func() {
		lines := bufio.NewScanner(out)
		for lines.Scan() {
			if strings.Contains(lines.Text(), sign) {
				ready <- nil
				_, _ = io.Copy(io.Discard, out) // keeps the pipe from filling; ends with the process
				return
			}
		}
		ready <- fmt.Errorf("%s ended before it was ready", filepath.Base(name))
	}()
	select {
	case err := <-ready:
		return err
	case <-time.After(20 * time.Second):
		return fmt.Errorf("%s was not ready in 20 s", filepath.Base(name))
	case <-s.Ctx.Done():
		return s.Ctx.Err()
	}
}

// end stops what was started, last things first.
func (s *Story) end() error {
	var errs []error
	for i := len(s.started) - 1; i >= 0; i-- {
		cmd := s.started[i]
		if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
			errs = append(errs, err)
			continue
		}
		if err := cmd.Wait(); err != nil {
			errs = append(errs, fmt.Errorf("stopping %s: %w", filepath.Base(cmd.Path), err))
		}
	}
	return errors.Join(append(errs, os.RemoveAll(s.Dir))...)
}

// Chapter begins a part of the story.
func (s *Story) Chapter(title string) { fmt.Printf("\n── %s.\n\n", title) }

// Say tells something.
func (s *Story) Say(text string) { fmt.Printf("   %s\n", text) }

// Mayfly runs the command as somebody, shows it, and checks its exit code.
func (s *Story) Mayfly(who string, code int, args ...string) (string, error) {
	fmt.Printf("   %s $ mayfly %s\n", filepath.Base(who), quoted(args))
	cmd := exec.CommandContext(s.Ctx, filepath.Join(s.Bin, "mayfly"), args...)
	cmd.Env = s.As(who)
	return s.Show(cmd, code)
}

// Show runs a command and prints what it prints, with long words (tokens) cut.
func (s *Story) Show(cmd *exec.Cmd, code int) (string, error) {
	raw, err := cmd.CombinedOutput()
	out := string(raw)
	for line := range strings.Lines(out) {
		fmt.Printf("      %s\n", cut(strings.TrimRight(line, "\n")))
	}
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return out, err
	}
	if got := cmd.ProcessState.ExitCode(); got != code {
		return out, fmt.Errorf("%s exited with %d; %d was expected", filepath.Base(cmd.Path), got, code)
	}
	return out, nil
}

func cut(line string) string {
	const most = 150
	if runes := []rune(line); len(runes) > most {
		return string(runes[:most]) + "…"
	}
	return line
}

func quoted(args []string) string {
	q := make([]string, len(args))
	for i, a := range args {
		if q[i] = a; strings.ContainsAny(a, " ") {
			q[i] = "'" + a + "'"
		}
	}
	return strings.Join(q, " ")
}

// Expect is an error unless every word is in out.
func Expect(out string, words ...string) error {
	for _, w := range words {
		if !strings.Contains(out, w) {
			return fmt.Errorf("the answer does not say %q", w)
		}
	}
	return nil
}

// IncidentID is what an incident's ID looks like.
var IncidentID = regexp.MustCompile(`\bi[0-9a-z]{25}\b`)

// ShellValue finds what an export line sets a variable to.
func ShellValue(out, name string) (string, error) {
	for line := range strings.Lines(out) {
		if value, ok := strings.CutPrefix(strings.TrimSpace(line), "export "+name+"="); ok {
			return strings.Trim(value, "'"), nil
		}
	}
	return "", fmt.Errorf("the answer does not set %s", name)
}

// FreePorts finds ports of loopback that nobody listens on.
func FreePorts(n int) ([]string, error) {
	var ports []string
	for range n {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		defer ln.Close()
		_, port, err := net.SplitHostPort(ln.Addr().String())
		if err != nil {
			return nil, err
		}
		ports = append(ports, port)
	}
	return ports, nil
}

// LookAtSources looks at what the programs are built from, below the module's
// root. `go test` keeps a result for as long as nothing that the test looked at
// changes, and does not see what a test builds: so that a result of earlier
// programs is not taken for one of these, a test looks at their sources.
func LookAtSources(root string) error {
	for _, dir := range []string{"attestation", "broker", "cmd", "deploy/examples", "providers", "store"} {
		err := filepath.WalkDir(filepath.Join(root, dir), func(_ string, _ fs.DirEntry, err error) error { return err })
		if err != nil {
			return err
		}
	}
	return nil
}

// Build builds programs into bin for a test: those of cmd by their name, others
// by their folder below deploy. It looks at their sources; see LookAtSources.
func Build(ctx context.Context, root, bin string, programs ...string) error {
	if err := LookAtSources(root); err != nil {
		return err
	}
	for _, name := range programs {
		folder := "./cmd/" + name
		if strings.Contains(name, "/") {
			folder = "./deploy/" + name
		}
		out, err := filepath.Abs(filepath.Join(bin, name))
		if err != nil {
			return err
		}
		cmd := exec.CommandContext(ctx, "go", "build", "-o", out, folder)
		cmd.Dir, cmd.Env = root, append(os.Environ(), "CGO_ENABLED=0")
		if said, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("building %s: %w\n%s", name, err, said)
		}
	}
	return nil
}
