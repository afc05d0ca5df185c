// Package acme_test tells the stories of the sample catalog's five cases, each a
// file of testdata/script, with the real mayflyd and the real mayfly.
package acme_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/mayfly-security/mayfly/deploy/examples/story"
)

// bin is where the programs are that TestMain builds.
const bin = "MAYFLY_TEST_BIN"

func TestMain(m *testing.M) {
	testscript.Main(builds{m}, map[string]func(){"browser": browser, "device": device})
}

// builds builds mayfly and mayflyd before the tests run.
type builds struct{ m *testing.M }

func (b builds) Run() int {
	dir, err := os.MkdirTemp("", "mayfly-bin-")
	if err == nil {
		defer os.RemoveAll(dir)
		cmd := exec.Command("go", "build", "-o", dir+"/", "github.com/mayfly-security/mayfly/cmd/mayfly", "github.com/mayfly-security/mayfly/cmd/mayflyd")
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		var said []byte
		if said, err = cmd.CombinedOutput(); err != nil {
			err = fmt.Errorf("%w\n%s", err, said)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "building the programs:", err)
		return 1
	}
	os.Setenv(bin, dir)
	return b.m.Run()
}

// commands are what stories are told with, besides testscript's own.
var commands = map[string]func(*testscript.TestScript, bool, []string){
	"as": asCommand, "keep": keepCommand, "accepts": acceptsCommand, "refuses": refusesCommand, "reload": reloadCommand,
}

// TestStories tells the five cases.
func TestStories(t *testing.T) {
	if err := story.LookAtSources("../../.."); err != nil {
		t.Fatal(err)
	}
	testscript.Run(t, testscript.Params{
		Dir:   "testdata/script",
		Setup: setUp,
		Cmds:  commands,
	})
}

// acme is the broker of one story.
type acme struct {
	dir          string // its state
	addr, people string // where workloads and people come in
	how          string // the button that signs people in, unless a story says otherwise
	cmd          *exec.Cmd
	log          string
	ended        chan error
}

// newAcme makes a place for a story's broker, and ports for it.
func newAcme(env *testscript.Env) (a *acme, ports []string, err error) {
	dir, err := os.MkdirTemp("", "mf") // a socket's path must be short
	if err != nil {
		return nil, nil, err
	}
	env.Defer(func() { os.RemoveAll(dir) })
	if ports, err = story.FreePorts(3); err != nil {
		return nil, nil, err
	}
	return &acme{
		dir: filepath.Join(dir, "state"), log: filepath.Join(dir, "log"),
		addr: "https://localhost:" + ports[0], people: "https://localhost:" + ports[1],
	}, ports, nil
}

// setUp starts mayflyd dev for one story, and stops it at its end.
func setUp(env *testscript.Env) error {
	a, ports, err := newAcme(env)
	if err != nil {
		return err
	}
	a.how = "password"
	return a.tell(env, "Ready.", "dev", "--dir", a.dir,
		"--listen", "127.0.0.1:"+ports[0], "--people-listen", "127.0.0.1:"+ports[1], "--idp-listen", "127.0.0.1:"+ports[2], "--ops-listen", "")
}

// tell starts the broker, which prints sign when it serves, and prepares a story
// that is told with it.
func (a *acme) tell(env *testscript.Env, sign string, args ...string) error {
	if err := a.start(sign, args...); err != nil {
		return err
	}
	env.Defer(func() {
		if err := a.stop(); err != nil {
			env.T().Fatal(err)
		}
	})
	env.Values["acme"] = a
	env.Setenv("PATH", os.Getenv(bin)+string(os.PathListSeparator)+env.Getenv("PATH"))
	env.Setenv("MAYFLY_ADDR", a.addr)
	env.Setenv("MAYFLY_PEOPLE_CA", filepath.Join(a.dir, "people-ca.pem"))
	env.Setenv("BROWSER", "browser")
	env.Setenv("STATE", a.dir)
	here, err := os.Getwd()
	if err != nil {
		return err
	}
	env.Setenv("ACME", here)
	return nil
}

