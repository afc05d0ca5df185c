package attestationtest

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/mayfly-security/mayfly/broker"
)

// Connections runs invariant I10 over real TLS connections, by HTTP/1.1 and by
// HTTP/2: each request stands alone, also on a connection that is kept alive,
// and on one that resumes a session.
func Connections(t *testing.T, open Open) {
	for _, protocol := range []string{"HTTP/1.1", "HTTP/2.0"} {
		t.Run(protocol, func(t *testing.T) {
			t.Run("the SVID expires", func(t *testing.T) { testExpires(t, open(t), protocol) })
			t.Run("the authority is removed", func(t *testing.T) { testRemoved(t, open(t), protocol) })
			t.Run("no session is resumed", func(t *testing.T) { testNoResumption(t, open(t), protocol) })
			t.Run("a resumed session is judged", func(t *testing.T) { testResumed(t, open(t), protocol) })
			t.Run("refusals are answers", func(t *testing.T) { testRefusalsAreAnswers(t, open(t), protocol) })
		})
	}
}

// server answers each request with what the Attestor says of it.
type server struct {
	addr string
	now  atomic.Pointer[time.Time] // what requests are judged by; nil means the present
}

// serve starts a server on a loopback port; config is from ServerTLS.
func serve(t *testing.T, w World, config *tls.Config) *server {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &server{addr: l.Addr().String()}
	h := &http.Server{
		TLSConfig: config,
		ErrorLog:  log.New(io.Discard, "", 0), // refused handshakes are part of the tests
		Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
			now := present()
			if set := s.now.Load(); set != nil {
				now = *set
			}
			caller, err := w.Attestor.Attest(r, now)
			if err != nil {
				rw.WriteHeader(http.StatusForbidden)
				fmt.Fprint(rw, broker.ReasonOf(err))
				return
			}
			fmt.Fprint(rw, caller.ID)
		}),
	}
	ended := make(chan error, 1)
	go func() { ended <- h.ServeTLS(l, "", "") }()
	t.Cleanup(func() {
		h.Close()
		if err := <-ended; !errors.Is(err, http.ErrServerClosed) {
			t.Errorf("serving: %v", err)
		}
	})
	return s
}

// at sets the clock that requests are judged by.
func (s *server) at(now time.Time) { s.now.Store(&now) }

// answer is what a client learns of one request.
type answer struct {
	body    string // the caller's SPIFFE ID, or the reason of a refusal
	ok      bool
	reused  bool // the request went over a connection that was there already
	resumed bool // the connection resumes an earlier session
}

func (a answer) want(t *testing.T, ok bool, body string) {
	t.Helper()
	if a.ok != ok || a.body != body {
		t.Errorf("the answer is %q (accepted: %t), not %q (accepted: %t)", a.body, a.ok, body, ok)
	}
}

// client is an agent: it shows its certificate and pins the broker's SPIFFE ID.
type client struct {
	t         *testing.T
	server    *server
	protocol  string
	transport *http.Transport
}

func newClient(t *testing.T, s *server, protocol string, config *tls.Config) *client {
	t.Helper()
	protocols := new(http.Protocols)
	protocols.SetHTTP1(protocol == "HTTP/1.1")
	protocols.SetHTTP2(protocol == "HTTP/2.0")
	c := &client{t, s, protocol, &http.Transport{TLSClientConfig: config, Protocols: protocols}}
	t.Cleanup(c.transport.CloseIdleConnections)
	return c
}

// agentTLS is the configuration of an agent that shows the certificate.
func agentTLS(w World, show *tls.Certificate) *tls.Config {
	config := tlsconfig.MTLSClientConfig(&x509svid.SVID{}, w.Bundle(), tlsconfig.AuthorizeID(w.Identity.ID()))
	config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return show, nil }
	config.ServerName = "localhost"
	return config
}

// try makes one request.
func (c *client) try() (answer, error) {
	var got answer
	trace := &httptrace.ClientTrace{GotConn: func(i httptrace.GotConnInfo) { got.reused = i.Reused }}
	req, err := http.NewRequestWithContext(httptrace.WithClientTrace(c.t.Context(), trace), http.MethodGet, "https://"+c.server.addr, nil)
	if err != nil {
		return got, err
	}
	resp, err := c.transport.RoundTrip(req)
	if err != nil {
		return got, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return got, err
	}
	if resp.Proto != c.protocol {
		return got, fmt.Errorf("the answer came by %s", resp.Proto)
	}
	got.body, got.ok, got.resumed = string(body), resp.StatusCode == http.StatusOK, resp.TLS.DidResume
	return got, nil
}

// ask makes one request that must have an answer, on a connection that is to be
// a new one or one that is kept alive.
func (c *client) ask(reused bool) answer {
	c.t.Helper()
	got, err := c.try()
	if err != nil {
		c.t.Fatal(err)
	}
	if got.reused != reused {
		c.t.Errorf("the connection was reused: %t, not %t", got.reused, reused)
	}
	return got
}

