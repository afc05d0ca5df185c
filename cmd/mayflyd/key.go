package main

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/mayfly-security/mayfly/providers/token"
)

func keyCommand() *cobra.Command {
	key := &cobra.Command{Use: "key", Short: "Make signing keys for token providers"}
	var dir string
	fresh := &cobra.Command{
		Use:   "new",
		Short: "Add a signing key to a directory",
		Long: `New adds an Ed25519 key to the directory of a token provider. The broker finds it
by itself within seconds and signs with it from then on. The older keys stay
published, so that tokens they signed are still verified; remove them when the
last of those has expired.`,
		Example: "  mayflyd key new --dir /var/lib/mayfly/keys",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			path, err := token.NewKey(dir, time.Now())
			if err != nil {
				return err
			}
			fmt.Fprintln(cmd.OutOrStdout(), path)
			return nil
		},
	}
	fresh.Flags().StringVar(&dir, "dir", "", "the provider's directory of keys")
	_ = fresh.MarkFlagRequired("dir") // fails only for a flag that is not defined
	key.AddCommand(fresh)
	return key
}
