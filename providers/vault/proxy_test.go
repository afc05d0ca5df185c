package vault

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
)

// step is one kind of call to Vault.
type step string

const (
	stepLogin    step = "login"
	stepCreate   step = "create"
	stepRead     step = "read"
	stepLease    step = "revoke"
	stepAccessor step = "accessor"
)

func stepOf(r *http.Request) step {
	switch path := r.URL.Path; {
	case strings.HasSuffix(path, "/login"):
		return stepLogin
	case strings.Contains(path, "/token/create/"):
		return stepCreate
	case strings.Contains(path, "/sys/leases/revoke/"):
		return stepLease
	case strings.HasSuffix(path, "/revoke-accessor"):
		return stepAccessor
	}
	return stepRead
}

// proxy stands between the broker and a real Vault. It does to calls what a
// script says, and counts them.
type proxy struct {
	*httptest.Server
	target string
	client *http.Client

	mu     sync.Mutex
	counts map[step]int
	script func(s step, n int, forward func() *answer, rw http.ResponseWriter) bool
}

// answer is what Vault answered.
type answer struct {
	status int
	header http.Header
	body   []byte
}

func (a *answer) write(rw http.ResponseWriter) {
	for k, v := range a.header {
		rw.Header()[k] = v
	}
	rw.WriteHeader(a.status)
	rw.Write(a.body)
}

// script decides about the nth call of a step, from 1. forward makes the call
// at Vault. It returns false to have the call treated as any.
type script func(s step, n int, forward func() *answer, rw http.ResponseWriter) bool

func newProxy(t testing.TB, target string) *proxy {
	t.Helper()
	p := &proxy{target: target, counts: make(map[step]int), client: &http.Client{
		Transport:     &http.Transport{DisableKeepAlives: true}, // it must not repeat GETs either
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
	p.Server = httptest.NewServer(p)
	t.Cleanup(p.Close)
	return p
}

func (p *proxy) ServeHTTP(rw http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	forward := func() *answer {
		q, err := http.NewRequest(r.Method, p.target+r.URL.RequestURI(), bytes.NewReader(body))
		if err != nil {
			panic(err)
		}
		q.Header = r.Header.Clone()
		resp, err := p.client.Do(q)
		if err != nil {
			panic(http.ErrAbortHandler)
		}
		defer resp.Body.Close()
		content, _ := io.ReadAll(resp.Body)
		resp.Header.Del("Content-Length")
		return &answer{resp.StatusCode, resp.Header, content}
	}
	s := stepOf(r)
	p.mu.Lock()
	p.counts[s]++
	n, script := p.counts[s], p.script
	p.mu.Unlock()
	if script != nil && script(s, n, forward, rw) {
		return
	}
	forward().write(rw)
}

func (p *proxy) set(s script) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.script = s
	clear(p.counts)
}

func (p *proxy) count(s step) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.counts[s]
}

// faults are what happens to answers. Each is one call.
var faults = map[string]func(forward func() *answer, rw http.ResponseWriter){
	"cut before": func(func() *answer, http.ResponseWriter) { panic(http.ErrAbortHandler) },
	"cut after":  func(forward func() *answer, _ http.ResponseWriter) { forward(); panic(http.ErrAbortHandler) },
	"cut body": func(forward func() *answer, rw http.ResponseWriter) {
		a := forward()
		rw.Header().Set("Content-Length", "100000")
		rw.WriteHeader(a.status)
		rw.Write(a.body[:len(a.body)/2])
		rw.(http.Flusher).Flush()
		panic(http.ErrAbortHandler)
	},
	"half an answer": func(forward func() *answer, rw http.ResponseWriter) {
		a := forward()
		a.body = a.body[:len(a.body)/2]
		a.write(rw)
	},
	"twice":  func(forward func() *answer, rw http.ResponseWriter) { forward(); forward().write(rw) },
	"thrice": func(forward func() *answer, rw http.ResponseWriter) { forward(); forward(); forward().write(rw) },
	"429 after": func(forward func() *answer, rw http.ResponseWriter) {
		forward()
		http.Error(rw, "a proxy's page", http.StatusTooManyRequests)
	},
	"500": func(forward func() *answer, rw http.ResponseWriter) { forward(); http.Error(rw, "a proxy's page", 500) },
	"503": func(forward func() *answer, rw http.ResponseWriter) {
		forward()
		http.Error(rw, "a proxy's page", http.StatusServiceUnavailable)
	},
	"delay": func(forward func() *answer, rw http.ResponseWriter) {
		a := forward()
		time.Sleep(200 * time.Millisecond)
		a.write(rw)
	},
	"302": func(_ func() *answer, rw http.ResponseWriter) {
		rw.Header().Set("Location", "http://127.0.0.1:1/v1/x")
		rw.WriteHeader(302)
	},
	"empty":  func(forward func() *answer, rw http.ResponseWriter) { forward(); rw.WriteHeader(200) },
	"larger": func(forward func() *answer, rw http.ResponseWriter) { forward(); rw.Write(make([]byte, maxAnswer+2)) },
}

