package lease_test

import (
	"flag"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"pgregory.net/rapid"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/audit"
	"github.com/mayfly-security/mayfly/broker/lease"
)

// accessAct is one step of one of those who act at the same time.
type accessAct struct {
	Kind string
	Who  int // of the people
	Tool int // of accessTools
	Pick int // which request or incident, modulo how many there are
	In   bool
	For  time.Duration
}

var (
	accessTools  = []string{"crm.read", "db.read", "docs.search"}
	accessPeople = []struct {
		name   string
		groups []string
	}{
		{"ann", []string{"finance"}}, {"amy", []string{"finance", "security"}}, {"bob", []string{"security"}},
		{"ben", []string{"finance", "security"}}, {"eve", nil}, {"support@acme.test", []string{"finance", "security"}},
	}
	accessSets = []string{
		openPolicies,
		openPolicies + `@id("no-db") forbid (principal, action == Action::"issue", resource == Tool::"db.read");`,
		openPolicies + `@id("no-ben") forbid (principal == Person::"ben", action == Action::"approve", resource);`,
		openPolicies + `@id("no-asking") forbid (principal, action == Action::"request", resource == Tool::"docs.search");`,
	}
)

func drawAccessAct(t *rapid.T) accessAct {
	return accessAct{
		Kind: rapid.SampledFrom([]string{"ask", "ask", "ask", "approve", "approve", "approve", "approve", "approve", "deny",
			"withdraw", "lose", "issue", "issue", "issue", "open", "close", "reload", "kill", "wait", "pass"}).Draw(t, "kind"),
		Who:  rapid.IntRange(0, len(accessPeople)-1).Draw(t, "who"),
		Tool: rapid.IntRange(0, len(accessTools)-1).Draw(t, "tool"),
		Pick: rapid.IntRange(0, 7).Draw(t, "pick"),
		In:   rapid.IntRange(0, 3).Draw(t, "in") == 0,
		For:  rapid.SampledFrom([]time.Duration{0, time.Second, 5 * time.Minute, 11 * time.Minute}).Draw(t, "for"),
	}
}

// TestAccessModel lets several act at the same time, at random: agents ask and
// draw credentials, people vote and leave their groups, incidents open and
// close, policies are exchanged, the kill switch is pulled. The evidence, which
// stands in the order of the commits, is then held against the words of the
// design: never is more granted than was allowed at that instant.
func TestAccessModel(t *testing.T) {
	n := map[string]int{}
	var mu sync.Mutex
	checks := flag.Lookup("rapid.checks")
	if checks.Value.String() == checks.DefValue { // not asked for
		if err := checks.Value.Set("25"); err != nil {
			t.Fatal(err)
		}
		defer checks.Value.Set(checks.DefValue)
	}
	// What is seen is chance: about one round in thirty sees no voter lost. So
	// there are more of them, until all has been seen.
	var unseen []string
	for range 5 {
		rapid.Check(t, func(rt *rapid.T) {
			workers := rapid.SliceOfN(rapid.SliceOfN(rapid.Custom(drawAccessAct), 10, 25), 4, 8).Draw(rt, "workers")
			var wrong []string
			synctest.Test(t, func(t *testing.T) {
				wrong = playAccess(t, workers, func(what string) { mu.Lock(); n[what]++; mu.Unlock() })
			})
			if len(wrong) > 0 {
				rt.Fatalf("%s", strings.Join(wrong, "\n"))
			}
		})
		unseen = slices.DeleteFunc([]string{"granted", "granted under two groups", "voided", "expired", "voter lost", "active"},
			func(what string) bool { return n[what] > 0 })
		if len(unseen) == 0 || t.Failed() {
			break
		}
	}
	t.Logf("seen: %v", n)
	if len(unseen) > 0 {
		t.Errorf("never seen: %q", unseen)
	}
}

