//go:build unix

package testbed

import (
	"context"
	"encoding/json"
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
)

// OIDCConfig says how an OpenID provider is started, and whom it knows.
type OIDCConfig struct {
	// Dir has its configuration and log; it must exist. Empty: a temporary
	// folder is made, and removed by Close.
	Dir string `json:"-"`
	// Server is its program, server.mjs beside its node_modules. Empty:
	// bin/testbed/oidc/server.mjs, in the working folder or one above it.
	Server   string        `json:"-"`
	Accounts []OIDCAccount `json:"accounts"`
	Clients  []OIDCClient  `json:"clients"`
	// Audiences are the resources (RFC 8707) that it gives JWT access tokens for:
	// absolute URIs. Empty: it gives none.
	Audiences []string `json:"audiences,omitempty"`
	// ACR are the classes of authentication that its login page offers.
	ACR []string `json:"acr,omitempty"`
	// ClaimsInIDToken puts what scopes ask for into ID tokens. False: they are
	// at the userinfo endpoint only, as the standard has it.
	ClaimsInIDToken bool `json:"claims_in_id_token,omitempty"`
}

// OIDCAccount is somebody whom it signs in, and their claims.
type OIDCAccount struct {
	Subject       string   `json:"sub"`
	Email         string   `json:"email,omitempty"`
	EmailVerified bool     `json:"email_verified"`
	Name          string   `json:"name,omitempty"`
	Groups        []string `json:"groups,omitempty"`
}

// OIDCClient is a relying party.
type OIDCClient struct {
	ID           string   `json:"id"`
	Secret       string   `json:"secret,omitempty"`        // empty: a public client
	RedirectURIs []string `json:"redirect_uris,omitempty"` // nil: device codes only
	Algorithm    string   `json:"alg,omitempty"`           // of its ID tokens: RS256 or ES256. Empty: RS256
}

// OIDC is a running OpenID provider (oidc-provider, a certified one, on Node).
// Its pages have a form with the fields person (a subject or an e-mail
// address), acr, ago (seconds since the sign-in), and the button how (in,
// deny). Its methods may be called from many goroutines, but those that start
// and stop it one at a time.
type OIDC struct {
	Issuer  string // its URL, the same after a restart
	Dir     string
	LogFile string

	server  string
	node    string
	port    int
	config  OIDCConfig
	release func() error

	mu      sync.Mutex
	process *process
}

// StartOIDC starts an OpenID provider. The caller closes it.
func StartOIDC(ctx context.Context, config OIDCConfig) (_ *OIDC, err error) {
	server, err := findBinary("oidc/server.mjs", config.Server)
	if err != nil {
		return nil, errors.New("the OpenID provider is not there; run `make testbed-oidc`")
	}
	node, err := exec.LookPath("node")
	if err != nil {
		return nil, fmt.Errorf("the OpenID provider needs Node.js: apt-get install -y nodejs npm: %w", err)
	}
	o := &OIDC{server: server, node: node, config: config, Dir: config.Dir, release: func() error { return nil }}
	if o.Dir == "" {
		if o.Dir, o.release, err = newPlace("oidc"); err != nil {
			return nil, err
		}
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, o.Close())
		}
	}()
	o.LogFile = filepath.Join(o.Dir, "oidc.log")
	for try := 1; ; try++ {
		if o.port, err = freePort(); err != nil {
			return nil, err
		}
		o.Issuer = "http://" + loopback(o.port)
		if err = o.Start(ctx); err == nil {
			return o, nil
		}
		if try == startTries || !strings.Contains(err.Error(), "EADDRINUSE") {
			return nil, err
		}
		_ = os.Remove(o.LogFile)
	}
}

// Start starts it on its port, with new keys, and returns when it answers.
func (o *OIDC) Start(ctx context.Context) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if !o.process.running() {
		if err := o.spawn(); err != nil {
			return err
		}
	}
	client := &http.Client{Timeout: 5 * time.Second}
	defer client.CloseIdleConnections()
	return o.process.until(ctx, "starting the OpenID provider", func(ctx context.Context) error {
		r, err := http.NewRequestWithContext(ctx, http.MethodGet, o.Issuer+"/.well-known/openid-configuration", nil)
		if err != nil {
			return err
		}
		resp, err := client.Do(r)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return fmt.Errorf("it answers %s", resp.Status)
		}
		return nil
	})
}

func (o *OIDC) spawn() error {
	file := filepath.Join(o.Dir, "oidc.json")
	text, err := json.Marshal(struct {
		OIDCConfig
		Port int `json:"port"`
	}{o.config, o.port})
	if err != nil {
		return fmt.Errorf("writing the OpenID provider's configuration: %w", err)
	}
	if err := os.WriteFile(file, text, 0o600); err != nil {
		return fmt.Errorf("writing the OpenID provider's configuration: %w", err)
	}
	cmd := exec.Command(o.node, o.server, file)
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + o.Dir, "TMPDIR=" + os.TempDir(), "NODE_ENV=production"}
	p, err := spawn("the OpenID provider", o.LogFile, cmd, syscall.SIGKILL)
	if err != nil {
		return err
	}
	o.process = p
	return nil
}

// Stop ends it; nobody answers at its address until Start.
func (o *OIDC) Stop(ctx context.Context) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.process.stop(ctx, syscall.SIGTERM)
}

// Close ends it and removes the folder that was made for it. It may be called
// again.
func (o *OIDC) Close() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	return errors.Join(o.process.kill(), o.release())
}

// TestOIDC is StartOIDC for a test: it fails the test on an error, and closes
// the provider at its end.
func TestOIDC(t TB, config OIDCConfig) *OIDC {
	t.Helper()
	o, err := StartOIDC(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { finish(t, o.LogFile, o.Close) })
	return o
}
