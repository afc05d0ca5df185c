package client

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net/http"
	"os"

	"github.com/mayfly-security/mayfly/broker"
)

// fieldToken is the field of a token's Secret.
const fieldToken = "token"

// NewToken makes a Secret of a token for Config.Token; empty gives the zero Secret.
func NewToken(token string) broker.Secret {
	if token == "" {
		return broker.Secret{}
	}
	return broker.NewSecret(map[string]string{fieldToken: token})
}

// newPerson makes a client that comes as a person.
func newPerson(cfg Config) (*Client, error) {
	if cfg.PeopleAddr == "" {
		return nil, broker.Refusef(broker.ReasonInvalidArgument, fmt.Sprintf("set %s to https://host:port of the broker's listener for people", EnvPeopleAddr),
			"there is no address to come to as a person")
	}
	addr, err := parseAddr(cfg.PeopleAddr, EnvPeopleAddr)
	if err != nil {
		return nil, err
	}
	token, _ := cfg.Token.Reveal(fieldToken)
	if !tokenForm(token) {
		return nil, broker.Refuse(broker.ReasonTokenInvalid, "the token is none: it has characters that no token has",
			fmt.Sprintf("sign in again with `mayfly login`, or correct %s", EnvToken))
	}
	config := &tls.Config{MinVersion: tls.VersionTLS13}
	if cfg.PeopleCA != "" {
		if config.RootCAs, err = authorities(cfg.PeopleCA); err != nil {
			return nil, err
		}
	}
	c := &Client{as: AsPerson, addr: addr, timeout: cfg.Timeout, transport: &bearer{token: cfg.Token, inner: newHTTP(config)}}
	c.serve()
	return c, nil
}

// tokenForm reports whether a token can stand in a header: printable ASCII
// without spaces (RFC 6750, section 2.1, takes less).
func tokenForm(s string) bool {
	for i := range len(s) {
		if s[i] <= ' ' || s[i] >= 0x7f {
			return false
		}
	}
	return len(s) <= 1<<14
}

func authorities(file string) (*x509.CertPool, error) {
	pem, err := os.ReadFile(file)
	if err != nil {
		return nil, identityError(err, fmt.Sprintf("correct %s", EnvPeopleCA), "the authorities of the people listener cannot be read: %s", clean(err.Error()))
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, identityError(nil, fmt.Sprintf("correct %s", EnvPeopleCA), "%s holds no certificate in PEM form", clean(file))
	}
	return pool, nil
}

// bearer sends the token with every request (RFC 6750). It goes to the one
// address of the client and nowhere else: redirects are not followed.
type bearer struct {
	token broker.Secret
	inner *http.Transport
}

func (b *bearer) RoundTrip(r *http.Request) (*http.Response, error) {
	if token, ok := b.token.Reveal(fieldToken); ok {
		r = r.Clone(r.Context())
		r.Header.Set("Authorization", "Bearer "+token)
	}
	return b.inner.RoundTrip(r)
}

func (b *bearer) close() { b.inner.CloseIdleConnections() }
