package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/testscript"
	"pgregory.net/rapid"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/client"
)

// awsSecret is what a tool for AWS gives. Its keys are AWS's own examples.
var awsSecret = map[string]string{
	awsKeyID: "ASIAIOSFODNN7EXAMPLE", awsSecretKey: "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", awsSessionToken: "token+with/all=kinds", "expiration": "2026-01-01T00:00:00Z",
}

// aws [TTL]: from now on every tool is one for AWS, with leases of the TTL.
func awsCommand(ts *testscript.TestScript, _ bool, args []string) {
	r := rigOf(ts)
	r.Lock()
	defer r.Unlock()
	r.Secret = awsSecret
	if len(args) > 0 {
		ttl, err := time.ParseDuration(args[0])
		ts.Check(err)
		r.TTL = ttl
	}
}

// awsjson FILE PREFIX: the file is credentials with the prefix's names, whole,
// and one line.
func awsJSONCommand(ts *testscript.TestScript, _ bool, args []string) {
	text := ts.ReadFile(args[0])
	var got map[string]any
	ts.Check(json.Unmarshal([]byte(text), &got))
	end, err := time.Parse(time.RFC3339, fmt.Sprint(got["Expiration"]))
	ts.Check(err)
	if left := time.Until(end); left <= 0 || left > time.Hour {
		ts.Fatalf("it expires in %s", left)
	}
	delete(got, "Expiration")
	want := map[string]any{"AccessKeyId": awsSecret[awsKeyID], "SecretAccessKey": awsSecret[awsSecretKey]}
	if args[1] == "process" {
		want["Version"], want["SessionToken"] = 1.0, awsSecret[awsSessionToken]
	} else {
		want["Token"] = awsSecret[awsSessionToken]
	}
	if diff := cmp.Diff(want, got); diff != "" || strings.Count(text, "\n") != 1 {
		ts.Fatalf("%s%s", diff, text)
	}
}

// fetch is the command of a test that asks the endpoint as an SDK does: "fetch
// N" N times, and prints the last answer.
func fetch() {
	token := []byte(os.Getenv(envContainerToken))
	if path := os.Getenv(envContainerTokenFile); path != "" {
		var err error
		if token, err = os.ReadFile(path); err != nil || bytes.ContainsAny(token, "\r\n") {
			fmt.Println("token", err)
			os.Exit(1)
		}
	}
	var n int
	fmt.Sscan(os.Args[1], &n)
	for range n {
		r, _ := http.NewRequest(http.MethodGet, os.Getenv(envContainerURI), nil)
		r.Header.Set("Authorization", string(token))
		answer, err := http.DefaultClient.Do(r)
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		text, _ := io.ReadAll(answer.Body)
		answer.Body.Close()
		if n--; n == 0 || answer.StatusCode != http.StatusOK {
			os.Stdout.Write(text)
			if answer.StatusCode != http.StatusOK {
				os.Exit(1)
			}
			return
		}
	}
}

// fake makes leases for an agent.
type fakeLeases struct {
	mu    sync.Mutex
	asked int
	made  int
	given []broker.LeaseID // back
	ttl   time.Duration
	fail  error
	slow  time.Duration
	state map[broker.LeaseID]broker.LeaseState
	blind error // what the broker says when it is asked for a lease
	said  []string
}

func (f *fakeLeases) agent(t *testing.T) *awsAgent {
	a := &awsAgent{
		obtain: func(ctx context.Context) (*client.Credential, awsLease, error) {
			f.mu.Lock()
			defer f.mu.Unlock()
			f.asked++
			if f.slow > 0 {
				f.mu.Unlock()
				time.Sleep(f.slow)
				f.mu.Lock()
			}
			if f.fail != nil {
				return nil, awsLease{}, f.fail
			}
			f.made++
			id := broker.LeaseID(fmt.Sprintf("l%025d", f.made))
			now := time.Now()
			cred := &client.Credential{Lease: client.Lease{Lease: broker.Lease{ID: id, CreatedAt: now, End: now.Add(f.ttl), State: broker.LeaseActive}}, Secret: broker.NewSecret(awsSecret)}
			l, err := awsLeaseOf(cred, now)
			return cred, l, err
		},
		state: func(_ context.Context, id broker.LeaseID) (broker.LeaseState, error) {
			f.mu.Lock()
			defer f.mu.Unlock()
			if s, ok := f.state[id]; ok {
				return s, f.blind
			}
			return broker.LeaseActive, f.blind
		},
		giveUp: func(l client.Lease) { f.mu.Lock(); f.given = append(f.given, l.ID); f.mu.Unlock() },
		now:    time.Now,
		warn: func(format string, args ...any) {
			f.mu.Lock()
			f.said = append(f.said, fmt.Sprintf(format, args...))
			f.mu.Unlock()
		},
	}
	a.ctx, a.stop = context.WithCancel(t.Context())
	return a
}

