package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/mayfly-security/mayfly/broker"
	mayflyv1 "github.com/mayfly-security/mayfly/broker/api/mayfly/v1"
	"github.com/mayfly-security/mayfly/broker/client/clienttest"
)

// selfMade is a certificate for loopback that is its own authority.
func selfMade() (pair tls.Certificate, authority []byte, err error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return pair, nil, err
	}
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: now.Add(-time.Minute), NotAfter: now.Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return pair, nil, err
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), nil
}

// browser URL: goes there as a browser does.
func browser() {
	ca, err := os.ReadFile(os.Getenv("MAYFLY_PEOPLE_CA"))
	if err != nil {
		panic(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca)
	c := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}}, Timeout: 10 * time.Second}
	res, err := c.Get(os.Args[len(os.Args)-1])
	if err != nil {
		panic(err)
	}
	defer res.Body.Close()
	if _, err := io.Copy(io.Discard, res.Body); err != nil {
		panic(err)
	}
}

// person: from now on the script comes as a person, who has a browser.
func personCommand(ts *testscript.TestScript, _ bool, _ []string) {
	r := rigOf(ts)
	ts.Setenv("SPIFFE_ENDPOINT_SOCKET", "")
	ts.Setenv("MAYFLY_PEOPLE_ADDR", r.people)
	ts.Setenv("MAYFLY_PEOPLE_CA", r.ca)
	ts.Setenv("XDG_CONFIG_HOME", ts.MkAbs("config"))
	ts.Setenv("BROWSER", "browser")
}

// workload: as the agent again.
func workloadCommand(ts *testscript.TestScript, _ bool, _ []string) {
	ts.Setenv("MAYFLY_PEOPLE_ADDR", "")
	ts.Setenv("MAYFLY_TOKEN", "")
	for _, v := range rigOf(ts).env {
		name, value, _ := strings.Cut(v, "=")
		ts.Setenv(name, value)
	}
}

// signedin: the person has a session, as a token in the environment.
func signedInCommand(ts *testscript.TestScript, _ bool, _ []string) {
	personCommand(ts, false, nil)
	r := rigOf(ts)
	r.token = r.NewSession()
	ts.Setenv("MAYFLY_TOKEN", r.token)
}

// type TEXT: the next run has a terminal, on which a person types it.
func typeCommand(ts *testscript.TestScript, _ bool, args []string) {
	rigOf(ts).typed = strings.Join(args, " ") + "\n"
}

// decide STATE BY WHY: what waits is decided.
func decideCommand(ts *testscript.TestScript, _ bool, args []string) {
	rigOf(ts).Decide(broker.RequestState(args[0]), args[1], strings.Join(args[2:], " "))
}

// asked PROCEDURE FIELD VALUE: the last call of it had the field, as in the API's JSON.
func askedCommand(ts *testscript.TestScript, _ bool, args []string) {
	m, ok := rigOf(ts).Asked(args[0]).(proto.Message)
	if !ok {
		ts.Fatalf("%s was not called", args[0])
	}
	doc, err := protojson.Marshal(m)
	ts.Check(err)
	var fields map[string]any
	ts.Check(json.Unmarshal(doc, &fields))
	if got := fmt.Sprint(fields[args[1]]); got != args[2] {
		ts.Fatalf("%s was called with %s", args[0], doc)
	}
}

// signin N NAME VALUE: the Nth sign-in by browser asked for it.
func signInCommand(ts *testscript.TestScript, _ bool, args []string) {
	n, err := strconv.Atoi(args[0])
	ts.Check(err)
	all := rigOf(ts).SignIns()
	if len(all) < n {
		ts.Fatalf("there were %d sign-ins", len(all))
	}
	if got := all[n-1].Get(args[1]); got != args[2] {
		ts.Fatalf("sign-in %d asked for %s=%q", n, args[1], got)
	}
}

// people KEY VALUE: how people sign in from now on: name, deny, pending or over.
func peopleCommand(ts *testscript.TestScript, _ bool, args []string) {
	r := rigOf(ts)
	if args[0] == "over" {
		r.EndSessions()
		return
	}
	r.Lock()
	defer r.Unlock()
	switch args[0] {
	case "name":
		r.People.Name = args[1]
	case "deny":
		r.People.Deny = args[1]
	case "sample":
		r.People.Sample = true
	case "pending":
		n, err := strconv.Atoi(args[1])
		ts.Check(err)
		r.People.Pending = n
	default:
		ts.Fatalf("people %s", args[0])
	}
}

// stepup MAXAGE ACR...: the next yes needs a fresh sign-in; later ones do not.
func stepUpCommand(ts *testscript.TestScript, _ bool, args []string) {
	age, err := time.ParseDuration(args[0])
	ts.Check(err)
	r := rigOf(ts)
	r.Lock()
	defer r.Unlock()
	asked := false
	r.Refuse = func(procedure string, _ int) error {
		if procedure != "ApproveRequest" || asked {
			return nil
		}
		asked = true
		return clienttest.NeedsStepUp(age, args[1:]...)
	}
}

