package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/attestation/devtrust"
	"github.com/mayfly-security/mayfly/broker/catalog"
	"github.com/mayfly-security/mayfly/deploy/examples"
	"github.com/mayfly-security/mayfly/providers/token"
)

// brokerPath is the path of the broker's SPIFFE ID that clients expect unless
// told otherwise.
const brokerPath = "/mayfly"

// devStore is the store's name in the state directory.
const devStore = "mayfly.db"

type devFlags struct {
	dir, listen, ops string
	people, idp      string
	trustDomain      string
	svidTTL          time.Duration
	identities       []string
	verbose          bool
}

func devCommand() *cobra.Command {
	var f devFlags
	cmd := &cobra.Command{
		Use:   "dev",
		Short: "Run a broker, a trust domain and a sample catalog on this machine",
		Long: `Dev starts everything that Mayfly needs, on loopback: a SPIFFE trust domain with
its certificate authority in memory, a Workload API socket for each identity, an
identity provider with sample people, a sample catalog, and the broker. It prints
how to be each of them.

It is for one machine and for trying things out: whoever can open an identity's
socket is that identity, and whoever reaches the identity provider is any of its
people, without a password.

The catalog and its policies are files in the state directory. Change them and
send SIGHUP to the process; the broker takes them over, or says what is wrong and
keeps the old ones.`,
		Example: "  mayflyd dev\n  mayflyd dev --dir ./state --listen 127.0.0.1:9443",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return runDev(cmd.Context(), f, cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	cmd.Flags().StringVar(&f.dir, "dir", "", "state directory; default: mayfly-dev-<uid> in the temporary directory")
	cmd.Flags().StringVar(&f.listen, "listen", "127.0.0.1:8443", "where agents connect")
	cmd.Flags().StringVar(&f.ops, "ops-listen", "127.0.0.1:8444", "metrics and health; empty for none")
	cmd.Flags().StringVar(&f.people, "people-listen", "127.0.0.1:8446", "where people connect; empty for none")
	cmd.Flags().StringVar(&f.idp, "idp-listen", "127.0.0.1:8447", "where the identity provider of the sample people listens, on loopback")
	cmd.Flags().StringVar(&f.trustDomain, "trust-domain", "acme.test", "the trust domain; the sample catalog is for acme.test")
	cmd.Flags().DurationVar(&f.svidTTL, "svid-ttl", 10*time.Minute, "how long an SVID is valid; it rotates at half of it")
	cmd.Flags().StringArrayVar(&f.identities, "identity", nil, "another SPIFFE ID that one can be; may be repeated")
	cmd.Flags().BoolVarP(&f.verbose, "verbose", "v", false, "log to standard error what the broker does")
	cmd.AddCommand(sampleTokenCommand())
	return cmd
}

func runDev(ctx context.Context, f devFlags, out, errOut io.Writer) (err error) {
	level := slog.LevelWarn
	if f.verbose {
		level = slog.LevelInfo
	}
	log := newLog(errOut, level)
	td, err := spiffeid.TrustDomainFromString(f.trustDomain)
	if err != nil {
		return fmt.Errorf("reading --trust-domain: %w", err)
	}
	if f.dir == "" {
		f.dir = defaultDevDir()
	}
	if f.dir, err = filepath.Abs(f.dir); err != nil {
		return err
	}
	catalogFiles, err := prepareDev(f.dir)
	if err != nil {
		return err
	}
	snapshot, err := catalog.Load(catalogFiles, drivers(nil))
	if err != nil {
		return err
	}
	trust, err := devtrust.New(devtrust.Config{TrustDomain: td, Dir: filepath.Join(f.dir, "sockets"), SVIDTTL: f.svidTTL, Log: log})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, trust.Close()) }()
	bundleFile := filepath.Join(f.dir, "bundle.json")
	if err := writeBundle(bundleFile, trust); err != nil {
		return err
	}
	brokerID, err := spiffeid.FromPath(td, brokerPath)
	if err != nil {
		return err
	}
	brokerSocket, err := trust.Add(devtrust.Identity{ID: brokerID, DNSNames: []string{"localhost"}})
	if err != nil {
		return err
	}
	people, err := addDevIdentities(trust, td, snapshot, f.identities)
	if err != nil {
		return err
	}
	conf := settings{
		store: filepath.Join(f.dir, devStore), listen: f.listen, opsListen: f.ops,
		workload: brokerSocket, catalog: catalogFiles, log: log,
	}
	var sample *devPeople
	if f.people != "" {
		if sample, err = openDevPeople(f); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, sample.close()) }()
		conf.people, conf.sampleToken = sample.settings, sample.token
	}
	d, err := start(ctx, conf)
	if err != nil {
		return err
	}
	printDev(out, d, f.dir, catalogFiles, bundleFile, people, sample)
	return d.run(ctx, onHangup(ctx))
}

// prepareDev makes the state directory, a signing key and the sample catalog,
// where they are not there yet. A catalog that is there may have no policies.
func prepareDev(dir string) (catalogFiles []string, err error) {
	keys := filepath.Join(dir, "keys")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("making the state directory: %w", err)
	}
	if err := ownAlone(dir); err != nil { // before anything is put into it
		return nil, err
	}
	for _, d := range []string{keys, filepath.Join(dir, "sockets")} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, fmt.Errorf("making the state directory: %w", err)
		}
	}
	if found, err := filepath.Glob(filepath.Join(keys, "*.pem")); err != nil || len(found) == 0 {
		if _, err := token.NewKey(keys, time.Now()); err != nil {
			return nil, fmt.Errorf("making a signing key: %w", err)
		}
	}
	catalogFile, policies := filepath.Join(dir, "catalog.yaml"), filepath.Join(dir, "policies.cedar")
	if _, err := os.Stat(catalogFile); err != nil {
		if err := os.WriteFile(policies, []byte(examples.Policies), 0o600); err != nil { // first: a catalog is whole when it is there
			return nil, fmt.Errorf("writing the sample policies: %w", err)
		}
		sample := strings.ReplaceAll(examples.Catalog, examples.KeysPath, keys)
		if err := os.WriteFile(catalogFile, []byte(sample), 0o600); err != nil {
			return nil, fmt.Errorf("writing the sample catalog: %w", err)
		}
	}
	catalogFiles = []string{catalogFile}
	if _, err := os.Stat(policies); err == nil {
		catalogFiles = append(catalogFiles, policies)
	}
	return catalogFiles, nil
}

