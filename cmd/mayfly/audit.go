package main

import (
	"context"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/client"
)

// defaultTail is how many events audit list shows unless told otherwise.
const defaultTail = 50

func (p *program) auditCommand() *cobra.Command {
	return group("audit", "Read the evidence", p.auditListCommand())
}

func (p *program) auditListCommand() *cobra.Command {
	var f client.EventFilter
	var lease, grant, incident, request string
	var tail int
	c := &cobra.Command{
		Use:   "list",
		Short: "List events: who did what, when and why",
		Long: `List shows the evidence in the order in which it was committed: the last 50
events that match, or --tail N of them. With --after it shows all events after a
sequence number, so that a program can go on where it stopped. Operators only.`,
		Example: "  mayfly audit list\n  mayfly audit list --incident i0mbp1x2q3w4e5r6t7y8u9i0o1\n  mayfly audit list --after 4711 --output json",
		Args:    none,
	}
	c.Flags().IntVar(&tail, "tail", defaultTail, "how many of the last events, from 1 to 1000")
	c.Flags().Uint64Var(&f.After, "after", 0, "all events after this sequence number, in place of --tail")
	c.Flags().StringVar(&f.Agent, "agent", "", "only of this agent")
	c.Flags().StringVar(&f.Tool, "tool", "", "only of this tool")
	c.Flags().StringVar(&lease, "lease", "", "only of this lease")
	c.Flags().StringVar(&grant, "grant", "", "only of this grant")
	c.Flags().StringVar(&incident, "incident", "", "only of this incident")
	c.Flags().StringVar(&request, "request", "", "only of this request")
	c.Flags().StringVar(&f.Type, "type", "", "only of this type, such as lease.active")
	c.MarkFlagsMutuallyExclusive("tail", "after")
	p.completeFlag(c, "tool", p.toolNames)
	p.completeFlag(c, "lease", p.leaseIDs)
	p.completeFlag(c, "grant", p.grantIDs)
	p.completeFlag(c, "incident", p.incidentIDs(true))
	p.completeFlag(c, "request", p.requestIDs(client.RequestFilter{All: true}))
	return p.verb(c, func(ctx context.Context, _ []string) error {
		if tail < 1 || tail > 1000 {
			return usagef("--tail is %d, and it is from 1 to 1000", tail)
		}
		if !c.Flags().Changed("after") {
			f.Latest = tail
		}
		f.Lease, f.Grant, f.Incident, f.Request = broker.LeaseID(lease), broker.GrantID(grant), broker.IncidentID(incident), broker.RequestID(request)
		return p.with(ctx, func(c *client.Client) error { return p.listEvents(ctx, c, f) })
	})
}

func (p *program) listEvents(ctx context.Context, c *client.Client, f client.EventFilter) error {
	view := struct {
		Events []eventView `json:"events"`
	}{[]eventView{}}
	var rows [][]string
	for e, err := range c.Events(ctx, f) {
		if err != nil {
			return err
		}
		view.Events = append(view.Events, viewEvent(e))
		rows = append(rows, []string{
			strconv.FormatUint(e.Sequence, 10), e.Time.UTC().Format(time.RFC3339), e.Type, e.Actor, e.OnBehalfOf.String(), e.Tool, subject(e), e.Cause, e.Reason, details(e),
		})
	}
	return p.show(view, func(out *page) {
		if len(rows) == 0 {
			out.line("No events.")
			return
		}
		out.table([]string{"SEQ", "TIME", "TYPE", "ACTOR", "ON BEHALF OF", "TOOL", "ABOUT", "CAUSE", "REASON", "DETAILS"}, rows)
	})
}

// subject is what an event is about: the narrowest thing that it names.
func subject(e client.Event) string {
	switch {
	case e.Lease != "":
		return string(e.Lease)
	case e.Grant != "":
		return string(e.Grant)
	case e.Request != "":
		return string(e.Request)
	}
	return string(e.Incident)
}

// digest is what a digest looks like.
var digest = regexp.MustCompile(`^[0-9a-f]{64}$`)

// details are what else an event tells. Digests are cut; --output json has them
// whole.
func details(e client.Event) string {
	var parts []string
	for _, name := range slices.Sorted(maps.Keys(e.Details)) {
		value := e.Details[name]
		if digest.MatchString(value) {
			value = value[:12] + "…"
		}
		parts = append(parts, name+"="+value)
	}
	return strings.Join(parts, " ")
}
