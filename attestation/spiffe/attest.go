package spiffe

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"net/http"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/mayfly-security/mayfly/broker"
)

// Bounds on what is verified for a caller that is not known yet.
const (
	// maxChain is the most certificates that a caller may send. Nested
	// authorities make chains of four or five; each more costs us signatures
	// to check, with every request.
	maxChain = 5
	// maxChainSize is the most bytes of them together.
	maxChainSize = 16 << 10
	// maxID is the most bytes of a SPIFFE ID (SPIFFE-ID section 2.3).
	maxID = 2048
)

// Why GetX509BundleForTrustDomain has nothing.
var (
	errNotAccepted = errors.New("the trust domain is not accepted")
	errNoBundle    = errors.New("the Workload API gives no bundle of the trust domain")
)

// Attest implements attestation.Attestor. It judges the certificates that the
// connection presented by X509-SVID section 5 as of now, and takes nothing
// from earlier requests.
func (s *Source) Attest(r *http.Request, now time.Time) (broker.Caller, error) {
	if r.TLS == nil || len(r.TLS.PeerCertificates) == 0 {
		return broker.Caller{}, broker.Refuse(broker.ReasonUnauthenticated,
			"no client certificate came with the connection",
			"connect over TLS with your X.509-SVID as the client certificate")
	}
	certs := r.TLS.PeerCertificates
	size := 0
	for _, c := range certs {
		size += len(c.Raw)
	}
	if len(certs) > maxChain || size > maxChainSize {
		return broker.Caller{}, broker.Refusef(broker.ReasonSVIDMalformed, "send the SVID with its own chain and nothing else",
			"the client sent %d certificates of %d bytes; at most %d of %d bytes are taken", len(certs), size, maxChain, maxChainSize)
	}
	if sameAuthorityTwice(certs[1:]) {
		return broker.Caller{}, broker.Refuse(broker.ReasonSVIDMalformed,
			"the client sent two certificates of one authority", "send the SVID with its own chain and nothing else")
	}
	if now.IsZero() { // Verify takes it for "not given" and uses the machine's clock
		return broker.Caller{}, broker.Refuse(broker.ReasonClock, "the broker has no clock to judge the SVID by", "tell an operator")
	}
	id, _, err := x509svid.Verify(certs, s, x509svid.WithTime(now))
	if err != nil {
		return broker.Caller{}, explain(certs[0], now, err)
	}
	if id.Path() == "" || len(id.String()) > maxID {
		return broker.Caller{}, explain(certs[0], now, errors.New("the SPIFFE ID names no workload"))
	}
	if err := s.fresh(now); err != nil {
		return broker.Caller{}, err
	}
	leaf := certs[0]
	return broker.Caller{ID: id, Certificate: sha256.Sum256(leaf.Raw), ValidUntil: leaf.NotAfter}, nil
}

// sameAuthorityTwice reports whether two certificates have one subject and one
// key. No chain needs that. Whoever wants to cost us signature checks does: the
// search for a chain would go through every order of such certificates.
func sameAuthorityTwice(certs []*x509.Certificate) bool {
	for i, a := range certs {
		for _, b := range certs[:i] {
			if bytes.Equal(a.RawSubject, b.RawSubject) && bytes.Equal(a.RawSubjectPublicKeyInfo, b.RawSubjectPublicKeyInfo) {
				return true
			}
		}
	}
	return false
}

// fresh refuses where the bundles can be current no longer: a Workload API that
// lets our own SVID expire has told us nothing for as long.
func (s *Source) fresh(now time.Time) error {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.closed {
		return broker.Refuse(broker.ReasonShuttingDown, "the broker is shutting down", "try again")
	}
	if end := s.current.svid.Certificates[0].NotAfter; now.After(end) {
		return broker.Refusef(broker.ReasonUntrusted, "try again; if it lasts, tell an operator that the broker has lost its Workload API",
			"the broker has no current bundle to check the SVID against: its own SVID expired at %s", stamp(end))
	}
	return nil
}

// explain finds the words for a refusal that has been decided: it never
// decides. What it does not recognize is untrusted.
func explain(leaf *x509.Certificate, now time.Time, refusal error) error {
	return reasonFor(leaf, now, refusal).Because(refusal)
}

func reasonFor(leaf *x509.Certificate, now time.Time, refusal error) *broker.Error {
	malformed := func(format string, args ...any) *broker.Error {
		return broker.Refusef(broker.ReasonSVIDMalformed,
			"use a leaf certificate with exactly one SPIFFE ID as its URI SAN; a SPIFFE Workload API gives them", format, args...)
	}
	id, err := x509svid.IDFromCert(leaf)
	switch {
	case len(leaf.URIs) == 0:
		return malformed("the client certificate has no SPIFFE ID")
	case len(leaf.URIs) > 1:
		return malformed("the client certificate has %d URI SANs; an SVID has one", len(leaf.URIs))
	case err != nil:
		return malformed("the client certificate's URI SAN is no SPIFFE ID")
	case len(id.String()) > maxID:
		return malformed("the client certificate's SPIFFE ID is longer than %d bytes", maxID)
	case id.Path() == "":
		return malformed("the client certificate's SPIFFE ID names a trust domain and no workload in it")
	case leaf.IsCA, leaf.KeyUsage&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0:
		return malformed("the client certificate is an authority's: it may sign others")
	}
	return refuseTrust(leaf, id, now, refusal)
}

func refuseTrust(leaf *x509.Certificate, id spiffeid.ID, now time.Time, refusal error) *broker.Error {
	td := id.TrustDomain().Name()
	switch {
	case errors.Is(refusal, errNotAccepted):
		return broker.Refusef(broker.ReasonTrustDomain, "ask an operator to federate the trust domain",
			"the trust domain %s is neither the broker's own nor federated with it", td)
	case errors.Is(refusal, errNoBundle):
		return broker.Refusef(broker.ReasonTrustDomain, "ask an operator to federate the trust domain in the broker's Workload API, too",
			"the trust domain %s is accepted, but the broker has no bundle of it", td)
	case now.Before(leaf.NotBefore):
		return broker.Refusef(broker.ReasonSVIDNotYetValid, "compare the clocks of both machines",
			"the SVID is not valid before %s; here it is %s", stamp(leaf.NotBefore), stamp(now))
	case now.After(leaf.NotAfter):
		return broker.Refusef(broker.ReasonSVIDExpired, "fetch a fresh SVID from the Workload API and connect again",
			"the SVID expired at %s; here it is %s", stamp(leaf.NotAfter), stamp(now))
	}
	return broker.Refusef(broker.ReasonUntrusted, "its authority may have been rotated out: fetch a fresh SVID and connect again",
		"the SVID does not chain to the current bundle of the trust domain %s", td)
}
