package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/client"
)

func (p *program) grantCommand() *cobra.Command {
	return group("grant", "Give and take rights: one agent, one tool, one span of time",
		p.grantCreateCommand(), p.grantListCommand(), p.grantWithdrawCommand())
}

func (p *program) grantCreateCommand() *cobra.Command {
	var agent, from string
	var params []string
	var length durationFlag
	var r client.GrantRequest
	c := &cobra.Command{
		Use:   "create",
		Short: "Give one agent the right to one tool for a time",
		Long: `Create makes a grant. Operators only, and never for themselves. The grant is for
the tool as it is now: if the tool is changed later, the grant is suspended.

--param fixes a value: a lease must ask for exactly that one.`,
		Example: `  mayfly grant create --agent spiffe://acme.test/agent/troubleshooter --tool crm.read --for 1h --reason "OPS-12"
  mayfly grant create --agent spiffe://acme.test/agent/troubleshooter --tool crm.read --param customer=c-17 \
    --from 2026-05-01T08:00:00Z --for 1d --uses 3 --reason "migration"`,
		Args: none,
	}
	c.Flags().StringVar(&agent, "agent", "", "the agent's SPIFFE ID (needed)")
	c.Flags().StringVar(&r.Tool, "tool", "", "the tool (needed)")
	c.Flags().Var(&length, "for", "how long it is good, such as 1h or 1d (needed)")
	c.Flags().StringVar(&from, "from", "", "when it begins: an RFC 3339 time, or a span from now such as 2h; default: now")
	paramFlag(c, &params, "fixes a parameter, name=value; may be repeated")
	c.Flags().IntVar(&r.MaxUses, "uses", 0, "how many leases may be made under it; 0 means any number")
	c.Flags().StringVar(&r.Reason, "reason", "", "why, for the evidence (needed)")
	c.Flags().StringVar(&r.Key, "idempotency-key", "", "asking again with the same key makes no second grant")
	p.completeFlag(c, "tool", p.toolNames)
	need(c, "agent", "tool", "for", "reason")
	return p.verb(c, func(ctx context.Context, _ []string) error {
		var err error
		if r.Agent, err = parseID("--agent", agent); err != nil {
			return err
		}
		if r.Params, err = parseParams(params); err != nil {
			return err
		}
		if from != "" {
			if r.NotBefore, err = parseInstant(from, p.now()); err != nil {
				return usagef("--from %q: %w", from, err)
			}
		}
		if r.MaxUses < 0 {
			return usagef("--uses is negative")
		}
		r.For = time.Duration(length)
		return p.with(ctx, func(c *client.Client) error {
			g, err := c.CreateGrant(ctx, r)
			if err != nil {
				return err
			}
			return p.show(viewGrant(g), func(out *page) { out.fields("", grantFields(g, p.now())...) })
		})
	})
}

func (p *program) grantListCommand() *cobra.Command {
	var agent, tool, incident string
	var f client.GrantFilter
	c := &cobra.Command{
		Use:     "list",
		Short:   "List grants",
		Long:    "List lists your grants that are open; for an operator, everybody's. SUSPENDED\nmeans that the tool was changed after the grant was made.",
		Example: "  mayfly grant list\n  mayfly grant list --all --agent spiffe://acme.test/agent/troubleshooter",
		Args:    none,
	}
	c.Flags().BoolVar(&f.All, "all", false, "also those that have ended")
	c.Flags().StringVar(&agent, "agent", "", "only of this agent (operators)")
	c.Flags().StringVar(&tool, "tool", "", "only to this tool")
	c.Flags().StringVar(&incident, "incident", "", "only of this incident")
	p.completeFlag(c, "tool", p.toolNames)
	p.completeFlag(c, "incident", p.incidentIDs(true))
	return p.verb(c, func(ctx context.Context, _ []string) error {
		var err error
		if f.Agent, err = parseID("--agent", agent); err != nil {
			return err
		}
		f.Tool, f.Incident = tool, broker.IncidentID(incident)
		return p.with(ctx, func(c *client.Client) error {
			view := struct {
				Grants []grantView `json:"grants"`
			}{[]grantView{}}
			var grants []client.Grant
			for g, err := range c.Grants(ctx, f) {
				if err != nil {
					return err
				}
				view.Grants = append(view.Grants, viewGrant(g))
				grants = append(grants, g)
			}
			return p.show(view, func(out *page) {
				if len(grants) == 0 {
					out.line("No grants%s.", map[bool]string{false: "; those that have ended are shown with --all"}[f.All])
					return
				}
				out.grants(grants, p.now())
			})
		})
	})
}