// tokensOf are the accessors of the tokens that bear a lease's name.
func (w *world) tokensOf(lease broker.LeaseID) []string {
	w.t.Helper()
	list, err := w.v.client.Logical().List("auth/token/accessors")
	if err != nil || list == nil {
		w.t.Fatalf("listing tokens: %v", err)
	}
	var found []string
	for _, each := range list.Data["keys"].([]any) {
		token, err := w.v.client.Auth().Token().LookupAccessor(each.(string))
		if err != nil || token == nil {
			continue // it ended meanwhile
		}
		if meta, _ := token.Data["meta"].(map[string]any); meta["mayfly_lease"] == string(lease) {
			found = append(found, each.(string))
		}
	}
	return found
}

// TestLostAnswers: whatever becomes of one answer at whichever step, nothing
// is made twice, what is delivered works, and after the ending nothing is left.
func TestLostAnswers(t *testing.T) {
	v, pg := servers(t)
	w := newWorld(t, v, pg)
	px := newProxy(t, v.address())
	w.address = px.URL
	p := w.setup(w.database()).open()
	for name, fault := range faults {
		copied := name == "twice" || name == "thrice"
		for _, at := range []step{stepLogin, stepCreate, stepRead, stepLease, stepAccessor} {
			t.Run(string(at)+"/"+name, func(t *testing.T) {
				w.t = t
				px.set(func(s step, n int, forward func() *answer, rw http.ResponseWriter) bool {
					if s != at || n > 1 {
						return false
					}
					fault(forward, rw)
					return true
				})
				p.session.dropped(p.session.token)
				p.session.retryAt = time.Time{}
				a := mint(t.Context(), p, w.request(w.database(), 2*time.Minute))
				t.Logf("%v", a.err)
				made := len(w.rolesOf(a.req.Lease))
				if n := px.count(stepRead); n > 1 {
					t.Errorf("the credential was read %d times", n)
				}
				if n := px.count(stepCreate); n > 1 {
					t.Errorf("%d tokens were asked for", n)
				}
				switch {
				case a.err == nil && !w.connects(a.minted.Secret):
					t.Error("it does not work")
				case a.err != nil && !a.minted.Secret.IsZero():
					t.Error("an error and a secret")
				case isNothing(a.err) && (made > 0 || at == stepRead):
					t.Errorf("%v; and there are %d roles, or were", a.err, made)
				case isNothing(a.err) && broker.ReasonOf(a.err) == broker.ReasonInternal:
					t.Errorf("the agent is told nothing: %v", a.err)
				}
				if made > 1 && !copied {
					t.Errorf("%d roles were made", made)
				}
				e := a.ending()
				if a.err != nil {
					if isNothing(a.err) {
						return // the engine asks no more
					}
					// The attempt may be under way: the token is not to be touched.
					e.Settles = time.Now().Add(time.Hour)
					if d := insist(t, p, e); d.Err != nil || d.Progress == broker.ProgressVerified || !d.RetryAt.Equal(e.Settles) {
						t.Errorf("before it settles: %+v", d)
					}
					if !copied && !w.tokenLives(handleOf(t, e.Handle).Accessor) {
						t.Error("the token was ended while a read with it might be under way")
					}
					if left := w.rolesOf(a.req.Lease); len(left) > 0 {
						t.Errorf("roles are left while the attempt settles: %q", left)
					}
					e.Settles = time.Now().Add(-time.Second)
				}
				if d := insist(t, p, e); d.Progress != broker.ProgressVerified {
					t.Errorf("%+v", d)
				}
				if left := w.rolesOf(a.req.Lease); len(left) > 0 {
					t.Errorf("roles are left: %q", left)
				}
				if left := w.tokensOf(a.req.Lease); len(left) > 0 && (at != stepCreate || !copied) {
					t.Errorf("%d tokens are left", len(left))
				}
			})
		}
	}
}

