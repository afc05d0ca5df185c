package signin

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/mayfly-security/mayfly/broker"
)

// Start is what the person's program asks for when it sends the browser here.
type Start struct {
	RedirectURI string // where the browser brings the code: loopback alone
	State       string // given back with the code, for the program to compare
	Challenge   string // S256 of the program's verifier (RFC 7636, section 4.2)
	Need        broker.StepUp
	// Browser is the secret that binds the browser, if it has one from before.
	Browser string
	// From is the network that the request comes from. Where there is no room for
	// all, whoever has begun the most makes some.
	From string
}

// Begun is a sign-in that has begun.
type Begun struct {
	URL     string // the identity provider's, for the browser to go to
	Browser string // the secret for the browser to keep, and to show when it comes back
}

// Return is what the browser brings back from the identity provider.
type Return struct {
	State, Code, Issuer, Error string
	Browser                    string // the secret that Begun gave it
}

// flow is one sign-in by browser.
type flow struct {
	redirectURI, state, challenge string
	need                          broker.StepUp
	from                          string
	nonce, verifier               string // towards the identity provider
	browser                       digest
	began, returned               time.Time
}

// code is what a finished sign-in waits as, until it is redeemed.
type code struct {
	person                 broker.Person
	redirectURI, challenge string
	signedIn, made         time.Time

	mu      sync.Mutex // held while it is redeemed, so that a replay sees what came of it
	used    bool
	session digest // that it made; zero if none
}

// loopbackURI is where a code may be brought: to a port of the machine that the
// browser runs on, and nowhere else (RFC 8252, section 7.3). "localhost" is not
// taken, for it may name another machine (section 8.3).
var loopbackURI = regexp.MustCompile(`^http://(127\.0\.0\.1|\[::1\]):([1-9][0-9]{0,4})/[A-Za-z0-9._~/-]{0,100}$`)

// CheckRedirectURI refuses everything that is not a plain loopback address.
func CheckRedirectURI(uri string) error {
	parts := loopbackURI.FindStringSubmatch(uri)
	if parts != nil {
		if port, err := strconv.Atoi(parts[2]); err == nil && port <= 65535 {
			return nil
		}
	}
	return broker.Refuse(broker.ReasonInvalidArgument,
		"redirect_uri is no loopback address", "use http://127.0.0.1:PORT/PATH or http://[::1]:PORT/PATH, without query and fragment")
}

const (
	maxState  = 512
	maxACRs   = 10
	maxACR    = 100
	maxMaxAge = 30 * 24 * time.Hour
)

// check refuses what no program of ours sends.
func (s Start) check() error {
	if err := CheckRedirectURI(s.RedirectURI); err != nil {
		return err
	}
	if len(s.State) == 0 || len(s.State) > maxState || !printable(s.State) {
		return broker.Refusef(broker.ReasonInvalidArgument, "send a random state", "state must be 1 to %d printable characters", maxState)
	}
	if !wellFormed(s.Challenge) {
		return broker.Refuse(broker.ReasonInvalidArgument, "code_challenge is not of the method S256", "send the base64url of the SHA-256 of the verifier (RFC 7636)")
	}
	if s.Need.MaxAge < 0 || s.Need.MaxAge > maxMaxAge {
		return broker.Refuse(broker.ReasonInvalidArgument, "max_age is out of range", "send seconds, at most 30 days")
	}
	if len(s.Need.ACR) > maxACRs || slices.ContainsFunc(s.Need.ACR, func(a string) bool { return a == "" || len(a) > maxACR || !printable(a) }) {
		return broker.Refuse(broker.ReasonInvalidArgument, "acr_values is malformed", "send at most 10 names, with one space between two")
	}
	return nil
}

// printable reports whether s is visible ASCII.
func printable(s string) bool {
	for i := range len(s) {
		if s[i] <= ' ' || s[i] > '~' {
			return false
		}
	}
	return true
}

