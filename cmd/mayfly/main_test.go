package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
	"unicode"

	"connectrpc.com/connect"
	"github.com/rogpeppe/go-internal/testscript"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/mayfly-security/mayfly/attestation/devtrust"
	"github.com/mayfly-security/mayfly/broker"
	mayflyv1 "github.com/mayfly-security/mayfly/broker/api/mayfly/v1"
	"github.com/mayfly-security/mayfly/broker/client/clienttest"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"mayfly": main, "child": child, "browser": browser, "fetch": fetch})
}

// rig is a broker's stand-in in a trust domain of its own.
type rig struct {
	*clienttest.Broker
	env []string // makes a process the agent; for the session, and for opening a browser, see the scripts

	people string // the address of the listener for people
	ca     string // the file with its authority
	token  string // of the last session that was made by the test
	typed  string // what a person types, on a terminal; empty: there is none
	done   chan error
	said   *spoken // by what runs in the background
}

func newRig() (r *rig, stop func(), err error) {
	var stops []func()
	stop = func() {
		for _, s := range slices.Backward(stops) {
			s()
		}
	}
	defer func() {
		if err != nil {
			stop()
		}
	}()
	dir, err := os.MkdirTemp("", "mf") // a socket's path must be short
	if err != nil {
		return nil, nil, err
	}
	stops = append(stops, func() { os.RemoveAll(dir) })
	td := spiffeid.RequireTrustDomainFromString("acme.test")
	trust, err := devtrust.New(devtrust.Config{TrustDomain: td, Dir: dir})
	if err != nil {
		return nil, nil, err
	}
	stops = append(stops, func() { trust.Close() })
	agent, err := trust.Add(devtrust.Identity{ID: spiffeid.RequireFromPath(td, "/agent/troubleshooter")})
	if err != nil {
		return nil, nil, err
	}
	server, err := trust.Add(devtrust.Identity{ID: spiffeid.RequireFromPath(td, "/mayfly"), DNSNames: []string{"localhost"}})
	if err != nil {
		return nil, nil, err
	}
	source, err := workloadapi.NewX509Source(context.Background(), workloadapi.WithClientOptions(workloadapi.WithAddr(server)))
	if err != nil {
		return nil, nil, err
	}
	stops = append(stops, func() { source.Close() })
	r = &rig{Broker: standIn()}
	addr, stopServer, err := r.Start(tlsconfig.MTLSServerConfig(source, source, tlsconfig.AuthorizeMemberOf(td)))
	if err != nil {
		return nil, nil, err
	}
	stops = append(stops, stopServer)
	pair, pem, err := selfMade()
	if err != nil {
		return nil, nil, err
	}
	r.ca = filepath.Join(dir, "ca.pem")
	if err := os.WriteFile(r.ca, pem, 0o600); err != nil {
		return nil, nil, err
	}
	peopleAddr, stopPeople, err := r.StartPeople(&tls.Config{Certificates: []tls.Certificate{pair}})
	if err != nil {
		return nil, nil, err
	}
	stops = append(stops, stopPeople)
	r.people = peopleAddr
	r.env = []string{"SPIFFE_ENDPOINT_SOCKET=" + agent, "MAYFLY_ADDR=" + addr,
		"GORACE=atexit_sleep_ms=0"} // a process with the race detector lingers for a second otherwise
	return r, stop, nil
}

