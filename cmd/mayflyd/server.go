package main

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/broker/catalog/strictyaml"
)

// configFile is the broker's own configuration. Paths in it are relative to
// its directory. Every field says what leaving it out means.
type configFile struct {
	Store        string         `yaml:"store"`         // path of the store's file, in a directory that exists; required
	Catalog      []string       `yaml:"catalog"`       // the catalog's files; required
	Listen       string         `yaml:"listen"`        // where agents connect; 127.0.0.1:8443
	OpsListen    string         `yaml:"ops_listen"`    // metrics and health, plain HTTP; none
	WorkloadAPI  string         `yaml:"workload_api"`  // address of the SPIFFE Workload API; SPIFFE_ENDPOINT_SOCKET
	TrustDomains []string       `yaml:"trust_domains"` // federated trust domains whose identities may call; none but our own
	LogLevel     string         `yaml:"log_level"`     // debug, info, warn or error; info
	People       *peopleSection `yaml:"people"`        // the listener for people; none: nobody signs in, and no agent acts on behalf of a user
}

// readConfig reads and checks the configuration and turns it into settings.
func readConfig(path string) (settings, error) {
	var c configFile
	doc, err := strictyaml.ReadFile(path, &c)
	if err != nil {
		return settings{}, err
	}
	var errs strictyaml.Errors
	fail := func(field, format string, args ...any) { errs = append(errs, doc.Errorf(field, format, args...)) }
	dir := filepath.Dir(path)
	relative := func(p string) string {
		if p == "" || filepath.IsAbs(p) {
			return p
		}
		return filepath.Join(dir, p)
	}
	s := settings{store: relative(c.Store), listen: c.Listen, opsListen: c.OpsListen, workload: c.WorkloadAPI}
	if s.listen == "" {
		s.listen = "127.0.0.1:8443"
	}
	if c.Store == "" {
		fail("store", "store is missing: say where the broker keeps its state")
	}
	if len(c.Catalog) == 0 {
		fail("catalog", "catalog is missing: name the catalog's files")
	}
	for _, f := range c.Catalog {
		s.catalog = append(s.catalog, relative(f))
	}
	for i, name := range c.TrustDomains {
		td, err := spiffeid.TrustDomainFromString(name)
		if err != nil {
			fail(fmt.Sprintf("trust_domains[%d]", i), "%q is no trust domain: %v", name, err)
			continue
		}
		s.trustDomains = append(s.trustDomains, td)
	}
	level := slog.LevelInfo
	if c.LogLevel != "" {
		if err := level.UnmarshalText([]byte(c.LogLevel)); err != nil {
			fail("log_level", "log_level is %q; it is debug, info, warn or error", c.LogLevel)
		}
	}
	s.log = newLog(os.Stderr, level)
	if c.People != nil {
		s.people = c.People.check(relative, s.log, fail)
	}
	if len(errs) > 0 {
		errs.Sort()
		return settings{}, errs
	}
	return s, nil
}

func serverCommand() *cobra.Command {
	var config string
	cmd := &cobra.Command{
		Use:   "server",
		Short: "Run the broker",
		Long: `Server runs the broker with a configuration file.

SIGHUP reads the catalog again: a good one takes the place of the present one
at once, a bad one is refused as a whole and the present one stays. SIGTERM stops
the broker; requests under way are carried through, and leases stay as they are
for the next start.`,
		Example: "  mayflyd server --config /etc/mayfly/mayflyd.yaml",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := readConfig(config)
			if err != nil {
				return err
			}
			d, err := start(cmd.Context(), s)
			if err != nil {
				return err
			}
			return d.run(cmd.Context(), onHangup(cmd.Context()))
		},
	}
	cmd.Flags().StringVar(&config, "config", "", "the configuration file")
	_ = cmd.MarkFlagRequired("config") // fails only for a flag that is not defined
	return cmd
}
