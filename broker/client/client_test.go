package client_test

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/mayfly-security/mayfly/attestation/devtrust"
	"github.com/mayfly-security/mayfly/broker"
	mayflyv1 "github.com/mayfly-security/mayfly/broker/api/mayfly/v1"
	"github.com/mayfly-security/mayfly/broker/client"
	"github.com/mayfly-security/mayfly/broker/client/clienttest"
)

var (
	td      = spiffeid.RequireTrustDomainFromString("acme.test")
	agentID = spiffeid.RequireFromPath(td, "/agent/troubleshooter")
)

// world is a trust domain with a stand-in broker and an agent.
type world struct {
	*clienttest.Broker
	trust  *devtrust.Server
	addr   string
	socket string // the agent's Workload API
}

func newWorld(t *testing.T) *world {
	t.Helper()
	dir, err := os.MkdirTemp("", "mf") // t.TempDir may be too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	w := &world{Broker: &clienttest.Broker{
		WhoAmI: &mayflyv1.WhoAmIResponse{Id: agentID.String(), Roles: []string{"agent"}, BrokerId: "spiffe://acme.test/mayfly"},
		Tools: []*mayflyv1.Tool{{
			Name: "crm.read", Provider: "sts", MaxTtl: durationpb.New(15 * time.Minute), Env: map[string]string{"CRM_TOKEN": "access_token"},
			Parameters: []*mayflyv1.Parameter{{Name: "customer", Type: "string", Pattern: "^c-[0-9]+$"}},
		}},
		Secret: map[string]string{"access_token": "very-secret"},
	}}
	if w.trust, err = devtrust.New(devtrust.Config{TrustDomain: td, Dir: dir}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.trust.Close() })
	w.addr = w.serve(t, spiffeid.RequireFromPath(td, "/mayfly"))
	if w.socket, err = w.trust.Add(devtrust.Identity{ID: agentID}); err != nil {
		t.Fatal(err)
	}
	return w
}

