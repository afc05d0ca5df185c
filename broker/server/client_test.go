package server_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"strings"
	"testing"

	"connectrpc.com/connect"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"google.golang.org/protobuf/proto"

	"github.com/mayfly-security/mayfly/attestation/devtrust"
	"github.com/mayfly-security/mayfly/broker"
	mayflyv1 "github.com/mayfly-security/mayfly/broker/api/mayfly/v1"
	"github.com/mayfly-security/mayfly/broker/api/mayfly/v1/mayflyv1connect"
)

// bundleOf is a trust domain's bundle, as it is whenever somebody looks.
type bundleOf struct{ *devtrust.Server }

func (b bundleOf) GetX509BundleForTrustDomain(spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	return b.Bundle().X509Bundle(), nil
}

// svid makes an X.509-SVID of a trust domain.
func svid(t *testing.T, trust *devtrust.Server, id spiffeid.ID, change ...func(*x509.Certificate)) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		URIs: []*url.URL{id.URL()}, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, BasicConstraintsValid: true,
	}
	for _, c := range change {
		c(template)
	}
	cert, err := trust.Issue(template, key.Public())
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key, Leaf: cert}
}

// protocols are the HTTP versions that every client of the API may speak.
var protocols = []string{"HTTP/1.1", "HTTP/2.0"}

// client is one identity over one HTTP version. It is for one goroutine.
type client struct {
	r         *rig
	protocol  string
	http      *http.Client
	transport *http.Transport
	tls       *tls.Config
	url       string // empty: the agents' listener
}

func (r *rig) client(id spiffeid.ID) *client {
	r.t.Helper()
	return r.clientWith(svid(r.t, r.trust, id), "HTTP/2.0")
}

// clientWith presents a certificate; the zero certificate means none.
func (r *rig) clientWith(cert tls.Certificate, protocol string) *client {
	r.t.Helper()
	config := tlsconfig.TLSClientConfig(bundleOf{r.trust}, tlsconfig.AuthorizeID(mayfly))
	if cert.Certificate != nil {
		config.Certificates = []tls.Certificate{cert}
	}
	return r.over(config, protocol)
}

