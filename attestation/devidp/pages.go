package devidp

import (
	"bytes"
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"html/template"
	"net/http"
)

var (
	//go:embed page.html
	pageText string
	//go:embed page.css
	pageStyle string

	pageTemplate = template.Must(template.New("page").Parse(pageText))
	// pagePolicy lets a page have its own style and nothing else: no script, no
	// frame around it. It says nothing of where forms may lead: browsers hold
	// that against each redirect that follows too, and a sign-in ends elsewhere.
	pagePolicy = "default-src 'none'; style-src '" + digest(pageStyle) + "'; frame-ancestors 'none'; base-uri 'none'"
)

func digest(s string) string {
	sum := sha256.Sum256([]byte(s))
	return "sha256-" + base64.StdEncoding.EncodeToString(sum[:])
}

// view is what a page shows.
type view struct {
	Title    string
	Text     string
	Problem  bool
	Client   string   // who asks for a sign-in; empty: nobody
	Need     []string // what it asks for beside
	UserCode string
	AskCode  bool
	Form     string // the form's ID; empty: no form
	People   []Person
	Session  *sessionView
}

type sessionView struct {
	Name, How, At string
}

// Style is for the template: the policy names its digest.
func (view) Style() template.CSS { return template.CSS(pageStyle) }

func (p *Provider) show(w http.ResponseWriter, status int, v view) {
	var b bytes.Buffer
	if err := pageTemplate.Execute(&b, v); err != nil {
		http.Error(w, "the page cannot be shown", http.StatusInternalServerError)
		return
	}
	h := w.Header()
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Content-Security-Policy", pagePolicy)
	h.Set("X-Frame-Options", "DENY")
	h.Set("Referrer-Policy", "no-referrer")
	w.WriteHeader(status)
	_, _ = w.Write(b.Bytes()) // the browser may have gone
}

func (p *Provider) problem(w http.ResponseWriter, status int, text string) {
	p.show(w, status, view{Title: "This does not work", Text: text, Problem: true})
}

// form remembers a page that is going to be shown to r's browser, and returns
// its form's ID. Nobody but that browser can send it.
func (p *Provider) form(w http.ResponseWriter, r *http.Request, shown page) (string, bool) {
	if shown.browser = cookie(r, p.browserCookie()); len(shown.browser) != len(random()) {
		shown.browser = random()
		p.setCookie(w, p.browserCookie(), shown.browser)
	}
	id, now := random(), p.config.Now()
	p.mu.Lock()
	defer p.mu.Unlock()
	return id, p.pages.put(id, shown, now, now.Add(pageTime))
}

// choice shows the people to choose from.
func (p *Provider) choice(w http.ResponseWriter, r *http.Request, shown page, v view) {
	id, ok := p.form(w, r, shown)
	if !ok {
		p.problem(w, http.StatusServiceUnavailable, "Too many sign-ins are under way. Try again in some minutes.")
		return
	}
	v.Title, v.Form, v.People = "Who are you?", id, p.config.People
	p.show(w, http.StatusOK, v)
}

// home says what this is, and lets a browser sign out.
func (p *Provider) home(w http.ResponseWriter, r *http.Request) {
	v := view{Title: "Sample identity provider", Text: "It signs in the sample people of mayflyd dev. Nobody is signed in in this browser."}
	now := p.config.Now()
	p.mu.Lock()
	s, ok := p.sessions.get(cookie(r, p.sessionCookie()), now)
	p.mu.Unlock()
	if ok {
		how := "a password"
		if s.acr == ACRSecurityKey {
			how = "a security key"
		}
		v.Text = ""
		v.Session = &sessionView{Name: s.person.Name, How: how, At: s.at.UTC().Format("15:04:05 UTC")}
		if v.Form, ok = p.form(w, r, page{}); !ok {
			v.Session = nil
		}
	}
	p.show(w, http.StatusOK, v)
}
