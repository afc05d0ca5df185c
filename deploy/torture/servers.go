package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"runtime"
	"strconv"
	"syscall"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/jackc/pgx/v5"
)

// process is a server in a process group of its own, which dies with us.
type process struct {
	cmd  *exec.Cmd
	done chan struct{}
}

func startProcess(cmd *exec.Cmd, log *os.File) (*process, error) {
	p := &process{cmd: cmd, done: make(chan struct{})}
	cmd.Stdout, cmd.Stderr = log, log
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
			_ = cmd.Wait()
			close(p.done)
		}
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("starting %s: %w", cmd.Path, err)
	}
	return p, nil
}

func (p *process) stop(s os.Signal) {
	_ = p.cmd.Process.Signal(s)
	select {
	case <-p.done:
	case <-time.After(20 * time.Second):
		_ = p.cmd.Process.Kill()
		<-p.done
	}
}

func until(ctx context.Context, what string, ready func() error) error {
	ctx, cancel := context.WithTimeout(ctx, 60*time.Second)
	defer cancel()
	for {
		err := ready()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s is not ready: %w", what, err)
		case <-time.After(20 * time.Millisecond):
		}
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

const postgresBin = "/usr/lib/postgresql/15/bin"

// postgres is a real PostgreSQL server.
type postgres struct {
	dir  string
	port int
	log  *os.File
	*process
}

// asPostgres runs a command as the user that PostgreSQL wants.
func asPostgres(cmd *exec.Cmd) (*exec.Cmd, error) {
	cmd.Dir = "/"
	if os.Getuid() != 0 {
		return cmd, nil
	}
	u, err := user.Lookup("postgres")
	if err != nil {
		return nil, err
	}
	uid, err1 := strconv.Atoi(u.Uid)
	gid, err2 := strconv.Atoi(u.Gid)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}}
	return cmd, errors.Join(err1, err2)
}

func newPostgres(ctx context.Context, log *os.File) (*postgres, error) {
	dir, err := os.MkdirTemp("", "mft-pg-")
	if err != nil {
		return nil, err
	}
	p := &postgres{dir: dir, port: freePort(), log: log}
	if os.Getuid() == 0 {
		if out, err := exec.CommandContext(ctx, "chown", "postgres:", dir).CombinedOutput(); err != nil {
			return p, fmt.Errorf("%s: %w", out, err)
		}
	}
	cmd, err := asPostgres(exec.CommandContext(ctx, postgresBin+"/initdb", "-D", filepath.Join(dir, "data"), "-U", "postgres",
		"--auth-local=trust", "--auth-host=scram-sha-256", "-N", "--no-locale", "-E", "UTF8"))
	if err != nil {
		return p, err
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		return p, fmt.Errorf("%s: %w", out, err)
	}
	return p, p.begin(ctx)
}

func (p *postgres) begin(ctx context.Context) error {
	cmd, err := asPostgres(exec.Command(postgresBin+"/postgres", "-D", filepath.Join(p.dir, "data"), "-k", p.dir, "-p", strconv.Itoa(p.port),
		"-c", "listen_addresses=127.0.0.1", "-c", "fsync=off", "-c", "max_connections=200", "-c", "log_min_messages=fatal"))
	if err != nil {
		return err
	}
	if p.process, err = startProcess(cmd, p.log); err != nil {
		return err
	}
	return until(ctx, "PostgreSQL", func() error {
		c, err := pgx.Connect(ctx, p.super("postgres"))
		if err != nil {
			return err
		}
		return c.Close(ctx)
	})
}

func (p *postgres) super(db string) string {
	return fmt.Sprintf("host=%s port=%d dbname=%s user=postgres", p.dir, p.port, db)
}

func (p *postgres) end() error {
	if p.process != nil {
		p.stop(syscall.SIGQUIT)
	}
	return os.RemoveAll(p.dir)
}

// vault is a real Vault.
type vault struct {
	dir, key, root string
	port, cluster  int
	bin            string
	log            *os.File
	client         *api.Client
	*process
}

func newVault(ctx context.Context, bin string, log *os.File) (*vault, error) {
	dir, err := os.MkdirTemp("", "mft-vault-")
	if err != nil {
		return nil, err
	}
	v := &vault{dir: dir, port: freePort(), cluster: freePort(), bin: bin, log: log}
	config := api.DefaultConfig()
	config.Address, config.MaxRetries, config.Timeout = v.addr(), 0, 15*time.Second
	if v.client, err = api.NewClient(config); err != nil {
		return v, err
	}
	v.client.SetMaxRetries(0)
	if err := v.begin(); err != nil {
		return v, err
	}
	err = until(ctx, "Vault", func() error {
		keys, err := v.client.Sys().InitWithContext(ctx, &api.InitRequest{SecretShares: 1, SecretThreshold: 1})
		if err == nil {
			v.key, v.root = keys.Keys[0], keys.RootToken
		}
		return err
	})
	if err != nil {
		return v, err
	}
	v.client.SetToken(v.root)
	return v, v.unseal(ctx)
}

func (v *vault) addr() string { return fmt.Sprintf("http://127.0.0.1:%d", v.port) }

func (v *vault) begin() (err error) {
	v.process, err = startProcess(exec.Command(v.bin, "--data", filepath.Join(v.dir, "data"), "--listen", fmt.Sprintf("127.0.0.1:%d", v.port),
		"--cluster", fmt.Sprintf("127.0.0.1:%d", v.cluster), "--log-level", "error"), v.log)
	return err
}

func (v *vault) unseal(ctx context.Context) error {
	return until(ctx, "Vault", func() error {
		if _, err := v.client.Sys().UnsealWithContext(ctx, v.key); err != nil {
			return err
		}
		_, err := v.client.Logical().ReadWithContext(ctx, "sys/mounts") // there is a leader
		return err
	})
}

func (v *vault) end() error {
	if v.process != nil {
		v.stop(syscall.SIGKILL)
	}
	return os.RemoveAll(v.dir)
}
