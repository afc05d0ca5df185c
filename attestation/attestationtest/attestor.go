package attestationtest

import (
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mayfly-security/mayfly/broker"
)

// Attestor runs the contract of attestation.Attestor.
func Attestor(t *testing.T, open Open) {
	t.Run("accepts", func(t *testing.T) { testAccepts(t, open(t)) })
	t.Run("without certificate", func(t *testing.T) { testNoCertificate(t, open(t)) })
	t.Run("odd certificates", func(t *testing.T) { testOdd(t, open(t)) })
	t.Run("bundles are never merged", func(t *testing.T) { testNeverMerged(t, open(t)) })
	t.Run("chains", func(t *testing.T) { testChains(t, open(t)) })
	t.Run("validity", func(t *testing.T) { testValidity(t, open(t)) })
	t.Run("removed authority", func(t *testing.T) { testRemovedAuthority(t, open(t)) })
	t.Run("concurrent", func(t *testing.T) { testConcurrent(t, open(t)) })
}

func testAccepts(t *testing.T, w World) {
	for _, a := range []Authority{w.Own, w.Federated} {
		leaf := issue(t, a, svid(agent(a))).cert
		caller, err := w.Attestor.Attest(request(leaf), present())
		accepted(t, caller, err, agent(a))
		if caller.Certificate != sha256.Sum256(leaf.Raw) {
			t.Errorf("the certificate's digest is %x", caller.Certificate)
		}
		if !caller.ValidUntil.Equal(leaf.NotAfter) {
			t.Errorf("valid until %s, not %s", caller.ValidUntil, leaf.NotAfter)
		}
		if caller.Correlation != "" {
			t.Errorf("the correlation %q is not the Attestor's to give", caller.Correlation)
		}
	}
}

func testNoCertificate(t *testing.T, w World) {
	for _, r := range []*http.Request{{}, {TLS: &tls.ConnectionState{}}, request()} {
		caller, err := w.Attestor.Attest(r, present())
		refused(t, caller, err, broker.ReasonUnauthenticated)
	}
}

