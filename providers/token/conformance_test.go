package token

import (
	"context"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/json"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/providertest"
)

func TestConformance(t *testing.T) {
	t.Run("introspect", func(t *testing.T) {
		providertest.Run(t, providertest.Harness{Driver: Driver{}, New: func(t *testing.T) providertest.Setup {
			f := newFixture(t)
			// What the engine's store is to introspection.
			var mu sync.Mutex
			ended := make(map[broker.LeaseID]bool)
			return providertest.Setup{
				Config: configFor(f.dir), Tool: tool(introspectScope), Now: f.clock.Now, Until: f.clock.AdvanceTo,
				Ending: func(lease broker.LeaseID) {
					mu.Lock()
					defer mu.Unlock()
					ended[lease] = true
				},
				Works: func(req providers.MintRequest, secret broker.Secret) bool {
					token, _ := secret.Reveal(Field)
					in, ok := f.Introspect(context.Background(), token, server)
					mu.Lock()
					defer mu.Unlock()
					return ok && in.Lease == req.Lease && !ended[in.Lease]
				},
			}
		}})
	})
	t.Run("offline", func(t *testing.T) {
		providertest.Run(t, providertest.Harness{Driver: Driver{}, New: func(t *testing.T) providertest.Setup {
			f := newFixture(t)
			return providertest.Setup{
				Config: configFor(f.dir), Tool: tool(offlineScope), Now: f.clock.Now, Until: f.clock.AdvanceTo,
				Works: func(_ providers.MintRequest, secret broker.Secret) bool {
					token, _ := secret.Reveal(Field)
					return worksOffline(t, f.JWKS(), token, f.clock.Now(), 30*time.Second)
				},
			}
		}})
	})
}

// worksOffline is a resource server that verifies by itself and allows for
// clock skew.
func worksOffline(t *testing.T, jwks json.RawMessage, token string, now time.Time, leeway time.Duration) bool {
	parts := strings.Split(token, ".")
	payload, _ := base64.RawURLEncoding.DecodeString(parts[1])
	signature, _ := base64.RawURLEncoding.DecodeString(parts[2])
	var c struct {
		Expires int64 `json:"exp"`
	}
	if err := json.Unmarshal(payload, &c); err != nil {
		t.Fatal(err)
	}
	for _, key := range published(t, jwks) {
		if ed25519.Verify(key, []byte(parts[0]+"."+parts[1]), signature) {
			return now.Before(time.Unix(c.Expires, 0).Add(leeway))
		}
	}
	return false
}
