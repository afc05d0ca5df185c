package spiffe_test

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/attestation/attestationtest"
	"github.com/mayfly-security/mayfly/attestation/devtrust"
	"github.com/mayfly-security/mayfly/attestation/spiffe"
)

var (
	home     = spiffeid.RequireTrustDomainFromString("dev.test")
	partner  = spiffeid.RequireTrustDomainFromString("partner.test")
	stranger = spiffeid.RequireTrustDomainFromString("stranger.test")
	brokerID = spiffeid.RequireFromPath(home, "/mayfly/broker")
)

func TestAttestor(t *testing.T)        { attestationtest.Attestor(t, open) }
func TestIdentitySource(t *testing.T)  { attestationtest.IdentitySource(t, open) }
func TestI10_Connections(t *testing.T) { attestationtest.Connections(t, open) }

// open is the suite's World on real Workload APIs.
func open(t *testing.T) attestationtest.World {
	t.Helper()
	own := serve(t, devtrust.Config{TrustDomain: home})
	federated := serve(t, devtrust.Config{TrustDomain: partner})
	strange := serve(t, devtrust.Config{TrustDomain: stranger})
	for _, other := range []*devtrust.Server{federated, strange} {
		if err := own.Federate(other.Bundle()); err != nil {
			t.Fatal(err)
		}
	}
	src := source(t, spiffe.Config{Addr: add(t, own), TrustDomains: []spiffeid.TrustDomain{partner}})
	return attestationtest.World{
		Attestor:  src,
		Identity:  src,
		Own:       own,
		Federated: federated,
		Stranger:  strange,
		Bundle:    func() *x509bundle.Bundle { return own.Bundle().X509Bundle() },
		Replace: func() {
			t.Helper()
			if err := own.RotateCA(); err != nil {
				t.Fatal(err)
			}
			if err := own.DropOldAuthorities(); err != nil {
				t.Fatal(err)
			}
			until(t, src, func() bool { return ownBundle(t, src).Equal(own.Bundle().X509Bundle()) })
		},
	}
}

func serve(t *testing.T, c devtrust.Config) *devtrust.Server {
	t.Helper()
	if c.Dir == "" {
		c.Dir = shortDir(t)
	}
	if c.SVIDTTL == 0 {
		c.SVIDTTL = 3 * time.Hour
	}
	s, err := devtrust.New(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// shortDir is a directory whose path a socket's has room for.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "mf")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Join(dir, "td")
}

// add serves the broker's identity and returns its Workload API's address.
func add(t *testing.T, s *devtrust.Server) string {
	t.Helper()
	addr, err := s.Add(devtrust.Identity{ID: brokerID, DNSNames: []string{"localhost"}})
	if err != nil {
		t.Fatal(err)
	}
	return addr
}

func source(t *testing.T, c spiffe.Config) *spiffe.Source {
	t.Helper()
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	src, err := spiffe.Open(bounded(t), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := src.Close(); err != nil {
			t.Error(err)
		}
	})
	return src
}

func bounded(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func ownBundle(t *testing.T, src *spiffe.Source) *x509bundle.Bundle {
	t.Helper()
	b, err := src.GetX509BundleForTrustDomain(home)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// until waits for updates of the source until done says so.
func until(t *testing.T, src *spiffe.Source, done func() bool) {
	t.Helper()
	ctx := bounded(t)
	for {
		updated := src.Updated()
		if done() {
			return
		}
		select {
		case <-updated:
		case <-ctx.Done():
			t.Fatal("waiting for an update took too long")
		}
	}
}