func playAccess(t *testing.T, workers [][]accessAct, saw func(string)) []string {
	r := governedRig(t)
	var mu sync.Mutex
	requests, incidents := []lease.RequestView{}, []broker.Incident{}
	reloading := sync.Mutex{}
	act := func(a accessAct) {
		who := person(accessPeople[a.Who].name, accessPeople[a.Who].groups...)
		mu.Lock()
		var v lease.RequestView
		if len(requests) > 0 {
			v = requests[len(requests)-1-a.Pick%len(requests)]
		}
		var in broker.Incident
		if len(incidents) > 0 {
			in = incidents[len(incidents)-1-a.Pick%len(incidents)]
		}
		mu.Unlock()
		switch a.Kind {
		case "ask":
			q := lease.AccessRequest{Tool: accessTools[a.Tool], Reason: "a model"}
			if a.In {
				q.Incident = in.ID
			}
			if v, err := r.engine.CreateRequest(bg, as(support), q); err == nil {
				mu.Lock()
				requests = append(requests, v)
				mu.Unlock()
			}
		case "approve", "deny":
			if v.ID != "" {
				_, _ = r.engine.Vote(bg, who, lease.Vote{Request: v.ID, Approve: a.Kind == "approve", Digest: v.Digest})
			}
		case "withdraw":
			if v.ID != "" {
				_, _ = r.engine.WithdrawRequest(bg, as(support), v.ID, "")
			}
		case "lose":
			if err := r.engine.PersonSeen(bg, *person(accessPeople[a.Who].name).Person); err != nil {
				t.Error(err)
			}
		case "issue":
			if d, err := r.engine.Issue(bg, as(support), lease.IssueRequest{Tool: accessTools[a.Tool]}); err == nil {
				d.Done()
			}
		case "open":
			in, err := r.engine.OpenIncident(bg, as(pager), lease.IncidentRequest{Title: "broken", Tools: []string{"cloud.read"}, Agents: []spiffeid.ID{support}})
			if err == nil { // a reload may have come between
				mu.Lock()
				incidents = append(incidents, in)
				mu.Unlock()
			}
		case "close":
			if in.ID != "" {
				if _, _, err := r.engine.CloseIncident(bg, as(pager), in.ID, ""); err != nil {
					t.Error(err)
				}
			}
		case "reload":
			reloading.Lock()
			err := r.reloadPolicies(accessSets[a.Pick%len(accessSets)])
			reloading.Unlock()
			if err != nil {
				t.Error(err)
			}
		case "kill":
			if a.In { // seldom
				if _, err := r.end(lease.Selector{Tool: accessTools[a.Tool]}, false); err != nil {
					t.Error(err)
				}
			}
		case "wait":
			time.Sleep(a.For)
		}
	}
	for _, p := range accessPeople {
		r.seen(person(p.name, p.groups...))
	}
	var wg sync.WaitGroup
	for _, acts := range workers {
		wg.Go(func() {
			for _, a := range acts {
				act(a)
			}
		})
	}
	wg.Wait()
	time.Sleep(15 * time.Second)
	w := &accessWatch{saw: saw, grants: map[broker.GrantID]audit.Event{}, uses: map[broker.GrantID]int{}, requests: map[broker.RequestID]*watched{}, closed: map[broker.IncidentID]bool{}, groups: map[string][]string{}, over: map[broker.GrantID]bool{}}
	for _, p := range accessPeople {
		w.groups["person:"+p.name] = p.groups
	}
	events := r.events(lease.EventFilter{})
	for _, ev := range events {
		w.see(ev)
	}
	// How many are pending is counted right.
	pending := 0
	for _, q := range w.requests {
		if q.state == "pending" {
			pending++
		}
	}
	if n := len(r.keys("waiting|")); n != pending {
		w.fail("%d requests are pending by the evidence, and %d by the index", pending, n)
	}
	for range 32 - pending {
		if _, err := r.ask("crm.read"); err != nil {
			w.fail("asking with fewer than 32 requests pending: %v", err)
			break
		}
	}
	if _, err := r.ask("crm.read"); broker.ReasonOf(err) != broker.ReasonRequestLimit {
		w.fail("asking with 32 requests pending: %v", err)
	}
	// What is active lives on what holds.
	p, err := r.engine.Leases(bg, lease.LeaseFilter{}, "", lease.MaxPage)
	if err != nil {
		t.Error(err)
	}
	for _, l := range p.Items {
		if l.State == broker.LeaseActive {
			if _, ok, err := r.engine.Usable(bg, l.ID); !ok || err != nil {
				w.fail("lease %s of %s is active, and nothing holds it (%v)", l.ID, l.Tool, err)
			}
		}
	}
	return w.wrong
}

// watched is a request, as the evidence tells of it.
type watched struct {
	created audit.Event
	votes   []string // who said yes
	state   string
}

// accessWatch reads the evidence in the order of its commits.
type accessWatch struct {
	saw      func(string)
	wrong    []string
	digest   string // of the policy set that decides
	groups   map[string][]string
	closed   map[broker.IncidentID]bool
	requests map[broker.RequestID]*watched
	grants   map[broker.GrantID]audit.Event
	over     map[broker.GrantID]bool
	uses     map[broker.GrantID]int
}

func (w *accessWatch) fail(format string, args ...any) {
	w.wrong = append(w.wrong, fmt.Sprintf(format, args...))
}

