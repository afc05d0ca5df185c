package main

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-security/mayfly/broker"
)

// knock sends one request to a loopback listener.
func knock(t *testing.T, method, address, host string) (int, http.Header, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, address, nil)
	if err != nil {
		t.Fatal(err)
	}
	if host != "" {
		req.Host = host
	}
	res, err := http.DefaultTransport.RoundTrip(req) // no redirect is followed
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res.StatusCode, res.Header, string(body)
}

func listening(t *testing.T) *loopback {
	t.Helper()
	l, ln, err := listenOnLoopback()
	if err != nil {
		t.Fatal(err)
	}
	l.serve(ln, "the-state")
	t.Cleanup(l.close)
	if !strings.HasPrefix(l.uri, "http://127.0.0.1:") {
		t.Fatalf("it listens at %s", l.uri)
	}
	return l
}

// What is no callback of this sign-in is turned away, and ends nothing: the
// right one counts afterwards.
func TestLoopbackTurnsOthersAway(t *testing.T) {
	l := listening(t)
	long := strings.Repeat("x", 2*maxCode)
	for _, tt := range []struct {
		name, method, path, host string
		status                   int
	}{
		{"another path", "GET", "/", "", 404},
		{"another path with the state", "GET", "/callback/?code=evil&state=the-state", "", 404},
		{"a favicon", "GET", "/favicon.ico", "", 404},
		{"a form of another site", "POST", "/callback?code=evil&state=the-state", "", 405},
		{"a look", "HEAD", "/callback?code=evil&state=the-state", "", 405},
		{"a name that points here", "GET", "/callback?code=evil&state=the-state", "evil.test", 421},
		{"localhost by its name", "GET", "/callback?code=evil&state=the-state", "localhost", 421},
		{"no state", "GET", "/callback?code=evil", "", 400},
		{"an empty state", "GET", "/callback?code=evil&state=", "", 400},
		{"another state", "GET", "/callback?code=evil&state=the-stat", "", 400},
		{"a longer state", "GET", "/callback?code=evil&state=the-state2", "", 400},
		{"two states", "GET", "/callback?code=evil&state=the-state&state=x", "", 400},
		{"an error with another state", "GET", "/callback?error=access_denied&state=x", "", 400},
		{"neither code nor error", "GET", "/callback?state=the-state", "", 400},
		{"an empty code", "GET", "/callback?code=&state=the-state", "", 400},
		{"two codes", "GET", "/callback?code=a&code=b&state=the-state", "", 400},
		{"code and error", "GET", "/callback?code=a&error=b&state=the-state", "", 400},
		{"too long a code", "GET", "/callback?code=" + long + "&state=the-state", "", 400},
		{"a query that is none", "GET", "/callback?state=the-state&code=%zz", "", 400},
	} {
		status, head, body := knock(t, tt.method, "http://"+l.host+tt.path, tt.host)
		if status != tt.status || strings.Contains(body, "evil") || head.Get("Set-Cookie") != "" {
			t.Errorf("%s: status %d, want %d; %s", tt.name, status, tt.status, body)
		}
	}
	select {
	case c := <-l.codes:
		t.Fatalf("a callback was taken: %+v", c)
	default:
	}

	var got string
	done := make(chan error, 1)
	go func() {
		done <- l.await(t.Context(), func(code string) error { got = code; return nil })
	}()
	status, head, body := knock(t, "GET", l.uri+"?code=good&state=the-state", "")
	if err := <-done; err != nil || status != 200 || got != "good" || !strings.Contains(body, "You are signed in") {
		t.Errorf("the callback: %v, status %d, code %q, %s", err, status, got, body)
	}
	for name, want := range map[string]string{"Cache-Control": "no-store", "Referrer-Policy": "no-referrer", "X-Content-Type-Options": "nosniff"} {
		if head.Get(name) != want {
			t.Errorf("%s is %q", name, head.Get(name))
		}
	}
	if !strings.HasPrefix(head.Get("Content-Security-Policy"), "default-src 'none'") || strings.Contains(body, "<script") || strings.Contains(body, "good") {
		t.Errorf("the page is not harmless: %v %s", head, body)
	}

	// One callback: the second gets nothing, whatever it brings.
	for _, q := range []string{"?code=second&state=the-state", "?error=x&state=the-state"} {
		if status, _, _ := knock(t, "GET", l.uri+q, ""); status != 410 {
			t.Errorf("a second callback: status %d", status)
		}
	}
	if got != "good" {
		t.Errorf("the second callback became %q", got)
	}
}

func TestLoopbackTellsWhatBecameOfIt(t *testing.T) {
	for _, tt := range []struct {
		query, said string
		redeem      error
	}{
		{"?error=access_denied&error_description=" + url.QueryEscape("no\x1b[31m\u202e<b>") + "&state=the-state", "access_denied: no\ufffd[31m\ufffd<b>", nil},
		{"?error=login_required&state=the-state", "login_required", nil},
		{"?code=good&state=the-state", "the code is none", broker.Refuse(broker.ReasonSignIn, "the code is none", "begin again")},
	} {
		l := listening(t)
		done := make(chan error, 1)
		go func() { done <- l.await(t.Context(), func(string) error { return tt.redeem }) }()
		status, _, body := knock(t, "GET", l.uri+tt.query, "")
		err := <-done
		if broker.ReasonOf(err) != broker.ReasonSignIn || !strings.Contains(err.Error(), tt.said) {
			t.Errorf("%s: %v", tt.query, err)
		}
		if status != 403 || strings.Contains(body, "<b>") || !strings.Contains(body, "Not signed in") {
			t.Errorf("%s: status %d, %s", tt.query, status, body)
		}
	}
}

func TestLoopbackDoesNotWaitForEver(t *testing.T) {
	l := listening(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if err := l.await(ctx, nil); broker.ReasonOf(err) != broker.ReasonSignIn {
		t.Errorf("after the time: %v", err)
	}
	ctx, cancel = context.WithCancel(t.Context())
	cancel()
	if err := l.await(ctx, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("interrupted: %v", err)
	}
}