func (f *fakeLeases) set(do func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	do()
}

func (f *fakeLeases) count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.made
}

// TestAWSAgentOneForMany: many who ask for an hour are given one lease at a time,
// each is alive, and none is made that nobody uses.
func TestAWSAgentOneForMany(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakeLeases{ttl: 10 * time.Minute, slow: 300 * time.Millisecond}
		a := f.agent(t)
		ctx, cancel := context.WithCancel(t.Context())
		var run sync.WaitGroup
		run.Go(func() { a.run(ctx) })
		var reads atomic.Int64
		var readers sync.WaitGroup
		for range 20 {
			readers.Go(func() {
				for began := time.Now(); time.Since(began) < time.Hour; time.Sleep(7 * time.Second) {
					l, err := a.get(t.Context())
					if err != nil || !l.alive(time.Now()) {
						t.Errorf("%v, %v", l.ID, err)
						return
					}
					reads.Add(1)
				}
			})
		}
		readers.Wait()
		if n := f.count(); n < 6 || n > 8 {
			t.Errorf("%d leases of ten minutes for %d reads in an hour", n, reads.Load())
		}
		// Nobody reads any more: the last lease is left to end.
		time.Sleep(11 * time.Minute)
		n := f.count()
		time.Sleep(time.Hour)
		if f.count() != n {
			t.Errorf("%d leases were made for nobody", f.count()-n)
		}
		// Who comes then gets a new one.
		if l, err := a.get(t.Context()); err != nil || !l.alive(time.Now()) || f.count() != n+1 {
			t.Errorf("%v, %v, %d leases", l.ID, err, f.count())
		}
		cancel()
		run.Wait()
		a.close()
		if len(f.given) != 1 {
			t.Errorf("given back: %s", f.given)
		}
		if _, err := a.get(t.Context()); err == nil {
			t.Error("it gives after its end")
		}
	})
}

// TestAWSAgentRefused: what a lease cannot be renewed for is told while it lives,
// and to those who ask afterwards; the broker is not asked with each question.
func TestAWSAgentRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakeLeases{ttl: time.Minute}
		a := f.agent(t)
		first, err := a.get(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		f.set(func() { f.fail = broker.Refusef(broker.ReasonNoGrant, "ask for one", "there is no grant") })
		for time.Now().Before(first.End) {
			if l, err := a.get(t.Context()); err != nil || l.ID != first.ID {
				t.Fatalf("%v, %v while the first lives", l.ID, err)
			}
			time.Sleep(50 * time.Millisecond)
		}
		f.set(func() {
			if len(f.said) == 0 || !strings.Contains(f.said[0], "there is no grant (no_grant)") {
				t.Errorf("said: %q", f.said)
			}
		})
		for range 100 {
			var refusal *broker.Error
			if _, err := a.get(t.Context()); !errors.As(err, &refusal) || statusForSDK(err) != http.StatusForbidden {
				t.Fatalf("%v", err)
			}
			time.Sleep(10 * time.Millisecond)
		}
		f.set(func() {
			if f.fail = nil; f.asked > 30 {
				t.Errorf("the broker was asked %d times in 20 s", f.asked)
			}
		})
		time.Sleep(2 * time.Second)
		if _, err := a.get(t.Context()); err != nil {
			t.Error(err)
		}
		a.close()
	})
}

