package server_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"fmt"
	"io"
	"strings"
	"testing"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/dynamicpb"

	"github.com/mayfly-security/mayfly/broker"
	mayflyv1 "github.com/mayfly-security/mayfly/broker/api/mayfly/v1"
	"github.com/mayfly-security/mayfly/broker/audit"
	"github.com/mayfly-security/mayfly/store"
)

// statuses is the HTTP status of each reason in these tests, by the table of
// the reference.
var statuses = map[broker.Reason]int{
	broker.ReasonInvalidArgument: 400, broker.ReasonParameter: 400, broker.ReasonTTL: 400, broker.ReasonKeyReused: 400,
	broker.ReasonPermissionDenied: 403, broker.ReasonSelfService: 403, broker.ReasonAgentUnknown: 403,
	broker.ReasonToolUnknown: 404, broker.ReasonNotFound: 404, broker.ReasonTooLarge: 429,
}

// badInput is one request that must be refused.
type badInput struct {
	name   string
	caller spiffeid.ID
	method string
	body   string // JSON; what is between @ is replaced
	want   broker.Reason
}

const (
	issue  = "AccessService/IssueLease"
	create = "GrantService/CreateGrant"
	open   = "IncidentService/OpenIncident"
	theBot = "spiffe://acme.test/bot/pager"
)

// texts are what no free text may be.
var texts = map[string]string{
	"10,000 characters": strings.Repeat("x", 10_000),
	"ANSI":              `\u001b[31mred`,
	"a line end":        `one\ntwo`,
	"a NUL":             `a\u0000b`,
	"bidi":              `pay \u202eevil`,
	"zero width":        `pay\u200bments`,
	"a tag character":   `pay\udb40\udc41`,
}

