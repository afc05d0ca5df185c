package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/client"
	"github.com/mayfly-security/mayfly/broker/policy"
)

// maxPolicy bounds one file of policies, in bytes.
const maxPolicy = 4 << 20

func (p *program) policyCommand() *cobra.Command {
	return group("policy", "Ask why, and what if: policies",
		p.policyTestCommand(), p.policyExplainCommand(), p.policyPreviewCommand())
}

func (p *program) policyExplainCommand() *cobra.Command {
	var principal, agent, incident string
	var params []string
	var q client.Question
	c := &cobra.Command{
		Use:   "explain ACTION [TOOL]",
		Short: "Say why an access is possible, or what would allow it",
		Long: `Explain asks the broker whether an access is possible now. It says which policies
decided and, where it is not possible, what would allow it. You ask for yourself;
an operator also for others.

ACTION is request (ask for a tool), issue (get a credential), approve (decide a
request), open_incident or administer; administer wants --verb.

It exits with 0 if the access is possible, and with 8 if not.`,
		Example: `  mayfly policy explain request crm.read --param customer=c-17
  mayfly policy explain issue payments.initiate --principal spiffe://acme.test/agent/finance
  mayfly policy explain approve payments.initiate --principal person:bob@acme.test --group finance --agent spiffe://acme.test/agent/finance
  mayfly policy explain administer --verb access.end`,
		Args: func(cmd *cobra.Command, args []string) error {
			switch {
			case len(args) == 0:
				return fmt.Errorf("%s needs an ACTION: %s", cmd.CommandPath(), strings.Join(actionNames(), ", "))
			case len(args) > 2:
				return tooMany(cmd, args[2])
			}
			return nil
		},
		ValidArgsFunction: func(cmd *cobra.Command, args []string, word string) ([]cobra.Completion, cobra.ShellCompDirective) {
			switch len(args) {
			case 0:
				return actionNames(), cobra.ShellCompDirectiveNoFileComp
			case 1:
				return p.completeArgs(p.toolNames)(cmd, nil, word)
			}
			return nil, cobra.ShellCompDirectiveNoFileComp
		},
	}
	c.Flags().StringVar(&principal, "principal", "", "who: a SPIFFE ID or person:NAME; default: you")
	c.Flags().StringArrayVar(&q.Groups, "group", nil, "a group that the person is in, where it is not you; may be repeated")
	c.Flags().StringVar(&agent, "agent", "", "the agent that would get the credential, where the principal is none")
	paramFlag(c, &params, "a parameter of the tool, name=value; may be repeated")
	c.Flags().StringVar(&incident, "incident", "", "the incident that it is for")
	c.Flags().StringVar(&q.Verb, "verb", "", "what is administered, such as grant.create")
	p.completeFlag(c, "incident", p.incidentIDs(false))
	_ = c.RegisterFlagCompletionFunc("verb", cobra.FixedCompletions(verbNames(), cobra.ShellCompDirectiveNoFileComp)) // the flag is there: see above
	return p.verb(c, func(ctx context.Context, args []string) error {
		var err error
		if q.Action = args[0]; !slices.Contains(actionNames(), q.Action) {
			return usagef("%q is no action; it is one of %s", broker.Shorten(q.Action, 60), strings.Join(actionNames(), ", "))
		}
		if len(args) == 2 {
			q.Tool = args[1]
		}
		if q.Principal, err = parsePrincipal("--principal", principal); err != nil {
			return err
		}
		if q.Agent, err = parseID("--agent", agent); err != nil {
			return err
		}
		if q.Params, err = parseParams(params); err != nil {
			return err
		}
		if (q.Action == string(policy.ActionAdminister)) != (q.Verb != "") {
			return usagef("administer, and nothing else, wants --verb: one of %s", strings.Join(verbNames(), ", "))
		}
		q.Incident = broker.IncidentID(incident)
		return p.with(ctx, func(c *client.Client) error {
			e, err := c.Explain(ctx, q)
			if err != nil {
				return err
			}
			if err := p.show(viewExplanation(e), func(out *page) { out.explanation(e) }); err != nil {
				return err
			}
			if !e.Possible {
				return &exitError{code: exitNo} // it has been said
			}
			return nil
		})
	})
}

// parsePrincipal reads who somebody is; empty gives nobody.
func parsePrincipal(flag, s string) (broker.Principal, error) {
	principal := broker.Principal(s)
	if name, ok := principal.Person(); s == "" || ok && name != "" {
		return principal, nil
	}
	if _, err := spiffeid.FromString(s); err != nil {
		return "", usagef("%s %q is neither a SPIFFE ID nor person:NAME", flag, broker.Shorten(s, 100))
	}
	return principal, nil
}

