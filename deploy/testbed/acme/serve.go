//go:build unix

package acme

import (
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/deploy/examples/story"
	"github.com/mayfly-security/mayfly/deploy/testbed"
)

// broker is who the broker is in `mayflyd dev`.
var broker = spiffeid.RequireFromString("spiffe://acme.test/mayfly")

// Serve does what an operator does: it sets PostgreSQL up, starts the story's
// broker with the catalog, and sets Vault up for it.
func (w *World) Serve(s *story.Story) error {
	catalog, err := os.ReadFile(w.Catalog)
	if err != nil {
		return err
	}
	if err := errors.Join(os.Mkdir(s.State(), 0o700), os.WriteFile(filepath.Join(s.State(), "catalog.yaml"), catalog, 0o600)); err != nil {
		return err
	}
	document, err := w.Setup(s, "--output", "json")
	if err != nil {
		return err
	}
	if err := w.applySQL(s.Ctx, document); err != nil {
		return err
	}
	if err := s.StartBroker(); err != nil {
		return err
	}
	// The trust domain is there now, and with it the keys that Vault verifies
	// the broker's login with.
	if document, err = w.Setup(s, "--output", "json"); err != nil {
		return err
	}
	return w.apply(s.Ctx, document)
}

// Setup runs `mayfly vault setup` for the world.
func (w *World) Setup(s *story.Story, more ...string) ([]byte, error) {
	args := []string{"vault", "setup", "--catalog", w.Catalog, "--broker-id", broker.String(),
		"--connection", testbed.DatabaseName, "--vault-login", testbed.AdminLogin}
	keys, err := w.keys(filepath.Join(s.State(), "bundle.json"))
	if err != nil {
		return nil, err
	}
	for _, file := range keys {
		args = append(args, "--jwt-pubkey-file", file)
	}
	cmd := exec.CommandContext(s.Ctx, filepath.Join(s.Bin, "mayfly"), append(args, more...)...)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("printing the setup: %w", err)
	}
	return out, nil
}

// keys writes the keys that JWT-SVIDs are signed with, each to a file, out of
// the trust domain's bundle (SPIFFE Trust Domain and Bundle, section 4). There
// are none before there is a trust domain.
func (w *World) keys(bundle string) ([]string, error) {
	raw, err := os.ReadFile(bundle)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	b, err := spiffebundle.Parse(broker.TrustDomain(), raw)
	if err != nil {
		return nil, err
	}
	var files []string
	for id, key := range b.JWTAuthorities() {
		der, err := x509.MarshalPKIXPublicKey(key)
		if err != nil {
			return nil, err
		}
		file := filepath.Join(w.dir, "jwt-"+id+".pem")
		if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}), 0o600); err != nil {
			return nil, err
		}
		files = append(files, file)
	}
	return files, nil
}
