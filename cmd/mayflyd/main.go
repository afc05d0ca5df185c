// Mayflyd is the Mayfly broker.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/mayfly-security/mayfly/broker"
)

// version is set by the linker.
var version = "unknown"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := execute(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "mayflyd:", err)
		stop()
		os.Exit(1) // the deferred stop has nothing left to do
	}
}

// execute runs the command. Its error is one for people to read.
func execute(ctx context.Context, args []string) error {
	root := rootCommand()
	began := false
	markBegin(root, &began)
	root.SetArgs(args)
	verb, err := root.ExecuteContextC(ctx)
	if err != nil && !began {
		return wrongUse(verb, err)
	}
	return sentence(err)
}

// markBegin has every verb say that its own code has begun: what fails before
// is a wrong use.
func markBegin(c *cobra.Command, began *bool) {
	if inner := c.RunE; inner != nil {
		c.RunE = func(cmd *cobra.Command, args []string) error {
			*began = true
			return inner(cmd, args)
		}
	}
	for _, sub := range c.Commands() {
		markBegin(sub, began)
	}
}

func wrongUse(verb *cobra.Command, err error) error {
	text := err.Error()
	if missing, ok := strings.CutPrefix(text, "required flag(s) "); ok {
		missing = strings.ReplaceAll(strings.TrimSuffix(missing, " not set"), `"`, "")
		text = verb.CommandPath() + " needs --" + strings.ReplaceAll(missing, ", ", ", --")
	}
	return fmt.Errorf("%s; see `%s --help`", text, verb.CommandPath())
}

func rootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:   "mayflyd",
		Short: "The Mayfly broker: short-lived credentials for agents, just in time",
		Long: `Mayflyd is the Mayfly broker. Agents prove who they are with SPIFFE SVIDs and get
a credential for exactly one tool, for as long as an approved grant allows.

Begin with "mayflyd dev": a broker, a trust domain and a sample catalog on this
machine, for trying things out.`,
		Version:           version,
		SilenceErrors:     true,
		SilenceUsage:      true,
		DisableAutoGenTag: true,
	}
	root.CompletionOptions.HiddenDefaultCmd = true
	root.AddCommand(devCommand(), serverCommand(), checkCommand(), keyCommand(), clockCommand(), backupCommand(), recoverCommand(), docsCommand())
	return root
}

// newLog makes the broker's log: JSON lines on w. Errors can quote what callers
// and upstreams sent, so each is bounded and made safe to show.
func newLog(w io.Writer, level slog.Level) *slog.Logger {
	return slog.New(slog.NewJSONHandler(w, &slog.HandlerOptions{Level: level, ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if err, ok := a.Value.Any().(error); ok {
			a.Value = slog.StringValue(broker.OneLine(broker.Shorten(err.Error(), maxLogged)))
		} else if a.Value.Kind() == slog.KindString && len(a.Value.String()) > maxLogged {
			a.Value = slog.StringValue(broker.Shorten(a.Value.String(), maxLogged))
		}
		return a
	}}))
}

// maxLogged bounds one value in the log, in bytes.
const maxLogged = 2000

// onHangup gives a value for each SIGHUP, until ctx ends.
func onHangup(ctx context.Context) <-chan struct{} {
	signals, out := make(chan os.Signal, 1), make(chan struct{})
	signal.Notify(signals, syscall.SIGHUP)
	go func() {
		defer signal.Stop(signals)
		for {
			select {
			case <-signals:
			case <-ctx.Done():
				return
			}
			select {
			case out <- struct{}{}:
			case <-ctx.Done():
				return
			}
		}
	}()
	return out
}

// sentence is an error as a person reads it: what happened, and what to do.
func sentence(err error) error {
	var e *broker.Error
	if errors.As(err, &e) && e.Next != "" {
		return fmt.Errorf("%s; %s", e.Message, e.Next)
	}
	if errors.Is(err, syscall.EADDRINUSE) {
		return fmt.Errorf("%w: another process listens there, perhaps another mayflyd; stop it, or choose another address", err)
	}
	return err
}
