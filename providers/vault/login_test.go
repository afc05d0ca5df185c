package vault

import (
	"context"
	"crypto/tls"
	"errors"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
)

// TestLoginAgain: a login that Vault has dropped costs no request, and one
// that nears its end is replaced before.
func TestLoginAgain(t *testing.T) {
	v, pg := servers(t)
	w := newWorld(t, v, pg)
	px := newProxy(t, v.address())
	w.address = px.URL
	p := w.setup(w.database()).open()
	a := w.mint(p, w.database(), time.Minute)
	first := p.session.token
	if err := v.client.Auth().Token().RevokeTree(first); err != nil {
		t.Fatal(err)
	}
	b := w.mint(p, w.database(), time.Minute) // at once
	if p.session.token == first || px.count(stepLogin) != 2 || px.count(stepRead) != 2 {
		t.Errorf("%d logins, %d reads", px.count(stepLogin), px.count(stepRead))
	}
	if err := v.client.Auth().Token().RevokeTree(p.session.token); err != nil {
		t.Fatal(err)
	}
	for _, d := range p.Revoke(t.Context(), []providers.Ending{a.ending(), b.ending()}) {
		if d.Progress != broker.ProgressVerified {
			t.Errorf("%+v", d)
		}
	}

	// Two thirds of a life: the old one still serves, while a new one comes.
	s := p.session
	s.mu.Lock()
	old := s.token
	if left := time.Until(s.renewAt); left < 9*time.Minute || left > 10*time.Minute {
		t.Errorf("it is replaced in %s, and lives 15m", left)
	}
	s.renewAt = time.Now()
	s.mu.Unlock()
	token, err := s.get(t.Context())
	if err != nil || token != old {
		t.Errorf("a login that is good still was not used: %v", err)
	}
	s.wg.Wait()
	if token, err := s.get(t.Context()); err != nil || token == old {
		t.Errorf("it was not replaced: %v", err)
	}
}

// TestLoginOnce: however many wait, one login is made; and after a failure
// there is a pause in which nobody tries.
func TestLoginOnce(t *testing.T) {
	v, pg := servers(t)
	w := newWorld(t, v, pg)
	px := newProxy(t, v.address())
	w.address = px.URL
	p := w.setup(w.database()).open()
	release := make(chan struct{})
	px.set(func(s step, n int, _ func() *answer, rw http.ResponseWriter) bool {
		if s == stepLogin && n == 1 {
			<-release
			rw.WriteHeader(http.StatusServiceUnavailable)
			return true
		}
		return false
	})
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			_, err := p.session.get(context.Background())
			if !errors.Is(err, providers.ErrAway) {
				t.Errorf("%v", err)
			}
		})
	}
	time.AfterFunc(50*time.Millisecond, func() { close(release) })
	wg.Wait()
	if n := px.count(stepLogin); n != 1 {
		t.Errorf("%d logins at once", n)
	}
	for range 20 {
		if _, err := p.session.get(t.Context()); !errors.Is(err, providers.ErrAway) {
			t.Errorf("%v", err)
		}
	}
	if n := px.count(stepLogin); n != 1 {
		t.Errorf("%d logins in the pause", n)
	}
	p.session.mu.Lock()
	if left := time.Until(p.session.retryAt); left <= 0 || left > loginPauseMax+loginPauseMax/2 {
		t.Errorf("the pause is %s", left)
	}
	p.session.retryAt = time.Now()
	p.session.mu.Unlock()
	if _, err := p.session.get(t.Context()); err != nil {
		t.Errorf("after the pause: %v", err)
	}
}

// liar is a broker's identity that is somebody else's, or none.
type liar struct{ token string }

func (l liar) JWTSVID(context.Context, string) (string, time.Time, error) {
	if l.token == "" {
		return "", time.Time{}, errors.New("the Workload API is away")
	}
	return l.token, time.Now().Add(time.Minute), nil
}

func (liar) ClientCertificate(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
	return &tls.Certificate{}, nil
}

// TestLoginRefused: whom Vault does not let in is away for everything, and is
// told so.
func TestLoginRefused(t *testing.T) {
	v, pg := servers(t)
	w := newWorld(t, v, pg)
	w.setup(w.database())
	jwt, _, err := w.login.JWTSVID(t.Context(), "https://another.test")
	if err != nil {
		t.Fatal(err)
	}
	for name, token := range map[string]string{"no identity": "", "another's": "not.a.jwt", "for another": jwt} {
		w.login = liar{token: token}
		p := w.open()
		a := mint(t.Context(), p, w.request(w.database(), time.Minute))
		wantRefused(t, a, broker.ReasonProvider)
		if !errors.Is(a.err, providers.ErrAway) {
			t.Errorf("%s: %v", name, a.err)
		}
		if token != "" && strings.Contains(a.err.Error(), token) {
			t.Errorf("%s: the token is told: %v", name, a.err)
		}
		d := p.Revoke(t.Context(), []providers.Ending{{Lease: a.req.Lease, Handle: providers.Handle(`{"v":1,"class":"leased","accessor":"x","mount":"m","lease_id":"m/creds/x/y","read":true}`)}})[0]
		if !errors.Is(d.Err, providers.ErrAway) || d.Progress != broker.ProgressNone {
			t.Errorf("%s: %+v", name, d)
		}
	}
}

// TestAwayAtOpen: a broker starts although Vault is not there.
func TestAwayAtOpen(t *testing.T) {
	v, pg := servers(t)
	w := newWorld(t, v, pg)
	w.setup(w.database())
	w.address = "http://127.0.0.1:1"
	p := w.open()
	a := mint(t.Context(), p, w.request(w.database(), time.Minute))
	wantRefused(t, a, broker.ReasonProvider)
	if !errors.Is(a.err, providers.ErrAway) {
		t.Errorf("%v", a.err)
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
	if _, err := p.session.get(t.Context()); err == nil {
		t.Error("a login after the end")
	}
}