// testOdd has a trusted authority sign certificates that are no SVIDs, or not
// good ones. Each differs from a flawless SVID in one thing.
func testOdd(t *testing.T, w World) {
	uris := func(texts ...string) func(*x509.Certificate) {
		return func(c *x509.Certificate) {
			c.URIs = nil
			for _, text := range texts {
				u, err := url.Parse(text)
				if err != nil {
					t.Fatal(err)
				}
				c.URIs = append(c.URIs, u)
			}
		}
	}
	td := "spiffe://" + w.Own.TrustDomain().Name()
	id := agent(w.Own).String()
	for name, odd := range map[string]struct {
		change func(*x509.Certificate)
		want   broker.Reason
	}{
		"no URI":                   {uris(), broker.ReasonSVIDMalformed},
		"no URI but a DNS name":    {func(c *x509.Certificate) { c.URIs, c.DNSNames = nil, []string{"localhost"} }, broker.ReasonSVIDMalformed},
		"no URI but a common name": {func(c *x509.Certificate) { c.URIs, c.Subject.CommonName = nil, id }, broker.ReasonSVIDMalformed},
		"two SPIFFE IDs":           {uris(id, td+"/admin"), broker.ReasonSVIDMalformed},
		"the same SPIFFE ID twice": {uris(id, id), broker.ReasonSVIDMalformed},
		"a web address, too":       {uris(id, "https://example.org/"), broker.ReasonSVIDMalformed},
		"only a web address":       {uris("https://example.org/agent"), broker.ReasonSVIDMalformed},
		"no trust domain":          {uris("spiffe:///agent"), broker.ReasonSVIDMalformed},
		"no path":                  {uris(td), broker.ReasonSVIDMalformed},
		"an empty path":            {uris(td + "/"), broker.ReasonSVIDMalformed},
		"an empty segment":         {uris(td + "/agent//bot"), broker.ReasonSVIDMalformed},
		"a slash at the end":       {uris(id + "/"), broker.ReasonSVIDMalformed},
		"a dot segment":            {uris(td + "/agent/../admin"), broker.ReasonSVIDMalformed},
		"an escaped character":     {uris(td + "/agent%2Fbot"), broker.ReasonSVIDMalformed},
		"a space":                  {uris(td + "/agent bot"), broker.ReasonSVIDMalformed},
		"a query":                  {uris(id + "?admin"), broker.ReasonSVIDMalformed},
		"a fragment":               {uris(id + "#admin"), broker.ReasonSVIDMalformed},
		"a user":                   {uris("spiffe://admin@" + w.Own.TrustDomain().Name() + "/agent"), broker.ReasonSVIDMalformed},
		"a port":                   {uris(td + ":443/agent"), broker.ReasonSVIDMalformed},
		"a long path":              {uris(td + "/" + strings.Repeat("a", 2048)), broker.ReasonSVIDMalformed},
		"a long trust domain":      {uris("spiffe://" + strings.Repeat("a", 3000) + "/agent"), broker.ReasonSVIDMalformed},
		"a CA":                     {func(c *x509.Certificate) { c.IsCA = true }, broker.ReasonSVIDMalformed},
		"a CA by key usage, too":   {func(c *x509.Certificate) { c.IsCA = true; c.KeyUsage |= x509.KeyUsageCertSign }, broker.ReasonSVIDMalformed},
		"may sign CRLs":            {func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCRLSign }, broker.ReasonSVIDMalformed},
		"expired": {func(c *x509.Certificate) {
			c.NotBefore, c.NotAfter = present().Add(-time.Hour), present().Add(-time.Second)
		}, broker.ReasonSVIDExpired},
		"not yet valid": {func(c *x509.Certificate) { c.NotBefore = present().Add(time.Minute) }, broker.ReasonSVIDNotYetValid},
		"expired and no SVID": {func(c *x509.Certificate) {
			c.URIs = nil
			c.NotBefore, c.NotAfter = present().Add(-time.Hour), present().Add(-time.Second)
		}, broker.ReasonSVIDMalformed},
		"an ID of nobody's trust domain": {uris("spiffe://nobody.test/agent"), broker.ReasonTrustDomain},
		"an ID of a subdomain":           {uris("spiffe://a." + w.Own.TrustDomain().Name() + "/agent"), broker.ReasonTrustDomain},
	} {
		t.Run(name, func(t *testing.T) {
			template := svid(agent(w.Own))
			odd.change(template)
			caller, err := w.Attestor.Attest(request(issue(t, w.Own, template).cert), present())
			refused(t, caller, err, odd.want)
		})
	}
}

// testNeverMerged has each authority sign for the others' trust domains.
func testNeverMerged(t *testing.T, w World) {
	for _, by := range []Authority{w.Own, w.Federated, w.Stranger} {
		for _, of := range []Authority{w.Own, w.Federated, w.Stranger} {
			want := broker.ReasonUntrusted
			switch {
			case of == w.Stranger:
				want = broker.ReasonTrustDomain
			case by == of:
				continue
			}
			caller, err := w.Attestor.Attest(request(issue(t, by, svid(agent(of))).cert), present())
			refused(t, caller, err, want)
			// Nor does an authority vouch by way of an intermediate that is
			// named after the other trust domain.
			mid := issue(t, by, signing(of.TrustDomain()))
			caller, err = w.Attestor.Attest(request(sign(t, mid, svid(agent(of))).cert, mid.cert), present())
			refused(t, caller, err, want)
		}
	}
}

