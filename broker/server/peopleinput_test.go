package server_test

import (
	"fmt"
	"strings"
	"testing"

	"connectrpc.com/connect"

	"github.com/mayfly-security/mayfly/attestation/devidp"
	"github.com/mayfly-security/mayfly/broker"
	mayflyv1 "github.com/mayfly-security/mayfly/broker/api/mayfly/v1"
)

// TestBadInputOfPeople is TestBadInput for what governed access added.
func TestBadInputOfPeople(t *testing.T) {
	t.Parallel()
	r := newRig(t, withPeople)
	q := r.ask()
	clients := map[string]*client{"agent": r.client(support), "ada": r.person(r.login(ada).GetToken()),
		"olga": r.person(r.login(olga).GetToken()), "stranger": r.person("")}
	const (
		ask     = "RequestService/CreateRequest"
		explain = "PolicyService/Explain"
		no      = "r0123456789abcdefghijklmno"
	)
	invalid := broker.ReasonInvalidArgument
	type bad struct {
		name, caller, method, body string
		want                       broker.Reason
	}
	all := []bad{
		{"asking for nothing", "agent", ask, `{"reason": "why"}`, broker.ReasonToolUnknown},
		{"asking without a reason", "agent", ask, `{"tool": "db.asked"}`, invalid},
		{"asking for no time", "agent", ask, `{"tool": "db.asked", "reason": "why", "duration": "0s"}`, invalid},
		{"asking for ever", "agent", ask, `{"tool": "db.asked", "reason": "why", "duration": "315576000000s"}`, invalid},
		{"negative uses", "agent", ask, `{"tool": "db.asked", "reason": "why", "maxUses": -1}`, invalid},
		{"asking for no SPIFFE ID", "agent", ask, `{"tool": "db.asked", "reason": "why", "agent": "support"}`, invalid},
		{"asking under no incident", "agent", ask, `{"tool": "db.asked", "reason": "why", "incidentId": "x"}`, invalid},
		{"an undeclared parameter", "agent", ask, `{"tool": "db.asked", "reason": "why", "parameters": {"a": "b"}}`, broker.ReasonParameter},
		{"a key that divides keys", "agent", ask, `{"tool": "db.asked", "reason": "why", "idempotencyKey": "a|b"}`, invalid},
		{"no request ID", "agent", "RequestService/GetRequest", `{"id": "x"}`, invalid},
		{"a request that is not", "agent", "RequestService/GetRequest", `{"id": "` + no + `"}`, broker.ReasonNotFound},
		{"page size", "agent", "RequestService/ListRequests", `{"pageSize": -1}`, invalid},
		{"page token", "agent", "RequestService/ListRequests", `{"pageToken": "x"}`, invalid},
		{"requests of no agent", "agent", "RequestService/ListRequests", `{"agent": "x"}`, invalid},
		{"withdrawing no ID", "agent", "RequestService/WithdrawRequest", `{"id": "l0123456789abcdefghijklmno"}`, invalid},
		{"withdrawing what is not", "agent", "RequestService/WithdrawRequest", `{"id": "` + no + `"}`, broker.ReasonNotFound},
		{"approving no ID", "ada", "RequestService/ApproveRequest", `{"id": ""}`, invalid},
		{"approving what is not", "ada", "RequestService/ApproveRequest", `{"id": "` + no + `", "digest": "x"}`, broker.ReasonNotFound},
		{"approving what was not shown", "ada", "RequestService/ApproveRequest", `{"id": "` + q.GetId() + `"}`, invalid},
		{"denying no ID", "ada", "RequestService/DenyRequest", `{"id": "x"}`, invalid},
		{"explaining no action", "agent", explain, `{"action": "fly", "tool": "db.asked"}`, invalid},
		{"explaining no verb", "olga", explain, `{"action": "administer", "verb": "\u001b[2J"}`, invalid},
		{"explaining nobody", "olga", explain, `{"action": "issue", "principal": "x", "tool": "db.asked"}`, invalid},
		{"explaining a person with a trick", "olga", explain, `{"action": "approve", "principal": "person:\u202e", "tool": "db.asked"}`, invalid},
		{"events of no request", "olga", "AuditService/ListEvents", `{"requestId": "x"}`, invalid},
		{"a code that is not", "stranger", "SignInService/RedeemCode", `{"code": "x"}`, broker.ReasonSignIn},
		{"no code", "stranger", "SignInService/RedeemCode", `{}`, broker.ReasonSignIn},
		{"a large code", "stranger", "SignInService/RedeemCode", `{"code": "` + strings.Repeat("x", 50_000) + `"}`, broker.ReasonSignIn},
		{"a code with ANSI", "stranger", "SignInService/RedeemCode", `{"code": "\u001b[2J"}`, broker.ReasonSignIn},
		{"a handle that is not", "stranger", "SignInService/PollDevice", `{"handle": "\u001b[2J"}`, broker.ReasonSignIn},
		{"the sessions of a long name", "olga", "SignInService/SignOut", `{"person": "` + strings.Repeat("x", 201) + `"}`, invalid},
	}
	for name, text := range texts {
		all = append(all,
			bad{"a request's reason: " + name, "agent", ask, `{"tool": "db.asked", "reason": "` + text + `"}`, invalid},
			bad{"a request's ticket: " + name, "agent", ask, `{"tool": "db.asked", "reason": "why", "ticket": "` + text + `"}`, invalid},
			bad{"a withdrawal's reason: " + name, "agent", "RequestService/WithdrawRequest", `{"id": "` + q.GetId() + `", "reason": "` + text + `"}`, invalid},
			bad{"an approval's comment: " + name, "ada", "RequestService/ApproveRequest", `{"id": "` + q.GetId() + `", "digest": "` + q.GetDigest() + `", "comment": "` + text + `"}`, invalid},
			bad{"a denial's comment: " + name, "ada", "RequestService/DenyRequest", `{"id": "` + q.GetId() + `", "comment": "` + text + `"}`, invalid},
			bad{"a sign-out's reason: " + name, "ada", "SignInService/SignOut", `{"reason": "` + text + `"}`, invalid},
			bad{"another's sign-out's reason: " + name, "olga", "SignInService/SignOut", `{"person": "` + ada + `", "reason": "` + text + `"}`, invalid},
			bad{"a policy file's name: " + name, "olga", "PolicyService/Preview", `{"files": [{"name": "` + text + `", "text": ""}]}`, invalid},
		)
	}
	before := r.contents()
	for _, in := range all {
		c := clients[in.caller]
		a := c.post(in.method, in.body)
		want := map[broker.Reason]int{broker.ReasonSignIn: 401}[in.want]
		if want == 0 {
			want = statuses[in.want]
		}
		a.wantRefused(t, in.name, want, in.want)
		if clean := broker.Clean(string(a.body)); clean != string(a.body) || len(a.body) > 4096 {
			t.Errorf("%s: the answer repeats what it was sent: %.200q", in.name, a.body)
		}
		for how, option := range map[string]connect.ClientOption{"Connect": connect.WithClientOptions(), "gRPC": connect.WithGRPC(), "gRPC-Web": connect.WithGRPCWeb()} {
			wantRefused(t, in.name+" by "+how, c.dynamic(in.method, in.body, option), in.want)
		}
		before = r.wantNothingStored(in.name, before)
	}
	for _, id := range []string{"", "x", no} {
		s, err := clients["agent"].requests().WatchRequest(bounded(t), connect.NewRequest(&mayflyv1.WatchRequestRequest{Id: id}))
		if err == nil && s.Receive() {
			t.Errorf("watching %q: %v", id, s.Msg())
		}
		want := invalid
		if id == no {
			want = broker.ReasonNotFound
		}
		wantRefused(t, fmt.Sprintf("watching %q", id), s.Err(), want)
	}
	r.client(other).post("RequestService/GetRequest", `{"id": "`+q.GetId()+`"}`).wantRefused(t, "another agent's request", 404, broker.ReasonNotFound)
	s, err := r.client(other).requests().WatchRequest(bounded(t), connect.NewRequest(&mayflyv1.WatchRequestRequest{Id: q.GetId()}))
	if err != nil || s.Receive() {
		t.Errorf("another agent watches: %v", err)
	}
	wantRefused(t, "another agent watches", s.Err(), broker.ReasonNotFound)
	r.wantNothingStored("watching", before)
}

// TestLargePolicySets can be previewed: they are larger than other requests.
func TestLargePolicySets(t *testing.T) {
	t.Parallel()
	r := newRig(t, withPeople)
	operator := r.person(r.mint(devidp.Mint{Person: olga}))
	preview := func(n int) answer {
		policy := `permit (principal, action == Action::\"request\", resource);\n// ` + strings.Repeat("x", 950) + `\n`
		return operator.post("PolicyService/Preview", `{"files": [{"name": "all.cedar", "text": "`+strings.Repeat(policy, n)+`"}]}`)
	}
	if a := preview(200); a.status != 200 {
		t.Errorf("200 KiB: %d %.300s", a.status, a.body)
	}
	preview(1200).wantRefused(t, "more than 1 MiB", 429, broker.ReasonTooLarge)
}