func badInputs() []badInput {
	const grant = `{"agent": "spiffe://acme.test/agent/support", "tool": "crm.customer", "reason": "why", `
	const window = `"title": "t", "agents": ["spiffe://acme.test/agent/support"]`
	invalid, parameter, ttl := broker.ReasonInvalidArgument, broker.ReasonParameter, broker.ReasonTTL
	all := []badInput{
		{"no tool", support, issue, `{}`, broker.ReasonToolUnknown},
		{"unknown tool", support, issue, `{"tool": "crm.write"}`, broker.ReasonToolUnknown},
		{"a tool of 10,000 characters", support, issue, `{"tool": "` + strings.Repeat("t", 10_000) + `"}`, broker.ReasonToolUnknown},
		{"a tool with ANSI", support, issue, `{"tool": "\u001b[2Jcrm.read"}`, broker.ReasonToolUnknown},
		{"zero TTL", support, issue, `{"tool": "crm.read", "ttl": "0s"}`, ttl},
		{"negative TTL", support, issue, `{"tool": "crm.read", "ttl": "-1s"}`, ttl},
		{"TTL beyond the maximum", support, issue, `{"tool": "crm.read", "ttl": "901s"}`, ttl},
		{"absurd TTL", support, issue, `{"tool": "crm.read", "ttl": "315576000000s"}`, ttl},
		{"absurdly short TTL", support, issue, `{"tool": "crm.read", "ttl": "0.000000001s"}`, ttl},
		{"undeclared parameter", support, issue, `{"tool": "crm.read", "parameters": {"limit": "1"}}`, parameter},
		{"nameless parameter", support, issue, `{"tool": "crm.read", "parameters": {"": "1"}}`, parameter},
		{"parameter outside its pattern", support, issue, `{"tool": "crm.read", "parameters": {"customer": "c-1 OR 1=1"}}`, parameter},
		{"parameter with a line end after its pattern", support, issue, `{"tool": "crm.read", "parameters": {"customer": "c-1\n"}}`, parameter},
		{"parameter with bidi", support, issue, `{"tool": "crm.read", "parameters": {"customer": "\u202ec-1"}}`, parameter},
		{"missing parameter", support, issue, `{"tool": "crm.customer"}`, parameter},
		{"integer beyond its bounds", support, issue, `{"tool": "crm.customer", "parameters": {"customer": "c-1", "depth": "10"}}`, parameter},
		{"no integer", support, issue, `{"tool": "crm.customer", "parameters": {"customer": "c-1", "depth": "1e0"}}`, parameter},
		{"no boolean", support, issue, `{"tool": "crm.customer", "parameters": {"customer": "c-1", "full": "yes"}}`, parameter},
		{"huge idempotency key", support, issue, `{"tool": "crm.read", "idempotencyKey": "` + strings.Repeat("k", 10_000) + `"}`, invalid},
		{"idempotency key that divides keys", support, issue, `{"tool": "crm.read", "idempotencyKey": "a|b"}`, invalid},
		{"idempotency key with a space", support, issue, `{"tool": "crm.read", "idempotencyKey": "a b"}`, invalid},
		{"idempotency key beyond ASCII", support, issue, `{"tool": "crm.read", "idempotencyKey": "clé"}`, invalid},

		{"no lease ID", support, "AccessService/GetLease", `{}`, invalid},
		{"lease ID of a grant", support, "AccessService/GetLease", `{"id": "g0123456789abcdefghijklmno"}`, invalid},
		{"lease ID that is a path", support, "AccessService/RevokeLease", `{"id": "../../../etc/passwd"}`, invalid},
		{"lease ID in capitals", support, "AccessService/RevokeLease", `{"id": "L0123456789ABCDEFGHIJKLMNO"}`, invalid},
		{"lease that is not", support, "AccessService/GetLease", `{"id": "l0123456789abcdefghijklmno"}`, broker.ReasonNotFound},
		{"negative page size", support, "AccessService/ListLeases", `{"pageSize": -1}`, invalid},
		{"page token that is garbage", support, "AccessService/ListLeases", `{"pageToken": "zzzz"}`, invalid},
		{"page token with a NUL", support, "AccessService/ListLeases", `{"pageToken": "\u0000|l0123456789abcdefghijklmno"}`, invalid},
		{"huge page token", support, "AccessService/ListLeases", `{"pageToken": "` + strings.Repeat("|", 2000) + `l0123456789abcdefghijklmno"}`, invalid},
		{"leases of no agent", support, "AccessService/ListLeases", `{"agent": "support"}`, invalid},
		{"leases of no grant", support, "AccessService/ListLeases", `{"grantId": "x|y"}`, invalid},
		{"leases of no incident", support, "AccessService/ListLeases", `{"incidentId": "x"}`, invalid},

		{"grant that ends before it begins", sam, create, grant + `"notBefore": "2027-01-02T00:00:00Z", "notAfter": "2027-01-01T00:00:00Z"}`, invalid},
		{"grant that is over", sam, create, grant + `"notBefore": "2020-01-01T00:00:00Z", "notAfter": "2020-01-02T00:00:00Z"}`, invalid},
		{"grant without an end", sam, create, grant + `"maxUses": 1}`, invalid},
		{"grant with two ends", sam, create, grant + `"duration": "60s", "notAfter": "2037-01-02T00:00:00Z"}`, invalid},
		{"grant for no time", sam, create, grant + `"duration": "0s"}`, invalid},
		{"grant for less than no time", sam, create, grant + `"duration": "-60s"}`, invalid},
		{"grant for ever", sam, create, grant + `"duration": "315576000000s"}`, invalid},
		{"grant until the end of time", sam, create, grant + `"notAfter": "9999-12-31T23:59:59Z"}`, invalid},
		{"negative uses", sam, create, grant + `"duration": "60s", "maxUses": -1}`, invalid},
		{"grant with an undeclared parameter", sam, create, grant + `"duration": "60s", "parameters": {"limit": "1"}}`, parameter},
		{"grant with a parameter outside its pattern", sam, create, grant + `"duration": "60s", "parameters": {"customer": "*"}}`, parameter},
		{"grant with a key that divides keys", sam, create, grant + `"duration": "60s", "idempotencyKey": "|"}`, invalid},
		{"grant of an unknown tool", sam, create, `{"agent": "spiffe://acme.test/agent/support", "tool": "x", "duration": "60s", "reason": "why"}`, broker.ReasonToolUnknown},
		{"grant for an unknown agent", sam, create, `{"agent": "spiffe://acme.test/nobody", "tool": "crm.read", "duration": "60s", "reason": "why"}`, broker.ReasonAgentUnknown},
		{"grant for nobody", sam, create, `{"tool": "crm.read", "duration": "60s", "reason": "why"}`, invalid},
		{"grant for no SPIFFE ID", sam, create, `{"agent": "spiffe://acme.test/agent/\u202esupport", "tool": "crm.read", "duration": "60s", "reason": "why"}`, invalid},
		{"grant without a reason", sam, create, `{"agent": "spiffe://acme.test/agent/support", "tool": "crm.read", "duration": "60s"}`, invalid},
		{"withdrawing no ID", sam, "GrantService/WithdrawGrant", `{"id": "x"}`, invalid},
		{"withdrawing what is not", sam, "GrantService/WithdrawGrant", `{"id": "g0123456789abcdefghijklmno"}`, broker.ReasonNotFound},
		{"grants page token", sam, "GrantService/ListGrants", `{"pageToken": "l0123456789abcdefghijklmno"}`, invalid},
		{"grants page size", sam, "GrantService/ListGrants", `{"pageSize": -2147483648}`, invalid},

		{"a bot that opens a window for itself", pager, open, `{"title": "t", "tools": ["crm.read"], "agents": ["` + theBot + `"]}`, broker.ReasonSelfService},
		{"a bot that opens one for itself and another", pager, open, `{"title": "t", "tools": ["crm.read"], "agents": ["spiffe://acme.test/agent/support", "` + theBot + `"]}`, broker.ReasonSelfService},
		{"window for an agent that is not the bot's", pager, open, `{"title": "t", "tools": ["crm.read"], "agents": ["spiffe://acme.test/operator/sam"]}`, broker.ReasonPermissionDenied},
		{"window for a tool that is not the bot's", pager, open, `{` + window + `, "tools": ["crm.customer"]}`, broker.ReasonPermissionDenied},
		{"window with too many tools", pager, open, `{` + window + `, "tools": ["t` + strings.Repeat(`", "t`, 30) + `"]}`, invalid},
		{"window with agents times tools too many", pager, open, `{"title": "t", "agents": ["spiffe://acme.test/a/` + numbered(5, `", "spiffe://acme.test/a/`) + `"], "tools": ["t` + numbered(5, `", "t`) + `"]}`, invalid},
		{"window without a title", pager, open, `{"tools": ["crm.read"], "agents": ["spiffe://acme.test/agent/support"]}`, invalid},
		{"window without tools", pager, open, `{` + window + `}`, invalid},
		{"window without agents", pager, open, `{"title": "t", "tools": ["crm.read"]}`, invalid},
		{"window for an empty agent", pager, open, `{"title": "t", "tools": ["crm.read"], "agents": [""]}`, invalid},
		{"window with a tool twice", pager, open, `{` + window + `, "tools": ["crm.read", "crm.read"]}`, invalid},
		{"window for no time", pager, open, `{` + window + `, "tools": ["crm.read"], "duration": "0s"}`, invalid},
		{"window for less than no time", pager, open, `{` + window + `, "tools": ["crm.read"], "duration": "-1s"}`, invalid},
		{"window that is too long", pager, open, `{` + window + `, "tools": ["crm.read"], "duration": "3601s"}`, invalid},
		{"window for ever", pager, open, `{` + window + `, "tools": ["crm.read"], "duration": "315576000000s"}`, invalid},
		{"window with a key that divides keys", pager, open, `{` + window + `, "tools": ["crm.read"], "idempotencyKey": "a|b"}`, invalid},
		{"closing no ID", pager, "IncidentService/CloseIncident", `{"id": "i"}`, invalid},
		{"closing what is not", pager, "IncidentService/CloseIncident", `{"id": "i0123456789abcdefghijklmno"}`, broker.ReasonNotFound},
		{"looking at no ID", pager, "IncidentService/GetIncident", `{"id": "\u001b[2J"}`, invalid},
		{"looking at what is not", pager, "IncidentService/GetIncident", `{"id": "i0123456789abcdefghijklmno"}`, broker.ReasonNotFound},
		{"incidents page token", pager, "IncidentService/ListIncidents", `{"pageToken": "x"}`, invalid},
		{"incidents page size", pager, "IncidentService/ListIncidents", `{"pageSize": -1}`, invalid},

		{"events page size", sam, "AuditService/ListEvents", `{"pageSize": -1}`, invalid},
		{"events of no lease", sam, "AuditService/ListEvents", `{"leaseId": "x"}`, invalid},
		{"events of no grant", sam, "AuditService/ListEvents", `{"grantId": "x"}`, invalid},
		{"events of no incident", sam, "AuditService/ListEvents", `{"incidentId": "x"}`, invalid},
	}
	for name, text := range texts {
		all = append(all,
			badInput{"issue reason: " + name, support, issue, `{"tool": "crm.read", "reason": "` + text + `"}`, invalid},
			badInput{"revoke reason: " + name, support, "AccessService/RevokeLease", `{"id": "l0123456789abcdefghijklmno", "reason": "` + text + `"}`, invalid},
			badInput{"grant reason: " + name, sam, create, `{"agent": "spiffe://acme.test/agent/support", "tool": "crm.read", "duration": "60s", "reason": "` + text + `"}`, invalid},
			badInput{"withdraw reason: " + name, sam, "GrantService/WithdrawGrant", `{"id": "g0123456789abcdefghijklmno", "reason": "` + text + `"}`, invalid},
			badInput{"window title: " + name, pager, open, `{"title": "` + text + `", "tools": ["crm.read"], "agents": ["spiffe://acme.test/agent/support"]}`, invalid},
			badInput{"window reference: " + name, pager, open, `{"reference": "` + text + `", ` + window + `, "tools": ["crm.read"]}`, invalid},
			badInput{"close reason: " + name, pager, "IncidentService/CloseIncident", `{"id": "i0123456789abcdefghijklmno", "reason": "` + text + `"}`, invalid},
			badInput{"parameter: " + name, support, issue, `{"tool": "crm.read", "parameters": {"customer": "` + text + `"}}`, parameter},
		)
	}
	return all
}

