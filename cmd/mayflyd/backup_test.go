package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
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

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/mayfly-security/mayfly/broker"
	mayflyv1 "github.com/mayfly-security/mayfly/broker/api/mayfly/v1"
	"github.com/mayfly-security/mayfly/broker/api/mayfly/v1/mayflyv1connect"
	"github.com/mayfly-security/mayfly/broker/lease"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/providertest"
	"github.com/mayfly-security/mayfly/providers/token"
	"github.com/mayfly-security/mayfly/store"
	"github.com/mayfly-security/mayfly/store/bolt"
)

const backupCatalog = `
agents:
  - {id: "spiffe://acme.test/agent/support", owner: support, environment: production}
groups:
  - {name: sre, members: ["spiffe://acme.test/operator/sam"]}
operators: [{group: sre}]
providers:
  - {name: db, driver: world, config: {mode: planned}}
  - {name: token, driver: token, config: {issuer: "https://mayfly.acme.test", keys: "@KEYS@", introspectors: [{id: "spiffe://acme.test/service/crm", audiences: ["https://crm.acme.test"]}]}}
tools:
  - {name: db, provider: db, description: x, max_ttl: 10m}
  - {name: token, provider: token, description: x, max_ttl: 10m, scope: {audience: "https://crm.acme.test", scopes: [crm.read], verification: introspect}}
`

// backedUp is a daemon with a provider that can list, and everybody's clients.
type backedUp struct {
	t        *testing.T
	settings settings
	world    *providertest.System
	daemon   *daemon
	clients  [2]*http.Client // the agent's and the operator's
	agent    mayflyv1connect.AccessServiceClient
	grants   mayflyv1connect.GrantServiceClient
	audit    mayflyv1connect.AuditServiceClient
	operator mayflyv1connect.OperatorServiceClient
	said     strings.Builder
}

func newBackedUp(t *testing.T) *backedUp {
	t.Helper()
	people := newPeople(t)
	dir := t.TempDir()
	b := &backedUp{t: t, world: providertest.NewSystem(providertest.SystemConfig{}),
		clients: [2]*http.Client{people.httpClient("/agent/support"), people.httpClient("/operator/sam")}}
	b.settings = settings{
		store: filepath.Join(dir, "mayfly.db"), listen: "127.0.0.1:0", workload: people.sockets["/mayfly"],
		catalog: []string{writeCatalog(t, dir, backupCatalog)}, log: slog.New(slog.DiscardHandler),
		drivers: map[string]providers.Driver{"token": token.Driver{}, "world": providertest.Inventoried{Driver: providertest.Driver{System: b.world}}},
		tune:    func(c *lease.Config) { c.InventoryEvery = 50 * time.Millisecond },
	}
	b.start()
	t.Cleanup(b.stop)
	return b
}

func (b *backedUp) start() {
	b.t.Helper()
	d, err := start(b.t.Context(), b.settings)
	if err != nil {
		b.t.Fatal(err)
	}
	b.daemon = d
	base := "https://" + d.ln.Addr().String()
	b.agent = mayflyv1connect.NewAccessServiceClient(b.clients[0], base)
	b.grants = mayflyv1connect.NewGrantServiceClient(b.clients[1], base)
	b.audit = mayflyv1connect.NewAuditServiceClient(b.clients[1], base)
	b.operator = mayflyv1connect.NewOperatorServiceClient(b.clients[1], base)
}

func (b *backedUp) stop() {
	if err := b.daemon.close(context.Background()); err != nil {
		b.t.Error(err)
	}
}

func (b *backedUp) backup(out string) error {
	return backup{store: b.settings.store, out: out, say: &b.said, warn: io.Discard}.run(b.t.Context())
}

func (b *backedUp) grant(tool string) string {
	b.t.Helper()
	res, err := b.grants.CreateGrant(b.t.Context(), connect.NewRequest(&mayflyv1.CreateGrantRequest{
		Agent: "spiffe://acme.test/agent/support", Tool: tool, Duration: durationpb.New(time.Hour), Reason: "a test"}))
	if err != nil {
		b.t.Fatal(err)
	}
	return res.Msg.GetId()
}

