package main

import (
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/durationpb"

	mayflyv1 "github.com/mayfly-security/mayfly/broker/api/mayfly/v1"
	"github.com/mayfly-security/mayfly/providers/secretsmanager/fakesecrets"
)

const secretsCatalog = `
agents:
  - {id: "spiffe://acme.test/agent/support", owner: support, environment: production}
groups:
  - {name: sre, members: ["spiffe://acme.test/operator/sam"]}
operators: [{group: sre}]
providers:
  - {name: secrets, driver: secretsmanager, config: {region: eu-central-1, account: "123456789012", endpoint_url: "@URL@", credentials: {method: default}}}
tools:
  - {name: kept, provider: secrets, description: x, max_ttl: 10m, scope: {secret: mail/key}}
  - {name: rotated, provider: secrets, description: x, max_ttl: 10m, scope: {secret: crm/db, fields: [password], rotate: true}}
`

// TestSecretsManager: a real broker tells of a secret of Secrets Manager as
// static: with the tool, with the lease, and in the evidence. Its end rotates
// the secret where the tool says so, and never is the lease said to be dead.
func TestSecretsManager(t *testing.T) {
	fake := fakesecrets.New()
	server := httptest.NewServer(fake)
	t.Cleanup(server.Close)
	fake.Add("mail/key", "the mail's very own key")
	db := fake.Add("crm/db", `{"password":"the first password of all"}`)
	for name, value := range map[string]string{"AWS_ACCESS_KEY_ID": "AKIAFAKE", "AWS_SECRET_ACCESS_KEY": "fake", "AWS_CONFIG_FILE": "/dev/null", "AWS_SHARED_CREDENTIALS_FILE": "/dev/null"} {
		t.Setenv(name, value)
	}
	people := newPeople(t)
	dir := t.TempDir()
	c := startChild(t, childSettings{Store: filepath.Join(dir, "mayfly.db"), Workload: people.sockets["/mayfly"],
		Catalog: writeCatalog(t, dir, strings.ReplaceAll(secretsCatalog, "@URL@", server.URL))})
	defer c.kill()
	api := newCallers(c.addr, people.httpClient("/agent/support"), people.httpClient("/operator/sam"), people.httpClient("/bot/pager"))
	ctx := t.Context()
	lease := map[string]*mayflyv1.Lease{}
	for tool, want := range map[string]string{"kept": "the mail's very own key", "rotated": "the first password of all"} {
		if _, err := api.grants.CreateGrant(ctx, connect.NewRequest(&mayflyv1.CreateGrantRequest{Agent: "spiffe://acme.test/agent/support", Tool: tool,
			Duration: durationpb.New(time.Hour), Reason: "x"})); err != nil {
			t.Fatal(err)
		}
		res, err := api.agent.IssueLease(ctx, connect.NewRequest(&mayflyv1.IssueLeaseRequest{Tool: tool, IdempotencyKey: tool}))
		if err != nil {
			t.Fatal(err)
		}
		lease[tool] = res.Msg.GetLease()
		if got := res.Msg.GetSecret()[map[string]string{"kept": "value", "rotated": "password"}[tool]]; got != want {
			t.Errorf("%s: %q", tool, got)
		}
		if !lease[tool].GetIsStatic() || lease[tool].GetDiesAt() != nil || !strings.Contains(lease[tool].GetSurvives(), "was there before the lease") {
			t.Errorf("%s: %v", tool, lease[tool])
		}
	}
	tools, err := api.agent.ListTools(ctx, connect.NewRequest(&mayflyv1.ListToolsRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	for _, tool := range tools.Msg.GetTools() {
		if !tool.GetIsStatic() || !strings.Contains(tool.GetSurvives(), "the secret itself") {
			t.Errorf("%s is static: %t; survives: %q", tool.GetName(), tool.GetIsStatic(), tool.GetSurvives())
		}
	}
	if _, err := api.agent.IssueLease(ctx, connect.NewRequest(&mayflyv1.IssueLeaseRequest{Tool: "rotated", IdempotencyKey: "beside"})); err == nil || !strings.Contains(err.Error(), "one lease of it at a time") && !strings.Contains(err.Error(), "in use by another lease") {
		t.Errorf("a lease beside one that rotates: %v", err)
	}
	for _, l := range lease {
		if _, err := api.agent.RevokeLease(ctx, connect.NewRequest(&mayflyv1.RevokeLeaseRequest{Id: l.GetId()})); err != nil {
			t.Fatal(err)
		}
	}
	until := func(tool, state string, progress string) *mayflyv1.Lease {
		t.Helper()
		for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(50 * time.Millisecond) {
			res, err := api.agent.GetLease(ctx, connect.NewRequest(&mayflyv1.GetLeaseRequest{Id: lease[tool].GetId()}))
			if err != nil {
				t.Fatal(err)
			}
			if l := res.Msg; l.GetState() == state && l.GetProgress() == progress {
				return l
			} else if time.Now().After(deadline) {
				t.Fatalf("%s is %s, %s", tool, l.GetState(), l.GetProgress())
			}
		}
	}
	until("kept", "lapsed", "requested")
	until("rotated", "revoking", "requested")
	again := func(key string) error {
		_, err := api.agent.IssueLease(ctx, connect.NewRequest(&mayflyv1.IssueLeaseRequest{Tool: "rotated", IdempotencyKey: key}))
		return err
	}
	if err := again("early"); err == nil || !strings.Contains(err.Error(), "is being rotated") {
		t.Errorf("a lease of a value that is being taken away: %v", err)
	}
	fake.Finish(db, `{"password":"the second password"}`)
	if l := until("rotated", "lapsed", "written"); !strings.Contains(l.GetLeft(), "another current version") {
		t.Errorf("left: %q", l.GetLeft())
	}
	if n := fake.Count("RotateSecret"); n != 1 {
		t.Errorf("%d rotations", n)
	}
	events, err := api.audit.ListEvents(ctx, connect.NewRequest(&mayflyv1.ListEventsRequest{PageSize: 1000}))
	if err != nil {
		t.Fatal(err)
	}
	lapsed := 0
	for _, e := range events.Msg.GetEvents() {
		switch e.GetType() {
		case "lease.lapsed":
			if lapsed++; !strings.HasPrefix(e.GetDetails()["why"], "static: ") {
				t.Errorf("%v", e)
			}
		case "lease.revoked", "lease.expired":
			if e.GetDetails()["made"] == "nothing" { // it was refused
				continue
			}
			t.Errorf("the evidence says that it is dead: %v", e)
		}
		if strings.Contains(e.String(), "very own key") || strings.Contains(e.String(), "first password") {
			t.Error("the secret is in the evidence")
		}
	}
	if lapsed != 2 {
		t.Errorf("%d leases lapsed, by the evidence", lapsed)
	}
}