// TestAWSAgentEndedEarly: a lease that was ended is not given any more, also where
// the broker does not tell us of it; a broker that is away ends none.
func TestAWSAgentEndedEarly(t *testing.T) {
	for name, test := range map[string]struct {
		state broker.LeaseState
		blind error
		over  bool
	}{
		"ended":        {broker.LeaseRevoking, nil, true},
		"disabled":     {"", broker.Refusef(broker.ReasonAgentDisabled, "", "the agent is disabled"), true},
		"not known":    {"", broker.Refusef(broker.ReasonNotFound, "", "there is no such lease"), true},
		"away":         {"", broker.Refusef(broker.ReasonShuttingDown, "", "it stops"), false},
		"unreachable":  {"", client.ErrUnreachable, false},
		"alive":        {broker.LeaseActive, nil, false},
		"out of order": {"", errors.New("x"), false},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := &fakeLeases{ttl: time.Hour, state: map[broker.LeaseID]broker.LeaseState{}}
				a := f.agent(t)
				ctx, cancel := context.WithCancel(t.Context())
				var run sync.WaitGroup
				run.Go(func() { a.run(ctx) })
				first, err := a.get(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				f.mu.Lock()
				f.state[first.ID], f.blind = test.state, test.blind
				f.fail = broker.Refusef(broker.ReasonIncidentClosed, "", "the incident is closed")
				f.mu.Unlock()
				time.Sleep(awsLook + time.Second)
				if l, err := a.get(t.Context()); (err != nil) != test.over {
					t.Errorf("%s is given: %v", l.ID, err)
				}
				cancel()
				run.Wait()
				a.close()
				if given := len(f.given) == 1; given == test.over {
					t.Errorf("given back: %v", f.given)
				}
			})
		})
	}
}

// TestAWSAgentIdle: with nothing to do it sleeps, also after the end of a lease that
// was used, and while a renewal takes its time.
func TestAWSAgentIdle(t *testing.T) {
	for name, then := range map[string]func(*fakeLeases){
		"refused": func(f *fakeLeases) { f.fail = broker.Refusef(broker.ReasonNoGrant, "", "there is no grant") },
		"slow":    func(f *fakeLeases) { f.slow = time.Hour },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := &fakeLeases{ttl: time.Minute}
				a := f.agent(t)
				var looks atomic.Int64
				a.now = func() time.Time { looks.Add(1); return time.Now() }
				if _, err := a.get(t.Context()); err != nil {
					t.Fatal(err)
				}
				f.set(func() { then(f) })
				ctx, cancel := context.WithCancel(t.Context())
				var run sync.WaitGroup
				run.Go(func() { a.run(ctx) })
				time.Sleep(10 * time.Minute)
				if n := looks.Load(); n > 1000 {
					t.Errorf("it looked at the clock %d times in ten minutes", n)
				}
				cancel()
				run.Wait()
				time.Sleep(time.Hour)
				a.close()
			})
		})
	}
}

// TestAWSAgentUnused: the lease that is made before anybody asks is not renewed
// for nobody.
func TestAWSAgentUnused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakeLeases{ttl: time.Minute}
		a := f.agent(t)
		if err := a.prime(t.Context()); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		var run sync.WaitGroup
		run.Go(func() { a.run(ctx) })
		time.Sleep(10 * time.Minute)
		if f.count() != 1 {
			t.Errorf("%d leases for nobody", f.count())
		}
		cancel()
		run.Wait()
		a.close()
		if len(f.given) != 0 {
			t.Errorf("given back after its end: %s", f.given)
		}
	})
}

// TestAWSAgentImpatient: who stops waiting ends no asking, and the next one gets
// what came of it.
func TestAWSAgentImpatient(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakeLeases{ttl: time.Hour, slow: 5 * time.Second}
		a := f.agent(t)
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second) // as botocore
		defer cancel()
		if _, err := a.get(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%v", err)
		}
		if _, err := a.get(t.Context()); err != nil || f.count() != 1 {
			t.Errorf("%v, %d leases", err, f.count())
		}
		// One that comes with its end behind it is no lease, and costs no storm of them.
		f.mu.Lock()
		f.slow, f.ttl = 0, -time.Second
		f.mu.Unlock()
		time.Sleep(time.Hour)
		for range 50 {
			if l, err := a.get(t.Context()); err == nil {
				t.Fatalf("%s", l.ID)
			}
		}
		if f.count() != 2 {
			t.Errorf("%d leases", f.count())
		}
		a.close()
	})
}

