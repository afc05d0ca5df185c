//go:build unix

package awsdeny

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"

	"github.com/mayfly-security/mayfly/deploy/examples/story"
	"github.com/mayfly-security/mayfly/providers/awssts/denylist"
	"github.com/mayfly-security/mayfly/providers/awssts/fakeaws"
)

const (
	role       = "crm"
	brokerRole = "mayfly-broker"
	settle     = time.Second

	catalog = `
agents:
  - {id: "spiffe://acme.test/agent/support", owner: support@acme.test, environment: production}
  - {id: "spiffe://acme.test/agent/batch", owner: batch@acme.test, environment: production, disabled: false}
groups:
  - {name: sre, members: ["spiffe://acme.test/operator/sam"]}
operators: [{group: sre}]
openers:
  - id: spiffe://acme.test/bot/pager
    tools: [crm.export]
    agents: ["spiffe://acme.test/agent/support"]
    max_duration: 1h
    max_open: 5
providers:
  - name: aws
    driver: awssts
    config:
      region: eu-central-1
      account: "123456789012"
      endpoint_url: @STS@
      iam_endpoint_url: @IAM@
      credentials: {method: web_identity, role_arn: "arn:aws:iam::123456789012:role/mayfly-broker"}
      early_revoke: {mode: deny_list, settle: 1s}
tools:
  - name: crm.export
    provider: aws
    description: Reads the exports of one customer
    max_ttl: 1h
    params: {customer: {type: string, pattern: "[a-z]{1,20}"}}
    scope:
      role: arn:aws:iam::123456789012:role/mayfly/crm
      statements:
        - {Effect: Allow, Action: "s3:GetObject", Resource: "arn:aws:s3:::acme-crm/${params.customer}/*"}
  - name: crm.notify
    provider: aws
    description: Sends one kind of message
    max_ttl: 1h
    scope:
      role: arn:aws:iam::123456789012:role/mayfly/crm
      statements:
        - {Effect: Allow, Action: "sqs:SendMessage", Resource: "arn:aws:sqs:eu-central-1:123456789012:crm"}
`
)

// account is the AWS account of a test: a fake behind two addresses, with hands
// that hold a call before it is acted upon or before it is answered.
type account struct {
	*fakeaws.Fake
	t        *testing.T
	sts, iam *httptest.Server
	iamAddr  string
	force    atomic.Int64  // how long a write takes to be in force
	throttle atomic.Int64  // so many writes are refused with Throttling
	trust    func() string // the file that the trust domain's keys are in

	mu     sync.Mutex
	before *hand // holds the next PutRolePolicy before it is acted upon
	after  *hand // holds the next PutRolePolicy after that
	made   *hand // holds the next AssumeRole for a lease after a session was made
	writes []time.Time
}

// hand holds one call.
type hand struct {
	holds chan struct{} // closed once it has a call
	open  chan bool     // true: the call goes on; false: it is lost
	done  chan struct{} // closed once the call is over
}

func newHand() *hand {
	return &hand{holds: make(chan struct{}), open: make(chan bool, 1), done: make(chan struct{})}
}

func newAccount(t *testing.T) *account {
	a := &account{t: t}
	a.Fake = fakeaws.New(fakeaws.Config{
		Broker: brokerRole,
		Token:  a.verify,
		Force:  func(int) time.Duration { return time.Duration(a.force.Load()) },
		Fail: func(action string, _ int) (string, int) {
			if action == "PutRolePolicy" && a.throttle.Add(-1) >= 0 {
				return "Throttling", http.StatusBadRequest
			}
			return "", 0
		},
	}, role, brokerRole)
	a.SetRole(role, fakeaws.Role{MaxSession: time.Hour})
	a.sts, a.iam = httptest.NewServer(a), httptest.NewServer(a)
	a.iamAddr = a.iam.Listener.Addr().String()
	t.Cleanup(func() {
		a.sts.Close()
		a.iam.Close()
		for _, problem := range a.Problems() {
			t.Errorf("the fake was asked %s", problem)
		}
	})
	return a
}

