package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/catalog"
	"github.com/mayfly-security/mayfly/broker/catalog/strictyaml"
	"github.com/mayfly-security/mayfly/broker/policy"
)

type caseView struct {
	Name     string   `json:"name"`
	Passed   bool     `json:"passed"`
	Problem  string   `json:"problem,omitempty"`
	Allowed  bool     `json:"allowed"`
	Policies []string `json:"policies,omitempty"`
}

func (p *program) policyTestCommand() *cobra.Command {
	var files, policies []string
	c := &cobra.Command{
		Use:   "test CASES.yaml",
		Short: "Run your own cases against a policy set, without a broker",
		Long: `Test asks a policy set what your cases ask, and says which are answered otherwise
than they expect. It needs no broker: the catalog's files say who and what there is.
The policies are those among the catalog's files, or in their place --policies.

A case names a principal, an action, what it is about, and what it expects:

  cases:
  - name: support reads its own customers
    principal: spiffe://acme.test/agent/support
    action: request
    tool: crm.read
    params: {customer: c-17}
    reason: OPS-12
    expect: allow

It exits with 0 if every case passed, with 8 if one failed, and with 2 if catalog,
policies or cases are not valid.`,
		Example: `  mayfly policy test --catalog catalog.yaml --catalog policies.cedar cases.yaml
  mayfly policy test --catalog catalog.yaml --policies new.cedar cases.yaml`,
		Args: exactly("CASES.yaml"), ValidArgsFunction: cobra.FixedCompletions([]cobra.Completion{"yaml", "yml"}, cobra.ShellCompDirectiveFilterFileExt),
	}
	c.Flags().StringArrayVar(&files, "catalog", nil, "a file of the catalog (needed); may be repeated")
	c.Flags().StringArrayVar(&policies, "policies", nil, "a file of policies, in place of the catalog's; may be repeated")
	need(c, "catalog")
	return p.verb(c, func(_ context.Context, args []string) error {
		snapshot, err := catalog.Load(files, localDrivers(files))
		if errs := (strictyaml.Errors)(nil); errors.As(err, &errs) {
			return p.wrongCatalog(errs)
		} else if err != nil {
			return usagef("%w", err)
		}
		set := snapshot.Policies()
		if len(policies) > 0 {
			if set, err = p.loadPolicies(snapshot, policies); err != nil {
				return err
			}
		}
		var cases policy.CaseFile
		if _, err := strictyaml.ReadFile(args[0], &cases); err != nil {
			return p.wrongFile("the cases have errors", err)
		}
		if len(cases.Cases) == 0 {
			return usagef("%s has no cases", args[0])
		}
		return p.showCases(policy.RunCases(set, snapshot, cases.Cases, p.now()), set.Digest())
	})
}

func (p *program) loadPolicies(snapshot *catalog.Snapshot, names []string) (*policy.Set, error) {
	var sources []policy.Source
	for _, name := range names {
		text, err := readPolicy(name)
		if err != nil {
			return nil, err
		}
		sources = append(sources, policy.Source{Name: name, Text: text})
	}
	set, err := snapshot.LoadPolicies(sources)
	if err != nil {
		return nil, p.wrongFile("the policies have errors", err)
	}
	return set, nil
}

// wrongFile tells what is wrong with files that people wrote: one problem a line.
func (p *program) wrongFile(head string, err error) error {
	lines := strings.Split(strings.TrimSpace(err.Error()), "\n")
	if len(lines) == 1 || p.output == "json" {
		return broker.Refuse(broker.ReasonPolicyInvalid, strings.Join(lines, "; "), "correct it")
	}
	for _, line := range lines {
		p.warn("%s", strings.TrimSpace(line))
	}
	return broker.Refusef(broker.ReasonPolicyInvalid, "correct them", "%s: %d", head, len(lines))
}

func (p *program) showCases(results []policy.CaseResult, digest string) error {
	view := struct {
		Cases  []caseView `json:"cases"`
		Failed int        `json:"failed"`
		Digest string     `json:"policyDigest"`
	}{[]caseView{}, 0, digest}
	for _, r := range results {
		view.Cases = append(view.Cases, caseView{r.Name, r.Passed, r.Problem, r.Verdict.Allowed, r.Verdict.Policies})
		if !r.Passed {
			view.Failed++
		}
	}
	err := p.show(view, func(out *page) {
		for _, r := range results {
			if r.Passed {
				out.line("ok    %s", r.Name)
				continue
			}
			out.line("FAIL  %s", r.Name)
			for line := range strings.Lines(r.Problem) {
				out.line("      %s", strings.TrimRight(line, "\n"))
			}
		}
		out.line("%s, %d failed.", count(len(results), "case"), view.Failed)
	})
	if err == nil && view.Failed > 0 {
		return &exitError{code: exitNo, err: fmt.Errorf("%d of %s failed", view.Failed, count(len(results), "case"))}
	}
	return err
}