func testEndpoint(t *testing.T, f *fakeLeases) (*awsEndpoint, string) {
	p := &program{environ: []string{"XDG_RUNTIME_DIR=" + t.TempDir()}, stderr: io.Discard, now: time.Now}
	a := f.agent(t)
	e, err := p.openAWSEndpoint(a, "127.0.0.1:0")
	if err == nil {
		err = p.writeToken(e, "")
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		e.close()
		a.close()
		if _, err := os.Stat(e.file); err == nil {
			t.Error("the token's file is there after the end")
		}
	})
	token, err := os.ReadFile(e.file)
	if err != nil || len(token) < 40 || bytes.ContainsAny(token, "\r\n ") {
		t.Fatalf("the token has %d bytes: %v", len(token), err)
	}
	for path, want := range map[string]os.FileMode{e.file: 0o600, filepath.Dir(e.file): 0o700} {
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != want {
			t.Errorf("%s has mode %v (%v)", path, info.Mode(), err)
		}
	}
	return e, string(token)
}

// TestAWSEndpoint: only GET with the token at the place gets something, and what
// others get is an error as SDKs read it.
func TestAWSEndpoint(t *testing.T) {
	f := &fakeLeases{ttl: time.Hour}
	e, token := testEndpoint(t, f)
	for _, test := range []struct {
		what, method, path, auth, host string
		status                         int
	}{
		{"an SDK", "GET", "/credentials", token, "", 200},
		{"no token", "GET", "/credentials", "", "", 401},
		{"a wrong token", "GET", "/credentials", strings.Repeat("A", len(token)), "", 401},
		{"half a token", "GET", "/credentials", token[:len(token)/2], "", 401},
		{"a bearer's", "GET", "/credentials", "Bearer " + token, "", 401},
		{"another place without a token", "GET", "/", "", "", 401},
		{"another place", "GET", "/", token, "", 404},
		{"POST", "POST", "/credentials", token, "", 405},
		{"HEAD", "HEAD", "/credentials", token, "", 405},
		{"a name of somebody's", "GET", "/credentials", token, "evil.test", 403},
		{"localhost", "GET", "/credentials", token, "localhost:1", 200},
	} {
		r, err := http.NewRequestWithContext(t.Context(), test.method, "http://"+e.ln.Addr().String()+test.path, nil)
		if err != nil {
			t.Fatal(err)
		}
		if test.auth != "" {
			r.Header.Set("Authorization", test.auth)
		}
		r.Host = test.host
		answer, err := http.DefaultClient.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		text, _ := io.ReadAll(answer.Body)
		answer.Body.Close()
		if (test.status == 401) != answer.Close {
			t.Errorf("%s: the connection is closed: %v", test.what, answer.Close)
		}
		if answer.StatusCode != test.status || answer.Header.Get("Cache-Control") != "no-store" || answer.Header.Get("Content-Type") != "application/json" {
			t.Errorf("%s: %s %v", test.what, answer.Status, answer.Header)
		}
		has := bytes.Contains(text, []byte(awsSecret[awsSecretKey]))
		if has != (test.status == 200) {
			t.Errorf("%s: %s", test.what, text)
		}
		var told map[string]string
		if test.status != 200 && test.method != "HEAD" && (json.Unmarshal(text, &told) != nil || told["code"] == "" || told["Code"] != told["code"] || told["message"] == "" || told["Message"] != told["message"]) {
			t.Errorf("%s: %s", test.what, text)
		}
	}
	if f.count() != 1 {
		t.Errorf("%d leases", f.count())
	}
}

// TestAWSEndpointOnLoopback: it listens nowhere else.
func TestAWSEndpointOnLoopback(t *testing.T) {
	for _, address := range []string{"0.0.0.0:0", ":0", "[::]:0", "192.0.2.1:0", "example.com:0", "127.0.0.1", "0177.0.0.1:0", "127.0.0.1.evil.test:0", "127.0.0.1:99999", "127.0.0.1:", "127.0.0.1:http"} {
		if ln, err := listenLoopback(address); err == nil {
			ln.Close()
			t.Errorf("it listens at %s", address)
		} else if codeOf(err) != exitUsage {
			t.Errorf("%s: %v", address, err)
		}
	}
	for _, address := range []string{"127.0.0.1:0", "127.8.9.1:0", "localhost:0"} {
		ln, err := listenLoopback(address)
		if err != nil {
			t.Error(err)
			continue
		}
		ln.Close()
	}
}

