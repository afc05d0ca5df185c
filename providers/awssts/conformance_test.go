package awssts

import (
	"context"
	"testing"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/awssts/awsscope"
	"github.com/mayfly-security/mayfly/providers/providertest"
)

// lazily opens with the store of the world of the moment.
type lazily struct {
	*Driver
	w **world
}

func (l lazily) Open(ctx context.Context, config providers.Config) (providers.Provider, error) {
	config.Known = (*l.w).store.Known
	return l.Driver.Open(ctx, config)
}

func TestConformance(t *testing.T) {
	for name, text := range map[string]string{
		"deny list": `{"mode":"deny_list","settle":"2s"}`,
		"written":   `{"mode":"deny_list","verify":"none"}`,
		"off":       `{"mode":"off"}`,
	} {
		t.Run(name, func(t *testing.T) {
			var w *world
			providertest.Run(t, providertest.Harness{Driver: lazily{New(nil), &w}, New: func(t *testing.T) providertest.Setup {
				w = newWorld(t, early(text), roles(3))
				here := w
				return providertest.Setup{
					Config: w.config(), Tool: w.tool(), Agent: agent, Now: w.clock.Now,
					Public: []string{awsscope.FieldAccessKeyID, awsscope.FieldExpiration},
					Until: func(t time.Time) {
						here.clock.Set(t)
						here.clock.Advance(time.Millisecond)
					},
					DiesLate: true, // AWS reads its clock in whole seconds
					Works: func(_ providers.MintRequest, secret broker.Secret) bool {
						key, _ := secret.Reveal(awsscope.FieldAccessKeyID)
						return here.fake.Works(key)
					},
				}
			}})
		})
	}
}
