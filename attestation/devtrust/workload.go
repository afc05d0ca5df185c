package devtrust

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"
)

// Bounds on what one client may ask.
const (
	maxMessage   = 64 << 10 // bytes of a request
	maxStreams   = 100      // calls at a time on one connection
	maxAudiences = 32
)

// endpoint is the Workload API of one identity (SPIFFE Workload API, sections
// 5 and 6). Profiles that it does not have answer Unimplemented.
type endpoint struct {
	workload.UnimplementedSpiffeWorkloadAPIServer

	server   *Server
	identity Identity
	path     string
	grpc     *grpc.Server
	served   chan struct{} // closed when the listener's goroutine has ended
	current  *svid         // guarded by server.mu
}

// serve opens the identity's socket and answers on it. The caller holds mu.
func (s *Server) serve(identity Identity, current *svid) (*endpoint, error) {
	l, path, err := listen(s.dir, identity.Name, identity.SocketMode)
	if err != nil {
		return nil, err
	}
	e := &endpoint{server: s, identity: identity, path: path, current: current, served: make(chan struct{})}
	e.grpc = grpc.NewServer(
		grpc.UnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
			if err := checkHeader(ctx); err != nil {
				return nil, err
			}
			return next(ctx, req)
		}),
		grpc.StreamInterceptor(func(srv any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler) error {
			if err := checkHeader(stream.Context()); err != nil {
				return err
			}
			return next(srv, stream)
		}),
		grpc.MaxRecvMsgSize(maxMessage),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.ConnectionTimeout(10*time.Second),
		grpc.WaitForHandlers(true),
	)
	workload.RegisterSpiffeWorkloadAPIServer(e.grpc, e)
	go e.run(l)
	return e, nil
}

func (e *endpoint) run(l net.Listener) {
	defer close(e.served)
	if err := e.grpc.Serve(l); err != nil && !errors.Is(err, grpc.ErrServerStopped) {
		e.server.log.Error("identity is not served any more", "id", e.identity.ID, "error", err)
	}
}

func (e *endpoint) addr() string { return socketURI(e.path) }

// close ends the identity's calls and joins its goroutines. The caller does
// not hold mu.
func (e *endpoint) close() {
	os.Remove(e.path)
	e.grpc.Stop()
	<-e.served
}

// checkHeader wants the metadata that proves a caller to be no browser or other
// confused deputy (SPIFFE Workload Endpoint, section 6).
func checkHeader(ctx context.Context) error {
	if slices.Equal(metadata.ValueFromIncomingContext(ctx, "workload.spiffe.io"), []string{"true"}) {
		return nil
	}
	return status.Error(codes.InvalidArgument, `the metadata "workload.spiffe.io: true" is missing`)
}

// FetchX509SVID implements the Workload API.
func (e *endpoint) FetchX509SVID(_ *workload.X509SVIDRequest, stream grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
	return follow(e.server, stream, func() (*workload.X509SVIDResponse, error) {
		resp := &workload.X509SVIDResponse{
			Svids: []*workload.X509SVID{{
				SpiffeId:    e.identity.ID.String(),
				X509Svid:    e.current.cert,
				X509SvidKey: e.current.key,
				Bundle:      x509DER(e.server.bundle()),
			}},
			FederatedBundles: make(map[string][]byte),
		}
		for td, b := range e.server.federated {
			resp.FederatedBundles[td.IDString()] = x509DER(b)
		}
		return resp, nil
	})
}

// FetchX509Bundles implements the Workload API.
func (e *endpoint) FetchX509Bundles(_ *workload.X509BundlesRequest, stream grpc.ServerStreamingServer[workload.X509BundlesResponse]) error {
	return follow(e.server, stream, func() (*workload.X509BundlesResponse, error) {
		resp := &workload.X509BundlesResponse{Bundles: make(map[string][]byte)}
		for _, b := range e.server.bundles() {
			resp.Bundles[b.TrustDomain().IDString()] = x509DER(b)
		}
		return resp, nil
	})
}

