package client_test

import (
	"fmt"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/mayfly-security/mayfly/broker"
	mayflyv1 "github.com/mayfly-security/mayfly/broker/api/mayfly/v1"
	"github.com/mayfly-security/mayfly/broker/client"
	"github.com/mayfly-security/mayfly/broker/client/clienttest"
)

func TestListsArePaged(t *testing.T) {
	w := newWorld(t)
	w.PageSize = 2
	for i := range 5 {
		state := broker.LeaseActive
		if i == 4 {
			state = broker.LeaseRevoked
		}
		w.Leases = append(w.Leases, &mayflyv1.Lease{
			Id: fmt.Sprint("l", i), Agent: agentID.String(), Tool: "crm.read", State: string(state), Overdue: i == 2, End: timestamppb.Now(),
		})
		w.Events = append(w.Events, &mayflyv1.Event{Sequence: uint64(i + 1), Type: []string{"lease.active", "lease.revoked"}[i%2]})
	}
	c := w.client(t)
	leases := func(f client.LeaseFilter, most int) (ids []string) {
		t.Helper()
		for l, err := range c.Leases(t.Context(), f) {
			if err != nil {
				t.Fatal(err)
			}
			if ids = append(ids, string(l.ID)); len(ids) == most {
				break
			}
		}
		return ids
	}
	for _, tt := range []struct {
		f    client.LeaseFilter
		most int
		want string
		call int // how many pages are asked for
	}{
		{client.LeaseFilter{}, 0, "[l0 l1 l2 l3]", 2},
		{client.LeaseFilter{All: true}, 0, "[l0 l1 l2 l3 l4]", 3},
		{client.LeaseFilter{Overdue: true}, 0, "[l2]", 1},
		{client.LeaseFilter{Agent: spiffeid.RequireFromPath(td, "/agent/other")}, 0, "[]", 1},
		{client.LeaseFilter{All: true}, 1, "[l0]", 1}, // the rest is not asked for
	} {
		before := w.Calls("ListLeases")
		if got := fmt.Sprint(leases(tt.f, tt.most)); got != tt.want || w.Calls("ListLeases")-before != tt.call {
			t.Errorf("%+v gives %s in %d pages; %s in %d was expected", tt.f, got, w.Calls("ListLeases")-before, tt.want, tt.call)
		}
	}
	events := func(f client.EventFilter) (seqs []uint64) {
		t.Helper()
		for e, err := range c.Events(t.Context(), f) {
			if err != nil {
				t.Fatal(err)
			}
			seqs = append(seqs, e.Sequence)
		}
		return seqs
	}
	for _, tt := range []struct {
		f    client.EventFilter
		want string
	}{
		{client.EventFilter{}, "[1 2 3 4 5]"},
		{client.EventFilter{After: 3}, "[4 5]"},
		{client.EventFilter{Latest: 2}, "[4 5]"},
		{client.EventFilter{Type: "lease.revoked"}, "[2 4]"}, // pages without a match are no end
	} {
		if got := fmt.Sprint(events(tt.f)); got != tt.want {
			t.Errorf("%+v gives %s; %s was expected", tt.f, got, tt.want)
		}
	}
	w.Lock()
	w.Refuse = func(string, int) error {
		return clienttest.Refusal(connect.CodeInternal, broker.ReasonInternal, "no", "")
	}
	w.Unlock()
	n := 0
	for _, err := range c.Leases(t.Context(), client.LeaseFilter{}) {
		if n++; broker.ReasonOf(err) != broker.ReasonInternal {
			t.Errorf("a failing page gives %v", err)
		}
	}
	if n != 1 {
		t.Errorf("a failing listing gives %d items", n)
	}
}

