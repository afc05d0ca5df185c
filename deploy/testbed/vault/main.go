// Command vault is HashiCorp Vault's own core, storage, HTTP handler and the
// engines that Mayfly's tests use, in one small binary: as real as the whole
// one, and much faster to build. It is for tests and demonstrations only.
//
// What is Vault's: the core (tokens, policies, leases, expiration, audit
// broker), integrated storage (raft), the file audit device, the JWT, cert and
// AppRole auth methods, and the database (PostgreSQL), KV, PKI, SSH, AWS and
// transit engines. What is not here: the command line, the web UI, seals other
// than Shamir, configuration files, and the other engines.
package main

import (
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"
	authjwt "github.com/hashicorp/vault-plugin-auth-jwt"
	kv "github.com/hashicorp/vault-plugin-secrets-kv"
	"github.com/hashicorp/vault/audit"
	"github.com/hashicorp/vault/builtin/credential/approle"
	"github.com/hashicorp/vault/builtin/credential/cert"
	"github.com/hashicorp/vault/builtin/logical/aws"
	"github.com/hashicorp/vault/builtin/logical/database"
	"github.com/hashicorp/vault/builtin/logical/pki"
	"github.com/hashicorp/vault/builtin/logical/ssh"
	"github.com/hashicorp/vault/builtin/logical/transit"
	"github.com/hashicorp/vault/command/server"
	vaulthttp "github.com/hashicorp/vault/http"
	"github.com/hashicorp/vault/internalshared/configutil"
	"github.com/hashicorp/vault/physical/raft"
	"github.com/hashicorp/vault/plugins/database/postgresql"
	"github.com/hashicorp/vault/sdk/helper/consts"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/hashicorp/vault/sdk/physical"
	"github.com/hashicorp/vault/vault"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "vault:", err)
		os.Exit(1)
	}
}

func run() error {
	data := flag.String("data", "", "folder for the data of integrated storage (required)")
	listen := flag.String("listen", "127.0.0.1:8200", "address of the API")
	cluster := flag.String("cluster", "127.0.0.1:8201", "address for other nodes")
	certFile := flag.String("cert", "", "certificate of the API; plain HTTP without")
	keyFile := flag.String("key", "", "key of the certificate")
	limit := flag.Duration("max-request-duration", vault.DefaultMaxRequestDuration, "longest time that a request may take")
	level := flag.String("log-level", "warn", "trace, debug, info, warn, error")
	flag.Parse()
	if *data == "" || (*certFile == "") != (*keyFile == "") || *limit <= 0 {
		flag.Usage()
		return errors.New("--data is required, --cert goes with --key, and --max-request-duration is above zero")
	}
	if err := os.MkdirAll(*data, 0o700); err != nil {
		return err
	}

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	log := hclog.New(&hclog.LoggerOptions{Level: hclog.LevelFromString(*level), Output: os.Stderr})

	storage, err := raft.NewRaftBackend(map[string]string{
		"path": filepath.Clean(*data), "node_id": "testbed",
		"performance_multiplier": "1", // what Vault advises for production; its default makes each start 5 s longer
	}, log.Named("storage"))
	if err != nil {
		return fmt.Errorf("opening integrated storage: %w", err)
	}
	scheme := "http"
	if *certFile != "" {
		scheme = "https"
	}
	core, err := vault.NewCore(&vault.CoreConfig{
		RawConfig:       &server.Config{SharedConfig: &configutil.SharedConfig{}},
		Physical:        storage,
		HAPhysical:      storage.(physical.HABackend),
		StorageType:     "raft",
		RedirectAddr:    scheme + "://" + *listen,
		ClusterAddr:     "https://" + *cluster,
		ClusterName:     "testbed",
		Logger:          log,
		LogLevel:        *level,
		DisableMlock:    true,
		BuiltinRegistry: plugins,
		AuditBackends:   map[string]audit.Factory{"file": audit.NewFileBackend},
		CredentialBackends: map[string]logical.Factory{
			"jwt": authjwt.Factory, "cert": cert.Factory, "approle": approle.Factory,
		},
		LogicalBackends: map[string]logical.Factory{
			"database": database.Factory, "kv": kv.Factory, "pki": pki.Factory,
			"ssh": ssh.Factory, "aws": aws.Factory, "transit": transit.Factory,
		},
	})
	if err != nil {
		return fmt.Errorf("starting the core: %w", err)
	}

	config := &configutil.Listener{
		Type: "tcp", Address: *listen,
		MaxRequestSize: vaulthttp.DefaultMaxRequestSize, MaxRequestDuration: *limit,
	}
	l, err := net.Listen("tcp", *listen)
	if err != nil {
		return err
	}
	if *certFile != "" {
		pair, err := tls.LoadX509KeyPair(*certFile, *keyFile)
		if err != nil {
			return err
		}
		l = tls.NewListener(l, &tls.Config{
			MinVersion:   tls.VersionTLS12,
			Certificates: []tls.Certificate{pair},
			ClientAuth:   tls.RequestClientCert, // the cert auth method verifies it
			NextProtos:   []string{"h2", "http/1.1"},
		})
	}
	clusterAddr, err := net.ResolveTCPAddr("tcp", *cluster)
	if err != nil {
		return err
	}
	handler := vaulthttp.Handler.Handler(&vault.HandlerProperties{Core: core, ListenerConfig: config})
	core.SetClusterListenerAddrs([]*net.TCPAddr{clusterAddr})
	core.SetClusterHandler(handler)
	srv := &http.Server{Handler: handler, ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 5 * time.Minute}
	failed := make(chan error, 1)
	go func() { failed <- srv.Serve(l) }()
	fmt.Printf("vault: %s://%s\n", scheme, l.Addr())

	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
	}
	end, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	_ = srv.Shutdown(end)
	return core.Shutdown()
}

// registry lists the engines that a mount may name.
type registry map[consts.PluginType]map[string]func() (any, error)

func backend(f logical.Factory) func() (any, error) {
	return func() (any, error) { return f, nil }
}

var plugins = registry{
	consts.PluginTypeDatabase: {"postgresql-database-plugin": postgresql.New},
	consts.PluginTypeCredential: {
		"jwt": backend(authjwt.Factory), "cert": backend(cert.Factory), "approle": backend(approle.Factory),
	},
	consts.PluginTypeSecrets: {
		"kv": backend(kv.Factory), "pki": backend(pki.Factory), "ssh": backend(ssh.Factory),
		"aws": backend(aws.Factory), "transit": backend(transit.Factory),
	},
}

func (r registry) Contains(name string, kind consts.PluginType) bool {
	_, ok := r[kind][name]
	return ok
}

func (r registry) Get(name string, kind consts.PluginType) (func() (any, error), bool) {
	f, ok := r[kind][name]
	return f, ok
}

func (r registry) Keys(kind consts.PluginType) []string {
	var names []string
	for name := range r[kind] {
		names = append(names, name)
	}
	return names
}

func (r registry) DeprecationStatus(name string, kind consts.PluginType) (consts.DeprecationStatus, bool) {
	_, ok := r[kind][name]
	return consts.Supported, ok
}

func (registry) IsBuiltinEntPlugin(string, consts.PluginType) bool { return false }