func (r *rig) over(config *tls.Config, protocol string) *client {
	p := new(http.Protocols)
	p.SetHTTP1(protocol == "HTTP/1.1")
	p.SetHTTP2(protocol == "HTTP/2.0")
	c := &client{r: r, protocol: protocol, tls: config, transport: &http.Transport{TLSClientConfig: config.Clone(), Protocols: p}}
	c.http = &http.Client{Transport: c.transport, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	r.t.Cleanup(c.transport.CloseIdleConnections)
	return c
}

func (c *client) base() string {
	if c.url != "" {
		return c.url
	}
	return "https://" + c.r.addr
}

func (c *client) access(o ...connect.ClientOption) mayflyv1connect.AccessServiceClient {
	return mayflyv1connect.NewAccessServiceClient(c.http, c.base(), o...)
}
func (c *client) grants(o ...connect.ClientOption) mayflyv1connect.GrantServiceClient {
	return mayflyv1connect.NewGrantServiceClient(c.http, c.base(), o...)
}
func (c *client) incidents(o ...connect.ClientOption) mayflyv1connect.IncidentServiceClient {
	return mayflyv1connect.NewIncidentServiceClient(c.http, c.base(), o...)
}
func (c *client) audit(o ...connect.ClientOption) mayflyv1connect.AuditServiceClient {
	return mayflyv1connect.NewAuditServiceClient(c.http, c.base(), o...)
}

// answer is what a plain HTTPS request was answered.
type answer struct {
	status  int
	header  http.Header
	body    []byte
	detail  *mayflyv1.ErrorDetail // nil if there is none
	message string                // of the error
	reused  bool                  // the connection had carried a request before
	resumed bool                  // its TLS session was resumed
}

func (a answer) reason() broker.Reason { return broker.Reason(a.detail.GetReason()) }

// send makes one request as curl would.
func (c *client) send(req *http.Request) answer {
	c.r.t.Helper()
	a, err := c.try(req)
	if err != nil {
		c.r.t.Fatalf("%s %s: %v", req.Method, req.URL.Path, err)
	}
	return a
}

func (c *client) try(req *http.Request) (a answer, err error) {
	trace := &httptrace.ClientTrace{GotConn: func(i httptrace.GotConnInfo) { a.reused = i.Reused }}
	res, err := c.http.Do(req.WithContext(httptrace.WithClientTrace(bounded(c.r.t), trace)))
	if err != nil {
		return a, err
	}
	defer res.Body.Close()
	if res.Proto != c.protocol {
		return a, errors.New("answered over " + res.Proto)
	}
	if a.body, err = io.ReadAll(res.Body); err != nil {
		return a, err
	}
	a.status, a.header, a.resumed = res.StatusCode, res.Header, res.TLS.DidResume
	a.detail, a.message = detailOf(a.body)
	return a, nil
}

// detailOf reads an error of the Connect protocol.
func detailOf(body []byte) (*mayflyv1.ErrorDetail, string) {
	var e struct {
		Message string
		Details []struct{ Type, Value string }
	}
	if json.Unmarshal(body, &e) != nil {
		return nil, ""
	}
	for _, d := range e.Details {
		if d.Type != "mayfly.v1.ErrorDetail" {
			continue
		}
		raw, err := base64.RawStdEncoding.DecodeString(d.Value)
		detail := new(mayflyv1.ErrorDetail)
		if err == nil && proto.Unmarshal(raw, detail) == nil {
			return detail, e.Message
		}
	}
	return nil, e.Message
}

func request(t *testing.T, method, url, contentType string, body io.Reader) *http.Request {
	t.Helper()
	req, err := http.NewRequest(method, url, body)
	if err != nil {
		t.Fatal(err)
	}
	if contentType != "" {
		req.Header.Set("Content-Type", contentType)
	}
	return req
}

// post calls a method ("AccessService/WhoAmI") with JSON.
func (c *client) post(method, body string) answer {
	c.r.t.Helper()
	return c.send(request(c.r.t, "POST", c.base()+"/mayfly.v1."+method, "application/json", strings.NewReader(body)))
}

// introspect asks about a token, as a resource server does (RFC 7662).
func (c *client) introspect(token string) answer {
	c.r.t.Helper()
	form := url.Values{"token": {token}}.Encode()
	return c.send(request(c.r.t, "POST", c.base()+"/oauth2/introspect", "application/x-www-form-urlencoded", strings.NewReader(form)))
}

// active says what an introspection said, and fails the test if it said neither.
func (a answer) active(t *testing.T) bool {
	t.Helper()
	switch {
	case a.status != 200:
		t.Fatalf("introspection: %d %s", a.status, a.body)
	case bytes.Equal(bytes.TrimSpace(a.body), []byte(`{"active":false}`)):
		return false
	case !bytes.Contains(a.body, []byte(`"active":true`)):
		t.Fatalf("introspection: %s", a.body)
	}
	return true
}

// issue gets a lease by the API and fails the test if it does not.
func (c *client) issue(tool string) *mayflyv1.IssueLeaseResponse {
	c.r.t.Helper()
	return c.issueKeyed(tool, "")
}

func (c *client) issueKeyed(tool, key string) *mayflyv1.IssueLeaseResponse {
	c.r.t.Helper()
	res, err := c.access().IssueLease(bounded(c.r.t), connect.NewRequest(&mayflyv1.IssueLeaseRequest{Tool: tool, IdempotencyKey: key}))
	if err != nil {
		c.r.t.Fatalf("issuing %s: %v", tool, err)
	}
	return res.Msg
}

// open opens a window for the agent support, and fails the test if it cannot.
func (c *client) open(tools ...string) *mayflyv1.Incident {
	c.r.t.Helper()
	res, err := c.incidents().OpenIncident(bounded(c.r.t), connect.NewRequest(&mayflyv1.OpenIncidentRequest{
		Title: "something broke", Agents: []string{support.String()}, Tools: tools}))
	if err != nil {
		c.r.t.Fatalf("opening a window: %v", err)
	}
	return res.Msg
}

// refusal is the ErrorDetail of an RPC's error; nil if it has none.
func refusal(err error) *mayflyv1.ErrorDetail {
	var e *connect.Error
	if !errors.As(err, &e) {
		return nil
	}
	for _, d := range e.Details() {
		if v, err := d.Value(); err == nil {
			if detail, ok := v.(*mayflyv1.ErrorDetail); ok {
				return detail
			}
		}
	}
	return nil
}

func wantRefused(t *testing.T, what string, err error, want broker.Reason) {
	t.Helper()
	if got := broker.Reason(refusal(err).GetReason()); err == nil || got != want {
		t.Errorf("%s: %v (reason %q); want %s", what, err, got, want)
	}
}

func (a answer) wantRefused(t *testing.T, what string, status int, want broker.Reason) {
	t.Helper()
	if a.status != status || a.reason() != want {
		t.Errorf("%s: %d %q %s; want %d %s", what, a.status, a.reason(), a.body, status, want)
	}
	if a.detail.GetNext() == "" || a.message == "" || a.detail.GetCorrelationId() != a.header.Get("Mayfly-Correlation-Id") {
		t.Errorf("%s: the refusal lacks a sentence, a next step or the correlation ID: %s", what, a.body)
	}
}

// whoami makes the least request that there is.
func (c *client) whoami(ctx context.Context) error {
	_, err := c.access().WhoAmI(ctx, connect.NewRequest(&mayflyv1.WhoAmIRequest{}))
	return err
}

// listGrants returns the IDs of the open grants that the client sees.
func (c *client) listGrants(agent string) []string {
	c.r.t.Helper()
	res, err := c.grants().ListGrants(bounded(c.r.t), connect.NewRequest(&mayflyv1.ListGrantsRequest{Agent: agent}))
	if err != nil {
		c.r.t.Fatal(err)
	}
	var ids []string
	for _, g := range res.Msg.GetGrants() {
		ids = append(ids, g.GetId())
	}
	return ids
}
