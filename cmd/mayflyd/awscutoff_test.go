package main

import (
	"context"
	"encoding/json"
	"errors"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/sts"
	"google.golang.org/protobuf/types/known/durationpb"

	mayflyv1 "github.com/mayfly-security/mayfly/broker/api/mayfly/v1"
	"github.com/mayfly-security/mayfly/providers/awssts/fakeaws"
)

const cutOffRole = "arn:aws:iam::123456789012:role/mayfly/crm"

const cutOffCatalog = `
agents:
  - {id: "spiffe://acme.test/agent/support", owner: support, environment: production}
groups:
  - {name: sre, members: ["spiffe://acme.test/operator/sam"]}
operators: [{group: sre}]
providers:
  - {name: aws, driver: awssts, config: {region: eu-central-1, account: "123456789012", endpoint_url: "@URL@", credentials: {method: default}, early_revoke: {mode: deny_list, settle: 1s}}}
tools:
  - {name: crm.export, provider: aws, description: x, max_ttl: 10m, scope: {role: "arn:aws:iam::123456789012:role/mayfly/crm", statements: [{Effect: Allow, Action: "s3:GetObject", Resource: "arn:aws:s3:::crm/*"}]}}
`

// cutOffRig is a broker in a process of its own with a fake account, and the
// command line as it is built.
type cutOffRig struct {
	t        *testing.T
	fake     *fakeaws.Fake
	server   *httptest.Server
	people   *people
	settings childSettings
	child    *child
	api      callers
	mayfly   string

	mu   sync.Mutex
	hold chan struct{} // if not nil, a write of a policy says so here and waits for ever
}

func newCutOffRig(t *testing.T) *cutOffRig {
	r := &cutOffRig{t: t, people: newPeople(t), mayfly: filepath.Join(t.TempDir(), "mayfly")}
	build := exec.Command("go", "build", "-o", r.mayfly, "../mayfly")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if said, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, said)
	}
	gone := make(chan struct{})
	r.fake = fakeaws.New(fakeaws.Config{
		Force: func(int) time.Duration { return time.Second },
		Hold: func(action string, _ url.Values) {
			r.mu.Lock()
			hold := r.hold
			r.mu.Unlock()
			if action == "PutRolePolicy" && hold != nil {
				hold <- struct{}{}
				<-gone
			}
		},
		Quiet: func(string, int) bool { // what was held is lost
			select {
			case <-gone:
				return true
			default:
				return false
			}
		},
	}, "crm")
	r.server = httptest.NewServer(r.fake)
	t.Cleanup(r.server.Close)
	t.Cleanup(func() { close(gone) })
	for name, value := range map[string]string{"AWS_ACCESS_KEY_ID": "AKIAFAKE", "AWS_SECRET_ACCESS_KEY": "fake", "AWS_CONFIG_FILE": "/dev/null", "AWS_SHARED_CREDENTIALS_FILE": "/dev/null"} {
		t.Setenv(name, value)
	}
	dir := t.TempDir()
	r.settings = childSettings{Store: filepath.Join(dir, "mayfly.db"), Workload: r.people.sockets["/mayfly"],
		Catalog: writeCatalog(t, dir, strings.ReplaceAll(cutOffCatalog, "@URL@", r.server.URL))}
	r.start()
	t.Cleanup(func() { r.child.kill() })
	_, err := r.api.grants.CreateGrant(t.Context(), connect.NewRequest(&mayflyv1.CreateGrantRequest{Agent: "spiffe://acme.test/agent/support", Tool: "crm.export",
		Duration: durationpb.New(time.Hour), Reason: "x"}))
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func (r *cutOffRig) start() {
	r.child = startChild(r.t, r.settings)
	r.api = newCallers(r.child.addr, r.people.httpClient("/agent/support"), r.people.httpClient("/operator/sam"), r.people.httpClient("/bot/pager"))
}

func (r *cutOffRig) setHold(hold chan struct{}) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.hold = hold
}

// issue gets a lease and its access key, or the reason why not.
func (r *cutOffRig) issue() (lease, key string, err error) {
	res, err := r.api.agent.IssueLease(r.t.Context(), connect.NewRequest(&mayflyv1.IssueLeaseRequest{Tool: "crm.export"}))
	if err != nil {
		return "", "", err
	}
	return res.Msg.GetLease().GetId(), res.Msg.GetSecret()["access_key_id"], nil
}

// newLease waits until leases are made again.
func (r *cutOffRig) newLease() (lease, key string) {
	r.t.Helper()
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(200 * time.Millisecond) {
		lease, key, err := r.issue()
		if err == nil {
			return lease, key
		}
		if connect.CodeOf(err) != connect.CodeUnavailable || time.Now().After(deadline) {
			r.t.Fatal(err)
		}
	}
}

// others is a session of the role that the broker knows nothing of.
func (r *cutOffRig) others() string {
	r.t.Helper()
	client := sts.New(sts.Options{Region: "eu-central-1", BaseEndpoint: &r.server.URL, Credentials: credentials.NewStaticCredentialsProvider("AKIABOB", "x", "")})
	out, err := client.AssumeRole(r.t.Context(), &sts.AssumeRoleInput{RoleArn: aws.String(cutOffRole), RoleSessionName: aws.String("bob"), DurationSeconds: aws.Int32(43200)})
	if err != nil {
		r.t.Fatal(err)
	}
	return *out.Credentials.AccessKeyId
}

// run runs the command line as somebody, and returns what it said and its exit code.
func (r *cutOffRig) run(who string, args ...string) (out string, code int) {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(r.t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, r.mayfly, args...)
	cmd.Env = append(os.Environ(), "SPIFFE_ENDPOINT_SOCKET="+r.people.sockets[who], "MAYFLY_ADDR="+r.child.addr)
	cmd.Stdin = strings.NewReader("") // nobody can be asked
	said, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		r.t.Fatal(err)
	}
	return string(said), cmd.ProcessState.ExitCode()
}

