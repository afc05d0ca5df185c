// Package devidp is a small OpenID provider with sample people, for `mayflyd
// dev`, demonstrations and tests. Whoever can open its page may be any of the
// people: it asks for no password. So it serves loopback alone, says on every
// page and in its discovery document (mayfly_dev) what it is, and a broker
// that is no `mayflyd dev` refuses it (attestation/oidc).
//
// It keeps to OpenID Connect Core 1.0: authorization code with PKCE S256,
// prompt, max_age and acr_values, device codes (RFC 8628), and the issuer in
// its answers (RFC 9207). A second sign-in of a browser is silent and has the
// old auth_time, as at a real provider, so that step-up has something to show.
// All its state is in memory, its key too.
package devidp

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"
)

// The classes of authentication (acr) that its page offers.
const (
	ACRPassword    = "urn:mayfly:dev:pwd" // as if with a password alone
	ACRSecurityKey = "urn:mayfly:dev:mfa" // as if with a security key as well
)

const (
	codeTime        = time.Minute      // for a code to be redeemed
	pageTime        = 10 * time.Minute // for a page's form to be sent, and for a device code
	sessionTime     = 12 * time.Hour
	tokenTime       = 5 * time.Minute
	maxTokenTime    = 12 * time.Hour
	defaultInterval = 5 * time.Second
	closeTime       = 2 * time.Second
	maxForm         = 64 << 10 // bytes
)

// Config says whom it knows, and where it serves.
type Config struct {
	// Listener is where it serves plain HTTP; its address makes the issuer,
	// http://127.0.0.1:PORT. Required, on loopback. The provider closes it.
	Listener net.Listener
	// People are whom its pages offer. At least one, each name once.
	People []Person
	// Clients are who may have people signed in. Nil: nobody; MintToken works.
	Clients []Client
	// Audience is that of minted tokens: what the broker calls itself. Empty:
	// Mint must name one.
	Audience string
	// DeviceInterval is the least time between two polls for a device code.
	// Zero: 5 s.
	DeviceInterval time.Duration
	// Now is the clock. Nil: time.Now.
	Now func() time.Time
}

// Person is one of the sample people.
type Person struct {
	Name     string   // the e-mail address, which tokens call verified. Required
	FullName string   // empty: no claim "name"
	Groups   []string // nil: in no group
}

// Client is a relying party.
type Client struct {
	ID           string   // required
	Secret       string   // empty: a public client
	RedirectURIs []string // compared exactly. Nil: device codes only
}

// Provider is a running provider.
type Provider struct {
	config  Config
	issuer  string
	host    string
	key     jose.JSONWebKey // private
	server  *http.Server
	served  chan struct{}
	closing sync.Once

	mu       sync.Mutex
	pages    shelf[page]    // forms that were shown, by their ID
	sessions shelf[session] // signed-in browsers, by their cookie
	codes    shelf[code]
	devices  shelf[*device] // by device code
}

// New starts a provider. The caller closes it.
func New(config Config) (*Provider, error) {
	if err := config.check(); err != nil {
		return nil, fmt.Errorf("dev identity provider: %w", err)
	}
	if config.Now == nil {
		config.Now = time.Now
	}
	if config.DeviceInterval == 0 {
		config.DeviceInterval = defaultInterval
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("dev identity provider: making its key: %w", err)
	}
	private := jose.JSONWebKey{Key: key, KeyID: random()[:16], Algorithm: string(jose.ES256), Use: "sig"}
	host := config.Listener.Addr().String()
	p := &Provider{
		config: config, host: host, issuer: "http://" + host,
		key: private, served: make(chan struct{}),
	}
	p.server = &http.Server{
		Handler: p.handler(), ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second,
		WriteTimeout: 10 * time.Second, IdleTimeout: time.Minute, MaxHeaderBytes: 64 << 10,
	}
	go func() {
		defer close(p.served)
		_ = p.server.Serve(config.Listener) // it ends with Close; before that, whoever asks sees that nobody answers
	}()
	return p, nil
}

func (c Config) check() error {
	if c.Listener == nil {
		return errors.New("there is no listener")
	}
	if a, ok := c.Listener.Addr().(*net.TCPAddr); !ok || !a.IP.IsLoopback() {
		return fmt.Errorf("it serves people without passwords, and so loopback alone, not %s", c.Listener.Addr())
	}
	if len(c.People) == 0 {
		return errors.New("there are no people")
	}
	names := map[string]bool{}
	for _, p := range c.People {
		if p.Name == "" || names[p.Name] {
			return fmt.Errorf("the person %q has no name, or is there twice", p.Name)
		}
		names[p.Name] = true
	}
	ids := map[string]bool{}
	for _, client := range c.Clients {
		if client.ID == "" || ids[client.ID] {
			return fmt.Errorf("the client %q has no ID, or is there twice", client.ID)
		}
		ids[client.ID] = true
		for _, uri := range client.RedirectURIs {
			if u, err := url.Parse(uri); err != nil || u.Host == "" || u.Fragment != "" || u.Scheme != "https" && u.Scheme != "http" {
				return fmt.Errorf("client %s: %q is no redirect URI", client.ID, uri)
			}
		}
	}
	if c.DeviceInterval < 0 {
		return fmt.Errorf("the device interval is %s", c.DeviceInterval)
	}
	return nil
}

