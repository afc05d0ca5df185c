// Package awssts is the driver "awssts": sessions of IAM roles, made with
// AssumeRole for one tool each.
//
// No API of AWS revokes one session. A lease's end is in the session itself: its
// session policy denies everything after that instant. What ends it earlier is
// an entry of a list, an inline policy of the role, that denies the session by
// its name. The list is rendered whole from the broker's store, and stands until
// the session has died by itself; see package denylist. A writer (writer.go)
// writes the list of one role: what must be in it (must.go), how that gets there
// (write.go), what others put there (see.go, keep.go, reconcile.go), whether it is
// in force (probe.go), and what is said of an ending by then (progress.go).
package awssts

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
	"github.com/mayfly-security/mayfly/providers/awssts/awsscope"
)

// Driver opens AWS accounts, and servers that speak STS. One Driver serves one
// broker: what it knows of deny lists is shared by all that it opens, so that
// each role has one writer, also while a catalog is exchanged.
type Driver struct {
	login   attestation.LoginSource
	writers *writers
}

// New makes a Driver. login is what the broker logs in with; nil is enough for
// validating configuration, and for credentials that need no login.
func New(login attestation.LoginSource) *Driver {
	return &Driver{login: login, writers: newWriters()}
}

var (
	_ providers.Driver  = (*Driver)(nil)
	_ providers.Meaning = (*Driver)(nil)
	_ providers.Warner  = (*Driver)(nil)
)

// ValidateConfig implements providers.Driver.
func (*Driver) ValidateConfig(raw json.RawMessage) error {
	_, err := awsscope.ParseConfig(raw)
	return err
}

// Meaning implements providers.Meaning.
func (*Driver) Meaning(raw json.RawMessage) (json.RawMessage, error) {
	c, err := awsscope.ParseConfig(raw)
	if err != nil {
		return nil, err
	}
	return c.Meaning(), nil
}

// ValidateScope implements providers.Driver.
func (*Driver) ValidateScope(raw json.RawMessage, tool broker.Tool) (providers.ScopeInfo, error) {
	c, err := awsscope.ParseConfig(raw)
	if err != nil {
		return providers.ScopeInfo{}, err
	}
	s, err := awsscope.ParseScope(c, tool)
	if err != nil {
		return providers.ScopeInfo{}, err
	}
	return s.Info(c), nil
}

// Warnings implements providers.Warner.
func (*Driver) Warnings(raw json.RawMessage, tool broker.Tool) []providers.Finding {
	c, err := awsscope.ParseConfig(raw)
	if err != nil {
		return nil
	}
	s, err := awsscope.ParseScope(c, tool)
	if err != nil {
		return nil
	}
	return s.Warnings(c)
}

// Open implements providers.Driver. It asks AWS for nothing: an account that
// cannot be reached keeps no broker from starting.
func (d *Driver) Open(ctx context.Context, config providers.Config) (providers.Provider, error) {
	c, err := awsscope.ParseConfig(config.Raw)
	if err != nil {
		return nil, err
	}
	switch {
	case config.Log == nil || config.Now == nil:
		return nil, errors.New("opening AWS: a log and a clock are needed")
	case c.Early.Mode == awsscope.EarlyDenyList && config.Known == nil:
		return nil, errors.New("opening AWS: a deny list is rendered from the store, and there is nothing to ask")
	case config.Installation == "":
		return nil, errors.New("opening AWS: an installation is needed")
	}
	p := &provider{
		name: config.Name, installation: config.Installation, config: c,
		known: config.Known, cuts: config.Cuts, now: config.Now, log: config.Log, writers: d.writers,
	}
	if p.clients, err = openClients(ctx, c, d.login); err != nil {
		return nil, fmt.Errorf("opening AWS: %w", err)
	}
	if c.Early.Mode == awsscope.EarlyDenyList {
		if err := p.seed(ctx); err != nil {
			return nil, fmt.Errorf("opening AWS: %w", err)
		}
		run, cancel := context.WithCancel(context.WithoutCancel(ctx))
		p.stop = cancel
		p.running.Go(func() { p.reconcileForEver(run) })
	}
	return p, nil
}

// provider is one AWS account, or one server that speaks STS.
type provider struct {
	name         string
	installation broker.InstallationID
	config       awsscope.Config
	clients      *clients
	known        func(ctx context.Context, begun bool) ([]providers.Known, error)
	cuts         func(context.Context) ([]providers.Cut, error)
	now          func() time.Time
	log          *slog.Logger
	writers      *writers

	stop    context.CancelFunc // nil if nothing runs
	running sync.WaitGroup
}

var (
	_ providers.Provider = (*provider)(nil)
	_ providers.Planner  = (*provider)(nil)
	_ providers.CutOff   = (*provider)(nil)
)

const (
	mintLimit   = 30 * time.Second // for the login and AssumeRole
	revokeLimit = 60 * time.Second
	// lateBound is how long after we gave up waiting AWS may still make a
	// session. Nobody is given its keys.
	lateBound = 30 * time.Second
)

// Traits implements providers.Provider.
func (p *provider) Traits() providers.Traits {
	return providers.Traits{
		Stands:      p.config.Early.Mode == awsscope.EarlyDenyList,
		MintTimeout: mintLimit, LateBound: lateBound, RevokeTimeout: revokeLimit,
		Batch: 256, Concurrency: 4,
	}
}

// Close implements providers.Provider.
func (p *provider) Close() error {
	if p.stop != nil {
		p.stop()
	}
	p.running.Wait()
	p.clients.Close()
	return nil
}
