//go:build unix

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/mayfly-security/mayfly/attestation/devtrust"
	"github.com/mayfly-security/mayfly/broker/client"
)

var trustDomain = spiffeid.RequireTrustDomainFromString("torture.test")

// agents is how many agents there are; clients share them.
const agents = 6

func agentID(i int) spiffeid.ID {
	return spiffeid.RequireFromPathf(trustDomain, "/agent/a%d", i%agents)
}

var (
	botID      = spiffeid.RequireFromPath(trustDomain, "/bot/pager")
	operatorID = spiffeid.RequireFromPath(trustDomain, "/operator/sam")
	brokerID   = spiffeid.RequireFromPath(trustDomain, "/mayfly")
)

// people are a trust domain with everybody who takes part.
type people struct {
	trust   *devtrust.Server
	dir     string
	sockets map[spiffeid.ID]string
	sources map[spiffeid.ID]client.Source
}

// newPeople starts the trust domain. Its sockets are in a short path of their own.
func newPeople(ctx context.Context) (_ *people, err error) {
	dir, err := os.MkdirTemp("", "mft")
	if err != nil {
		return nil, err
	}
	p := &people{dir: dir, sockets: map[spiffeid.ID]string{}, sources: map[spiffeid.ID]client.Source{}}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.close())
		}
	}()
	p.trust, err = devtrust.New(devtrust.Config{TrustDomain: trustDomain, Dir: filepath.Join(dir, "td"), SVIDTTL: 4 * time.Hour})
	if err != nil {
		return nil, err
	}
	ids := []spiffeid.ID{brokerID, botID, operatorID}
	for i := range agents {
		ids = append(ids, agentID(i))
	}
	for _, id := range ids {
		if p.sockets[id], err = p.trust.Add(devtrust.Identity{ID: id}); err != nil {
			return nil, err
		}
		if id == brokerID {
			continue
		}
		source, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr(p.sockets[id])))
		if err != nil {
			return nil, fmt.Errorf("getting the SVID of %s: %w", id, err)
		}
		p.sources[id] = source
	}
	return p, nil
}

// client makes a client of the broker with connections of its own.
func (p *people) client(ctx context.Context, id spiffeid.ID, addr string) (*client.Client, error) {
	return client.New(ctx, client.Config{Addr: addr, BrokerID: brokerID, Source: p.sources[id], Timeout: 20 * time.Second})
}

func (p *people) close() error {
	var errs []error
	for _, s := range p.sources {
		errs = append(errs, s.Close())
	}
	if p.trust != nil {
		errs = append(errs, p.trust.Close())
	}
	return errors.Join(append(errs, os.RemoveAll(p.dir))...)
}
