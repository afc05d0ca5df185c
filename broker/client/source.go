package client

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"strings"
	"sync"
	"syscall"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/logger"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/mayfly-security/mayfly/broker"
)

// Source is who we are (an X.509-SVID with its key) and whom we trust (the
// bundles), kept fresh. A *workloadapi.X509Source is one.
type Source interface {
	x509svid.Source
	x509bundle.Source
	Close() error
}

// OpenSource opens the identity that c names: its Files, or the Workload API.
// The caller closes it. An error says what to set and what to look at.
func OpenSource(ctx context.Context, c Config) (Source, error) {
	c = c.withDefaults()
	if c.Source != nil {
		return keep{c.Source}, nil
	}
	if c.Files != (Files{}) {
		return openFiles(c.Files)
	}
	ctx, cancel := context.WithTimeout(ctx, c.IdentityTimeout)
	defer cancel()
	return openWorkloadAPI(ctx, c.WorkloadAPI)
}

// keep leaves closing a source to whoever gave it.
type keep struct{ Source }

func (keep) Close() error { return nil }

func openWorkloadAPI(ctx context.Context, addr string) (Source, error) {
	if addr == "" {
		addr, _ = workloadapi.GetDefaultAddress()
	}
	if addr == "" {
		return nil, identityError(nil,
			fmt.Sprintf("set %s to the Workload API's socket, such as unix:///run/spire/agent/public/api.sock, or %s, %s and %s to PEM files; to come as a person, set %s and `mayfly login`", EnvWorkload, EnvCert, EnvKey, EnvBundle, EnvPeopleAddr),
			"there is no identity to connect with: %s is not set", EnvWorkload)
	}
	if err := workloadapi.ValidateAddress(addr); err != nil {
		return nil, identityError(err, fmt.Sprintf("set %s to unix:///path/of/the/socket or tcp://ip:port", EnvWorkload),
			"%s is %q, which is no address of a Workload API", EnvWorkload, clean(addr))
	}
	// A Workload API that is not there is told of at once: go-spiffe would try
	// again for as long as we wait.
	if err := knock(ctx, addr); err != nil {
		return nil, explainSocket(addr, err)
	}
	var last lastError
	source, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(
		workloadapi.WithAddr(addr), workloadapi.WithLogger(&last)))
	if err != nil {
		return nil, explainWorkloadAPI(addr, err, last.get())
	}
	return source, nil
}

func knock(ctx context.Context, addr string) error {
	target, err := workloadapi.TargetFromAddress(addr)
	if err != nil {
		return err
	}
	network, where := "tcp", target
	if path, ok := strings.CutPrefix(target, "unix:"); ok {
		network, where = "unix", strings.TrimPrefix(path, "//")
	}
	conn, err := new(net.Dialer).DialContext(ctx, network, where)
	if err != nil {
		return err
	}
	return conn.Close()
}

func explainSocket(addr string, err error) error {
	next := fmt.Sprintf("start the SPIFFE agent (or `mayflyd dev`), or set %s to where it listens", EnvWorkload)
	var why string
	switch {
	case errors.Is(err, fs.ErrNotExist):
		why = "there is no such socket"
	case errors.Is(err, syscall.ECONNREFUSED):
		why = "nothing listens there"
	case errors.Is(err, fs.ErrPermission):
		why, next = "this user may not open it", "use the socket of an identity that you may be; whoever may open a socket may be its identity"
	default:
		why = err.Error()
	}
	return identityError(err, next, "the Workload API at %s cannot be reached: %s", clean(addr), clean(why))
}

// explainWorkloadAPI tells what the Workload API answered last, if it did: by
// then err says only that we waited long enough.
func explainWorkloadAPI(addr string, err, last error) error {
	if last == nil {
		last = err
	}
	if status.Code(last) == codes.PermissionDenied {
		return identityError(last, "register this workload with the SPIFFE server (for SPIRE: `spire-server entry create`), or use another user or socket",
			"the Workload API at %s has no identity for this process", clean(addr))
	}
	if errors.Is(err, context.Canceled) {
		return err
	}
	return identityError(last, "look at the SPIFFE agent's log, and that the address is its Workload API's",
		"the Workload API at %s gave no SVID in time: %s", clean(addr), clean(broker.Shorten(last.Error(), 300)))
}

// lastError keeps the last error that go-spiffe would log.
type lastError struct {
	mu  sync.Mutex
	err error
}

var _ logger.Logger = (*lastError)(nil)

func (l *lastError) Debugf(string, ...any) {}
func (l *lastError) Infof(string, ...any)  {}
func (l *lastError) Warnf(string, ...any)  {}

func (l *lastError) Errorf(_ string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, a := range args {
		if err, ok := a.(error); ok {
			l.err = err
		}
	}
}

func (l *lastError) get() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.err
}
