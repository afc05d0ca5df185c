package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/client"
)

func (p *program) leasesCommand() *cobra.Command {
	var agent, tool, grant, incident string
	var f client.LeaseFilter
	c := &cobra.Command{
		Use:   "leases [LEASE]",
		Short: "List leases: what was given, and whether it is dead",
		Long: `Leases lists your leases that have not ended; for an operator, everybody's. With
an ID, it shows one of them whole.

The states: minting (it may be coming into being), active, revoking (it must die,
and its death is not confirmed), revoked (the provider confirmed its death),
expired (it died by itself), lapsed (it is over, and nobody knows that it is dead).
OVERDUE means that a lease is past its end without its death being confirmed.`,
		Example: "  mayfly leases\n  mayfly leases --all --tool crm.read\n  mayfly leases --overdue --output json",
		Args:    atMostOne, ValidArgsFunction: p.completeArgs(p.leaseIDs),
	}
	c.Flags().BoolVar(&f.All, "all", false, "also those that have ended")
	c.Flags().BoolVar(&f.Overdue, "overdue", false, "only those past their end whose death is not confirmed")
	c.Flags().StringVar(&agent, "agent", "", "only of this agent (operators)")
	c.Flags().StringVar(&tool, "tool", "", "only of this tool")
	c.Flags().StringVar(&grant, "grant", "", "only under this grant")
	c.Flags().StringVar(&incident, "incident", "", "only of this incident")
	p.completeFlag(c, "tool", p.toolNames)
	p.completeFlag(c, "grant", p.grantIDs)
	p.completeFlag(c, "incident", p.incidentIDs(true))
	c.AddCommand(p.forgetCommand())
	return p.verb(c, func(ctx context.Context, args []string) error {
		if len(args) == 1 {
			return p.showLease(ctx, args[0])
		}
		var err error
		if f.Agent, err = parseID("--agent", agent); err != nil {
			return err
		}
		f.Tool, f.Grant, f.Incident = tool, broker.GrantID(grant), broker.IncidentID(incident)
		return p.with(ctx, func(c *client.Client) error { return p.listLeases(ctx, c, f) })
	})
}

func (p *program) listLeases(ctx context.Context, c *client.Client, f client.LeaseFilter) error {
	view := struct {
		Leases []leaseView `json:"leases"`
	}{[]leaseView{}}
	var rows [][]string
	now := p.now()
	for l, err := range c.Leases(ctx, f) {
		if err != nil {
			return err
		}
		view.Leases = append(view.Leases, viewLease(l))
		rows = append(rows, []string{string(l.ID), l.Agent.String(), l.Tool, paramText(l.Params), l.OnBehalfOf.String(), stateText(l), endText(l, now), string(l.Cause), l.Survives})
	}
	return p.show(view, func(out *page) {
		if len(rows) == 0 {
			out.line("No leases%s.", map[bool]string{false: "; those that have ended are shown with --all"}[f.All])
			return
		}
		out.table([]string{"LEASE", "AGENT", "TOOL", "PARAMETERS", "ON BEHALF OF", "STATE", "END", "CAUSE", "SURVIVES"}, rows)
	})
}

func (p *program) showLease(ctx context.Context, arg string) error {
	id, err := broker.ParseLeaseID(arg)
	if err != nil {
		return err
	}
	return p.with(ctx, func(c *client.Client) error {
		l, err := c.Lease(ctx, id)
		if err != nil {
			return err
		}
		return p.show(viewLease(l), func(out *page) { out.fields("", leaseFields(l, p.now())...) })
	})
}

// leaseFields are a lease as pairs of name and value.
func leaseFields(l client.Lease, now time.Time) []string {
	died, over := when(l.EndedAt, now), ""
	if l.State == broker.LeaseLapsed {
		died, over = "", died
	}
	return []string{
		"lease", string(l.ID), "tool", l.Tool, "parameters", paramText(l.Params), "agent", l.Agent.String(), "on behalf of", l.OnBehalfOf.String(),
		"state", stateText(l), "cause", string(l.Cause), "reason", l.Reason,
		"given", when(l.CreatedAt, now), "must end", when(l.End, now),
		"dies by itself", when(l.DiesAt, now), "confirmed dead", died, "given up on", over,
		"survives", l.Survives, "left", l.Left, "grant", string(l.Grant), "incident", string(l.Incident),
		"provider", l.Provider, "correlation", string(l.Correlation),
	}
}

func stateText(l client.Lease) string {
	s := string(l.State)
	if l.State == broker.LeaseRevoking && l.Progress != "" {
		s += " (" + string(l.Progress) + ")"
	}
	if l.PastEnd {
		s = "OVERDUE, " + s
	}
	return s
}

// endText says when a lease ends, or since when it is dead.
func endText(l client.Lease, now time.Time) string {
	switch {
	case l.State == broker.LeaseLapsed:
		return "given up on " + span(now.Sub(l.EndedAt)) + " ago, not known to be dead"
	case !l.EndedAt.IsZero():
		return "dead since " + span(now.Sub(l.EndedAt))
	case l.PastEnd:
		return "should be dead since " + span(now.Sub(l.End))
	}
	return relative(l.End, now)
}

// endedText says what became of the leases under what was ended.
func endedText(e client.Ended) string {
	s := fmt.Sprintf("%s confirmed dead", count(e.Dead, "lease"))
	if e.Revoking > 0 {
		s += fmt.Sprintf(", %s still being revoked (see `mayfly leases`)", count(e.Revoking, "lease"))
	}
	if e.Lapsed > 0 {
		s += fmt.Sprintf(", %s over and not known to be dead", count(e.Lapsed, "lease"))
	}
	return s
}
