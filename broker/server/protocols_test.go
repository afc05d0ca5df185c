package server_test

import (
	"bytes"
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/go-jose/go-jose/v4"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/mayfly-security/mayfly/broker"
	mayflyv1 "github.com/mayfly-security/mayfly/broker/api/mayfly/v1"
)

// TestProtocols lives one lease by each way to speak with the API.
func TestProtocols(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.grant(support, "crm.read")
	ctx := bounded(t)
	for name, options := range map[string][]connect.ClientOption{
		"Connect":      nil,
		"Connect JSON": {connect.WithProtoJSON()},
		"gRPC":         {connect.WithGRPC()},
		"gRPC-Web":     {connect.WithGRPCWeb()},
	} {
		agent, operator := r.client(support), r.client(sam)
		res, err := agent.access(options...).IssueLease(ctx, connect.NewRequest(&mayflyv1.IssueLeaseRequest{
			Tool: "crm.read", Parameters: map[string]string{"customer": "c-7"}, Reason: "a ticket"}))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		l := res.Msg.GetLease()
		if l.GetState() != "active" || l.GetReason() != "a ticket" || l.GetParameters()["customer"] != "c-7" || res.Msg.GetSecret()["access_token"] == "" {
			t.Errorf("%s: %v", name, l)
		}
		got, err := agent.access(options...).RevokeLease(ctx, connect.NewRequest(&mayflyv1.RevokeLeaseRequest{Id: l.GetId()}))
		if err != nil || got.Msg.GetCause() != "returned" {
			t.Errorf("%s: %v, %v", name, got, err)
		}
		_, err = agent.access(options...).IssueLease(ctx, connect.NewRequest(&mayflyv1.IssueLeaseRequest{Tool: "db.read"}))
		wantRefused(t, name, err, broker.ReasonNoGrant)
		if d := refusal(err); d.GetNext() == "" || d.GetCorrelationId() == "" {
			t.Errorf("%s: the refusal says nothing: %v", name, d)
		}
		_, err = agent.grants(options...).CreateGrant(ctx, connect.NewRequest(&mayflyv1.CreateGrantRequest{
			Agent: support.String(), Tool: "db.read", Duration: durationpb.New(time.Minute), Reason: "because"}))
		wantRefused(t, name, err, broker.ReasonPermissionDenied)
		events, err := operator.audit(options...).ListEvents(ctx, connect.NewRequest(&mayflyv1.ListEventsRequest{LeaseId: l.GetId()}))
		if err != nil || len(events.Msg.GetEvents()) < 2 {
			t.Errorf("%s: events %v, %v", name, events, err)
		}
	}
	for _, id := range []string{"gzip", "gzip, br"} {
		req := request(t, "POST", r.client(support).base()+"/mayfly.v1."+issue, "application/json", strings.NewReader(`{"tool": "crm.read"}`))
		req.Header.Set("Accept-Encoding", id)
		if a := r.client(support).send(req); a.status != 200 || a.header.Get("Content-Encoding") != "" || !bytes.Contains(a.body, []byte("access_token")) {
			t.Errorf("an answer with a secret was compressed: %v", a.header)
		}
	}
}

