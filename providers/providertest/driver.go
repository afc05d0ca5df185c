package providertest

import (
	"context"
	"encoding/json"
	"net/url"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
)

// Driver is the driver "world", whose providers use a System. It is for tests.
//
// Its configuration, all optional but url and mode:
//
//	url             where the World is; absent where Driver.System is set
//	mode            planned, recorded or asked
//	mint_timeout, late_bound, revoke_timeout    the Traits, as "150ms"
//	batch, concurrency, mint_concurrency        the Traits
//	survives        ScopeInfo.Survives of every tool
//
// A tool's scope has no fields.
type Driver struct {
	// System, if set, is used by calls within the process, in place of a World
	// at the configuration's url. It then works inside testing/synctest.
	System *System
}

var _ providers.Driver = Driver{}

type config struct {
	URL           string `json:"url"`
	Mode          Mode   `json:"mode"`
	MintTimeout   string `json:"mint_timeout"`
	LateBound     string `json:"late_bound"`
	RevokeTimeout string `json:"revoke_timeout"`
	Batch         int    `json:"batch"`
	Concurrency   int    `json:"concurrency"`
	MintLimit     int    `json:"mint_concurrency"`
	Survives      string `json:"survives"`

	traits providers.Traits
}

func (d Driver) decode(raw json.RawMessage) (config, error) {
	var c config
	if err := providers.Decode(raw, &c); err != nil {
		return c, err
	}
	if d.System != nil && c.URL != "" {
		return c, providers.FieldErrorf("url", "must be absent: this driver has its system within the process")
	}
	if d.System == nil {
		if u, err := url.Parse(c.URL); err != nil || u.Scheme != "http" || u.Host == "" {
			return c, providers.FieldErrorf("url", "must be the http URL of a World")
		}
	}
	switch c.Mode {
	case Planned, Recorded, Asked:
	default:
		return c, providers.FieldErrorf("mode", "must be %s, %s or %s", Planned, Recorded, Asked)
	}
	c.traits = providers.Traits{Batch: c.Batch, Concurrency: c.Concurrency, MintConcurrency: c.MintLimit}
	for _, f := range []struct {
		name, value string
		into        *time.Duration
	}{
		{"mint_timeout", c.MintTimeout, &c.traits.MintTimeout},
		{"late_bound", c.LateBound, &c.traits.LateBound},
		{"revoke_timeout", c.RevokeTimeout, &c.traits.RevokeTimeout},
	} {
		if f.value == "" {
			continue
		}
		v, err := time.ParseDuration(f.value)
		if err != nil || v < 0 {
			return c, providers.FieldErrorf(f.name, "must be a duration such as 150ms")
		}
		*f.into = v
	}
	return c, nil
}

// ValidateConfig implements providers.Driver.
func (d Driver) ValidateConfig(raw json.RawMessage) error {
	_, err := d.decode(raw)
	return err
}

// ValidateScope implements providers.Driver.
func (d Driver) ValidateScope(raw json.RawMessage, tool broker.Tool) (providers.ScopeInfo, error) {
	c, err := d.decode(raw)
	if err != nil {
		return providers.ScopeInfo{}, err
	}
	if err := providers.Decode(tool.Scope, &struct{}{}); err != nil {
		return providers.ScopeInfo{}, err
	}
	return providers.ScopeInfo{Fields: []string{fieldUsername, fieldPassword}, Survives: c.Survives}, nil
}

// Open implements providers.Driver. It does not reach for the World.
func (d Driver) Open(_ context.Context, config providers.Config) (providers.Provider, error) {
	c, err := d.decode(config.Raw)
	if err != nil {
		return nil, err
	}
	w := inProcess(d.System)
	if d.System == nil {
		w = overHTTP(c.URL)
	}
	return newProvider(w, c.Mode, config.Installation, c.traits, c.Survives), nil
}

// NewProvider opens a provider on s without a configuration. It is what tests
// of the engine want: deterministic, within the process, and at home in a
// testing/synctest bubble. Opening another on the same System is a restart.
func NewProvider(s *System, mode Mode, installation broker.InstallationID, traits providers.Traits) providers.Provider {
	return newProvider(inProcess(s), mode, installation, traits, "")
}
