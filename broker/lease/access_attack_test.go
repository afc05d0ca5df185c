package lease_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/audit"
	"github.com/mayfly-security/mayfly/broker/lease"
	"github.com/mayfly-security/mayfly/broker/policy"
	"github.com/mayfly-security/mayfly/store"
)

// issuedAt is somebody of whom the identity provider speaks at a time.
func issuedAt(at time.Time, name string, groups ...string) broker.Caller {
	c := person(name, groups...)
	c.Person.IssuedAt = at
	return c
}

// TestRenamedPerson: whoever gets another name at the identity provider is in
// the catalog's groups by that name, whatever an older session says.
func TestRenamedPerson(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := governedRig(t, func(r *rig) {
			r.yaml = strings.Replace(tooled(), "groups:\n", "groups:\n  - name: finance\n    people: [ann]\n", 1)
		})
		ann := issuedAt(time.Now(), "ann")
		r.seen(ann)
		v := r.mustAsk("db.read")
		r.mustApprove(v, ann)
		r.mustApprove(v, person("bob", "security"))
		d := r.mustIssue("db.read")
		time.Sleep(time.Second)

		renamed := issuedAt(time.Now(), "anna")
		renamed.Person.Subject = ann.Person.Subject
		r.seen(renamed)
		if _, ok, err := r.engine.Usable(bg, d.Lease.ID); ok || err != nil {
			t.Errorf("usable on the vote of one whose name is in the group no more: %v", err)
		}
		if l := r.wantState(d.Lease.ID, broker.LeaseRevoked, time.Second); l.Cause != broker.CauseVoterLost {
			t.Errorf("the cause is %q", l.Cause)
		}
		if _, err := r.approve(r.mustAsk("crm.read"), ann); err == nil {
			t.Error("a session of the old name counts for its groups")
		}
		r.seen(ann) // an older token takes the new name from nobody
		if _, err := r.approve(r.mustAsk("crm.read"), ann); err == nil {
			t.Error("an older token gave the old name back")
		}
	})
}

// TestNobodyCountsTwiceByCase: addresses that differ in case are one person's.
func TestNobodyCountsTwiceByCase(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := governedRig(t)
		v := r.mustAsk("db.read")
		r.mustApprove(v, person("ann@acme.test", "finance"))
		if v, err := r.approve(v, person("Ann@acme.test", "security")); err == nil && (v.State != broker.RequestPending || len(v.Approvals) != 1) {
			t.Fatal("one person with two spellings is two people")
		}
		v = r.mustApprove(v, person("bob", "security"))
		if v.State != broker.RequestGranted {
			t.Fatalf("the request is %s", v.State)
		}
		told, err := r.end(lease.Selector{Person: "ANN@acme.test"}, true)
		if err != nil || len(told) != 1 || told[0].Grants != 1 {
			t.Errorf("the kill switch by person: %+v, %v", told, err)
		}
		told, err = r.end(lease.Selector{Owner: "Support@acme.test"}, true)
		if err != nil || len(told) != 1 || told[0].Grants != 1 {
			t.Errorf("the kill switch by owner: %+v, %v", told, err)
		}
	})
}

// TestExplainTellsAgentsOfThemselves: an agent learns nothing of another's
// grants, nor of what the catalog says of it.
func TestExplainTellsAgentsOfThemselves(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := governedRig(t)
		r.grant(support, "crm.read", time.Hour)
		for _, action := range policy.Actions() {
			x, err := r.engine.Explain(bg, as(other), lease.ExplainRequest{Action: action, Tool: "crm.read", Agent: support, Verb: policy.VerbSeeAll})
			if action == policy.ActionAdminister {
				continue // it is about no agent
			}
			if err == nil {
				t.Errorf("%s: %+v", action, x)
			}
		}
		x, err := r.engine.Explain(bg, person("ann"), lease.ExplainRequest{Action: policy.ActionIssue, Tool: "crm.read", Agent: support})
		if err != nil || len(x.Grants) > 0 {
			t.Errorf("a person who sees no grants is told of some: %+v, %v", x, err)
		}
		x, err = r.engine.Explain(bg, as(support), lease.ExplainRequest{Action: policy.ActionIssue, Tool: "crm.read", Agent: support})
		if err != nil || len(x.Grants) != 1 {
			t.Errorf("its own: %+v, %v", x, err)
		}
		x, err = r.engine.Explain(bg, as(sam), lease.ExplainRequest{Action: policy.ActionIssue, Tool: "crm.read", Principal: broker.WorkloadPrincipal(support)})
		if err != nil || len(x.Grants) != 1 {
			t.Errorf("whoever may explain: %+v, %v", x, err)
		}
	})
}

