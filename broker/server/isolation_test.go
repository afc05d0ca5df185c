package server_test

import (
	"crypto/tls"
	"fmt"
	"strings"
	"testing"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/broker"
	mayflyv1 "github.com/mayfly-security/mayfly/broker/api/mayfly/v1"
	"github.com/mayfly-security/mayfly/broker/audit"
	"github.com/mayfly-security/mayfly/broker/lease"
)

// What has the form of an ID and was never given to anything.
const (
	noLease    = "l0123456789abcdefghijklmno"
	noGrant    = "g0123456789abcdefghijklmno"
	noIncident = "i0123456789abcdefghijklmno"
)

// TestIsolation is an attacker who holds the SVID of one agent.
func TestIsolation(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	victims := r.grant(support, "crm.read")
	r.grant(other, "db.read")
	incident := r.client(pager).open("db.read")
	victim, attacker := r.client(support), r.client(other)
	theirs := victim.issueKeyed("crm.read", "one")
	mine := attacker.issueKeyed("db.read", "one")
	before := r.contents()

	t.Run("what is another's is like what is not", func(t *testing.T) {
		for _, c := range []struct{ method, theirs, not string }{
			{"AccessService/GetLease", theirs.GetLease().GetId(), noLease},
			{"AccessService/RevokeLease", theirs.GetLease().GetId(), noLease},
			{"IncidentService/GetIncident", incident.GetId(), noIncident},
			{"IncidentService/CloseIncident", incident.GetId(), noIncident},
			{"GrantService/WithdrawGrant", string(victims.ID), noGrant},
		} {
			a, b := attacker.post(c.method, `{"id": "`+c.theirs+`"}`), attacker.post(c.method, `{"id": "`+c.not+`"}`)
			want := broker.ReasonNotFound
			if strings.HasPrefix(c.method, "Grant") {
				want = broker.ReasonPermissionDenied // said before it is looked for
			}
			a.wantRefused(t, c.method, statuses[want], want)
			if a.shape(c.theirs) != b.shape(c.not) {
				t.Errorf("%s can be told apart:\n%s\n%s", c.method, a.shape(c.theirs), b.shape(c.not))
			}
		}
	})

	t.Run("listings show what is one's own", func(t *testing.T) {
		for _, c := range []struct{ method, body string }{
			{"AccessService/ListLeases", `{"all": true}`},
			{"AccessService/ListLeases", `{"grantId": "` + string(victims.ID) + `"}`},
			{"AccessService/ListLeases", `{"all": true, "grantId": "` + string(victims.ID) + `"}`},
			{"AccessService/ListLeases", `{"agent": "` + support.String() + `"}`},
			{"AccessService/ListLeases", `{"overdue": true}`},
			{"AccessService/ListLeases", `{"pageToken": "` + noLease + `"}`},
			{"GrantService/ListGrants", `{"all": true}`},
			{"GrantService/ListGrants", `{"agent": "` + support.String() + `"}`},
			{"GrantService/ListGrants", `{"incidentId": "` + incident.GetId() + `"}`},
			{"IncidentService/ListIncidents", `{"all": true}`},
			{"AccessService/ListTools", `{}`},
			{"AccessService/WhoAmI", `{}`},
		} {
			a := attacker.post(c.method, c.body)
			for _, s := range []string{theirs.GetLease().GetId(), string(victims.ID), incident.GetId(), support.String(), "crm.read"} {
				if a.status != 200 || strings.Contains(string(a.body), s) {
					t.Errorf("%s %s: %d, shows %q: %s", c.method, c.body, a.status, s, a.body)
				}
			}
		}
		if a := attacker.post("AccessService/ListLeases", `{}`); !strings.Contains(string(a.body), mine.GetLease().GetId()) {
			t.Errorf("its own lease is not listed: %s", a.body)
		}
	})

	t.Run("it may not what others may", func(t *testing.T) {
		for _, c := range []struct {
			method, body string
			want         broker.Reason
		}{
			{"GrantService/CreateGrant", `{"agent": "` + other.String() + `", "tool": "crm.read", "duration": "60s", "reason": "because"}`, broker.ReasonPermissionDenied},
			{"GrantService/CreateGrant", `{"agent": "` + support.String() + `", "tool": "crm.read", "duration": "60s", "reason": "because"}`, broker.ReasonPermissionDenied},
			{"IncidentService/OpenIncident", `{"title": "t", "agents": ["` + other.String() + `"], "tools": ["crm.read"]}`, broker.ReasonPermissionDenied},
			{"AuditService/ListEvents", `{}`, broker.ReasonPermissionDenied},
			{"AuditService/ListEvents", `{"agent": "` + other.String() + `"}`, broker.ReasonPermissionDenied},
			{"AccessService/IssueLease", `{"tool": "crm.read"}`, broker.ReasonNoGrant},
		} {
			attacker.post(c.method, c.body).wantRefused(t, c.method+" "+c.body, 403, c.want)
		}
	})

	t.Run("its idempotency keys are its own", func(t *testing.T) {
		if mine.GetLease().GetId() == theirs.GetLease().GetId() || mine.GetLease().GetAgent() != other.String() {
			t.Errorf("the same key gave the lease of another: %v", mine.GetLease())
		}
		attacker.post("AccessService/IssueLease", `{"tool": "crm.read", "idempotencyKey": "one"}`).
			wantRefused(t, "the other's request under one's own key", 400, broker.ReasonKeyReused)
		if again := victim.issueKeyed("crm.read", "one"); again.GetLease().GetId() != theirs.GetLease().GetId() ||
			again.GetSecret()["access_token"] != theirs.GetSecret()["access_token"] {
			t.Error("the owner of the key did not get its own lease again")
		}
	})

	t.Run("tokens tell it nothing", func(t *testing.T) {
		if attacker.introspect(theirs.GetSecret()["access_token"]).active(t) {
			t.Error("an agent that may introspect another audience was told of this one")
		}
		if victim.introspect(theirs.GetSecret()["access_token"]).active(t) {
			t.Error("an agent may introspect its own token")
		}
	})

	after := r.contents()
	if !r.client(support).stillActive(theirs.GetLease().GetId()) {
		t.Error("the victim's lease did not survive")
	}
	if diff := cmp.Diff(before.Keys, after.Keys); diff != "" {
		t.Errorf("the attacker changed the store (-before +after):\n%s", diff)
	}
	r.wantEvidence(other, "get_lease", broker.ReasonNotFound)
	r.wantEvidence(other, "revoke_lease", broker.ReasonNotFound)
	r.wantEvidence(other, "get_incident", broker.ReasonNotFound)
	r.wantEvidence(other, "list_events", broker.ReasonPermissionDenied)
}