func standIn() *clienttest.Broker {
	min, max := int64(1), int64(9)
	now := time.Now()
	return &clienttest.Broker{
		WhoAmI: &mayflyv1.WhoAmIResponse{
			Id: "spiffe://acme.test/agent/troubleshooter", Roles: []string{"agent"}, Owner: "sre@acme.test", Environment: "production",
			Labels: map[string]string{"team": "sre", "a": "b"}, SvidExpiresAt: timestamppb.New(now.Add(5*time.Minute + 30*time.Second)),
			BrokerId: "spiffe://acme.test/mayfly", InstallationId: "m0installation", CatalogDigest: "0123abcd",
		},
		Tools: []*mayflyv1.Tool{
			{
				Name: "crm.read", Description: "Read one customer's record", Provider: "sts", MaxTtl: durationpb.New(15 * time.Minute),
				Env: map[string]string{"CRM_TOKEN": "access_token", "CRM_USER": "user"}, Survives: "nothing but open connections",
				Parameters: []*mayflyv1.Parameter{
					{Name: "customer", Type: "string", Pattern: "^c-[0-9]+$", Description: "whose record"},
					{Name: "depth", Type: "integer", Min: &min, Max: &max, Optional: true},
				},
				GrantedUntil: timestamppb.New(now.Add(time.Hour + time.Minute)),
			},
			{Name: "payments.initiate", Provider: "sts", Description: "Pay", MaxTtl: durationpb.New(time.Minute), Sensitivity: "high", Approval: "finance", Requestable: true,
				Survives: "the payment", Refusal: "no_grant"},
			{Name: "raw.read", Provider: "sts", MaxTtl: durationpb.New(26 * time.Hour), Refusal: "no_grant"},
			{Name: "bad.env", Provider: "sts", MaxTtl: durationpb.New(time.Minute), Env: map[string]string{"LD_PRELOAD": "user"}},
		},
		Secret: map[string]string{"access_token": `it's $(secret)`, "user": "ada"},
	}
}

func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Setup: func(env *testscript.Env) error {
			r, stop, err := newRig()
			if err != nil {
				return err
			}
			env.Defer(stop)
			env.Values["rig"] = r
			env.Vars = append(env.Vars, r.env...)
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"run": runCommand, "code": codeCommand, "calls": callsCommand, "minted": mintedCommand, "allrevoked": allRevokedCommand,
			"refuse": refuseCommand, "seed": seedCommand, "clean": cleanCommand, "mode": modeCommand, "firstword": firstWordCommand,
			"person": personCommand, "workload": workloadCommand, "signedin": signedInCommand, "type": typeCommand, "decide": decideCommand,
			"aws": awsCommand, "awsjson": awsJSONCommand, "asked": askedCommand, "signin": signInCommand, "people": peopleCommand, "ends": endsCommand, "stepup": stepUpCommand, "preview": previewCommand, "cutoff": cutOffCommand, "background": backgroundCommand, "foreground": foregroundCommand,
		},
	})
}

func rigOf(ts *testscript.TestScript) *rig { return ts.Value("rig").(*rig) }

// run N ARGS...: mayfly, in this process, exits with N. It is for verbs that
// have to do neither with files nor with processes, and far quicker than exec.
func runCommand(ts *testscript.TestScript, _ bool, args []string) {
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	p := programOf(ts, args[1:])
	p.stdout, p.stderr = ts.Stdout(), ts.Stderr()
	if got := p.run(context.Background()); got != want {
		ts.Fatalf("exit code %d; %d was expected", got, want)
	}
}

// programOf is mayfly in this process, in the script's environment.
func programOf(ts *testscript.TestScript, args []string) *program {
	var environ []string
	for _, name := range []string{"SPIFFE_ENDPOINT_SOCKET", "MAYFLY_ADDR", "MAYFLY_BROKER_ID", "MAYFLY_PEOPLE_ADDR", "MAYFLY_PEOPLE_CA",
		"MAYFLY_TOKEN", "XDG_CONFIG_HOME", "HOME", "BROWSER", "PATH"} {
		environ = append(environ, name+"="+ts.Getenv(name))
	}
	r := rigOf(ts)
	typed := r.typed
	r.typed = ""
	return &program{args: args, environ: environ, stdin: strings.NewReader(typed), terminal: func() bool { return typed != "" }, now: time.Now}
}

