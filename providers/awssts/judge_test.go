package awssts

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers/awssts/awsscope"
	"github.com/mayfly-security/mayfly/providers/awssts/denylist"
)

// simulation is one question to the judge.
type simulation struct {
	Principal        string         `json:"principal"`
	Action           string         `json:"action"`
	Resource         string         `json:"resource"`
	Context          map[string]any `json:"context"`
	SessionPolicy    string         `json:"sessionPolicy"`
	IdentityPolicies []string       `json:"identityPolicies"`
}

type judgement struct {
	Result  string   `json:"result"`
	Ignored []string `json:"ignored"`
	Error   string   `json:"error"`
}

// judge asks @cloud-copilot/iam-simulate, in a process of its own.
func judge(t *testing.T, questions []simulation) []judgement {
	t.Helper()
	dir, err := filepath.Abs("../../deploy/testbed/iamsim")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "node_modules", "@cloud-copilot", "iam-simulate")); err != nil {
		t.Fatal("the judge of AWS policies is not installed: run `make testbed-iamsim`, which needs Node.js")
	}
	var in bytes.Buffer
	enc := json.NewEncoder(&in)
	for _, q := range questions {
		if err := enc.Encode(q); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.CommandContext(t.Context(), "node", "judge.mjs")
	cmd.Dir, cmd.Stdin = dir, &in
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		t.Fatalf("the judge: %v\n%s", err, errs.String())
	}
	var all []judgement
	for r := bufio.NewReader(&out); ; {
		line, err := r.ReadBytes('\n')
		if err == io.EOF {
			break
		}
		var j judgement
		if err := json.Unmarshal(line, &j); err != nil {
			t.Fatalf("the judge says %q: %v", line, err)
		}
		all = append(all, j)
	}
	if len(all) != len(questions) {
		t.Fatalf("%d judgements of %d questions: %s", len(all), len(questions), errs.String())
	}
	return all
}

// trial is a question with the answer that we promise.
type trial struct {
	what     string
	q        simulation
	may      bool
	explicit bool // denied by a statement that says so, which holds against every policy that allows
}

// met reports whether the judge says what we promise.
func (c trial) met(j judgement) bool {
	return (j.Result == "Allowed") == c.may && (!c.explicit || j.Result == "ExplicitlyDenied")
}

