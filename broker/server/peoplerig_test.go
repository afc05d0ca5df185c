package server_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"connectrpc.com/connect"

	"github.com/mayfly-security/mayfly/attestation"
	"github.com/mayfly-security/mayfly/attestation/devidp"
	"github.com/mayfly-security/mayfly/attestation/oidc"
	"github.com/mayfly-security/mayfly/attestation/oidctest"
	mayflyv1 "github.com/mayfly-security/mayfly/broker/api/mayfly/v1"
	"github.com/mayfly-security/mayfly/broker/api/mayfly/v1/mayflyv1connect"
	"github.com/mayfly-security/mayfly/broker/server"
	"github.com/mayfly-security/mayfly/broker/signin"
)

const (
	ada      = "ada@acme.test"
	finn     = "finn@acme.test"
	olga     = "olga@acme.test"
	loopback = "http://127.0.0.1:54321/callback"
	verifier = "a-verifier-of-the-program-that-is-long-enough-0123456789"
	audience = "https://mayfly.acme.test"
	// userAudience is that of the tokens of users that agents show.
	userAudience = "https://mayfly.acme.test/on-behalf-of"
)

// peopleCatalog is what the catalog has more where people come in: a tool that
// ada's group decides about, with a fresh sign-in, and olga as an operator.
const peopleCatalog = `
approval_rules:
  - name: leads
    need: [{group: support-leads}]
    never: [requester]
    reauthenticate_within: 5m
    max_duration: 1h
`

// peopleRig is what the listener for people stands on: a real identity provider
// with sample people, and a certificate of an authority that its clients trust.
type peopleRig struct {
	idp      *devidp.Provider
	provider *oidc.Provider
	shown    attestation.IdentityProvider // to the broker, if it is not provider
	signIn   *signin.Manager
	cert     tls.Certificate
	roots    *x509.CertPool
	ln       net.Listener
	url      string
}

// withPeople lets people in.
func withPeople(r *rig) {
	r.people = &peopleRig{}
	r.yaml = strings.Replace(r.yaml, "members: [spiffe://acme.test/operator/sam]", "members: [spiffe://acme.test/operator/sam]\n    people: ["+olga+"]", 1)
	r.yaml = strings.Replace(r.yaml, "  - name: db.read\n", "  - name: db.asked\n    provider: databases\n    description: reads when ada's group agrees\n    approval: leads\n    max_ttl: 15m\n    scope: {}\n  - name: db.read\n", 1)
	r.yaml += peopleCatalog
	r.people.cert, r.people.roots = authority(r)
}

func authority(r *rig) (tls.Certificate, *x509.CertPool) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		r.t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		DNSNames: []string{"localhost"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		r.t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		r.t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(leaf)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, roots
}

// open is called at each start of the broker; the identity provider stays.
func (p *peopleRig) open(r *rig) *server.People {
	addr := "127.0.0.1:0"
	if p.url != "" {
		addr = "127.0.0.1:" + p.url[strings.LastIndexByte(p.url, ':')+1:]
	}
	var err error
	if p.ln, err = net.Listen("tcp", addr); err != nil {
		r.t.Fatal(err)
	}
	p.url = "https://localhost:" + strconv.Itoa(p.ln.Addr().(*net.TCPAddr).Port)
	if p.idp == nil {
		redirect, err := server.RedirectURI(p.url)
		if err != nil {
			r.t.Fatal(err)
		}
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			r.t.Fatal(err)
		}
		p.idp, err = devidp.New(devidp.Config{
			Listener: ln, Audience: audience, Now: r.wall,
			People: []devidp.Person{
				{Name: ada, Groups: []string{"support-leads"}}, {Name: finn, Groups: []string{"finance"}}, {Name: olga},
			},
			Clients: []devidp.Client{{ID: "mayfly", RedirectURIs: []string{redirect}}},
		})
		if err != nil {
			r.t.Fatal(err)
		}
		r.t.Cleanup(func() { p.idp.Close() })
		p.provider, err = oidc.New(oidc.Config{Issuer: p.idp.Issuer(), ClientID: "mayfly", RedirectURL: redirect, Audience: audience, UserAudience: userAudience, Sample: true})
		if err != nil {
			r.t.Fatal(err)
		}
	}
	shown := p.shown
	if shown == nil {
		shown = p.provider
	}
	p.signIn, err = signin.New(signin.Config{
		Store: r.db, Provider: shown, Log: r.log(), Now: r.engine.Now, Late: r.engine.Late, PersonSeen: r.engine.PersonSeen, Metrics: r.metrics,
	})
	if err != nil {
		r.t.Fatal(err)
	}
	return &server.People{SignIn: p.signIn, URL: p.url, Certificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return &p.cert, nil }}
}

