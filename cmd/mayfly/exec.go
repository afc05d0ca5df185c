package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/mayfly-security/mayfly/broker/client"
)

func (p *program) execCommand() *cobra.Command {
	var ask askFlags
	var passIdentity bool
	c := &cobra.Command{
		Use:   "exec TOOL -- COMMAND [ARG...]",
		Short: "Run one command with a credential, and give it back afterwards",
		Long: `Exec gets a credential, runs a command with it in its environment, and revokes the
credential when the command ends, however it ends. The names of the variables are
the tool's, from the catalog.

The command inherits everything else, but not your identity: MAYFLY_* and
SPIFFE_ENDPOINT_SOCKET are taken out of its environment, so that it has this one
tool and does not simply ask for more. (The socket is still there: what keeps
others from it is its file mode.) For mayfly within mayfly there is
--pass-identity.

Signals that mayfly gets go to the command: HUP, INT, QUIT, TERM, USR1, USR2 and
WINCH. The command is in mayfly's own process group, so what a terminal sends
(Ctrl-C, Ctrl-\, a new window size) reaches it directly; INT, QUIT and WINCH are
then not passed on a second time. Mayfly itself stays until the command has
ended and the credential is given back. A mayfly that is killed with KILL cannot
give back: the credential then lives until its end.

The exit code is the command's, or 128+n if signal n ended it. 125 means that
mayfly failed, and the command was not started; 126 that it could not be started;
127 that it was not found. Should giving back fail, that is told on standard error
and the exit code stays.

If the credential ends before the command does, you are warned on standard error.`,
		Example: `  mayfly exec crm.read --param customer=c-17 -- ./report.sh
  mayfly exec crm.read --param customer=c-17 --ttl 5m --reason OPS-12 -- sh -c 'curl -H "Authorization: Bearer $CRM_TOKEN" …'
  mayfly exec --pass-identity crm.read --param customer=c-17 -- mayfly exec mail.send -- ./report-and-send.sh`,
		ValidArgsFunction: p.completeExec,
	}
	c.Args = func(cmd *cobra.Command, args []string) error {
		if cmd.ArgsLenAtDash() != 1 || len(args) < 2 {
			return &exitError{exitExec, errors.New("use it as: mayfly exec TOOL [flags] -- COMMAND [ARG...]")}
		}
		return nil
	}
	ask.add(c)
	c.Flags().BoolVar(&passIdentity, "pass-identity", false, "leave MAYFLY_* and SPIFFE_ENDPOINT_SOCKET in the command's environment")
	p.verb(c, func(ctx context.Context, args []string) error {
		req, err := ask.request(args[0])
		if err != nil {
			return err
		}
		r := runner{p: p, passIdentity: passIdentity}
		return r.run(ctx, req, args[1:])
	})
	return runsCommand(c)
}

// runsCommand is for verbs that run a command: their own failures have a code of
// their own, beside the command's.
func runsCommand(c *cobra.Command) *cobra.Command {
	do := c.RunE
	c.RunE = func(cmd *cobra.Command, args []string) error { return ownFailure(do(cmd, args)) }
	c.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return &exitError{exitExec, err} })
	return c
}

// ownFailure gives what failed before a command was started the code 125. What
// has nothing to say is the command's own exit code, which may be any.
func ownFailure(err error) error {
	var exit *exitError
	if err == nil || errors.As(err, &exit) && (exit.err == nil || exit.code != exitUsage) {
		return err
	}
	if code := codeOf(err); code > exitSignal {
		return &exitError{code, err}
	}
	return &exitError{exitExec, err}
}

func (p *program) completeExec(cmd *cobra.Command, args []string, word string) ([]cobra.Completion, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveDefault // the command: as the shell does it
	}
	return p.completeArgs(p.toolNames)(cmd, args, word)
}

// runner runs one command with a credential.
type runner struct {
	p            *program
	passIdentity bool
}