func testChains(t *testing.T, w World) {
	id := agent(w.Own)
	good := issue(t, w.Own, svid(id))
	mid := issue(t, w.Own, signing(w.Own.TrustDomain()))
	old := signing(w.Own.TrustDomain())
	old.NotBefore, old.NotAfter = present().Add(-time.Hour), present().Add(-time.Second)
	expired := issue(t, w.Own, old)
	below := sign(t, mid, svid(id))

	// A forged authority has the true one's name and key identifier.
	forgedTemplate := signing(w.Own.TrustDomain())
	forgedTemplate.RawSubject = good.cert.RawIssuer
	forgedTemplate.SubjectKeyId = good.cert.AuthorityKeyId
	forged := signSelf(t, forgedTemplate)
	self := signSelf(t, svid(id))

	tampered, err := x509.ParseCertificate(append(good.cert.Raw[:len(good.cert.Raw)-1:len(good.cert.Raw)-1], good.cert.Raw[len(good.cert.Raw)-1]^1))
	if err != nil {
		t.Fatal(err)
	}
	long := []*x509.Certificate{below.cert, mid.cert}
	for range 200 {
		long = append(long, mid.cert)
	}
	for name, c := range map[string]struct {
		certs []*x509.Certificate
		want  broker.Reason // empty: accepted
	}{
		"with its intermediate":       {[]*x509.Certificate{below.cert, mid.cert}, ""},
		"without its intermediate":    {[]*x509.Certificate{below.cert}, broker.ReasonUntrusted},
		"the intermediate first":      {[]*x509.Certificate{mid.cert, below.cert}, broker.ReasonSVIDMalformed},
		"an expired intermediate":     {[]*x509.Certificate{sign(t, expired, svid(id)).cert, expired.cert}, broker.ReasonUntrusted},
		"an SVID signed by an SVID":   {[]*x509.Certificate{sign(t, good, svid(id)).cert, good.cert}, broker.ReasonUntrusted},
		"by a forged authority":       {[]*x509.Certificate{sign(t, forged, svid(id)).cert}, broker.ReasonUntrusted},
		"with the forged authority":   {[]*x509.Certificate{sign(t, forged, svid(id)).cert, forged.cert}, broker.ReasonUntrusted},
		"signed by itself":            {[]*x509.Certificate{self.cert}, broker.ReasonUntrusted},
		"tampered with":               {[]*x509.Certificate{tampered}, broker.ReasonUntrusted},
		"another's good SVID behind":  {[]*x509.Certificate{self.cert, good.cert}, broker.ReasonUntrusted},
		"a chain that costs too much": {long, broker.ReasonSVIDMalformed},
	} {
		t.Run(name, func(t *testing.T) {
			caller, err := w.Attestor.Attest(request(c.certs...), present())
			if c.want == "" {
				accepted(t, caller, err, id)
			} else {
				refused(t, caller, err, c.want)
			}
		})
	}
}

// testValidity judges one and the same request at different instants: the
// verdict is of the instant, and not remembered.
func testValidity(t *testing.T, w World) {
	leaf := issue(t, w.Own, svid(agent(w.Own))).cert
	r := request(leaf)
	for _, c := range []struct {
		now  time.Time
		want broker.Reason
	}{
		{leaf.NotBefore, ""},
		{leaf.NotBefore.Add(-time.Second), broker.ReasonSVIDNotYetValid},
		{present(), ""},
		{leaf.NotAfter, ""},
		{leaf.NotAfter.Add(time.Nanosecond), broker.ReasonSVIDExpired},
		{leaf.NotAfter.Add(1000 * time.Hour), broker.ReasonSVIDExpired},
		{present(), ""},
		{time.Time{}, broker.ReasonClock},
	} {
		caller, err := w.Attestor.Attest(r, c.now)
		if c.want == "" {
			accepted(t, caller, err, agent(w.Own))
		} else {
			refused(t, caller, err, c.want)
		}
	}
}

func testRemovedAuthority(t *testing.T, w World) {
	before := request(issue(t, w.Own, svid(agent(w.Own))).cert)
	federated := request(issue(t, w.Federated, svid(agent(w.Federated))).cert)
	caller, err := w.Attestor.Attest(before, present())
	accepted(t, caller, err, agent(w.Own))
	w.Replace()
	caller, err = w.Attestor.Attest(before, present())
	refused(t, caller, err, broker.ReasonUntrusted)
	caller, err = w.Attestor.Attest(request(issue(t, w.Own, svid(agent(w.Own))).cert), present())
	accepted(t, caller, err, agent(w.Own))
	caller, err = w.Attestor.Attest(federated, present())
	accepted(t, caller, err, agent(w.Federated))
}

// testConcurrent attests from many goroutines while the authority changes. Once
// Replace has returned, no verdict that is begun is by the old bundle.
func testConcurrent(t *testing.T, w World) {
	r := request(issue(t, w.Own, svid(agent(w.Own))).cert)
	replaced := make(chan struct{})
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for over := false; !over; {
				select {
				case <-replaced:
					over = true
				default:
				}
				caller, err := w.Attestor.Attest(r, present())
				if over || err != nil {
					refused(t, caller, err, broker.ReasonUntrusted)
				} else {
					accepted(t, caller, err, agent(w.Own))
				}
			}
		})
	}
	w.Replace()
	close(replaced)
	wg.Wait()
}
