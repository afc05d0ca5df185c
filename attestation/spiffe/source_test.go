package spiffe_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/mayfly-security/mayfly/attestation/devtrust"
	"github.com/mayfly-security/mayfly/attestation/spiffe"
	"github.com/mayfly-security/mayfly/broker"
)

// clock is a clock that tests set.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) set(now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = now
}

// own returns the leaf of the broker's SVID.
func own(t *testing.T, src *spiffe.Source) *x509.Certificate {
	t.Helper()
	svid, err := src.GetX509SVID()
	if err != nil {
		t.Fatal(err)
	}
	return svid.Certificates[0]
}

func asked(cert *x509.Certificate) *http.Request {
	return &http.Request{TLS: &tls.ConnectionState{PeerCertificates: []*x509.Certificate{cert}}}
}

func TestOpenRefuses(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	t.Setenv("SPIFFE_ENDPOINT_SOCKET", "")
	for name, c := range map[string]spiffe.Config{
		"no log":                      {Addr: "unix:///nowhere"},
		"no address":                  {Log: log},
		"no URI":                      {Log: log, Addr: "/run/spire.sock"},
		"a trust domain without name": {Log: log, Addr: "unix:///nowhere", TrustDomains: []spiffeid.TrustDomain{{}}},
	} {
		if src, err := spiffe.Open(bounded(t), c); err == nil {
			src.Close()
			t.Errorf("%s: no error", name)
		}
	}
}

// An operator who waits in vain is told what the Workload API said.
func TestOpenSaysWhatItWaitsFor(t *testing.T) {
	s := serve(t, devtrust.Config{TrustDomain: home})
	addr := add(t, s)
	for name, c := range map[string]struct {
		config spiffe.Config
		want   string
	}{
		"nobody there":     {spiffe.Config{Addr: "unix:///nowhere/api.sock"}, "no such file"},
		"another identity": {spiffe.Config{Addr: addr, ID: spiffeid.RequireFromPath(home, "/other")}, "no SVID of spiffe://dev.test/other"},
	} {
		var log bytes.Buffer
		said := make(chan struct{}, 10)
		c.config.Log = slog.New(slog.NewJSONHandler(&writer{to: &log, wrote: said}, nil))
		ctx, cancel := context.WithCancel(t.Context())
		go func() {
			<-said // Open has heard something
			cancel()
		}()
		_, err := spiffe.Open(ctx, c.config)
		if !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
		cancel()
	}
}

// writer tells of every write.
type writer struct {
	to    *bytes.Buffer
	wrote chan struct{}
}

func (w *writer) Write(b []byte) (int, error) {
	n, err := w.to.Write(b)
	select {
	case w.wrote <- struct{}{}:
	default:
	}
	return n, err
}

func TestAddressFromEnvironment(t *testing.T) {
	s := serve(t, devtrust.Config{TrustDomain: home})
	t.Setenv("SPIFFE_ENDPOINT_SOCKET", add(t, s))
	if id := source(t, spiffe.Config{}).ID(); id != brokerID {
		t.Errorf("we are %s", id)
	}
}