// TestReasonOfBlanks: a reason says something.
func TestReasonOfBlanks(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := governedRig(t)
		_, err := r.ask("docs.search", func(q *lease.AccessRequest) { q.Reason = "  \u00a0\u3000 " })
		r.wantReason(err, broker.ReasonInvalidArgument)
		_, err = r.engine.CreateGrant(bg, as(sam), lease.GrantRequest{Agent: support, Tool: "crm.read", For: time.Hour, Reason: " "})
		r.wantReason(err, broker.ReasonInvalidArgument)
		err = r.engine.EndAccess(bg, as(sam), lease.Selector{All: true}, false, " ", func(lease.Radius) error { return nil })
		r.wantReason(err, broker.ReasonInvalidArgument)
		_, err = r.engine.OpenIncident(bg, as(pager), lease.IncidentRequest{Title: " ", Agents: nil, Tools: []string{"crm.read"}})
		r.wantReason(err, broker.ReasonInvalidArgument)
	})
}

// TestRestoreOfGrantsWithManyVoters: what one transaction of a restore ends is
// within what the store takes.
func TestRestoreOfGrantsWithManyVoters(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := governedRig(t, func(r *rig) {
			r.yaml = replaceOnce(tooled(), "need: [{group: finance}, {group: security}]", "need: [{group: finance, count: 20}]")
		})
		for range 10 {
			v := r.mustAsk("db.read")
			for i := range 20 {
				v = r.mustApprove(v, person(fmt.Sprintf("p%02d", i), "finance"))
			}
			if v.State != broker.RequestGranted {
				t.Fatalf("the request is %s", v.State)
			}
		}
		r.stop()
		r.openStore()
		if err := lease.MarkBackup(context.Background(), r.db, time.Now(), "test"); err != nil {
			t.Fatal(err)
		}
		if err := r.db.Close(); err != nil {
			t.Fatal(err)
		}
		r.start()
		p, err := r.engine.Grants(bg, lease.GrantFilter{}, "", 0)
		if err != nil || len(p.Items) != 0 {
			t.Errorf("%d grants are open after the restore, %v", len(p.Items), err)
		}
	})
}

// TestTimeAloneEndsAccess: what policies allow until an hour ends soon after
// it, without anybody's doing, and can be had again when they allow it again.
func TestTimeAloneEndsAccess(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := governedRig(t)
		at := time.Now().Add(5 * time.Minute).UTC().Format("2006-01-02T15:04:05Z")
		if err := r.reloadPolicies(openPolicies + fmt.Sprintf(`
@id("until") forbid (principal, action == Action::"issue", resource == Tool::"vault.read") when { context.now > datetime(%q) };
@id("night") forbid (principal, action == Action::"issue", resource == Tool::"crm.read") when { context.hour == 0 && context.now > datetime(%[1]q) && context.params.hasTag("customer") };`, at)); err != nil {
			t.Fatal(err)
		}
		for _, tool := range []string{"vault.read", "db.read", "crm.read"} {
			r.grant(support, tool, 4*time.Hour)
		}
		until, always := r.mustIssue("vault.read").Lease.ID, r.mustIssue("db.read").Lease.ID
		free := r.mustIssue("crm.read").Lease.ID
		forCustomer := r.mustIssue("crm.read", func(q *lease.IssueRequest) { q.Params = map[string]string{"customer": "c-1"} }).Lease.ID
		time.Sleep(4 * time.Minute)
		for _, id := range []broker.LeaseID{until, always, free, forCustomer} {
			r.wantState(id, broker.LeaseActive, time.Second)
		}
		time.Sleep(2 * time.Minute)
		if l := r.wantState(until, broker.LeaseRevoked, time.Second); l.Cause != broker.CausePolicy || l.EndedAt.After(l.CreatedAt.Add(5*time.Minute+40*time.Second)) {
			t.Errorf("ended by %q at %s", l.Cause, l.EndedAt)
		}
		r.wantState(always, broker.LeaseActive, time.Second)
		r.wantState(free, broker.LeaseActive, time.Second)
		if l := r.lease(forCustomer); l.Cause != broker.CausePolicy {
			t.Errorf("each lease is judged by its own values: %+v", l)
		}
		if evs := r.events(lease.EventFilter{Lease: until, Type: audit.LeaseRevoking}); len(evs) != 1 || !strings.Contains(evs[0].Reason, "policy set") {
			t.Errorf("the evidence: %+v", evs)
		}
		time.Sleep(time.Hour)
		r.mustIssue("crm.read", func(q *lease.IssueRequest) { q.Params = map[string]string{"customer": "c-1"} })
	})
}

