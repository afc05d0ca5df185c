package main

import (
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/mayfly-security/mayfly/attestation/oidc"
	"github.com/mayfly-security/mayfly/broker/server"
	"github.com/mayfly-security/mayfly/broker/signin"
)

// peopleSection is the listener for people, in the configuration file.
type peopleSection struct {
	URL              string           `yaml:"url"`               // where people's browsers and programs reach it, https://host[:port]; required
	Listen           string           `yaml:"listen"`            // where it listens; 127.0.0.1:8446
	TLS              certificateFiles `yaml:"tls"`               // the certificate that browsers are shown; required
	SessionTTL       time.Duration    `yaml:"session_ttl"`       // how long a session lasts, 1m to 12h; 1h
	IdentityProvider identityProvider `yaml:"identity_provider"` // who signs people in; required
}

// certificateFiles name a certificate. They are read again when they change.
type certificateFiles struct {
	Certificate string `yaml:"certificate"` // file, PEM: the certificate, then its chain; required
	Key         string `yaml:"key"`         // file, PEM: its private key, readable by nobody but its owner and group; required
}

// identityProvider is the OpenID provider that signs people in. The broker is
// registered there as a client, with the redirect URI URL/signin/callback.
type identityProvider struct {
	Issuer           string   `yaml:"issuer"`             // its URL, exactly as its discovery document has it; required
	ClientID         string   `yaml:"client_id"`          // the broker's there; required
	ClientSecretFile string   `yaml:"client_secret_file"` // file with the client's secret, readable by its owner alone, read at each use; a public client
	Audience         string   `yaml:"audience"`           // the broker's alone, in tokens of the provider's that people show it; such tokens are refused
	UserAudience     string   `yaml:"user_audience"`      // the broker's alone and another, in tokens of users that agents show it; agents act for nobody
	GroupsClaim      string   `yaml:"groups_claim"`       // the claim with a person's groups; groups
	NameClaim        string   `yaml:"name_claim"`         // the claim that people are called by, which nobody can choose for themselves; email, if it is verified
	Scopes           []string `yaml:"scopes"`             // asked for at a sign-in, openid among them; openid, email, profile, and groups where the provider knows it
	CAFile           string   `yaml:"ca_file"`            // file, PEM: the authorities that the provider's certificate is judged by; the system's
}

// peopleSettings are what the listener for people is started with.
type peopleSettings struct {
	url         string
	listen      string
	ln          net.Listener // nil: listen is listened on
	certificate func(*tls.ClientHelloInfo) (*tls.Certificate, error)
	sessionTTL  time.Duration
	provider    *oidc.Provider
}

const minSessionTTL = time.Minute

// check turns the section into settings. fail takes what is wrong, by field.
func (p peopleSection) check(relative func(string) string, log *slog.Logger, fail func(field, format string, args ...any)) *peopleSettings {
	s := &peopleSettings{listen: p.Listen, sessionTTL: p.SessionTTL}
	if s.listen == "" {
		s.listen = "127.0.0.1:8446"
	}
	redirect := ""
	if u, err := server.ParsePeopleURL(p.URL); err != nil {
		fail("people.url", "url is %q; %v", p.URL, err)
	} else {
		s.url = "https://" + u.Host
		redirect, _ = server.RedirectURI(p.URL) // it was just parsed
	}
	if p.SessionTTL != 0 && (p.SessionTTL < minSessionTTL || p.SessionTTL > signin.MaxSessionTTL) {
		fail("people.session_ttl", "session_ttl is %s; it is from %s to %s", p.SessionTTL, minSessionTTL, signin.MaxSessionTTL)
	}
	cert := &certificate{certFile: relative(p.TLS.Certificate), keyFile: relative(p.TLS.Key), log: log}
	if p.TLS.Certificate == "" || p.TLS.Key == "" {
		fail("people.tls", "tls needs certificate and key: browsers must be shown one that they accept")
	} else if err := cert.load(time.Now()); err != nil {
		fail("people.tls", "the certificate cannot be used: %v", err)
	} else if u, err := url.Parse(s.url); s.url != "" && err == nil {
		if err := cert.now.Leaf.VerifyHostname(u.Hostname()); err != nil {
			fail("people.tls.certificate", "the certificate is not for the host of people.url: %v", err)
		}
	}
	s.certificate = cert.get
	ip := p.IdentityProvider
	switch {
	case ip.Issuer == "":
		fail("people.identity_provider", "issuer is missing: say who signs people in")
	case ip.ClientID == "":
		fail("people.identity_provider", "client_id is missing: say how the broker is registered there")
	case len(ip.Scopes) > 0 && !slices.Contains(ip.Scopes, "openid"):
		fail("people.identity_provider.scopes", `scopes must hold "openid"`)
	default:
		var err error
		s.provider, err = oidc.New(oidc.Config{
			Issuer: ip.Issuer, ClientID: ip.ClientID, ClientSecretFile: relative(ip.ClientSecretFile), RedirectURL: redirect,
			Audience: ip.Audience, UserAudience: ip.UserAudience, Scopes: ip.Scopes, GroupsClaim: ip.GroupsClaim, NameClaim: ip.NameClaim, CAFile: relative(ip.CAFile),
		})
		if err != nil {
			fail("people.identity_provider", "%s", strings.TrimPrefix(err.Error(), "identity provider: "))
		}
	}
	return s
}

// certificate is a certificate of files that are read again when they change.
type certificate struct {
	certFile, keyFile string
	log               *slog.Logger

	mu    sync.Mutex
	asked time.Time // when the files were last looked at
	seen  [2]fileState
	now   *tls.Certificate
}

// fileState is what tells a changed file.
type fileState struct {
	modified time.Time
	size     int64
}

// certificateEvery is how often the files are looked at.
const certificateEvery = time.Second

func (c *certificate) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if now := time.Now(); now.Sub(c.asked) >= certificateEvery {
		if err := c.load(now); err != nil {
			// A half-written renewal must not keep people out.
			c.log.Error("reading the certificate for people again; the present one stays", "error", err)
		}
	}
	return c.now, nil
}

// load reads the files if they have changed.
func (c *certificate) load(now time.Time) error {
	c.asked = now
	var seen [2]fileState
	for i, f := range []string{c.certFile, c.keyFile} {
		info, err := os.Stat(f)
		if err != nil {
			return err
		}
		if i == 1 && info.Mode().Perm()&0o007 != 0 {
			return fmt.Errorf("everybody on this machine can use the key %s: chmod o= it", f)
		}
		seen[i] = fileState{info.ModTime(), info.Size()}
	}
	if c.now != nil && seen == c.seen {
		return nil
	}
	pair, err := tls.LoadX509KeyPair(c.certFile, c.keyFile)
	if err != nil {
		return err
	}
	if pair.Leaf == nil {
		return errors.New("the certificate file holds no certificate")
	}
	if c.now != nil {
		c.log.Info("the certificate for people was exchanged", "until", pair.Leaf.NotAfter.UTC().Format(time.RFC3339))
	}
	c.now, c.seen = &pair, seen
	return nil
}
