// Package devtrust is a SPIFFE trust domain for one machine: a real Workload
// API server with a certificate authority in memory. Any SPIFFE client library
// works against it. It is for development, demonstrations and tests, and no
// replacement for SPIRE: it attests nobody, its authority is gone when the
// process is, and it has no protection against root or against the user that
// runs it.
//
// Every identity has its own Unix socket. Who may open the socket may be the
// identity: the socket's owner, group and mode decide, as for any file. A
// socket is made with mode 0600 in a directory of mode 0700, so that only the
// user who runs the server gets anything until somebody widens both.
//
// SVIDs live for minutes and are replaced at half of their life; the streams
// of the Workload API push the new ones. The authority is rotated on demand
// (RotateCA, then DropOldAuthorities).
package devtrust

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

const (
	defaultTTL = 5 * time.Minute
	minTTL     = 2 * time.Second // certificates count in whole seconds
	maxTTL     = 24 * time.Hour
)

// ErrClosed means that Close was called.
var ErrClosed = errors.New("dev trust domain is closed")

// Config says what trust domain to serve, and where.
type Config struct {
	// TrustDomain is the trust domain's name. Required.
	TrustDomain spiffeid.TrustDomain
	// Dir is where the sockets are. Required. It is made if it is not there;
	// a directory that others than its owner may write to is refused, because
	// they could put their own sockets in the place of ours. The path must be
	// short: a Unix socket's whole path has at most 107 bytes on Linux.
	Dir string
	// DirMode is the mode of Dir if it is made. Zero means 0700. To let another
	// user be an identity, it must let that user search the directory (0711).
	DirMode fs.FileMode
	// SVIDTTL is how long an X.509-SVID or a JWT-SVID is valid, from two
	// seconds to a day. Zero means five minutes. An X.509-SVID is replaced at
	// half of it.
	SVIDTTL time.Duration
	// Now is the clock that certificates and tokens are dated with. Nil means
	// time.Now. ValidateJWTSVID judges by time.Now in any case.
	Now func() time.Time
	// Log tells of identities that come and go, and of rotations. Nil means no log.
	Log *slog.Logger
}

// Identity is one SPIFFE ID that somebody on this machine may be.
type Identity struct {
	// ID is the SPIFFE ID: of the server's trust domain, with a path. Required.
	ID spiffeid.ID
	// Name names the socket's file, without the ending ".sock": lowercase
	// letters, digits, '.', '_' and '-', at most 64. Empty means the ID's path
	// with '-' between its segments.
	Name string
	// DNSNames are DNS SANs of the X.509-SVID, for clients that know no SPIFFE
	// ("localhost" lets curl check the broker's certificate).
	DNSNames []string
	// SocketMode is the socket's mode: whoever may write to the socket may be
	// the identity. Zero means 0600.
	SocketMode fs.FileMode
}

// Server is a running trust domain. Its methods may be called from many goroutines.
type Server struct {
	trustDomain spiffeid.TrustDomain
	dir         string
	ttl         time.Duration
	now         func() time.Time
	log         *slog.Logger
	stop        chan struct{} // closed by Close
	done        chan struct{} // closed when the rotation has ended
	closing     sync.Once

	mu          sync.Mutex
	closed      bool
	authorities []*authority // oldest first; the newest issues. Never empty
	federated   map[spiffeid.TrustDomain]*spiffebundle.Bundle
	endpoints   map[spiffeid.ID]*endpoint
	changed     chan struct{} // closed, and replaced, whenever something that streams tell has changed
}

