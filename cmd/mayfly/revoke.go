package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/client"
)

// endWait is how long the kill switch is watched unless told otherwise.
const endWait = durationFlag(5 * time.Minute)

// endFlags are the flags of the kill switch.
type endFlags struct {
	agent, incident string
	selector        client.Selector
	dryRun, yes     bool
	wait            durationFlag
}

func (f *endFlags) add(c *cobra.Command, p *program) {
	c.Flags().StringVar(&f.agent, "agent", "", "end everything of this agent")
	c.Flags().StringVar(&f.selector.Tool, "tool", "", "end everything of this tool")
	c.Flags().StringVar(&f.selector.Provider, "provider", "", "end everything at this provider")
	c.Flags().StringVar(&f.selector.Owner, "owner", "", "end everything of the agents of this owner")
	c.Flags().StringVar(&f.incident, "incident", "", "end everything that is for this incident")
	c.Flags().StringVar(&f.selector.Person, "person", "", "end everything that this person asked for, voted for, or is acted for in")
	c.Flags().BoolVar(&f.selector.All, "all", false, "end everything")
	c.Flags().BoolVar(&f.dryRun, "dry-run", false, "only show what would end")
	c.Flags().BoolVar(&f.yes, "yes", false, "do not ask")
	f.wait = endWait
	c.Flags().Var(&f.wait, "wait", "how long to wait until all is dead")
	p.completeFlag(c, "tool", p.toolNames)
	p.completeFlag(c, "incident", p.incidentIDs(false))
}

// names are the selectors that were given.
func (f *endFlags) names(c *cobra.Command) (given []string) {
	for _, name := range []string{"agent", "tool", "provider", "owner", "incident", "person", "all"} {
		if c.Flags().Changed(name) {
			given = append(given, "--"+name)
		}
	}
	return given
}

func (p *program) revokeCommand() *cobra.Command {
	var reason string
	var f endFlags
	c := &cobra.Command{
		Use:   "revoke [LEASE]",
		Short: "End a lease: give a credential back; or everything of an agent, a tool, …",
		Long: `Revoke ends one of your leases; an operator ends anybody's. It waits a moment for
the credential's death and says how far it came. Revocation goes on until the
provider confirms it, whether you wait or not.

With one of --agent, --tool, --provider, --owner, --incident, --person or --all it
is the kill switch, for operators: every grant and every request that matches is
withdrawn, and every lease ended. It shows what that is, asks, and counts down
until all is dead. What was begun goes on without you, also if the broker is
killed meanwhile. --dry-run only shows.

The kill switch exits with 7 if not everything is known to be dead at the end of
--wait. With --output json it prints one JSON object a line, as it goes.`,
		Example: "  mayfly revoke l0mbp1x2q3w4e5r6t7y8u9i0o1\n  mayfly leases --output json | jq -r '.leases[].id' | xargs -n1 mayfly revoke\n" +
			"  mayfly revoke --agent spiffe://acme.test/agent/finance --dry-run\n  mayfly revoke --provider vault-main --reason \"SEC-9: token leaked\"\n" +
			"  mayfly revoke --all --reason \"SEC-9: broker host lost\"",
		Args: atMostOne, ValidArgsFunction: p.completeArgs(p.leaseIDs),
	}
	c.Flags().StringVar(&reason, "reason", "", "why, for the evidence; the kill switch needs it, unless with --dry-run")
	f.add(c, p)
	return p.verb(c, func(ctx context.Context, args []string) error {
		given := f.names(c)
		switch {
		case len(given) > 1:
			return usagef("%s takes one of %s", c.CommandPath(), strings.Join(given, ", "))
		case len(given) == 1 && len(args) == 1:
			return usagef("%s takes a LEASE or %s, and not both", c.CommandPath(), given[0])
		case len(given) == 1:
			return p.endAccess(ctx, f, given[0], reason)
		case len(args) == 0:
			return usagef("%s needs a LEASE, or one of --agent, --tool, --provider, --owner, --incident, --person, --all", c.CommandPath())
		case f.dryRun || f.yes || c.Flags().Changed("wait"):
			return usagef("--dry-run, --yes and --wait are for the kill switch, and not for one LEASE")
		}
		return p.revokeLease(ctx, args[0], reason)
	})
}

