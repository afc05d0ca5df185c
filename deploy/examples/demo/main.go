// Demo tells Mayfly's main story with the real programs: an agent without a
// grant is refused, an incident opens a window, the agent uses a credential,
// the incident closes, and the credential is dead. It exits non-zero if any
// step is not as told.
package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"
)

func main() {
	bin := flag.String("bin", "bin", "directory of mayfly, mayflyd and examples/crm")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	err := run(ctx, *bin)
	cancel()
	stop()
	if err != nil {
		fmt.Fprintf(os.Stderr, "\nThe demo did not go as told: %v\n", err)
		os.Exit(1)
	}
}

// story is a demo under way.
type story struct {
	ctx     context.Context
	bin     string
	dir     string
	addr    string // the broker's
	crm     string // the CRM's
	started []*exec.Cmd
}

func run(ctx context.Context, bin string) (err error) {
	bin, err = filepath.Abs(bin)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "mayfly-demo-")
	if err != nil {
		return err
	}
	s := &story{ctx: ctx, bin: bin, dir: dir}
	defer func() { err = errors.Join(err, s.end()) }()
	return s.tell()
}

func (s *story) tell() error {
	s.chapter("A broker, a trust domain and a CRM start on this machine")
	if err := s.start(); err != nil {
		return err
	}

	s.chapter("The troubleshooter is an agent. It holds no credential, and it has no grant")
	if _, err := s.mayfly("troubleshooter", 0, "whoami"); err != nil {
		return err
	}
	out, err := s.mayfly("troubleshooter", 3, "get", "crm.read", "--param", "customer=c-17")
	if err != nil {
		return err
	}
	if err := expect(out, "no_grant", "grant"); err != nil {
		return err
	}
	s.say("Refused: with the reason, and with what to do next.")

	s.chapter("Something breaks. The pager bot opens an incident, and with it a window")
	out, err = s.mayfly("pager", 0, "incident", "open", "--title", "CRM answers slowly", "--ref", "PD-4711",
		"--agent", "spiffe://acme.test/agent/troubleshooter", "--tool", "crm.read", "--for", "30m")
	if err != nil {
		return err
	}
	incident := incidentID.FindString(out)
	if incident == "" {
		return errors.New("the answer names no incident")
	}

	s.chapter("Now the agent gets a credential: for one tool, one customer, five minutes")
	out, err = s.mayfly("troubleshooter", 0, "get", "crm.read", "--param", "customer=c-17", "--ttl", "5m", "--format", "env", "--reason", "looking into PD-4711")
	if err != nil {
		return err
	}
	token, err := shellValue(out, "CRM_TOKEN")
	if err != nil {
		return err
	}
	if out, err = s.crmGet(token, "c-17", 0); err != nil {
		return err
	}
	if err := expect(out, "Ada Lovelace"); err != nil {
		return err
	}
	s.say("It works. Another customer's record is out of its reach:")
	if _, err = s.crmGet(token, "c-42", 1); err != nil {
		return err
	}

	s.chapter("The incident is over. The bot closes it")
	if _, err = s.mayfly("pager", 0, "incident", "close", incident, "--reason", "resolved"); err != nil {
		return err
	}
	closed := time.Now()
	if out, err = s.crmGet(token, "c-17", 1); err != nil {
		return err
	}
	if err := expect(out, "401"); err != nil {
		return err
	}
	took := time.Since(closed)
	if took > time.Second {
		return fmt.Errorf("the credential was refused only %s after the close", took)
	}
	s.say(fmt.Sprintf("The same credential, asked %d ms after the close: refused.", took.Milliseconds()))

	s.chapter("Afterwards anybody who may can see what happened, and that it is over")
	if out, err = s.mayfly("troubleshooter", 0, "leases", "--all"); err != nil {
		return err
	}
	if err := expect(out, "revoked", "incident_closed"); err != nil {
		return err
	}
	if out, err = s.mayfly("sam", 0, "audit", "list"); err != nil {
		return err
	}
	if err := expect(out, "request.refused", "incident.opened", "lease.active", "incident.closed", "lease.revoked"); err != nil {
		return err
	}
	if strings.Contains(out, token) {
		return errors.New("the evidence holds the credential")
	}
	fmt.Printf("\nThat was Mayfly: access for a reason, for a while, and over when the reason is.\n" +
		"Try it yourself with `bin/mayflyd dev`; the guide is docs/guide.md.\n")
	return nil
}

