package main

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/client"
)

const (
	// cutOffWait is how long a cut-off is watched unless told otherwise.
	cutOffWait = durationFlag(2 * time.Minute)
	// cutOffPause is the pause between two looks.
	cutOffPause = time.Second
)

// cutOffFlags are the flags of `mayfly aws cut-off`.
type cutOffFlags struct {
	provider, reason string
	dryRun, yes      bool
	wait             durationFlag
}

func (p *program) awsCutOffCommand() *cobra.Command {
	f := cutOffFlags{wait: cutOffWait}
	c := &cobra.Command{
		Use:   "cut-off ROLE --provider NAME --reason TEXT",
		Short: "End every session of a role at once, in an emergency (operators)",
		Long: `Cut-off ends every session of a role that was made up to now, WHOEVER MADE IT: all
leases of the role, and sessions of people, of services and of other brokers. It
is for an emergency in which it is not known which sessions are in wrong hands.
Where that is known, use "mayfly revoke", which ends them and no others.

ROLE is the role's ARN, as the catalog's tools name it. It shows what it hits, asks
that you type a phrase, and waits until the role's policy was seen to deny. New
leases of the role work after a few seconds; until then none is made. Who else
uses the role gets new sessions, too: take the role's trust away from those that
must not.

What was begun goes on without you, also if the broker is killed meanwhile or AWS
cannot be reached. It stands for 12 hours, longer than any session lives. To do it
again also ends what was made meanwhile. --dry-run only shows.

It exits with 7 if at the end of --wait it was not seen to be in force, or a lease
that it hit is not known to be dead.`,
		Example: "  mayfly aws cut-off arn:aws:iam::123456789012:role/mayfly/crm --provider aws --dry-run\n" +
			"  mayfly aws cut-off arn:aws:iam::123456789012:role/mayfly/crm --provider aws --reason \"SEC-9: keys in a public log\"",
		Args: exactly("ROLE"), ValidArgsFunction: p.completeArgs(p.cutOffRoles),
		DisableFlagsInUseLine: true,
	}
	c.Flags().StringVar(&f.provider, "provider", "", "the provider of the role, as the catalog names it (required)")
	c.Flags().StringVar(&f.reason, "reason", "", "why, for the evidence (required, unless with --dry-run)")
	c.Flags().BoolVar(&f.dryRun, "dry-run", false, "only show what would end")
	c.Flags().BoolVar(&f.yes, "yes", false, "do not ask")
	c.Flags().Var(&f.wait, "wait", "how long to wait until it is seen to be in force")
	need(c, "provider")
	p.completeFlag(c, "provider", p.providerNames)
	return p.verb(c, func(ctx context.Context, args []string) error {
		switch {
		case args[0] == "":
			return usagef("the ROLE is empty")
		case f.provider == "":
			return usagef("--provider is empty")
		case f.dryRun:
		case f.reason == "":
			return usagef("%s needs --reason: it is in the evidence", c.CommandPath())
		case !f.yes && !p.interactive():
			return usagef("nobody can be asked here: say --yes if you mean it")
		}
		return p.with(ctx, func(c *client.Client) error { return p.awsCutOff(ctx, c, args[0], f) })
	})
}

func (p *program) awsCutOff(ctx context.Context, c *client.Client, role string, f cutOffFlags) error {
	if f.dryRun || !f.yes {
		would, err := c.CutOff(ctx, f.provider, role, "", true)
		if err != nil {
			return err
		}
		if f.dryRun {
			return p.show(viewCutOff(would), func(out *page) { out.cutOff(would, "would") })
		}
		p.tell(func(out *page) { out.cutOff(would, "will") })
		if err := p.confirm("This ends EVERY session of the role, whoever has it.", "cut off"); err != nil {
			return err
		}
	}
	began := time.Now()
	cut, err := c.CutOff(ctx, f.provider, role, f.reason, false)
	if err != nil {
		return err
	}
	p.tell(func(out *page) { out.line("%s", cutOffText(cut)) })
	for !over(cut) && time.Since(began) < time.Duration(f.wait) {
		select {
		case <-ctx.Done():
			p.warn("what was begun goes on at the broker; `mayfly aws cut-offs` shows how it stands")
			return ctx.Err()
		case <-time.After(cutOffPause):
		}
		was := cut
		if cut, err = p.cutOffNow(ctx, c, was); err != nil {
			p.warn("what was begun goes on at the broker; `mayfly aws cut-offs` shows how it stands")
			return err
		}
		if cutOffText(cut) != cutOffText(was) {
			p.tell(func(out *page) { out.line("%s", cutOffText(cut)) })
		}
	}
	err = p.show(viewCutOff(cut), func(out *page) {
		is := "is cut off"
		if cut.Progress != broker.ProgressVerified {
			is = "is NOT known to be cut off yet"
		}
		out.line("%s %s: %s.", cut.Role, is, cutOffText(cut))
		if clear := cut.ClearAt.Sub(p.now()); clear > 0 {
			out.line("New leases of the role work %s.", when(cut.ClearAt, p.now()))
		} else {
			out.line("New leases of the role work.")
		}
		out.line("It stands until %s.", cut.Until.UTC().Format(time.RFC3339))
	})
	if err == nil && !over(cut) {
		err = &exitError{code: exitAlive, err: fmt.Errorf("not everything is known to be dead: %s", cutOffText(cut))}
	}
	return err
}