// TestToolsBehindStrictParameters: a forbid that wants parameters hides neither
// a tool that can be asked for nor a grant that gives.
func TestToolsBehindStrictParameters(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := governedRig(t)
		if err := r.reloadPolicies(openPolicies + `
@id("customers") forbid (principal, action in [Action::"request", Action::"issue"], resource == Tool::"crm.read") unless { context.params.hasTag("customer") && context.params.getTag("customer") like "c-1*" };
@id("never") forbid (principal, action == Action::"request", resource == Tool::"db.read");`); err != nil {
			t.Fatal(err)
		}
		tools := func() map[string]lease.ToolView {
			views, err := r.engine.Tools(bg, as(support))
			if err != nil {
				t.Fatal(err)
			}
			all := map[string]lease.ToolView{}
			for _, v := range views {
				all[v.Name] = v
			}
			return all
		}
		is := tools()
		if !is["crm.read"].Requestable {
			t.Error("crm.read is hidden")
		}
		if _, shown := is["db.read"]; shown {
			t.Error("db.read is shown, and forbidden whatever is asked")
		}
		g := r.grant(support, "crm.read", time.Hour)
		if v := tools()["crm.read"]; v.Granted == nil || v.Granted.ID != g.ID {
			t.Errorf("the grant gives with the right values: %+v", v)
		}
		p, err := r.engine.Grants(bg, lease.GrantFilter{}, "", 0)
		if err != nil || len(p.Items) != 1 || p.Items[0].Suspended {
			t.Errorf("%+v, %v", p, err)
		}
		if _, err := r.issue("crm.read"); err == nil {
			t.Error("issued without the parameters")
		}
		r.mustIssue("crm.read", func(q *lease.IssueRequest) { q.Params = map[string]string{"customer": "c-12"} })
	})
}

// TestI5_KillSwitchWaitsForDeliveries: when it is said that all is dead, no
// secret of it is on its way any more.
func TestI5_KillSwitchWaitsForDeliveries(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := governedRig(t)
		r.grant(support, "db.read", time.Hour)
		d, err := r.engine.Issue(bg, as(support), lease.IssueRequest{Tool: "db.read"})
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 1)
		go func() {
			_, err := r.end(lease.Selector{Agent: support}, false)
			done <- err
		}()
		r.wantState(d.Lease.ID, broker.LeaseRevoked, time.Second)
		time.Sleep(5 * time.Second)
		select {
		case err := <-done:
			t.Fatalf("it is said that all is over while a secret is being handed over: %v", err)
		default:
		}
		d.Done()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// TestOwnersSeeTheirAgents: a person sees what is of the agents that they own,
