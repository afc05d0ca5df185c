//go:build unix

package testbed

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/vault/api"
)

// startTries is how often a server is started when another process took its
// port between the choice and the start.
const startTries = 5

// VaultConfig says how a Vault is started. The zero value is a Vault that
// speaks plain HTTP on loopback, without an audit device.
type VaultConfig struct {
	// Dir has its data, log and audit log; it must exist. Where it is empty, a
	// temporary folder is made, and removed by Close.
	Dir string
	// Binary is the server. Empty: bin/testbed/vault, in the working folder or
	// one above it.
	Binary string
	// TLS has it speak TLS, with a certificate from an authority of its own,
	// see Vault.CACert. Clients may show a certificate: cert auth works.
	TLS bool
	// Names are further DNS names of its certificate, beside localhost and
	// 127.0.0.1.
	Names []string
	// Audit has each request and answer written to Vault.AuditLog.
	Audit bool
	// MaxRequestDuration is the longest time that Vault gives a request.
	// Zero: Vault's own 90 s.
	MaxRequestDuration time.Duration
	// LogLevel is trace, debug, info, warn or error. Empty: warn.
	LogLevel string
}

// Vault is a real Vault with integrated storage, initialised with one unseal
// key. Its methods may be called from many goroutines, but those that start
// and stop it one at a time.
type Vault struct {
	Addr      string // its URL, the same after a restart
	RootToken string
	CACert    string // PEM; empty without TLS
	Dir       string // its folder
	AuditLog  string // the audit device's file; empty without one
	LogFile   string // what it says of itself

	config    VaultConfig
	binary    string
	listen    string
	cluster   string
	unsealKey string
	http      *http.Client
	release   func() error

	mu      sync.Mutex
	process *process
}

// StartVault starts a Vault, initialises and unseals it. The caller closes it.
func StartVault(ctx context.Context, config VaultConfig) (_ *Vault, err error) {
	binary, err := findBinary("vault", config.Binary)
	if err != nil {
		return nil, err
	}
	v := &Vault{config: config, binary: binary, Dir: config.Dir, release: func() error { return nil }}
	if v.Dir == "" {
		if v.Dir, v.release, err = newPlace("vault"); err != nil {
			return nil, err
		}
	} else if v.Dir, err = filepath.Abs(v.Dir); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, v.Close())
		}
	}()
	v.LogFile = filepath.Join(v.Dir, "vault.log")
	if err := v.setUpHTTP(); err != nil {
		return nil, err
	}
	for try := 1; ; try++ {
		if err = v.choosePorts(); err != nil {
			return nil, err
		}
		if err = v.Start(ctx); err == nil {
			break
		}
		if try == startTries || !strings.Contains(err.Error(), "address already in use") {
			return nil, err
		}
		_ = os.Remove(v.LogFile)
	}
	if err := v.initialise(ctx); err != nil {
		return nil, err
	}
	if err := v.Unseal(ctx); err != nil {
		return nil, err
	}
	if config.Audit {
		v.AuditLog = filepath.Join(v.Dir, "audit.log")
		err := v.Client().Sys().EnableAuditWithOptionsWithContext(ctx, "file", &api.EnableAuditOptions{
			Type: "file", Options: map[string]string{"file_path": v.AuditLog},
		})
		if err != nil {
			return nil, fmt.Errorf("enabling the audit device: %w", err)
		}
	}
	return v, nil
}

func (v *Vault) setUpHTTP() error {
	transport := &http.Transport{MaxIdleConnsPerHost: 16, IdleConnTimeout: time.Minute} // no proxy: it is on loopback
	if v.config.TLS {
		ca, err := WriteCertificate(v.Dir, v.config.Names)
		if err != nil {
			return fmt.Errorf("making Vault's certificate: %w", err)
		}
		v.CACert = ca
		roots := x509.NewCertPool()
		roots.AppendCertsFromPEM([]byte(ca))
		transport.TLSClientConfig = &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: roots}
		transport.ForceAttemptHTTP2 = true
	}
	v.http = &http.Client{Transport: transport}
	return nil
}

func (v *Vault) choosePorts() error {
	api, err := freePort()
	if err != nil {
		return err
	}
	cluster, err := freePort()
	if err != nil {
		return err
	}
	v.listen, v.cluster = loopback(api), loopback(cluster)
	v.Addr = "http://" + v.listen
	if v.config.TLS {
		v.Addr = "https://" + v.listen
	}
	return nil
}

// Client is a new client with the root token. It takes nothing from the
// environment and repeats nothing.
func (v *Vault) Client() *api.Client {
	c, err := api.NewClient(&api.Config{Address: v.Addr, HttpClient: v.http, Timeout: time.Minute})
	if err != nil {
		panic(fmt.Sprintf("testbed: a client for %s: %v", v.Addr, err)) // the address is ours, and has been parsed before
	}
	c.SetMaxRetries(0)
	c.ClearNamespace()
	c.SetToken(v.RootToken)
	return c
}