// withToken sends a bearer token with each request.
type withToken struct {
	token string
	inner http.RoundTripper
}

func (w withToken) RoundTrip(r *http.Request) (*http.Response, error) {
	if w.token != "" && r.Header.Get("Authorization") == "" {
		r = r.Clone(r.Context())
		r.Header.Set("Authorization", "Bearer "+w.token)
	}
	return w.inner.RoundTrip(r)
}

// person is a program of a person's, with a token; empty for none.
func (r *rig) person(token string) *client { return r.personOver(token, "HTTP/2.0") }

func (r *rig) personOver(token, protocol string) *client {
	r.t.Helper()
	c := r.over(&tls.Config{RootCAs: r.people.roots}, protocol)
	c.url = r.people.url
	c.http.Transport = withToken{token, c.transport}
	return c
}

func (c *client) signIn() mayflyv1connect.SignInServiceClient {
	return mayflyv1connect.NewSignInServiceClient(c.http, c.base())
}

func (c *client) requests(o ...connect.ClientOption) mayflyv1connect.RequestServiceClient {
	return mayflyv1connect.NewRequestServiceClient(c.http, c.base(), o...)
}

func (c *client) operations(o ...connect.ClientOption) mayflyv1connect.OperatorServiceClient {
	return mayflyv1connect.NewOperatorServiceClient(c.http, c.base(), o...)
}

// browser is a new browser that stops where a program on the machine listens.
func (r *rig) browser() *oidctest.Browser {
	b := oidctest.New(&http.Transport{TLSClientConfig: &tls.Config{RootCAs: r.people.roots}})
	b.StopAt(loopback)
	return b
}

func challengeOf(verifier string) string {
	sum := sha256.Sum256([]byte(verifier))
	return base64.RawURLEncoding.EncodeToString(sum[:])
}

// beginURL is where a person's program sends the browser; more is added or taken over.
func (r *rig) beginURL(more ...string) string {
	q := url.Values{"redirect_uri": {loopback}, "state": {"the-state"}, "code_challenge": {challengeOf(verifier)}, "code_challenge_method": {"S256"}}
	for i := 0; i+1 < len(more); i += 2 {
		q.Set(more[i], more[i+1])
	}
	return r.people.url + "/signin?" + q.Encode()
}

// walk signs a person in with a browser, and returns what the program is told.
func (r *rig) walk(b *oidctest.Browser, person string, more ...string) url.Values {
	r.t.Helper()
	page, err := b.Walk(bounded(r.t), r.beginURL(more...), map[string]string{"person": person, "how": "key"})
	if err != nil {
		r.t.Fatal(err)
	}
	if !page.Stopped || !strings.HasPrefix(page.URL.String(), loopback+"?") {
		r.t.Fatalf("the browser is at %s: %d %s", page.URL, page.Status, page.Body)
	}
	q := page.URL.Query()
	if q.Get("state") != "the-state" {
		r.t.Fatalf("the program's state did not come back: %v", q)
	}
	return q
}

// login is a whole sign-in by browser.
func (r *rig) login(person string) *mayflyv1.Session {
	r.t.Helper()
	return r.redeem(r.walk(r.browser(), person).Get("code"))
}

func (r *rig) redeem(code string) *mayflyv1.Session {
	r.t.Helper()
	res, err := r.person("").signIn().RedeemCode(bounded(r.t), connect.NewRequest(&mayflyv1.RedeemCodeRequest{
		Code: code, CodeVerifier: verifier, RedirectUri: loopback}))
	if err != nil {
		r.t.Fatal(err)
	}
	return res.Msg
}

// mint makes a token of a person's, of the identity provider.
func (r *rig) mint(m devidp.Mint) string {
	r.t.Helper()
	token, err := r.people.idp.MintToken(m)
	if err != nil {
		r.t.Fatal(err)
	}
	return token
}
