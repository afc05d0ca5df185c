package vault

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/mayfly-security/mayfly/attestation"
)

const (
	maxAnswer   = 1 << 20 // bytes of one answer
	dialTimeout = 5 * time.Second
	maxIdle     = 256 // connections that are kept open between calls
)

// client talks to one Vault. It repeats nothing by itself, follows no
// redirect, and takes nothing from the environment: no VAULT_TOKEN, no proxy.
// Each call names the token that it is made with.
type client struct {
	keep  *api.Client // keeps connections open; for calls that may be made twice
	once  *api.Client // keeps connections open, and sends what it is given once: for reads that make something
	fresh *api.Client // a connection for each call
	login *api.Client // as fresh, and shows the broker's certificate where cert auth is used

	idle *http.Transport
}

// endpoint is what a client is made of.
type endpoint struct {
	address    string
	namespace  string // empty: none
	caFile     string // empty: the system's authorities
	serverName string // empty: the address's host
	identity   attestation.LoginSource
	certLogin  bool // log in with identity's certificate
}

func newClient(e endpoint) (*client, error) {
	trust := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: e.serverName}
	if e.caFile != "" {
		pem, err := os.ReadFile(e.caFile)
		if err != nil {
			return nil, fmt.Errorf("reading ca_file: %w", err)
		}
		trust.RootCAs = x509.NewCertPool()
		if !trust.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("reading ca_file %s: there is no certificate in it", e.caFile)
		}
	}
	shown := trust.Clone()
	if e.certLogin {
		shown.GetClientCertificate = e.identity.ClientCertificate
	}
	c := &client{idle: newTransport(trust, false)}
	for _, each := range []struct {
		into      **api.Client
		transport http.RoundTripper
	}{{&c.keep, c.idle}, {&c.once, once{c.idle}}, {&c.fresh, newTransport(trust, true)}, {&c.login, newTransport(shown, true)}} {
		made, err := newAPI(e, each.transport)
		if err != nil {
			return nil, err
		}
		*each.into = made
	}
	return c, nil
}

// newTransport speaks HTTP/1.1: HTTP/2 would put every call on one connection,
// and has rules of its own about repeating requests.
func newTransport(config *tls.Config, fresh bool) *http.Transport {
	return &http.Transport{
		Proxy:                  nil, // the environment's proxies would see tokens
		DialContext:            (&net.Dialer{Timeout: dialTimeout}).DialContext,
		TLSClientConfig:        config.Clone(),
		TLSHandshakeTimeout:    dialTimeout,
		TLSNextProto:           map[string]func(string, *tls.Conn) http.RoundTripper{},
		DisableKeepAlives:      fresh,
		DisableCompression:     true, // a bound on bytes is then one on memory
		MaxIdleConns:           maxIdle,
		MaxIdleConnsPerHost:    maxIdle,
		IdleConnTimeout:        90 * time.Second,
		MaxResponseHeaderBytes: 64 << 10,
	}
}

// newAPI makes one api.Client. api.NewClient reads the environment whatever it
// is given (token, namespace, headers), so each of these is set again.
func newAPI(e endpoint, transport http.RoundTripper) (*api.Client, error) {
	c, err := api.NewClient(&api.Config{
		Address: e.address,
		HttpClient: &http.Client{
			Transport:     bounded{transport},
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
		MaxRetries:       0,
		CheckRetry:       func(_ context.Context, _ *http.Response, err error) (bool, error) { return false, err },
		DisableRedirects: true, // a redirect would take a token to another host
	})
	if err != nil {
		return nil, fmt.Errorf("making the client of Vault (it also reads the VAULT_ variables of the environment, which must at least be well formed): %w", err)
	}
	header := http.Header{api.RequestHeaderName: {"true"}}
	if e.namespace != "" {
		header.Set(api.NamespaceHeaderName, e.namespace)
	}
	c.SetHeaders(header)
	c.ClearToken()
	c.SetWrappingLookupFunc(func(string, string) string { return "" })
	return c, nil
}

// once sends each request once. net/http repeats a GET by itself when a
// connection that was kept open dies before the answer (http.Transport, "retries
// a request"), and Vault then makes a second credential. It repeats none that
// has a body which it cannot have again, be it an empty one.
type once struct{ http.RoundTripper }

func (o once) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.WithContext(r.Context()) // a copy
	r.GetBody = nil
	if r.Body == nil || r.Body == http.NoBody {
		r.Body = emptyBody{}
	}
	return o.RoundTripper.RoundTrip(r)
}

