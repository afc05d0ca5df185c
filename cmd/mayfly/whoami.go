package main

import (
	"context"
	"maps"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/mayfly-security/mayfly/broker/client"
)

func (p *program) whoamiCommand() *cobra.Command {
	c := &cobra.Command{
		Use:     "whoami",
		Short:   "Show who you are to the broker",
		Long:    "Whoami shows how the broker sees you: your SPIFFE ID, what you may be here, and\nuntil when your SVID is valid. It is the first thing to try.",
		Example: "  mayfly whoami\n  mayfly whoami --output json",
		Args:    none,
	}
	return p.verb(c, func(ctx context.Context, _ []string) error {
		return p.with(ctx, func(c *client.Client) error {
			w, err := c.WhoAmI(ctx)
			if err != nil {
				return err
			}
			return p.show(viewIdentity(w), func(out *page) {
				var labels []string
				for _, name := range slices.Sorted(maps.Keys(w.Labels)) {
					labels = append(labels, name+"="+w.Labels[name])
				}
				out.fields("",
					"you", w.ID.String(), "roles", strings.Join(w.Roles, ", "), "owner", w.Owner,
					"environment", w.Environment, "labels", strings.Join(labels, " "),
					"SVID ends", when(w.SVIDExpiresAt, p.now()),
					"broker", w.Broker.String(), "address", c.Addr(),
					"installation", string(w.Installation), "catalog", w.CatalogDigest)
			})
		})
	})
}