// New starts a trust domain without identities. It is usable when New returns.
func New(c Config) (*Server, error) {
	if c.TrustDomain.IsZero() {
		return nil, errors.New("dev trust domain: no trust domain is given")
	}
	if c.SVIDTTL == 0 {
		c.SVIDTTL = defaultTTL
	}
	if c.SVIDTTL < minTTL || c.SVIDTTL > maxTTL {
		return nil, fmt.Errorf("dev trust domain: an SVID TTL of %s is not between %s and %s", c.SVIDTTL, minTTL, maxTTL)
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	dir, err := openDir(c.Dir, c.DirMode)
	if err != nil {
		return nil, fmt.Errorf("preparing the directory for sockets: %w", err)
	}
	ca, err := newAuthority(c.TrustDomain, c.Now())
	if err != nil {
		return nil, err
	}
	s := &Server{
		trustDomain: c.TrustDomain,
		dir:         dir,
		ttl:         c.SVIDTTL,
		now:         c.Now,
		log:         c.Log.With("trust_domain", c.TrustDomain.Name()),
		stop:        make(chan struct{}),
		done:        make(chan struct{}),
		authorities: []*authority{ca},
		federated:   make(map[spiffeid.TrustDomain]*spiffebundle.Bundle),
		endpoints:   make(map[spiffeid.ID]*endpoint),
		changed:     make(chan struct{}),
	}
	go s.rotate()
	return s, nil
}

// TrustDomain returns the trust domain's name.
func (s *Server) TrustDomain() spiffeid.TrustDomain { return s.trustDomain }

// Add serves one more identity and returns the address of its Workload API,
// as SPIFFE_ENDPOINT_SOCKET wants it ("unix:///…"). It can be used when Add
// returns. A socket file that a dead server left is replaced; that of a living
// one is not.
func (s *Server) Add(identity Identity) (addr string, err error) {
	identity, err = s.check(identity)
	if err != nil {
		return "", err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return "", ErrClosed
	}
	for _, e := range s.endpoints {
		if e.identity.ID == identity.ID || e.identity.Name == identity.Name {
			return "", fmt.Errorf("adding %s as %q: %s is served as %q already", identity.ID, identity.Name, e.identity.ID, e.identity.Name)
		}
	}
	current, err := s.issueSVID(identity)
	if err != nil {
		return "", err
	}
	e, err := s.serve(identity, current)
	if err != nil {
		return "", fmt.Errorf("serving %s: %w", identity.ID, err)
	}
	s.endpoints[identity.ID] = e
	s.log.Info("identity added", "id", identity.ID, "socket", e.path)
	return e.addr(), nil
}

// Remove stops serving an identity and removes its socket. SVIDs that were
// given out stay valid until they expire or their authority is dropped.
// Removing what is not there is no error.
func (s *Server) Remove(id spiffeid.ID) {
	s.mu.Lock()
	e := s.endpoints[id]
	delete(s.endpoints, id)
	s.mu.Unlock()
	if e != nil {
		e.close()
		s.log.Info("identity removed", "id", id)
	}
}

// Federate makes every identity trust another trust domain's bundle, too, for
// IDs of that trust domain. A later call replaces the bundle; it does not
// follow the other's rotations by itself.
func (s *Server) Federate(bundle *spiffebundle.Bundle) error {
	if bundle == nil || bundle.TrustDomain() == s.trustDomain {
		return errors.New("federating: the bundle must be another trust domain's")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.federated[bundle.TrustDomain()] = bundle.Clone()
	s.notify()
	return nil
}

// Unfederate takes another trust domain's bundle away again.
func (s *Server) Unfederate(other spiffeid.TrustDomain) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.federated, other)
	s.notify()
}

// Bundle returns the trust domain's own bundle as it is now, X.509 and JWT
// authorities both.
func (s *Server) Bundle() *spiffebundle.Bundle {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.bundle()
}

func (s *Server) bundle() *spiffebundle.Bundle {
	b := spiffebundle.New(s.trustDomain)
	for _, a := range s.authorities {
		b.AddX509Authority(a.cert)
		b.AddJWTAuthority(a.jwtKeyID, a.jwtKey.Public()) // fails only without a key ID
	}
	return b
}

// bundles returns the bundles that identities are told: our own and those
// federated with us.
func (s *Server) bundles() []*spiffebundle.Bundle {
	return slices.AppendSeq([]*spiffebundle.Bundle{s.bundle()}, maps.Values(s.federated))
}

// Close stops serving and removes the sockets. It returns when every goroutine
// has ended. It may be called more than once. Clients see Unavailable, and come
// back to a server that follows in the same directory; its authority is another.
func (s *Server) Close() error {
	s.closing.Do(func() {
		s.mu.Lock()
		s.closed = true
		endpoints := slices.Collect(maps.Values(s.endpoints))
		clear(s.endpoints)
		s.mu.Unlock()
		close(s.stop)
		for _, e := range endpoints {
			e.close()
		}
		<-s.done
	})
	return nil
}

// notify wakes the streams. The caller holds mu.
func (s *Server) notify() {
	close(s.changed)
	s.changed = make(chan struct{})
}