// emptyBody is a body without a byte. A GET with it goes out as one without.
type emptyBody struct{}

func (emptyBody) Read([]byte) (int, error) { return 0, io.EOF }
func (emptyBody) Close() error             { return nil }

// bounded limits how much of an answer is read.
type bounded struct{ http.RoundTripper }

var errTooLarge = fmt.Errorf("the answer is larger than %d bytes", maxAnswer)

func (b bounded) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := b.RoundTripper.RoundTrip(r)
	if err == nil {
		resp.Body = &boundedBody{resp.Body, maxAnswer}
	}
	return resp, err
}

type boundedBody struct {
	io.ReadCloser
	left int
}

func (b *boundedBody) Read(p []byte) (int, error) {
	if b.left <= 0 {
		return 0, errTooLarge
	}
	n, err := b.ReadCloser.Read(p[:min(len(p), b.left)])
	b.left -= n
	return n, err
}

// request is one call.
type request struct {
	what  string // for people: "creating the lease's token"
	path  string
	token string
	body  any            // nil: a GET; else a PUT of its JSON
	query map[string]any // of a GET
	quiet bool           // the answer holds a secret: nothing of one that is malformed may be told
}

// do makes one call, once. The Secret is nil where Vault answers nothing
// (204). Every error is a *fault. ctx bounds the call with all of its answer.
func do(ctx context.Context, c *api.Client, r request) (*api.Secret, error) {
	c = c.WithRequestCallbacks(func(q *api.Request) { q.ClientToken = r.token })
	var resp *api.Response
	var err error
	if r.body == nil {
		query := make(map[string][]string, len(r.query))
		for name, value := range r.query {
			query[name] = []string{fmt.Sprint(value)}
		}
		resp, err = c.Logical().ReadRawWithDataWithContext(ctx, r.path, query)
	} else {
		var body []byte
		if body, err = json.Marshal(r.body); err != nil {
			return nil, &fault{kind: broken, what: r.what, err: err}
		}
		resp, err = c.Logical().WriteRawWithContext(ctx, r.path, body)
	}
	if resp != nil {
		defer resp.Body.Close()
	}
	if err != nil {
		return nil, faultOf(ctx, r, err)
	}
	if resp.StatusCode >= 300 {
		return nil, &fault{kind: away, what: r.what, status: resp.StatusCode,
			err: fmt.Errorf("the answer sends to another node, at %q, which is not followed: give the address of a load balancer that finds the active node", resp.Header.Get("Location"))}
	}
	raw, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, faultOf(ctx, r, err)
	}
	if len(bytes.TrimSpace(raw)) == 0 {
		return nil, nil
	}
	secret, err := api.ParseSecret(bytes.NewReader(raw))
	if err != nil {
		// The decoder's error can hold a piece of the answer.
		return nil, &fault{kind: cut, what: r.what, status: resp.StatusCode, err: errors.New("the answer is cut or malformed")}
	}
	return secret, nil
}

// again makes a call that may be made twice without harm: where the answer was
// lost it is made once more, on another connection.
func (c *client) again(ctx context.Context, r request) (*api.Secret, error) {
	secret, err := do(ctx, c.keep, r)
	if kindOf(err) == cut && ctx.Err() == nil {
		return do(ctx, c.fresh, r)
	}
	return secret, err
}

// close gives up the connections that are open.
func (c *client) close() { c.idle.CloseIdleConnections() }
