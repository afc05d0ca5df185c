// Package vault mints credentials with HashiCorp Vault: database logins,
// certificates, signed SSH keys, cloud keys, and static secrets marked as such.
package vault

import (
	"context"
	"encoding/json"
	"errors"

	"github.com/mayfly-security/mayfly/attestation"
	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
)

// Driver opens Vault clusters.
type Driver struct {
	// Login is what the broker logs in to Vault with. Nil is enough for
	// validating configuration; Open then fails.
	Login attestation.LoginSource
}

var _ providers.Driver = Driver{}

func (Driver) ValidateConfig(json.RawMessage) error { return errors.New("not built yet") }
func (Driver) ValidateScope(json.RawMessage, broker.Tool) (providers.ScopeInfo, error) {
	return providers.ScopeInfo{}, errors.New("not built yet")
}
func (Driver) Open(context.Context, providers.Config) (providers.Provider, error) {
	return nil, errors.New("not built yet")
}
