package server_test

import (
	"context"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/lease"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/providertest"
)

// cutDriver is a driver whose leases are sessions of one role for each tool.
type cutDriver struct{ providers.Driver }

func (d cutDriver) Open(ctx context.Context, config providers.Config) (providers.Provider, error) {
	p, err := d.Driver.Open(ctx, config)
	if err != nil {
		return nil, err
	}
	return cutProvider{p, p.(providers.Planner)}, nil
}

type cutProvider struct {
	providers.Provider
	providers.Planner
}

func (cutProvider) Roles(tool broker.Tool) []string  { return []string{"role/" + tool.Name} }
func (cutProvider) RoleOf(e providers.Ending) string { return "role/" + e.Tool }
func (cutProvider) PlanCutOff(_ context.Context, role string) (providers.Cut, error) {
	now := time.Now()
	return providers.Cut{Role: role, Before: now, Clear: now.Add(time.Second), Until: now.Add(time.Hour), Others: "what others made"}, nil
}
func (cutProvider) CutOff(context.Context, providers.Cut) providers.Death {
	return providers.Death{Progress: broker.ProgressVerified}
}

// TestCutOffService is the cut-off as callers of the API see it: an operator's,
// and nobody else's.
func TestCutOffService(t *testing.T) {
	t.Parallel()
	r := newRig(t, func(r *rig) {
		r.tune = func(c *lease.Config) { c.EndWait = 5 * time.Second }
	})
	r.stop()
	r.drivers["world"] = cutDriver{providertest.Driver{System: r.world}}
	r.start()
	r.grant(support, "db.read")
	agent, operator := r.client(support), r.client(sam)
	l := agent.issue("db.read").GetLease()
	cut := func(fields string) string { return `{"provider": "databases", "role": "role/db.read"` + fields + `}` }
	for _, who := range []*client{agent, r.client(other), r.client(pager)} {
		who.post("OperatorService/CutOff", cut(`, "reason": "x"`)).wantRefused(t, "not an operator", 403, broker.ReasonPermissionDenied)
		who.post("OperatorService/CutOff", cut(`, "dryRun": true`)).wantRefused(t, "not an operator, dry", 403, broker.ReasonPermissionDenied)
		who.post("OperatorService/ListCutOffs", `{}`).wantRefused(t, "listing", 403, broker.ReasonPermissionDenied)
	}
	r.wantEvidence(support, "cut_off", broker.ReasonPermissionDenied)
	r.wantEvidence(support, "list_cut_offs", broker.ReasonPermissionDenied)
	operator.post("OperatorService/CutOff", cut(``)).wantRefused(t, "without a reason", 400, broker.ReasonInvalidArgument)
	operator.post("OperatorService/CutOff", `{"provider": "databases", "role": "role/other", "reason": "x"}`).wantRefused(t, "an unknown role", 404, broker.ReasonNotFound)
	operator.post("OperatorService/CutOff", `{"provider": "nobody", "role": "role/db.read", "reason": "x"}`).wantRefused(t, "an unknown provider", 404, broker.ReasonNotFound)
	operator.post("OperatorService/CutOff", `{"provider": "tokens", "role": "role/db.read", "reason": "x"}`).wantRefused(t, "one that cannot", 400, broker.ReasonConflict)
	for _, body := range []string{`{"pageSize": -1}`, `{"pageToken": "x"}`, `{"pageToken": "` + strings.Repeat("a", 600) + `"}`} {
		operator.post("OperatorService/ListCutOffs", body).wantRefused(t, body, 400, broker.ReasonInvalidArgument)
	}
	type roleCutOff struct {
		Provider, Role, MadeBefore, ClearAt, Until, Others, Progress, DecidedBy, Reason, DecidedAt string
		Leases, Alive                                                                              int
		ByAgent, ByTool                                                                            map[string]int
	}
	read := func(method, body string, into any) {
		t.Helper()
		if a := operator.post(method, body); a.status != 200 || json.Unmarshal(a.body, into) != nil {
			t.Fatalf("%s: %d %s", method, a.status, a.body)
		}
	}
	var dry roleCutOff
	read("OperatorService/CutOff", cut(`, "dryRun": true`), &dry)
	if dry.Leases != 1 || dry.Alive != 1 || dry.ByAgent[support.String()] != 1 || dry.ByTool["db.read"] != 1 || dry.Others != "what others made" ||
		dry.MadeBefore == "" || dry.ClearAt == "" || dry.Until == "" || dry.Progress != "" || dry.DecidedBy != "" || dry.DecidedAt != "" {
		t.Errorf("dry: %+v", dry)
	}
	var list struct {
		CutOffs       []roleCutOff
		NextPageToken string
	}
	if read("OperatorService/ListCutOffs", `{}`, &list); len(list.CutOffs) != 0 {
		t.Errorf("after a dry run: %+v", list)
	}
	var done roleCutOff
	read("OperatorService/CutOff", cut(`, "reason": "SEC-9"`), &done)
	if done.Leases != 1 || done.Alive != 0 || done.Progress != "verified" || done.DecidedBy != sam.String() || done.Reason != "SEC-9" || done.DecidedAt == "" {
		t.Errorf("done: %+v", done)
	}
	if r.world.Works(l.GetId()) || len(r.world.Live()) != 0 {
		t.Error("the lease lives")
	}
	agent.post("AccessService/IssueLease", `{"tool": "db.read"}`).wantRefused(t, "while none would work", 503, broker.ReasonProvider)
	read("OperatorService/ListCutOffs", `{"pageSize": 1}`, &list)
	if len(list.CutOffs) != 1 || list.CutOffs[0].Role != "role/db.read" || list.CutOffs[0].Progress != "verified" {
		t.Errorf("%+v", list)
	}
	if list.NextPageToken != "" {
		after := list.NextPageToken
		list.CutOffs = nil
		if read("OperatorService/ListCutOffs", `{"pageToken": "`+after+`"}`, &list); len(list.CutOffs) != 0 {
			t.Errorf("the second page: %+v", list)
		}
	}
}