// Start starts it where it was: with its data, on its port, sealed. It returns
// when it answers.
func (v *Vault) Start(ctx context.Context) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if !v.process.running() {
		if err := v.spawn(); err != nil {
			return err
		}
	}
	return v.process.until(ctx, "starting Vault", func(ctx context.Context) error {
		_, err := v.Client().Sys().InitStatusWithContext(ctx)
		return err
	})
}

func (v *Vault) spawn() error {
	args := []string{"--data", filepath.Join(v.Dir, "data"), "--listen", v.listen, "--cluster", v.cluster}
	if v.config.LogLevel != "" {
		args = append(args, "--log-level", v.config.LogLevel)
	}
	if v.config.MaxRequestDuration != 0 {
		args = append(args, "--max-request-duration", v.config.MaxRequestDuration.String())
	}
	if v.config.TLS {
		args = append(args, "--cert", filepath.Join(v.Dir, certFile), "--key", filepath.Join(v.Dir, keyFile))
	}
	cmd := exec.Command(v.binary, args...)
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + v.Dir, "TMPDIR=" + os.TempDir()}
	p, err := spawn("Vault", v.LogFile, cmd, syscall.SIGKILL)
	if err != nil {
		return err
	}
	v.process = p
	return nil
}

func (v *Vault) initialise(ctx context.Context) error {
	keys, err := v.Client().Sys().InitWithContext(ctx, &api.InitRequest{SecretShares: 1, SecretThreshold: 1})
	if err != nil {
		return fmt.Errorf("initialising Vault: %w: %s", err, tail(v.LogFile))
	}
	v.unsealKey, v.RootToken = keys.KeysB64[0], keys.RootToken
	return nil
}

// Seal seals it: it answers 503 to everything until Unseal.
func (v *Vault) Seal(ctx context.Context) error {
	if err := v.Client().Sys().SealWithContext(ctx); err != nil {
		return fmt.Errorf("sealing Vault: %w", err)
	}
	return nil
}

// Unseal unseals it, and returns when it is the active node and serves.
func (v *Vault) Unseal(ctx context.Context) error {
	v.mu.Lock()
	p := v.process
	v.mu.Unlock()
	if !p.running() {
		return errors.New("unsealing Vault: it does not run")
	}
	return p.until(ctx, "unsealing Vault", func(ctx context.Context) error {
		status, err := v.Client().Sys().UnsealWithContext(ctx, v.unsealKey)
		if err != nil {
			return err
		}
		if status.Sealed {
			return errors.New("it is sealed still")
		}
		health, err := v.Client().Sys().HealthWithContext(ctx)
		if err != nil {
			return err
		}
		if health.Sealed || health.Standby {
			return errors.New("it is not the active node yet")
		}
		_, err = v.Client().Auth().Token().LookupSelfWithContext(ctx)
		return err
	})
}

// Kill kills it with SIGKILL, and returns when it has ended.
func (v *Vault) Kill() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.process.kill()
}

// Stop ends it as an operator would, and returns when it has ended.
func (v *Vault) Stop(ctx context.Context) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if err := v.process.signal(syscall.SIGCONT); err != nil { // it may be paused
		return err
	}
	return v.process.stop(ctx, syscall.SIGTERM)
}

// Restart starts it again, stopping it first where it runs, and unseals it.
func (v *Vault) Restart(ctx context.Context) error {
	if err := v.Stop(ctx); err != nil {
		return err
	}
	if err := v.Start(ctx); err != nil {
		return err
	}
	return v.Unseal(ctx)
}

// Pause freezes it: connections stay open, and nothing answers.
func (v *Vault) Pause() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if !v.process.running() {
		return errors.New("pausing Vault: it does not run")
	}
	if err := v.process.signal(syscall.SIGSTOP); err != nil {
		return err
	}
	return stopped(v.process.pid())
}

// Resume ends a Pause.
func (v *Vault) Resume() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.process.signal(syscall.SIGCONT)
}

// Running reports whether its process lives.
func (v *Vault) Running() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.process.running()
}

// Close ends it and removes the folder that was made for it. It may be called
// again.
func (v *Vault) Close() error {
	err := v.Kill() // nobody wants its data
	if v.http != nil {
		v.http.CloseIdleConnections()
	}
	return errors.Join(err, v.release())
}

// findBinary is the server that `make testbed` built.
func findBinary(name, given string) (string, error) {
	missing := func(where string) error {
		return fmt.Errorf("%s is not built: there is no %s; run `make testbed-%s`", name, where, name)
	}
	if given != "" {
		if _, err := os.Stat(given); err != nil {
			return "", missing(given)
		}
		return filepath.Abs(given)
	}
	under := filepath.Join("bin", "testbed", name)
	dir, err := os.Getwd()
	if err != nil {
		return "", fmt.Errorf("looking for %s: %w", under, err)
	}
	for {
		path := filepath.Join(dir, under)
		if _, err := os.Stat(path); err == nil {
			return path, nil
		}
		above := filepath.Dir(dir)
		if above == dir {
			return "", missing(under + " here or in a folder above")
		}
		dir = above
	}
}