// insist ends a lease as the engine does, which asks again while that fails. A
// token whose uses are over is ended by Vault itself, and a role that Vault drops
// at the same moment is there still.
func insist(t *testing.T, p *provider, e providers.Ending) (d providers.Death) {
	t.Helper()
	for range 50 {
		if d = p.Revoke(t.Context(), []providers.Ending{e})[0]; d.Err == nil {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	return d
}

// usesOf is how many uses a token has left, or "none" if it is gone.
func (w *world) usesOf(accessor string) string {
	token, err := w.v.client.Auth().Token().LookupAccessor(accessor)
	if err != nil {
		return "none"
	}
	return fmt.Sprint(token.Data["num_uses"])
}

// TestCopies: a proxy that sends a read several times, and gives the answer that
// comes first, says nothing about the copies that are under way.
func TestCopies(t *testing.T) {
	v, pg := servers(t)
	for name, copies := range map[string]int{"thrice": 2, "429": 1} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, v, pg)
			px := newProxy(t, v.address())
			w.address = px.URL
			p := w.setup(w.database()).open()
			// A database that takes its time to make a role.
			path := w.mount("database") + "/roles/crm-read-1m"
			role, err := v.client.Logical().Read(path)
			if err != nil {
				t.Fatal(err)
			}
			statements := role.Data["creation_statements"].([]any)
			role.Data["creation_statements"] = append([]any{"SELECT pg_sleep(1);"}, statements...)
			w.write(path, role.Data)

			var underWay sync.WaitGroup
			req := w.request(w.database(), 2*time.Minute)
			px.set(func(s step, _ int, forward func() *answer, rw http.ResponseWriter) bool {
				if s != stepRead {
					return false
				}
				accessor := w.tokensOf(req.Lease)[0]
				for range copies {
					before := w.usesOf(accessor)
					underWay.Go(func() { forward() })
					for w.usesOf(accessor) == before { // until Vault has taken it
						time.Sleep(time.Millisecond)
					}
				}
				if copies > 1 {
					forward().write(rw)
				} else {
					http.Error(rw, "a proxy's page", http.StatusTooManyRequests)
				}
				return true
			})
			a := mint(t.Context(), p, req)
			t.Log(a.err)
			if a.err == nil || isNothing(a.err) {
				t.Errorf("%v, while copies of the read are under way", a.err)
			}
			underWay.Wait()
			if copies == 1 && len(w.rolesOf(a.req.Lease)) != 1 {
				t.Errorf("there are %d roles: the copy was cut off", len(w.rolesOf(a.req.Lease)))
			}
			e := a.ending()
			e.Settles = time.Now().Add(-time.Second)
			if d := insist(t, p, e); d.Progress != broker.ProgressVerified {
				t.Errorf("%+v", d)
			}
			if left := w.rolesOf(a.req.Lease); len(left) > 0 {
				t.Errorf("roles are left: %q", left)
			}
			if left := w.tokensOf(a.req.Lease); len(left) > 0 {
				t.Errorf("%d tokens are left", len(left))
			}
		})
	}
}

// TestLate: an answer that comes after the longest that Vault itself takes is
// not waited for, whoever asked waits no longer than the attempt may take, and
// what it made is found.
func TestLate(t *testing.T) {
	v, pg := servers(t)
	w := newWorld(t, v, pg)
	px := newProxy(t, v.address())
	w.address, w.limit = px.URL, "1s"
	p := w.setup(w.database()).open()
	release := make(chan struct{})
	px.set(func(s step, n int, forward func() *answer, rw http.ResponseWriter) bool {
		if s != stepRead {
			return false
		}
		forward()
		<-release
		return true
	})
	defer close(release)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	a := mint(ctx, p, w.request(w.database(), time.Minute))
	if a.err == nil || isNothing(a.err) || kindOf(a.err) != late {
		t.Fatalf("%v", a.err)
	}
	if n := len(w.rolesOf(a.req.Lease)); n != 1 {
		t.Fatalf("%d roles", n)
	}
	e := a.ending()
	e.Settles = time.Now().Add(-time.Second)
	if d := p.Revoke(t.Context(), []providers.Ending{e})[0]; d.Progress != broker.ProgressVerified || len(w.rolesOf(a.req.Lease)) > 0 {
		t.Errorf("%+v", d)
	}
}