func (b *backedUp) issue(tool string) (*mayflyv1.IssueLeaseResponse, error) {
	res, err := b.agent.IssueLease(b.t.Context(), connect.NewRequest(&mayflyv1.IssueLeaseRequest{Tool: tool}))
	if err != nil {
		return nil, err
	}
	return res.Msg, nil
}

func (b *backedUp) mustIssue(tool string) *mayflyv1.IssueLeaseResponse {
	b.t.Helper()
	res, err := b.issue(tool)
	if err != nil {
		b.t.Fatal(err)
	}
	return res
}

func (b *backedUp) events(kind string) []*mayflyv1.Event {
	b.t.Helper()
	res, err := b.audit.ListEvents(b.t.Context(), connect.NewRequest(&mayflyv1.ListEventsRequest{Type: kind, Latest: true}))
	if err != nil {
		b.t.Fatal(err)
	}
	return res.Msg.GetEvents()
}

func (b *backedUp) strays() []*mayflyv1.Stray {
	b.t.Helper()
	res, err := b.operator.ListStrays(b.t.Context(), connect.NewRequest(&mayflyv1.ListStraysRequest{}))
	if err != nil {
		b.t.Fatal(err)
	}
	return res.Msg.GetStrays()
}

func eventually(t *testing.T, what string, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !done(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal(what)
		}
	}
}

// TestBackupAndRestore copies the store of a broker that is busy, and puts the
// copy in place after more has happened: nothing comes back to life, and what
// the copy does not know is listed, and ended by a decision.
func TestBackupAndRestore(t *testing.T) {
	b := newBackedUp(t)
	withdrawn := b.grant("db")
	b.grant("token")
	before := b.mustIssue("db")

	// The broker goes on giving while it is copied.
	var given atomic.Int64
	stop := make(chan struct{})
	var busy sync.WaitGroup
	for range 4 {
		busy.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if _, err := b.issue("token"); err == nil {
					given.Add(1)
				}
			}
		})
	}
	eventually(t, "nothing is given", func() bool { return given.Load() > 20 })
	out := filepath.Join(t.TempDir(), "copy.db")
	if err := b.backup(out); err != nil {
		t.Fatal(err)
	}
	n := given.Load()
	eventually(t, "nothing is given after the backup", func() bool { return given.Load() > n })
	close(stop)
	busy.Wait()

	if info, err := os.Stat(out); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the backup: %v, %v", info, err)
	}
	if _, err := os.Stat(out + ".tmp"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("something was left: %v", err)
	}
	if info, err := os.Stat(controlPath(b.settings.store)); err != nil || info.Mode().Perm() != 0o600 || info.Mode().Type() != fs.ModeSocket {
		t.Errorf("the control socket: %v, %v", info.Mode(), err)
	}
	uid := fmt.Sprintf("uid:%d", os.Getuid())
	if events := b.events("store.backed_up"); len(events) != 1 || events[0].GetActor() != uid {
		t.Errorf("the evidence: %v", events)
	}
	if s := b.said.String(); !strings.Contains(s, out) || !strings.Contains(s, "put it in the place of "+b.settings.store) {
		t.Errorf("it said %q", s)
	}
	if err := b.backup(out); err == nil || !strings.Contains(err.Error(), "give another name") {
		t.Errorf("over a file that is there: %v", err)
	}
	if err := os.WriteFile(out+"2.tmp", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := b.backup(out + "2"); err == nil || !strings.Contains(err.Error(), "cut off") {
		t.Errorf("beside another that runs: %v", err)
	}

	// More happens, and the store is lost.
	if _, err := b.grants.WithdrawGrant(t.Context(), connect.NewRequest(&mayflyv1.WithdrawGrantRequest{Id: withdrawn})); err != nil {
		t.Fatal(err)
	}
	b.grant("db")
	after := b.mustIssue("db")
	b.stop()
	if _, err := os.Stat(controlPath(b.settings.store)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the control socket stays when the broker stops: %v", err)
	}
	if err := os.Rename(out, b.settings.store); err != nil {
		t.Fatal(err)
	}
	b.start()
	for _, tool := range []string{"db", "token"} {
		if _, err := b.issue(tool); err == nil || !strings.Contains(err.Error(), "no grant") {
			t.Errorf("%s after the restore: %v", tool, err)
		}
	}
	if events := b.events("store.restored"); len(events) != 1 || events[0].GetDetails()["made_by"] != uid || events[0].GetDetails()["made_at"] == "" {
		t.Errorf("the evidence of the restore: %v", events)
	}
	eventually(t, "what was given before the backup still works", func() bool { return !b.world.Works(before.GetSecret()["password"]) })
	eventually(t, "what was given after the backup is not listed", func() bool { return len(b.strays()) == 1 })
	s := b.strays()[0]
	if s.GetLeaseId() != after.GetLease().GetId() || s.GetWhy() != "lease_unknown" || !b.world.Works(after.GetSecret()["password"]) {
		t.Errorf("listed: %v; it works: %v", s, b.world.Works(after.GetSecret()["password"]))
	}
	res, err := b.operator.EndStray(t.Context(), connect.NewRequest(&mayflyv1.EndStrayRequest{Provider: s.GetProvider(), Name: s.GetName(), Reason: "a restore"}))
	if err != nil || !res.Msg.GetRemoved() || b.world.Works(after.GetSecret()["password"]) {
		t.Errorf("ending it: %v, %v", res, err)
	}
	if live := b.world.Live(); len(live) != 0 {
		t.Errorf("alive: %+v", live)
	}

	// What is given from now on stays, also over a restart.
	b.grant("db")
	fresh := b.mustIssue("db")
	b.stop()
	b.start()
	if !b.world.Works(fresh.GetSecret()["password"]) || len(b.events("store.restored")) != 1 {
		t.Error("a restart restored again")
	}
}

