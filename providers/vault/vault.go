// Package vault is the driver "vault": credentials that HashiCorp Vault, or a
// server with its API such as OpenBao, makes. Database logins, certificates,
// signed SSH keys, cloud keys, whatever else has a lease, and static secrets
// marked as such.
//
// Each lease of ours has an orphan token of its own in Vault, made through a
// token role whose policy allows exactly the tool's path. Its accessor is
// recorded before the credential is read with it, and the read goes on whatever
// becomes of the caller. A lease ends in Vault with a synchronous revocation
// first and the end of its token after that: the other way round Vault can lose
// track of what it made.
//
// What Vault itself loses (a role for a client that vanished, or by a Vault
// that crashed) is bounded by the database's VALID UNTIL. A narrow PostgreSQL
// login of the broker's, if there is one, finds and drops it earlier, and ends
// access directly also while Vault is away.
package vault

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/mayfly-security/mayfly/attestation"
	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/vault/vaultscope"
)

// Driver opens Vault clusters.
type Driver struct {
	// Login is what the broker logs in to Vault with. Nil is enough for
	// validating configuration; Open then fails.
	Login attestation.LoginSource
	// CheckToken is a token of an operator's with which CheckLive sees more
	// than the broker may. Empty: it looks as the broker alone.
	CheckToken string
}

var (
	_ providers.Driver      = Driver{}
	_ providers.Meaning     = Driver{}
	_ providers.LiveChecker = Driver{}
)

// ValidateConfig implements providers.Driver.
func (Driver) ValidateConfig(raw json.RawMessage) error {
	_, err := vaultscope.ParseConfig(raw)
	return err
}

// Meaning implements providers.Meaning.
func (Driver) Meaning(raw json.RawMessage) (json.RawMessage, error) {
	c, err := vaultscope.ParseConfig(raw)
	if err != nil {
		return nil, err
	}
	return c.Meaning(), nil
}

// ValidateScope implements providers.Driver.
func (Driver) ValidateScope(raw json.RawMessage, tool broker.Tool) (providers.ScopeInfo, error) {
	c, err := vaultscope.ParseConfig(raw)
	if err != nil {
		return providers.ScopeInfo{}, err
	}
	s, err := vaultscope.ParseScope(c, tool)
	if err != nil {
		return providers.ScopeInfo{}, err
	}
	return s.Info(c), nil
}

// Open implements providers.Driver. It waits for nothing: a Vault or a database
// that is away keeps no broker from starting. The first login is made when the first
// call needs it.
func (d Driver) Open(_ context.Context, config providers.Config) (providers.Provider, error) {
	c, err := vaultscope.ParseConfig(config.Raw)
	if err != nil {
		return nil, err
	}
	switch {
	case d.Login == nil:
		return nil, errors.New("opening Vault: there is nothing to log in with")
	case config.Log == nil || config.Now == nil:
		return nil, errors.New("opening Vault: a log and a clock are needed")
	}
	client, err := newClient(endpoint{
		address: c.Address, namespace: c.Namespace, caFile: c.CAFile, serverName: c.ServerName,
		identity: d.Login, certLogin: c.Auth.Method == vaultscope.MethodCert,
	})
	if err != nil {
		return nil, fmt.Errorf("opening Vault: %w", err)
	}
	p := &provider{
		name: config.Name, installation: config.Installation, config: c, client: client,
		session: newSession(client, d.Login, c.LoginPath(), c.Auth.Role, c.Auth.Audience),
		directs: make(map[string]*direct), slots: make(chan struct{}, c.Concurrency),
		troubled: make(chan struct{}, max(1, c.Concurrency/2)),
		now:      config.Now, log: config.Log,
	}
	for _, db := range c.Databases {
		direct, err := openDirect(db, vaultscope.Installation(p.installation))
		if err != nil {
			p.Close()
			return nil, fmt.Errorf("opening Vault: %w", err)
		}
		p.directs[db.Mount] = direct
	}
	return p, nil
}

// provider is one Vault cluster.
type provider struct {
	name         string
	installation broker.InstallationID
	config       vaultscope.Config
	client       *client
	session      *session
	directs      map[string]*direct // by mount
	slots        chan struct{}      // one for each call that ends leases
	troubled     chan struct{}      // and for those of them whose database did not answer
	now          func() time.Time
	log          *slog.Logger
	closing      sync.Once
}

var _ providers.Provider = (*provider)(nil)

// readLimit is how long the answer to the read of a credential is waited for.
func (p *provider) readLimit() time.Duration { return p.config.RequestLimit + readMargin }

// Traits implements providers.Provider.
func (p *provider) Traits() providers.Traits {
	t := providers.Traits{
		MintTimeout:   createLimit + p.readLimit() + revokeLimit,
		LateBound:     p.config.RequestLimit,
		RevokeTimeout: revokeLimit + probeLimit + 2*directLimit + 2*time.Second,
		Batch:         64,
		Concurrency:   2,
	}
	if len(p.directs) > 0 {
		t.Batch = 512 // their access ends with few statements, before anything else
	}
	return t
}

// Close implements providers.Provider. The login is left to its end: to revoke
// it would end, in a Vault whose token roles are not set up as they should be,
// every lease with it.
func (p *provider) Close() error {
	p.closing.Do(func() {
		p.session.close()
		p.client.close()
		for _, d := range p.directs {
			d.close()
		}
	})
	return nil
}
