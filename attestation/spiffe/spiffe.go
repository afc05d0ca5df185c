// Package spiffe attests callers by their X.509-SVIDs and gives the broker its
// own, both by way of a SPIFFE Workload API.
//
// A Source is an attestation.IdentitySource and an attestation.Attestor. It
// judges the caller's certificate anew for every request, against the bundle
// as it is at that instant. The TLS layer does no more than prove that the
// caller holds the certificate's key: go-spiffe's MTLSServerConfig authorizes
// in VerifyPeerCertificate, which Go calls once a connection and skips for a
// resumed session.
package spiffe

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	grpcbackoff "google.golang.org/grpc/backoff"

	"github.com/mayfly-security/mayfly/attestation"
)

var (
	_ attestation.IdentitySource = (*Source)(nil)
	_ attestation.Attestor       = (*Source)(nil)
	_ x509svid.Source            = (*Source)(nil)
	_ x509bundle.Source          = (*Source)(nil)
)

// Config says where the broker's identity comes from and whose callers it accepts.
type Config struct {
	// Addr is the address of the Workload API, "unix:///…" or "tcp://IP:port".
	// Empty means the environment variable SPIFFE_ENDPOINT_SOCKET.
	Addr string
	// ID is which of our identities to be, where the Workload API gives more
	// than one. Zero means the first.
	ID spiffeid.ID
	// TrustDomains are those whose callers are accepted besides our own trust
	// domain's. The Workload API must federate their bundles, too.
	TrustDomains []spiffeid.TrustDomain
	// Log is where the comings and goings of the Workload API are told. Required.
	Log *slog.Logger
	// Now is the clock that Ready goes by. Nil means time.Now.
	Now func() time.Time
}

// Source is the broker's identity and the bundles that callers are judged by,
// kept fresh through the Workload API. Its methods may be called from many
// goroutines.
//
// While the Workload API is away, a Source goes on with what it has until the
// broker's own SVID expires. From then on its bundles are stale, too: it is not
// Ready, and Attest refuses everybody.
type Source struct {
	id       spiffeid.ID
	accepted map[spiffeid.TrustDomain]bool
	log      *slog.Logger
	now      func() time.Time
	client   *workloadapi.Client
	cancel   context.CancelFunc
	done     chan struct{} // closed when the watch has ended
	closing  sync.Once
	closeErr error

	mu      sync.RWMutex
	closed  bool
	current view
	updated chan struct{} // closed, and replaced, with every update
	failure error         // of the watch since the last update; nil while it works
}

// view is one answer of the Workload API.
type view struct {
	svid    *x509svid.SVID
	bundles *x509bundle.Set
}

// Open connects to the Workload API and returns when the first SVID is there.
// If ctx ends before that, the error says what the Workload API answered last.
func Open(ctx context.Context, c Config) (*Source, error) {
	if c.Log == nil {
		return nil, errors.New("opening the SPIFFE source: no log is given")
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Addr == "" {
		c.Addr = os.Getenv(workloadapi.SocketEnv)
	}
	if c.Addr == "" {
		return nil, fmt.Errorf("opening the SPIFFE source: no Workload API is known; configure its address or set %s", workloadapi.SocketEnv)
	}
	s := &Source{
		id:       c.ID,
		accepted: make(map[spiffeid.TrustDomain]bool),
		log:      c.Log.With("workload_api", c.Addr),
		now:      c.Now,
		done:     make(chan struct{}),
		updated:  make(chan struct{}),
	}
	for _, td := range c.TrustDomains {
		if td.IsZero() {
			return nil, errors.New("opening the SPIFFE source: an accepted trust domain has no name")
		}
		s.accepted[td] = true
	}
	client, err := workloadapi.New(ctx,
		workloadapi.WithAddr(c.Addr),
		workloadapi.WithBackoffStrategy(retries{}),
		// gRPC's own pauses between attempts to connect grow to two minutes.
		workloadapi.WithDialOptions(grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           grpcbackoff.Config{BaseDelay: firstRetry, Multiplier: 1.6, Jitter: 0.2, MaxDelay: lastRetry},
			MinConnectTimeout: lastRetry,
		})),
	)
	if err != nil {
		return nil, fmt.Errorf("connecting to the Workload API at %s: %w", c.Addr, err)
	}
	s.client = client
	watching, cancel := context.WithCancel(context.WithoutCancel(ctx))
	s.cancel = cancel
	first := s.Updated()
	go s.watch(watching)
	select {
	case <-first:
		return s, nil
	case <-ctx.Done():
		s.mu.RLock()
		failure := s.failure
		s.mu.RUnlock()
		if failure == nil {
			failure = errors.New("it has not answered yet")
		}
		return nil, errors.Join(fmt.Errorf("waiting for an SVID from the Workload API at %s: %w: %w", c.Addr, ctx.Err(), failure), s.Close())
	}
}

// ID implements attestation.IdentitySource.
func (s *Source) ID() spiffeid.ID {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.id
}

// ServerTLS implements attestation.IdentitySource. Every handshake takes the
// SVID of that instant, so the configuration outlives rotations. A client
// without any certificate gets as far as Attest, which tells it what is
// missing; so does every other whose certificate is not good.
func (s *Source) ServerTLS() *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		ClientAuth:             tls.RequestClientCert,
		GetCertificate:         tlsconfig.GetCertificate(s),
		SessionTicketsDisabled: true,
		NextProtos:             []string{"h2", "http/1.1"},
	}
}

// Ready implements attestation.IdentitySource. That the Workload API has been
// away for too long is the same as that the SVID has expired: a Workload API
// that works replaces it long before.
func (s *Source) Ready(context.Context) error {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.closed {
		return errors.New("the SPIFFE source is closed")
	}
	leaf, now := s.current.svid.Certificates[0], s.now()
	switch {
	case now.After(leaf.NotAfter) && s.failure != nil:
		return fmt.Errorf("the broker's SVID expired at %s and the Workload API gives no other: %w", stamp(leaf.NotAfter), s.failure)
	case now.After(leaf.NotAfter):
		return fmt.Errorf("the broker's SVID expired at %s and the Workload API gives no other", stamp(leaf.NotAfter))
	case now.Before(leaf.NotBefore):
		return fmt.Errorf("the broker's SVID is not valid before %s; compare the clocks", stamp(leaf.NotBefore))
	}
	return nil
}

// GetX509SVID implements x509svid.Source: the broker's SVID as it is now.
func (s *Source) GetX509SVID() (*x509svid.SVID, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.current.svid, nil
}

// GetX509BundleForTrustDomain implements x509bundle.Source: the present bundle
// of our own trust domain or of one of Config.TrustDomains, and of no other,
// whatever the Workload API gives.
func (s *Source) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if td != s.id.TrustDomain() && !s.accepted[td] {
		return nil, errNotAccepted
	}
	b, ok := s.current.bundles.Get(td)
	if !ok {
		return nil, errNoBundle
	}
	return b, nil
}

// Updated returns a channel that is closed when the next update of SVID or
// bundles has been taken.
func (s *Source) Updated() <-chan struct{} {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.updated
}

// Close ends the watch and the connection to the Workload API, and returns when
// both are gone. Attest refuses everybody afterwards. Close may be called more
// than once.
func (s *Source) Close() error {
	s.closing.Do(func() {
		s.mu.Lock()
		s.closed = true
		s.mu.Unlock()
		s.cancel()
		<-s.done
		if err := s.client.Close(); err != nil {
			s.closeErr = fmt.Errorf("closing the connection to the Workload API: %w", err)
		}
	})
	return s.closeErr
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }
