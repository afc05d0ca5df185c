package server

import (
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"html/template"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/signin"
)

// The pages for people's browsers. They have no script, and one of them a form.
const (
	pathBegin    = "/signin"
	pathCallback = "/signin/callback"
	pathAgree    = "/signin/agree"

	// browserCookie binds a browser to the sign-ins that it began. Its name
	// makes the browser take it from this very host alone, and over TLS.
	browserCookie = "__Host-mayfly-signin"
	// cookieLife is for the identity provider's pages, and then for our own.
	cookieLife = 20 * time.Minute
	// maxCode is the longest code of an identity provider that is looked at.
	maxCode = 8 << 10
)

func isPage(r *http.Request) bool {
	return r.URL.Path == "/" || r.URL.Path == pathBegin || r.URL.Path == pathCallback || r.URL.Path == pathAgree
}

const pageStyle = `:root { color-scheme: light dark }
body { max-width: 34rem; margin: 18vh auto 0; padding: 0 1.5rem; font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { margin: 0 0 .5rem; font-size: 1.5rem }
p { margin: .5rem 0 }
form { margin: 1.25rem 0 }
button { font: inherit; padding: .4rem 1rem; margin-right: .5rem }
footer { margin-top: 2rem; opacity: .6; font-size: .875rem }`

// pagePolicy lets a page have its own style, lead its forms to where forms
// may, and nothing else.
func pagePolicy(forms string) string {
	return "default-src 'none'; style-src 'sha256-" + pageStyleHash + "'; base-uri 'none'; form-action " + forms + "; frame-ancestors 'none'"
}

var pageStyleHash = func() string {
	sum := sha256.Sum256([]byte(pageStyle))
	return base64.StdEncoding.EncodeToString(sum[:])
}()

var page = template.Must(template.New("page").Parse(`<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><meta name="robots" content="noindex"><title>Mayfly: {{.Title}}</title>
<style>` + pageStyle + `</style></head>
<body><main><h1>{{.Title}}</h1>{{range .Lines}}<p>{{.}}</p>{{end}}</main><footer>Mayfly</footer></body></html>
`))

// question asks a person whether a program may have a session of theirs.
var question = template.Must(template.New("question").Parse(`<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><meta name="robots" content="noindex"><title>Mayfly: Do you want to sign in?</title>
<style>` + pageStyle + `</style></head>
<body><main><h1>Do you want to sign in?</h1>
<p>A program on this machine, at port {{.Port}}, wants to act as <strong>{{.Person}}</strong> at this Mayfly broker.</p>
<p>Say yes only if you have just run mayfly in a terminal on this machine yourself, and the terminal shows this:</p>
<p><strong>{{.Check}}</strong></p>
<p>If it shows something else, or you came here by a link that somebody sent you, say no.</p>
<form method="post" action="{{.Action}}"><input type="hidden" name="question" value="{{.Secret}}">
<button type="submit" name="answer" value="yes">Yes, sign me in</button>
<button type="submit" name="answer" value="no">No</button></form>
</main><footer>Mayfly</footer></body></html>
`))

type questionText struct{ Port, Person, Check, Action, Secret string }

type pageText struct {
	Title string
	Lines []string
}

func (p *people) show(w http.ResponseWriter, status int, text pageText) {
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.WriteHeader(status)
	if err := page.Execute(w, text); err != nil {
		p.s.log.Debug("writing a page", "error", err)
	}
}

func (p *people) about(w http.ResponseWriter, _ *http.Request) {
	lines := []string{"It gives agents short-lived credentials that people approve. People use it with the command mayfly, which signs in by a browser: mayfly login."}
	if p.signIn.Provider().Sample() {
		lines = append(lines, "It is mayflyd dev, with sample people: whoever can reach it can be any of them. It is not for production.")
	}
	p.show(w, http.StatusOK, pageText{"This is a Mayfly broker", lines})
}

