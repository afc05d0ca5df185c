package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/mayfly-security/mayfly/attestation"
	"github.com/mayfly-security/mayfly/attestation/spiffe"
	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/catalog"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/vault"
)

const (
	svidWait      = 15 * time.Second // how long a live check waits for the broker's SVID
	liveCheckTime = 2 * time.Minute  // and for one provider
	maxFinding    = 1000             // bytes of one line that is shown
	envVaultToken = "VAULT_TOKEN"    // the ecosystem's
	envVaultAddr  = "VAULT_ADDR"     // whose token it is
)

func checkCommand() *cobra.Command {
	var config string
	var live bool
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Validate configuration and catalog without starting",
		Long: `Check reads the configuration and the catalog as "mayflyd server" would, and says
everything that is wrong with them, with file and line. It opens no store, asks
no provider and changes nothing. It exits with 1 if anything is wrong.

With --live it also asks the providers that can be compared with what they should
be: it logs in as the broker, with the broker's SVID from the Workload API, and
tells what is missing there, and what the broker can do that it should not. It
changes nothing. At AWS it makes sessions that can do nothing, as there is no other
way to know that they can be made, and asks IAM to write what is no policy. With an operator's token in VAULT_TOKEN it looks with that, too,
at what the broker may not see in the Vault at VAULT_ADDR; no other Vault is shown
the token. It exits with 1 if anything is bad.`,
		Example: "  mayflyd check --config /etc/mayfly/mayflyd.yaml\n  mayflyd check --config /etc/mayfly/mayflyd.yaml --live",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := readConfig(config)
			if err != nil {
				return err
			}
			snapshot, err := catalog.Load(s.catalog, drivers(nil))
			if err != nil {
				return err
			}
			out := cmd.OutOrStdout()
			fmt.Fprintf(out, "%s is good: agents %d, providers %d, tools %d; catalog digest %s\n",
				config, len(snapshot.Agents()), len(snapshot.Providers()), len(snapshot.Tools()), snapshot.Digest())
			if p := s.people; p != nil {
				fmt.Fprintf(out, "people come in at %s, and %s signs them in\n", p.url, p.provider.Issuer())
			}
			for _, t := range snapshot.Tools() {
				if survives := snapshot.ScopeInfo(t.Name).Survives; survives != "" {
					fmt.Fprintf(out, "note: tool %s survives a revocation: %s\n", t.Name, survives)
				}
			}
			warn(out, snapshot)
			if !live {
				return nil
			}
			return checkLive(cmd.Context(), out, s, snapshot)
		},
	}
	cmd.Flags().StringVar(&config, "config", "", "the configuration file")
	cmd.Flags().BoolVar(&live, "live", false, "compare the providers themselves with what they should be")
	_ = cmd.MarkFlagRequired("config") // fails only for a flag that is not defined
	return cmd
}

// warn prints what drivers say of valid tools without asking anybody.
func warn(out io.Writer, snapshot *catalog.Snapshot) {
	known := drivers(nil)
	configs := map[string]catalog.Provider{}
	for _, p := range snapshot.Providers() {
		configs[p.Name] = p
	}
	for _, t := range snapshot.Tools() {
		p := configs[t.Provider]
		warner, ok := known[p.Driver].(providers.Warner)
		if !ok {
			continue
		}
		for _, f := range warner.Warnings(p.Config, t) {
			if f.Fix == "" {
				fmt.Fprintf(out, "note: tool %s: %s\n", t.Name, shown(f.Message))
				continue
			}
			fmt.Fprintf(out, "warning: tool %s: %s\n  do: %s\n", t.Name, shown(f.Message), shown(f.Fix))
		}
	}
}

// checkLive asks every provider that can be asked.
func checkLive(ctx context.Context, out io.Writer, s settings, snapshot *catalog.Snapshot) error {
	token, address := os.Getenv(envVaultToken), os.Getenv(envVaultAddr)
	var login attestation.LoginSource
	if s.workload == "" && os.Getenv(workloadapi.SocketEnv) == "" && token != "" {
		fmt.Fprintf(out, "note: there is no Workload API to get the broker's SVID from; only what %s can see is looked at\n", envVaultToken)
	} else {
		opening, cancel := context.WithTimeout(ctx, svidWait)
		defer cancel()
		identity, err := spiffe.Open(opening, spiffe.Config{Addr: s.workload, Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			return fmt.Errorf("a live check logs in as the broker, and needs its SVID: %w", err)
		}
		defer identity.Close() // what it holds ends with the process
		fmt.Fprintf(out, "looking as %s\n", identity.ID())
		login = identity
	}
	known := drivers(login)
	bad, failed := 0, 0
	for _, p := range snapshot.Providers() {
		own := vault.Driver{Login: login}
		if token != "" && p.Driver == "vault" {
			if vault.AtAddress(p.Config, address) {
				own.CheckToken = token
			} else {
				fmt.Fprintf(out, "note: provider %s: %s is not used: it is for the Vault at %s (%s), and this is another\n", p.Name, envVaultToken, envVaultAddr, shown(orUnset(address)))
			}
		}
		known["vault"] = own
		checker, ok := known[p.Driver].(providers.LiveChecker)
		if !ok {
			fmt.Fprintf(out, "provider %s: there is nothing outside of the broker to compare\n", p.Name)
			continue
		}
		findings, err := checkProvider(ctx, checker, s, snapshot, p)
		if err != nil {
			failed++
			fmt.Fprintf(out, "provider %s: could not be asked: %s\n", p.Name, shown(err.Error()))
			continue
		}
		bad += tell(out, p.Name, findings)
	}
	var errs []error
	if bad > 0 {
		errs = append(errs, fmt.Errorf("the live check found what is missing or too wide: %d", bad))
	}
	if failed > 0 {
		errs = append(errs, fmt.Errorf("the live check could not ask some providers: %d", failed))
	}
	return errors.Join(errs...)
}

func orUnset(value string) string {
	if value == "" {
		return "not set"
	}
	return value
}

func checkProvider(ctx context.Context, checker providers.LiveChecker, s settings, snapshot *catalog.Snapshot, p catalog.Provider) ([]providers.Finding, error) {
	var tools []broker.Tool
	for _, t := range snapshot.Tools() {
		if t.Provider == p.Name {
			tools = append(tools, t)
		}
	}
	ctx, cancel := context.WithTimeout(ctx, liveCheckTime)
	defer cancel()
	// The installation's ID is in the store, which a running broker holds; the
	// check does without.
	return checker.CheckLive(ctx, providers.Config{Name: p.Name, Raw: p.Config, Log: s.log, Now: time.Now}, tools)
}

// tell prints the findings of a provider and returns how many are bad.
func tell(out io.Writer, provider string, findings []providers.Finding) (bad int) {
	for _, f := range findings {
		kind, subject := "note", "provider "+provider
		if f.Bad {
			kind = "bad"
			bad++
		}
		if f.Tool != "" {
			subject += ", tool " + f.Tool
		}
		fmt.Fprintf(out, "%s: %s: %s\n", kind, subject, shown(f.Message))
		if f.Fix != "" {
			fmt.Fprintf(out, "  do: %s\n", shown(f.Fix))
		}
	}
	if bad == 0 {
		fmt.Fprintf(out, "provider %s: nothing is missing, and nothing is too wide\n", provider)
	}
	return bad
}

// shown makes a text that may quote others safe for a terminal.
func shown(text string) string { return broker.Clean(broker.Shorten(text, maxFinding)) }