// serve starts the stand-in as somebody of the trust domain.
func (w *world) serve(t *testing.T, id spiffeid.ID) string {
	t.Helper()
	socket, err := w.trust.Add(devtrust.Identity{ID: id})
	if err != nil {
		t.Fatal(err)
	}
	source := source(t, socket)
	addr, stop, err := w.Start(tlsconfig.MTLSServerConfig(source, source, tlsconfig.AuthorizeMemberOf(td)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stop)
	return addr
}

func source(t *testing.T, socket string) *workloadapi.X509Source {
	t.Helper()
	s, err := workloadapi.NewX509Source(t.Context(), workloadapi.WithClientOptions(workloadapi.WithAddr(socket)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// client is the agent's; change adapts its configuration.
func (w *world) client(t *testing.T, change ...func(*client.Config)) *client.Client {
	t.Helper()
	cfg := client.Config{Addr: w.addr, WorkloadAPI: w.socket}
	for _, c := range change {
		c(&cfg)
	}
	c, err := client.New(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func TestGet(t *testing.T) {
	w := newWorld(t)
	c := w.client(t)
	cred, err := c.Get(t.Context(), client.GetRequest{
		Tool: "crm.read", Params: map[string]string{"customer": "c-17"}, TTL: 2 * time.Minute, Reason: "why",
	})
	if err != nil {
		t.Fatal(err)
	}
	l := cred.Lease
	if l.Agent != agentID || l.Tool != "crm.read" || l.Params["customer"] != "c-17" || l.State != broker.LeaseActive || l.End.Sub(l.CreatedAt) != 2*time.Minute || l.Reason != "why" {
		t.Errorf("lease is %+v", l)
	}
	if v, _ := cred.Secret.Reveal("access_token"); v != "very-secret" {
		t.Errorf("the secret is %q", v)
	}
	if s := fmt.Sprintf("%v %+v %#v", cred, cred, *cred); strings.Contains(s, "very-secret") {
		t.Errorf("printing a credential shows its secret: %s", s)
	}
	ended, err := c.Revoke(t.Context(), l.ID, "done")
	if err != nil || ended.State != broker.LeaseRevoked || ended.Cause != broker.CauseReturned || ended.EndedAt.IsZero() {
		t.Errorf("revoking gives %+v, %v", ended, err)
	}
	who, err := c.WhoAmI(t.Context())
	if err != nil || who.ID != agentID || who.Broker.Path() != "/mayfly" {
		t.Errorf("whoami gives %+v, %v", who, err)
	}
	tools, err := c.Tools(t.Context())
	if err != nil || len(tools) != 1 || tools[0].MaxTTL != 15*time.Minute || tools[0].Params[0].Check("c-17") != nil || tools[0].Params[0].Check("x") == nil {
		t.Errorf("tools gives %+v, %v", tools, err)
	}
}

// A lost answer must not cost a second credential, nor the caller its only one.
func TestLostAnswerMintsOnce(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.Drop = func(procedure string, n int) bool { return procedure == "IssueLease" && n <= 2 }
	cred, err := w.client(t).Get(t.Context(), client.GetRequest{Tool: "crm.read"})
	if err != nil {
		t.Fatal(err)
	}
	if w.Calls("IssueLease") != 3 || w.Minted() != 1 {
		t.Errorf("%d calls made %d leases; 3 and 1 were expected", w.Calls("IssueLease"), w.Minted())
	}
	if _, ok := cred.Secret.Reveal("access_token"); !ok {
		t.Error("the secret is missing")
	}
	// Two calls are two credentials: the key is one call's.
	w.Drop = nil
	if _, err := w.client(t).Get(t.Context(), client.GetRequest{Tool: "crm.read"}); err != nil || w.Minted() != 2 {
		t.Errorf("a second call: %v, %d leases", err, w.Minted())
	}
	// A key of the caller's own is kept.
	for range 2 {
		if _, err := w.client(t).Get(t.Context(), client.GetRequest{Tool: "crm.read", Key: "mine"}); err != nil {
			t.Fatal(err)
		}
	}
	if w.Minted() != 3 {
		t.Errorf("one key made more than one lease: %d leases in all", w.Minted())
	}
}

func TestWhatIsTriedAgain(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		reason broker.Reason
		code   connect.Code
		again  bool
	}{
		{broker.ReasonShuttingDown, connect.CodeUnavailable, true},
		{broker.ReasonStore, connect.CodeUnavailable, true},
		{broker.ReasonProvider, connect.CodeUnavailable, false}, // the key's outcome stays
		{broker.ReasonClock, connect.CodeUnavailable, false},    // an operator must act
		{broker.ReasonNoGrant, connect.CodePermissionDenied, false},
		{broker.ReasonInternal, connect.CodeInternal, false},
		{broker.ReasonRateLimited, connect.CodeResourceExhausted, false},
	} {
		t.Run(string(tt.reason), func(t *testing.T) {
			w := newWorld(t)
			w.Refuse = func(_ string, n int) error {
				if n > 1 {
					return nil
				}
				return clienttest.Refusal(tt.code, tt.reason, "what happened", "what to do")
			}
			_, err := w.client(t).Get(t.Context(), client.GetRequest{Tool: "crm.read"})
			if tt.again {
				if err != nil || w.Calls("IssueLease") != 2 {
					t.Errorf("after %d calls: %v", w.Calls("IssueLease"), err)
				}
				return
			}
			var refusal *broker.Error
			if !errors.As(err, &refusal) || w.Calls("IssueLease") != 1 {
				t.Fatalf("after %d calls: %v", w.Calls("IssueLease"), err)
			}
			if broker.ReasonOf(err) != tt.reason || refusal.Message != "what happened" || refusal.Next != "what to do" || refusal.Correlation != "c0correlation" {
				t.Errorf("the refusal is %+v", refusal)
			}
		})
	}
}

func TestTriesAreBounded(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.Refuse = func(string, int) error {
		return clienttest.Refusal(connect.CodeUnavailable, broker.ReasonStore, "the store is full", "")
	}
	_, err := w.client(t).WhoAmI(t.Context())
	if broker.ReasonOf(err) != broker.ReasonStore || w.Calls("WhoAmI") != 6 {
		t.Errorf("after %d calls: %v", w.Calls("WhoAmI"), err)
	}
}

// Only the broker with the pinned ID is spoken to, also within the trust domain.
func TestPinsTheBroker(t *testing.T) {
	w := newWorld(t)
	impostor := w.serve(t, spiffeid.RequireFromPath(td, "/agent/impostor"))
	_, err := w.client(t, func(c *client.Config) { c.Addr = impostor }).WhoAmI(t.Context())
	if !errors.Is(err, client.ErrIdentity) {
		t.Fatalf("talking to an impostor gives %v", err)
	}
	for _, id := range []string{"spiffe://acme.test/mayfly", "spiffe://acme.test/agent/impostor"} {
		if !strings.Contains(err.Error(), id) {
			t.Errorf("%q does not name %s", err, id)
		}
	}
	if n := w.Calls("WhoAmI"); n != 0 {
		t.Errorf("the impostor got %d calls", n)
	}
	// The same one is fine for who pins it.
	pinned := w.client(t, func(c *client.Config) {
		c.Addr, c.BrokerID = impostor, spiffeid.RequireFromPath(td, "/agent/impostor")
	})
	if _, err := pinned.WhoAmI(t.Context()); err != nil {
		t.Error(err)
	}
}

// Somebody with another authority who says to be the broker is not believed.
func TestRefusesAForeignAuthority(t *testing.T) {
	w, other := newWorld(t), newWorld(t)
	_, err := w.client(t, func(c *client.Config) { c.Addr = other.addr }).WhoAmI(t.Context())
	if !errors.Is(err, client.ErrIdentity) || !strings.Contains(err.Error(), "cannot prove it") || other.Calls("WhoAmI") != 0 {
		t.Errorf("after %d calls: %v", other.Calls("WhoAmI"), err)
	}
	foreign := w.client(t, func(c *client.Config) {
		c.BrokerID = spiffeid.RequireFromString("spiffe://elsewhere.test/mayfly")
	})
	if _, err := foreign.WhoAmI(t.Context()); !errors.Is(err, client.ErrIdentity) || !strings.Contains(err.Error(), "gives no bundle") {
		t.Errorf("a broker of a trust domain that we do not know: %v", err)
	}
}

// A client that lives longer than its SVID shows the new one.
func TestShowsTheNewSVID(t *testing.T) {
	w := newWorld(t)
	s := source(t, w.socket)
	c := w.client(t, func(cfg *client.Config) { cfg.Source = s })
	call := func() {
		t.Helper()
		if _, err := c.WhoAmI(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	call()
	call()
	before, err := s.GetX509SVID()
	if err != nil {
		t.Fatal(err)
	}
	if err := w.trust.RotateSVIDs(); err != nil {
		t.Fatal(err)
	}
	for now := before; now == before; {
		if err := s.WaitUntilUpdated(t.Context()); err != nil {
			t.Fatal(err)
		}
		if now, err = s.GetX509SVID(); err != nil {
			t.Fatal(err)
		}
	}
	call()
	now, err := s.GetX509SVID()
	if err != nil {
		t.Fatal(err)
	}
	old, renewed := serial(before.Certificates[0]), serial(now.Certificates[0])
	peers, resumed := w.Peers()
	if want := []string{old, old, renewed}; old == renewed || fmt.Sprint(peers) != fmt.Sprint(want) || resumed {
		t.Errorf("calls came with %v, resumed %v; %v was expected", peers, resumed, want)
	}
	// A source that was given stays open.
	c.Close()
	if _, err := s.GetX509SVID(); err != nil {
		t.Errorf("the caller's source was closed: %v", err)
	}
}

func serial(c *x509.Certificate) string { return c.SerialNumber.Text(16) }

// An authority that leaves the bundle takes the broker's credit with it, on
// the next call, though the connection stands.
func TestForgetsAnAuthority(t *testing.T) {
	w := newWorld(t)
	files := w.writeFiles(t)
	c := w.client(t, func(cfg *client.Config) { cfg.Files = files })
	if _, err := c.WhoAmI(t.Context()); err != nil {
		t.Fatal(err)
	}
	other := newWorld(t).trust.Bundle().X509Bundle()
	pem, err := other.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	replace(t, files.Bundle, pem)
	if _, err := c.WhoAmI(t.Context()); !errors.Is(err, client.ErrIdentity) {
		t.Errorf("the broker's authority is gone, and a call gives %v", err)
	}
	// Files that do not fit together change nothing.
	replace(t, files.Cert, []byte("half of a certif"))
	if _, err := c.WhoAmI(t.Context()); !errors.Is(err, client.ErrIdentity) {
		t.Errorf("with half a file: %v", err)
	}
}

// oneSVID is a source that keeps its SVID and exchanges its bundle.
type oneSVID struct {
	*x509svid.SVID
	bundle atomic.Pointer[x509bundle.Bundle]
}

func (s *oneSVID) GetX509BundleForTrustDomain(spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	return s.bundle.Load(), nil
}
func (s *oneSVID) Close() error { return nil }

func TestANewBundleMeansNewConnections(t *testing.T) {
	w := newWorld(t)
	svid, err := source(t, w.socket).GetX509SVID()
	if err != nil {
		t.Fatal(err)
	}
	s := &oneSVID{SVID: svid}
	s.bundle.Store(w.trust.Bundle().X509Bundle())
	c := w.client(t, func(cfg *client.Config) { cfg.Source = s })
	if _, err := c.WhoAmI(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.bundle.Store(newWorld(t).trust.Bundle().X509Bundle())
	if _, err := c.WhoAmI(t.Context()); !errors.Is(err, client.ErrIdentity) {
		t.Errorf("the broker's authority is gone, and a call gives %v", err)
	}
}

// writeFiles writes the agent's identity as PEM files.
func (w *world) writeFiles(t *testing.T) client.Files {
	t.Helper()
	dir := t.TempDir()
	f := client.Files{Cert: filepath.Join(dir, "svid.pem"), Key: filepath.Join(dir, "key.pem"), Bundle: filepath.Join(dir, "bundle.pem")}
	svid, err := source(t, w.socket).GetX509SVID()
	if err != nil {
		t.Fatal(err)
	}
	cert, key, err := svid.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	bundle, err := w.trust.Bundle().X509Bundle().Marshal()
	if err != nil {
		t.Fatal(err)
	}
	replace(t, f.Cert, cert)
	replace(t, f.Key, key)
	replace(t, f.Bundle, bundle)
	return f
}

func replace(t *testing.T, path string, data []byte) {
	t.Helper()
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

// deafAddr is an address at which nobody listens, and nobody else will: its
// port is taken.
func deafAddr(t *testing.T) string {
	t.Helper()
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Close(fd) })
	if err := syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	at, err := syscall.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("127.0.0.1:%d", at.(*syscall.SockaddrInet4).Port)
}

// With nobody there, the error says what to look at.
func TestExplainsWhyNobodyAnswers(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	nobody := "https://" + deafAddr(t)
	plain := httptest.NewServer(http.NotFoundHandler())
	t.Cleanup(plain.Close)

	for name, tt := range map[string]struct {
		addr, says, next string
	}{
		"nobody":    {nobody, "nothing listens there", "MAYFLY_ADDR"},
		"not TLS":   {strings.Replace(plain.URL, "http:", "https:", 1), "does not speak TLS", "https"},
		"no host":   {"https://nowhere.invalid:8443", "has no address", "MAYFLY_ADDR"},
		"not there": {w.addr + "/elsewhere", "does not answer as Mayfly does", "proxy"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := w.client(t, func(c *client.Config) { c.Addr, c.Timeout = tt.addr, 2*time.Second }).WhoAmI(t.Context())
			var unheard *client.ConnectionError
			if !errors.As(err, &unheard) || !errors.Is(err, client.ErrUnreachable) {
				t.Fatalf("got %v", err)
			}
			if !strings.Contains(unheard.Message, tt.says) || !strings.Contains(unheard.Next, tt.next) {
				t.Errorf("it says %q, and then %q", unheard.Message, unheard.Next)
			}
		})
	}
	for _, addr := range []string{"http://localhost:1", "localhost:8443", "https://", "https://u:p@h", ":"} {
		_, err := client.New(t.Context(), client.Config{Addr: addr, WorkloadAPI: w.socket})
		if broker.ReasonOf(err) != broker.ReasonInvalidArgument {
			t.Errorf("the address %q gives %v", addr, err)
		}
	}
}

func TestTimeLimits(t *testing.T) {
	w := newWorld(t)
	w.Hold = func(ctx context.Context, _ string) { <-ctx.Done() }
	began := time.Now()
	_, err := w.client(t, func(c *client.Config) { c.Timeout = 50 * time.Millisecond }).WhoAmI(t.Context())
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("a limit of 50ms took %v", took)
	}
	if !errors.Is(err, client.ErrUnreachable) || !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "did not answer in time") {
		t.Errorf("a broker that does not answer: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	entered := make(chan struct{})
	w.Lock()
	w.Hold = func(ctx context.Context, _ string) { close(entered); <-ctx.Done() }
	w.Unlock()
	go func() { <-entered; cancel() }()
	if _, err := w.client(t).WhoAmI(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("a caller who gave up: %v", err)
	}
	if n := w.Calls("WhoAmI"); n != 2 {
		t.Errorf("%d calls were made; 2 were expected", n)
	}
}
