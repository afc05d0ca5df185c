package main

import (
	"fmt"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/mayfly-security/mayfly/broker"
)

// sampleTokenCommand is how one gets a token of a sample person's in dev: for a
// script that comes as a person, and for an agent that acts on their behalf.
func sampleTokenCommand() *cobra.Command {
	var dir, person string
	var forAgent bool
	cmd := &cobra.Command{
		Use:   "token",
		Short: "Make a sample person's token, of a running mayflyd dev",
		Long: `Token prints a token of one of the sample people of a running "mayflyd dev", for
the broker and good for five minutes: what a real identity provider would give the
person's programs. It serves as a bearer token (MAYFLY_TOKEN). With --for-agent it
is for an agent instead, which asks on the person's behalf with it, and cannot
come as the person.`,
		Example: "  MAYFLY_TOKEN=$(mayflyd dev token --person ada@acme.test) mayfly whoami",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if dir == "" {
				dir = defaultDevDir()
			}
			which := storeFlags{dir: dir}
			token, err := which.ask(cmd.Context(), "/v1/sample-token", url.Values{"person": {person}, "for_agent": {strconv.FormatBool(forAgent)}})
			if err == nil {
				_, err = fmt.Fprintln(cmd.OutOrStdout(), token)
			}
			return err
		},
	}
	cmd.Flags().StringVar(&dir, "dir", "", "state directory; default: mayfly-dev-<uid> in the temporary directory")
	cmd.Flags().StringVar(&person, "person", "", "the sample person's name, such as ada@acme.test")
	cmd.Flags().BoolVar(&forAgent, "for-agent", false, "a token for an agent that acts on the person's behalf, and no bearer token")
	_ = cmd.MarkFlagRequired("person") // fails only for a flag that is not defined
	return cmd
}

func defaultDevDir() string {
	return filepath.Join(os.TempDir(), fmt.Sprintf("mayfly-dev-%d", os.Getuid()))
}

// sampleToken answers in dev alone.
func (c *control) sampleToken(w http.ResponseWriter, r *http.Request) {
	if c.token == nil {
		http.Error(w, "this broker has no sample people: its identity provider makes tokens", http.StatusNotFound)
		return
	}
	token, err := c.token(r.PostFormValue("person"), r.PostFormValue("for_agent") == "true")
	if err != nil {
		http.Error(w, broker.Clean(broker.Shorten(err.Error(), 300)), http.StatusBadRequest)
		return
	}
	fmt.Fprint(w, token)
}