// Begin begins a sign-in by browser. A browser that has a secret keeps it, so
// that two sign-ins at once do not end each other.
func (m *Manager) Begin(s Start) (Begun, error) {
	if err := s.check(); err != nil {
		return Begun{}, err
	}
	browser := s.Browser
	if !wellFormed(browser) {
		browser = newSecret()
	}
	now := m.cfg.Now()
	f := &flow{
		redirectURI: s.RedirectURI, state: s.State, challenge: s.Challenge, need: s.Need,
		from: s.From, nonce: newSecret(), verifier: newSecret(), browser: digestOf(browser), began: now,
	}
	state := newSecret()
	to := m.cfg.Provider.AuthCodeURL(state, f.nonce, f.verifier, s.Need)
	if to == "" {
		return Begun{}, broker.Refuse(broker.ReasonSignIn, "the identity provider is away, or does not work with this broker", "try again in a minute; if it stays so, tell an operator")
	}
	m.flows.add(state, f, s.From, now)
	return Begun{URL: to, Browser: browser}, nil
}

// Callback takes the browser back from the identity provider. It returns what
// the person is to be asked, or the loopback URI for the browser to go to, with
// an error for the program; or an error, for a page, where it is not certain that
// this browser belongs to that program.
func (m *Manager) Callback(ctx context.Context, r Return) (Landing, error) {
	now := m.cfg.Now()
	f, ok := m.flows.get(r.State, now)
	if !ok {
		m.metrics.signIn(broker.SignInBrowser, "unknown")
		return Landing{}, failed("no sign-in is under way here: it took longer than ten minutes, or was finished before")
	}
	// Without this, somebody could have a victim's browser finish a sign-in of
	// their own (OAuth's CSRF: RFC 6749, section 10.12).
	browser := digestOf(r.Browser)
	if subtle.ConstantTimeCompare(browser[:], f.browser[:]) != 1 {
		m.metrics.signIn(broker.SignInBrowser, "other_browser")
		return Landing{}, failed("this sign-in was begun in another browser, or this one keeps no cookies")
	}
	if err := m.cfg.Provider.CheckResponse(ctx, r.Issuer); err != nil { // RFC 9207, section 2.4
		m.metrics.signIn(broker.SignInBrowser, "other_issuer")
		return Landing{}, err
	}
	if _, first := m.flows.take(r.State, now); !first {
		m.metrics.signIn(broker.SignInBrowser, "unknown")
		return Landing{}, failed("this sign-in was finished before")
	}
	p, err := m.exchange(ctx, f, r, now)
	if err != nil {
		m.metrics.signIn(broker.SignInBrowser, "refused")
		m.cfg.Log.InfoContext(ctx, "a sign-in failed", "method", broker.SignInBrowser, "error", err)
		return Landing{To: withQuery(f.redirectURI, errorQuery(err, r.Error, f.state))}, nil
	}
	f.returned = now
	return m.ask(f, p), nil
}

// exchange gets the person from the identity provider.
func (m *Manager) exchange(ctx context.Context, f *flow, r Return, now time.Time) (broker.Person, error) {
	if r.Error != "" || r.Code == "" {
		return broker.Person{}, failed("the identity provider did not sign the person in")
	}
	ctx, cancel := context.WithTimeout(ctx, exchangeTime)
	defer cancel()
	p, err := m.cfg.Provider.Exchange(ctx, r.Code, f.verifier, f.nonce, now)
	if err != nil {
		return p, err
	}
	p.Method = broker.SignInBrowser
	if err := m.checkPerson(p); err != nil {
		return p, err
	}
	return p, meets(p, f.need, f.began, m.cfg.Now())
}