// failedPage says on a page why a sign-in does not go on. Where it is not
// certain that the browser belongs to the program that began, there is nowhere
// to send it to.
func (p *people) failedPage(w http.ResponseWriter, err error) {
	text := pageText{"The sign-in failed", []string{"Something unexpected happened.", "Begin again with mayfly login."}}
	status := http.StatusInternalServerError
	var e *broker.Error
	if errors.As(err, &e) {
		text.Lines = []string{sentence(broker.Clean(e.Message)) + ".", "What to do: " + broker.Clean(strings.ReplaceAll(e.Next, "`", "")) + "."}
		status = http.StatusBadRequest
		if e.Reason == broker.ReasonPermissionDenied {
			status = http.StatusForbidden
		}
		if e.Reason == broker.ReasonRateLimited {
			status = http.StatusTooManyRequests
		}
	}
	p.show(w, status, text)
}

// sentence begins with a capital letter.
func sentence(s string) string {
	first, n := utf8.DecodeRuneInString(s)
	return string(unicode.ToUpper(first)) + s[n:]
}

// begin sends the browser to the identity provider, and binds it.
func (p *people) begin(w http.ResponseWriter, r *http.Request) {
	start, err := startOf(r)
	start.From = visitOf(r.Context()).from
	if err == nil {
		var b signin.Begun
		if b, err = p.signIn.Begin(start); err == nil {
			http.SetCookie(w, &http.Cookie{
				Name: browserCookie, Value: b.Browser, Path: "/", Secure: true, HttpOnly: true,
				SameSite: http.SameSiteLaxMode, // the identity provider's page brings the browser back
				MaxAge:   int(cookieLife.Seconds()),
			})
			sendTo(w, b.URL)
			return
		}
	}
	p.refusePage(w, r, err)
}

// callback takes the browser back, and asks its person, or sends it to the
// program that began with what went wrong.
func (p *people) callback(w http.ResponseWriter, r *http.Request) {
	back, err := returnOf(r)
	if err == nil {
		var l signin.Landing
		if l, err = p.signIn.Callback(r.Context(), back); err == nil && l.Ask != nil {
			err = p.ask(w, *l.Ask)
		} else if err == nil {
			sendTo(w, l.To)
		}
	}
	if err != nil {
		p.refusePage(w, r, err)
	}
}

func (p *people) ask(w http.ResponseWriter, q signin.Question) error {
	to, err := url.Parse(q.RedirectURI)
	if err != nil {
		return err
	}
	h := w.Header()
	// Browsers hold where a form may lead against the redirects that follow, too.
	// An address of IPv6 cannot be written there.
	target := "http://" + to.Host
	if strings.Contains(to.Host, "[") {
		target = "http:"
	}
	h.Set("Content-Security-Policy", pagePolicy("'self' "+target))
	// With no-referrer a browser says of our own form that it comes from nowhere.
	h.Set("Referrer-Policy", "same-origin")
	h.Set("Content-Type", "text/html; charset=utf-8")
	if err := question.Execute(w, questionText{to.Port(), q.Person.Name, q.Check, pathAgree, q.Secret}); err != nil {
		p.s.log.Debug("writing a page", "error", err)
	}
	return nil
}

// agree takes the person's answer, and sends the browser to the program.
func (p *people) agree(w http.ResponseWriter, r *http.Request) {
	a, err := answerOf(r)
	if err == nil {
		var to string
		var by broker.Person
		var denied error
		if to, by, denied, err = p.signIn.Agree(r.Context(), a); err == nil {
			if denied != nil { // somebody else may have begun it: that is evidence
				p.s.engine.Refused(r.Context(), broker.Caller{Person: &by, Correlation: visitOf(r.Context()).caller.Correlation}, "sign_in", "", denied)
			}
			sendTo(w, to)
			return
		}
	}
	p.refusePage(w, r, err)
}

