package secretsmanager

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/providertest"
)

// TestConformance: the contract, as far as it is for what does not die.
func TestConformance(t *testing.T) {
	for name, scope := range map[string]string{
		"Lapses":  `{"secret":"crm/db","fields":["username","password"]}`,
		"Rotates": `{"secret":"crm/db","fields":["username","password"],"rotate":true}`,
	} {
		t.Run(name, func(t *testing.T) {
			providertest.Run(t, providertest.Harness{Driver: Driver{}, New: func(t *testing.T) providertest.Setup {
				w := newWorld(t)
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