// code N COMMAND...: the command exits with N.
func codeCommand(ts *testscript.TestScript, _ bool, args []string) {
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	err = ts.Exec(args[1], args[2:]...)
	got := 0
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		got = exit.ExitCode()
	} else {
		ts.Check(err)
	}
	if got != want {
		ts.Fatalf("exit code %d; %d was expected\n%s%s", got, want, ts.ReadFile("stdout"), ts.ReadFile("stderr"))
	}
}

// calls PROCEDURE N: the procedure was called N times.
func callsCommand(ts *testscript.TestScript, _ bool, args []string) {
	if n := rigOf(ts).Calls(args[0]); strconv.Itoa(n) != args[1] {
		ts.Fatalf("%s was called %d times", args[0], n)
	}
}

// minted N [M]: so many leases were made, or N to M.
func mintedCommand(ts *testscript.TestScript, _ bool, args []string) {
	least, err := strconv.Atoi(args[0])
	ts.Check(err)
	most, err := strconv.Atoi(args[len(args)-1])
	ts.Check(err)
	if n := rigOf(ts).Minted(); n < least || n > most {
		ts.Fatalf("%d leases were made", n)
	}
}

// allrevoked: no lease is alive.
func allRevokedCommand(ts *testscript.TestScript, neg bool, _ []string) {
	r := rigOf(ts)
	r.Lock()
	defer r.Unlock()
	alive := 0
	for _, l := range r.Leases {
		if l.GetState() != string(broker.LeaseRevoked) {
			alive++
		}
	}
	if (alive > 0) != neg {
		ts.Fatalf("%d leases are alive", alive)
	}
}

// refuse PROCEDURE CODE REASON: from now on; without arguments: no more.
func refuseCommand(ts *testscript.TestScript, _ bool, args []string) {
	r := rigOf(ts)
	r.Lock()
	defer r.Unlock()
	if r.Refuse = nil; len(args) == 0 {
		return
	}
	var code connect.Code
	ts.Check(code.UnmarshalText([]byte(args[1])))
	r.Refuse = func(procedure string, _ int) error {
		if procedure != args[0] {
			return nil
		}
		return clienttest.Refusal(code, broker.Reason(args[2]), "the message", "the next step")
	}
}

// hostile holds everything that must not reach a terminal: a colour, a cleared
// screen, a title, line ends, a tab, a right-to-left override, zero-width and
// tag characters, a line separator, a C1 control, and what is not UTF-8.
const hostile = "\x1b[31mred\x1b[2J\x1b]0;t\a\r\n\t\u202eevil\u200b\U000e0041\u2028\u009b"

