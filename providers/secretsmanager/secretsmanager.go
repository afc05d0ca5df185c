// Package secretsmanager is the driver "secretsmanager": secrets that are in AWS
// Secrets Manager, read for one lease each.
//
// Such a secret was there before the lease and stays after it. Nothing revokes
// it; what ends its value is a rotation, and what a rotation does is up to the
// secret's rotation function. So leases are static: at their end they lapse, and
// are never said to be dead. Where the tool's scope says so, the end of a lease
// begins a rotation, and the lease tells how far that came.
package secretsmanager

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	sm "github.com/aws/aws-sdk-go-v2/service/secretsmanager"

	"github.com/mayfly-security/mayfly/attestation"
	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/internal/awsclient"
)

// Driver opens AWS Secrets Manager, one region of one account each.
type Driver struct {
	// Login is what the broker logs in with; nil is enough for validating
	// configuration, and for credentials that need no login.
	Login attestation.LoginSource
}

var (
	_ providers.Driver  = Driver{}
	_ providers.Meaning = Driver{}
	_ providers.Warner  = Driver{}
)

// ValidateConfig implements providers.Driver.
func (Driver) ValidateConfig(raw json.RawMessage) error {
	_, err := parseConfig(raw)
	return err
}

// Meaning implements providers.Meaning: which secrets a name means.
func (Driver) Meaning(raw json.RawMessage) (json.RawMessage, error) {
	c, err := parseConfig(raw)
	if err != nil {
		return nil, err
	}
	return json.Marshal(map[string]string{"region": c.Region, "endpoint": c.endpoint, "account": c.Account})
}

// ValidateScope implements providers.Driver.
func (Driver) ValidateScope(raw json.RawMessage, tool broker.Tool) (providers.ScopeInfo, error) {
	c, err := parseConfig(raw)
	if err != nil {
		return providers.ScopeInfo{}, err
	}
	s, err := parseScope(c, tool)
	if err != nil {
		return providers.ScopeInfo{}, err
	}
	return providers.ScopeInfo{Fields: s.names(), Survives: s.survives(), MinTTL: time.Second, Static: true}, nil
}

// Warnings implements providers.Warner.
func (Driver) Warnings(raw json.RawMessage, tool broker.Tool) []providers.Finding {
	c, err := parseConfig(raw)
	if err != nil {
		return nil
	}
	s, err := parseScope(c, tool)
	if err != nil {
		return nil
	}
	if !s.rotate {
		return []providers.Finding{{Message: "its leases give a static secret, " + s.secret + ": it cannot be revoked, and works after the lease until somebody rotates it",
			Fix: "where the secret has a rotation, set rotate: true in the scope"}}
	}
	return []providers.Finding{{Message: "its leases give a static secret, " + s.secret + ", which is rotated at the end of each: there is one lease of it at a time, and whoever else has the value may find that it does not work any more",
		Fix: "let nobody but this tool's agents use the secret"}}
}

// Open implements providers.Driver. It asks AWS for nothing: a region that
// cannot be reached keeps no broker from starting.
func (d Driver) Open(ctx context.Context, config providers.Config) (providers.Provider, error) {
	c, err := parseConfig(config.Raw)
	if err != nil {
		return nil, err
	}
	if config.Log == nil || config.Now == nil || config.Known == nil {
		return nil, errors.New("opening AWS Secrets Manager: a log, a clock and the known leases are needed")
	}
	p := &provider{name: config.Name, config: c, now: config.Now, known: config.Known, asked: map[string]time.Time{}}
	if p.client, err = awsclient.Open(ctx, awsclient.Config{Access: c.Access, STSEndpoint: c.stsEndpoint}, d.Login); err != nil {
		return nil, fmt.Errorf("opening AWS Secrets Manager: %w", err)
	}
	p.sm = sm.NewFromConfig(p.client.At(c.endpoint))
	return p, nil
}

// provider is AWS Secrets Manager in one region of one account.
type provider struct {
	name   string
	config config
	client *awsclient.Client
	sm     *sm.Client
	now    func() time.Time
	known  func(ctx context.Context, begun bool) ([]providers.Known, error) // the leases that have not ended

	mu    sync.Mutex
	asked map[string]time.Time // when a rotation was last asked for, by its request token
}

const (
	mintLimit   = 30 * time.Second // for the login and one read
	revokeLimit = 60 * time.Second
)

// Traits implements providers.Provider. Reading makes nothing, early or late.
func (*provider) Traits() providers.Traits {
	return providers.Traits{MintTimeout: mintLimit, RevokeTimeout: revokeLimit, Batch: 16}
}

// Close implements providers.Provider.
func (p *provider) Close() error {
	p.client.Close()
	return nil
}
