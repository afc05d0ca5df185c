package main

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/client"
)

func (p *program) toolsCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "tools [TOOL]",
		Short: "List the tools that you can ask for",
		Long: `Tools lists the tools that you have a grant for or may ask for; for an operator,
all tools. ASK says whether you may ask for it with "mayfly request create", and
under which approval rule the request would wait. With a name, it shows one of
them whole: its parameters, the environment variables that it sets, its approval
rules, and what outlives a revocation.`,
		Example:           "  mayfly tools\n  mayfly tools crm.read",
		Args:              atMostOne,
		ValidArgsFunction: p.completeArgs(p.toolNames),
	}
	return p.verb(c, func(ctx context.Context, args []string) error {
		return p.with(ctx, func(c *client.Client) error {
			tools, err := c.Tools(ctx)
			if err != nil {
				return err
			}
			if len(args) == 1 {
				return p.showTool(tools, args[0])
			}
			return p.showTools(tools)
		})
	})
}

func (p *program) showTools(tools []client.Tool) error {
	view := struct {
		Tools []toolView `json:"tools"`
	}{[]toolView{}}
	var rows [][]string
	for _, t := range tools {
		view.Tools = append(view.Tools, viewTool(t))
		var params []string
		for _, q := range t.Params {
			params = append(params, paramName(q))
		}
		rows = append(rows, []string{t.Name, strings.Join(params, " "), span(t.MaxTTL), p.granted(t), askText(t), t.Sensitivity, t.Description})
	}
	return p.show(view, func(out *page) {
		if len(rows) == 0 {
			out.line("You have a grant for no tool, and may ask for none. Operators make grants, and policies say who may ask.")
			return
		}
		out.table([]string{"TOOL", "PARAMETERS", "MAX TTL", "GRANTED", "ASK", "SENSITIVITY", "DESCRIPTION"}, rows)
	})
}

func staticText(static bool) string {
	if !static {
		return ""
	}
	return "yes: the secret stays after the lease, until it is rotated"
}

func (p *program) showTool(tools []client.Tool, name string) error {
	i := slices.IndexFunc(tools, func(t client.Tool) bool { return t.Name == name })
	if i < 0 {
		return broker.Refusef(broker.ReasonToolUnknown, "see `mayfly tools`", "there is no tool %q for you", name)
	}
	t := tools[i]
	return p.show(viewTool(t), func(out *page) {
		out.fields("", "tool", t.Name, "description", t.Description, "provider", t.Provider,
			"max TTL", span(t.MaxTTL), "granted", p.granted(t),
			"sensitivity", t.Sensitivity, "labels", paramText(t.Labels), "ask", askText(t), "break-glass", t.BreakGlassRule,
			"sets", strings.Join(slices.Sorted(maps.Keys(t.Env)), " "), "static", staticText(t.Static), "survives", t.Survives)
		for _, q := range t.Params {
			out.line("  --param %s=…  %s", q.Name, paramHelp(q))
		}
	})
}

// askText says whether the caller may ask for a tool, and what follows then.
func askText(t client.Tool) string {
	switch {
	case !t.Requestable:
		return ""
	case t.ApprovalRule == "":
		return "yes: policy decides"
	}
	return "yes: approval by " + t.ApprovalRule
}

func (p *program) granted(t client.Tool) string {
	switch {
	case t.Refusal != "":
		return "no: " + string(t.Refusal)
	case t.GrantedUntil.IsZero():
		return "no"
	}
	return "ends " + relative(t.GrantedUntil, p.now())
}

func paramName(q broker.Param) string {
	if q.Optional {
		return "[" + q.Name + "]"
	}
	return q.Name
}

func paramHelp(q broker.Param) string {
	parts := []string{string(q.Type)}
	if q.Pattern != nil {
		parts = append(parts, "matching "+q.Pattern.String())
	}
	if len(q.OneOf) > 0 {
		parts = append(parts, "one of "+strings.Join(q.OneOf, ", "))
	}
	if q.Min != nil {
		parts = append(parts, fmt.Sprintf("at least %d", *q.Min))
	}
	if q.Max != nil {
		parts = append(parts, fmt.Sprintf("at most %d", *q.Max))
	}
	if q.Optional {
		parts = append(parts, "optional")
	}
	if q.Description != "" {
		parts = append(parts, q.Description)
	}
	return strings.Join(parts, "; ")
}
