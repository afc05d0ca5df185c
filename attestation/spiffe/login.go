package spiffe

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"

	"github.com/mayfly-security/mayfly/attestation"
)

var _ attestation.LoginSource = (*Source)(nil)

// JWTSVID implements attestation.LoginSource. Each call asks the Workload API,
// which may keep tokens by itself; the answer is for exactly this audience and
// for our own identity.
func (s *Source) JWTSVID(ctx context.Context, audience string) (token string, expires time.Time, err error) {
	if audience == "" {
		return "", time.Time{}, errors.New("fetching a JWT-SVID: no audience is given")
	}
	id := s.ID()
	svid, err := s.client.FetchJWTSVID(ctx, jwtsvid.Params{Audience: audience, Subject: id})
	if err != nil {
		return "", time.Time{}, fmt.Errorf("fetching a JWT-SVID for audience %s: %w", audience, err)
	}
	if svid.ID != id {
		return "", time.Time{}, fmt.Errorf("fetching a JWT-SVID: the Workload API gave one of %s to %s", svid.ID, id)
	}
	return svid.Marshal(), svid.Expiry, nil
}

// ClientCertificate implements attestation.LoginSource.
func (s *Source) ClientCertificate(info *tls.CertificateRequestInfo) (*tls.Certificate, error) {
	return tlsconfig.GetClientCertificate(s)(info)
}