// meets refuses a sign-in that is not what was asked for. The identity provider
// may overlook max_age and acr_values, so that it is compared here. A sign-in
// since the flow began is fresh, however long the person took.
func meets(p broker.Person, need broker.StepUp, began, now time.Time) error {
	refuse := func(message string) error {
		e := broker.Refuse(broker.ReasonStepUp, message, "sign in again, and prove anew who you are")
		e.StepUp = need
		return e
	}
	if need.MaxAge > 0 {
		switch {
		case p.AuthTime.IsZero():
			return refuse("the identity provider did not say when the person last proved who they are")
		case p.AuthTime.After(now.Add(skew)):
			return refuse("the identity provider says that the person signed in at a time to come")
		case now.Sub(p.AuthTime) > need.MaxAge && p.AuthTime.Before(began.Truncate(time.Second)):
			return refuse("the identity provider did not ask the person anew")
		}
	}
	if len(need.ACR) > 0 && !slices.Contains(need.ACR, p.ACR) {
		return refuse("the sign-in is not of a class that was asked for")
	}
	return nil
}

// errorQuery is what the program is told of a sign-in that failed: a code of
// RFC 6749 (section 4.1.2.1), OpenID Connect or RFC 9470, and our own words.
func errorQuery(err error, upstream, state string) url.Values {
	word, text := "server_error", "the sign-in did not come to an end"
	if slices.Contains([]string{"access_denied", "login_required", "interaction_required", "temporarily_unavailable", "unmet_authentication_requirements"}, upstream) {
		word = upstream
	} else if broker.ReasonOf(err) == broker.ReasonStepUp {
		word = string(broker.ReasonStepUp)
	}
	var e *broker.Error
	if errors.As(err, &e) {
		text = broker.Clean(broker.Shorten(e.Message, 200))
	}
	return url.Values{"error": {word}, "error_description": {text}, "state": {state}}
}

// Redeem turns a code into a session (RFC 6749, section 4.1.3; RFC 7636,
// section 4.6). A code is good for one try. One that comes again was stolen, or
// its session was: the session ends (OAuth 2.1, section 4.1.3).
func (m *Manager) Redeem(ctx context.Context, secret, verifier, redirectURI string, correlation broker.CorrelationID) (Session, error) {
	now := m.cfg.Now()
	c, ok := m.codes.get(secret, now)
	if !ok {
		m.metrics.signIn(broker.SignInBrowser, "unknown")
		return Session{}, failed("the code is not known: it is over, or never was")
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.used {
		m.metrics.signIn(broker.SignInBrowser, "replayed")
		m.cfg.Log.WarnContext(ctx, "a sign-in code was used again; its session is ended", "person", c.person.Name, "correlation", correlation)
		if c.session != (digest{}) {
			if _, err := m.end(ctx, []digest{c.session}, ending{actor: actorBroker, cause: "code_replayed", correlation: correlation}); err != nil {
				m.cfg.Log.ErrorContext(ctx, "ending a session; it is tried again", "error", err)
			}
		}
		return Session{}, broker.Refuse(broker.ReasonTokenReplayed, "the code was used before, so that the session it made is over", "begin again with `mayfly login`")
	}
	c.used = true
	challenge := sha256.Sum256([]byte(verifier))
	proof := base64.RawURLEncoding.EncodeToString(challenge[:])
	switch {
	case now.Sub(c.made) >= codeLife:
		m.metrics.signIn(broker.SignInBrowser, "refused")
		return Session{}, failed("the code is over: it is good for a minute")
	case redirectURI != c.redirectURI,
		len(verifier) < 43 || len(verifier) > 128, // RFC 7636, section 4.1
		subtle.ConstantTimeCompare([]byte(proof), []byte(c.challenge)) != 1:
		m.metrics.signIn(broker.SignInBrowser, "refused")
		return Session{}, failed("the code is not of this program: redirect_uri or code_verifier is another")
	}
	switch at, err := m.cutAt(ctx, c.person.Principal()); {
	case err != nil:
		return Session{}, err
	case c.signedIn.Before(at):
		m.metrics.signIn(broker.SignInBrowser, "refused")
		return Session{}, failed("all that this person had was ended since")
	}
	s, err := m.start(ctx, c.person, correlation)
	if err == nil {
		c.session = s.digest
	}
	return s, err
}
