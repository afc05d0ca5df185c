package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/client"
)

func (p *program) forgetCommand() *cobra.Command {
	var reason string
	var yes bool
	c := &cobra.Command{
		Use:   "forget LEASE --reason TEXT",
		Short: "Give up waiting for a lease's death (operators)",
		Long: `Forget gives up waiting for the death of an overdue lease, for a provider that is
gone for good. The lease has lapsed then: nobody tries to end it any more, and
nobody says that it is dead. Your name and the reason are in the evidence.

If the provider is only away, wait: Mayfly tries for ever, and the lease dies when
the provider is back.

On a terminal it asks whether you mean it; elsewhere it wants --yes.`,
		Example: `  mayfly leases forget l0mbp1x2q3w4e5r6t7y8u9i0o1 --reason "OPS-4711: the server was thrown away"`,
		Args:    exactly("LEASE"), ValidArgsFunction: p.completeArgs(p.leaseIDs),
		DisableFlagsInUseLine: true,
	}
	c.Flags().StringVar(&reason, "reason", "", "why, for the evidence (required)")
	c.Flags().BoolVar(&yes, "yes", false, "do not ask")
	need(c, "reason")
	return p.verb(c, func(ctx context.Context, args []string) error {
		id, err := broker.ParseLeaseID(args[0])
		if err != nil {
			return err
		}
		if reason == "" {
			return usagef("--reason is empty; say why")
		}
		return p.with(ctx, func(c *client.Client) error {
			if !yes {
				l, err := c.Lease(ctx, id)
				if err != nil {
					return err
				}
				if err := p.confirm(fmt.Sprintf("Lease %s (%s of %s) is %s. Forgotten, nobody will try to end it any more, and it may be alive.",
					l.ID, l.Tool, l.Agent, stateText(l)), "forget"); err != nil {
					return err
				}
			}
			l, err := c.Forget(ctx, id, reason)
			if err != nil {
				return err
			}
			return p.show(viewLease(l), func(out *page) {
				out.line("Lease %s is forgotten: it has %s, and is not known to be dead.", l.ID, l.State)
				if !l.DiesAt.IsZero() {
					out.line("By itself it dies %s.", when(l.DiesAt, p.now()))
				}
			})
		})
	})
}
