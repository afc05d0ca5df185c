package vault

import (
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"runtime"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/jackc/pgx/v5"
)

const postgresBin = "/usr/lib/postgresql/15/bin"

// process is a server that a test started, in a process group of its own.
type process struct {
	cmd  *exec.Cmd
	done chan struct{}
	out  bytes.Buffer
}

func start(name string, cmd *exec.Cmd) (*process, error) {
	p := &process{cmd: cmd, done: make(chan struct{})}
	cmd.Stdout, cmd.Stderr = &p.out, &p.out
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Setpgid = true
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	started := make(chan error)
	go func() {
		runtime.LockOSThread() // Pdeathsig is of the thread that started it
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			cmd.Wait()
			close(p.done)
		}
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("starting %s: %w", name, err)
	}
	return p, nil
}

func (p *process) signal(s os.Signal) { p.cmd.Process.Signal(s) }

func (p *process) stop(s os.Signal) {
	select {
	case <-p.done:
		return
	default:
	}
	p.signal(s)
	select {
	case <-p.done:
	case <-time.After(20 * time.Second):
		p.cmd.Process.Kill()
		<-p.done
	}
}

func freePort() int {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

func until(what string, ready func() error) error {
	var err error
	for deadline := time.Now().Add(40 * time.Second); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if err = ready(); err == nil {
			return nil
		}
	}
	return fmt.Errorf("%s is not ready: %w", what, err)
}

// postgres is a real PostgreSQL server.
type postgres struct {
	dir  string
	port int
	*process
}

// asPostgres runs a command as the user that PostgreSQL wants.
func asPostgres(cmd *exec.Cmd) *exec.Cmd {
	if os.Getuid() == 0 {
		u, err := user.Lookup("postgres")
		if err != nil {
			panic(err)
		}
		uid, _ := strconv.Atoi(u.Uid)
		gid, _ := strconv.Atoi(u.Gid)
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}}
	}
	cmd.Dir = "/"
	return cmd
}

func newPostgres() (*postgres, error) {
	dir, err := os.MkdirTemp("", "mayfly-pg-")
	if err != nil {
		return nil, err
	}
	if os.Getuid() == 0 {
		if out, err := exec.Command("chown", "postgres:", dir).CombinedOutput(); err != nil {
			return nil, fmt.Errorf("%s: %w", out, err)
		}
	}
	p := &postgres{dir: dir, port: freePort()}
	out, err := asPostgres(exec.Command(postgresBin+"/initdb", "-D", filepath.Join(dir, "data"), "-U", "postgres", "--auth-local=trust", "--auth-host=scram-sha-256", "-N", "--no-locale", "-E", "UTF8")).CombinedOutput()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", out, err)
	}
	return p, p.begin()
}

func (p *postgres) begin() error {
	var err error
	p.process, err = start("postgres", asPostgres(exec.Command(postgresBin+"/postgres", "-D", filepath.Join(p.dir, "data"), "-k", p.dir, "-p", strconv.Itoa(p.port),
		"-c", "listen_addresses=127.0.0.1", "-c", "fsync=off", "-c", "max_connections=200", "-c", "log_min_messages=fatal")))
	if err != nil {
		return err
	}
	return until("PostgreSQL", func() error {
		c, err := pgx.Connect(context.Background(), p.super("postgres"))
		if err != nil {
			return err
		}
		return c.Close(context.Background())
	})
}

func (p *postgres) end() {
	p.stop(syscall.SIGINT)
	os.RemoveAll(p.dir)
}

func (p *postgres) super(db string) string {
	return fmt.Sprintf("host=%s port=%d dbname=%s user=postgres", p.dir, p.port, db)
}

// vaultServer is a real Vault, unsealed.
type vaultServer struct {
	dir, key, root string
	port, cluster  int
	args           []string // such as --cert
	client         *api.Client
	*process
}

func testbedBinary(name string) string {
	_, file, _, _ := runtime.Caller(0)
	return filepath.Join(filepath.Dir(file), "../../bin/testbed", name)
}

func newVault(args ...string) (*vaultServer, error) {
	dir, err := os.MkdirTemp("", "mayfly-vault-")
	if err != nil {
		return nil, err
	}
	v := &vaultServer{dir: dir, port: freePort(), cluster: freePort(), args: args}
	if v.client, err = newAPI(endpoint{address: v.address()}, &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}); err != nil {
		return nil, err
	}
	if err := v.begin(); err != nil {
		return nil, err
	}
	err = until("Vault", func() error {
		keys, err := v.client.Sys().Init(&api.InitRequest{SecretShares: 1, SecretThreshold: 1})
		if err == nil {
			v.key, v.root = keys.Keys[0], keys.RootToken
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("%w: %s", err, &v.out)
	}
	v.client.SetToken(v.root)
	return v, v.unseal()
}

func (v *vaultServer) address() string {
	scheme := "http"
	if len(v.args) > 0 {
		scheme = "https"
	}
	return fmt.Sprintf("%s://127.0.0.1:%d", scheme, v.port)
}

func (v *vaultServer) begin() error {
	var err error
	v.process, err = start("vault", exec.Command(testbedBinary("vault"), append([]string{"--data", filepath.Join(v.dir, "data"),
		"--listen", fmt.Sprintf("127.0.0.1:%d", v.port), "--cluster", fmt.Sprintf("127.0.0.1:%d", v.cluster), "--log-level", "error"}, v.args...)...))
	return err
}

func (v *vaultServer) unseal() error {
	return until("Vault", func() error {
		if _, err := v.client.Sys().Unseal(v.key); err != nil {
			return err
		}
		_, err := v.client.Logical().Read("sys/mounts") // there is a leader
		return err
	})
}

func (v *vaultServer) end() {
	v.stop(syscall.SIGTERM)
	os.RemoveAll(v.dir)
}

// shared are the servers that tests use side by side. Tests that stop one have
// their own.
var shared struct {
	once sync.Once
	pg   *postgres
	v    *vaultServer
	err  error
}

func TestMain(m *testing.M) {
	code := m.Run()
	if shared.v != nil {
		shared.v.end()
	}
	if shared.pg != nil {
		shared.pg.end()
	}
	os.Exit(code)
}

func servers(t testing.TB) (*vaultServer, *postgres) {
	t.Helper()
	shared.once.Do(func() {
		if shared.pg, shared.err = newPostgres(); shared.err == nil {
			if shared.err = prepareDatabase(shared.pg); shared.err == nil {
				shared.v, shared.err = newVault()
			}
		}
	})
	if shared.err != nil {
		t.Fatal(shared.err)
	}
	return shared.v, shared.pg
}

// ownServers are for a test that stops or seals them.
func ownServers(t testing.TB) (*vaultServer, *postgres) {
	t.Helper()
	pg, err := newPostgres()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pg.end)
	if err := prepareDatabase(pg); err != nil {
		t.Fatal(err)
	}
	v, err := newVault()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(v.end)
	return v, pg
}