func (w *accessWatch) see(ev audit.Event) {
	q := w.requests[ev.Request]
	switch ev.Type {
	case audit.CatalogLoaded:
		w.digest = ev.Details["policy_digest"]
	case audit.PersonChanged:
		w.groups[ev.Actor] = nil // nobody comes back
		w.saw("group lost")
	case audit.IncidentClosed:
		w.closed[ev.Incident] = true
	case audit.RequestCreated:
		if ev.Details["policy_digest"] != w.digest {
			w.fail("request %s was let in by a policy set that was not in force", ev.Request)
		}
		if w.closed[ev.Incident] {
			w.fail("request %s was made for an incident that was closed", ev.Request)
		}
		w.requests[ev.Request] = &watched{created: ev, state: "pending"}
	case audit.RequestApproved:
		if q.state != "pending" || slices.Contains(q.votes, ev.Actor) {
			w.fail("a vote of %s for request %s, which was %s and had the votes of %v", ev.Actor, ev.Request, q.state, q.votes)
		}
		q.votes = append(q.votes, ev.Actor)
	case audit.RequestDenied, audit.RequestEnded:
		if q.state != "pending" {
			w.fail("request %s ended twice", ev.Request)
		}
		q.state = ev.Cause
		switch ev.Cause {
		case "void":
			w.saw("voided")
		case "expired":
			w.saw("expired")
		}
	case audit.RequestGranted:
		w.granted(q, ev)
	case audit.GrantCreated:
		if _, twice := w.grants[ev.Grant]; twice || w.closed[ev.Incident] {
			w.fail("grant %s: made twice %v, its incident closed %v", ev.Grant, twice, w.closed[ev.Incident])
		}
		w.grants[ev.Grant] = ev
	case audit.GrantEnded:
		if ev.Cause == string(broker.CauseVoterLost) {
			w.saw("voter lost")
		}
		w.over[ev.Grant] = true
	case audit.LeaseIntended, audit.LeaseActive:
		if w.over[ev.Grant] || w.closed[ev.Incident] {
			w.fail("%s of %s under a grant that was over", ev.Type, ev.Lease)
		}
		if ev.Details["policy_digest"] != w.digest || ev.Details["policies"] == "" {
			w.fail("%s of %s was allowed by a policy set that was not in force", ev.Type, ev.Lease)
		}
		if ev.Type == audit.LeaseActive {
			w.saw("active")
			w.uses[ev.Grant]++
			if w.grants[ev.Grant].Details["max_uses"] == "1" && w.uses[ev.Grant] > 1 {
				w.fail("a single-use grant gave %d leases", w.uses[ev.Grant])
			}
		}
		if g := w.grants[ev.Grant]; g.Details["rule"] == "both" && ev.Type == audit.LeaseActive {
			for _, v := range strings.Split(g.Details["voters"], ", ") {
				name, group, _ := strings.Cut(strings.TrimSuffix(v, ")"), " (")
				if !slices.Contains(w.groups["person:"+name], group) {
					w.fail("lease %s became active although %s had left %s", ev.Lease, name, group)
				}
			}
		}
	}
}

// granted is where the quorum is counted again, by nothing but the evidence.
func (w *accessWatch) granted(q *watched, ev audit.Event) {
	if q.state != "pending" {
		w.fail("request %s was granted when it was %s", ev.Request, q.state)
	}
	q.state = "granted"
	w.saw("granted")
	if w.closed[ev.Incident] {
		w.fail("request %s was granted after its incident was closed", ev.Request)
	}
	if ev.Details["policy_digest"] != w.digest {
		w.fail("request %s was granted by a policy set that was not in force", ev.Request)
	}
	rule := q.created.Details["rule"]
	if rule == "" {
		return
	}
	if expires, err := time.Parse(time.RFC3339, q.created.Details["expires_at"]); err != nil || ev.Time.After(expires.Add(time.Second)) {
		w.fail("request %s was granted at %s and had expired at %s", ev.Request, ev.Time, expires)
	}
	in := func(group string) (all []string) {
		for _, v := range q.votes {
			if v != "person:support@acme.test" && slices.Contains(w.groups[v], group) {
				all = append(all, v)
			}
		}
		return all
	}
	finance, security := in("finance"), in("security")
	met := len(finance) > 0
	if rule == "both" {
		w.saw("granted under two groups")
		met = len(finance) > 0 && len(security) > 0 && (len(finance) > 1 || len(security) > 1 || finance[0] != security[0])
	}
	if !met {
		w.fail("request %s was granted without a quorum: votes %v, of finance %v, of security %v", ev.Request, q.votes, finance, security)
	}
}