// trials are leases of two roles, of incidents and agents, some ended in each
// way, seen at several times, with the documents that the provider renders.
func trials(t *testing.T) []trial {
	start := time.Date(2026, 11, 26, 10, 0, 0, 0, time.UTC)
	// Everything that the roles themselves may do; the session policy bounds it.
	const wide = `{"Version":"2012-10-17","Statement":[{"Effect":"Allow","Action":["s3:*","dynamodb:*","sts:AssumeRole"],"Resource":"*"}]}`
	agents := []spiffeid.ID{spiffeid.RequireFromString("spiffe://acme.test/agent/a"), spiffeid.RequireFromString("spiffe://acme.test/agent/b")}
	open, closed := broker.IncidentID("i0000000000000000000000001"), broker.IncidentID("i0000000000000000000000002")
	config, err := awsscope.ParseConfig(json.RawMessage(`{"region":"eu-central-1","account":"123456789012","credentials":{"method":"default"},"early_revoke":{"mode":"deny_list"}}`))
	if err != nil {
		t.Fatal(err)
	}
	tool := crmRead
	tool.Scope = json.RawMessage(`{"roles":["` + arn("crm") + `","` + arn("pay") + `"],` + strings.TrimPrefix(string(crmRead.Scope), "{"))
	scope, err := awsscope.ParseScope(config, tool)
	if err != nil {
		t.Fatal(err)
	}
	type session struct {
		known     denylist.Known
		role, who string
		agent     spiffeid.ID
		issued    time.Time
		end       time.Time
	}
	var all []session
	n := 0
	add := func(role string, agent spiffeid.ID, incident broker.IncidentID, issued time.Time, ended string) {
		n++
		s := session{role: role, agent: agent, issued: issued, end: issued.Add(40 * time.Minute), who: fmt.Sprintf("l%025d", n)}
		s.known = denylist.Known{Lease: broker.LeaseID(s.who), Incident: incident, Agent: awsscope.SourceIdentity(agent), Until: s.end.Add(skew), Issued: issued.Add(skew),
			Begun: ended != "", Closed: ended == "incident", Disabled: ended == "agent"}
		all = append(all, s)
	}
	for i, role := range []string{"crm", "pay"} {
		for k := range 24 {
			add(role, agents[k%2], []broker.IncidentID{"", open}[k/2%2], start.Add(time.Duration(k)*time.Second), "")
		}
		for range 3 {
			add(role, agents[1], open, start, "lease")
		}
		if i == 0 { // an incident that is over, and an agent that was disabled and enabled again
			for range 9 {
				add(role, agents[1], closed, start, "incident")
			}
			for range 10 {
				add(role, agents[0], open, start.Add(-20*time.Minute), "agent")
			}
			add(role, agents[0], open, start, "")                      // a new session of the same agent
			add(role, agents[1], open, start.Add(-20*time.Minute), "") // an old one of another
		}
	}
	documents := map[string]denylist.Set{}
	for _, role := range []string{"crm", "pay"} {
		var known []denylist.Known
		for _, s := range all {
			if s.role == role {
				known = append(known, s.known)
			}
		}
		documents[role], _ = denylist.Required(known, denylist.Entry{}, start)
	}
	documents["pay"][denylist.Entry{Kind: denylist.CutOff, Before: start.Add(-time.Minute).Unix()}] = struct{}{}
	add("pay", agents[1], "", start.Add(-10*time.Minute), "") // cut off
	cut := len(all) - 1
	kinds := map[denylist.Kind]bool{}
	for _, set := range documents {
		for e := range set {
			kinds[e.Kind] = true
		}
	}
	for _, k := range []denylist.Kind{denylist.Lease, denylist.Incident, denylist.Agent, denylist.CutOff} {
		if !kinds[k] {
			t.Fatalf("no entry of kind %s is in the documents", k)
		}
	}

	var out []trial
	for i, s := range all {
		policy, err := scope.Policy(map[string]string{"customer": "acme"}, s.end)
		if err != nil {
			t.Fatal(err)
		}
		context := func(at time.Time) map[string]any {
			c := map[string]any{
				"aws:CurrentTime": awsscope.Instant(at), "aws:TokenIssueTime": awsscope.Instant(s.issued),
				"aws:userid": "AROAEXAMPLE" + strings.ToUpper(s.role) + ":" + s.who, "aws:SourceIdentity": s.known.Agent,
			}
			for _, tag := range awsscope.Tags(s.agent, s.known.Incident, tool.Name) {
				c["aws:PrincipalTag/"+tag.Key] = tag.Value
			}
			return c
		}
		for _, at := range []time.Time{start, s.end.Add(-time.Second), s.end, s.end.Add(time.Second), s.end.Add(time.Hour)} {
			for _, ask := range []struct {
				action, resource, prefix string
				may                      bool
			}{
				{"s3:GetObject", "arn:aws:s3:::crm/acme/1", "", true},
				{"s3:GetObject", "arn:aws:s3:::crm/acme/2/3", "", true},
				{"s3:ListBucket", "arn:aws:s3:::crm", "acme/2", true},
				{"s3:ListBucket", "arn:aws:s3:::crm", "globex/2", false},
				{"s3:GetObject", "arn:aws:s3:::crm/globex/1", "", false},
				{"dynamodb:GetItem", "arn:aws:dynamodb:eu-central-1:123456789012:table/crm", "", false},
				{"sts:AssumeRole", "arn:aws:iam::123456789012:role/other", "", false},
			} {
				if !ask.may && at != start { // refusals are easily had
					continue
				}
				c := context(at)
				if ask.prefix != "" {
					c["s3:prefix"] = ask.prefix
				}
				out = append(out, trial{
					what: fmt.Sprintf("lease %d of role %s: %s on %s, %s after its beginning", i, s.role, ask.action, ask.resource, at.Sub(s.issued)),
					q: simulation{
						Principal: "arn:aws:sts::123456789012:assumed-role/" + s.role + "/" + s.who, Action: ask.action, Resource: ask.resource,
						Context: c, SessionPolicy: policy, IdentityPolicies: []string{wide, denylist.Render(documents[s.role])},
					},
					may:      ask.may && !at.After(s.end) && !s.known.Begun && i != cut,
					explicit: ask.action == "sts:AssumeRole",
				})
			}
		}
	}
	return out
}