func numbered(n int, between string) string {
	var s []string
	for i := range n {
		s = append(s, fmt.Sprint(i))
	}
	return strings.Join(s, between)
}

// TestBadInput sends what must be refused by every way there is: JSON over
// HTTP/1.1, as curl does, Connect with protobuf, and gRPC. Each time there is
// a reason, and nothing is stored.
func TestBadInput(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.grant(support, "crm.read")
	r.grant(support, "crm.customer")
	lived := r.client(support).issueKeyed("crm.read", "taken") // a store with something in it
	plain, rpc := map[spiffeid.ID]*client{}, map[spiffeid.ID]*client{}
	for _, id := range []spiffeid.ID{support, sam, pager} {
		plain[id], rpc[id] = r.clientWith(svid(t, r.trust, id), "HTTP/1.1"), r.client(id)
	}
	inputs := append(badInputs(), badInput{"idempotency key of another request", support, issue,
		`{"tool": "crm.read", "ttl": "60s", "idempotencyKey": "taken"}`, broker.ReasonKeyReused})
	before := r.contents()
	for _, in := range inputs {
		a := plain[in.caller].post(in.method, in.body)
		a.wantRefused(t, in.name, statuses[in.want], in.want)
		if clean := broker.Clean(string(a.body)); clean != string(a.body) || len(a.body) > 4096 {
			t.Errorf("%s: the answer repeats what it was sent: %.200q", in.name, a.body)
		}
		for how, option := range map[string]connect.ClientOption{"Connect": connect.WithClientOptions(), "gRPC": connect.WithGRPC(), "gRPC-Web": connect.WithGRPCWeb()} {
			wantRefused(t, in.name+" by "+how, rpc[in.caller].dynamic(in.method, in.body, option), in.want)
		}
		before = r.wantNothingStored(in.name, before)
	}
	if !r.client(support).stillActive(lived.GetLease().GetId()) {
		t.Error("the lease from before did not survive")
	}
}

