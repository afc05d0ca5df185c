package main

import (
	"context"
	"crypto/subtle"
	"errors"
	"html/template"
	"net"
	"net/http"
	"net/url"
	"sync"
	"time"

	"github.com/mayfly-security/mayfly/broker"
)

// maxCode bounds a one-time code and an error that the browser brings, in bytes.
const maxCode = 2000

// loopback waits for the browser to come back from signing in (RFC 8252,
// section 7.3). It takes one callback: the first that brings the state of this
// sign-in. Everything else that knocks, such as a page of somebody else's in
// the same browser, is turned away and ends nothing.
type loopback struct {
	uri   string
	state string
	host  string
	codes chan callback // one at most

	mu    sync.Mutex
	taken bool

	srv    *http.Server
	served chan struct{}
}

// callback is what the browser brought back: a code, or why there is none.
type callback struct {
	code string
	err  error
	// outcome takes what became of it, for the page that the person sees.
	outcome chan<- error
}

// listenOnLoopback listens on a free port of 127.0.0.1. It takes nothing yet.
func listenOnLoopback() (*loopback, net.Listener, error) {
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return nil, nil, err
	}
	l := &loopback{host: ln.Addr().String(), codes: make(chan callback, 1), served: make(chan struct{})}
	l.uri = "http://" + l.host + "/callback"
	return l, ln, nil
}

// serve begins to take the callback of the sign-in with the state.
func (l *loopback) serve(ln net.Listener, state string) {
	l.state = state
	l.srv = &http.Server{
		Handler: l, ReadHeaderTimeout: 10 * time.Second, WriteTimeout: time.Minute, MaxHeaderBytes: 16 << 10,
	}
	go func() {
		defer close(l.served)
		_ = l.srv.Serve(ln) // it ends with close
	}()
}

// close ends the listening, after a moment for the last page to get out.
func (l *loopback) close() {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	if l.srv.Shutdown(ctx) != nil {
		_ = l.srv.Close() // there is nothing to lose
	}
	<-l.served
}

func (l *loopback) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	h := w.Header()
	h.Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
	h.Set("Cache-Control", "no-store")
	h.Set("Referrer-Policy", "no-referrer")
	h.Set("X-Content-Type-Options", "nosniff")
	switch {
	case r.Host != l.host: // a name that somebody lets point to this machine
		answer(w, http.StatusMisdirectedRequest, "Not here", "This address is not the one that Mayfly listens at.")
	case r.URL.Path != "/callback":
		answer(w, http.StatusNotFound, "Not here", "Mayfly waits for the end of a sign-in, and for nothing else.")
	case r.Method != http.MethodGet:
		h.Set("Allow", http.MethodGet)
		answer(w, http.StatusMethodNotAllowed, "Not like this", "Mayfly waits for the end of a sign-in, and for nothing else.")
	default:
		l.callback(w, r)
	}
}

func (l *loopback) callback(w http.ResponseWriter, r *http.Request) {
	q, err := url.ParseQuery(r.URL.RawQuery)
	state := q["state"]
	if err != nil || len(state) != 1 || subtle.ConstantTimeCompare([]byte(state[0]), []byte(l.state)) != 1 {
		answer(w, http.StatusBadRequest, "Not your sign-in", "This is not the sign-in that was begun in the terminal. Nothing was changed.")
		return
	}
	code, problem := q["code"], q["error"]
	if len(code)+len(problem) != 1 || len(r.URL.RawQuery) > 2*maxCode || len(code) == 1 && code[0] == "" {
		answer(w, http.StatusBadRequest, "Not a sign-in", "The answer is malformed. Nothing was changed.")
		return
	}
	l.mu.Lock()
	first := !l.taken
	l.taken = true
	l.mu.Unlock()
	if !first {
		answer(w, http.StatusGone, "Used already", "This sign-in has come to its end. Begin again in the terminal.")
		return
	}
	outcome := make(chan error, 1)
	c := callback{outcome: outcome}
	if len(code) == 1 {
		c.code = code[0]
	} else {
		why := problem[0]
		if text := q.Get("error_description"); text != "" {
			why += ": " + text
		}
		next := "begin again with `mayfly login`"
		if problem[0] == string(broker.ReasonStepUp) {
			next = "do it again, and prove anew who you are; if you did, the identity provider did not do what it was asked: tell the broker's operator"
		}
		c.err = broker.Refusef(broker.ReasonSignIn, next,
			"the sign-in was refused: %s", clean(broker.Shorten(why, 300)))
	}
	l.codes <- c
	select {
	case err = <-outcome:
	case <-r.Context().Done():
		return
	}
	if err != nil {
		answer(w, http.StatusForbidden, "Not signed in", "The sign-in did not come to a good end. The terminal says why.")
		return
	}
	answer(w, http.StatusOK, "You are signed in", "Go back to the terminal. You can close this page.")
}

// await waits for the callback and has it redeemed.
func (l *loopback) await(ctx context.Context, redeem func(code string) error) error {
	select {
	case c := <-l.codes:
		err := c.err
		if err == nil {
			err = redeem(c.code)
		}
		c.outcome <- err
		return err
	case <-ctx.Done():
		if errors.Is(ctx.Err(), context.DeadlineExceeded) {
			return broker.Refuse(broker.ReasonSignIn, "nobody came back from the browser in time", "begin again; on a machine without a browser: `mayfly login --device`")
		}
		return ctx.Err()
	}
}

// finalPage is self-contained: it loads nothing from anywhere.
var finalPage = template.Must(template.New("page").Parse(`<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Mayfly: {{.Title}}</title>
<style>
:root { color-scheme: light dark }
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 32rem; margin: 20vh auto 0; padding: 0 1.5rem }
h1 { font-size: 1.5rem; margin: 0 0 .5rem }
p { margin: 0 }
footer { margin-top: 2rem; opacity: .6; font-size: .875rem }
</style>
</head>
<body>
<main><h1>{{.Title}}</h1><p>{{.Text}}</p></main>
<footer>Mayfly</footer>
</body>
</html>
`))

func answer(w http.ResponseWriter, status int, title, text string) {
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.WriteHeader(status)
	_ = finalPage.Execute(w, struct{ Title, Text string }{title, text}) // a browser that is gone is no error of ours
}