func (r *runner) run(ctx context.Context, req client.GetRequest, argv []string) error {
	// A command that is not there costs no credential.
	path, err := exec.LookPath(argv[0])
	if err != nil {
		return startFailure(argv[0], err)
	}
	signals := listen()
	defer signals.stop()
	return r.p.with(ctx, func(c *client.Client) error {
		cred, err := r.p.obtain(ctx, c, req)
		if err != nil {
			return err
		}
		code, err := r.child(path, argv, cred, signals)
		// Whatever comes now, the credential is given back first; a failure of
		// that was told, and hides nothing.
		_ = r.p.giveBack(ctx, c, cred.Lease, "the command ended")
		if err != nil {
			return err
		}
		if code != 0 {
			return &exitError{code: code}
		}
		return nil
	})
}

// child runs the command to its end and returns its exit code. An error means
// that it was not started.
func (r *runner) child(path string, argv []string, cred *client.Credential, signals *signals) (int, error) {
	vars, err := cred.Variables()
	if err != nil {
		return 0, err
	}
	if len(vars) == 0 {
		return 0, fmt.Errorf("tool %s sets no environment variables, so there is nothing to give to a command; use get", clean(cred.Lease.Tool))
	}
	end := time.NewTimer(cred.Lease.End.Sub(r.p.now()))
	defer end.Stop()
	return r.command(path, argv, r.environ(vars), signals, end.C, func() {
		r.p.warn("lease %s ended while %s still runs: its credential is not accepted any more", cred.Lease.ID, clean(argv[0]))
	})
}

// command runs a command to its end, passes signals on to it, and returns its
// exit code. An error means that it was not started. late is called when end
// comes before the command's.
func (r *runner) command(path string, argv, env []string, signals *signals, end <-chan time.Time, late func()) (int, error) {
	cmd := &exec.Cmd{
		Path: path, Args: argv, Env: env,
		Stdin: r.p.stdin, Stdout: r.p.stdout, Stderr: r.p.stderr,
	}
	if err := cmd.Start(); err != nil {
		return 0, startFailure(argv[0], err)
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	for {
		select {
		case sig := <-signals.c:
			if !fromTerminal(sig) {
				_ = cmd.Process.Signal(sig) // an error means that it has just ended
			}
		case <-end:
			late()
		case err := <-done:
			return childCode(cmd, err)
		}
	}
}

// environ is the command's environment: ours, without our identity and without
// variables of the credential's names, and then the credential's.
func (r *runner) environ(vars []client.Variable) []string {
	taken := map[string]bool{}
	for _, v := range vars {
		taken[v.Name] = true
	}
	var env []string
	for _, e := range r.p.environ {
		name, _, _ := strings.Cut(e, "=")
		if taken[name] || !r.passIdentity && (strings.HasPrefix(name, "MAYFLY_") || name == client.EnvWorkload) {
			continue
		}
		env = append(env, e)
	}
	for _, v := range vars {
		env = append(env, v.Name+"="+v.Value)
	}
	return env
}

// startFailure tells why a command was not started, as env(1) does: 127 if it
// was not found, 126 if it was.
func startFailure(name string, err error) error {
	if errors.Is(err, exec.ErrNotFound) || errors.Is(err, fs.ErrNotExist) {
		return &exitError{exitNoCommand, fmt.Errorf("command %q was not found", name)}
	}
	var where *exec.Error
	if errors.As(err, &where) {
		err = where.Err
	}
	return &exitError{exitCannotRun, fmt.Errorf("command %q cannot be started: %w", name, err)}
}

// childCode is the exit code that tells how the command ended.
func childCode(cmd *exec.Cmd, err error) (int, error) {
	if cmd.ProcessState == nil {
		return 0, fmt.Errorf("waiting for the command: %w", err)
	}
	if ws, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		return exitSignal + int(ws.Signal()), nil
	}
	return cmd.ProcessState.ExitCode(), nil
}
