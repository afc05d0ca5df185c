package main

import (
	"context"
	"runtime"

	"github.com/spf13/cobra"
)

func (p *program) versionCommand() *cobra.Command {
	c := &cobra.Command{
		Use:     "version",
		Short:   "Show the version",
		Example: "  mayfly version --output json",
		Args:    none,
	}
	return p.verb(c, func(context.Context, []string) error {
		view := struct {
			Version string `json:"version"`
			Go      string `json:"go"`
		}{version, runtime.Version()}
		return p.show(view, func(out *page) { out.line("mayfly %s (%s)", view.Version, view.Go) })
	})
}
