package lease_test

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/lease"
)

const issuer = "https://id.acme.test"

// governed is the base catalog with approval rules, and a tool for each.
const governed = baseCatalog + `
approval_rules:
  - name: one
    need: [{group: finance}]
    never: [requester, owner, user]
    max_duration: 1h
    expires: 10m
  - name: both
    need: [{group: finance}, {group: security}]
    never: [requester, owner, user]
    reauthenticate_within: 5m
    acr: [mfa]
    max_duration: 2h
    expires: 10m
    single_use: true
    standing: true # both
  - name: fresh-user
    need: [{group: finance}]
    user_reauthenticate_within: 5m
    max_duration: 1h
  - name: emergency
    need: [{group: oncall}]
    max_duration: 30m
    break_glass: true
`

// tooled adds rules to the base catalog's tools.
func tooled() string {
	y := governed
	for tool, rules := range map[string]string{
		"crm.read":    "approval: one\n    break_glass: emergency",
		"db.read":     "approval: both",
		"vault.read":  "approval: fresh-user",
		"docs.search": "sensitivity: low",
	} {
		y = strings.Replace(y, "  - name: "+tool+"\n", "  - name: "+tool+"\n    "+rules+"\n", 1)
	}
	return y
}

// open lets agents and people ask for everything, and is otherwise as the
// built-in set.
const openPolicies = `
@id("ask") permit (principal, action == Action::"request", resource);
@id("issue") permit (principal, action == Action::"issue", resource);
@id("approve") permit (principal, action == Action::"approve", resource);
@id("windows") permit (principal, action == Action::"open_incident", resource);
@id("operators") permit (principal in Group::"mayfly:operators", action == Action::"administer", resource);
`

func governedRig(t testing.TB, options ...func(*rig)) *rig {
	return newRig(t, append([]func(*rig){func(r *rig) { r.yaml, r.cedar = tooled(), openPolicies }}, options...)...)
}

// reloadPolicies loads another policy set beside the catalog.
func (r *rig) reloadPolicies(cedar string) error {
	r.cedar = cedar
	return r.engine.Load(context.Background(), r.snapshot(), "test")
}

// person is somebody who has just signed in.
func person(name string, groups ...string) broker.Caller {
	p := broker.Person{Name: name, Issuer: issuer, Subject: "sub-" + name, Groups: groups, AuthTime: time.Now().Add(-time.Second), ACR: "mfa", Method: broker.SignInBrowser}
	return broker.Caller{Person: &p, ValidUntil: time.Now().Add(time.Hour), Correlation: broker.NewCorrelationID(time.Now())}
}

func (r *rig) ask(tool string, change ...func(*lease.AccessRequest)) (lease.RequestView, error) {
	req := lease.AccessRequest{Tool: tool, Reason: "a test"}
	for _, c := range change {
		c(&req)
	}
	return r.engine.CreateRequest(context.Background(), as(support), req)
}

func (r *rig) mustAsk(tool string, change ...func(*lease.AccessRequest)) lease.RequestView {
	r.t.Helper()
	v, err := r.ask(tool, change...)
	if err != nil {
		r.t.Fatalf("asking for %s: %v", tool, err)
	}
	return v
}

func (r *rig) approve(v lease.RequestView, who broker.Caller) (lease.RequestView, error) {
	return r.engine.Vote(context.Background(), who, lease.Vote{Request: v.ID, Approve: true, Digest: v.Digest})
}

func (r *rig) mustApprove(v lease.RequestView, who broker.Caller) lease.RequestView {
	r.t.Helper()
	v, err := r.approve(v, who)
	if err != nil {
		r.t.Fatalf("%s approves: %v", who.Person.Name, err)
	}
	return v
}

func (r *rig) seen(who broker.Caller) {
	r.t.Helper()
	if err := r.engine.PersonSeen(context.Background(), *who.Person); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) request(id broker.RequestID) lease.RequestView {
	r.t.Helper()
	v, err := r.engine.Request(context.Background(), as(sam), id)
	if err != nil {
		r.t.Fatal(err)
	}
	return v
}

func params(p map[string]string) func(*lease.AccessRequest) {
	return func(r *lease.AccessRequest) { r.Params = p }
}

func lasting(d time.Duration) func(*lease.AccessRequest) {
	return func(r *lease.AccessRequest) { r.Duration = &d }
}

func replaceOnce(text, old, new string) string {
	if !strings.Contains(text, old) {
		panic("the catalog does not contain " + old)
	}
	return strings.Replace(text, old, new, 1)
}
