package client_test

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/client"
)

// nobodyAPI is a Workload API that has no identity for whoever asks.
type nobodyAPI struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
}

func (nobodyAPI) FetchX509SVID(*workload.X509SVIDRequest, workload.SpiffeWorkloadAPI_FetchX509SVIDServer) error {
	return status.Error(codes.PermissionDenied, "no identity issued")
}

// silentAPI accepts and says nothing.
type silentAPI struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
}

func (silentAPI) FetchX509SVID(_ *workload.X509SVIDRequest, s workload.SpiffeWorkloadAPI_FetchX509SVIDServer) error {
	<-s.Context().Done()
	return nil
}

func serveAPI(t *testing.T, api workload.SpiffeWorkloadAPIServer) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "mf")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	ln, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer()
	workload.RegisterSpiffeWorkloadAPIServer(srv, api)
	done := make(chan struct{})
	go func() { defer close(done); srv.Serve(ln) }()
	t.Cleanup(func() { srv.Stop(); <-done })
	return "unix://" + ln.Addr().String()
}

// Whoever has no identity is told what to set or to look at.
func TestExplainsWhyThereIsNoIdentity(t *testing.T) {
	t.Setenv(client.EnvWorkload, "")
	dead := filepath.Join(t.TempDir(), "dead")
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: dead, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	ln.SetUnlinkOnClose(false)
	ln.Close()
	for name, tt := range map[string]struct {
		cfg        client.Config
		says, next string
	}{
		"nothing set":  {client.Config{}, "SPIFFE_ENDPOINT_SOCKET is not set", "MAYFLY_CERT"},
		"no address":   {client.Config{WorkloadAPI: "/run/socket"}, "no address of a Workload API", "unix:///"},
		"no socket":    {client.Config{WorkloadAPI: "unix:///nowhere/socket"}, "no such socket", "mayflyd dev"},
		"dead socket":  {client.Config{WorkloadAPI: "unix://" + dead}, "nothing listens there", "mayflyd dev"},
		"dead TCP":     {client.Config{WorkloadAPI: "tcp://127.0.0.1:1"}, "nothing listens there", "mayflyd dev"},
		"no identity":  {client.Config{WorkloadAPI: serveAPI(t, nobodyAPI{})}, "has no identity for this process", "spire-server entry create"},
		"silence":      {client.Config{WorkloadAPI: serveAPI(t, silentAPI{})}, "gave no SVID in time", "log"},
		"two files":    {client.Config{Files: client.Files{Cert: "a", Key: "b"}}, "needs a certificate, a key and a bundle", "MAYFLY_BUNDLE"},
		"absent files": {client.Config{Files: client.Files{Cert: "a", Key: "b", Bundle: "c"}}, "cannot be read", "mayfly svid"},
	} {
		t.Run(name, func(t *testing.T) {
			tt.cfg.IdentityTimeout = 200 * time.Millisecond
			_, err := client.New(t.Context(), tt.cfg)
			var unheard *client.ConnectionError
			if !errors.As(err, &unheard) || !errors.Is(err, client.ErrIdentity) {
				t.Fatalf("got %v", err)
			}
			if !strings.Contains(unheard.Message, tt.says) || !strings.Contains(unheard.Next, tt.next) {
				t.Errorf("it says %q, and then %q", unheard.Message, unheard.Next)
			}
		})
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := client.New(ctx, client.Config{WorkloadAPI: serveAPI(t, silentAPI{})}); !errors.Is(err, context.Canceled) {
		t.Errorf("a caller who gave up: %v", err)
	}
}

func TestConfigFromEnv(t *testing.T) {
	env := map[string]string{
		"MAYFLY_ADDR": "https://b:1", "MAYFLY_BROKER_ID": "spiffe://acme.test/b", "SPIFFE_ENDPOINT_SOCKET": "unix:///s",
		"MAYFLY_CERT": "c", "MAYFLY_KEY": "k", "MAYFLY_BUNDLE": "b",
	}
	c, err := client.ConfigFromEnv(func(n string) string { return env[n] })
	if err != nil || c.Addr != "https://b:1" || c.BrokerID.String() != "spiffe://acme.test/b" || c.WorkloadAPI != "unix:///s" || c.Files != (client.Files{Cert: "c", Key: "k", Bundle: "b"}) {
		t.Errorf("got %+v, %v", c, err)
	}
	env["MAYFLY_BROKER_ID"] = "https://nonsense"
	if _, err := client.ConfigFromEnv(func(n string) string { return env[n] }); broker.ReasonOf(err) != broker.ReasonInvalidArgument {
		t.Errorf("a broker's ID that is none gives %v", err)
	}
}