// verify takes the broker's own JWT-SVID, for AWS, and nothing else.
func (a *account) verify(token string) error {
	td := spiffeid.RequireTrustDomainFromString("acme.test")
	keys, err := spiffebundle.Load(td, a.trust())
	if err != nil {
		return err
	}
	svid, err := jwtsvid.ParseAndValidate(token, keys, []string{"sts.amazonaws.com"})
	if err == nil && svid.ID.Path() != "/mayfly" {
		err = errors.New("it is not the broker's")
	}
	return err
}

// ServeHTTP is STS and IAM, with hands.
func (a *account) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	form, _ := url.ParseQuery(string(body)) // a bad one is the fake's to refuse
	r.Body = io.NopCloser(bytes.NewReader(body))
	var before, after *hand
	a.mu.Lock()
	switch action := form.Get("Action"); {
	case err != nil:
	case action == "PutRolePolicy":
		before, after, a.before, a.after = a.before, a.after, nil, nil
	case action == "AssumeRole" && form.Has("SourceIdentity"): // a probe's has none
		after, a.made = a.made, nil
	}
	a.mu.Unlock()
	goesOn := func(h *hand) bool {
		if h == nil {
			return true
		}
		close(h.holds)
		return <-h.open
	}
	for _, h := range []*hand{before, after} {
		if h != nil {
			defer close(h.done)
		}
	}
	if !goesOn(before) {
		panic(http.ErrAbortHandler)
	}
	answer := httptest.NewRecorder()
	a.Fake.ServeHTTP(answer, r)
	if answer.Code == http.StatusOK && form.Get("Action") == "PutRolePolicy" {
		a.mu.Lock()
		a.writes = append(a.writes, time.Now())
		a.mu.Unlock()
	}
	if !goesOn(after) {
		panic(http.ErrAbortHandler)
	}
	for name, values := range answer.Header() {
		w.Header()[name] = values
	}
	w.WriteHeader(answer.Code)
	_, _ = w.Write(answer.Body.Bytes()) // who was killed reads nothing
}

// holdWrite has the next PutRolePolicy held.
func (a *account) holdWrite(acted bool) *hand {
	a.mu.Lock()
	defer a.mu.Unlock()
	h := newHand()
	if acted {
		a.after = h
	} else {
		a.before = h
	}
	return h
}

// holdMade has the next session of a lease held once it is made.
func (a *account) holdMade() *hand {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.made = newHand()
	return a.made
}

// cut makes IAM unreachable.
func (a *account) cut() { a.iam.CloseClientConnections(); a.iam.Close() }

// join makes it reachable again, at the same address.
func (a *account) join() {
	a.t.Helper()
	ln, err := net.Listen("tcp", a.iamAddr)
	if err != nil {
		a.t.Fatal(err)
	}
	a.iam = httptest.NewUnstartedServer(a)
	a.iam.Listener.Close() // its own address is not wanted
	a.iam.Listener = ln
	a.iam.Start()
}

// stands is everything that the role's policies deny, without probes.
func (a *account) stands() denylist.Set {
	a.t.Helper()
	all := denylist.Set{}
	for name := range a.Policies(role) {
		all.Add(a.policy(name))
	}
	return all
}

func (a *account) policy(name string) denylist.Set {
	a.t.Helper()
	s, err := denylist.Parse(a.Policies(role)[name])
	if err != nil {
		a.t.Fatalf("policy %s: %v", name, err)
	}
	for e := range s {
		if e.Kind == denylist.Probe {
			delete(s, e)
		}
	}
	return s
}

// rig is a broker, its callers, and its AWS account.
type rig struct {
	t          *testing.T
	aws        *account
	bin, dir   string
	addr, ops  string
	listen     string
	daemon     *exec.Cmd
	log        *os.File
	secrets    []string
	catalogNow string
}

func newRig(t *testing.T, bin string) *rig {
	t.Helper()
	dir, err := os.MkdirTemp("", "mayfly-aws-") // short: sockets are below it
	if err != nil {
		t.Fatal(err)
	}
	ports, err := story.FreePorts(2)
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{t: t, bin: bin, dir: dir, listen: "127.0.0.1:" + ports[0], addr: "https://localhost:" + ports[0], ops: "127.0.0.1:" + ports[1]}
	t.Cleanup(func() {
		r.stop()
		if t.Failed() {
			text, _ := os.ReadFile(filepath.Join(dir, "log")) // nothing more can be told
			t.Logf("the broker's log:\n%s", text)
		}
		os.RemoveAll(dir)
	})
	if r.log, err = os.OpenFile(filepath.Join(dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.log.Close() })
	r.aws = newAccount(t)
	r.aws.trust = func() string { return filepath.Join(r.state(), "bundle.json") }
	if err := os.Mkdir(r.state(), 0o700); err != nil {
		t.Fatal(err)
	}
	r.setCatalog(strings.NewReplacer("@STS@", r.aws.sts.URL, "@IAM@", r.aws.iam.URL).Replace(catalog))
	r.start()
	return r
}