func (p *program) grantWithdrawCommand() *cobra.Command {
	var reason string
	c := &cobra.Command{
		Use:     "withdraw GRANT",
		Short:   "End a grant and every lease under it",
		Long:    "Withdraw ends a grant and every lease under it. It says how many leases are\nconfirmed dead, and how many are still being revoked.",
		Example: "  mayfly grant withdraw g0mbp1x2q3w4e5r6t7y8u9i0o1 --reason \"no longer needed\"",
		Args:    exactly("GRANT"), ValidArgsFunction: p.completeArgs(p.grantIDs),
	}
	c.Flags().StringVar(&reason, "reason", "", "why, for the evidence")
	return p.verb(c, func(ctx context.Context, args []string) error {
		id, err := broker.ParseGrantID(args[0])
		if err != nil {
			return err
		}
		return p.with(ctx, func(c *client.Client) error {
			g, ended, err := c.WithdrawGrant(ctx, id, reason)
			if err != nil {
				return err
			}
			return p.show(withdrawalView{viewGrant(g), ended.Dead, ended.Revoking, ended.Lapsed}, func(out *page) {
				out.line("Grant %s is %s: %s.", g.ID, g.State, endedText(ended))
			})
		})
	})
}

// grants writes grants as a table.
func (p *page) grants(grants []client.Grant, now time.Time) {
	var rows [][]string
	for _, g := range grants {
		rows = append(rows, []string{string(g.ID), g.Agent.String(), g.Tool, paramText(g.Params), grantState(g), grantSpan(g, now), usesText(g), string(g.Incident), userText(g.OnBehalfOf), ruleText(g), g.Reason})
	}
	p.table([]string{"GRANT", "AGENT", "TOOL", "PARAMETERS", "STATE", "GOOD", "USES", "INCIDENT", "ON BEHALF OF", "APPROVED", "REASON"}, rows)
}

func grantFields(g client.Grant, now time.Time) []string {
	return []string{
		"grant", string(g.ID), "agent", g.Agent.String(), "tool", g.Tool, "fixed", paramText(g.Params),
		"state", grantState(g), "begins", when(g.NotBefore, now), "ends", when(g.NotAfter, now), "uses", usesText(g),
		"reason", g.Reason, "made by", g.CreatedBy.String(), "incident", string(g.Incident),
		"request", string(g.Request), "on behalf of", userText(g.OnBehalfOf), "approved", ruleText(g), "policies", g.PolicyDigest,
		"ended", strings.TrimSpace(when(g.EndedAt, now) + " " + g.EndedBy),
	}
}

// userText names the user on whose behalf an agent acts.
func userText(u *broker.User) string {
	if u == nil {
		return ""
	}
	return u.Principal().String()
}

// ruleText says who agreed to a grant, and under which rule; empty for one that
// nobody had to agree to.
func ruleText(g client.Grant) string {
	if g.Rule == "" {
		return ""
	}
	var voters []string
	for _, v := range g.Voters {
		voters = append(voters, v.Name)
	}
	s := "rule " + g.Rule
	if len(voters) > 0 {
		s = "by " + strings.Join(voters, ", ") + ", " + s
	}
	if g.BreakGlass {
		s = "BREAK-GLASS " + s
	}
	return s
}

func grantState(g client.Grant) string {
	if g.Suspended {
		return string(g.State) + ", SUSPENDED"
	}
	return string(g.State)
}

func grantSpan(g client.Grant, now time.Time) string {
	switch {
	case g.State != broker.GrantOpen:
		return "ended " + relative(g.EndedAt, now)
	case now.Before(g.NotBefore):
		return "begins " + relative(g.NotBefore, now)
	}
	return "ends " + relative(g.NotAfter, now)
}

func usesText(g client.Grant) string {
	if g.MaxUses == 0 {
		return ""
	}
	return fmt.Sprintf("%d of %d", g.Uses, g.MaxUses)
}