// TestBackupWithoutABroker reads the file as it lies there, and changes
// nothing; whatever goes wrong leaves nothing behind.
func TestBackupWithoutABroker(t *testing.T) {
	b := newBackedUp(t)
	b.grant("db")
	b.mustIssue("db")
	b.stop()
	before, err := os.ReadFile(b.settings.store)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()

	// What a crash leaves: a socket that nobody serves.
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: controlPath(b.settings.store)})
	if err != nil {
		t.Fatal(err)
	}
	ln.SetUnlinkOnClose(false)
	if err := ln.Close(); err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(dir, "copy.db")
	if err := b.backup(out); err != nil {
		t.Fatal(err)
	}
	if after, err := os.ReadFile(b.settings.store); err != nil || string(after) != string(before) {
		t.Errorf("the store was changed (%v)", err)
	}

	// Somebody has it open, and does not answer.
	db, err := bolt.Open(b.settings.store, bolt.Config{})
	if err != nil {
		t.Fatal(err)
	}
	failed := filepath.Join(dir, "failed.db")
	if err := b.backup(failed); !errors.Is(err, store.ErrInUse) {
		t.Errorf("a store in use: %v", err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := (backup{store: b.settings.store, out: failed, say: io.Discard, warn: io.Discard}).run(ctx); err == nil {
		t.Error("one that was interrupted succeeded")
	}
	// A key that stands where it does not belong is found by reading it all.
	rotten := bytes.Replace(slices.Clone(before), []byte("due|"), []byte("zue|"), -1)
	if bytes.Equal(rotten, before) {
		t.Fatal("nothing was damaged")
	}
	for name, content := range map[string][]byte{"rotten": rotten, "torn": before[:3*os.Getpagesize()], "none": []byte("no store at all"), "empty": nil} {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := (backup{store: path, out: failed, say: io.Discard, warn: io.Discard}).run(t.Context()); err == nil {
			t.Errorf("%s was backed up", name)
		}
	}
	if err := (backup{store: filepath.Join(dir, "nothing"), out: failed, say: io.Discard, warn: io.Discard}).run(t.Context()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a store that is not there: %v", err)
	}
	for _, path := range []string{failed, failed + ".tmp", filepath.Join(dir, "nothing")} {
		if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s was left: %v", path, err)
		}
	}

	// The broker starts over the socket that was left, on the copy too.
	b.start()
	b.stop()
	if err := os.Rename(out, b.settings.store); err != nil {
		t.Fatal(err)
	}
	b.start()
	if len(b.events("store.restored")) != 1 {
		t.Error("the copy was not restored")
	}
}

// broken is a broker whose store fails in the middle of a copy.
type broken struct{ noted error }