// shape is what can be seen of an answer, without what was asked for.
func (a answer) shape(id string) string {
	h := a.header.Clone()
	for _, k := range []string{"Date", "Mayfly-Correlation-Id", "Content-Length"} {
		h.Del(k)
	}
	return strings.ReplaceAll(fmt.Sprintln(a.status, h, a.message, a.detail.GetReason(), a.detail.GetNext(), a.detail.GetLeaseId()), id, "ID")
}

// wantEvidence fails the test unless somebody's refusal is in the evidence.
func (r *rig) wantEvidence(actor spiffeid.ID, act string, cause broker.Reason) {
	r.t.Helper()
	events, _, err := r.engine.Events(r.t.Context(), broker.Caller{ID: sam}, lease.EventFilter{Type: audit.RequestRefused}, 0, lease.MaxPage, true)
	if err != nil {
		r.t.Fatal(err)
	}
	for _, e := range events {
		if e.Actor == actor.String() && e.Details["act"] == act && e.Cause == string(cause) {
			return
		}
	}
	r.t.Errorf("there is no evidence that %s was refused %s (%s)", actor, act, cause)
}

// TestResourceServers are told of their own audiences' tokens, and nothing else.
func TestResourceServers(t *testing.T) {
	r := newRig(t)
	r.grant(support, "crm.read")
	token := r.client(support).issue("crm.read").GetSecret()["access_token"]
	server := r.client(crm)
	if !server.introspect(token).active(t) {
		t.Error("the resource server of the token is not told that it is active")
	}
	for _, id := range []spiffeid.ID{billing, nobody, pager, sam, support} {
		if r.client(id).introspect(token).active(t) {
			t.Errorf("%s is told of a token that is not for it", id)
		}
	}
	for method, body := range map[string]string{
		"AccessService/IssueLease":     `{"tool": "crm.read"}`,
		"AccessService/WhoAmI":         `{}`,
		"AccessService/ListLeases":     `{}`,
		"GrantService/ListGrants":      `{}`,
		"IncidentService/OpenIncident": `{}`,
		"AuditService/ListEvents":      `{}`,
	} {
		server.post(method, body).wantRefused(t, "a resource server: "+method, 403, broker.ReasonAgentUnknown)
	}
	// An agent that is disabled is refused here, too.
	r.reload("disabled: false # other", "disabled: true")
	a := r.client(other).introspect(token)
	a.wantRefused(t, "a disabled agent", 403, broker.ReasonAgentDisabled)
}

// TestStrangers come with a certificate that is no SVID of this trust domain,
// or without one.
func TestStrangers(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.grant(support, "crm.read")
	evil := newTrust(t, spiffeid.RequireTrustDomainFromString("evil.test"))
	twin := newTrust(t, domain)
	for name, c := range map[string]struct {
		cert   tls.Certificate
		status int
		want   broker.Reason
	}{
		"nobody":                            {tls.Certificate{}, 401, broker.ReasonUnauthenticated},
		"another trust domain":              {svid(t, evil, spiffeid.RequireFromString("spiffe://evil.test/agent/support")), 401, broker.ReasonTrustDomain},
		"our name signed by another domain": {svid(t, evil, support), 401, broker.ReasonUntrusted},
		"our name signed by a twin":         {svid(t, twin, support), 401, broker.ReasonUntrusted},
		"somebody of ours who is unknown":   {svid(t, r.trust, nobody), 403, broker.ReasonAgentUnknown},
	} {
		for _, protocol := range protocols {
			client := r.clientWith(c.cert, protocol)
			for method, body := range map[string]string{"AccessService/IssueLease": `{"tool": "crm.read"}`, "AccessService/WhoAmI": `{}`, "AuditService/ListEvents": `{}`} {
				client.post(method, body).wantRefused(t, name+": "+method, c.status, c.want)
			}
			if c.status == 401 {
				client.introspect("x").wantRefused(t, name+": introspection", c.status, c.want)
			}
		}
		_, err := r.clientWith(c.cert, "HTTP/2.0").access(connect.WithGRPC()).IssueLease(bounded(t),
			connect.NewRequest(&mayflyv1.IssueLeaseRequest{Tool: "crm.read"}))
		wantRefused(t, name+" by gRPC", err, c.want)
	}
}
