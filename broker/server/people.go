package server

import (
	"crypto/tls"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"connectrpc.com/connect"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/api/mayfly/v1/mayflyv1connect"
	"github.com/mayfly-security/mayfly/broker/signin"
)

// People is what the listener for people is made of.
type People struct {
	SignIn *signin.Manager // required
	// Certificate is what browsers are shown. It is asked for at each handshake,
	// so that a renewed one is used at once. Required.
	Certificate func(*tls.ClientHelloInfo) (*tls.Certificate, error)
	// URL is where people's browsers and programs reach the listener:
	// https://host[:port], without a path. Required.
	URL string
}

// people is the listener for people: the same services as for workloads, and
// the signing in. Who calls is said by a bearer token and by nothing else; a
// client certificate is not asked for, and cookies bind a browser to its sign-in
// and let nobody in.
type people struct {
	s        *Server
	signIn   *signin.Manager
	origin   string
	hsts     bool
	tls      *tls.Config
	door     *door
	http     *http.Server
	attempts *attempts
}

func (s *Server) newPeople(cfg People, options []connect.HandlerOption) (*people, error) {
	switch {
	case cfg.SignIn == nil:
		return nil, errors.New("server: People.SignIn is nil")
	case cfg.Certificate == nil:
		return nil, errors.New("server: People.Certificate is nil")
	}
	u, err := ParsePeopleURL(cfg.URL)
	if err != nil {
		return nil, err
	}
	p := &people{
		s: s, signIn: cfg.SignIn, origin: "https://" + u.Host, hsts: hasName(u.Hostname()),
		tls: &tls.Config{
			MinVersion: tls.VersionTLS12, NextProtos: []string{"h2", "http/1.1"},
			GetCertificate: cfg.Certificate, ClientAuth: tls.NoClientCert,
		},
		attempts: newAttempts(s.limits.Attempts, s.limits.Attempts*20),
	}
	p.door = s.newDoor(p.admit, true)
	mux := http.NewServeMux()
	s.handle(mux, options)
	mux.Handle(mayflyv1connect.NewSignInServiceHandler(signInService{p}, options...))
	mux.HandleFunc("GET "+pathBegin, p.begin)
	mux.HandleFunc("GET "+pathCallback, p.callback)
	mux.HandleFunc("POST "+pathAgree, p.agree)
	mux.HandleFunc("GET /{$}", p.about)
	p.http = s.newHTTP(p.secure(s.guard(p.door, mux)))
	return p, nil
}

// ParsePeopleURL checks the external address of the people listener.
func ParsePeopleURL(s string) (*url.URL, error) {
	u, err := url.Parse(s)
	if err != nil || u.Scheme != "https" || u.Host == "" || u.Hostname() == "" || u.User != nil ||
		u.RawQuery != "" || u.Fragment != "" || u.ForceQuery || strings.Trim(u.Path, "/") != "" || u.Host != strings.ToLower(u.Host) {
		return nil, errors.New("the address for people must be https://host or https://host:port, in lowercase and without a path")
	}
	if u.Port() == "443" {
		u.Host = strings.TrimSuffix(u.Host, ":443") // as browsers name the origin
	}
	u.Path = ""
	return u, nil
}

// RedirectURI is what is registered with the identity provider for a people
// listener at that address.
func RedirectURI(peopleURL string) (string, error) {
	u, err := ParsePeopleURL(peopleURL)
	if err != nil {
		return "", err
	}
	return "https://" + u.Host + pathCallback, nil
}

// hasName reports whether a host is one that browsers may be told to use HTTPS
// with for a year. For localhost that would hold for every other program there.
func hasName(host string) bool {
	_, err := netip.ParseAddr(host)
	return err != nil && host != "localhost" && !strings.HasSuffix(host, ".localhost")
}

// ServePeople answers people on ln, over TLS, until Shutdown; then it returns
// nil. It takes ln over.
func (s *Server) ServePeople(ln net.Listener) error {
	if s.people == nil {
		return errors.Join(errors.New("server: Config.People is nil"), ln.Close())
	}
	return s.serve(s.people.http, ln, s.people.tls)
}

// secure sets what browsers are to keep to, on every answer.
func (p *people) secure(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Content-Security-Policy", pagePolicy("'none'"))
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Referrer-Policy", "no-referrer")
		h.Set("Cross-Origin-Opener-Policy", "same-origin")
		h.Set("Cross-Origin-Resource-Policy", "same-origin")
		if p.hsts {
			h.Set("Strict-Transport-Security", "max-age=31536000")
		}
		next.ServeHTTP(w, r)
	})
}

// openProcedures are what one can call before one has signed in.
var openProcedures = []string{
	mayflyv1connect.SignInServiceGetSignInProcedure, mayflyv1connect.SignInServiceRedeemCodeProcedure,
	mayflyv1connect.SignInServiceStartDeviceProcedure, mayflyv1connect.SignInServicePollDeviceProcedure,
}

