package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/policy"
	"github.com/mayfly-security/mayfly/broker/server"
)

const generated = "<!-- Made by `make generate`. Change the code instead. -->\n\n"

// docsCommand writes the pages of the reference that are made from code.
func docsCommand() *cobra.Command {
	return &cobra.Command{
		Use:    "docs DIR",
		Short:  "Write the reference pages that are made from code",
		Args:   cobra.ExactArgs(1),
		Hidden: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			daemon, err := daemonPage(cmd.Root())
			if err != nil {
				return err
			}
			reference, err := policy.Reference()
			if err != nil {
				return err
			}
			for name, text := range map[string]string{"errors.md": errorsPage(), "mayflyd.md": daemon,
				"policy.md": generated + reference, "mayfly.cedarschema": policy.SchemaText()} {
				if err := os.WriteFile(filepath.Join(args[0], name), []byte(text), 0o644); err != nil {
					return err
				}
			}
			return nil
		},
	}
}

// errorsPage lists every reason with its code.
func errorsPage() string {
	var b strings.Builder
	b.WriteString(generated + "# Errors\n\n" +
		"Every error of the API carries an `ErrorDetail` with a stable `reason`, a sentence that\n" +
		"says what to do next, and the correlation ID that the broker's log and evidence have too.\n" +
		"The text of a provider never reaches a caller.\n\n" +
		"| Reason | Code | What happened | What to do |\n|---|---|---|---|\n")
	for _, r := range broker.Reasons() {
		fmt.Fprintf(&b, "| `%s` | `%s` | %s | %s |\n", r.Reason, server.Code(r.Reason), r.Meaning, r.Next)
	}
	return b.String()
}

// daemonPage is mayflyd's commands, one after the other, and its configuration.
func daemonPage(root *cobra.Command) (string, error) {
	var b bytes.Buffer
	b.WriteString(generated + "# mayflyd\n\n")
	var walk func(c *cobra.Command) error
	walk = func(c *cobra.Command) error {
		if c.Hidden || c.Name() == "help" || c.Name() == "completion" {
			return nil
		}
		c.DisableAutoGenTag = true
		if err := doc.GenMarkdownCustom(c, &b, func(link string) string {
			return "#" + strings.ReplaceAll(strings.TrimSuffix(link, ".md"), "_", "-")
		}); err != nil {
			return err
		}
		for _, sub := range c.Commands() {
			if err := walk(sub); err != nil {
				return err
			}
		}
		return nil
	}
	if err := walk(root); err != nil {
		return "", err
	}
	b.WriteString("## The configuration file\n\n| Key | Type |\n|---|---|\n")
	configKeys(&b, "", reflect.TypeFor[configFile]())
	b.WriteString("\nWhat each means, and what leaving it out means, is in the [reference of configuration](config.md).\n")
	return b.String(), nil
}

// configKeys lists the keys of a mapping, and of those in it.
func configKeys(b *bytes.Buffer, in string, t reflect.Type) {
	for f := range t.Fields() {
		key, kind := in+f.Tag.Get("yaml"), f.Type
		if kind.Kind() == reflect.Pointer {
			kind = kind.Elem()
		}
		if kind.Kind() == reflect.Struct {
			fmt.Fprintf(b, "| `%s` | mapping |\n", key)
			configKeys(b, key+".", kind)
			continue
		}
		fmt.Fprintf(b, "| `%s` | %s |\n", key, strings.TrimPrefix(kind.String(), "time."))
	}
}