func (p *people) refusePage(w http.ResponseWriter, r *http.Request, err error) {
	v := visitOf(r.Context())
	p.s.engine.Refused(r.Context(), v.caller, "sign_in", "", err)
	p.failedPage(w, err)
}

// sendTo redirects with GET, whatever the browser came with, and says nothing else.
func sendTo(w http.ResponseWriter, to string) {
	w.Header().Set("Location", to)
	w.WriteHeader(http.StatusSeeOther)
}

// once reads parameters that may be there once at most (RFC 6749, section 3.1).
func once(r *http.Request, names ...string) (map[string]string, error) {
	malformed := broker.Refuse(broker.ReasonInvalidArgument, "the address of this page is malformed", "begin again with `mayfly login`")
	if r.Method != http.MethodGet {
		return nil, malformed
	}
	q, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return nil, malformed
	}
	values := map[string]string{}
	for _, n := range names {
		if len(q[n]) > 1 {
			return nil, malformed
		}
		values[n] = q.Get(n)
	}
	return values, nil
}

func startOf(r *http.Request) (signin.Start, error) {
	q, err := once(r, "redirect_uri", "state", "code_challenge", "code_challenge_method", "max_age", "acr_values")
	if err != nil {
		return signin.Start{}, err
	}
	if m := q["code_challenge_method"]; m != "" && m != "S256" {
		return signin.Start{}, broker.Refuse(broker.ReasonInvalidArgument, "code_challenge_method is not S256", "use S256 (RFC 7636)")
	}
	s := signin.Start{RedirectURI: q["redirect_uri"], State: q["state"], Challenge: q["code_challenge"], Browser: cookieOf(r)}
	if a := q["max_age"]; a != "" {
		seconds, err := strconv.ParseUint(a, 10, 32)
		if err != nil {
			return s, broker.Refuse(broker.ReasonInvalidArgument, "max_age is no number of seconds", "send a number")
		}
		// 0 asks for a sign-in now (OpenID Connect Core, section 3.1.2.1), and
		// must not pass for asking nothing.
		s.Need.MaxAge = max(time.Duration(seconds)*time.Second, time.Second)
	}
	if a := q["acr_values"]; a != "" {
		s.Need.ACR = strings.Split(a, " ")
	}
	return s, nil
}

func returnOf(r *http.Request) (signin.Return, error) {
	q, err := once(r, "state", "code", "iss", "error")
	if err != nil {
		return signin.Return{}, err
	}
	if len(q["code"]) > maxCode {
		return signin.Return{}, broker.Refuse(broker.ReasonInvalidArgument, "the code is too long to be one", "begin again with `mayfly login`")
	}
	return signin.Return{State: q["state"], Code: q["code"], Issuer: q["iss"], Error: q["error"], Browser: cookieOf(r)}, nil
}

func answerOf(r *http.Request) (signin.Answer, error) {
	malformed := broker.Refuse(broker.ReasonInvalidArgument, "the answer is malformed", "begin again with `mayfly login`")
	kind, _, _ := strings.Cut(r.Header.Get("Content-Type"), ";")
	if kind != "application/x-www-form-urlencoded" || r.ParseForm() != nil {
		return signin.Answer{}, malformed
	}
	secret, answer := r.PostForm["question"], r.PostForm["answer"]
	if len(secret) != 1 || len(answer) != 1 || answer[0] != "yes" && answer[0] != "no" {
		return signin.Answer{}, malformed
	}
	return signin.Answer{Secret: secret[0], Browser: cookieOf(r), Yes: answer[0] == "yes"}, nil
}

// cookieOf is the browser's secret; empty if it has none, or more than one.
func cookieOf(r *http.Request) string {
	found := slices.DeleteFunc(r.Cookies(), func(c *http.Cookie) bool { return c.Name != browserCookie })
	if len(found) != 1 {
		return ""
	}
	return found[0].Value
}