// TestDetached: an agent that leaves does not cut the read off, and what was
// made for it is known.
func TestDetached(t *testing.T) {
	v, pg := servers(t)
	w := newWorld(t, v, pg)
	px := newProxy(t, v.address())
	w.address = px.URL
	p := w.setup(w.database()).open()
	ctx, leave := context.WithCancel(t.Context())
	px.set(func(s step, n int, forward func() *answer, rw http.ResponseWriter) bool {
		if s == stepRead {
			leave()
			time.Sleep(50 * time.Millisecond)
		}
		return false
	})
	a := mint(ctx, p, w.request(w.database(), time.Minute))
	if a.err != nil || !w.connects(a.minted.Secret) {
		t.Errorf("%v", a.err)
	}
}

// TestSlowLease: one lease whose database hangs holds up no other, and its own
// ending is tried again.
func TestSlowLease(t *testing.T) {
	v, pg := servers(t)
	w := newWorld(t, v, pg)
	px := newProxy(t, v.address())
	w.address, w.noDirect = px.URL, true
	p := w.setup(w.database()).open()
	a, b := w.mint(p, w.database(), time.Minute), w.mint(p, w.database(), time.Minute)
	release := make(chan struct{})
	px.set(func(s step, n int, forward func() *answer, rw http.ResponseWriter) bool {
		if s == stepLease && n == 1 {
			<-release
			panic(http.ErrAbortHandler)
		}
		return false
	})
	defer close(release)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	deaths := p.Revoke(ctx, []providers.Ending{a.ending(), b.ending()})
	slow, quick := deaths[0], deaths[1]
	if slow.Err == nil {
		slow, quick = quick, slow
	}
	if quick.Progress != broker.ProgressVerified || quick.Err != nil {
		t.Errorf("the other: %+v", quick)
	}
	if slow.Err == nil || errors.Is(slow.Err, providers.ErrAway) {
		t.Errorf("the slow one, at a Vault that is there: %+v", slow)
	}
	for _, d := range p.Revoke(t.Context(), []providers.Ending{a.ending(), b.ending()}) {
		if d.Progress != broker.ProgressVerified {
			t.Errorf("again: %+v", d)
		}
	}
}

// TestOrder: the lease ends in Vault before its token does. The other way
// round Vault ends the lease some time, and can forget it.
func TestOrder(t *testing.T) {
	v, pg := servers(t)
	for name, noDirect := range map[string]bool{"direct": false, "Vault alone": true} {
		w := newWorld(t, v, pg)
		px := newProxy(t, v.address())
		w.address, w.noDirect = px.URL, noDirect
		p := w.setup(w.database()).open()
		a := w.mint(p, w.database(), time.Minute)
		px.set(func(s step, _ int, _ func() *answer, _ http.ResponseWriter) bool {
			if s == stepLease && px.count(stepAccessor) > 0 {
				t.Errorf("%s: the token was ended first", name)
			}
			return false
		})
		if d := p.Revoke(t.Context(), []providers.Ending{a.ending()})[0]; d.Progress != broker.ProgressVerified {
			t.Errorf("%s: %+v", name, d)
		}
		if px.count(stepLease) != 1 || px.count(stepAccessor) != 1 {
			t.Errorf("%s: %d calls for the lease, %d for the token", name, px.count(stepLease), px.count(stepAccessor))
		}
	}
}

// TestHung: a Vault that takes connections and answers nothing is away for
// everybody, and not one lease's matter.
func TestHung(t *testing.T) {
	v, pg := servers(t)
	w := newWorld(t, v, pg)
	p := w.setup(w.database()).open()
	a := w.mint(p, w.database(), time.Minute)
	if err := v.Pause(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	d := p.Revoke(ctx, []providers.Ending{a.ending()})[0]
	ctx, cancel = context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	b := mint(ctx, p, w.request(w.database(), time.Minute))
	works := w.connects(a.minted.Secret)
	if err := v.Resume(); err != nil {
		t.Fatal(err)
	}
	if !errors.Is(d.Err, providers.ErrAway) || d.Progress != broker.ProgressWritten || works {
		t.Errorf("%+v, and it works: %v", d, works)
	}
	wantRefused(t, b, broker.ReasonProvider)
	if !errors.Is(b.err, providers.ErrAway) {
		t.Errorf("%v", b.err)
	}
	if d := p.Confirm(t.Context(), []providers.Ending{a.ending()})[0]; d.Progress != broker.ProgressVerified {
		t.Errorf("%+v", d)
	}
}