func TestStatusForSDK(t *testing.T) {
	for status, err := range map[int]error{
		403: broker.Refusef(broker.ReasonNoGrant, "", "x"), 429: broker.Refusef(broker.ReasonRateLimited, "", "x"), 400: broker.Refusef(broker.ReasonTTL, "", "x"),
		503: broker.Refusef(broker.ReasonProvider, "", "x"), 500: errors.New("x"),
	} {
		if got := statusForSDK(err); got != status {
			t.Errorf("%v: %d", err, got)
		}
	}
	if got := statusForSDK(context.DeadlineExceeded); got != 500 && got != 503 {
		t.Errorf("%d", got)
	}
}

// TestAWSConcurrentProcesses: of many that start at once, one makes a lease, and
// all print it.
func TestAWSConcurrentProcesses(t *testing.T) {
	r, stop, err := newRig()
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	r.Lock()
	r.Secret = awsSecret
	r.Unlock()
	runtime := t.TempDir()
	outputs := make([]string, 8)
	var wg sync.WaitGroup
	for i := range outputs {
		wg.Go(func() {
			cmd := exec.Command("mayfly", "aws", "credentials", "crm.read", "--param", "customer=c-1")
			cmd.Env = append(append(os.Environ(), r.env...), "XDG_RUNTIME_DIR="+runtime)
			out, err := cmd.Output()
			if err != nil {
				t.Error(err)
			}
			outputs[i] = string(out)
		})
	}
	wg.Wait()
	for _, out := range outputs {
		if out != outputs[0] || out == "" {
			t.Errorf("%q and %q", out, outputs[0])
		}
	}
	if n := r.Minted(); n != 1 {
		t.Errorf("%d leases were made", n)
	}
}

// TestAWSProfileKeepsTheRest: whatever is in the file, one profile is put there,
// everything else stays byte for byte, and doing it again changes nothing.
func TestAWSProfileKeepsTheRest(t *testing.T) {
	piece := rapid.SampledFrom([]string{
		"[default]\nregion = us-east-1\n", "[profile other]\nrole_arn = arn:aws:iam::123456789012:role/x\nsource_profile = default\n", "\n", "# a word\n", "; another\n",
		"[sso-session mine]\nsso_region = x\n", "[services mine]\ns3 =\n  endpoint_url = http://127.0.0.1:9000\n", "s3 =\n  max_concurrent_requests = 20\n  region = nested\n",
		"[profile mine2]\r\nregion=x\r\n", "   \n", "[profile \"with space\"]\noutput = json\n", "[mine]\nregion = not-a-profile\n", "credential_process = other\n",
	})
	rapid.Check(t, func(t *rapid.T) {
		before := strings.Join(rapid.SliceOfN(piece, 0, 4).Draw(t, "before"), "")
		after := strings.Join(rapid.SliceOfN(piece, 0, 4).Draw(t, "after"), "")
		if rapid.Bool().Draw(t, "cut") {
			after = strings.TrimSuffix(after, "\n")
		}
		w := awsProfile{name: "mine", process: "/usr/bin/mayfly aws credentials s3.read", region: rapid.SampledFrom([]string{"", "eu-central-1"}).Draw(t, "region")}
		whole := before + after
		once, state := w.put([]byte(whole), false)
		if state != profileAbsent || !strings.HasPrefix(string(once), whole) || strings.Count(string(once), awsMark) != 1 {
			t.Fatalf("%d %q", state, once)
		}
		twice, state := w.put(once, false)
		if state != profileOurs || string(twice) != string(once) {
			t.Fatalf("%d\n%q\n%q", state, once, twice)
		}
		// Out again. A last line without an end has one now.
		if out, state := w.cut(once); state != profileOurs || strings.TrimRight(string(out), "\r\n") != strings.TrimRight(whole, "\r\n") || len(out) < len(whole) || len(out) > len(whole)+2 {
			t.Fatalf("%d\n%q\nwant\n%q", state, out, whole)
		}
		// In the middle of others' sections, and changed.
		if after != "" && !strings.HasPrefix(after, "[") { // it would be the section's own
			return
		}
		middle := before + w.section("\n") + after
		w.process = "/usr/bin/mayfly aws credentials s3.write"
		changed, state := w.put([]byte(middle), false)
		if want := before + w.section("\n") + after; state != profileOurs || string(changed) != want && string(changed) != want+"\n" {
			t.Fatalf("%d\n%q\nwant\n%q", state, changed, want)
		}
		foreign := before + "[profile mine]\naws_access_key_id = AKIA\nregion = r\n" + after
		if got, state := w.put([]byte(foreign), false); state != profileForeign || string(got) != foreign {
			t.Fatalf("%d %q", state, got)
		}
		if got, _ := w.put([]byte(foreign), true); string(got) != before+w.section("\n")+after {
			t.Fatalf("%q", got)
		}
	})
}