// by their name or a group's, and of no others; they end nothing by it.
func TestOwnersSeeTheirAgents(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := governedRig(t)
		third := spiffeid.RequireFromString("spiffe://acme.test/agent/third")
		if err := r.reload("groups:\n", "  - id: "+third.String()+"\n    owner: other@acme.test\n    environment: production\ngroups:\n"); err != nil {
			t.Fatal(err)
		}
		of := map[spiffeid.ID][]broker.LeaseID{}
		for _, agent := range []spiffeid.ID{support, other, third} {
			for _, tool := range []string{"db.read", "crm.read", "vault.read"} {
				r.grant(agent, tool, time.Hour)
				d, err := r.engine.Issue(bg, as(agent), lease.IssueRequest{Tool: tool})
				if err != nil {
					t.Fatal(err)
				}
				d.Done()
				of[agent] = append(of[agent], d.Lease.ID)
			}
		}
		for name, c := range map[string]struct {
			who  broker.Caller
			sees []spiffeid.ID
		}{
			"by name":  {person("support@acme.test"), []spiffeid.ID{support}},
			"by group": {person("olga", "other@acme.test"), []spiffeid.ID{other, third}},
			"agent":    {as(other), []spiffeid.ID{other}},
			"operator": {as(sam), []spiffeid.ID{other, support, third}},
		} {
			sight, err := r.engine.SightOf(bg, c.who)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			var want []broker.LeaseID
			for _, agent := range c.sees {
				want = append(want, of[agent]...)
			}
			slices.Sort(want)
			for _, f := range []lease.LeaseFilter{{}, {All: true}} {
				for _, size := range []int{0, 1, 2, 3} {
					var leases []broker.LeaseID
					grants := 0
					for after := ""; ; {
						p, err := r.engine.LeasesIn(bg, sight, f, after, size)
						if err != nil {
							t.Fatal(err)
						}
						if size > 0 && len(p.Items) > size {
							t.Errorf("%s: a page of %d has %d", name, size, len(p.Items))
						}
						for _, l := range p.Items {
							leases = append(leases, l.ID)
						}
						if after = p.Next; after == "" {
							break
						}
					}
					for after := ""; ; {
						p, err := r.engine.GrantsIn(bg, sight, lease.GrantFilter{All: f.All}, after, size)
						if err != nil {
							t.Fatal(err)
						}
						grants += len(p.Items)
						if after = p.Next; after == "" {
							break
						}
					}
					slices.Sort(leases)
					if !slices.Equal(leases, want) || grants != len(want) {
						t.Errorf("%s, %+v, pages of %d: %v and %d grants; want %v", name, f, size, leases, grants, want)
					}
				}
			}
			for _, agent := range []spiffeid.ID{support, other, third} {
				p, err := r.engine.LeasesIn(bg, sight, lease.LeaseFilter{Agent: agent}, "", 0)
				if sees := slices.Contains(c.sees, agent); err != nil || (len(p.Items) > 0) != sees {
					t.Errorf("%s, of %s: %d, %v", name, agent, len(p.Items), err)
				}
				_, err = r.engine.Lease(bg, of[agent][0], sight)
				if sees := slices.Contains(c.sees, agent); (err == nil) != sees {
					t.Errorf("%s, a lease of %s: %v", name, agent, err)
				}
			}
		}
		_, err := r.engine.RevokeLease(bg, person("support@acme.test"), of[support][0], "")
		r.wantReason(err, broker.ReasonPermissionDenied)
		_, err = r.engine.RevokeLease(bg, person("support@acme.test"), of[other][0], "")
		r.wantReason(err, broker.ReasonNotFound)
		// As the identity provider says now.
		r.seen(issuedAt(time.Now(), "olga"))
		_, err = r.engine.SightOf(bg, person("olga", "other@acme.test"))
		r.wantReason(err, broker.ReasonPermissionDenied)
	})
}

// TestEvidenceNamesItsPolicies: what was given, and what ended, is told with
// the policies that decided that very thing.
func TestEvidenceNamesItsPolicies(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := governedRig(t)
		windows := strings.Replace(openPolicies, `@id("windows") permit (principal, action == Action::"open_incident", resource);`, `
@id("windows.db") permit (principal, action == Action::"open_incident", resource == Tool::"db.read");
@id("windows.crm") permit (principal, action == Action::"open_incident", resource == Tool::"crm.read");`, 1)
		if err := r.reloadPolicies(windows); err != nil {
			t.Fatal(err)
		}
		in := r.open(time.Hour, "db.read", "crm.read")
		for _, ev := range r.events(lease.EventFilter{Incident: in.ID}) {
			want := map[string]string{"db.read": "windows.db", "crm.read": "windows.crm", "crm.read,db.read": "windows.crm,windows.db"}[ev.Tool]
			if ev.Details["policies"] != want || ev.Details["policy_digest"] == "" {
				t.Errorf("%s of %s is told to be by %q; want %q", ev.Type, ev.Tool, ev.Details["policies"], want)
			}
		}
		db, crm := r.mustIssue("db.read").Lease.ID, r.mustIssue("crm.read").Lease.ID
		if err := r.reloadPolicies(windows + `
@id("no.db") forbid (principal, action == Action::"issue", resource == Tool::"db.read");
@id("no.crm") forbid (principal, action == Action::"issue", resource == Tool::"crm.read") when { context.duration_seconds * 9223372036854775807 > 0 };`); err != nil {
			t.Fatal(err)
		}
		for id, want := range map[broker.LeaseID]string{db: "forbidden by no.db", crm: `could not be evaluated, which denies: policy "no.crm"`} {
			evs := r.events(lease.EventFilter{Lease: id, Type: audit.LeaseRevoking})
			if len(evs) != 1 || !strings.Contains(evs[0].Reason, want) || !strings.Contains(evs[0].Reason, r.engine.Catalog().Policies().Digest()) {
				t.Errorf("the evidence: %+v; want %s", evs, want)
			}
		}
	})
}

