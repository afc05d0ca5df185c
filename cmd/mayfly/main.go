// Mayfly is the command that agents, bots and people type.
package main

import (
	"context"
	"errors"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/client"
)

// version is set by the linker.
var version = "unknown"

func main() { os.Exit(run()) }

func run() int {
	// A closed pipe is an error to handle (get gives a credential back that
	// nobody could read), and not the end of the process.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)
	ctx, stop := untilSignalled()
	defer stop()
	p := &program{
		args: os.Args[1:], environ: os.Environ(),
		stdin: os.Stdin, stdout: os.Stdout, stderr: os.Stderr,
		now: time.Now,
	}
	return p.run(ctx)
}

// stopped is why a context ended: a signal asked us to stop.
type stopped struct{ signal syscall.Signal }

func (s stopped) Error() string { return "stopped by a signal" }

// untilSignalled is a context that ends with INT, TERM, or HUP (unless we were
// told to ignore it, as nohup does). A second signal then does what it does to
// every process.
func untilSignalled() (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(context.Background())
	c := make(chan os.Signal, 1)
	signal.Notify(c, syscall.SIGINT, syscall.SIGTERM)
	if !signal.Ignored(syscall.SIGHUP) {
		signal.Notify(c, syscall.SIGHUP)
	}
	go func() {
		select {
		case s := <-c:
			if n, ok := s.(syscall.Signal); ok {
				cancel(stopped{n})
			}
			signal.Stop(c)
		case <-ctx.Done():
		}
	}()
	return ctx, func() { signal.Stop(c); cancel(nil) }
}

// program is one run of the command. Tests make their own.
type program struct {
	args           []string
	environ        []string // as os.Environ
	stdin          io.Reader
	stdout, stderr io.Writer
	now            func() time.Time
	terminal       func() bool   // whether a person can answer on stdin; nil: looked up
	screen         func() bool   // whether standard error is a terminal, where a line can be written over; nil: looked up
	signInLimit    time.Duration // how long a sign-in in the browser may take; 0: signInLimit

	path    string // the verb that ran, "mayfly grant list"
	started bool   // a verb's own code runs; what fails before it is a wrong use

	// forPeople: the verb is one that only a person can do.
	forPeople bool

	// The global flags.
	output   string
	as       string
	addr     string
	brokerID string
	timeout  durationFlag
}

// run runs the command and returns its exit code.
func (p *program) run(ctx context.Context) int {
	root := p.root()
	root.SetArgs(p.args)
	root.SetIn(p.stdin)
	root.SetOut(p.stdout)
	root.SetErr(p.stderr)
	verb, err := root.ExecuteContextC(ctx)
	p.path = verb.CommandPath()
	if err != nil && !p.started {
		err = wrongUse(err)
	}
	if s, ok := context.Cause(ctx).(stopped); ok && errors.Is(err, context.Canceled) {
		err = &exitError{exitSignal + int(s.signal), err}
	}
	if err != nil {
		p.complain(err)
	}
	return codeOf(err)
}

// getenv looks a variable up in the program's own environment.
func (p *program) getenv(name string) string {
	for i := len(p.environ) - 1; i >= 0; i-- {
		if v, ok := strings.CutPrefix(p.environ[i], name+"="); ok {
			return v
		}
	}
	return ""
}

// config is what environment and flags say, flags first.
func (p *program) config() (client.Config, error) {
	getenv := func(name string) string {
		if name == client.EnvBrokerID && p.brokerID != "" {
			return ""
		}
		return p.getenv(name)
	}
	c, err := client.ConfigFromEnv(getenv)
	if err != nil {
		return c, err
	}
	if p.brokerID != "" {
		if c.BrokerID, err = parseID("--broker-id", p.brokerID); err != nil {
			return c, err
		}
	}
	c.Timeout = time.Duration(p.timeout)
	switch {
	case p.forPeople && p.as == string(client.AsWorkload):
		return c, usagef("only a person can do that, and --as says workload")
	case p.forPeople:
		c.As = client.AsPerson
	default:
		c.As = client.As(p.as)
	}
	if c.As = c.ComesAs(); c.As == client.AsWorkload {
		if p.addr != "" {
			c.Addr = p.addr
		}
		return c, nil
	}
	if p.addr != "" {
		c.PeopleAddr = p.addr
	}
	return c, nil
}

// connect makes a client; the caller closes it.
func (p *program) connect(ctx context.Context) (*client.Client, error) {
	c, err := p.config()
	if err != nil {
		return nil, err
	}
	if c.As == client.AsPerson && c.Token.IsZero() {
		s, err := p.loadSession(c.PeopleAddr)
		if err != nil {
			return nil, err
		}
		c.Token = client.NewToken(s.Token)
	}
	return client.New(ctx, c)
}

// with runs a verb that asks the broker.
func (p *program) with(ctx context.Context, do func(c *client.Client) error) error {
	c, err := p.connect(ctx)
	if err != nil {
		return err
	}
	defer c.Close() // it holds nothing that could be lost
	return do(c)
}

// clean is for everything that comes from others and goes to a person.
func clean(s string) string { return broker.Clean(s) }
