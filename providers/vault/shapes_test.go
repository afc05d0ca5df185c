package vault

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
)

// upstream are words of Vault's and PostgreSQL's that an agent is never told.
var upstream = []string{"1 error occurred", "permission denied", "SQLSTATE", "sys/", "auth/", "creds/", "http", "connect:", "EOF", "quota \"", "sealed\"", "hvs."}

// wantTold checks what an agent and what an operator is told of a failure.
func wantTold(t *testing.T, p *provider, a *attempt, reason broker.Reason, operator string) {
	t.Helper()
	if a.err == nil || !a.minted.Secret.IsZero() {
		t.Fatal("there is no error")
	}
	if !strings.Contains(a.err.Error(), operator) {
		t.Errorf("the operator is told %q, and wants %q", a.err, operator)
	}
	if !isNothing(a.err) {
		if reason != "" {
			t.Errorf("the outcome is not known: %v", a.err)
		}
		return
	}
	var told *broker.Error
	if !errors.As(a.err, &told) || told.Reason != reason || told.Next == "" {
		t.Fatalf("the agent is told %+v, want %q", told, reason)
	}
	for _, word := range upstream {
		if strings.Contains(told.Message+told.Next, word) {
			t.Errorf("the agent is told %q", told.Message)
		}
	}
}

