// Package oidctest is a browser for tests of signing in: it keeps cookies,
// follows redirects as a browser does, reads forms, and sends them. It runs no
// script, which no page of a sign-in may need.
package oidctest

import (
	"context"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/cookiejar"
	"net/url"
	"slices"
	"strings"
	"time"

	"golang.org/x/net/html"
)

const (
	maxSteps = 20
	maxPage  = 1 << 20 // bytes
)

// Browser is one person's browser.
type Browser struct {
	// Client asks. It follows no redirects: the Browser does.
	Client *http.Client
	// Stop says where not to go: a redirect there is the end of a walk. Nil: to
	// no such place.
	Stop func(*url.URL) bool
}

// New makes a browser without cookies. transport is nil for the default one.
func New(transport http.RoundTripper) *Browser {
	jar, err := cookiejar.New(nil)
	if err != nil {
		panic(err) // never without options
	}
	return &Browser{Client: &http.Client{
		Transport: transport, Jar: jar, Timeout: 30 * time.Second,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
}

// StopAt has the browser stop at a URL, whatever its query.
func (b *Browser) StopAt(target string) {
	b.Stop = func(u *url.URL) bool {
		return strings.HasPrefix(u.String(), target) && (len(u.String()) == len(target) || strings.ContainsAny(u.String()[len(target):][:1], "?#"))
	}
}

// Page is where a browser is.
type Page struct {
	URL     *url.URL
	Stopped bool // URL is one of Browser.Stop's, and was not asked
	Status  int
	Header  http.Header
	Body    string
	Forms   []Form
}

// Form is one form of a page, with what it has filled in already.
type Form struct {
	Method string // GET or POST
	Action *url.URL
	Fields url.Values
	// Options are what fields with a choice offer (radio buttons, selects): the
	// value by what is shown, and by itself.
	Options map[string]map[string]string
	Buttons []Button
}

// Button sends a form.
type Button struct{ Name, Value string }

// Get goes to a URL, and where it is sent from there.
func (b *Browser) Get(ctx context.Context, target string) (*Page, error) {
	u, err := url.Parse(target)
	if err != nil {
		return nil, err
	}
	return b.do(ctx, http.MethodGet, u, nil, nil)
}

// Send sends a form as the page from has it, with answers in its fields.
// Answers that it has no field or button for are left out. The button that an
// answer names is pressed, or else the first.
func (b *Browser) Send(ctx context.Context, from *Page, f Form, answers map[string]string) (*Page, error) {
	fields := url.Values{}
	for name, values := range f.Fields {
		fields[name] = slices.Clone(values)
	}
	for name, answer := range answers {
		if options, ok := f.Options[name]; ok {
			value, ok := options[answer]
			if !ok {
				return nil, fmt.Errorf("%s: the field %s does not offer %q", from.URL, name, answer)
			}
			answer = value
		} else if !f.Fields.Has(name) {
			continue
		}
		fields.Set(name, answer)
	}
	if len(f.Buttons) > 0 {
		pressed := f.Buttons[0]
		for _, button := range f.Buttons {
			if button.Name != "" && answers[button.Name] == button.Value {
				pressed = button
			}
		}
		if want, ok := answers[pressed.Name]; ok && want != pressed.Value {
			return nil, fmt.Errorf("%s: no button %s=%s", from.URL, pressed.Name, want)
		}
		if pressed.Name != "" {
			fields.Set(pressed.Name, pressed.Value)
		}
	}
	if f.Method == http.MethodGet {
		target := *f.Action
		target.RawQuery = fields.Encode()
		return b.do(ctx, http.MethodGet, &target, nil, from)
	}
	return b.do(ctx, http.MethodPost, f.Action, fields, from)
}

// Walk goes to a URL and sends each first form that it comes to, with answers,
// until it stops, there is none, or it is one that was sent before.
func (b *Browser) Walk(ctx context.Context, start string, answers map[string]string) (*Page, error) {
	page, err := b.Get(ctx, start)
	sent := map[string]bool{}
	for range maxSteps {
		if err != nil || page.Stopped || len(page.Forms) == 0 || page.Status >= 400 {
			return page, err
		}
		form := page.Forms[0]
		same := fmt.Sprint(form.Method, form.Action, slices.Sorted(maps.Keys(form.Fields)))
		if sent[same] {
			return page, nil
		}
		sent[same] = true
		page, err = b.Send(ctx, page, form, answers)
	}
	return nil, fmt.Errorf("%s: still a form after %d", start, maxSteps)
}

func (b *Browser) do(ctx context.Context, method string, u *url.URL, form url.Values, from *Page) (*Page, error) {
	for range maxSteps {
		if b.Stop != nil && b.Stop(u) {
			return &Page{URL: u, Stopped: true}, nil
		}
		var body io.Reader
		if method == http.MethodPost {
			body = strings.NewReader(form.Encode())
		}
		r, err := http.NewRequestWithContext(ctx, method, u.String(), body)
		if err != nil {
			return nil, err
		}
		if method == http.MethodPost {
			r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
			if from != nil { // as browsers do
				r.Header.Set("Origin", from.URL.Scheme+"://"+from.URL.Host)
			}
		}
		resp, err := b.Client.Do(r)
		if err != nil {
			return nil, err
		}
		text, err := io.ReadAll(io.LimitReader(resp.Body, maxPage))
		resp.Body.Close()
		if err != nil {
			return nil, err
		}
		location := resp.Header.Get("Location")
		if resp.StatusCode < 300 || resp.StatusCode > 399 || location == "" {
			page := &Page{URL: u, Status: resp.StatusCode, Header: resp.Header, Body: string(text)}
			page.Forms, err = readForms(u, page.Body)
			return page, err
		}
		if u, err = u.Parse(location); err != nil {
			return nil, fmt.Errorf("a redirect to no URL: %w", err)
		}
		if resp.StatusCode != http.StatusTemporaryRedirect && resp.StatusCode != http.StatusPermanentRedirect {
			method, form = http.MethodGet, nil
		}
	}
	return nil, fmt.Errorf("%s: too many redirects", u)
}

// readForms finds a page's forms. A button may stand outside of its form, and
// name it by its ID.
func readForms(base *url.URL, text string) ([]Form, error) {
	root, err := html.Parse(strings.NewReader(text))
	if err != nil {
		return nil, err
	}
	var all []*Form
	named := map[string]*Form{}
	for n := range root.Descendants() {
		if n.Type != html.ElementNode || n.Data != "form" {
			continue
		}
		action, err := base.Parse(attribute(n, "action"))
		if err != nil {
			return nil, fmt.Errorf("a form's action is no URL: %w", err)
		}
		f := &Form{Method: http.MethodGet, Action: action, Fields: url.Values{}, Options: map[string]map[string]string{}}
		if strings.EqualFold(attribute(n, "method"), "post") {
			f.Method = http.MethodPost
		}
		all = append(all, f)
		named[attribute(n, "id")] = f
		for field := range n.Descendants() {
			f.read(field)
		}
	}
	delete(named, "")
	for n := range root.Descendants() {
		if f := named[attribute(n, "form")]; f != nil && n.Type == html.ElementNode {
			f.read(n)
		}
	}
	forms := make([]Form, len(all))
	for i, f := range all {
		forms[i] = *f
	}
	return forms, nil
}

func (f *Form) read(n *html.Node) {
	if n.Type != html.ElementNode {
		return
	}
	name, value, kind := attribute(n, "name"), attribute(n, "value"), attribute(n, "type")
	switch {
	case n.Data == "button" && kind != "button", n.Data == "input" && kind == "submit":
		f.Buttons = append(f.Buttons, Button{name, value})
	case name == "" || n.Data == "button":
	case n.Data == "input" && (kind == "radio" || kind == "checkbox"):
		f.offer(name, value, value)
		if has(n, "checked") {
			f.Fields.Set(name, value)
		}
	case n.Data == "input":
		f.Fields.Set(name, value)
	case n.Data == "select":
		first := true
		for o := range n.Descendants() {
			if o.Type != html.ElementNode || o.Data != "option" {
				continue
			}
			shown := strings.TrimSpace(content(o))
			value := shown
			if has(o, "value") {
				value = attribute(o, "value")
			}
			f.offer(name, shown, value)
			if first || has(o, "selected") {
				f.Fields.Set(name, value)
				first = false
			}
		}
	}
}

func (f *Form) offer(name, shown, value string) {
	if f.Options[name] == nil {
		f.Options[name] = map[string]string{}
	}
	f.Options[name][shown], f.Options[name][value] = value, value
}

func content(n *html.Node) string {
	var b strings.Builder
	for d := range n.Descendants() {
		if d.Type == html.TextNode {
			b.WriteString(d.Data)
		}
	}
	return b.String()
}

func has(n *html.Node, name string) bool {
	return slices.ContainsFunc(n.Attr, func(a html.Attribute) bool { return a.Key == name })
}

func attribute(n *html.Node, name string) string {
	for _, a := range n.Attr {
		if a.Key == name {
			return a.Val
		}
	}
	return ""
}