func (r *cutOffRig) want(code int, text string, who string, args ...string) {
	r.t.Helper()
	if out, got := r.run(who, args...); got != code || !strings.Contains(out, text) {
		r.t.Errorf("mayfly %q exits with %d, want %d, and %q in:\n%s", args, got, code, text, out)
	}
}

func (r *cutOffRig) state(id string) *mayflyv1.Lease {
	r.t.Helper()
	res, err := r.api.operator.GetLease(r.t.Context(), connect.NewRequest(&mayflyv1.GetLeaseRequest{Id: id}))
	if err != nil {
		r.t.Fatal(err)
	}
	return res.Msg
}

func (r *cutOffRig) evidence() (types []string) {
	r.t.Helper()
	events, err := r.api.audit.ListEvents(r.t.Context(), connect.NewRequest(&mayflyv1.ListEventsRequest{PageSize: 1000}))
	if err != nil {
		r.t.Fatal(err)
	}
	for _, e := range events.Msg.GetEvents() {
		if strings.HasPrefix(e.GetType(), "cutoff.") {
			types = append(types, e.GetType())
		}
	}
	return types
}

// TestAWSCutOff: an operator cuts a role off with the command line, and every
// older session of it is dead, the broker's and those of others, and said to be
// no sooner than it is. Then the broker is killed while it writes to IAM, and
// the next one carries the decision out.
func TestAWSCutOff(t *testing.T) {
	r := newCutOffRig(t)
	lease, key := r.newLease()
	bob := r.others()
	flags := []string{"aws", "cut-off", cutOffRole, "--provider", "aws"}
	cut := func(more ...string) []string { return append(slices.Clone(flags), more...) }
	r.want(0, "This would end 1 open lease that the broker made", "/operator/sam", cut("--dry-run")...)
	r.want(0, "It would ALSO end every session of "+cutOffRole, "/operator/sam", cut("--dry-run")...)
	r.want(2, "say --yes if you mean it", "/operator/sam", cut("--reason", "x")...)
	r.want(2, "needs --reason", "/operator/sam", cut("--yes")...)
	r.want(3, "may not administer", "/agent/support", cut("--reason", "x", "--yes")...)
	r.want(4, "did you mean", "/operator/sam", "aws", "cut-off", cutOffRole+"m", "--provider", "aws", "--reason", "x", "--yes")
	r.want(4, "not in the catalog", "/operator/sam", "aws", "cut-off", cutOffRole, "--provider", "asw", "--reason", "x", "--yes")
	r.want(0, "No role is cut off", "/operator/sam", "aws", "cut-offs")
	if !r.fake.Works(key) || !r.fake.Works(bob) || r.fake.Count("PutRolePolicy") != 0 {
		t.Fatal("what was refused, or only looked at, did something")
	}
	r.want(0, "is cut off: verified", "/operator/sam", cut("--reason", "SEC-9: keys in a log", "--yes")...)
	if r.fake.Works(key) || r.fake.Works(bob) {
		t.Error("one lives")
	}
	if l := r.state(lease); l.GetState() != "revoked" || l.GetCause() != "cut_off" || !strings.Contains(l.GetLeft(), "was seen to do") {
		t.Errorf("%v", l)
	}
	if got := r.evidence(); !slices.Equal(got, []string{"cutoff.requested", "cutoff.written", "cutoff.verified"}) {
		t.Errorf("the evidence says %q", got)
	}
	lease, key = r.newLease()
	if !r.fake.Works(key) {
		t.Error("a new lease is dead")
	}
	var list struct {
		CutOffs []struct {
			Role, Progress, DecidedBy, Reason string
			Until                             time.Time
		}
	}
	out, _ := r.run("/operator/sam", "aws", "cut-offs", "--output", "json")
	if err := json.Unmarshal([]byte(out), &list); err != nil || len(list.CutOffs) != 1 || list.CutOffs[0].Role != cutOffRole || list.CutOffs[0].Progress != "verified" ||
		list.CutOffs[0].DecidedBy != "spiffe://acme.test/operator/sam" || list.CutOffs[0].Reason != "SEC-9: keys in a log" || time.Until(list.CutOffs[0].Until) < 12*time.Hour {
		t.Errorf("%v: %s", err, out)
	}

	// Killed between the record and the write, whose answer nobody gets.
	holds := make(chan struct{})
	r.setHold(holds)
	done := make(chan struct{})
	go func() {
		defer close(done)
		r.run("/operator/sam", cut("--reason", "again", "--yes", "--timeout", "2s", "--wait", "2s")...)
	}()
	<-holds
	r.child.kill()
	<-done
	r.setHold(nil)
	if !r.fake.Works(key) {
		t.Fatal("the write was not held")
	}
	r.start()
	for deadline := time.Now().Add(30 * time.Second); r.fake.Works(key) || r.state(lease).GetState() != "revoked"; time.Sleep(100 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("after the restart: works %v, %v, %q", r.fake.Works(key), r.state(lease), r.evidence())
		}
	}
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		got := r.evidence()
		if slices.Equal(got[3:], []string{"cutoff.requested", "cutoff.written", "cutoff.verified"}) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the evidence says %q", got)
		}
	}
	r.want(0, "verified: it was seen to be in force; 0 of 1 lease alive", "/operator/sam", "aws", "cut-offs")
	if _, key = r.newLease(); !r.fake.Works(key) {
		t.Error("a new lease is dead")
	}
	if p := r.fake.Problems(); len(p) > 0 {
		t.Errorf("the fake was asked %q", p)
	}
}
