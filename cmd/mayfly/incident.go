package main

import (
	"context"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/client"
)

func (p *program) incidentCommand() *cobra.Command {
	return group("incident", "Open and close maintenance windows",
		p.incidentOpenCommand(), p.incidentCloseCommand(), p.incidentListCommand(), p.incidentShowCommand())
}

func (p *program) incidentOpenCommand() *cobra.Command {
	var agents []string
	var length durationFlag
	var r client.IncidentRequest
	c := &cobra.Command{
		Use:   "open",
		Short: "Open an incident, and with it a window",
		Long: `Open opens an incident: each of the agents gets a grant to each of the tools, for
as long as the incident is open. The catalog says who may open incidents, for
which agents and tools, and how long; nobody opens one for itself.`,
		Example: `  mayfly incident open --title "CRM answers slowly" --ref PD-4711 \
    --agent spiffe://acme.test/agent/troubleshooter --tool crm.read --for 30m`,
		Args: none,
	}
	c.Flags().StringVar(&r.Title, "title", "", "what is the matter (needed)")
	c.Flags().StringArrayVar(&agents, "agent", nil, "an agent's SPIFFE ID (needed); may be repeated")
	c.Flags().StringArrayVar(&r.Tools, "tool", nil, "a tool (needed); may be repeated")
	c.Flags().Var(&length, "for", "how long it may stay open, such as 30m; default: the most that you may")
	c.Flags().StringVar(&r.Reference, "ref", "", "the incident system's name for it")
	c.Flags().StringVar(&r.Key, "idempotency-key", "", "asking again with the same key opens no second incident")
	p.completeFlag(c, "tool", p.toolNames)
	need(c, "title", "agent", "tool")
	return p.verb(c, func(ctx context.Context, _ []string) error {
		for _, a := range agents {
			id, err := parseID("--agent", a)
			if err != nil {
				return err
			}
			r.Agents = append(r.Agents, id)
		}
		r.For = time.Duration(length)
		return p.with(ctx, func(c *client.Client) error {
			in, err := c.OpenIncident(ctx, r)
			if err != nil {
				return err
			}
			return p.show(viewIncident(in), func(out *page) {
				out.incident(in, p.now())
				out.line("To close it: mayfly incident close %s", in.ID)
			})
		})
	})
}

func (p *program) incidentCloseCommand() *cobra.Command {
	var reason string
	c := &cobra.Command{
		Use:   "close INCIDENT",
		Short: "Close an incident: its grants and leases end",
		Long: `Close closes an incident. When it has returned, nothing of it is given to anybody
any more. It says how many leases are confirmed dead, and how many are still
being revoked. Closing what is closed shows how its leases stand.`,
		Example: "  mayfly incident close i0mbp1x2q3w4e5r6t7y8u9i0o1 --reason resolved",
		Args:    exactly("INCIDENT"), ValidArgsFunction: p.completeArgs(p.incidentIDs(false)),
	}
	c.Flags().StringVar(&reason, "reason", "", "why, for the evidence")
	return p.verb(c, func(ctx context.Context, args []string) error {
		id, err := broker.ParseIncidentID(args[0])
		if err != nil {
			return err
		}
		return p.with(ctx, func(c *client.Client) error {
			in, ended, err := c.CloseIncident(ctx, id, reason)
			if err != nil {
				return err
			}
			return p.show(closingView{viewIncident(in), ended.Dead, ended.Revoking, ended.Lapsed}, func(out *page) {
				out.line("Incident %s is %s: %s.", in.ID, in.State, endedText(ended))
			})
		})
	})
}

func (p *program) incidentListCommand() *cobra.Command {
	var all bool
	c := &cobra.Command{
		Use:     "list",
		Short:   "List incidents",
		Long:    "List lists your open incidents; for an operator, everybody's.",
		Example: "  mayfly incident list --all",
		Args:    none,
	}
	c.Flags().BoolVar(&all, "all", false, "also those that are closed")
	return p.verb(c, func(ctx context.Context, _ []string) error {
		return p.with(ctx, func(c *client.Client) error {
			view := struct {
				Incidents []incidentView `json:"incidents"`
			}{[]incidentView{}}
			var rows [][]string
			now := p.now()
			for in, err := range c.Incidents(ctx, all) {
				if err != nil {
					return err
				}
				view.Incidents = append(view.Incidents, viewIncident(in))
				ends := "ends " + relative(in.EndsAt, now)
				if in.State == broker.IncidentClosed {
					ends = "closed " + relative(in.ClosedAt, now)
				}
				rows = append(rows, []string{string(in.ID), in.Title, in.Reference, string(in.State), ends, in.OpenedBy.String(), count(in.LeasesOpen, "lease")})
			}
			return p.show(view, func(out *page) {
				if len(rows) == 0 {
					out.line("No incidents%s.", map[bool]string{false: "; closed ones are shown with --all"}[all])
					return
				}
				out.table([]string{"INCIDENT", "TITLE", "REF", "STATE", "END", "OPENED BY", "ALIVE"}, rows)
			})
		})
	})
}

func (p *program) incidentShowCommand() *cobra.Command {
	c := &cobra.Command{
		Use:     "show INCIDENT",
		Short:   "Show one incident and its grants",
		Example: "  mayfly incident show i0mbp1x2q3w4e5r6t7y8u9i0o1",
		Args:    exactly("INCIDENT"), ValidArgsFunction: p.completeArgs(p.incidentIDs(true)),
	}
	return p.verb(c, func(ctx context.Context, args []string) error {
		id, err := broker.ParseIncidentID(args[0])
		if err != nil {
			return err
		}
		return p.with(ctx, func(c *client.Client) error {
			in, err := c.Incident(ctx, id)
			if err != nil {
				return err
			}
			return p.show(viewIncident(in), func(out *page) { out.incident(in, p.now()) })
		})
	})
}

// incident writes an incident with its grants.
func (p *page) incident(in client.Incident, now time.Time) {
	p.fields("", "incident", string(in.ID), "title", in.Title, "ref", in.Reference, "state", string(in.State),
		"opened", strings.TrimSpace(when(in.OpenedAt, now)+" by "+in.OpenedBy.String()), "ends", when(in.EndsAt, now),
		"closed", strings.TrimSpace(when(in.ClosedAt, now)+" "+in.ClosedBy), "alive", count(in.LeasesOpen, "lease"))
	if len(in.Window) > 0 {
		p.WriteByte('\n')
		p.grants(in.Window, now)
	}
}