// seed: fills the stand-in with things of every state, all texts hostile.
func seedCommand(ts *testscript.TestScript, _ bool, args []string) {
	r := rigOf(ts)
	r.Lock()
	defer r.Unlock()
	text := "plain"
	if len(args) > 0 && args[0] == "hostile" {
		text = "plain" + hostile
	}
	now := time.Now()
	at := func(d time.Duration) *timestamppb.Timestamp { return timestamppb.New(now.Add(d)) }
	agent := "spiffe://acme.test/agent/troubleshooter"
	lease := func(id, state, cause string, end time.Duration) *mayflyv1.Lease {
		return &mayflyv1.Lease{
			Id: "l0" + id + strings.Repeat("0", 24-len(id)), Agent: agent, Tool: "crm.read", Provider: text, Parameters: map[string]string{"customer": text},
			GrantId: "g0grant", IncidentId: text, Reason: text, CorrelationId: text, State: state, Cause: cause,
			CreatedAt: at(-time.Hour), End: at(end), Survives: text, OnBehalfOf: "person:" + text,
		}
	}
	active := lease("active", "active", "", 4*time.Minute+30*time.Second)
	revoked := lease("revoked", "revoked", text, -time.Hour)
	revoked.EndedAt = at(-2*time.Minute - time.Second)
	overdue := lease("overdue", "revoking", "ttl", -3*time.Minute-time.Second)
	overdue.Overdue, overdue.Progress = true, text
	r.Leases = []*mayflyv1.Lease{active, revoked, overdue}
	grant := &mayflyv1.Grant{
		Id: "g0" + strings.Repeat("0", 24), Agent: agent, Tool: "crm.read", Parameters: map[string]string{"customer": text}, NotBefore: at(-time.Hour),
		NotAfter: at(26*time.Hour + time.Minute), MaxUses: 3, Uses: 1, IncidentId: text, Reason: text, CreatedBy: agent, CreatedAt: at(-time.Hour),
		State: "open", Suspended: true, RequestId: text, OnBehalfOf: "person:" + text, Rule: text, Voters: []string{"person:" + text}, BreakGlass: true, PolicyDigest: text,
	}
	r.Grants = []*mayflyv1.Grant{grant}
	r.Incidents = []*mayflyv1.Incident{{
		Id: "i0" + strings.Repeat("0", 24), Title: text, Reference: text, OpenedBy: agent, OpenedAt: at(-time.Minute), EndsAt: at(time.Hour + 30*time.Second),
		Grants: []*mayflyv1.Grant{grant}, State: "open", ClosedBy: text, LeasesOpen: 2,
	}}
	r.Requests = []*mayflyv1.Request{{
		Id: "r0" + strings.Repeat("0", 24), Agent: agent, Tool: "crm.read", Parameters: map[string]string{"customer": text, text: text},
		Duration: durationpb.New(time.Hour), MaxUses: 3, Reason: text, Ticket: text, IncidentId: text, OnBehalfOf: "person:" + text, CreatedBy: "person:" + text,
		CreatedAt: at(-time.Minute - time.Second), ExpiresAt: at(29*time.Minute + 30*time.Second), State: "pending", Rule: text, BreakGlass: true,
		Digest: strings.Repeat("d", 64), Missing: []string{"1 of " + text}, ToolDescription: text, Sensitivity: text, AgentOwner: text, Survives: text, Votable: true, Why: text,
		Approvals: []*mayflyv1.Approval{{Person: "person:" + text, Approved: true, At: at(-time.Second), Comment: text, Duration: durationpb.New(time.Minute), Acr: text}},
	}}
	r.Explained = &mayflyv1.ExplainResponse{
		Summary: text, Policies: []string{text}, Errors: []string{text}, WouldAllow: []string{text}, PolicyDigest: text, Grants: []string{text},
	}
	r.Previewed = &mayflyv1.PreviewResponse{
		Digest: text, PresentDigest: text, Added: []string{text}, Removed: []string{text}, Changed: []string{text}, Grants: 4, Decisions: 9,
		Ends:  []*mayflyv1.PreviewGrant{{GrantId: "g0grant", Agent: agent, Tool: text, Leases: 2, Why: text}},
		Turns: []*mayflyv1.PreviewDecision{{At: at(0), Principal: text, Action: text, About: text, WasAllowed: true, Why: text}},
	}
	r.Strays = []*mayflyv1.Stray{
		{Provider: "vault-main", Name: "mf_a", Kind: text, LeaseId: "l0stray" + strings.Repeat("0", 19), DiesAt: at(time.Hour + 30*time.Second), FoundAt: at(-2*time.Minute - time.Second), Why: "lease_unknown"},
		{Provider: "vault-main", Name: "mf_b", Kind: "stubborn", FoundAt: at(0), Why: "lease_unknown", EndedBy: "spiffe://acme.test/operator/sam", Reason: text},
	}
	if text != "plain" {
		r.Strays = append(r.Strays, &mayflyv1.Stray{Provider: text, Name: text, Kind: text, LeaseId: text, FoundAt: at(0), Why: text, EndedBy: text, Reason: text})
	}
	r.Events = []*mayflyv1.Event{{
		Sequence: 7, Time: at(0), Type: text, Actor: text, Agent: text, Tool: text, Provider: text, LeaseId: text, Reason: text, Cause: text,
		CorrelationId: text, Details: map[string]string{text: text}, RequestId: text, OnBehalfOf: text,
	}}
	for _, tool := range r.Tools {
		tool.Description = text
		tool.Survives = text
		tool.Provider = text
		tool.Approval, tool.BreakGlass, tool.Requestable, tool.Sensitivity = text, text, true, text
		tool.Labels = map[string]string{text: text}
		for _, p := range tool.Parameters {
			p.Description = text
		}
	}
	r.WhoAmI.Owner, r.WhoAmI.Environment, r.WhoAmI.Labels, r.WhoAmI.InstallationId = text, text, map[string]string{text: text}, text
	r.WhoAmI.PolicyDigest = text
	r.Refuse = nil
	if len(args) > 1 && args[1] == "refusing" {
		r.Refuse = func(string, int) error {
			return clienttest.Refusal(connect.CodePermissionDenied, broker.Reason(text), text, text)
		}
	}
}