// TestJudge: an independent simulator of IAM comes, for every lease, time and
// request, to what we promise, with the documents as they are rendered.
func TestJudge(t *testing.T) {
	all := trials(t)
	var questions []simulation
	for _, c := range all {
		questions = append(questions, c.q)
	}
	may := 0
	for i, j := range judge(t, questions) {
		switch {
		case j.Error != "":
			t.Errorf("%s: %s", all[i].what, j.Error)
		case len(j.Ignored) > 0:
			t.Errorf("%s: the judge ignored %v", all[i].what, j.Ignored)
		case !all[i].met(j):
			t.Errorf("%s: the judge says %s", all[i].what, j.Result)
		}
		if all[i].may {
			may++
		}
	}
	if n := len(all); n < 200 || may*10 < n*3 || (n-may)*10 < n*3 {
		t.Errorf("%d cases, %d of them allowed", n, may)
	}
	t.Logf("%d cases: %d allowed, %d denied", len(all), may, len(all)-may)
}

// TestJudgeMutations: each condition of each statement that we render matters.
// Without it the judge comes to something else in at least one case.
func TestJudgeMutations(t *testing.T) {
	all := trials(t)
	type mutation struct {
		name  string
		apply func(statement map[string]any) bool // reports whether it changed something
	}
	var mutations []mutation
	seen := map[string]bool{}
	texts := func(q simulation) []string { return append([]string{q.SessionPolicy}, q.IdentityPolicies[1:]...) }
	for _, c := range all {
		for _, text := range texts(c.q) {
			for _, s := range statements(t, text) {
				sid, _ := s["Sid"].(string)
				conditions, _ := s["Condition"].(map[string]any)
				for operator, keys := range conditions {
					for key := range keys.(map[string]any) {
						if id := sid + " " + operator + " " + key; !seen[id] {
							seen[id] = true
							mutations = append(mutations, mutation{id, func(s map[string]any) bool {
								got, _ := s["Sid"].(string)
								c, _ := s["Condition"].(map[string]any)
								if got != sid || c == nil {
									return false
								}
								k, _ := c[operator].(map[string]any)
								_, has := k[key]
								delete(k, key)
								if len(k) == 0 {
									delete(c, operator)
								}
								return has
							}})
						}
					}
				}
				if sid != "" && !seen[sid] {
					seen[sid] = true
					mutations = append(mutations, mutation{"all of " + sid, func(s map[string]any) bool {
						if got, _ := s["Sid"].(string); got != sid {
							return false
						}
						s["Condition"] = map[string]any{"StringEquals": map[string]any{"aws:userid": "nobody"}}
						return true
					}})
				}
			}
		}
	}
	slices.SortFunc(mutations, func(a, b mutation) int { return strings.Compare(a.name, b.name) })
	var questions []simulation
	var of []int
	var which []int
	for m, mutate := range mutations {
		for i, c := range all {
			q := c.q
			changed := false
			session, a := mutated(t, q.SessionPolicy, mutate.apply)
			list, b := mutated(t, q.IdentityPolicies[1], mutate.apply)
			if changed = a || b; !changed {
				continue
			}
			q.SessionPolicy, q.IdentityPolicies = session, []string{q.IdentityPolicies[0], list}
			questions, of, which = append(questions, q), append(of, m), append(which, i)
		}
	}
	flips := make([]int, len(mutations))
	for k, j := range judge(t, questions) {
		if j.Error != "" || len(j.Ignored) > 0 {
			t.Fatalf("%s without %s: %s %v", all[which[k]].what, mutations[of[k]].name, j.Error, j.Ignored)
		}
		if !all[which[k]].met(j) {
			flips[of[k]]++
		}
	}
	for m, mutate := range mutations {
		if flips[m] == 0 {
			t.Errorf("without %s nothing changes", mutate.name)
		}
		t.Logf("without %s: %d cases flip", mutate.name, flips[m])
	}
	if len(mutations) < 10 {
		t.Errorf("only %d mutations", len(mutations))
	}
}

func statements(t *testing.T, text string) (all []map[string]any) {
	t.Helper()
	var d struct{ Statement []map[string]any }
	if err := json.Unmarshal([]byte(text), &d); err != nil {
		t.Fatal(err)
	}
	return d.Statement
}

func mutated(t *testing.T, text string, apply func(map[string]any) bool) (string, bool) {
	t.Helper()
	var d map[string]any
	if err := json.Unmarshal([]byte(text), &d); err != nil {
		t.Fatal(err)
	}
	changed := false
	for _, s := range d["Statement"].([]any) {
		s := s.(map[string]any)
		if apply(s) {
			changed = true
		}
		if c, ok := s["Condition"].(map[string]any); ok && len(c) == 0 {
			delete(s, "Condition")
		}
	}
	b, err := json.Marshal(d)
	if err != nil {
		t.Fatal(err)
	}
	return string(b), changed
}
