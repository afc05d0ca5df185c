package devtrust

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

const (
	// authorityLife is far longer than any process that holds an authority in
	// memory is meant to live.
	authorityLife = 365 * 24 * time.Hour
	// backdate lets a certificate be used at once where a clock is stepped
	// back a little.
	backdate = 10 * time.Second
)

// authority signs X.509-SVIDs and JWT-SVIDs. It is immutable.
type authority struct {
	cert     *x509.Certificate
	key      *ecdsa.PrivateKey
	jwtKey   *ecdsa.PrivateKey
	jwtKeyID string
}

// newAuthority makes a self-signed authority as X509-SVID section 4 and
// appendix A want a signing certificate: CA, keyCertSign, and the trust
// domain's SPIFFE ID without a path.
func newAuthority(trustDomain spiffeid.TrustDomain, now time.Time) (*authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("making the authority's key: %w", err)
	}
	jwtKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("making the authority's key for JWT-SVIDs: %w", err)
	}
	serial := newSerial()
	template := &x509.Certificate{
		SerialNumber: serial,
		// The serial number keeps the names of two authorities apart, so that
		// verifiers that look authorities up by name find the right one.
		Subject:               pkix.Name{Organization: []string{"Mayfly dev trust domain"}, SerialNumber: serial.Text(16)},
		URIs:                  []*url.URL{trustDomain.ID().URL()},
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(authorityLife),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
	}
	cert, err := createCertificate(template, template, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("signing the authority's certificate: %w", err)
	}
	return &authority{cert: cert, key: key, jwtKey: jwtKey, jwtKeyID: newSerial().Text(36)}, nil
}

// svid is an X.509-SVID with its key, as the Workload API sends it.
type svid struct {
	cert     []byte // DER
	key      []byte // PKCS #8, DER
	issuer   *authority
	rotateAt time.Time
}

// issueSVID makes an X.509-SVID (X509-SVID section 4) with a new key. The
// caller holds mu.
func (s *Server) issueSVID(identity Identity) (*svid, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("making a key for %s: %w", identity.ID, err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("encoding the key of %s: %w", identity.ID, err)
	}
	now := s.now().Round(0) // by the wall clock: the monotonic one stands still while a laptop sleeps
	issuer := s.newest()
	subject := pkix.Name{Organization: []string{"Mayfly dev trust domain"}}
	if len(identity.DNSNames) > 0 {
		// As SPIRE does: some verifiers (Vault's cert auth) want a common name.
		subject.CommonName = identity.DNSNames[0]
	}
	cert, err := createCertificate(&x509.Certificate{
		Subject:               subject,
		URIs:                  []*url.URL{identity.ID.URL()},
		DNSNames:              identity.DNSNames,
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(s.ttl),
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
	}, issuer.cert, key.Public(), issuer.key)
	if err != nil {
		return nil, fmt.Errorf("signing the SVID of %s: %w", identity.ID, err)
	}
	return &svid{cert: cert.Raw, key: pkcs8, issuer: issuer, rotateAt: now.Add(s.ttl / 2)}, nil
}

// signJWT makes a JWT-SVID (JWT-SVID sections 2 and 3).
func (a *authority) signJWT(id spiffeid.ID, audience []string, now time.Time, ttl time.Duration) (string, error) {
	signer, err := jose.NewSigner(
		jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: a.jwtKey, KeyID: a.jwtKeyID}},
		(&jose.SignerOptions{}).WithType("JWT"))
	if err != nil {
		return "", fmt.Errorf("preparing to sign a JWT-SVID: %w", err)
	}
	token, err := jwt.Signed(signer).Claims(jwt.Claims{
		Subject:  id.String(),
		Audience: audience,
		IssuedAt: jwt.NewNumericDate(now),
		Expiry:   jwt.NewNumericDate(now.Add(ttl)),
	}).Serialize()
	if err != nil {
		return "", fmt.Errorf("signing a JWT-SVID: %w", err)
	}
	return token, nil
}

// Issue signs a certificate of any form with the newest authority. It is there
// to test what judges certificates: unlike what the Workload API gives, the
// template may have no SPIFFE ID or two, be a CA, be expired or not yet valid.
// Issue fills only what the template leaves zero: the serial number, and a
// validity of the SVID TTL from now.
func (s *Server) Issue(template *x509.Certificate, public crypto.PublicKey) (*x509.Certificate, error) {
	if template == nil || public == nil {
		return nil, errors.New("issuing a certificate: a template and a public key are needed")
	}
	s.mu.Lock()
	issuer, now := s.newest(), s.now()
	s.mu.Unlock()
	t := *template
	if t.NotBefore.IsZero() {
		t.NotBefore = now.Add(-backdate)
	}
	if t.NotAfter.IsZero() {
		t.NotAfter = now.Add(s.ttl)
	}
	cert, err := createCertificate(&t, issuer.cert, public, issuer.key)
	if err != nil {
		return nil, fmt.Errorf("issuing a certificate: %w", err)
	}
	return cert, nil
}

func createCertificate(template, parent *x509.Certificate, public crypto.PublicKey, key crypto.Signer) (*x509.Certificate, error) {
	if template.SerialNumber == nil {
		template.SerialNumber = newSerial()
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, public, key)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

// newSerial draws a positive serial number of at most 127 bits (RFC 5280
// section 4.1.2.2 allows 20 octets).
func newSerial() *big.Int {
	var b [16]byte
	rand.Read(b[:]) // crypto/rand.Read never returns an error; it aborts the program instead
	b[0] = b[0]&0x7f | 0x40
	return new(big.Int).SetBytes(b[:])
}