// Issuer is its URL.
func (p *Provider) Issuer() string { return p.issuer }

// Close ends it. It may be called again.
func (p *Provider) Close() (err error) {
	p.closing.Do(func() {
		ctx, cancel := context.WithTimeout(context.Background(), closeTime)
		defer cancel()
		if err = p.server.Shutdown(ctx); err != nil {
			err = errors.Join(err, p.server.Close())
		}
		<-p.served
	})
	return err
}

func (p *Provider) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", p.home)
	mux.HandleFunc("GET /.well-known/openid-configuration", p.discovery)
	mux.HandleFunc("GET /jwks", p.jwks)
	mux.HandleFunc("GET /authorize", p.authorize)
	mux.HandleFunc("GET /device", p.verification)
	mux.HandleFunc("POST /choose", p.choose)
	mux.HandleFunc("POST /sign-out", p.signOut)
	mux.HandleFunc("POST /token", p.token)
	mux.HandleFunc("POST /device_authorization", p.deviceAuthorization)
	mux.HandleFunc("POST /mint", p.mint)
	// A browser's form from another origin is refused here already; the forms'
	// own IDs, bound to the browser, are the second lock.
	guarded := http.NewCrossOriginProtection().Handler(mux)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Host != p.host { // a name that somebody else's DNS points here
			http.Error(w, "this is "+p.issuer, http.StatusMisdirectedRequest)
			return
		}
		w.Header().Set("Cache-Control", "no-store")
		w.Header().Set("X-Content-Type-Options", "nosniff")
		r.Body = http.MaxBytesReader(w, r.Body, maxForm)
		guarded.ServeHTTP(w, r)
	})
}

func (p *Provider) discovery(w http.ResponseWriter, _ *http.Request) {
	writeJSON(w, http.StatusOK, map[string]any{
		"issuer":                                         p.issuer,
		"authorization_endpoint":                         p.issuer + "/authorize",
		"token_endpoint":                                 p.issuer + "/token",
		"device_authorization_endpoint":                  p.issuer + "/device_authorization",
		"jwks_uri":                                       p.issuer + "/jwks",
		"response_types_supported":                       []string{"code"},
		"response_modes_supported":                       []string{"query"},
		"grant_types_supported":                          []string{"authorization_code", deviceGrant},
		"subject_types_supported":                        []string{"public"},
		"id_token_signing_alg_values_supported":          []jose.SignatureAlgorithm{jose.ES256},
		"token_endpoint_auth_methods_supported":          []string{"client_secret_basic", "client_secret_post", "none"},
		"code_challenge_methods_supported":               []string{"S256"},
		"scopes_supported":                               []string{"openid", "email", "profile", "groups"},
		"claims_supported":                               []string{"sub", "email", "email_verified", "name", "groups", "auth_time", "acr", "amr"},
		"acr_values_supported":                           []string{ACRPassword, ACRSecurityKey},
		"prompt_values_supported":                        []string{"none", "login", "select_account"},
		"authorization_response_iss_parameter_supported": true,
		"claims_parameter_supported":                     false,
		"request_parameter_supported":                    false,
		"request_uri_parameter_supported":                false,
		"mayfly_dev":                                     true,
	})
}

func (p *Provider) jwks(w http.ResponseWriter, _ *http.Request) {
	writeJSON(w, http.StatusOK, jose.JSONWebKeySet{Keys: []jose.JSONWebKey{p.key.Public()}})
}

func (p *Provider) client(id string) (Client, bool) {
	i := slices.IndexFunc(p.config.Clients, func(c Client) bool { return c.ID == id })
	if i < 0 {
		return Client{}, false
	}
	return p.config.Clients[i], true
}

func (p *Provider) person(name string) (Person, bool) {
	i := slices.IndexFunc(p.config.People, func(o Person) bool { return o.Name == name })
	if i < 0 {
		return Person{}, false
	}
	return p.config.People[i], true
}

// subject is the person's sub: the same at each start, and not their name.
func (o Person) subject() string {
	sum := sha256.Sum256([]byte("mayfly dev person\x00" + o.Name))
	return "dev-" + hex.EncodeToString(sum[:10])
}

// random is 256 bits that nobody guesses.
func random() string {
	var b [32]byte
	rand.Read(b[:])
	return hex.EncodeToString(b[:])
}

// authentication is how and when somebody signed in.
type authentication struct {
	person Person
	at     time.Time
	acr    string
}

// fits reports whether a is fresh and strong enough for what is asked.
func (a authentication) fits(now time.Time, maxAge *time.Duration, acr []string) bool {
	return (maxAge == nil || now.Sub(a.at) <= *maxAge && *maxAge > 0) && (len(acr) == 0 || slices.Contains(acr, a.acr))
}

func words(s string) []string { return strings.Fields(s) }