// TestIntrospection keeps RFC 7662: active with its claims while the lease
// lives, inactive with nothing else from the instant at which it does not.
func TestIntrospection(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.grant(support, "crm.read")
	agent, server, bot := r.client(support), r.client(crm), r.client(pager)

	first := agent.issue("crm.read")
	a := server.introspect(first.GetSecret()["access_token"])
	var claims map[string]any
	if err := json.Unmarshal(a.body, &claims); err != nil || a.header.Get("Content-Type") != "application/json" || a.header.Get("Cache-Control") != "no-store" {
		t.Fatalf("%v %s: %v", a.header, a.body, err)
	}
	for k, want := range map[string]any{
		"active": true, "sub": support.String(), "aud": "https://crm.acme.test", "iss": "https://mayfly.acme.test",
		"scope": "crm.read", "tool": "crm.read", "jti": first.GetLease().GetId(), "token_type": "Bearer",
	} {
		if claims[k] != want {
			t.Errorf("%s: %v; want %v", k, claims[k], want)
		}
	}
	if exp, _ := claims["exp"].(float64); int64(exp) > first.GetLease().GetEnd().AsTime().Unix() {
		t.Errorf("exp %v is after the lease's end %s", claims["exp"], first.GetLease().GetEnd().AsTime())
	}

	token := first.GetSecret()["access_token"]
	for name, bad := range map[string]string{
		"changed":           token[:len(token)-5] + strings.Repeat("A", 5),
		"no token":          "active",
		"hostile":           strings.Repeat("e30.", 3000),
		"of another signer": forged(t, claims),
	} {
		if server.introspect(bad).active(t) {
			t.Errorf("%s: the token is active", name)
		}
	}
	ended := func(what, token string) {
		t.Helper()
		if server.introspect(token).active(t) {
			t.Errorf("%s: the token is active", what)
		}
	}
	agent.post("AccessService/RevokeLease", `{"id": "`+first.GetLease().GetId()+`"}`)
	ended("returned", token)
	token = agent.issue("crm.read").GetSecret()["access_token"]
	r.withdrawAll()
	ended("its grant was withdrawn", token)
	window := bot.open("crm.read")
	token = agent.issue("crm.read").GetSecret()["access_token"]
	if !server.introspect(token).active(t) {
		t.Error("the window's token is not active while it is open")
	}
	bot.post("IncidentService/CloseIncident", `{"id": "`+window.GetId()+`"}`)
	ended("its incident was closed", token)

	for name, req := range map[string]*http.Request{
		"no token": request(t, "POST", server.base()+"/oauth2/introspect", "application/x-www-form-urlencoded", strings.NewReader("")),
		"a token in the address": request(t, "POST", server.base()+"/oauth2/introspect?token=x", "application/x-www-form-urlencoded",
			strings.NewReader("")),
		"JSON":     request(t, "POST", server.base()+"/oauth2/introspect", "application/json", strings.NewReader(`{"token": "x"}`)),
		"no form":  request(t, "POST", server.base()+"/oauth2/introspect", "application/x-www-form-urlencoded", strings.NewReader("token=%zz")),
		"too much": request(t, "POST", server.base()+"/oauth2/introspect", "application/x-www-form-urlencoded", struct{ io.Reader }{strings.NewReader("token=" + strings.Repeat("x", 1<<20))}),
	} {
		var e struct {
			Error       string
			Description string `json:"error_description"`
		}
		if a := server.send(req); a.status != 400 || json.Unmarshal(a.body, &e) != nil || e.Error != "invalid_request" || e.Description == "" {
			t.Errorf("%s: %d %s", name, a.status, a.body)
		}
	}
}

// forged signs the claims of a good token with a key of its own.
func forged(t *testing.T, claims map[string]any) string {
	t.Helper()
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.HS256, Key: []byte("0123456789abcdef0123456789abcdef")},
		(&jose.SignerOptions{}).WithType("at+jwt"))
	if err != nil {
		t.Fatal(err)
	}
	payload, err := json.Marshal(claims)
	if err != nil {
		t.Fatal(err)
	}
	jws, err := signer.Sign(payload)
	if err != nil {
		t.Fatal(err)
	}
	token, err := jws.CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	return token
}

// TestJWKS: the key that signs is served, and nothing private of it.
func TestJWKS(t *testing.T) {
	r := newRig(t)
	r.grant(support, "crm.read")
	token := r.client(support).issue("crm.read").GetSecret()["access_token"]
	a := r.client(crm).send(request(t, "GET", "https://"+r.addr+"/.well-known/jwks.json", "", nil))
	var set jose.JSONWebKeySet
	if err := json.Unmarshal(a.body, &set); err != nil || a.status != 200 || len(set.Keys) != 1 {
		t.Fatalf("%d %s: %v", a.status, a.body, err)
	}
	jws, err := jose.ParseSignedCompact(token, []jose.SignatureAlgorithm{jose.EdDSA})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := jws.Verify(set.Keys[0]); err != nil || !set.Keys[0].IsPublic() {
		t.Errorf("the served key verifies with %v; it is public: %t", err, set.Keys[0].IsPublic())
	}
}