func testExpires(t *testing.T, w World, protocol string) {
	id := agent(w.Own)
	me := issue(t, w.Own, svid(id))
	s := serve(t, w, w.Identity.ServerTLS())
	c := newClient(t, s, protocol, agentTLS(w, me.tls()))
	c.ask(false).want(t, true, id.String())
	s.at(me.cert.NotAfter)
	c.ask(true).want(t, true, id.String())
	s.at(me.cert.NotAfter.Add(time.Second))
	c.ask(true).want(t, false, string(broker.ReasonSVIDExpired))
	s.at(me.cert.NotBefore.Add(-time.Second))
	c.ask(true).want(t, false, string(broker.ReasonSVIDNotYetValid))
}

func testRemoved(t *testing.T, w World, protocol string) {
	id := agent(w.Own)
	s := serve(t, w, w.Identity.ServerTLS())
	c := newClient(t, s, protocol, agentTLS(w, issue(t, w.Own, svid(id)).tls()))
	partner := newClient(t, s, protocol, agentTLS(w, issue(t, w.Federated, svid(agent(w.Federated))).tls()))
	c.ask(false).want(t, true, id.String())
	partner.ask(false).want(t, true, agent(w.Federated).String())
	w.Replace()
	c.ask(true).want(t, false, string(broker.ReasonUntrusted))
	partner.ask(true).want(t, true, agent(w.Federated).String())
	// With a fresh SVID and the new bundle, the agent is back.
	c = newClient(t, s, protocol, agentTLS(w, issue(t, w.Own, svid(id)).tls()))
	c.ask(false).want(t, true, id.String())
}

// testNoResumption offers to resume a session: the server does not take it up,
// and the connection is refused like any other.
func testNoResumption(t *testing.T, w World, protocol string) {
	id := agent(w.Own)
	s := serve(t, w, w.Identity.ServerTLS())
	config := agentTLS(w, issue(t, w.Own, svid(id)).tls())
	config.ClientSessionCache = tls.NewLRUClientSessionCache(8)
	for range 2 {
		got := newClient(t, s, protocol, config.Clone()).ask(false)
		got.want(t, true, id.String())
		if got.resumed {
			t.Error("a session was resumed")
		}
	}
	w.Replace()
	config.VerifyPeerCertificate = agentTLS(w, nil).VerifyPeerCertificate // by the bundle of now
	got := newClient(t, s, protocol, config).ask(false)
	got.want(t, false, string(broker.ReasonUntrusted))
	if got.resumed {
		t.Error("a session was resumed")
	}
}

// testResumed turns session tickets on again, as a wrong configuration might:
// the second layer, the judgement of every request, holds by itself. It also
// shows that testNoResumption would notice a resumed session.
func testResumed(t *testing.T, w World, protocol string) {
	id := agent(w.Own)
	wrong := w.Identity.ServerTLS()
	wrong.SessionTicketsDisabled = false
	s := serve(t, w, wrong)
	config := agentTLS(w, issue(t, w.Own, svid(id)).tls())
	config.ClientSessionCache = tls.NewLRUClientSessionCache(8)
	got := newClient(t, s, protocol, config.Clone()).ask(false)
	got.want(t, true, id.String())
	w.Replace()
	got = newClient(t, s, protocol, config).ask(false)
	if !got.resumed {
		t.Error("the session was not resumed, though the server was told to")
	}
	got.want(t, false, string(broker.ReasonUntrusted))
}

// testRefusalsAreAnswers shows odd certificates to a real server: the client
// gets a reason and no TLS alert.
func testRefusalsAreAnswers(t *testing.T, w World, protocol string) {
	s := serve(t, w, w.Identity.ServerTLS())
	id := agent(w.Own)
	for name, c := range map[string]struct {
		by     Authority
		of     spiffeid.ID
		change func(*x509.Certificate)
		want   broker.Reason
	}{
		"no SPIFFE ID":  {w.Own, id, func(c *x509.Certificate) { c.URIs = nil }, broker.ReasonSVIDMalformed},
		"two":           {w.Own, id, func(c *x509.Certificate) { c.URIs = append(c.URIs, &url.URL{Scheme: "spiffe", Host: "x", Path: "/y"}) }, broker.ReasonSVIDMalformed},
		"a CA":          {w.Own, id, func(c *x509.Certificate) { c.IsCA = true }, broker.ReasonSVIDMalformed},
		"expired":       {w.Own, id, func(c *x509.Certificate) { c.NotAfter = present().Add(-time.Second) }, broker.ReasonSVIDExpired},
		"not yet valid": {w.Own, id, func(c *x509.Certificate) { c.NotBefore = present().Add(time.Minute) }, broker.ReasonSVIDNotYetValid},
		"a stranger":    {w.Stranger, agent(w.Stranger), func(*x509.Certificate) {}, broker.ReasonTrustDomain},
		"a false ID":    {w.Federated, id, func(*x509.Certificate) {}, broker.ReasonUntrusted},
	} {
		t.Run(name, func(t *testing.T) {
			template := svid(c.of)
			c.change(template)
			odd := newClient(t, s, protocol, agentTLS(w, issue(t, c.by, template).tls()))
			odd.ask(false).want(t, false, string(c.want))
		})
	}
}
