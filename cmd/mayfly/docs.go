package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
)

// docsCommand writes the reference from the commands themselves, so that it
// cannot differ from them.
func (p *program) docsCommand() *cobra.Command {
	c := &cobra.Command{
		Use:    "docs DIR",
		Short:  "Write the reference of this command to DIR/cli.md",
		Args:   exactly("DIR"),
		Hidden: true,
	}
	return p.verb(c, func(_ context.Context, args []string) error {
		if err := os.MkdirAll(args[0], 0o755); err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(args[0], "cli.md"), []byte(reference(c.Root())), 0o644)
	})
}

func reference(root *cobra.Command) string {
	var b strings.Builder
	b.WriteString("<!-- Made by `make generate` from cmd/mayfly. Do not edit. -->\n\n# The mayfly command\n\n")
	b.WriteString(root.Long + "\n\n```sh\n" + unindent(root.Example) + "\n```\n\n")
	b.WriteString("Every verb takes these flags:\n\n```\n" + strings.TrimRight(root.PersistentFlags().FlagUsages(), "\n") + "\n```\n\n")
	b.WriteString("With `--output json` a result is one JSON object on standard output, and an error is one on\n" +
		"standard error: `{\"error\": {\"reason\", \"message\", \"next\", \"correlationId\", \"leaseId\", \"maxAge\", \"acrValues\", \"exitCode\"}}`. Fields have the\n" +
		"names and meanings of the API (`broker/api/mayfly/v1/mayfly.proto`, in lowerCamelCase), times are RFC 3339, numbers\n" +
		"are numbers, and fields that are not set are left out.\n\n" +
		"Spans of time are written as `90s`, `5m`, `1h30m`, `1d` or `1d12h`.\n\n")
	b.WriteString("## Verbs\n\n")
	walk(root, func(c *cobra.Command) { fmt.Fprintf(&b, "- [%s](#%s): %s\n", c.CommandPath(), anchor(c), c.Short) })
	b.WriteByte('\n')
	walk(root, func(c *cobra.Command) { describe(&b, c) })
	b.WriteString("## Exit codes\n\n| Code | Meaning | Reasons |\n|---|---|---|\n")
	for _, e := range exitCodes() {
		var words []string
		for _, r := range e.reasons {
			words = append(words, "`"+string(r)+"`")
		}
		fmt.Fprintf(&b, "| %s | %s | %s |\n", e.code, e.meaning, strings.Join(words, ", "))
	}
	b.WriteString("\n## Environment\n\nFlags come before the environment.\n\n| Variable | Meaning |\n|---|---|\n")
	for _, e := range environment() {
		fmt.Fprintf(&b, "| `%s` | %s |\n", strings.ReplaceAll(e.name, ", ", "`, `"), e.meaning)
	}
	b.WriteString("\n## Shell completion\n\n" +
		"`mayfly completion bash`, `zsh` and `fish` print a script; `mayfly completion bash --help` says where it\n" +
		"goes. Names of tools and IDs of leases, grants, requests and incidents are completed, too, by asking the broker.\n")
	return b.String()
}

// walk visits every verb that one can run, in the order of the help.
func walk(c *cobra.Command, visit func(*cobra.Command)) {
	for _, below := range c.Commands() {
		if below.Hidden || below.Name() == "help" || below.Name() == "completion" {
			continue
		}
		// A group has no example; a verb has one, also where others are below it.
		if below.Runnable() && (!below.HasSubCommands() || below.Example != "") {
			visit(below)
		}
		walk(below, visit)
	}
}

func describe(b *strings.Builder, c *cobra.Command) {
	fmt.Fprintf(b, "### %s\n\n", c.CommandPath())
	if c.Long != "" {
		b.WriteString(prose(c.Long) + "\n\n")
	} else {
		b.WriteString(c.Short + ".\n\n")
	}
	fmt.Fprintf(b, "```\n%s\n```\n\n", c.UseLine())
	if flags := c.NonInheritedFlags().FlagUsages(); flags != "" {
		fmt.Fprintf(b, "```\n%s\n```\n\n", strings.TrimRight(flags, "\n"))
	}
	fmt.Fprintf(b, "```sh\n%s\n```\n\n", unindent(c.Example))
}

// prose turns help text into Markdown: what is indented there is a block here.
func prose(s string) string {
	var out []string
	for _, paragraph := range strings.Split(s, "\n\n") {
		if strings.HasPrefix(paragraph, "  ") {
			paragraph = "```\n" + unindent(paragraph) + "\n```"
		}
		out = append(out, paragraph)
	}
	return strings.Join(out, "\n\n")
}

func unindent(s string) string {
	lines := strings.Split(s, "\n")
	for i, l := range lines {
		lines[i] = strings.TrimPrefix(l, "  ")
	}
	return strings.Join(lines, "\n")
}

func anchor(c *cobra.Command) string {
	return strings.ReplaceAll(c.CommandPath(), " ", "-")
}