func (r *rig) state() string { return filepath.Join(r.dir, "state") }
func (r *rig) store() string { return filepath.Join(r.state(), "mayfly.db") }

func (r *rig) setCatalog(text string) {
	r.t.Helper()
	r.catalogNow = text
	if err := os.WriteFile(filepath.Join(r.state(), "catalog.yaml"), []byte(text), 0o600); err != nil {
		r.t.Fatal(err)
	}
}

// start starts the broker and returns when it serves.
func (r *rig) start() {
	r.t.Helper()
	cmd := exec.Command(filepath.Join(r.bin, "mayflyd"), "dev", "--dir", r.state(), "--listen", r.listen, "--ops-listen", r.ops, "--people-listen", "", "-v")
	cmd.Stderr = r.log
	out, err := cmd.StdoutPipe()
	if err != nil {
		r.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		r.t.Fatal(err)
	}
	r.daemon = cmd
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		if strings.Contains(lines.Text(), "Ready.") {
			go func() { _, _ = io.Copy(io.Discard, out) }() // ends with the process
			return
		}
	}
	r.t.Fatal("the broker ended before it was ready")
}

// kill is kill -9.
func (r *rig) kill() {
	r.t.Helper()
	if err := r.daemon.Process.Kill(); err != nil {
		r.t.Fatal(err)
	}
	_ = r.daemon.Wait() // it says that it was killed
	r.daemon = nil
}

func (r *rig) stop() {
	if r.daemon == nil {
		return
	}
	err := errors.Join(r.daemon.Process.Signal(syscall.SIGTERM), r.daemon.Wait())
	r.daemon = nil
	if err != nil {
		r.t.Errorf("stopping the broker: %v", err)
	}
}

func (r *rig) command(who string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(r.t.Context(), filepath.Join(r.bin, "mayfly"), args...)
	env := slices.DeleteFunc(os.Environ(), func(e string) bool {
		return strings.HasPrefix(e, "AWS_") || strings.HasPrefix(e, "MAYFLY_") || strings.HasPrefix(e, "XDG_")
	})
	cmd.Env = append(env, "MAYFLY_ADDR="+r.addr, "XDG_RUNTIME_DIR="+r.dir,
		"SPIFFE_ENDPOINT_SOCKET=unix://"+filepath.Join(r.state(), "sockets", strings.ReplaceAll(who, "/", "-")+".sock"))
	return cmd
}

// mayfly runs the command as somebody.
func (r *rig) mayfly(who string, args ...string) string {
	r.t.Helper()
	cmd := r.command(who, args...)
	var said strings.Builder
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil {
		r.t.Fatalf("%s: mayfly %s: %v\n%s", who, strings.Join(args, " "), err, said.String())
	}
	return string(out)
}