// start starts the broker and returns when it serves.
func (a *acme) start(sign string, args ...string) error {
	out, err := os.Create(a.log)
	if err != nil {
		return err
	}
	defer out.Close() // the process has its own
	a.cmd = exec.Command(filepath.Join(os.Getenv(bin), "mayflyd"), args...)
	a.cmd.Stdout, a.cmd.Stderr = out, out
	if err := a.cmd.Start(); err != nil {
		return err
	}
	a.ended = make(chan error, 1)
	go func() { a.ended <- a.cmd.Wait() }()
	late := time.After(30 * time.Second)
	for {
		said, err := os.ReadFile(a.log)
		if err == nil && strings.Contains(string(said), sign) {
			return nil
		}
		select {
		case err := <-a.ended:
			return fmt.Errorf("mayflyd ended before it was ready: %w\n%s", err, said)
		case <-late:
			return errors.Join(fmt.Errorf("mayflyd was not ready in 30 s:\n%s", said), a.stop())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func (a *acme) stop() error {
	if err := a.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	return <-a.ended
}

func acmeOf(ts *testscript.TestScript) *acme { return ts.Value("acme").(*acme) }

// socket is the Workload API socket that makes a process the workload.
func (a *acme) socket(who string) string {
	return "unix://" + filepath.Join(a.dir, "sockets", strings.ReplaceAll(who, "/", "-")+".sock")
}

// as WHO: who types from now on. agent/support is a workload; lena is a person,
// on a machine of her own, with a browser that signs her in.
func asCommand(ts *testscript.TestScript, _ bool, args []string) {
	if len(args) != 1 {
		ts.Fatalf("usage: as agent/NAME | bot/NAME | operator/NAME | NAME")
	}
	a, who := acmeOf(ts), args[0]
	if strings.Contains(who, "/") {
		ts.Setenv("SPIFFE_ENDPOINT_SOCKET", a.socket(who))
		ts.Setenv("MAYFLY_PEOPLE_ADDR", "")
		return
	}
	home := ts.MkAbs("home/" + who)
	ts.Check(os.MkdirAll(home, 0o700))
	for name, value := range map[string]string{
		"SPIFFE_ENDPOINT_SOCKET": "", "MAYFLY_PEOPLE_ADDR": a.people, "HOME": home, "XDG_CONFIG_HOME": home,
		browserPerson: who + "@acme.test", browserHow: a.how, browserClass: "", browserAge: "",
	} {
		ts.Setenv(name, value)
	}
}

// reload: the broker reads the catalog again, and has taken or refused it.
func reloadCommand(ts *testscript.TestScript, _ bool, args []string) {
	if len(args) != 0 {
		ts.Fatalf("usage: reload")
	}
	a := acmeOf(ts)
	before := a.loads(ts)
	ts.Check(a.cmd.Process.Signal(syscall.SIGHUP))
	for deadline := time.Now().Add(20 * time.Second); a.loads(ts) == before; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			ts.Fatalf("the broker has not read its catalog again in 20 s")
		}
	}
}

// loads counts in the evidence how often a catalog was taken or refused.
func (a *acme) loads(ts *testscript.TestScript) int {
	n := 0
	for _, kind := range []string{"catalog.loaded", "catalog.refused"} {
		cmd := exec.Command(filepath.Join(os.Getenv(bin), "mayfly"), "audit", "list", "--type", kind, "-o", "json")
		cmd.Env = []string{"MAYFLY_ADDR=" + a.addr, "SPIFFE_ENDPOINT_SOCKET=" + a.socket("operator/olga")}
		out, err := cmd.Output()
		ts.Check(err)
		n += strings.Count(string(out), kind)
	}
	return n
}

// keep VAR PATTERN: sets VAR to what the pattern finds first in standard output.
func keepCommand(ts *testscript.TestScript, _ bool, args []string) {
	if len(args) != 2 {
		ts.Fatalf("usage: keep VAR PATTERN")
	}
	found := regexp.MustCompile(args[1]).FindStringSubmatch(ts.ReadFile("stdout"))
	if found == nil {
		ts.Fatalf("standard output has nothing like %s", args[1])
	}
	ts.Setenv(args[0], found[len(found)-1])
}

// accepts SERVICE FILE WORD...: the resource server accepts the token in the
// file, and reads each WORD in what Mayfly says of it.
func acceptsCommand(ts *testscript.TestScript, _ bool, args []string) {
	if len(args) < 2 {
		ts.Fatalf("usage: accepts SERVICE FILE WORD...")
	}
	said := introspect(ts, args[0], args[1])
	if !said.active {
		ts.Fatalf("%s refuses the token", args[0])
	}
	for _, word := range args[2:] {
		if !strings.Contains(said.text, word) {
			ts.Fatalf("Mayfly does not say %s of the token: %s", word, said.text)
		}
	}
}

// refuses SERVICE FILE: the resource server refuses the token in the file.
func refusesCommand(ts *testscript.TestScript, _ bool, args []string) {
	if len(args) != 2 {
		ts.Fatalf("usage: refuses SERVICE FILE")
	}
	if said := introspect(ts, args[0], args[1]); said.active {
		ts.Fatalf("%s accepts the token: %s", args[0], said.text)
	}
}

type introspection struct {
	active bool
	text   string
}

// introspect asks about a token as a resource server does (RFC 7662), with its
// own SVID: see deploy/examples/crm for a whole one.
func introspect(ts *testscript.TestScript, service, file string) introspection {
	a := acmeOf(ts)
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	source, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr(a.socket("service/"+service))))
	ts.Check(err)
	defer source.Close()
	id := spiffeid.RequireFromString("spiffe://acme.test/mayfly")
	transport := &http.Transport{TLSClientConfig: tlsconfig.MTLSClientConfig(source, source, tlsconfig.AuthorizeID(id))}
	defer transport.CloseIdleConnections()
	form := url.Values{"token": {strings.TrimSpace(ts.ReadFile(file))}}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, a.addr+"/oauth2/introspect", strings.NewReader(form.Encode()))
	ts.Check(err)
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	res, err := transport.RoundTrip(req)
	ts.Check(err)
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	ts.Check(err)
	if res.StatusCode != http.StatusOK {
		ts.Fatalf("asking about the token: %s: %s", res.Status, body)
	}
	var said struct {
		Active bool `json:"active"`
	}
	ts.Check(json.Unmarshal(body, &said))
	return introspection{said.Active, string(body)}
}