// ownAlone refuses a state directory that somebody else could have laid out:
// the default one is in a directory where everybody may make files.
func ownAlone(dir string) error {
	info, err := os.Lstat(dir)
	if err != nil {
		return err
	}
	if !info.IsDir() || info.Mode().Perm()&0o077 != 0 || !ownedByUs(info) {
		return fmt.Errorf("the state directory %s must be a directory of this user's with mode 0700: chmod it, or choose another with --dir", dir)
	}
	return nil
}

// devIdentity is one identity and the socket that makes one it.
type devIdentity struct {
	id     spiffeid.ID
	roles  string
	socket string
}

func addDevIdentities(trust *devtrust.Server, td spiffeid.TrustDomain, snapshot *catalog.Snapshot, more []string) ([]devIdentity, error) {
	var ids []spiffeid.ID
	for _, path := range examples.Services() { // besides the agents, openers and group members of the catalog
		id, err := spiffeid.FromPath(td, path)
		if err != nil {
			return nil, err
		}
		ids = append(ids, id)
	}
	for _, s := range more {
		id, err := spiffeid.FromString(s)
		if err != nil {
			return nil, fmt.Errorf("reading --identity: %w", err)
		}
		ids = append(ids, id)
	}
	ids = append(snapshot.Identities(), ids...)
	seen := map[spiffeid.ID]bool{}
	var people []devIdentity
	for _, id := range ids {
		if seen[id] || !id.MemberOf(td) {
			continue
		}
		seen[id] = true
		socket, err := trust.Add(devtrust.Identity{ID: id})
		if err != nil {
			return nil, err
		}
		roles := strings.Join(snapshot.Roles(id), ", ")
		if roles == "" {
			roles = "not in the catalog"
		}
		people = append(people, devIdentity{id: id, roles: roles, socket: socket})
	}
	return people, nil
}

// writeBundle writes the trust domain's public keys (SPIFFE Trust Domain and
// Bundle, section 4), which other systems verify the broker's SVIDs with:
// Vault's JWT auth method, for one. They are new at each start.
func writeBundle(path string, trust *devtrust.Server) error {
	b, err := trust.Bundle().Marshal()
	if err == nil {
		err = os.WriteFile(path, b, 0o600)
	}
	if err != nil {
		return fmt.Errorf("writing the trust domain's bundle: %w", err)
	}
	return nil
}

func printDev(out io.Writer, d *daemon, dir string, catalogFiles []string, bundleFile string, people []devIdentity, sample *devPeople) {
	port := d.ln.Addr().String()[strings.LastIndexByte(d.ln.Addr().String(), ':'):]
	fmt.Fprintf(out, "Mayfly dev: a broker for this machine alone. Not for production: whoever can open\nan identity's socket is that identity.\n\n")
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintf(w, "  broker\thttps://localhost%s\t%s\n", port, d.identity.ID())
	if d.opsLn != nil {
		fmt.Fprintf(w, "  metrics\thttp://%s/metrics\n", d.opsLn.Addr())
	}
	fmt.Fprintf(w, "  catalog\t%s\tchange it, then: kill -HUP %d\n", strings.Join(catalogFiles, " "), os.Getpid())
	fmt.Fprintf(w, "  state\t%s\n", dir)
	fmt.Fprintf(w, "  bundle\t%s\tthe trust domain's public keys, for systems that the broker logs in to\n", bundleFile)
	if sample != nil {
		fmt.Fprintf(w, "  people\t%s\tsigned in by %s, which is for sample people alone\n", sample.settings.url, sample.provider.Issuer())
	}
	w.Flush()
	fmt.Fprintf(out, "\nIn another shell:\n\n  export MAYFLY_ADDR=https://localhost%s\n\nand, to be one of these, paste the line below it:\n", port)
	for _, p := range people {
		fmt.Fprintf(out, "\n  # %s (%s)\n  export SPIFFE_ENDPOINT_SOCKET=%s\n", p.id, p.roles, p.socket)
	}
	if sample != nil {
		fmt.Fprintf(out, "\nOr, to come as one of the sample people:\n\n  export MAYFLY_PEOPLE_ADDR=%s\n  export MAYFLY_PEOPLE_CA=%s\n  mayfly login\n\n"+
			"Your browser will ask whether to trust this machine's broker, and then who to be:\n\n", sample.settings.url, sample.caFile)
		w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
		for _, p := range sample.people {
			groups := strings.Join(p.Groups, ", ")
			if groups == "" {
				groups = "in no group"
			}
			fmt.Fprintf(w, "  %s\t%s\n", p.Name, groups)
		}
		w.Flush()
		fmt.Fprintf(out, "\nWithout a browser: MAYFLY_TOKEN=$(mayflyd dev token --dir %s --person %s)\n", dir, sample.people[0].Name)
	}
	fmt.Fprintf(out, "\nThen: mayfly whoami\n\nReady. Ctrl-C stops it.\n")
}
