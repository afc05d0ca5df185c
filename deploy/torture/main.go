//go:build unix

// Torture kills a real broker again and again, at random instants and at named
// failpoints, while clients use it against a real Vault and a real PostgreSQL
// over a network that fails, and compares what the world has with what the
// broker says. docs/torture.md tells how to read what it reports.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := command(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// command runs the program and returns its exit code: 0 if nothing was found,
// 1 if there was a violation or the run could not be carried through, 2 for a
// wrong command line.
func command(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	flags := flag.NewFlagSet("torture", flag.ContinueOnError)
	flags.SetOutput(stderr)
	var opt options
	flags.Uint64Var(&opt.seed, "seed", 1, "decides what is drawn: faults, instants, who does what")
	flags.IntVar(&opt.rounds, "rounds", 0, "how many kills; 0: as many as --duration allows, or 40")
	flags.DurationVar(&opt.duration, "duration", 0, "how long to go on, the end not included; 0: as long as the rounds take")
	flags.IntVar(&opt.clients, "clients", 16, "how many agents ask at the same time")
	flags.StringVar(&opt.bin, "mayflyd", "bin/torture/mayflyd", "the broker, built with -tags failpoints")
	flags.StringVar(&opt.vault, "vault", "bin/testbed/vault", "the testbed's Vault")
	flags.StringVar(&opt.mutate, "mutate", "", "take a protection out of the broker: no-intent")
	flags.BoolVar(&opt.calm, "calm", false, "kills alone: no faults of the network's or of the servers'")
	flags.DurationVar(&opt.bound, "bound", settleBound, "how long a lease may be minting or revoking")
	flags.BoolVar(&opt.stop, "stop", false, "stop at the first violation; --mutate does")
	flags.BoolVar(&opt.verbose, "verbose", false, "tell of each round")
	keep := flags.Bool("keep", false, "keep the run's folder")
	asJSON := flags.Bool("json", false, "write the report as JSON to the standard output, and the rest to the standard error")
	if err := flags.Parse(args); err != nil {
		return 2
	}
	if flags.NArg() > 0 || opt.clients < 1 || opt.rounds < 0 || opt.duration < 0 || opt.mutate != "" && opt.mutate != "no-intent" {
		fmt.Fprintln(stderr, "torture: there is an argument that means nothing; see --help")
		return 2
	}
	if opt.rounds == 0 && opt.duration == 0 {
		opt.rounds = 40
	}
	opt.stop = opt.stop || opt.mutate != ""
	told := stdout
	if *asJSON {
		told = stderr
	}
	s, err := whole(ctx, opt, *keep, told)
	if err != nil {
		fmt.Fprintln(stderr, "torture:", err)
		return 1
	}
	if *asJSON {
		err = s.writeJSON(stdout)
	} else {
		s.write(stdout)
	}
	if err != nil || len(s.Violations) > 0 || s.Error != "" {
		return 1
	}
	return 0
}

// whole is one run from beginning to end, with a folder of its own. The folder
// stays if something was found.
func whole(ctx context.Context, opt options, keep bool, told io.Writer) (s summary, err error) {
	if opt.bin, err = filepath.Abs(opt.bin); err != nil {
		return s, err
	}
	if _, err := os.Stat(opt.bin); err != nil {
		return s, fmt.Errorf("looking for the broker: %w; `make torture` builds it", err)
	}
	if opt.dir, err = os.MkdirTemp("", "mayfly-torture-"); err != nil {
		return s, err
	}
	defer func() {
		if !keep && err == nil && len(s.Violations) == 0 && s.Error == "" {
			err = errors.Join(err, os.RemoveAll(opt.dir))
		}
	}()
	r, err := setUp(ctx, opt, told)
	if err != nil {
		return s, fmt.Errorf("%w; see %s", err, opt.dir)
	}
	failed := r.torture(ctx)
	s = r.summary(failed)
	if err := r.close(); err != nil {
		s.Error = errors.Join(failed, err).Error()
	}
	return s, nil
}

// signingKey has the broker make a key for the provider of its own tokens.
func signingKey(ctx context.Context, dir, bin string) (keys string, err error) {
	keys = filepath.Join(dir, "keys")
	if err := os.Mkdir(keys, 0o700); err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	if out, err := exec.CommandContext(ctx, bin, "key", "new", "--dir", keys).CombinedOutput(); err != nil {
		return "", fmt.Errorf("making a signing key: %w: %s", err, out)
	}
	return keys, nil
}
