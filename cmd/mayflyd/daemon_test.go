package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/mayfly-security/mayfly/attestation/devtrust"
	"github.com/mayfly-security/mayfly/broker/api/mayfly/v1/mayflyv1connect"
	"github.com/mayfly-security/mayfly/broker/lease"
	"github.com/mayfly-security/mayfly/providers/providertest"
	"github.com/mayfly-security/mayfly/providers/token"
	"github.com/mayfly-security/mayfly/store"
)

// childEnv makes the test binary a daemon: a real process that a test can kill.
const childEnv = "MAYFLYD_TEST_CHILD"

func TestMain(m *testing.M) {
	if text := os.Getenv(childEnv); text != "" {
		if err := runChild(text); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// childSettings are what a child daemon is started with.
type childSettings struct {
	Store, Workload, Catalog string
	Socket                   string // no daemon: ask this control socket for a backup, and print it
}

// runChild is the daemon as mayflyd wires it, with the test-only provider and
// a store that kills the process at a chosen commit. It prints its address,
// and obeys lines on standard input.
func runChild(text string) error {
	var c childSettings
	if err := json.Unmarshal([]byte(text), &c); err != nil {
		return err
	}
	if c.Socket != "" {
		return printBackup(c.Socket)
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var bomb *bombStore
	all := drivers(nil)
	all["world"] = providertest.Driver{}
	d, err := start(ctx, settings{
		store: c.Store, listen: "127.0.0.1:0", workload: c.Workload, catalog: []string{c.Catalog},
		log: newLog(os.Stderr, slog.LevelError), drivers: all,
		wrapStore: func(s store.Store) store.Store { bomb = newBombStore(s); return bomb },
		tune: func(c *lease.Config) {
			c.RetryMin, c.RetryMax, c.EndWait = 50*time.Millisecond, 200*time.Millisecond, 2*time.Second
		},
	})
	if err != nil {
		return err
	}
	fmt.Println("listening", d.ln.Addr())
	go func() {
		lines := bufio.NewScanner(os.Stdin)
		for lines.Scan() {
			var n int
			var when string
			if _, err := fmt.Sscanf(lines.Text(), "arm %d %s", &n, &when); err != nil {
				continue
			}
			bomb.arm(n, when == "before")
			fmt.Println("armed")
		}
		cancel() // the test is gone
	}()
	return d.run(ctx, nil)
}

// bombStore kills its process, with SIGKILL, right before or right after the
// nth Update since it was armed.
type bombStore struct {
	store.Store
	mu     sync.Mutex
	in     int
	before bool
	lit    int        // commits under way that are to kill
	out    *sync.Cond // one of them failed, and does not
}

func newBombStore(s store.Store) *bombStore {
	b := &bombStore{Store: s}
	b.out = sync.NewCond(&b.mu)
	return b
}

// arm returns once no commit is under way that kills by what was armed before:
// whoever disarms then knows that the process goes on.
func (b *bombStore) arm(n int, before bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for b.lit > 0 {
		b.out.Wait()
	}
	b.in, b.before = n, before
}

func (b *bombStore) Update(ctx context.Context, fn func(store.Txn) error) error {
	wrote := false
	hit, before := false, false
	err := b.Store.Update(ctx, func(t store.Txn) error {
		if err := fn(&spyTxn{Txn: t, wrote: &wrote}); err != nil || !wrote || hit {
			return err
		}
		// Only what writes evidence or leases counts; marks of time do not.
		b.mu.Lock()
		hit, before = b.in == 1, b.before
		if b.in > 0 {
			b.in--
		}
		if hit {
			b.lit++
		}
		b.mu.Unlock()
		if hit && before {
			die()
		}
		return nil
	})
	if hit && err == nil {
		die()
	}
	if hit {
		b.mu.Lock()
		b.lit--
		b.out.Broadcast()
		b.mu.Unlock()
	}
	return err
}

func die() {
	_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
	select {} // it does not return from that
}

// spyTxn sees whether a transaction writes something that matters.
type spyTxn struct {
	store.Txn
	wrote *bool
}

func (s *spyTxn) Put(key string, value []byte) error {
	*s.wrote = *s.wrote || key != "meta|clock"
	return s.Txn.Put(key, value)
}

func (s *spyTxn) Delete(key string) error { *s.wrote = true; return s.Txn.Delete(key) }

func (s *spyTxn) Append(log string, value []byte) error {
	*s.wrote = true
	return s.Txn.Append(log, value)
}

// people are a trust domain with everybody that tests are.
type people struct {
	t       testing.TB
	trust   *devtrust.Server
	sockets map[string]string
}

var paths = []string{"/mayfly", "/agent/support", "/bot/pager", "/operator/sam", "/service/crm"}

func newPeople(t testing.TB) *people {
	t.Helper()
	dir, err := os.MkdirTemp("", "mf")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	td := spiffeid.RequireTrustDomainFromString("acme.test")
	trust, err := devtrust.New(devtrust.Config{TrustDomain: td, Dir: dir, SVIDTTL: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { trust.Close() })
	p := &people{t: t, trust: trust, sockets: map[string]string{}}
	for _, path := range paths {
		id := devtrust.Identity{ID: spiffeid.RequireFromPath(td, path)}
		if path == "/mayfly" {
			id.DNSNames = []string{"localhost"}
		}
		if p.sockets[path], err = trust.Add(id); err != nil {
			t.Fatal(err)
		}
	}
	return p
}

// httpClient is somebody's client, over mutual TLS, pinned to the broker.
func (p *people) httpClient(path string) *http.Client {
	p.t.Helper()
	source, err := workloadapi.NewX509Source(context.Background(),
		workloadapi.WithClientOptions(workloadapi.WithAddr(p.sockets[path])))
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { source.Close() })
	config := tlsconfig.MTLSClientConfig(source, source, tlsconfig.AuthorizeID(spiffeid.RequireFromString("spiffe://acme.test/mayfly")))
	transport := &http.Transport{TLSClientConfig: config, ForceAttemptHTTP2: true, TLSHandshakeTimeout: 10 * time.Second}
	p.t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: 30 * time.Second}
}

// callers are the API as the three who use it have it.
type callers struct {
	agent    mayflyv1connect.AccessServiceClient
	operator mayflyv1connect.AccessServiceClient
	grants   mayflyv1connect.GrantServiceClient
	bot      mayflyv1connect.IncidentServiceClient
	audit    mayflyv1connect.AuditServiceClient
}

func newCallers(base string, agent, operator, bot *http.Client) callers {
	return callers{
		agent:    mayflyv1connect.NewAccessServiceClient(agent, base),
		operator: mayflyv1connect.NewAccessServiceClient(operator, base),
		grants:   mayflyv1connect.NewGrantServiceClient(operator, base),
		bot:      mayflyv1connect.NewIncidentServiceClient(bot, base),
		audit:    mayflyv1connect.NewAuditServiceClient(operator, base),
	}
}

// child is a daemon in a process of its own.
type child struct {
	cmd   *exec.Cmd
	in    io.WriteCloser
	lines *bufio.Scanner
	addr  string
	gone  chan struct{} // closed when the process has ended
}

func startChild(t testing.TB, c childSettings) *child {
	t.Helper()
	text, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childEnv+"="+string(text))
	cmd.Stderr = os.Stderr
	ch := &child{cmd: cmd, gone: make(chan struct{})}
	if ch.in, err = cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ch.lines = bufio.NewScanner(out)
	addr, err := ch.answer("listening ")
	if err != nil {
		t.Fatal(err)
	}
	ch.addr = "https://" + addr
	go func() { _ = cmd.Wait(); close(ch.gone) }()
	return ch
}

// answer reads the next line, which must begin with prefix.
func (c *child) answer(prefix string) (string, error) {
	if !c.lines.Scan() {
		return "", errors.New("the daemon ended")
	}
	rest, ok := strings.CutPrefix(c.lines.Text(), prefix)
	if !ok {
		return "", fmt.Errorf("the daemon said %q; want %q", c.lines.Text(), prefix)
	}
	return rest, nil
}

func (c *child) arm(n int, when string) error {
	if _, err := fmt.Fprintf(c.in, "arm %d %s\n", n, when); err != nil {
		return err
	}
	_, err := c.answer("armed")
	return err
}

// kill ends the process with SIGKILL and waits for its end.
func (c *child) kill() {
	_ = c.cmd.Process.Kill() // one that is gone already is gone
	<-c.gone
}

func (c *child) alive() bool {
	select {
	case <-c.gone:
		return false
	default:
		return true
	}
}

// writeCatalog writes a catalog with a key directory, and returns its path.
func writeCatalog(t testing.TB, dir, text string) string {
	t.Helper()
	keys := filepath.Join(dir, "keys")
	if _, err := token.NewKey(keys, time.Now()); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "catalog.yaml")
	if err := os.WriteFile(file, []byte(strings.ReplaceAll(text, "@KEYS@", keys)), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}
