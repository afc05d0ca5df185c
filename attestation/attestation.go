// Package attestation answers two questions: who is calling (Attestor), and
// who are we (IdentitySource).
package attestation

import (
	"context"
	"crypto/tls"
	"net/http"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/broker"
)

// Attestor says who makes a request. It is asked anew for every request, also
// on a connection that it has seen before (I10), and it trusts nothing that
// was decided earlier on the connection.
type Attestor interface {
	// Attest returns who is calling, as of now. Every error is a
	// *broker.Error that may be shown to the caller. The Correlation of the
	// result is left to the server. It does not say whether the caller is
	// known or enabled: that is the catalog's.
	Attest(r *http.Request, now time.Time) (broker.Caller, error)
}

// IdentitySource is the broker's own identity, kept fresh.
type IdentitySource interface {
	// ID is the broker's SPIFFE ID. It does not change while the broker runs.
	ID() spiffeid.ID
	// ServerTLS is the configuration of the agents' listener: it asks for a
	// client certificate, has possession of its key proved where there is one,
	// resumes no session, and leaves every judgement about the certificate,
	// also that there is none, to the Attestor.
	ServerTLS() *tls.Config
	// Ready reports an error while the identity cannot be used: the SVID has
	// expired, or the Workload API has been away for too long.
	Ready(ctx context.Context) error
}

// LoginSource is the broker's identity as it is shown to other systems: what
// providers log in with instead of a secret of their own (I9). Its methods may
// be called from many goroutines.
type LoginSource interface {
	// JWTSVID fetches a JWT-SVID (SPIFFE JWT-SVID, section 3) for exactly one
	// audience, and when it expires. It is a secret.
	JWTSVID(ctx context.Context, audience string) (token string, expires time.Time, err error)
	// ClientCertificate returns the current X.509-SVID with its chain and key,
	// for tls.Config.GetClientCertificate. It is asked at each handshake, so
	// that a rotated SVID is used at once.
	ClientCertificate(*tls.CertificateRequestInfo) (*tls.Certificate, error)
}