// While the Workload API is away we go on until our own SVID is over; when it
// is back, even with another authority, so are we.
func TestWorkloadAPIAway(t *testing.T) {
	t.Parallel()
	dir := shortDir(t)
	s := serve(t, devtrust.Config{TrustDomain: home, Dir: dir})
	now := &clock{now: time.Now()}
	src := source(t, spiffe.Config{Addr: add(t, s), Now: now.Now})
	before := own(t, src)
	long, err := s.Issue(&x509.Certificate{URIs: before.URIs, NotAfter: before.NotAfter.Add(time.Hour)}, before.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	s.Close()

	now.set(before.NotAfter)
	if err := src.Ready(t.Context()); err != nil {
		t.Errorf("not ready while the SVID is valid: %v", err)
	}
	if _, err := src.Attest(asked(long), now.Now()); err != nil {
		t.Errorf("refused while the broker's SVID is valid: %v", err)
	}
	now.set(before.NotAfter.Add(time.Second))
	if err := src.Ready(t.Context()); err == nil || !strings.Contains(err.Error(), "expired") {
		t.Errorf("ready with an expired SVID: %v", err)
	}
	if _, err := src.Attest(asked(long), now.Now()); broker.ReasonOf(err) != broker.ReasonUntrusted || !strings.Contains(err.Error(), "no current bundle") {
		t.Errorf("attested by a stale bundle: %v", err)
	}
	now.set(before.NotBefore.Add(-time.Second))
	if err := src.Ready(t.Context()); err == nil {
		t.Error("ready before the SVID is valid")
	}

	now.set(time.Now())
	again := serve(t, devtrust.Config{TrustDomain: home, Dir: dir})
	add(t, again)
	until(t, src, func() bool { return !own(t, src).Equal(before) })
	if err := src.Ready(t.Context()); err != nil {
		t.Errorf("not ready with the Workload API back: %v", err)
	}
	if _, err := src.Attest(asked(long), now.Now()); broker.ReasonOf(err) != broker.ReasonUntrusted {
		t.Errorf("an SVID of the authority that is gone: %v", err)
	}
	if _, err := src.Attest(asked(own(t, src)), now.Now()); err != nil {
		t.Errorf("an SVID of the present authority: %v", err)
	}
}

// grumpy is a Workload API that answers with errors before it answers well.
type grumpy struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
	errors []codes.Code
	answer *workload.X509SVIDResponse
	asked  atomic.Int32
}

func (g *grumpy) FetchX509SVID(_ *workload.X509SVIDRequest, stream grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
	if n := int(g.asked.Add(1)); n <= len(g.errors) {
		return status.Error(g.errors[n-1], "go away")
	}
	if err := stream.Send(g.answer); err != nil {
		return err
	}
	<-stream.Context().Done()
	return nil
}

// go-spiffe's watch ends for good at Canceled and InvalidArgument. A Workload
// API that restarts may say either, and a broker must not live on with the
// bundles of that moment until somebody restarts it.
func TestWatchNeverGivesUp(t *testing.T) {
	t.Parallel()
	s := serve(t, devtrust.Config{TrustDomain: home})
	svid, err := workloadapi.FetchX509SVID(bounded(t), workloadapi.WithAddr(add(t, s)))
	if err != nil {
		t.Fatal(err)
	}
	cert, key, err := svid.MarshalRaw()
	if err != nil {
		t.Fatal(err)
	}
	g := &grumpy{
		errors: []codes.Code{codes.Canceled, codes.InvalidArgument, codes.PermissionDenied},
		answer: &workload.X509SVIDResponse{Svids: []*workload.X509SVID{{
			SpiffeId: svid.ID.String(), X509Svid: cert, X509SvidKey: key, Bundle: s.Bundle().X509Authorities()[0].Raw,
		}}},
	}
	l, err := net.Listen("unix", shortDir(t)+".sock")
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	workload.RegisterSpiffeWorkloadAPIServer(server, g)
	var serving sync.WaitGroup
	serving.Go(func() { server.Serve(l) })
	t.Cleanup(func() { server.Stop(); serving.Wait() })
	if src := source(t, spiffe.Config{Addr: "unix://" + l.Addr().String()}); src.ID() != brokerID {
		t.Errorf("we are %s", src.ID())
	}
}

