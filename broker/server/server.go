// Package server is the broker's face to agents, bots and operators: the API
// over mutual TLS, token introspection for resource servers, and the plain
// listener for metrics and health. It authenticates every request by itself,
// asks the engine, and says what the engine said.
package server

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/net/netutil"

	"github.com/mayfly-security/mayfly/attestation"
	"github.com/mayfly-security/mayfly/broker/api/mayfly/v1/mayflyv1connect"
	"github.com/mayfly-security/mayfly/broker/lease"
)

// Config is what a Server is made of.
type Config struct {
	Engine   *lease.Engine              // required
	Attestor attestation.Attestor       // required
	Identity attestation.IdentitySource // required
	Log      *slog.Logger               // required
	Limits   Limits
	// People is the listener for people; nil means that there is none, and that
	// no agent can act on behalf of a user.
	People *People
}

// Limits bound what one listener takes. Zero fields have the defaults named.
type Limits struct {
	Body        int64         // bytes of a request's body; 64 KiB
	Policies    int64         // the same of a preview, which holds a whole policy set; 1 MiB
	Header      int           // bytes of a request's header; 16 KiB
	Connections int           // connections at once; 4,096
	Requests    int           // requests at once, over all connections; 1,024
	Streams     int           // requests at once on one HTTP/2 connection; 128
	Identity    int           // requests at once of one SPIFFE ID, so that no caller can take all; a quarter of Requests
	ReadTimeout time.Duration // for a whole request to arrive; 15 seconds
	// WriteTimeout is for a whole answer to be made and taken; 90 seconds. It
	// must leave time for a provider to mint, and it bounds how long a client
	// that does not read can hold up the closing of an incident.
	WriteTimeout time.Duration
	IdleTimeout  time.Duration // of a connection between requests; 2 minutes
	// StreamTime is how long one stream lasts; then it ends, and its client asks
	// again. 1 hour.
	StreamTime time.Duration
	// StreamTick is how often the caller of a stream is authorized anew while
	// there is nothing to tell, besides each message; 5 seconds.
	StreamTick time.Duration
	// Attempts is how many requests without authentication the people listener
	// takes of one network address at once, a tenth of which come back each
	// second; 100. Of all together it takes twenty times as many.
	Attempts int
}

func (l Limits) withDefaults() Limits {
	orDefault(&l.Body, 64<<10)
	orDefault(&l.Policies, 1<<20)
	orDefault(&l.Header, 16<<10)
	orDefault(&l.Connections, 4096)
	orDefault(&l.Requests, 1024)
	orDefault(&l.Streams, 128)
	orDefault(&l.Identity, max(l.Requests/4, 1))
	orDefault(&l.ReadTimeout, 15*time.Second)
	orDefault(&l.WriteTimeout, 90*time.Second)
	orDefault(&l.IdleTimeout, 2*time.Minute)
	orDefault(&l.StreamTime, time.Hour)
	orDefault(&l.StreamTick, 5*time.Second)
	orDefault(&l.Attempts, 100)
	return l
}

func orDefault[T comparable](v *T, d T) {
	var zero T
	if *v == zero {
		*v = d
	}
}

// Server serves the API. Its methods may be called from many goroutines.
type Server struct {
	engine   *lease.Engine
	attestor attestation.Attestor
	identity attestation.IdentitySource
	log      *slog.Logger
	limits   Limits
	http     *http.Server
	agents   *door
	people   *people       // nil if people do not come in
	stopping chan struct{} // closed by Shutdown: streams end
	stop     sync.Once
	errors   *connect.ErrorWriter
}