func actionNames() (names []string) {
	for _, a := range policy.Actions() {
		names = append(names, string(a))
	}
	return names
}

func verbNames() (names []string) {
	for _, v := range policy.Verbs() {
		names = append(names, string(v))
	}
	return names
}

func (p *page) explanation(e client.Explanation) {
	answer := "No"
	if e.Possible {
		answer = "Yes"
	}
	p.line("%s: %s", answer, e.Summary)
	p.list("policies that decided", e.Policies)
	p.list("policies that could not be evaluated, which denies", e.Errors)
	p.list("what would allow it", e.WouldAllow)
	p.list("grants", e.Grants)
	p.fields("", "policy set", e.PolicyDigest)
}

// list writes lines under a head; nothing if there are none.
func (p *page) list(head string, lines []string) {
	if len(lines) == 0 {
		return
	}
	p.line("%s:", head)
	for _, l := range lines {
		p.line("  %s", l)
	}
}

func (p *program) policyPreviewCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "preview FILE.cedar...",
		Short: "Show what a policy set would change, before it is loaded",
		Long: `Preview sends a whole policy set to the broker and shows what loading it would
change: which open grants it would end, with their leases, and which of the last
decisions it would turn. Nothing is loaded, and nothing changes. Operators only.

It exits with 0 if nothing would end or turn, with 8 if something would, and with 2
if the set is not valid.`,
		Example: "  mayfly policy preview policies/*.cedar",
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return fmt.Errorf("%s needs at least one FILE.cedar", cmd.CommandPath())
			}
			return nil
		},
		ValidArgsFunction: cobra.FixedCompletions([]cobra.Completion{"cedar"}, cobra.ShellCompDirectiveFilterFileExt),
	}
	return p.verb(c, func(ctx context.Context, args []string) error {
		var files []client.PolicyFile
		for _, name := range args {
			text, err := readPolicy(name)
			if err != nil {
				return err
			}
			file := client.PolicyFile{Name: filepath.Base(name), Text: text}
			if slices.ContainsFunc(files, func(f client.PolicyFile) bool { return f.Name == file.Name }) {
				return usagef("two files are named %s; problems could not be told apart", file.Name)
			}
			files = append(files, file)
		}
		return p.with(ctx, func(c *client.Client) error {
			w, err := c.Preview(ctx, files)
			if err != nil {
				return err
			}
			if err := p.show(viewPreview(w), func(out *page) { out.preview(w) }); err != nil {
				return err
			}
			switch {
			case len(w.Problems) > 0:
				return broker.Refuse(broker.ReasonPolicyInvalid, "the policy set is not valid: "+count(len(w.Problems), "problem"), "correct it, and preview it again")
			case len(w.Ends)+len(w.Turns) > 0:
				return &exitError{code: exitNo} // it has been said
			}
			return nil
		})
	})
}

func readPolicy(name string) (string, error) {
	f, err := os.Open(name)
	if err != nil {
		return "", usagef("%w", err)
	}
	defer f.Close() // it was only read
	b, err := io.ReadAll(io.LimitReader(f, maxPolicy+1))
	if err != nil {
		return "", usagef("reading %s: %w", name, err)
	}
	if len(b) > maxPolicy {
		return "", usagef("%s is larger than %d bytes", name, maxPolicy)
	}
	return string(b), nil
}

func (p *page) preview(w client.Preview) {
	if len(w.Problems) > 0 {
		p.list("problems", w.Problems)
		return
	}
	p.fields("", "new set", w.Digest, "present set", w.PresentDigest)
	p.list("policies that come", w.Added)
	p.list("policies that go", w.Removed)
	p.list("policies that change", w.Changed)
	p.line("It would end %d of %s.", len(w.Ends), count(w.Grants, "open grant"))
	var rows [][]string
	for _, g := range w.Ends {
		rows = append(rows, []string{string(g.Grant), g.Agent.String(), g.Tool, fmt.Sprint(g.Leases), g.Why})
	}
	if len(rows) > 0 {
		p.table([]string{"GRANT", "AGENT", "TOOL", "LEASES", "WHY"}, rows)
	}
	p.line("It would turn %d of the last %s.", len(w.Turns), count(w.Decisions, "decision"))
	rows = nil
	for _, d := range w.Turns {
		rows = append(rows, []string{d.At.UTC().Format("2006-01-02T15:04:05Z"), d.Principal.String(), d.Action, d.About, verdict(d.WasAllowed), verdict(d.WouldBeAllowed), d.Why})
	}
	if len(rows) > 0 {
		p.table([]string{"TIME", "PRINCIPAL", "ACTION", "ABOUT", "WAS", "WOULD BE", "WHY"}, rows)
	}
}

func verdict(allowed bool) string {
	if allowed {
		return "allowed"
	}
	return "denied"
}