// ends ALIVE... [done]: what the kill switch tells.
func endsCommand(ts *testscript.TestScript, _ bool, args []string) {
	r := rigOf(ts)
	r.Lock()
	defer r.Unlock()
	var alive []int32
	for _, a := range args {
		if a != "done" {
			n, err := strconv.Atoi(a)
			ts.Check(err)
			alive = append(alive, int32(n))
		}
	}
	r.Ends = endsOf(alive...)
	r.Ends[len(alive)-1].Done = args[len(args)-1] == "done"
}

// cutoff [hostile] [failing]: a role that can be cut off, and that takes one step
// further each time that it is listed.
func cutOffCommand(ts *testscript.TestScript, _ bool, args []string) {
	r := rigOf(ts)
	r.Lock()
	defer r.Unlock()
	text := "plain"
	if slices.Contains(args, "hostile") {
		text += hostile
	}
	now := time.Now()
	r.CutOffs = []*mayflyv1.RoleCutOff{{
		Provider: "sts", Role: "arn:crm", MadeBefore: timestamppb.New(now), ClearAt: timestamppb.New(now.Add(time.Minute)), Until: timestamppb.New(now.Add(12*time.Hour + time.Minute)),
		Leases: 3, Alive: 2, ByAgent: map[string]int32{"spiffe://acme.test/agent/" + text: 2}, ByTool: map[string]int32{"crm.read": 2}, Others: "every session, " + text,
		Failing: slices.Contains(args, "failing"), DecidedBy: "person:" + text, Reason: text, DecidedAt: timestamppb.New(now.Add(-2*time.Minute - time.Second)),
	}}
}

// endsOf is what the kill switch tells: so many are alive, one after the other.
func endsOf(alive ...int32) (all []*mayflyv1.EndAccessProgress) {
	for i, n := range alive {
		m := &mayflyv1.EndAccessProgress{Grants: 2, Requests: 1, Leases: 3, Alive: n, Done: i == len(alive)-1}
		if i == 0 {
			m.ByAgent = map[string]int32{"spiffe://acme.test/agent/troubleshooter": 2, "spiffe://acme.test/agent/plain" + hostile: 1}
			m.ByTool = map[string]int32{"crm.read": 3}
			m.Survives = []string{"plain" + hostile}
		}
		all = append(all, m)
	}
	return all
}

// preview nothing|problems|possible: what the policies say from now on.
func previewCommand(ts *testscript.TestScript, _ bool, args []string) {
	r := rigOf(ts)
	r.Lock()
	defer r.Unlock()
	switch args[0] {
	case "nothing":
		r.Previewed = &mayflyv1.PreviewResponse{Digest: "d", PresentDigest: "d", Grants: 4, Decisions: 9}
	case "problems":
		r.Previewed = &mayflyv1.PreviewResponse{Problems: []string{"a.cedar:1:2: wrong"}}
	case "possible":
		r.Explained = &mayflyv1.ExplainResponse{Possible: true, Summary: "it would be granted", PolicyDigest: "d"}
	default:
		ts.Fatalf("preview %s", args[0])
	}
}

// spoken is what a command says, and can be read while it runs.
type spoken struct {
	mu sync.Mutex
	b  strings.Builder
}

func (s *spoken) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(b)
}

func (s *spoken) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// background N ARGS...: as run, while the script goes on, once it waits;
// foreground waits for its end.
func backgroundCommand(ts *testscript.TestScript, _ bool, args []string) {
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	p := programOf(ts, args[1:])
	out := new(spoken)
	p.stdout, p.stderr = out, out
	r := rigOf(ts)
	watched := r.Calls("WatchRequest")
	done := make(chan error, 1)
	r.done, r.said = done, out
	go func() {
		defer close(done)
		if got := p.run(context.Background()); got != want {
			done <- fmt.Errorf("exit code %d; %d was expected\n%s", got, want, out)
		}
	}()
	waits := func() bool {
		return strings.Contains(out.String(), "waits for approval") || slices.Contains(args, "json") && r.Calls("WatchRequest") > watched
	}
	for !waits() {
		select {
		case err := <-done:
			ts.Fatalf("it did not wait: %v\n%s", err, out)
		case <-time.After(time.Millisecond):
		}
	}
}

// foreground: waits for what runs in the background, and prints what it said.
func foregroundCommand(ts *testscript.TestScript, _ bool, _ []string) {
	r := rigOf(ts)
	for err := range r.done {
		ts.Check(err)
	}
	fmt.Fprint(ts.Stdout(), r.said.String())
}