func (p *program) revokeLease(ctx context.Context, arg, reason string) error {
	id, err := broker.ParseLeaseID(arg)
	if err != nil {
		return err
	}
	return p.with(ctx, func(c *client.Client) error {
		l, err := c.Revoke(ctx, id, reason)
		if err != nil {
			return err
		}
		return p.show(viewLease(l), func(out *page) {
			switch l.State {
			case broker.LeaseRevoked, broker.LeaseExpired:
				out.line("Lease %s is dead: %s%s.", l.ID, l.State, inBrackets(string(l.Cause)))
			case broker.LeaseLapsed:
				out.line("Lease %s is over; it is not known to be dead%s.", l.ID, inBrackets(string(l.Cause)))
			default:
				out.line("Lease %s is being revoked; its death is not confirmed yet%s.", l.ID, inBrackets(string(l.Progress)))
			}
			if l.Survives != "" {
				out.line("What survives: %s", l.Survives)
			}
		})
	})
}

// endAccess is the kill switch.
func (p *program) endAccess(ctx context.Context, f endFlags, given, reason string) error {
	var err error
	s := f.selector
	if s.Agent, err = parseID("--agent", f.agent); err != nil {
		return err
	}
	if f.incident != "" {
		if s.Incident, err = broker.ParseIncidentID(f.incident); err != nil {
			return err
		}
	}
	if s.Agent.IsZero() && s.Tool == "" && s.Provider == "" && s.Owner == "" && s.Incident == "" && s.Person == "" && !s.All {
		return usagef("%s names nothing", given)
	}
	switch {
	case f.dryRun:
	case reason == "":
		return usagef("%s needs --reason: it is in the evidence", given)
	case !f.yes && !p.interactive():
		return usagef("nobody can be asked here: say --yes if you mean it")
	}
	return p.with(ctx, func(c *client.Client) error {
		if f.dryRun || !f.yes {
			radius, err := first(c.EndAccess(ctx, s, true, ""))
			if err != nil {
				return err
			}
			if f.dryRun {
				return p.show(viewRadius(radius), func(out *page) { out.radius(radius, "would") })
			}
			p.tell(func(out *page) { out.radius(radius, "will") })
			if err := p.confirmEnd(s); err != nil {
				return err
			}
		}
		return p.countDown(ctx, c, s, reason, time.Duration(f.wait))
	})
}

// first is the first of a sequence, which has one.
func first(all func(func(client.Radius, error) bool)) (r client.Radius, err error) {
	err = errors.New("the broker told nothing")
	all(func(v client.Radius, e error) bool {
		r, err = v, e
		return false
	})
	return r, err
}

// confirmEnd asks whether the kill switch is meant; for everything there is, by
// a word that nobody types by habit.
func (p *program) confirmEnd(s client.Selector) error {
	if s.All {
		return p.confirm("This ends ALL access of EVERYBODY, at once.", "end everything")
	}
	return p.agree("End it all?")
}

