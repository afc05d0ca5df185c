package client

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// transport connects as whom the source says we are now, to the broker with
// the pinned ID. A connection shows the SVID with which it was made for as long
// as it lasts, so a new SVID or bundle means new connections.
type transport struct {
	source Source
	broker spiffeid.ID

	mu     sync.Mutex
	svid   *x509svid.SVID
	bundle *x509bundle.Bundle
	inner  *http.Transport
}

func (t *transport) RoundTrip(r *http.Request) (*http.Response, error) {
	inner, err := t.current()
	if err != nil {
		return nil, err
	}
	return inner.RoundTrip(r)
}

// current returns a transport of the present SVID and bundle. Sources give new
// pointers for new contents, so comparing those is enough.
func (t *transport) current() (*http.Transport, error) {
	svid, err := t.source.GetX509SVID()
	if err != nil {
		return nil, identityError(err, "look at the Workload API", "our own SVID cannot be had: %s", clean(err.Error()))
	}
	bundle, err := t.source.GetX509BundleForTrustDomain(t.broker.TrustDomain())
	if err != nil {
		return nil, identityError(err, "federate the trust domains at the SPIFFE server, or correct the broker's ID",
			"the broker %s is of trust domain %s, for which our Workload API gives no bundle", t.broker, t.broker.TrustDomain())
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.inner == nil || svid != t.svid || bundle != t.bundle {
		if t.inner != nil {
			t.inner.CloseIdleConnections() // those in use end with their requests, and then by IdleConnTimeout
		}
		t.svid, t.bundle, t.inner = svid, bundle, t.make(svid, bundle)
	}
	return t.inner, nil
}

func (t *transport) make(svid *x509svid.SVID, bundle *x509bundle.Bundle) *http.Transport {
	config := tlsconfig.MTLSClientConfig(svid, bundle, tlsconfig.AuthorizeID(t.broker))
	verify := config.VerifyPeerCertificate
	// No session is resumed (there is no cache of them), so the verification
	// below sees every connection.
	config.VerifyPeerCertificate = func(raw [][]byte, chains [][]*x509.Certificate) error {
		if err := verify(raw, chains); err != nil {
			return t.explainPeer(raw, err)
		}
		return nil
	}
	config.ClientSessionCache = nil
	return newHTTP(config)
}

// newHTTP is how we speak HTTP to every broker.
func newHTTP(config *tls.Config) *http.Transport {
	dialer := &net.Dialer{Timeout: 5 * time.Second, KeepAlive: 30 * time.Second}
	return &http.Transport{
		Proxy:               http.ProxyFromEnvironment, // TLS goes through it from end to end
		DialContext:         dialer.DialContext,
		TLSClientConfig:     config,
		ForceAttemptHTTP2:   true,
		TLSHandshakeTimeout: 5 * time.Second,
		IdleConnTimeout:     30 * time.Second,
		HTTP2: &http.HTTP2Config{
			SendPingTimeout: 15 * time.Second, // notices a connection that died silently
			PingTimeout:     5 * time.Second,
		},
	}
}

// explainPeer says why who answered is not the broker that we want.
func (t *transport) explainPeer(raw [][]byte, err error) error {
	got := "nobody that SPIFFE knows"
	if len(raw) > 0 {
		if leaf, perr := x509.ParseCertificate(raw[0]); perr == nil {
			if id, ierr := x509svid.IDFromCert(leaf); ierr == nil {
				got = id.String()
			}
		}
	}
	if got == t.broker.String() {
		return identityError(err, "compare the trust bundles of both sides; if the authority was rotated, the Workload API must bring the new bundle",
			"whoever answers says to be %s, and cannot prove it: %s", got, clean(err.Error()))
	}
	return identityError(err, fmt.Sprintf("if the broker's ID is the one that answers, set %s (or --broker-id) to it; if not, do not trust it", EnvBrokerID),
		"the broker must be %s, and who answers is %s", t.broker, got)
}

func (t *transport) close() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.inner != nil {
		t.inner.CloseIdleConnections()
	}
}

// alertOf reports whether err is a TLS alert that the other side sent.
func alertOf(err error) bool {
	op, ok := asType[*net.OpError](err)
	return ok && op.Op == "remote error"
}