// start starts the broker and the CRM, and returns when both answer.
func (s *story) start() error {
	ports, err := freePorts(2)
	if err != nil {
		return err
	}
	s.addr, s.crm = "https://localhost:"+ports[0], "127.0.0.1:"+ports[1]
	if err := s.daemon("Ready.", nil, filepath.Join(s.bin, "mayflyd"), "dev", "--dir", filepath.Join(s.dir, "state"),
		"--listen", "127.0.0.1:"+ports[0], "--ops-listen", ""); err != nil {
		return err
	}
	s.say("mayflyd dev serves " + s.addr)
	if err := s.daemon("serving", s.as("crm"), filepath.Join(s.bin, "examples", "crm"), "serve",
		"--addr", s.crm, "--broker", s.addr); err != nil {
		return err
	}
	s.say("the CRM serves http://" + s.crm + " and asks Mayfly about every token it is shown")
	return nil
}

// sockets are the Workload API sockets of the people of the story.
var sockets = map[string]string{
	"troubleshooter": "agent-troubleshooter.sock",
	"pager":          "bot-pager.sock",
	"sam":            "operator-sam.sock",
	"crm":            "service-crm.sock",
}

// as is the environment that makes a process somebody.
func (s *story) as(who string) []string {
	return append(os.Environ(),
		"MAYFLY_ADDR="+s.addr,
		"SPIFFE_ENDPOINT_SOCKET=unix://"+filepath.Join(s.dir, "state", "sockets", sockets[who]))
}

// daemon starts a process in the background and returns when it has printed sign.
func (s *story) daemon(sign string, env []string, name string, args ...string) error {
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
	case <-s.ctx.Done():
		return s.ctx.Err()
	}
}

// end stops what was started, last things first.
func (s *story) end() error {
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
	return errors.Join(append(errs, os.RemoveAll(s.dir))...)
}

func (s *story) chapter(title string) { fmt.Printf("\n── %s.\n\n", title) }

func (s *story) say(text string) { fmt.Printf("   %s\n", text) }

// mayfly runs the command as somebody, shows it, and checks its exit code.
func (s *story) mayfly(who string, code int, args ...string) (string, error) {
	fmt.Printf("   %s $ mayfly %s\n", who, quoted(args))
	cmd := exec.CommandContext(s.ctx, filepath.Join(s.bin, "mayfly"), args...)
	cmd.Env = s.as(who)
	return s.show(cmd, code)
}

// crmGet asks the CRM for a record, as an agent does with its credential.
func (s *story) crmGet(token, customer string, code int) (string, error) {
	fmt.Printf("   troubleshooter $ crm get %s\n", customer)
	cmd := exec.CommandContext(s.ctx, filepath.Join(s.bin, "examples", "crm"), "get", "--addr", s.crm, customer)
	cmd.Env = append(os.Environ(), "CRM_TOKEN="+token)
	return s.show(cmd, code)
}

// show runs a command and prints what it prints, with long words (tokens) cut.
func (s *story) show(cmd *exec.Cmd, code int) (string, error) {
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

func expect(out string, words ...string) error {
	for _, w := range words {
		if !strings.Contains(out, w) {
			return fmt.Errorf("the answer does not say %q", w)
		}
	}
	return nil
}

// incidentID is what an incident's ID looks like.
var incidentID = regexp.MustCompile(`\bi[0-9a-z]{25}\b`)

// shellValue finds what an export line sets a variable to.
func shellValue(out, name string) (string, error) {
	for line := range strings.Lines(out) {
		if value, ok := strings.CutPrefix(strings.TrimSpace(line), "export "+name+"="); ok {
			return strings.Trim(value, "'"), nil
		}
	}
	return "", fmt.Errorf("the answer does not set %s", name)
}

// freePorts finds ports of loopback that nobody listens on.
func freePorts(n int) ([]string, error) {
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
