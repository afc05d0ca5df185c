package vault

import (
	"context"
	"testing"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/providertest"
)

// suite is the installation of package providertest, whose names its tests give.
const suite = broker.InstallationID("m00000000conformancesuite0")

func TestConformance(t *testing.T) {
	v, pg := servers(t)
	t.Run("database", func(t *testing.T) {
		var w *world
		providertest.Run(t, providertest.Harness{Driver: lazily(&w), New: func(t *testing.T) providertest.Setup {
			w = newWorld(t, v, pg)
			w.installation = suite
			this := w.setup(w.database())
			return providertest.Setup{
				Config: w.config(), Tool: w.database(), Public: []string{"username"}, TTL: shortest,
				Until:    func(t time.Time) { time.Sleep(time.Until(t)) }, // PostgreSQL's clock is not ours to set
				DiesLate: true,                                            // VALID UNTIL is five seconds after the end of Vault's lease
				Works:    func(_ providers.MintRequest, secret broker.Secret) bool { return this.connects(secret) },
				Left:     func(lease broker.LeaseID) bool { return len(this.rolesOf(lease)) > 0 },
			}
		}})
	})
}

// lazily is a Driver that logs in as the broker of the world of the moment.
func lazily(w **world) providers.Driver { return lazy{w: w} }

type lazy struct {
	Driver
	w **world
}

func (l lazy) Open(ctx context.Context, config providers.Config) (providers.Provider, error) {
	return Driver{Login: (*l.w).login}.Open(ctx, config)
}
