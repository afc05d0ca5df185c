package server_test

import (
	"crypto/tls"
	"crypto/x509"
	"testing"
	"time"

	"github.com/mayfly-security/mayfly/broker"
)

// TestI10_EachRequestStandsAlone takes away, one at a time, what a request
// lives on, while its connection stays open: the next request on the same
// connection is refused, and so is one on a connection that would resume the
// TLS session.
func TestI10_EachRequestStandsAlone(t *testing.T) {
	cases := map[string]struct {
		lose   func(*rig)
		status int
		want   broker.Reason
	}{
		"the SVID expires": {func(r *rig) { r.ahead.Store(int64(25 * time.Second)) },
			401, broker.ReasonSVIDExpired},
		"the authority leaves the bundle": {(*rig).rotateAuthority,
			401, broker.ReasonUntrusted},
		"the agent is disabled": {func(r *rig) { r.reload("disabled: false # support", "disabled: true") },
			403, broker.ReasonAgentDisabled},
		"the agent is removed": {func(r *rig) { r.reload("agent/support", "agent/former") },
			403, broker.ReasonAgentUnknown},
		"the tool is widened": {func(r *rig) { r.reload("scopes: [crm.read]", "scopes: [crm.read, crm.write]") },
			403, broker.ReasonGrantSuspended},
		"the grant is withdrawn": {func(r *rig) { r.withdrawAll() },
			403, broker.ReasonNoGrant},
	}
	const issue = `{"tool": "crm.read"}`
	for name, c := range cases {
		for _, protocol := range protocols {
			t.Run(name+", "+protocol, func(t *testing.T) {
				t.Parallel()
				r := newRig(t)
				r.grant(support, "crm.read")
				r.grant(other, "db.read")
				agent := r.clientWith(svid(t, r.trust, support, func(cert *x509.Certificate) {
					cert.NotAfter = time.Now().Add(20 * time.Second)
				}), protocol)
				sessions := &sessionCache{ClientSessionCache: tls.NewLRUClientSessionCache(8)}
				agent.transport.TLSClientConfig.ClientSessionCache = sessions

				for i, reused := range []bool{false, true} {
					if a := agent.post("AccessService/IssueLease", issue); a.status != 200 || a.reused != reused {
						t.Fatalf("request %d: %d %s, connection reused: %t", i+1, a.status, a.body, a.reused)
					}
				}
				c.lose(r)
				a := agent.post("AccessService/IssueLease", issue)
				a.wantRefused(t, "the next request", c.status, c.want)
				if !a.reused {
					t.Error("the next request was not made on the same connection")
				}
				agent.transport.CloseIdleConnections()
				a = agent.post("AccessService/IssueLease", issue)
				a.wantRefused(t, "on a new connection", c.status, c.want)
				if a.reused || a.resumed {
					t.Errorf("on a new connection: it was reused: %t; its session was resumed: %t", a.reused, a.resumed)
				}
				if sessions.put {
					t.Error("the server gave a session to resume")
				}
				// It is the one who lost it that is refused, and nobody else.
				if a := r.client(other).post("AccessService/IssueLease", `{"tool": "db.read"}`); a.status != 200 {
					t.Errorf("another agent: %d %s", a.status, a.body)
				}
			})
		}
	}
}

// sessionCache knows whether there was ever something in it.
type sessionCache struct {
	tls.ClientSessionCache
	put bool
}

func (s *sessionCache) Put(key string, state *tls.ClientSessionState) {
	s.put = s.put || state != nil
	s.ClientSessionCache.Put(key, state)
}

// rotateAuthority replaces the trust domain's authority and returns when the
// broker has heard of it through the Workload API.
func (r *rig) rotateAuthority() {
	r.t.Helper()
	if err := r.trust.RotateCA(); err != nil {
		r.t.Fatal(err)
	}
	if err := r.trust.DropOldAuthorities(); err != nil {
		r.t.Fatal(err)
	}
	ctx := bounded(r.t)
	for {
		updated := r.identity.Updated()
		b, err := r.identity.GetX509BundleForTrustDomain(domain)
		if err != nil {
			r.t.Fatal(err)
		}
		if b.Equal(r.trust.Bundle().X509Bundle()) {
			return
		}
		select {
		case <-updated:
		case <-ctx.Done():
			r.t.Fatal("the broker did not hear of the new bundle")
		}
	}
}

// withdrawAll withdraws the grants of the agent support.
func (r *rig) withdrawAll() {
	r.t.Helper()
	operator := r.client(sam)
	for _, g := range operator.listGrants(support.String()) {
		if a := operator.post("GrantService/WithdrawGrant", `{"id": "`+g+`"}`); a.status != 200 {
			r.t.Fatalf("withdrawing: %d %s", a.status, a.body)
		}
	}
}
