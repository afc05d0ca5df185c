//go:build unix

// Package trial is what measurements and trials at real servers are made with:
// the world of the sample catalog with Vault, a broker that serves it in a
// process of its own, and clients.
package trial

import (
	"context"
	"errors"
	"os"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/mayfly-security/mayfly/broker/client"
	"github.com/mayfly-security/mayfly/deploy/examples/story"
	"github.com/mayfly-security/mayfly/deploy/testbed/acme"
)

// Who takes part.
var (
	Broker   = spiffeid.RequireFromString("spiffe://acme.test/mayfly")
	Agent    = spiffeid.RequireFromString("spiffe://acme.test/agent/support")
	Bot      = spiffeid.RequireFromString("spiffe://acme.test/bot/pager")
	Operator = spiffeid.RequireFromString("spiffe://acme.test/operator/sam")
)

// Trial is servers, a broker and its clients.
type Trial struct {
	*story.Story
	World *acme.World

	sources []*workloadapi.X509Source
	clients []*client.Client
}

// Run opens a world with a broker, has do do something there, and clears up.
func Run(ctx context.Context, bin string, c acme.Config, do func(*Trial) error) error {
	return story.Tell(ctx, bin, func(s *story.Story) (err error) {
		t := &Trial{Story: s}
		defer func() { err = errors.Join(err, t.close()) }()
		if err := os.Chmod(s.Dir, 0o755); err != nil { // PostgreSQL runs as a user of its own
			return err
		}
		if t.World, err = acme.Open(ctx, s.Dir, c); err != nil {
			return err
		}
		if err := t.World.Serve(s); err != nil {
			return err
		}
		return do(t)
	})
}

// Clients makes n clients of the broker for one identity, each with a
// connection of its own.
func (t *Trial) Clients(id spiffeid.ID, n int) ([]*client.Client, error) {
	source, err := workloadapi.NewX509Source(t.Ctx, workloadapi.WithClientOptions(workloadapi.WithAddr(t.Socket(id.Path()[1:]))))
	if err != nil {
		return nil, err
	}
	t.sources = append(t.sources, source)
	first := len(t.clients)
	for range n {
		c, err := client.New(t.Ctx, client.Config{Addr: t.Addr, BrokerID: Broker, Source: source, Timeout: 2 * time.Minute})
		if err != nil {
			return nil, err
		}
		t.clients = append(t.clients, c)
	}
	return slices.Clone(t.clients[first:]), nil
}

func (t *Trial) close() error {
	var errs []error
	for _, c := range t.clients {
		errs = append(errs, c.Close())
	}
	for _, s := range t.sources {
		errs = append(errs, s.Close())
	}
	if t.World != nil {
		errs = append(errs, t.World.Close())
	}
	return errors.Join(errs...)
}