func (c *client) stillActive(id string) bool {
	res, err := c.access().GetLease(bounded(c.r.t), connect.NewRequest(&mayflyv1.GetLeaseRequest{Id: id}))
	return err == nil && res.Msg.GetState() == "active"
}

// dynamic calls a method by its name with protobuf made from JSON.
func (c *client) dynamic(method, body string, options ...connect.ClientOption) error {
	c.r.t.Helper()
	service, name, _ := strings.Cut(method, "/")
	m := mayflyv1.File_mayfly_v1_mayfly_proto.Services().ByName(protoreflect.Name(service)).Methods().ByName(protoreflect.Name(name))
	msg := dynamicpb.NewMessage(m.Input())
	if err := protojson.Unmarshal([]byte(body), msg); err != nil {
		c.r.t.Fatalf("%s: %v", body, err)
	}
	options = append(options, connect.WithSchema(m), connect.WithResponseInitializer(func(_ connect.Spec, msg any) error {
		if d, ok := msg.(*dynamicpb.Message); ok {
			*d = *dynamicpb.NewMessage(m.Output())
		}
		return nil
	}))
	_, err := connect.NewClient[dynamicpb.Message, dynamicpb.Message](c.http, c.base()+"/mayfly.v1."+method, options...).
		CallUnary(bounded(c.r.t), connect.NewRequest(msg))
	return err
}

