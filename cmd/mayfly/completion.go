package main

import (
	"context"
	"iter"
	"maps"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/mayfly-security/mayfly/broker/client"
)

// completionTimeout bounds what a person waits after pressing Tab.
const completionTimeout = 2 * time.Second

// maxCompletions bounds what a listing brings to the shell.
const maxCompletions = 200

// lister asks the broker for what may stand at a place, with a word on each.
type lister func(ctx context.Context, c *client.Client) []cobra.Completion

// completeArgs completes the first argument of a verb. Where the broker cannot
// be asked there is nothing to offer, and nothing is said: the person is in
// the middle of typing.
func (p *program) completeArgs(list lister) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
		if len(args) > 0 {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return p.ask(cmd.Context(), list), cobra.ShellCompDirectiveNoFileComp
	}
}

// completeFlag completes a flag's value.
func (p *program) completeFlag(c *cobra.Command, flag string, list lister) {
	err := c.RegisterFlagCompletionFunc(flag, func(cmd *cobra.Command, _ []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
		return p.ask(cmd.Context(), list), cobra.ShellCompDirectiveNoFileComp
	})
	if err != nil {
		panic(err) // the flag is defined by our own code
	}
}

func (p *program) ask(ctx context.Context, list lister) []cobra.Completion {
	ctx, cancel := context.WithTimeout(ctx, completionTimeout)
	defer cancel()
	c, err := p.connect(ctx)
	if err != nil {
		return nil
	}
	defer c.Close()
	return list(ctx, c)
}

func (p *program) toolNames(ctx context.Context, c *client.Client) []cobra.Completion {
	tools, err := c.Tools(ctx)
	if err != nil {
		return nil
	}
	var all []cobra.Completion
	for _, t := range tools {
		all = append(all, offer(t.Name, t.Description))
	}
	return all
}

// providerNames are the providers of the tools that the caller can see.
func (p *program) providerNames(ctx context.Context, c *client.Client) []cobra.Completion {
	tools, err := c.Tools(ctx)
	if err != nil {
		return nil
	}
	names := map[string]struct{}{}
	for _, t := range tools {
		names[t.Provider] = struct{}{}
	}
	var all []cobra.Completion
	for _, name := range slices.Sorted(maps.Keys(names)) {
		all = append(all, offer(name, ""))
	}
	return all
}

// cutOffRoles are the roles that are cut off already: which others there are,
// the catalog alone knows.
func (p *program) cutOffRoles(ctx context.Context, c *client.Client) []cobra.Completion {
	return offers(c.CutOffs(ctx), func(cut client.CutOff) cobra.Completion {
		return offer(cut.Role, "cut off "+relative(cut.DecidedAt, p.now()))
	})
}

func (p *program) leaseIDs(ctx context.Context, c *client.Client) []cobra.Completion {
	return offers(c.Leases(ctx, client.LeaseFilter{}), func(l client.Lease) cobra.Completion {
		return offer(string(l.ID), l.Tool+" "+paramText(l.Params)+", ends "+relative(l.End, p.now()))
	})
}

func (p *program) grantIDs(ctx context.Context, c *client.Client) []cobra.Completion {
	return offers(c.Grants(ctx, client.GrantFilter{}), func(g client.Grant) cobra.Completion {
		return offer(string(g.ID), g.Tool+" for "+g.Agent.String())
	})
}

func (p *program) requestIDs(f client.RequestFilter) lister {
	return func(ctx context.Context, c *client.Client) []cobra.Completion {
		return offers(c.Requests(ctx, f), func(r client.Request) cobra.Completion {
			return offer(string(r.ID), r.Tool+" "+paramText(r.Params)+" for "+r.Agent.String()+": "+r.Reason)
		})
	}
}

func (p *program) incidentIDs(all bool) lister {
	return func(ctx context.Context, c *client.Client) []cobra.Completion {
		return offers(c.Incidents(ctx, all), func(in client.Incident) cobra.Completion {
			return offer(string(in.ID), in.Title)
		})
	}
}

func offers[T any](items iter.Seq2[T, error], one func(T) cobra.Completion) []cobra.Completion {
	var all []cobra.Completion
	for item, err := range items {
		if err != nil || len(all) == maxCompletions {
			break
		}
		all = append(all, one(item))
	}
	return all
}

// offer is one word with its description. Shells show both as they are, so
// both are cleaned.
func offer(word, description string) cobra.Completion {
	return cobra.CompletionWithDesc(clean(word), clean(description))
}
