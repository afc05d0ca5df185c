package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/mayfly-security/mayfly/broker/client"
)

func (p *program) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "mayfly",
		Short: "Ask a Mayfly broker for short-lived credentials",
		Long: `Mayfly asks a Mayfly broker for credentials: for one tool, for a short while, and
only as long as a grant allows.

A workload is who its SPIFFE SVID says, from the Workload API at
SPIFFE_ENDPOINT_SOCKET; the broker is at MAYFLY_ADDR. A person signs in with
"mayfly login"; the broker's listener for people is at MAYFLY_PEOPLE_ADDR. You
come as a person if MAYFLY_PEOPLE_ADDR is set and no workload's identity is (or
MAYFLY_TOKEN is, too); --as says it outright. What only people can do (login,
logout, approve, deny) you always do as a person.

Begin with "mayfly whoami" and "mayfly tools".`,
		Example: "  mayfly tools\n  mayfly request create crm.read --param customer=c-17 --reason OPS-12 --wait\n" +
			"  mayfly get crm.read --param customer=c-17 --ttl 5m\n  mayfly exec crm.read --param customer=c-17 -- ./report.sh",
		Version:           version,
		SilenceErrors:     true,
		SilenceUsage:      true,
		DisableAutoGenTag: true,
	}
	holdsVerbs(root)
	root.SetVersionTemplate("mayfly {{.Version}}\n")
	root.CompletionOptions.HiddenDefaultCmd = false
	p.output = "text"
	flags := root.PersistentFlags()
	flags.SortFlags = false
	flags.VarP(&wordFlag{&p.output, []string{"text", "json"}}, "output", "o", "text, for people, or json, for programs")
	flags.Var(&wordFlag{&p.as, []string{string(client.AsWorkload), string(client.AsPerson)}}, "as", "come as a workload or as a person; default: see above")
	flags.StringVar(&p.addr, "addr", "", "the broker's address, https://host:port; default: MAYFLY_ADDR, or https://localhost:8443; for a person: MAYFLY_PEOPLE_ADDR")
	flags.StringVar(&p.brokerID, "broker-id", "", "the SPIFFE ID that the broker must have; default: MAYFLY_BROKER_ID, or /mayfly in your own trust domain")
	flags.Var(&p.timeout, "timeout", "how long one call may take, retries included; default: 1m")
	_ = root.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"text", "json"}, cobra.ShellCompDirectiveNoFileComp))   // the flag is there: see above
	_ = root.RegisterFlagCompletionFunc("as", cobra.FixedCompletions([]string{"workload", "person"}, cobra.ShellCompDirectiveNoFileComp)) // as above
	root.AddCommand(
		p.loginCommand(), p.logoutCommand(), p.whoamiCommand(), p.toolsCommand(), p.getCommand(), p.execCommand(),
		p.requestCommand(), p.approveCommand(), p.denyCommand(),
		p.leasesCommand(), p.revokeCommand(), p.straysCommand(), p.grantCommand(), p.incidentCommand(),
		p.policyCommand(), p.auditCommand(), p.svidCommand(), p.awsCommand(), p.vaultCommand(), p.versionCommand(), p.docsCommand(),
		exitCodesTopic(), environmentTopic(),
	)
	return root
}

// verb finishes a command: do is its own code, and whatever fails before it
// runs is a wrong use of the command.
func (p *program) verb(c *cobra.Command, do func(ctx context.Context, args []string) error) *cobra.Command {
	c.Flags().SortFlags = false
	c.RunE = func(cmd *cobra.Command, args []string) error {
		if missing := missingFlags(cmd); missing != "" {
			return fmt.Errorf("%s needs %s", cmd.CommandPath(), missing)
		}
		p.started = true
		return do(cmd.Context(), args)
	}
	return c
}

// group is a command that only has others below it.
func group(use, short string, below ...*cobra.Command) *cobra.Command {
	g := &cobra.Command{Use: use, Short: short}
	holdsVerbs(g)
	g.AddCommand(below...)
	return g
}

// holdsVerbs makes a command help where no verb is named. Cobra itself would
// help, and succeed, also where the verb is misspelt.
func holdsVerbs(g *cobra.Command) {
	g.Args = cobra.ArbitraryArgs
	g.DisableFlagsInUseLine = true
	g.SuggestionsMinimumDistance = 2
	g.RunE = func(cmd *cobra.Command, args []string) error {
		if len(args) == 0 {
			return cmd.Help()
		}
		near := ""
		if all := cmd.SuggestionsFor(args[0]); len(all) > 0 {
			near = "; did you mean " + strings.Join(all, " or ") + "?"
		}
		return fmt.Errorf("%s has no verb %q%s", cmd.CommandPath(), args[0], near)
	}
}

// exactly wants one argument; what names it in the help.
func exactly(what string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		switch {
		case len(args) == 0:
			return fmt.Errorf("%s needs a %s", cmd.CommandPath(), what)
		case len(args) > 1:
			return tooMany(cmd, args[1])
		}
		return nil
	}
}

// exactlyTwo wants two arguments; first and second name them in the help.
func exactlyTwo(first, second string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		switch {
		case len(args) < 2:
			return fmt.Errorf("%s needs a %s and a %s", cmd.CommandPath(), first, second)
		case len(args) > 2:
			return tooMany(cmd, args[2])
		}
		return nil
	}
}

// atMostOne takes one argument, or none.
func atMostOne(cmd *cobra.Command, args []string) error {
	if len(args) > 1 {
		return tooMany(cmd, args[1])
	}
	return nil
}

// none takes no arguments.
func none(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return tooMany(cmd, args[0])
	}
	return nil
}

func tooMany(cmd *cobra.Command, arg string) error {
	return fmt.Errorf("%s does not know what to do with %q", cmd.CommandPath(), arg)
}

// onlyForPeople makes a verb one that is always done as a person.
func (p *program) onlyForPeople(c *cobra.Command) *cobra.Command {
	run, complete := c.RunE, c.ValidArgsFunction
	c.RunE = func(cmd *cobra.Command, args []string) error {
		p.forPeople = true
		return run(cmd, args)
	}
	if complete != nil {
		c.ValidArgsFunction = func(cmd *cobra.Command, args []string, word string) ([]cobra.Completion, cobra.ShellCompDirective) {
			p.forPeople = true
			return complete(cmd, args, word)
		}
	}
	return c
}

// need marks flags that a verb cannot do without. Cobra's own check would come
// too late to be told from a failure of the verb.
func need(c *cobra.Command, flags ...string) {
	for _, f := range flags {
		c.Flags().Lookup(f).Annotations = map[string][]string{annotationNeeded: {"true"}}
	}
}