// contents is everything that is in the store but its mark of time, and the
// events that tell of more than a refusal.
type contents struct {
	Keys   map[string]string
	Events []string
}

func (r *rig) contents() contents {
	r.t.Helper()
	c := contents{Keys: map[string]string{}}
	err := r.db.View(context.Background(), func(rd store.Reader) error {
		for e, err := range rd.Scan("", "") {
			if err != nil {
				return err
			}
			c.Keys[e.Key] = string(e.Value)
		}
		for e, err := range rd.Log(audit.Log, 0) {
			if err != nil {
				return err
			}
			ev, err := audit.Decode(e.Seq, e.Value)
			if err != nil {
				return err
			}
			if ev.Type != audit.RequestRefused && ev.Type != audit.RefusalsSuppressed {
				c.Events = append(c.Events, string(e.Value))
			}
			if text := string(e.Value); len(text) > 2000 || strings.ContainsRune(text, 0x1b) || strings.ContainsRune(text, 0x202e) {
				r.t.Errorf("the evidence has what was to be refused: %.300q", text)
			}
		}
		return nil
	})
	if err != nil {
		r.t.Fatal(err)
	}
	delete(c.Keys, "meta|clock")
	delete(c.Keys, "sweep|catalog|all") // the start's own, done in the background
	return c
}

func (r *rig) wantNothingStored(name string, before contents) contents {
	r.t.Helper()
	after := r.contents()
	if diff := cmp.Diff(before, after); diff != "" {
		r.t.Errorf("%s: something was stored (-before +after):\n%s", name, diff)
	}
	return after
}