func (r *rig) read(into any, who string, args ...string) {
	r.t.Helper()
	out := r.mayfly(who, append(args, "--output", "json")...)
	if err := json.Unmarshal([]byte(out), into); err != nil {
		r.t.Fatalf("mayfly %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// keys are what an SDK gets of a lease.
type keys struct {
	AccessKeyID     string `json:"AccessKeyId"`
	SecretAccessKey string
	SessionToken    string
	Expiration      time.Time

	lease string
}

// give asks for credentials as an SDK does, and looks at them as AWS does.
func (r *rig) give(who, tool, ttl string, more ...string) keys {
	r.t.Helper()
	args := append([]string{"aws", "credentials", tool, "--ttl", ttl}, more...)
	var k keys
	if err := json.Unmarshal([]byte(r.mayfly(who, args...)), &k); err != nil {
		r.t.Fatal("what credentials prints is no JSON")
	}
	s := r.aws.Session(k.AccessKeyID)
	if s == nil || s.Secret != k.SecretAccessKey || s.Token != k.SessionToken {
		r.t.Fatalf("%s was given keys that AWS does not know", who)
	}
	r.secrets = append(r.secrets, k.SecretAccessKey, k.SessionToken)
	k.lease = s.Name
	return k
}

// many asks for several leases at once, two at a time.
func (r *rig) many(n int, who, tool, ttl string, more ...string) []keys {
	r.t.Helper()
	all := make([]keys, n)
	for i := range all {
		all[i] = r.give(who, tool, ttl, append(more, "--no-cache")...)
	}
	return all
}

var acme = []string{"--param", "customer=acme"}

const (
	acmeObject = "arn:aws:s3:::acme-crm/acme/2026.csv"
	queue      = "arn:aws:sqs:eu-central-1:123456789012:crm"
)

// reads reports whether the keys read what crm.export is for.
func (r *rig) reads(k keys) bool { return r.aws.May(k.AccessKeyID, "s3:GetObject", acmeObject) }

type leaseView struct {
	ID, State, Progress, Cause, Left string
	Overdue                          bool
}

func (r *rig) lease(who, id string) (l leaseView) {
	r.t.Helper()
	r.read(&l, who, "leases", id)
	return l
}

type event struct {
	Type, Actor, LeaseID, Cause, Reason string
	Time                                time.Time
	Details                             map[string]string
}

func (r *rig) evidence(filter ...string) []event {
	r.t.Helper()
	var all struct{ Events []event }
	r.read(&all, "operator/sam", append([]string{"audit", "list", "--tail", "1000"}, filter...)...)
	return all.Events
}

// life is what the evidence tells of one lease, in a line.
func (r *rig) life(id string) string {
	r.t.Helper()
	var words []string
	for _, e := range r.evidence("--lease", id) {
		word := strings.TrimPrefix(e.Type, "lease.")
		if p := e.Details["progress"]; p != "" {
			word += ":" + p
		}
		words = append(words, word)
	}
	return strings.Join(words, " ")
}

// until waits for a condition.
func (r *rig) until(what string, limit time.Duration, done func() bool) {
	r.t.Helper()
	for deadline := time.Now().Add(limit); !done(); time.Sleep(100 * time.Millisecond) {
		if time.Now().After(deadline) {
			r.t.Fatalf("not in %s: %s", limit, what)
		}
	}
}

// dead waits until leases are said to be revoked, and requires that none is said
// to be so while its keys work.
func (r *rig) dead(all ...keys) {
	r.t.Helper()
	for _, k := range all {
		r.until("lease "+k.lease+" is revoked", 60*time.Second, func() bool {
			l := r.lease("operator/sam", k.lease)
			switch {
			case l.State == "revoked" && r.aws.Works(k.AccessKeyID):
				r.t.Fatalf("lease %s is said to be revoked, and works", k.lease)
			case l.State != "revoked" && l.State != "revoking" && l.State != "active":
				r.t.Fatalf("lease %s is %+v", k.lease, l)
			case l.State == "revoked" && !strings.Contains(l.Left, "STS in eu-central-1"):
				r.t.Fatalf("lease %s does not say what is left: %+v", k.lease, l)
			}
			return l.State == "revoked"
		})
	}
}

// metrics is what Prometheus reads.
func (r *rig) metrics() string {
	r.t.Helper()
	res, err := http.Get("http://" + r.ops + "/metrics")
	if err != nil {
		r.t.Fatal(err)
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err != nil {
		r.t.Fatal(err)
	}
	return string(text)
}

// keepsSecrets looks for the secrets of leases in all that the broker wrote.
func (r *rig) keepsSecrets() {
	r.t.Helper()
	texts := map[string]string{"the evidence": fmt.Sprint(r.evidence())}
	for _, path := range []string{r.store(), filepath.Join(r.dir, "log")} {
		text, err := os.ReadFile(path)
		if err != nil {
			r.t.Fatal(err)
		}
		texts[filepath.Base(path)] = string(text)
	}
	for where, text := range texts {
		for _, secret := range r.secrets {
			if strings.Contains(text, secret) {
				r.t.Errorf("a secret is in %s", where)
			}
		}
	}
}
