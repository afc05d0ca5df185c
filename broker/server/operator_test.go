package server_test

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/lease"
	"github.com/mayfly-security/mayfly/providers/providertest"
)

// TestOperatorService is forgetting and strays as callers of the API see them:
// an operator's, and nobody else's.
func TestOperatorService(t *testing.T) {
	t.Parallel()
	r := newRig(t, func(r *rig) {
		r.tune = func(c *lease.Config) { c.EndWait, c.InventoryEvery = 200*time.Millisecond, 50*time.Millisecond }
	})
	r.stop()
	r.drivers["world"] = providertest.Inventoried{Driver: providertest.Driver{System: r.world}}
	r.start()
	r.grant(support, "db.read")
	agent, operator := r.client(support), r.client(sam)

	// An agent's own lease is not for the agent to forget, whatever its state.
	l := agent.issue("db.read").GetLease()
	forget := `{"id": "` + l.GetId() + `", "reason": "gone for good"}`
	operator.post("OperatorService/ForgetLease", forget).wantRefused(t, "an active lease", 400, broker.ReasonConflict)
	r.world.SetScript(providertest.Rules(1,
		providertest.Rule{Op: providertest.OpEnd, Fault: providertest.Fault{Effect: providertest.FailBefore}},
		providertest.Rule{Op: providertest.OpStatus, Fault: providertest.Fault{Effect: providertest.FailBefore}},
		providertest.Rule{Op: providertest.OpRemove, Fault: providertest.Fault{Effect: providertest.FailBefore}}))
	if a := agent.post("AccessService/RevokeLease", `{"id": "`+l.GetId()+`"}`); a.status != 200 {
		t.Fatalf("revoking: %s", a.body)
	}
	for _, c := range []struct {
		who          *client
		method, body string
	}{
		{agent, "OperatorService/ForgetLease", forget},
		{r.client(other), "OperatorService/ForgetLease", forget},
		{r.client(pager), "OperatorService/ForgetLease", `{"id": "` + noLease + `", "reason": "x"}`},
		{agent, "OperatorService/ListStrays", `{}`},
		{agent, "OperatorService/EndStray", `{"provider": "databases", "name": "x", "reason": "x"}`},
	} {
		c.who.post(c.method, c.body).wantRefused(t, c.method+" "+c.body, 403, broker.ReasonPermissionDenied)
	}
	operator.post("OperatorService/ForgetLease", `{"id": "`+l.GetId()+`"}`).wantRefused(t, "without a reason", 400, broker.ReasonInvalidArgument)
	operator.post("OperatorService/ForgetLease", `{"id": "nothing", "reason": "x"}`).wantRefused(t, "no ID", 400, broker.ReasonInvalidArgument)
	operator.post("OperatorService/ForgetLease", `{"id": "`+noLease+`", "reason": "x"}`).wantRefused(t, "no such lease", 404, broker.ReasonNotFound)
	a := operator.post("OperatorService/ForgetLease", forget)
	var forgotten struct{ State, Cause, Progress string }
	if err := json.Unmarshal(a.body, &forgotten); err != nil || a.status != 200 || forgotten.State != "lapsed" || forgotten.Cause != "forgotten" || forgotten.Progress == "verified" {
		t.Errorf("forgotten: %d %s", a.status, a.body)
	}
	r.wantEvidence(support, "forget_lease", broker.ReasonPermissionDenied)

	// Strays.
	name := providertest.NameOf(r.engine.InstallationID(), noLease)
	r.world.Plant(providertest.Credential{Name: name, Secret: "planted", DiesAt: time.Now().Add(time.Hour)})
	type stray struct{ Provider, Name, Kind, LeaseID, DiesAt, FoundAt, Why, EndedBy string }
	list := func() (strays []stray) {
		t.Helper()
		a := operator.post("OperatorService/ListStrays", `{}`)
		var res struct{ Strays []stray }
		if err := json.Unmarshal(a.body, &res); err != nil || a.status != 200 {
			t.Fatalf("listing: %d %s", a.status, a.body)
		}
		for _, s := range res.Strays {
			if s.Name == name {
				strays = append(strays, s)
			}
		}
		return strays
	}
	wait := func(what string, done func() bool) {
		t.Helper()
		for deadline := time.Now().Add(20 * time.Second); !done(); time.Sleep(20 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatal(what)
			}
		}
	}
	wait("the stray was not listed", func() bool { return len(list()) == 1 })
	if s := list()[0]; s.Provider != "databases" || s.LeaseID != noLease || s.DiesAt == "" || s.FoundAt == "" || s.Why != lease.StrayUnknown || s.EndedBy != "" {
		t.Errorf("%+v", s)
	}
	for _, body := range []string{`{"pageSize": -1}`, `{"pageToken": "x"}`, `{"pageToken": "a|` + strings.Repeat("x", 600) + `"}`, `{"pageToken": "a|\u001b"}`} {
		operator.post("OperatorService/ListStrays", body).wantRefused(t, body, 400, broker.ReasonInvalidArgument)
	}
	end := `{"provider": "databases", "name": "` + name + `", "reason": "nobody knows it"}`
	operator.post("OperatorService/EndStray", `{"provider": "databases", "name": "`+name+`"}`).wantRefused(t, "without a reason", 400, broker.ReasonInvalidArgument)
	operator.post("OperatorService/EndStray", `{"provider": "databases", "name": "postgres", "reason": "x"}`).wantRefused(t, "what is no stray", 404, broker.ReasonNotFound)
	a = operator.post("OperatorService/EndStray", end)
	var ended struct {
		Stray   stray
		Removed bool
	}
	if err := json.Unmarshal(a.body, &ended); err != nil || a.status != 200 || ended.Removed || ended.Stray.EndedBy != sam.String() {
		t.Errorf("while the provider is away: %d %s", a.status, a.body)
	}
	r.world.SetScript(nil)
	wait("the decision was not carried out", func() bool { return len(list()) == 0 })
	if r.world.Works("planted") {
		t.Error("it still works")
	}
	operator.post("OperatorService/EndStray", end).wantRefused(t, "what is gone", 404, broker.ReasonNotFound)
}