// admit finds out which person is calling. Without a token one can sign in, and
// nothing else.
func (p *people) admit(d *door, r *http.Request, now time.Time) (broker.Caller, error) {
	if !isPage(r) || r.URL.Path == pathAgree {
		// A browser says which site a request comes from. No other site has
		// business with the API, nor with a person's yes, whatever it may have
		// got hold of.
		o, site := r.Header.Values("Origin"), r.Header.Get("Sec-Fetch-Site")
		if len(o) > 1 || len(o) == 1 && o[0] != p.origin || site != "" && site != "same-origin" && site != "none" {
			return broker.Caller{}, broker.Refuse(broker.ReasonPermissionDenied, "the request comes from another site's page", "call the API from a program, or from the broker's own pages")
		}
	}
	if isPage(r) && !isVisit(r) {
		return broker.Caller{}, broker.Refuse(broker.ReasonPermissionDenied, "this page is no part of another", "begin again with `mayfly login`")
	}
	if isPage(r) || slices.Contains(openProcedures, r.URL.Path) {
		if !p.attempts.allow(addressOf(r), time.Now()) {
			return broker.Caller{}, broker.Refuse(broker.ReasonRateLimited, "too many sign-ins from this address", "try again in a few seconds")
		}
		return broker.Caller{}, nil
	}
	token, err := bearerToken(r)
	if err != nil {
		return broker.Caller{}, err
	}
	if !signin.IsSession(token) {
		// A session costs a look at the store. A token of the identity provider's
		// costs a signature, or the wait for a provider that is away: those who
		// show one wait for each other, and keep nobody out who has signed in.
		leave, err := d.enter(r)
		if err != nil {
			return broker.Caller{}, err
		}
		defer leave()
	}
	person, until, err := p.signIn.Authenticate(r.Context(), token)
	if err != nil {
		return broker.Caller{}, err
	}
	return broker.Caller{Person: &person, ValidUntil: until}, nil
}

// isVisit reports whether a browser goes to a page, as far as it says so (Fetch
// Metadata). As an image of somebody else's page ours would use up what its
// visitors may try.
func isVisit(r *http.Request) bool {
	mode, dest := r.Header.Get("Sec-Fetch-Mode"), r.Header.Get("Sec-Fetch-Dest")
	return (mode == "" || mode == "navigate") && (dest == "" || dest == "document")
}

// bearerToken reads the token of a request (RFC 6750, section 2.1). It is taken
// from the header alone: neither from a form nor from the address.
func bearerToken(r *http.Request) (string, error) {
	h := r.Header.Values("Authorization")
	if len(h) == 0 {
		return "", broker.Refuse(broker.ReasonUnauthenticated, "there is no bearer token", "sign in with `mayfly login`")
	}
	scheme, token, ok := strings.Cut(h[0], " ")
	if len(h) > 1 || !ok || !strings.EqualFold(scheme, "Bearer") || token == "" || strings.ContainsFunc(token, func(c rune) bool { return c <= ' ' || c > '~' }) {
		return "", broker.Refuse(broker.ReasonTokenInvalid, "the Authorization header holds no bearer token", `send "Authorization: Bearer" and the token`)
	}
	return token, nil
}

// challenge is the WWW-Authenticate header that goes with a refusal (RFC 6750,
// section 3; RFC 9470, section 3); empty for refusals that no other token helps
// against.
func challenge(err error) string {
	var e *broker.Error
	if !errors.As(err, &e) || Code(e.Reason) != connect.CodeUnauthenticated {
		return ""
	}
	b := strings.Builder{}
	b.WriteString(`Bearer realm="mayfly"`)
	param := func(name, value string) { b.WriteString(", " + name + `="` + quotable(value) + `"`) }
	switch e.Reason {
	case broker.ReasonUnauthenticated, broker.ReasonSignIn:
		return b.String() // no token was tried
	case broker.ReasonStepUp:
		param("error", string(broker.ReasonStepUp))
	default:
		param("error", "invalid_token")
	}
	param("error_description", e.Message)
	if e.StepUp.MaxAge > 0 {
		param("max_age", strconv.FormatInt(int64(e.StepUp.MaxAge/time.Second), 10))
	}
	if len(e.StepUp.ACR) > 0 {
		param("acr_values", strings.Join(e.StepUp.ACR, " "))
	}
	return b.String()
}

// quotable leaves what may stand between the quotes (RFC 6750, section 3).
func quotable(s string) string {
	return strings.Map(func(c rune) rune {
		if c < ' ' || c > '~' || c == '"' || c == '\\' {
			return '?'
		}
		return c
	}, s)
}

// strangerFrom names a caller who is nobody yet by where they come from, for
// the bounds of what one caller may have under way.
func strangerFrom(r *http.Request) broker.Principal {
	return broker.Principal("somebody at " + addressOf(r).String())
}

// addressOf is the network that a request comes from: an IPv4 address, or the
// 64 bits that one subscriber of IPv6 has to choose from.
func addressOf(r *http.Request) netip.Prefix {
	ap, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		return netip.Prefix{}
	}
	addr := ap.Addr().Unmap().WithZone("")
	bits := 32
	if addr.Is6() {
		bits = 64
	}
	prefix, err := addr.Prefix(bits)
	if err != nil {
		return netip.Prefix{}
	}
	return prefix
}
