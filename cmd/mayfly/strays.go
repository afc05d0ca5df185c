package main

import (
	"context"
	"time"

	"github.com/spf13/cobra"

	"github.com/mayfly-security/mayfly/broker/client"
)

func (p *program) straysCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "strays",
		Short: "List what providers have and no lease answers for (operators)",
		Long: `Strays lists what providers have under this installation's name and no lease
answers for. There are some after a restore: leases that were made after the
backup. What belongs to a lease that is over is removed without being asked.

For the rest, decide: each dies by itself at the time shown, or end it now with
"mayfly strays end".`,
		Example: "  mayfly strays\n  mayfly strays --output json",
		Args:    none,
	}
	c.AddCommand(p.strayEndCommand())
	return p.verb(c, func(ctx context.Context, _ []string) error {
		return p.with(ctx, func(c *client.Client) error { return p.listStrays(ctx, c) })
	})
}

func (p *program) listStrays(ctx context.Context, c *client.Client) error {
	view := struct {
		Strays []strayView `json:"strays"`
	}{[]strayView{}}
	var rows [][]string
	now := p.now()
	for s, err := range c.Strays(ctx) {
		if err != nil {
			return err
		}
		view.Strays = append(view.Strays, viewStray(s))
		rows = append(rows, []string{s.Provider, s.Name, s.Kind, string(s.Lease), deathText(s.DiesAt, now), relative(s.FoundAt, now), strayText(s)})
	}
	return p.show(view, func(out *page) {
		if len(rows) == 0 {
			out.line("No strays.")
			return
		}
		out.table([]string{"PROVIDER", "NAME", "KIND", "LEASE", "DIES BY ITSELF", "FOUND", "STATE"}, rows)
	})
}

func deathText(at, now time.Time) string {
	switch {
	case at.IsZero():
		return "not known"
	case !at.After(now):
		return "dead since " + span(now.Sub(at))
	}
	return relative(at, now)
}

// strayText says what becomes of a stray.
func strayText(s client.Stray) string {
	switch {
	case s.EndedBy != "":
		return "being ended, by " + s.EndedBy
	case s.Why == "lease_ended":
		return "being ended, its lease is over"
	case s.Why == "expired":
		return "being removed"
	}
	return "waits for a decision"
}

func (p *program) strayEndCommand() *cobra.Command {
	var reason string
	c := &cobra.Command{
		Use:   "end PROVIDER NAME --reason TEXT",
		Short: "End a stray at its provider (operators)",
		Long: `End has a stray ended and removed at its provider, and waits a moment for it. It is
tried until it is gone, whether you wait or not. Your name and the reason are in
the evidence.`,
		Example: `  mayfly strays end vault-main mf_k3x9q0a1b-l0mbp1x2q3w4e5r6t7y8u9i0o1_x7 --reason "left by the restore of Monday"`,
		Args:    exactlyTwo("PROVIDER", "NAME"), ValidArgsFunction: cobra.NoFileCompletions,
		DisableFlagsInUseLine: true,
	}
	c.Flags().StringVar(&reason, "reason", "", "why, for the evidence (required)")
	need(c, "reason")
	return p.verb(c, func(ctx context.Context, args []string) error {
		if reason == "" {
			return usagef("--reason is empty; say why")
		}
		return p.with(ctx, func(c *client.Client) error {
			s, removed, err := c.EndStray(ctx, args[0], args[1], reason)
			if err != nil {
				return err
			}
			return p.show(strayEndView{viewStray(s), removed}, func(out *page) {
				if removed {
					out.line("%s of provider %s is gone.", s.Name, s.Provider)
				} else {
					out.line("%s of provider %s is being ended, and is not gone yet; it is tried until it is (see `mayfly strays`).", s.Name, s.Provider)
				}
			})
		})
	})
}
