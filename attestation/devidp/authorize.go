package devidp

import (
	"crypto/subtle"
	"encoding/base64"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/mayfly-security/mayfly/broker"
)

// request is an authorization request that was found good.
type request struct {
	client    string
	redirect  string
	state     string
	nonce     string
	challenge string
	scopes    []string
	acr       []string
	maxAge    *time.Duration // nil: not asked
}

// page is a form that was shown to one browser, and may be sent once. Exactly
// one of request and device is set, or neither: a sign-out.
type page struct {
	browser string // the cookie of the browser that it was shown to
	request *request
	device  string // the device code
}

// session is a browser's.
type session struct{ authentication }

// code is an authorization code.
type code struct {
	request
	authentication
}

func (p *Provider) authorize(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	for name, values := range q {
		if len(values) > 1 { // RFC 6749, section 3.1
			p.problem(w, http.StatusBadRequest, "The parameter "+strconv.Quote(name)+" is there twice.")
			return
		}
	}
	client, ok := p.client(q.Get("client_id"))
	if !ok {
		p.problem(w, http.StatusBadRequest, "No client of this ID is known here.")
		return
	}
	// Until the redirect URI is known to be the client's, nobody is sent there.
	if !slices.Contains(client.RedirectURIs, q.Get("redirect_uri")) {
		p.problem(w, http.StatusBadRequest, "The redirect URI is none of the client's. They are compared exactly.")
		return
	}
	req := &request{
		client: client.ID, redirect: q.Get("redirect_uri"), state: q.Get("state"), nonce: q.Get("nonce"),
		challenge: q.Get("code_challenge"), scopes: words(q.Get("scope")), acr: words(q.Get("acr_values")),
	}
	prompt := words(q.Get("prompt"))
	if refusal, why := req.check(q, prompt); refusal != "" {
		p.back(w, r, req, url.Values{"error": {refusal}, "error_description": {why}})
		return
	}
	now := p.config.Now()
	p.mu.Lock()
	s, signedIn := p.sessions.get(cookie(r, p.sessionCookie()), now)
	p.mu.Unlock()
	again := slices.Contains(prompt, "login") || slices.Contains(prompt, "select_account")
	if signedIn && !again && s.fits(now, req.maxAge, req.acr) {
		p.finish(w, r, req, s.authentication)
		return
	}
	if slices.Contains(prompt, "none") {
		p.back(w, r, req, url.Values{"error": {"login_required"}})
		return
	}
	p.choice(w, r, page{request: req}, view{Client: client.ID, Need: req.need()})
}

// check returns an error code of RFC 6749, section 4.1.2.1, and why.
func (r *request) check(q url.Values, prompt []string) (refusal, why string) {
	challenge, err := base64.RawURLEncoding.Strict().DecodeString(r.challenge)
	switch {
	case q.Has("request") || q.Has("request_uri"):
		return "request_not_supported", "request objects are not taken"
	case q.Get("response_type") != "code":
		return "unsupported_response_type", "only response_type=code is taken"
	case q.Has("response_mode") && q.Get("response_mode") != "query":
		return "invalid_request", "only response_mode=query is taken"
	case err != nil || len(challenge) != 32 || q.Get("code_challenge_method") != "S256":
		return "invalid_request", "PKCE with S256 is required"
	case !slices.Contains(r.scopes, "openid"):
		return "invalid_scope", "the scope openid is required"
	case slices.Contains(prompt, "none") && len(prompt) > 1:
		return "invalid_request", "prompt=none stands alone"
	}
	if q.Has("max_age") {
		seconds, err := strconv.ParseUint(q.Get("max_age"), 10, 31)
		if err != nil {
			return "invalid_request", "max_age is no number of seconds"
		}
		age := time.Duration(seconds) * time.Second
		r.maxAge = &age
	}
	return "", ""
}

// need tells a person what is asked of them beside a sign-in.
func (r *request) need() (all []string) {
	if r.maxAge != nil {
		all = append(all, "a sign-in that is not older than "+broker.Span(*r.maxAge))
	}
	for _, a := range r.acr {
		switch a {
		case ACRPassword:
			all = append(all, "a password")
		case ACRSecurityKey:
			all = append(all, "a security key")
		default:
			all = append(all, "the class "+strconv.Quote(a)+", which is not known here")
		}
	}
	return all
}