// countDown pulls the kill switch and tells how what it hit dies.
func (p *program) countDown(ctx context.Context, c *client.Client, s client.Selector, reason string, wait time.Duration) error {
	// The wait begins with the first answer, however short it is.
	watching, stop := context.WithCancel(ctx)
	defer stop()
	over := time.AfterFunc(max(wait, cmp.Or(time.Duration(p.timeout), time.Minute)), stop)
	defer over.Stop()
	live := p.output != "json" && p.onScreen()
	var last client.Radius
	heard := false
	for r, err := range c.EndAccess(watching, s, false, reason) {
		if err != nil {
			if live && heard {
				_, _ = io.WriteString(p.stderr, "\n") // where standard error is gone, nobody can be told
			}
			if !heard || watching.Err() == nil {
				if heard {
					p.warn("what was begun goes on at the broker; `mayfly leases` shows how it stands")
				}
				return err
			}
			if ctx.Err() != nil {
				p.warn("what was begun goes on at the broker; `mayfly leases` shows how it stands")
				return ctx.Err()
			}
			break // --wait is over
		}
		if !heard {
			over.Reset(wait)
		}
		same := heard && !live && p.output != "json" && aliveText(r) == aliveText(last)
		heard, last = true, r
		if same {
			continue // where lines stay, one says it
		}
		if err := p.tick(r, live); err != nil {
			return err
		}
	}
	if live {
		_, _ = io.WriteString(p.stderr, "\n") // as above
	}
	if p.output != "json" {
		if err := p.show(nil, func(out *page) { out.ended(last) }); err != nil {
			return err
		}
	}
	if last.Alive > 0 || last.Lapsed > 0 || !last.Done {
		return &exitError{code: exitAlive, err: fmt.Errorf("not everything is known to be dead: %s", aliveText(last))}
	}
	return nil
}

// tick shows one step of the count down: over the last one on a terminal, and
// as a line of its own elsewhere.
func (p *program) tick(r client.Radius, live bool) error {
	switch {
	case p.output == "json":
		return writeLine(p.stdout, viewRadius(r))
	case live:
		_, err := io.WriteString(p.stderr, "\r\x1b[K"+clean(aliveText(r)))
		return err
	}
	p.tell(func(out *page) { out.line("%s", aliveText(r)) })
	return nil
}

// aliveText says how many leases are alive.
func aliveText(r client.Radius) string {
	s := fmt.Sprintf("%d of %s alive", r.Alive, count(r.Leases, "lease"))
	if r.Overdue > 0 {
		s += fmt.Sprintf(", %d of them OVERDUE", r.Overdue)
	}
	if r.Lapsed > 0 {
		s += fmt.Sprintf(", %d over and not known to be dead", r.Lapsed)
	}
	return s
}

// radius writes what the kill switch hits.
func (p *page) radius(r client.Radius, word string) {
	p.line("This %s withdraw %s and %s, and end %s.", word, count(r.Grants, "grant"), count(r.Requests, "request"), count(r.Leases, "lease"))
	p.nothing(r)
	var rows [][]string
	for _, of := range []struct {
		what   string
		counts map[string]int
	}{{"agent", r.ByAgent}, {"tool", r.ByTool}, {"provider", r.ByProvider}} {
		for _, name := range slices.SortedFunc(maps.Keys(of.counts), func(a, b string) int {
			if d := of.counts[b] - of.counts[a]; d != 0 {
				return d
			}
			return strings.Compare(a, b)
		}) {
			rows = append(rows, []string{of.what, name, fmt.Sprint(of.counts[name])})
		}
	}
	if len(rows) > 0 {
		p.table([]string{"OF", "NAME", "LEASES"}, rows)
	}
	p.survives(r)
}

// nothing says that nothing was hit: in haste, what is misspelt looks like what
// is dead.
func (p *page) nothing(r client.Radius) {
	if r.Grants == 0 && r.Requests == 0 && r.Leases == 0 {
		p.line("Nothing matches. If you expected something, look at the spelling: `mayfly grant list` and `mayfly leases` show names.")
	}
}

func (p *page) survives(r client.Radius) {
	for _, s := range r.Survives {
		p.line("What survives: %s", s)
	}
}

// ended writes how the kill switch ended.
func (p *page) ended(r client.Radius) {
	dead := max(r.Leases-r.Alive-r.Lapsed, 0)
	s := fmt.Sprintf("%s and %s are withdrawn; %s", count(r.Grants, "grant"), count(r.Requests, "request"), endedText(client.Ended{Dead: dead, Revoking: r.Alive, Lapsed: r.Lapsed}))
	p.line("%s.", s)
	p.nothing(r)
	p.survives(r)
}

// onScreen reports whether standard error is a terminal.
func (p *program) onScreen() bool {
	if p.screen != nil {
		return p.screen()
	}
	f, ok := p.stderr.(*os.File)
	return ok && isTerminal(f)
}