// clean STREAM [tab]: nothing in it changes how a terminal shows what is around
// it. With "tab", one tab a line is the shell's own, between word and description.
func cleanCommand(ts *testscript.TestScript, _ bool, args []string) {
	text := ts.ReadFile(args[0])
	if len(args) > 1 {
		var lines []string
		for line := range strings.Lines(text) {
			lines = append(lines, strings.Replace(line, "\t", " ", 1))
		}
		text = strings.Join(lines, "")
	}
	if !strings.Contains(text, "plain") {
		ts.Fatalf("%s holds nothing of what others wrote", args[0])
	}
	for i, r := range text {
		if r != '\n' && (unicode.In(r, unicode.Cc, unicode.Cf, unicode.Zl, unicode.Zp, unicode.Co, unicode.Cs)) {
			ts.Fatalf("%s has %U at byte %d:\n%q", args[0], r, i, text)
		}
	}
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, "evil") {
			ts.Fatalf("a line end of another's begins a line: %q", line)
		}
	}
}

// mode FILE MODE: the file has the mode.
func modeCommand(ts *testscript.TestScript, _ bool, args []string) {
	info, err := os.Lstat(ts.MkAbs(args[0]))
	ts.Check(err)
	if got := fmt.Sprintf("%04o", info.Mode().Perm()); got != args[1] {
		ts.Fatalf("%s has mode %s", args[0], got)
	}
}

// firstword PREFIX VAR: sets VAR to the first word of standard output with the prefix.
func firstWordCommand(ts *testscript.TestScript, _ bool, args []string) {
	for _, word := range strings.FieldsFunc(ts.ReadFile("stdout"), func(r rune) bool { return !unicode.IsLetter(r) && !unicode.IsDigit(r) }) {
		if strings.HasPrefix(word, args[0]) && len(word) == 26 {
			ts.Setenv(args[1], word)
			return
		}
	}
	ts.Fatalf("there is no word that begins with %q", args[0])
}

// The golden help is what people see; `go test ./cmd/mayfly -update` renews it.
func TestHelp(t *testing.T) {
	p := &program{}
	var all strings.Builder
	root := p.root()
	golden(t, "testdata/help.golden", func() string {
		for _, args := range append([][]string{nil, {"exit-codes"}, {"environment"}, {"aws"}, {"grant"}, {"request"}, {"incident"}, {"policy"}}, verbs(root)...) {
			var out strings.Builder
			one := &program{args: append([]string{"help"}, args...), stdout: &out, stderr: &out, now: time.Now}
			if code := one.run(t.Context()); code != 0 {
				t.Errorf("help %s exits with %d", args, code)
			}
			fmt.Fprintf(&all, "-- mayfly help %s --\n%s\n", strings.Join(args, " "), out.String())
		}
		return all.String()
	}())
}

func TestReferenceIsFresh(t *testing.T) {
	golden(t, filepath.Join("..", "..", "docs", "reference", "cli.md"), reference((&program{}).root()))
}
