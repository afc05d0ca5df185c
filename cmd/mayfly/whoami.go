package main

import (
	"context"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/mayfly-security/mayfly/broker/client"
)

func (p *program) whoamiCommand() *cobra.Command {
	c := &cobra.Command{
		Use:     "whoami",
		Short:   "Show who you are to the broker",
		Long:    "Whoami shows how the broker sees you: your SPIFFE ID or your name and groups,\nwhat you may be here, and until when your SVID or session is valid. It is the\nfirst thing to try.",
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
					"you", w.Principal.String(), "roles", strings.Join(w.Roles, ", "), "groups", strings.Join(w.Groups, ", "), "owner", w.Owner,
					"environment", w.Environment, "labels", strings.Join(labels, " "),
					"SVID ends", when(w.SVIDExpiresAt, p.now()), "session ends", when(w.SessionUntil, p.now()),
					"signed in", signedIn(w, p.now()),
					"broker", w.Broker.String(), "address", c.Addr(),
					"installation", string(w.Installation), "catalog", w.CatalogDigest, "policies", w.PolicyDigest)
			})
		})
	})
}

// signedIn says when and how a person proved who they are; empty for a workload.
func signedIn(w client.Identity, now time.Time) string {
	if _, person := w.Principal.Person(); !person {
		return ""
	}
	s := when(w.AuthTime, now)
	if s == "" {
		s = "the identity provider does not say when"
	}
	if w.Method != "" {
		s += ", by " + string(w.Method)
	}
	if w.ACR != "" {
		s += ", class " + w.ACR
	}
	return s
}