func TestAWSProfileOwn(t *testing.T) {
	w := awsProfile{name: "mine", process: "P2", region: ""}
	for _, test := range []struct{ name, before, after string }{
		{"additions stay", "[profile mine]\n" + awsMark + "\ncredential_process = P1\nregion = r1\noutput = json\ns3 =\n  region = nested\n\n# next\n[default]\n",
			"[profile mine]\n" + awsMark + "\ncredential_process = P2\nregion = r1\noutput = json\ns3 =\n  region = nested\n\n# next\n[default]\n"},
		{"a second one goes", "[profile mine]\n" + awsMark + "\ncredential_process = P1\ncredential_process = P0\n", "[profile mine]\n" + awsMark + "\ncredential_process = P2\n"},
		{"line ends", "[profile mine]\r\n" + awsMark + "\r\ncredential_process = P1\r\n[default]\r\n", "[profile mine]\r\n" + awsMark + "\r\ncredential_process = P2\r\n[default]\r\n"},
		{"only the mark", "[profile mine]\n" + awsMark + "\n\n[default]\n", "[profile mine]\n" + awsMark + "\ncredential_process = P2\n\n[default]\n"},
		{"no line end", "[profile mine]\n" + awsMark, "[profile mine]\n" + awsMark + "\ncredential_process = P2\n"},
		{"quoted", "[profile \"mine\"]\n" + awsMark + "\n", "[profile \"mine\"]\n" + awsMark + "\ncredential_process = P2\n"},
	} {
		if got, state := w.put([]byte(test.before), false); string(got) != test.after || state != profileOurs {
			t.Errorf("%s: %d\n%s", test.name, state, cmp.Diff(test.after, string(got)))
		}
	}
	for _, twice := range []string{"[profile mine]\n[profile mine]\n", "[profile mine]\n" + awsMark + "\n[default]\n[ profile  mine ]\n"} {
		if got, state := w.put([]byte(twice), true); string(got) != twice || state != profileTwice {
			t.Errorf("%d %q", state, got)
		}
	}
	w.name = "default"
	if got, _ := w.put(nil, false); !strings.HasPrefix(string(got), "[default]\n") {
		t.Errorf("%q", got)
	}
}

// TestProcessWord: a shell reads back what was written, and what would break the
// file's line is refused.
func TestProcessWord(t *testing.T) {
	for _, bad := range []string{"a\nb", "a\rb", "a # b", "a ; b", "a\x00b", "a\u202eb", "a\tb"} {
		if got, err := processWord(bad); err == nil {
			t.Errorf("%q is written as %q", bad, got)
		}
	}
	for _, word := range []string{"", "plain", "customer=c 17", "it's", `$(touch x)`, "a;b", "#x", `back\slash`, `"double"`, "*", "~", "ümlaut"} {
		quoted, err := processWord(word)
		if err != nil {
			t.Errorf("%q: %v", word, err)
			continue
		}
		out, err := exec.Command("sh", "-c", "printf %s "+quoted).Output()
		if err != nil || string(out) != word {
			t.Errorf("%q was read back as %q (%v)", word, out, err)
		}
	}
}

// TestOwnPath: a link by which we were called stays; what leads elsewhere is not us.
func TestOwnPath(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	link, other := filepath.Join(dir, "mayfly"), filepath.Join(dir, "other")
	if err := errors.Join(os.Symlink(self, link), os.WriteFile(other, []byte("#!/bin/sh\n"), 0o700)); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir)
	for called, want := range map[string]string{link: link, "mayfly": link, other: self, "nowhere": self, "": self} {
		if got, err := ownPath(called); err != nil || got != want {
			t.Errorf("called as %q: %q, %v", called, got, err)
		}
	}
}
