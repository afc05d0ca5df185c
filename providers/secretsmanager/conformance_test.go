package secretsmanager

import (
	"context"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/providertest"
)

// patient is the driver for a suite that knows no store, and that has many leases
// of one secret: they know of no others, and a rotation that is under way when one
// is asked for fails.
type patient struct {
	Driver
	fail func()
}

func (d *patient) Open(ctx context.Context, config providers.Config) (providers.Provider, error) {
	config.Known = func(context.Context, bool) ([]providers.Known, error) { return nil, nil }
	p, err := d.Driver.Open(ctx, config)
	return patientProvider{p, d}, err
}

type patientProvider struct {
	providers.Provider
	driver *patient
}

func (p patientProvider) Mint(ctx context.Context, req providers.MintRequest, record func(providers.Handle) error) (providers.Minted, error) {
	for {
		minted, err := p.Provider.Mint(ctx, req, record)
		if broker.ReasonOf(err) != broker.ReasonConflict {
			return minted, err
		}
		p.driver.fail()
	}
}

// TestConformance: the contract, as far as it is for what does not die.
func TestConformance(t *testing.T) {
	for name, scope := range map[string]string{
		"Lapses":  `{"secret":"crm/db","fields":["username","password"]}`,
		"Rotates": `{"secret":"crm/db","fields":["username","password"],"rotate":true}`,
	} {
		t.Run(name, func(t *testing.T) {
			driver := &patient{}
			providertest.Run(t, providertest.Harness{Driver: driver, New: func(t *testing.T) providertest.Setup {
				w := newWorld(t)
				driver.fail = func() { w.fake.Set(func() { delete(w.secret.Stages, stagePending) }) }
				return providertest.Setup{
					Config: w.config(), Tool: broker.Tool{Name: "crm.db", Scope: json.RawMessage(scope)}, Static: true, Public: []string{"username"},
					Now: func() time.Time { return w.now },
					Until: func(at time.Time) {
						w.now = at
						w.fake.Finish(w.secret, `{"username":"crm","password":"another-long-password"}`)
					},
					// The strictest of rotations: only the current version works.
					Works: func(_ providers.MintRequest, s broker.Secret) bool {
						password, _ := s.Reveal("password")
						return strings.Contains(w.fake.Current(w.secret), `"`+password+`"`)
					},
				}
			}})
		})
	}
}