// TestBadHTTP sends what does not come as far as a message: bodies that are no
// message, or no body, and requests for what there is not.
func TestBadHTTP(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.grant(support, "crm.read")
	before := r.contents()
	const message = `{"tool": "crm.read"}`
	big := `{"tool": "crm.read", "reason": "` + strings.Repeat("x", 70_000) + `"}`
	zipped := func(s string) io.Reader {
		var b bytes.Buffer
		w := gzip.NewWriter(&b)
		_, _ = io.WriteString(w, s)
		_ = w.Close()
		return &b
	}
	header := func(k, v string) map[string]string { return map[string]string{k: v} }
	invalid, tooLarge, notFound := broker.ReasonInvalidArgument, broker.ReasonTooLarge, broker.ReasonNotFound
	cases := map[string]struct {
		method, path string // POST and IssueLease where empty
		header       map[string]string
		body         io.Reader
		status       int
		want         broker.Reason
	}{
		"a large body":                        {body: strings.NewReader(big), status: 429, want: tooLarge},
		"a large body in chunks":              {body: struct{ io.Reader }{strings.NewReader(big)}, status: 429, want: tooLarge},
		"an endless body":                     {body: endless{}, status: 429, want: tooLarge},
		"a bomb":                              {header: header("Content-Encoding", "gzip"), body: zipped(`{"reason": "` + strings.Repeat("x", 5<<20) + `"}`), status: 501, want: invalid},
		"an unknown encoding":                 {header: header("Content-Encoding", "br"), body: strings.NewReader(message), status: 501, want: invalid},
		"half a message":                      {body: strings.NewReader(`{"tool": "crm.read"`), status: 400, want: invalid},
		"no JSON":                             {body: strings.NewReader("\x1b[31mhello\u202e"), status: 400, want: invalid},
		"an array":                            {body: strings.NewReader("[" + message + "]"), status: 400, want: invalid},
		"two messages":                        {body: strings.NewReader(message + message), status: 400, want: invalid},
		"a field twice":                       {body: strings.NewReader(`{"tool": "crm.read", "tool": "db.read"}`), status: 400, want: invalid},
		"a number for text":                   {body: strings.NewReader(`{"tool": 1}`), status: 400, want: invalid},
		"too deep":                            {body: strings.NewReader(`{"tool": ` + strings.Repeat("[", 20_000)), status: 400, want: invalid},
		"no UTF-8":                            {body: strings.NewReader("{\"tool\": \"crm\xff\"}"), status: 400, want: invalid},
		"no duration":                         {body: strings.NewReader(`{"tool": "crm.read", "ttl": "soon"}`), status: 400, want: invalid},
		"a duration beyond durations":         {body: strings.NewReader(`{"tool": "crm.read", "ttl": "999999999999999s"}`), status: 400, want: invalid},
		"a misspelt field":                    {body: strings.NewReader(`{"tool": "crm.read", "tll": "60s"}`), status: 400, want: invalid},
		"a misspelt field, charset":           {header: header("Content-Type", "application/json; charset=utf-8"), body: strings.NewReader(`{"tool": "crm.read", "tll": "60s"}`), status: 400, want: invalid},
		"a misspelt field, CHARSET":           {header: header("Content-Type", `Application/JSON;CHARSET="UTF-8"`), body: strings.NewReader(`{"tool": "crm.read", "tll": "60s"}`), status: 400, want: invalid},
		"a misspelt limit of a grant":         {path: "/mayfly.v1.GrantService/CreateGrant", body: strings.NewReader(`{"max_usess": 1}`), status: 400, want: invalid},
		"too many uses for a number":          {path: "/mayfly.v1.GrantService/CreateGrant", body: strings.NewReader(`{"max_uses": 4294967297}`), status: 400, want: invalid},
		"no protobuf":                         {header: header("Content-Type", "application/proto"), body: strings.NewReader("\xff\xff\xff\xff"), status: 400, want: invalid},
		"protobuf without UTF-8":              {header: header("Content-Type", "application/proto"), body: strings.NewReader("\x0a\x01\xff"), status: 400, want: invalid},
		"a form":                              {header: header("Content-Type", "application/x-www-form-urlencoded"), body: strings.NewReader("tool=crm.read"), status: 415, want: invalid},
		"plain text":                          {header: header("Content-Type", "text/plain"), body: strings.NewReader(message), status: 415, want: invalid},
		"an unknown charset":                  {header: header("Content-Type", "application/json; charset=utf-16"), body: strings.NewReader(message), status: 415, want: invalid},
		"no content type":                     {header: header("Content-Type", ""), body: strings.NewReader(message), status: 415, want: invalid},
		"GET":                                 {method: "GET", status: 405, want: invalid},
		"PUT":                                 {method: "PUT", body: strings.NewReader(message), status: 405, want: invalid},
		"an unknown method":                   {path: "/mayfly.v1.AccessService/StealLease", body: strings.NewReader("{}"), status: 404, want: notFound},
		"an unknown service":                  {path: "/mayfly.v1.StealService/Steal", body: strings.NewReader("{}"), status: 404, want: notFound},
		"nothing":                             {method: "GET", path: "/", status: 404, want: notFound},
		"a path with ANSI":                    {method: "GET", path: "/%1b%5b31m/%e2%80%ae", status: 404, want: notFound},
		"GET of the introspection":            {method: "GET", path: "/oauth2/introspect", status: 404, want: notFound},
		"an impossible deadline":              {header: header("Connect-Timeout-Ms", "soon"), body: strings.NewReader(message), status: 400, want: invalid},
		"a protocol version that there isn't": {header: header("Connect-Protocol-Version", "2"), body: strings.NewReader(message), status: 400, want: invalid},
	}
	for _, protocol := range protocols {
		agent := r.clientWith(svid(t, r.trust, support), protocol)
		for name, c := range cases {
			name += ", " + protocol
			method, path := "POST", "/mayfly.v1.AccessService/IssueLease"
			if c.method != "" {
				method = c.method
			}
			if c.path != "" {
				path = c.path
			}
			body := c.body
			if seeker, ok := body.(io.Seeker); ok {
				_, _ = seeker.Seek(0, io.SeekStart)
			} else if b, ok := body.(*bytes.Buffer); ok {
				body = bytes.NewReader(b.Bytes())
			} else if s, ok := body.(struct{ io.Reader }); ok {
				_, _ = s.Reader.(io.Seeker).Seek(0, io.SeekStart)
			}
			req := request(t, method, agent.base()+path, "application/json", body)
			for k, v := range c.header {
				req.Header.Set(k, v)
				if v == "" {
					req.Header.Del(k)
				}
			}
			// The broker hangs up on who sends too much; the next request is not to
			// come by a connection that is about to go.
			req.Close = protocol == "HTTP/1.1"
			agent.send(req).wantRefused(t, name, c.status, c.want)
			before = r.wantNothingStored(name, before)
		}
	}
}