// Federation needs both: our configuration, and a bundle from the Workload API.
func TestFederationNeedsTheBundle(t *testing.T) {
	s := serve(t, devtrust.Config{TrustDomain: home})
	other := serve(t, devtrust.Config{TrustDomain: partner})
	src := source(t, spiffe.Config{Addr: add(t, s), TrustDomains: []spiffeid.TrustDomain{partner}})
	id := spiffeid.RequireFromPath(partner, "/agent")
	theirs, err := other.Issue(&x509.Certificate{URIs: []*url.URL{id.URL()}}, own(t, src).PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := src.Attest(asked(theirs), time.Now()); broker.ReasonOf(err) != broker.ReasonTrustDomain {
		t.Errorf("without a bundle: %v", err)
	}
	if err := s.Federate(other.Bundle()); err != nil {
		t.Fatal(err)
	}
	until(t, src, func() bool { _, err := src.GetX509BundleForTrustDomain(partner); return err == nil })
	if caller, err := src.Attest(asked(theirs), time.Now()); err != nil || caller.ID != id {
		t.Errorf("with the bundle: %v, %v", caller.ID, err)
	}
	s.Unfederate(partner)
	until(t, src, func() bool { _, err := src.GetX509BundleForTrustDomain(partner); return err != nil })
	if _, err := src.Attest(asked(theirs), time.Now()); broker.ReasonOf(err) != broker.ReasonTrustDomain {
		t.Errorf("with the bundle gone: %v", err)
	}
}

// When our identity is taken away at the Workload API, what was taken out of the
// bundles is distrusted all the same, and we never become somebody else.
func TestIdentityTakenAway(t *testing.T) {
	t.Parallel()
	s := serve(t, devtrust.Config{TrustDomain: home})
	addr, err := s.Add(devtrust.Identity{ID: brokerID, Name: "broker"})
	if err != nil {
		t.Fatal(err)
	}
	now := &clock{now: time.Now()}
	src := source(t, spiffe.Config{Addr: addr, Now: now.Now})
	before := own(t, src)
	s.Remove(brokerID)
	if err := errors.Join(s.RotateCA(), s.DropOldAuthorities()); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Add(devtrust.Identity{ID: spiffeid.RequireFromPath(home, "/other"), Name: "broker"}); err != nil {
		t.Fatal(err)
	}
	until(t, src, func() bool { return ownBundle(t, src).Equal(s.Bundle().X509Bundle()) })
	if !own(t, src).Equal(before) || src.ID() != brokerID {
		t.Errorf("we became %s", src.ID())
	}
	if _, err := src.Attest(asked(before), now.Now()); broker.ReasonOf(err) != broker.ReasonUntrusted {
		t.Errorf("an SVID of the authority that is gone: %v", err)
	}
	now.set(before.NotAfter.Add(time.Second))
	if err := src.Ready(t.Context()); err == nil || !strings.Contains(err.Error(), "no SVID of "+brokerID.String()) {
		t.Errorf("Ready says %v", err)
	}
}

func TestClose(t *testing.T) {
	s := serve(t, devtrust.Config{TrustDomain: home})
	src := source(t, spiffe.Config{Addr: add(t, s)})
	for range 2 {
		if err := src.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if err := src.Ready(t.Context()); err == nil {
		t.Error("ready after Close")
	}
	if _, err := src.Attest(asked(own(t, src)), time.Now()); broker.ReasonOf(err) != broker.ReasonShuttingDown {
		t.Errorf("attested after Close: %v", err)
	}
}

func TestServerTLS(t *testing.T) {
	s := serve(t, devtrust.Config{TrustDomain: home})
	c := source(t, spiffe.Config{Addr: add(t, s)}).ServerTLS()
	if c.MinVersion != tls.VersionTLS13 || c.ClientAuth != tls.RequestClientCert || !c.SessionTicketsDisabled || c.VerifyPeerCertificate != nil {
		t.Errorf("the configuration is %+v", c)
	}
}

// The log tells of the Workload API and holds no key and no certificate.
func TestLogIsPlain(t *testing.T) {
	s := serve(t, devtrust.Config{TrustDomain: home})
	var log bytes.Buffer
	src := source(t, spiffe.Config{Addr: add(t, s), Log: slog.New(slog.NewJSONHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))})
	before := own(t, src)
	if err := s.RotateSVIDs(); err != nil {
		t.Fatal(err)
	}
	until(t, src, func() bool { return !own(t, src).Equal(before) })
	src.Close() // joins who writes the log
	lines := 0
	for line := range strings.Lines(log.String()) {
		var entry map[string]any
		if err := json.Unmarshal([]byte(line), &entry); err != nil {
			t.Errorf("no JSON: %q", line)
		}
		if len(line) > 500 {
			t.Errorf("a line of %d bytes: %.200s", len(line), line)
		}
		lines++
	}
	if lines < 2 {
		t.Errorf("the log has %d lines: %s", lines, log.String())
	}
}