// TestShapes puts a real Vault into each of the conditions of which it is
// known what it answers.
func TestShapes(t *testing.T) {
	v, pg := ownServers(t)
	w := newWorld(t, v, pg)
	missing := broker.Tool{Name: "gone.mount", MaxTTL: time.Minute, Scope: json.RawMessage(`{"engine":"database","path":"nowhere/creds/x"}`)}
	unknown := broker.Tool{Name: "gone.role", MaxTTL: time.Minute, Scope: json.RawMessage(fmt.Sprintf(`{"engine":"database","path":"%s/creds/x"}`, w.mount("database")))}
	unset := broker.Tool{Name: "not.set.up", MaxTTL: time.Minute, Scope: json.RawMessage(fmt.Sprintf(`{"engine":"database","path":"%s/creds/x"}`, w.mount("database")))}
	unallowed := broker.Tool{Name: "un.allowed", MaxTTL: time.Minute, Scope: json.RawMessage(fmt.Sprintf(`{"engine":"database","path":"%s/creds/crm-read-1m"}`, w.mount("database")))}
	p := w.setup(w.database(), unknown, unallowed).open()
	w.write("auth/token/roles/"+w.prefix()+"gone.mount", map[string]any{"allowed_policies": w.prefix() + "gone.mount", "orphan": true, "token_num_uses": 2})
	w.write("sys/policies/acl/"+w.prefix()+"gone.mount", map[string]any{"policy": `path "nowhere/creds/x" { capabilities = ["read"] }`})
	policy, err := v.client.Sys().GetPolicy(w.prefix() + "_broker")
	if err != nil {
		t.Fatal(err)
	}
	w.write("sys/policies/acl/"+w.prefix()+"_broker", map[string]any{"policy": policy + fmt.Sprintf("\npath \"auth/token/create/%sgone.mount\" { capabilities = [\"update\"] }\npath \"auth/token/create/%sno.role\" { capabilities = [\"update\"] }", w.prefix(), w.prefix())})
	noRole := broker.Tool{Name: "no.role", MaxTTL: time.Minute, Scope: unset.Scope}
	if _, err := v.client.Logical().Delete(w.mount("database") + "/roles/x"); err != nil {
		t.Fatal(err)
	}
	w.write("sys/policies/acl/"+w.prefix()+"un.allowed", map[string]any{"policy": `path "another" { capabilities = ["read"] }`})

	t.Run("refused", func(t *testing.T) {
		for name, c := range map[string]struct {
			tool     broker.Tool
			operator string
		}{
			"missing mount":         {missing, "404"},
			"unknown database role": {unknown, "unknown role"},
			"unknown token role":    {noRole, "400"},
			"tool without setup":    {unset, "permission denied"},
			"denied":                {unallowed, "permission denied"},
		} {
			a := mint(t.Context(), p, w.request(c.tool, time.Minute))
			t.Logf("%s: %v", name, a.err)
			wantTold(t, p, a, broker.ReasonProviderRefused, c.operator)
			if !errors.Is(a.err, providers.ErrRefused) || errors.Is(a.err, providers.ErrAway) {
				t.Errorf("%s: %v", name, a.err)
			}
			if left := w.tokensOf(a.req.Lease); len(left) > 0 {
				t.Errorf("%s: %d tokens are left", name, len(left))
			}
		}
	})

	t.Run("quota", func(t *testing.T) {
		w.t = t
		a := w.mint(p, w.database(), time.Minute)
		w.write("sys/quotas/rate-limit/low", map[string]any{"rate": 1, "interval": "1h", "path": "auth/token/"})
		if first := mint(t.Context(), p, w.request(w.database(), time.Minute)); first.err == nil { // it uses the quota up
			defer func() {
				if d := p.Revoke(t.Context(), []providers.Ending{first.ending()})[0]; d.Progress != broker.ProgressVerified {
					t.Errorf("%+v", d)
				}
			}()
		}
		b := mint(t.Context(), p, w.request(w.database(), time.Minute))
		t.Log(b.err)
		wantTold(t, p, b, broker.ReasonProvider, "429")
		if !errors.Is(b.err, providers.ErrAway) {
			t.Error(b.err)
		}
		if d := p.Revoke(t.Context(), []providers.Ending{a.ending()})[0]; !errors.Is(d.Err, providers.ErrAway) {
			t.Errorf("%+v", d)
		}
		if _, err := v.client.Logical().Delete("sys/quotas/rate-limit/low"); err != nil {
			t.Fatal(err)
		}
		if d := p.Revoke(t.Context(), []providers.Ending{a.ending()})[0]; d.Progress != broker.ProgressVerified {
			t.Errorf("%+v", d)
		}
	})

	t.Run("PostgreSQL down", func(t *testing.T) {
		w.t = t
		alone := w.open()
		alone.directs = nil // as without a login of our own
		a := w.mint(p, w.database(), time.Minute)
		must(t, pg.Stop(t.Context()))
		b := mint(t.Context(), p, w.request(w.database(), time.Minute))
		t.Log(b.err)
		wantTold(t, p, b, "", "500")
		for name, q := range map[string]*provider{"direct": p, "alone": alone} {
			d := q.Revoke(t.Context(), []providers.Ending{a.ending()})[0]
			t.Log(d.Err)
			if d.Err == nil || d.Progress != broker.ProgressNone || errors.Is(d.Err, providers.ErrAway) {
				t.Errorf("%s: %+v", name, d)
			}
		}
		if _, err := p.List(t.Context()); err == nil {
			t.Error("what cannot be looked at was listed")
		}
		must(t, pg.Start(t.Context()))
		e := b.ending()
		e.Settles = time.Now().Add(-time.Second)
		for i, d := range p.Revoke(t.Context(), []providers.Ending{a.ending(), e}) {
			if d.Progress != broker.ProgressVerified {
				t.Errorf("%d: %+v", i, d)
			}
		}
		if left := w.roles("mf_"); len(left) > 0 {
			t.Errorf("left: %q", left)
		}
	})

	away := func(t *testing.T, operator string) {
		t.Helper()
		p.session.mu.Lock()
		p.session.retryAt = time.Time{}
		p.session.mu.Unlock()
		a := mint(t.Context(), p, w.request(w.database(), time.Minute))
		t.Log(a.err)
		wantTold(t, p, a, broker.ReasonProvider, operator)
		if !errors.Is(a.err, providers.ErrAway) {
			t.Error(a.err)
		}
	}
	back := func(t *testing.T, leases ...*attempt) {
		t.Helper()
		must(t, v.Unseal(t.Context()))
		p.session.mu.Lock()
		p.session.retryAt = time.Time{}
		p.session.mu.Unlock()
		for _, a := range leases {
			if d := p.Confirm(t.Context(), []providers.Ending{a.ending()})[0]; d.Progress != broker.ProgressVerified {
				t.Errorf("%+v", d)
			}
			if len(w.tokensOf(a.req.Lease)) > 0 {
				t.Error("the token is left")
			}
		}
	}

	t.Run("sealed", func(t *testing.T) {
		w.t = t
		a := w.mint(p, w.database(), time.Minute)
		must(t, v.Seal(t.Context()))
		away(t, "503")
		// Access ends all the same, and is said to have ended no more than it has.
		d := p.Revoke(t.Context(), []providers.Ending{a.ending()})[0]
		if !errors.Is(d.Err, providers.ErrAway) || d.Progress != broker.ProgressWritten || w.connects(a.minted.Secret) {
			t.Errorf("%+v, and it works: %v", d, w.connects(a.minted.Secret))
		}
		back(t, a)
	})

	t.Run("down", func(t *testing.T) {
		w.t = t
		a, b := w.mint(p, w.database(), time.Minute), w.mint(p, w.database(), time.Minute)
		must(t, v.Kill())
		away(t, "connection")
		for _, d := range p.Revoke(t.Context(), []providers.Ending{a.ending(), b.ending()}) {
			if !errors.Is(d.Err, providers.ErrAway) || d.Progress != broker.ProgressWritten {
				t.Errorf("%+v", d)
			}
		}
		if left := w.roles("mf_"); len(left) > 0 {
			t.Errorf("left: %q", left)
		}
		must(t, v.Start(t.Context()))
		back(t, a, b)
	})

	// Sealed and unsealed while a login was good: the token is still known.
	t.Run("after it came back", func(t *testing.T) { w.t = t; w.cycle(p) })
}

