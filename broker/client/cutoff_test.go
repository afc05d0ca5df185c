package client_test

import (
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/mayfly-security/mayfly/broker"
	mayflyv1 "github.com/mayfly-security/mayfly/broker/api/mayfly/v1"
	"github.com/mayfly-security/mayfly/broker/client"
	"github.com/mayfly-security/mayfly/broker/client/clienttest"
)

func TestCutOff(t *testing.T) {
	w := newWorld(t)
	w.PageSize = 1
	at := time.Unix(1_800_000_000, 0).UTC()
	for _, role := range []string{"role/a", "role/b"} {
		w.CutOffs = append(w.CutOffs, &mayflyv1.RoleCutOff{
			Provider: "aws", Role: role, MadeBefore: timestamppb.New(at), ClearAt: timestamppb.New(at.Add(time.Second)), Until: timestamppb.New(at.Add(time.Hour)),
			Leases: 3, Alive: 2, ByAgent: map[string]int32{"a": 2}, ByTool: map[string]int32{"t": 2}, Others: "others", Progress: "written", Failing: true,
			DecidedBy: "person:ada", Reason: "r", DecidedAt: timestamppb.New(at.Add(-time.Second)),
		})
	}
	c := w.client(t)
	cut, err := c.CutOff(t.Context(), "aws", "role/b", "why", false)
	if err != nil || cut.Provider != "aws" || cut.Role != "role/b" || !cut.MadeBefore.Equal(at) || !cut.ClearAt.Equal(at.Add(time.Second)) || !cut.Until.Equal(at.Add(time.Hour)) ||
		cut.Leases != 3 || cut.Alive != 2 || cut.ByAgent["a"] != 2 || cut.ByTool["t"] != 2 || cut.Others != "others" || cut.Progress != broker.ProgressWritten || !cut.Failing ||
		cut.DecidedBy != "person:ada" || cut.Reason != "r" || !cut.DecidedAt.Equal(at.Add(-time.Second)) {
		t.Errorf("%+v, %v", cut, err)
	}
	if m := w.Asked("CutOff").(*mayflyv1.CutOffRequest); m.GetProvider() != "aws" || m.GetRole() != "role/b" || m.GetReason() != "why" || m.GetDryRun() {
		t.Errorf("asked %v", m)
	}
	if dry, err := c.CutOff(t.Context(), "aws", "role/b", "", true); err != nil || dry.DecidedBy != "" || !dry.DecidedAt.IsZero() || !w.Asked("CutOff").(*mayflyv1.CutOffRequest).GetDryRun() {
		t.Errorf("%+v, %v", dry, err)
	}
	if _, err := c.CutOff(t.Context(), "aws", "role/c", "why", false); broker.ReasonOf(err) != broker.ReasonNotFound {
		t.Error(err)
	}
	var all []client.CutOff
	for cut, err := range c.CutOffs(t.Context()) {
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, cut)
	}
	if len(all) != 2 || all[0].Role != "role/a" || all[1].Role != "role/b" {
		t.Errorf("%+v", all)
	}
	w.Refuse = func(string, int) error {
		return clienttest.Refusal(connect.CodePermissionDenied, broker.ReasonPermissionDenied, "no", "")
	}
	for _, err := range c.CutOffs(t.Context()) {
		if broker.ReasonOf(err) != broker.ReasonPermissionDenied {
			t.Error(err)
		}
	}
}