// choose takes the form of a page: who signs in, and how.
func (p *Provider) choose(w http.ResponseWriter, r *http.Request) {
	now := p.config.Now()
	shown, ok := p.sent(r, now)
	if !ok || shown.request == nil && shown.device == "" {
		p.problem(w, http.StatusForbidden, "This form is not one that this browser was shown, was sent before, or is too old. Begin again.")
		return
	}
	how := r.PostFormValue("how")
	if how == "deny" {
		p.deny(w, r, shown)
		return
	}
	person, known := p.person(r.PostFormValue("person"))
	acr := map[string]string{"password": ACRPassword, "key": ACRSecurityKey}[how]
	// For demonstrations and tests, a form can say that they signed in so many
	// seconds ago, also where max_age forbids it: a relying party must notice.
	age, wellFormed := seconds(r, "auth_age")
	if !known || acr == "" || !wellFormed {
		p.problem(w, http.StatusBadRequest, "Choose one of the people, and how they sign in. Begin again.")
		return
	}
	a := authentication{person: person, at: now.Add(-age).Truncate(time.Second), acr: acr}
	if shown.device != "" {
		p.decide(w, shown.device, func(d *device) { d.authentication = &a })
		return
	}
	name := random() // a new one: an old cookie may have been put there by somebody else
	p.mu.Lock()
	kept := p.sessions.put(name, session{a}, now, now.Add(sessionTime))
	p.mu.Unlock()
	if kept {
		p.setCookie(w, p.sessionCookie(), name)
	}
	p.finish(w, r, shown.request, a)
}

func (p *Provider) deny(w http.ResponseWriter, r *http.Request, shown page) {
	if shown.device != "" {
		p.decide(w, shown.device, func(d *device) { d.denied = true })
		return
	}
	p.back(w, r, shown.request, url.Values{"error": {"access_denied"}})
}

// sent takes the page whose form r is, if it was shown to r's browser.
func (p *Provider) sent(r *http.Request, now time.Time) (page, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	shown, ok := p.pages.get(r.PostFormValue("form"), now)
	if !ok || subtle.ConstantTimeCompare([]byte(shown.browser), []byte(cookie(r, p.browserCookie()))) != 1 {
		return page{}, false
	}
	return p.pages.take(r.PostFormValue("form"), now)
}

// finish sends the browser back with a code.
func (p *Provider) finish(w http.ResponseWriter, r *http.Request, req *request, a authentication) {
	name, now := random(), p.config.Now()
	p.mu.Lock()
	kept := p.codes.put(name, code{*req, a}, now, now.Add(codeTime))
	p.mu.Unlock()
	if !kept {
		p.back(w, r, req, url.Values{"error": {"temporarily_unavailable"}})
		return
	}
	p.back(w, r, req, url.Values{"code": {name}})
}

// back sends the browser to the client's redirect URI.
func (p *Provider) back(w http.ResponseWriter, r *http.Request, req *request, answer url.Values) {
	answer.Set("iss", p.issuer) // RFC 9207
	if req.state != "" {
		answer.Set("state", req.state)
	}
	sep := "?"
	if strings.Contains(req.redirect, "?") {
		sep = "&"
	}
	http.Redirect(w, r, req.redirect+sep+answer.Encode(), http.StatusSeeOther)
}

func (p *Provider) signOut(w http.ResponseWriter, r *http.Request) {
	now := p.config.Now()
	if shown, ok := p.sent(r, now); !ok || shown.request != nil || shown.device != "" {
		p.problem(w, http.StatusForbidden, "This form is not one that this browser was shown, was sent before, or is too old. Begin again.")
		return
	}
	p.mu.Lock()
	p.sessions.take(cookie(r, p.sessionCookie()), now)
	p.mu.Unlock()
	http.Redirect(w, r, "/", http.StatusSeeOther)
}

// Cookies know no ports: two providers on one machine need two names.
func (p *Provider) sessionCookie() string { return "mayfly_dev_session_" + p.port() }
func (p *Provider) browserCookie() string { return "mayfly_dev_browser_" + p.port() }
func (p *Provider) port() string          { return p.host[strings.LastIndexByte(p.host, ':')+1:] }

func cookie(r *http.Request, name string) string {
	c, err := r.Cookie(name)
	if err != nil {
		return ""
	}
	return c.Value
}

func (p *Provider) setCookie(w http.ResponseWriter, name, value string) {
	// Not Secure: it is plain HTTP on loopback.
	http.SetCookie(w, &http.Cookie{Name: name, Value: value, Path: "/", HttpOnly: true, SameSite: http.SameSiteLaxMode})
}