func TestGrantsAndIncidents(t *testing.T) {
	w := newWorld(t)
	c := w.client(t)
	from := time.Now().Add(time.Hour).Truncate(time.Second).UTC()
	g, err := c.CreateGrant(t.Context(), client.GrantRequest{
		Agent: agentID, Tool: "crm.read", Params: map[string]string{"customer": "c-17"}, NotBefore: from, For: time.Hour, MaxUses: 3, Reason: "OPS-12",
	})
	if err != nil || g.Agent != agentID || !g.NotBefore.Equal(from) || !g.NotAfter.Equal(from.Add(time.Hour)) || g.MaxUses != 3 || g.State != broker.GrantOpen {
		t.Fatalf("the grant is %+v, %v", g, err)
	}
	g, ended, err := c.WithdrawGrant(t.Context(), g.ID, "over")
	if err != nil || g.State != broker.GrantWithdrawn || ended != (client.Ended{Dead: 2, Revoking: 1}) {
		t.Errorf("withdrawing gives %+v, %+v, %v", g, ended, err)
	}
	in, err := c.OpenIncident(t.Context(), client.IncidentRequest{
		Title: "slow", Reference: "PD-1", Agents: []spiffeid.ID{agentID}, Tools: []string{"crm.read", "crm.write"}, For: 30 * time.Minute,
	})
	if err != nil || len(in.Window) != 2 || len(in.Grants) != 2 || in.Window[1].Tool != "crm.write" || in.EndsAt.Sub(in.OpenedAt) != 30*time.Minute {
		t.Fatalf("the incident is %+v, %v", in, err)
	}
	closed, ended, err := c.CloseIncident(t.Context(), in.ID, "")
	if err != nil || closed.State != broker.IncidentClosed || ended.Dead != 1 {
		t.Errorf("closing gives %+v, %+v, %v", closed, ended, err)
	}
	if shown, err := c.Incident(t.Context(), in.ID); err != nil || shown.State != broker.IncidentClosed {
		t.Errorf("showing gives %+v, %v", shown, err)
	}
	count := func(all bool) (n int) {
		for _, err := range c.Incidents(t.Context(), all) {
			if err != nil {
				t.Fatal(err)
			}
			n++
		}
		return n
	}
	if count(false) != 0 || count(true) != 1 {
		t.Errorf("there are %d open incidents and %d in all", count(false), count(true))
	}
	if _, err := c.Incident(t.Context(), "i0nothing"); broker.ReasonOf(err) != broker.ReasonNotFound {
		t.Errorf("an incident that is not there: %v", err)
	}
	n := 0
	for g, err := range c.Grants(t.Context(), client.GrantFilter{All: true}) {
		if n++; err != nil || g.State != broker.GrantWithdrawn {
			t.Errorf("listing gives %+v, %v", g, err)
		}
	}
	if n != 1 {
		t.Errorf("%d grants are listed", n)
	}
}

func TestVariables(t *testing.T) {
	secret := broker.NewSecret(map[string]string{"token": "t", "zero": "a\x00b", "PATH": "evil"})
	for _, tt := range []struct {
		env  map[string]string
		want string // empty means that it is refused
	}{
		{map[string]string{"B_TOKEN": "token", "A_TOKEN": "token", "_X9": "token"}, "[{A_TOKEN t} {B_TOKEN t} {_X9 t}]"},
		{nil, "[]"},
		{map[string]string{"lower": "token"}, ""},
		{map[string]string{"9X": "token"}, ""},
		{map[string]string{"A B": "token"}, ""},
		{map[string]string{"A=B": "token"}, ""},
		{map[string]string{"A;rm": "token"}, ""},
		{map[string]string{"A\n": "token"}, ""},
		{map[string]string{"": "token"}, ""},
		{map[string]string{"TOKEN": "missing"}, ""},
		{map[string]string{"TOKEN": "zero"}, ""},
		{map[string]string{"PATH": "PATH"}, ""},
		{map[string]string{"LD_PRELOAD": "token"}, ""},
		{map[string]string{"BASH_ENV": "token"}, ""},
		{map[string]string{"IFS": "token"}, ""},
	} {
		vars, err := (&client.Credential{Secret: secret, Env: tt.env}).Variables()
		if tt.want == "" && err == nil || tt.want != "" && (err != nil || fmt.Sprint(vars) != tt.want) {
			t.Errorf("%q gives %v, %v", tt.env, vars, err)
		}
	}
}