// cutOffNow is how a cut-off stands now.
func (p *program) cutOffNow(ctx context.Context, c *client.Client, was client.CutOff) (client.CutOff, error) {
	for is, err := range c.CutOffs(ctx) {
		if err != nil {
			return was, err
		}
		if is.Provider == was.Provider && is.Role == was.Role {
			return is, nil
		}
	}
	return was, nil
}

// over reports whether nothing is left to wait for.
func over(c client.CutOff) bool { return c.Progress == broker.ProgressVerified && c.Alive == 0 }

// cutOffText says how far a cut-off has come.
func cutOffText(c client.CutOff) string {
	s := map[broker.Progress]string{
		broker.ProgressWritten:  "written, and not seen to be in force yet",
		broker.ProgressVerified: "verified: it was seen to be in force",
	}[c.Progress]
	if s == "" {
		s = "decided, and not written yet"
	}
	if c.Failing {
		s += ", AND FAILING: the provider did not take it when it was last asked"
	}
	return s + fmt.Sprintf("; %d of %s alive", c.Alive, count(c.Leases, "lease"))
}

// cutOff writes what a cut-off hits.
func (p *page) cutOff(c client.CutOff, word string) {
	p.line("This %s end %s that the broker made.", word, count(c.Leases, "open lease"))
	p.hits(c)
	p.line("It %s ALSO end %s.", word, c.Others)
	p.line("No lease of the role %s be made until %s.", map[bool]string{true: "could", false: "can"}[word == "would"], c.ClearAt.UTC().Format(time.RFC3339))
}

func (p *page) hits(c client.CutOff) {
	var rows [][]string
	for _, of := range []struct {
		what   string
		counts map[string]int
	}{{"agent", c.ByAgent}, {"tool", c.ByTool}} {
		for _, name := range slices.Sorted(maps.Keys(of.counts)) {
			rows = append(rows, []string{of.what, name, fmt.Sprint(of.counts[name])})
		}
	}
	if len(rows) > 0 {
		p.table([]string{"OF", "NAME", "LEASES"}, rows)
	}
}

func (p *program) awsCutOffsCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "cut-offs",
		Short: "List the roles that are cut off (operators)",
		Long: `Cut-offs lists the roles of which every older session is ended, how far each has
come, and until when it stands: then whatever it ended is dead by itself.`,
		Example: "  mayfly aws cut-offs\n  mayfly aws cut-offs --output json",
		Args:    none,
	}
	return p.verb(c, func(ctx context.Context, _ []string) error {
		return p.with(ctx, func(c *client.Client) error { return p.listCutOffs(ctx, c) })
	})
}

func (p *program) listCutOffs(ctx context.Context, c *client.Client) error {
	view := struct {
		CutOffs []cutOffView `json:"cutOffs"`
	}{[]cutOffView{}}
	var rows [][]string
	now := p.now()
	for cut, err := range c.CutOffs(ctx) {
		if err != nil {
			return err
		}
		view.CutOffs = append(view.CutOffs, viewCutOff(cut))
		rows = append(rows, []string{cut.Provider, cut.Role, relative(cut.DecidedAt, now), cut.DecidedBy, cutOffText(cut), relative(cut.Until, now)})
	}
	return p.show(view, func(out *page) {
		if len(rows) == 0 {
			out.line("No role is cut off.")
			return
		}
		out.table([]string{"PROVIDER", "ROLE", "DECIDED", "BY", "STATE", "STANDS UNTIL"}, rows)
	})
}