// New makes a Server; Serve starts it.
func New(cfg Config) (*Server, error) {
	switch {
	case cfg.Engine == nil:
		return nil, errors.New("server: Config.Engine is nil")
	case cfg.Attestor == nil:
		return nil, errors.New("server: Config.Attestor is nil")
	case cfg.Identity == nil:
		return nil, errors.New("server: Config.Identity is nil")
	case cfg.Log == nil:
		return nil, errors.New("server: Config.Log is nil")
	}
	s := &Server{
		engine: cfg.Engine, attestor: cfg.Attestor, identity: cfg.Identity,
		log: cfg.Log, limits: cfg.Limits.withDefaults(), stopping: make(chan struct{}),
	}
	s.agents = s.newDoor(s.attest, false)
	options := []connect.HandlerOption{
		connect.WithReadMaxBytes(int(s.limits.Body)),
		// Nothing is compressed: a secret beside a caller's own text would show
		// in the length (the BREACH attack), and a small body could be made to
		// unpack into a large one.
		connect.WithCompression("gzip", nil, nil),
		connect.WithCodec(plainJSON),
		connect.WithCodec(charsetJSON),
		connect.WithRecover(s.recovered),
	}
	s.errors = connect.NewErrorWriter(options...)

	mux := http.NewServeMux()
	s.handle(mux, options)
	mux.HandleFunc("POST /oauth2/introspect", s.introspect)
	mux.HandleFunc("GET /.well-known/jwks.json", s.jwks)
	s.http = s.newHTTP(s.guard(s.agents, mux))
	if cfg.People != nil {
		var err error
		if s.people, err = s.newPeople(*cfg.People, options); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// handle puts the services that every caller may use on mux.
func (s *Server) handle(mux *http.ServeMux, options []connect.HandlerOption) {
	mux.Handle(mayflyv1connect.NewAccessServiceHandler(accessService{s}, options...))
	mux.Handle(mayflyv1connect.NewGrantServiceHandler(grantService{s}, options...))
	mux.Handle(mayflyv1connect.NewIncidentServiceHandler(incidentService{s}, options...))
	mux.Handle(mayflyv1connect.NewAuditServiceHandler(auditService{s}, options...))
	mux.Handle(mayflyv1connect.NewRequestServiceHandler(requestService{s}, options...))
	mux.Handle(mayflyv1connect.NewPolicyServiceHandler(policyService{s}, append(options[:len(options):len(options)], connect.WithReadMaxBytes(int(s.limits.Policies)))...))
	mux.Handle(mayflyv1connect.NewOperatorServiceHandler(operatorService{s}, options...))
	mux.HandleFunc("/", s.notFound)
}

func (s *Server) newHTTP(handler http.Handler) *http.Server {
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetHTTP2(true)
	return &http.Server{
		Handler:           handler,
		Protocols:         protocols,
		HTTP2:             &http.HTTP2Config{MaxConcurrentStreams: s.limits.Streams},
		ReadHeaderTimeout: s.limits.ReadTimeout,
		ReadTimeout:       s.limits.ReadTimeout,
		WriteTimeout:      s.limits.WriteTimeout,
		IdleTimeout:       s.limits.IdleTimeout,
		MaxHeaderBytes:    s.limits.Header,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
	}
}

// Serve answers agents, bots and resource servers on ln, over TLS, until
// Shutdown; then it returns nil. It takes ln over.
func (s *Server) Serve(ln net.Listener) error { return s.serve(s.http, ln, s.identity.ServerTLS()) }

func (s *Server) serve(h *http.Server, ln net.Listener, config *tls.Config) error {
	err := h.Serve(tls.NewListener(netutil.LimitListener(ln, s.limits.Connections), config))
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

// Shutdown takes no new requests on any listener, ends streams, and waits, for
// as long as ctx lasts, for the requests under way; then it cuts them off.
func (s *Server) Shutdown(ctx context.Context) error {
	s.stop.Do(func() { close(s.stopping) })
	var people error
	done := make(chan struct{})
	go func() {
		defer close(done)
		if s.people != nil {
			people = shutdown(ctx, s.people.http)
		}
	}()
	err := shutdown(ctx, s.http)
	<-done
	return errors.Join(err, people)
}

func shutdown(ctx context.Context, h *http.Server) error {
	err := h.Shutdown(ctx)
	if err != nil {
		h.Close()
	}
	return err
}