// TestALostGroupSurvivesTheBroker: wherever the broker dies while it is told
// that somebody lost a group, nothing that stood on it outlives the restart,
// once it was durable.
func TestALostGroupSurvivesTheBroker(t *testing.T) {
	for n := 1; ; n++ {
		last := false
		for _, carry := range []bool{false, true} {
			if carry && n > 3 {
				continue // the other half of a commit that the next n fails before
			}
			t.Run(fmt.Sprintf("%d_%v", n, carry), func(t *testing.T) {
				bubble(t, func(t *testing.T) {
					var now *mortal
					r := governedRig(t, func(r *rig) {
						r.wrap = func(s store.Store) store.Store { now = &mortal{Store: s}; return now }
					})
					var leases []broker.LeaseID
					for range 5 { // more than one transaction ends
						v := r.mustAsk("db.read")
						r.mustApprove(v, person("ann", "finance"))
						r.mustApprove(v, person("bob", "security"))
						leases = append(leases, r.mustIssue("db.read").Lease.ID)
					}
					synctest.Wait()
					now.arm(n, carry)
					ctx, cancel := context.WithTimeout(bg, time.Minute)
					defer cancel()
					last = r.engine.PersonSeen(ctx, *person("ann", "sales").Person) == nil
					r.restart()
					time.Sleep(time.Minute)
					durable := len(r.events(lease.EventFilter{Type: audit.PersonChanged})) == 1
					if !durable && (n > 1 || carry) {
						t.Error("what was committed is not in the evidence")
					}
					for _, id := range leases {
						l := r.lease(id)
						if durable && (l.State != broker.LeaseRevoked || l.Cause != broker.CauseVoterLost) || !durable && l.State != broker.LeaseActive {
							t.Errorf("durable %v, and the lease is %s (%s)", durable, l.State, l.Cause)
						}
					}
					if left := r.keys("sweep|"); len(left) != 0 {
						t.Errorf("left: %q", left)
					}
					if left := r.keys("votes|"); durable && len(left) != 0 {
						t.Errorf("left: %q", left)
					}
				})
			})
		}
		if last || t.Failed() {
			if n < 4 {
				t.Errorf("it took %d commits only", n)
			}
			return
		}
	}
}

// TestAdministrationNamesItsPolicies: whatever somebody administers is told
// with the policies that let them, a recovery among them.
func TestAdministrationNamesItsPolicies(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := governedRig(t)
		if err := r.engine.Recover(bg, "person:eve", time.Hour, "locked out", "uid:0"); err != nil {
			t.Fatal(err)
		}
		for who, want := range map[string]string{"eve": "recovery", "sue": "operators"} {
			caller := person(who)
			if who == "sue" {
				caller = person(who, "sre")
			}
			g, h := r.grant(support, "db.read", time.Hour), r.grant(support, "vault.read", time.Hour)
			d, v := r.mustIssue("vault.read"), r.mustAsk("crm.read")
			if _, _, err := r.engine.WithdrawGrant(bg, caller, g.ID, "x"); err != nil {
				t.Fatal(err)
			}
			if _, err := r.engine.RevokeLease(bg, caller, d.Lease.ID, "x"); err != nil {
				t.Fatal(err)
			}
			if _, err := r.engine.WithdrawRequest(bg, caller, v.ID, "x"); err != nil {
				t.Fatal(err)
			}
			if err := r.engine.EndAccess(bg, caller, lease.Selector{Tool: "vault.read"}, false, "x", func(lease.Radius) error { return nil }); err != nil {
				t.Fatal(err)
			}
			for what, f := range map[string]lease.EventFilter{
				"a grant":               {Grant: g.ID, Type: audit.GrantEnded},
				"a lease":               {Lease: d.Lease.ID, Type: audit.LeaseRevoking},
				"a request":             {Request: v.ID, Type: audit.RequestEnded},
				"a kill switch's grant": {Grant: h.ID, Type: audit.GrantEnded},
			} {
				evs := r.events(f)
				if len(evs) != 1 || evs[0].Details["policies"] != want || evs[0].Details["policy_digest"] == "" {
					t.Errorf("%s ended %s: %+v", who, what, evs)
				}
			}
		}
		// Nobody's policies are told of what an agent does of its own.
		r.grant(support, "db.read", time.Hour)
		d, v := r.mustIssue("db.read"), r.mustAsk("crm.read")
		if _, err := r.engine.RevokeLease(bg, as(support), d.Lease.ID, ""); err != nil {
			t.Fatal(err)
		}
		if _, err := r.engine.WithdrawRequest(bg, as(support), v.ID, ""); err != nil {
			t.Fatal(err)
		}
		for _, f := range []lease.EventFilter{{Lease: d.Lease.ID, Type: audit.LeaseRevoking}, {Request: v.ID, Type: audit.RequestEnded}} {
			if evs := r.events(f); len(evs) != 1 || evs[0].Details["policies"] != "" {
				t.Errorf("%+v", evs)
			}
		}
	})
}