// endless is a body without an end.
type endless struct{}

func (endless) Read(b []byte) (int, error) { return copy(b, `{"tool": "`), nil }

// TestBadMessages sends what JSON cannot say.
func TestBadMessages(t *testing.T) {
	r := newRig(t)
	r.grant(support, "crm.read")
	before := r.contents()
	for name, c := range map[string]struct {
		caller spiffeid.ID
		method string
		raw    []byte
		want   broker.Reason
	}{
		"a TTL of two signs":        {support, issue, wire(`{"tool": "crm.read"}`, "\x1a\x0d\x08\x01\x10\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"), broker.ReasonTTL},
		"a grant until year 300000": {sam, create, wire(`{"tool": "crm.read"}`, "\x2a\x08\x08\x80\x80\x80\x80\x80\x80\x08"), broker.ReasonInvalidArgument},
	} {
		req := request(t, "POST", r.client(c.caller).base()+"/mayfly.v1."+c.method, "application/proto", bytes.NewReader(c.raw))
		r.client(c.caller).send(req).wantRefused(t, name, 400, c.want)
		before = r.wantNothingStored(name, before)
	}
}

// wire is the message with bytes added on the wire.
func wire(message, more string) []byte {
	var m mayflyv1.IssueLeaseRequest
	if err := protojson.Unmarshal([]byte(message), &m); err != nil {
		panic(err)
	}
	b, err := proto.Marshal(&m)
	if err != nil {
		panic(err)
	}
	return append(b, more...)
}