// FetchJWTBundles implements the Workload API.
func (e *endpoint) FetchJWTBundles(_ *workload.JWTBundlesRequest, stream grpc.ServerStreamingServer[workload.JWTBundlesResponse]) error {
	return follow(e.server, stream, func() (*workload.JWTBundlesResponse, error) {
		resp := &workload.JWTBundlesResponse{Bundles: make(map[string][]byte)}
		for _, b := range e.server.bundles() {
			jwks, err := b.JWTBundle().Marshal()
			if err != nil {
				return nil, fmt.Errorf("encoding the JWT bundle of %s: %w", b.TrustDomain(), err)
			}
			resp.Bundles[b.TrustDomain().IDString()] = jwks
		}
		return resp, nil
	})
}

// FetchJWTSVID implements the Workload API.
func (e *endpoint) FetchJWTSVID(_ context.Context, req *workload.JWTSVIDRequest) (*workload.JWTSVIDResponse, error) {
	if len(req.Audience) == 0 || len(req.Audience) > maxAudiences || slices.Contains(req.Audience, "") {
		return nil, status.Errorf(codes.InvalidArgument, "from 1 to %d audiences must be given, none of them empty", maxAudiences)
	}
	if req.SpiffeId != "" && req.SpiffeId != e.identity.ID.String() {
		return nil, status.Errorf(codes.PermissionDenied, "this socket gives SVIDs of %s only", e.identity.ID)
	}
	s := e.server
	s.mu.Lock()
	// The authority of the X.509-SVID, and not the newest: an authority that
	// was added a moment ago is not known everywhere yet.
	issuer, now := e.current.issuer, s.now()
	s.mu.Unlock()
	token, err := issuer.signJWT(e.identity.ID, req.Audience, now, s.ttl)
	if err != nil {
		return nil, err
	}
	return &workload.JWTSVIDResponse{Svids: []*workload.JWTSVID{{SpiffeId: e.identity.ID.String(), Svid: token}}}, nil
}

// ValidateJWTSVID implements the Workload API.
func (e *endpoint) ValidateJWTSVID(_ context.Context, req *workload.ValidateJWTSVIDRequest) (*workload.ValidateJWTSVIDResponse, error) {
	if req.Audience == "" || req.Svid == "" {
		return nil, status.Error(codes.InvalidArgument, "an audience and a JWT-SVID must be given")
	}
	set := jwtbundle.NewSet()
	e.server.mu.Lock()
	for _, b := range e.server.bundles() {
		set.Add(b.JWTBundle())
	}
	e.server.mu.Unlock()
	svid, err := jwtsvid.ParseAndValidate(req.Svid, set, []string{req.Audience})
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	claims, err := structpb.NewStruct(svid.Claims)
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, "the JWT-SVID has a claim that JSON does not have")
	}
	return &workload.ValidateJWTSVIDResponse{SpiffeId: svid.ID.String(), Claims: claims}, nil
}

// follow sends what build makes, and again whenever that has become different,
// until the client or the server goes. build runs with the server's mutex held.
func follow[T any, M interface {
	*T
	proto.Message
}](s *Server, stream grpc.ServerStreamingServer[T], build func() (M, error)) error {
	var last M
	for {
		s.mu.Lock()
		changed := s.changed
		next, err := build()
		s.mu.Unlock()
		if err != nil {
			return err
		}
		if last == nil || !proto.Equal(last, next) {
			if err := stream.Send(next); err != nil {
				return err
			}
			last = next
		}
		select {
		case <-changed:
		case <-stream.Context().Done():
			return stream.Context().Err() // the connection is gone, and nobody hears it
		}
	}
}

// x509DER concatenates a bundle's certificates, as the Workload API sends them.
func x509DER(b *spiffebundle.Bundle) []byte {
	var der []byte
	for _, a := range b.X509Authorities() {
		der = append(der, a.Raw...)
	}
	return der
}
