package main

import (
	"errors"
	"fmt"
	"os/user"
	"time"

	"github.com/spf13/cobra"

	"github.com/mayfly-security/mayfly/broker/lease"
	"github.com/mayfly-security/mayfly/store/bolt"
)

func clockCommand() *cobra.Command {
	clock := &cobra.Command{Use: "clock", Short: "Recover from a clock that was wrong"}
	var config string
	accept := &cobra.Command{
		Use:   "accept",
		Short: "Take the machine's present time for true",
		Long: `Accept takes the machine's present time for true although the broker has seen a
later one: the recovery from a clock that ran ahead and was set back. Until then
the broker gives nothing, for its own time never goes back.

Stop the broker and set the clock right first. What was made in the time that
never was is ended, because its ends lie too late: incidents are closed, grants
withdrawn, and leases revoked by the next start. It is evidence, with the name
of the user who did it.`,
		Example: "  mayflyd clock accept --config /etc/mayfly/mayflyd.yaml",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := readConfig(config)
			if err != nil {
				return err
			}
			who, err := user.Current()
			if err != nil {
				return fmt.Errorf("finding out who you are, for the evidence: %w", err)
			}
			db, err := bolt.Open(s.store, bolt.Config{})
			if err != nil {
				return err
			}
			now := time.Now()
			was, err := lease.AcceptClock(cmd.Context(), db, now, "host:"+who.Username, s.log)
			if err := errors.Join(err, db.Close()); err != nil {
				return err
			}
			if !was.After(now) {
				fmt.Fprintf(cmd.OutOrStdout(), "Nothing to do: the broker has seen no later time than %s.\n", now.UTC().Format(time.RFC3339))
				return nil
			}
			fmt.Fprintf(cmd.OutOrStdout(), "Accepted %s; the broker had seen %s. Start it now.\n",
				now.UTC().Format(time.RFC3339), was.Format(time.RFC3339))
			return nil
		},
	}
	accept.Flags().StringVar(&config, "config", "", "the configuration file")
	_ = accept.MarkFlagRequired("config") // fails only for a flag that is not defined
	clock.AddCommand(accept)
	return clock
}