func (broken) Now() time.Time                           { return time.Now() }
func (b broken) BackedUp(context.Context, string) error { return b.noted }
func (broken) Recover(context.Context, broker.Principal, time.Duration, string, string) error {
	return errors.New("not used here")
}

// TestBackupThatIsCutOff is no backup.
func TestBackupThatIsCutOff(t *testing.T) {
	dir, err := os.MkdirTemp("", "mf")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, "mayfly.db")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		bytes int
		err   error
		want  string
	}{
		{0, errors.New("the disk is gone"), "the disk is gone"},
		{100_000, errors.New("the disk is gone"), "EOF"},
		{100_000, nil, "damaged"}, // it is whole, and no store
	} {
		c, err := openControl(path, broken{errors.New("full")}, func(w io.Writer) (int64, error) {
			if tt.bytes == 0 {
				return 0, tt.err
			}
			n, err := w.Write(make([]byte, tt.bytes))
			return int64(n), errors.Join(err, tt.err)
		}, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		var serving sync.WaitGroup
		serving.Go(func() { _ = c.serve() })
		out := filepath.Join(dir, "out")
		var warned strings.Builder
		err = backup{store: path, out: out, say: io.Discard, warn: &warned}.run(t.Context())
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%d bytes and %v: %v", tt.bytes, tt.err, err)
		}
		if tt.err == nil && !strings.Contains(warned.String(), "evidence") {
			t.Errorf("it warned %q", warned.String())
		}
		for _, path := range []string{out, out + ".tmp"} {
			if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("%s was left", path)
			}
		}
		if err := c.shutdown(t.Context()); err != nil {
			t.Error(err)
		}
		serving.Wait()
	}
	// What is no socket is not taken away.
	if err := os.WriteFile(controlPath(path), []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := openControl(path, broken{}, nil, slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), "no socket") {
		t.Errorf("over somebody's file: %v", err)
	}
}

// TestControlSocketIsForItsOwn: another user gets nothing from it, although
// the file's mode would let it in. It takes root to be another user.
func TestControlSocketIsForItsOwn(t *testing.T) {
	dir, err := os.MkdirTemp("", "mf")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, "mayfly.db")
	var copies atomic.Int64
	c, err := openControl(path, broken{}, func(w io.Writer) (int64, error) { copies.Add(1); _, err := io.WriteString(w, "all"); return 3, err }, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	serving.Go(func() { _ = c.serve() })
	defer serving.Wait()
	defer c.shutdown(context.Background())
	ask := fmt.Sprintf(`{"Socket": %q}`, controlPath(path))
	if out, err := askControl(t, ask, nil); err != nil || out != "all" {
		t.Fatalf("our own user: %q, %v", out, err)
	}
	if os.Geteuid() != 0 {
		t.Log("nobody else was tried: this is not root")
		return
	}
	for _, open := range []struct {
		path string
		mode os.FileMode
	}{{dir, 0o777}, {controlPath(path), 0o777}} {
		if err := os.Chmod(open.path, open.mode); err != nil {
			t.Fatal(err)
		}
	}
	if out, err := askControl(t, ask, &syscall.Credential{Uid: 65534, Gid: 65534}); err == nil || out != "" {
		t.Errorf("another user: %q, %v", out, err)
	}
	if n := copies.Load(); n != 1 {
		t.Errorf("%d copies were made", n)
	}
}

// askControl asks for a backup in a process of its own, as the user.
func askControl(t *testing.T, ask string, as *syscall.Credential) (string, error) {
	t.Helper()
	// The test binary may lie where another user cannot reach it.
	self, err := os.ReadFile(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "mf")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	binary := filepath.Join(dir, "ask")
	if err := os.WriteFile(binary, self, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(binary)
	cmd.Dir = dir
	cmd.Env = []string{childEnv + "=" + ask}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: as}
	out, err := cmd.Output()
	return string(out), err
}

// printBackup is what the process of askControl does.
func printBackup(socket string) error {
	conn, err := net.Dial("unix", socket)
	if err != nil {
		return err
	}
	defer conn.Close()
	_, err = backup{warn: os.Stderr}.fromBroker(context.Background(), conn, os.Stdout)
	return err
}