// TestProxiedShapes are answers of nodes and proxies that cannot be had from
// one Vault here; a proxy gives them in its place.
func TestProxiedShapes(t *testing.T) {
	v, pg := servers(t)
	w := newWorld(t, v, pg)
	px := newProxy(t, v.address())
	w.address = px.URL
	p := w.setup(w.database()).open()
	w.cycle(p)
	for name, c := range map[string]struct {
		status int
		body   string
		away   bool
	}{
		"no leader":               {500, `{"errors":["local node not active but active cluster node not found"]}`, true},
		"standby, leader is dead": {307, ``, true},
		"standby for recovery":    {472, `{"errors":["path disabled in replication DR secondary mode"]}`, true},
		"sealed":                  {503, `{"errors":["Vault is sealed"]}`, true},
		"behind":                  {412, `{"errors":["required index state not present"]}`, true},
		"load balancer":           {502, `<html>bad gateway</html>`, true},
		"not initialized":         {501, ``, true},
		"quota":                   {429, `{"errors":["request path \"x\": rate limit quota exceeded"]}`, true},
		"internal error":          {500, `{"errors":["1 error occurred:\n\t* something\n\n"]}`, false},
		"denied":                  {403, `{"errors":["1 error occurred:\n\t* permission denied\n\n"]}`, false},
	} {
		for _, at := range []step{stepCreate, stepLease} {
			a := mint(t.Context(), p, w.request(w.database(), time.Minute))
			if a.err != nil {
				t.Fatal(a.err)
			}
			px.set(func(s step, _ int, _ func() *answer, rw http.ResponseWriter) bool {
				if s != at {
					return false
				}
				if c.status == 307 {
					rw.Header().Set("Location", "http://127.0.0.1:1/v1/sys/x")
				}
				rw.WriteHeader(c.status)
				fmt.Fprint(rw, c.body)
				return true
			})
			var err error
			if at == stepCreate {
				b := mint(t.Context(), p, w.request(w.database(), time.Minute))
				if err = b.err; !isNothing(err) {
					t.Errorf("%s: %v", name, err)
				}
				reason := broker.ReasonProvider
				if c.status == 403 {
					reason = broker.ReasonProviderRefused
				}
				wantTold(t, p, b, reason, fmt.Sprint(c.status))
			} else {
				err = p.Revoke(t.Context(), []providers.Ending{a.ending()})[0].Err
			}
			if err == nil || errors.Is(err, providers.ErrAway) != c.away {
				t.Errorf("%s at %s: %v", name, at, err)
			}
			px.set(nil)
			if d := p.Confirm(t.Context(), []providers.Ending{a.ending()})[0]; at == stepLease && d.Progress != broker.ProgressVerified {
				t.Errorf("%s: %+v", name, d)
			}
			if d := p.Revoke(t.Context(), []providers.Ending{a.ending()})[0]; d.Progress != broker.ProgressVerified {
				t.Errorf("%s: %+v", name, d)
			}
		}
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
