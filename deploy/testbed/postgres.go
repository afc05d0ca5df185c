//go:build unix

package testbed

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"github.com/jackc/pgx/v5"
)

// PostgresConfig says how a PostgreSQL is started. The zero value is one as
// Debian would start it, with durable commits.
type PostgresConfig struct {
	// Dir has its data and log; it must exist, and the user postgres must be
	// able to enter it where we are root. Where it is empty, a temporary
	// folder is made, and removed by Close.
	Dir string
	// NoFsync loses commits when the machine (not the server) fails, and is
	// faster. For tests that measure nothing.
	NoFsync bool
	// Settings are further settings of the server, by name.
	Settings map[string]string
}

// Postgres is a real PostgreSQL server on a free port of loopback and a Unix
// socket. Logins other than postgres need a password (SCRAM). Its methods may
// be called from many goroutines, but those that start and stop it one at a
// time.
type Postgres struct {
	Host    string // 127.0.0.1
	Port    int    // the same after a restart, also in the socket's name
	Socket  string // the folder of the Unix socket, for host=
	Dir     string // its folder
	LogFile string
	Version int // the major version

	config  PostgresConfig
	bin     string
	as      *syscall.Credential
	release []func() error

	mu      sync.Mutex
	process *process
	paused  *pause
}

// StartPostgres makes a cluster and starts it. The caller closes it.
func StartPostgres(ctx context.Context, config PostgresConfig) (_ *Postgres, err error) {
	p := &Postgres{Host: "127.0.0.1", Dir: config.Dir, config: config}
	if p.bin, p.Version, err = findPostgres(); err != nil {
		return nil, err
	}
	if p.as, err = postgresUser(); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.Close())
		}
	}()
	place, release, err := newPlace("pg")
	if err != nil {
		return nil, err
	}
	p.release = append(p.release, release)
	p.Socket = place
	if err := p.give(place); err != nil {
		return nil, err
	}
	if p.Dir == "" {
		p.Dir = place
	} else if p.Dir, err = filepath.Abs(p.Dir); err != nil {
		return nil, err
	}
	p.LogFile = filepath.Join(p.Dir, "postgres.log")
	if err := p.makeCluster(ctx); err != nil {
		return nil, err
	}
	for try := 1; ; try++ {
		if p.Port, err = freePort(); err != nil {
			return nil, err
		}
		if err = p.Start(ctx); err == nil {
			return p, nil
		}
		if try == startTries || !strings.Contains(err.Error(), "Address already in use") {
			return nil, err
		}
		_ = os.Remove(p.LogFile)
	}
}

// give gives a folder to the user that the server runs as.
func (p *Postgres) give(dir string) error {
	if p.as == nil {
		return nil
	}
	return os.Chown(dir, int(p.as.Uid), int(p.as.Gid))
}

func (p *Postgres) data() string { return filepath.Join(p.Dir, "data") }

// access says who may connect how: the superuser over the socket, which only
// our user and the server's can reach, everybody else with a password.
const access = `local all postgres trust
local all all scram-sha-256
host all all 127.0.0.1/32 scram-sha-256
`

func (p *Postgres) makeCluster(ctx context.Context) error {
	if _, err := os.Stat(filepath.Join(p.data(), "PG_VERSION")); err == nil {
		return nil // Dir has one, of an earlier run
	}
	if err := os.MkdirAll(p.data(), 0o700); err != nil {
		return fmt.Errorf("making PostgreSQL's folder: %w", err)
	}
	if err := p.give(p.data()); err != nil {
		return fmt.Errorf("making PostgreSQL's folder: %w", err)
	}
	cmd := p.command("initdb", "-D", p.data(), "-U", "postgres", "--auth=trust", "--no-locale", "-E", "UTF8",
		"--no-sync", "--no-instructions")
	out, err := os.OpenFile(p.LogFile, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("making PostgreSQL's cluster: %w", err)
	}
	defer out.Close()
	cmd.Stdout, cmd.Stderr = out, out
	stop := context.AfterFunc(ctx, func() {
		if cmd.Process != nil {
			_ = cmd.Process.Kill()
		}
	})
	defer stop()
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("making PostgreSQL's cluster: %w: %s", err, tail(p.LogFile))
	}
	if err := os.WriteFile(filepath.Join(p.data(), "pg_hba.conf"), []byte(access), 0o600); err != nil { // the file is postgres' own already
		return fmt.Errorf("making PostgreSQL's cluster: %w", err)
	}
	return nil
}

// command is one of PostgreSQL's programs, run as its user and with an
// environment of our own: PGHOST and the like mean another server.
func (p *Postgres) command(name string, args ...string) *exec.Cmd {
	cmd := exec.Command(filepath.Join(p.bin, name), args...)
	cmd.Dir = "/"
	cmd.Env = []string{"PATH=" + p.bin + ":/usr/bin:/bin", "LC_ALL=C"}
	if p.as != nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: p.as}
	}
	return cmd
}

// Start starts it where it was, and returns when it serves.
func (p *Postgres) Start(ctx context.Context) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.process.running() {
		if err := p.spawn(); err != nil {
			return err
		}
	}
	return p.process.until(ctx, "starting PostgreSQL", func(ctx context.Context) error {
		c, err := p.Superuser(ctx)
		if err != nil {
			return err
		}
		return c.Close(ctx)
	})
}

func (p *Postgres) spawn() error {
	settings := map[string]string{
		"listen_addresses":           p.Host,
		"port":                       strconv.Itoa(p.Port),
		"unix_socket_directories":    p.Socket,
		"unix_socket_permissions":    "0700",
		"password_encryption":        "scram-sha-256",
		"max_connections":            "200",
		"dynamic_shared_memory_type": "mmap", // in the data folder, and not in /dev/shm, where a kill would leave it
		"log_min_messages":           "warning",
		"timezone":                   "UTC",
	}
	if p.config.NoFsync {
		settings["fsync"] = "off"
	}
	maps.Copy(settings, p.config.Settings)
	args := []string{"-D", p.data()}
	for _, name := range slices.Sorted(maps.Keys(settings)) {
		args = append(args, "-c", name+"="+settings[name])
	}
	// SIGQUIT has the server end its children and free its shared memory.
	proc, err := spawn("PostgreSQL", p.LogFile, p.command("postgres", args...), syscall.SIGQUIT)
	if err != nil {
		return err
	}
	p.process = proc
	return nil
}

// Superuser is a new connection to the database postgres as its superuser,
// over the socket. The caller closes it.
func (p *Postgres) Superuser(ctx context.Context) (*pgx.Conn, error) {
	return p.SuperuserIn(ctx, "postgres")
}

// SuperuserIn is Superuser for another database.
func (p *Postgres) SuperuserIn(ctx context.Context, db string) (*pgx.Conn, error) {
	c, err := pgx.Connect(ctx, p.SocketDSN(db, "postgres"))
	if err != nil {
		return nil, fmt.Errorf("connecting to %s as superuser: %w", db, err)
	}
	return c, nil
}

// Exec runs statements in a database as superuser.
func (p *Postgres) Exec(ctx context.Context, db, sql string) error {
	c, err := p.SuperuserIn(ctx, db)
	if err != nil {
		return err
	}
	defer c.Close(ctx)
	if _, err := c.Exec(ctx, sql); err != nil {
		return fmt.Errorf("executing in %s: %w", db, err)
	}
	return nil
}

// Roles are the names of the roles that match a LIKE pattern, sorted.
func (p *Postgres) Roles(ctx context.Context, like string) ([]string, error) {
	c, err := p.Superuser(ctx)
	if err != nil {
		return nil, err
	}
	defer c.Close(ctx)
	rows, err := c.Query(ctx, "SELECT rolname::text FROM pg_roles WHERE rolname LIKE $1 ORDER BY 1", like)
	if err != nil {
		return nil, fmt.Errorf("listing roles: %w", err)
	}
	names, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return nil, fmt.Errorf("listing roles: %w", err)
	}
	return names, nil
}

// DSN is how a login connects over TCP.
func (p *Postgres) DSN(db, user, password string) string {
	u := url.URL{
		Scheme: "postgres", User: url.UserPassword(user, password),
		Host: loopback(p.Port), Path: "/" + db, RawQuery: "sslmode=disable",
	}
	return u.String()
}

// SocketDSN is how a login connects over the Unix socket, without a password
// in it. Only our user reaches the socket.
func (p *Postgres) SocketDSN(db, user string) string {
	return fmt.Sprintf("host=%s port=%d dbname=%s user=%s sslmode=disable", p.Socket, p.Port, db, user)
}

// Stop ends it and its sessions (a fast shutdown), and returns when it has
// ended.
func (p *Postgres) Stop(ctx context.Context) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.resume(); err != nil {
		return err
	}
	return p.process.stop(ctx, syscall.SIGINT)
}

// Kill kills the server and each of its sessions with SIGKILL, and returns
// when they have ended.
func (p *Postgres) Kill() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.kill()
}

func (p *Postgres) kill() error {
	if !p.process.running() {
		return nil
	}
	err := p.freeze()
	for _, pid := range p.paused.pids[1:] { // the server last: it would see its children die
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
	err = errors.Join(err, p.process.kill())
	p.paused.over()
	for _, pid := range p.paused.pids[1:] {
		err = errors.Join(err, gone(pid))
	}
	p.paused = nil
	return err
}

// Restart starts it again, stopping it first where it runs.
func (p *Postgres) Restart(ctx context.Context) error {
	if err := p.Stop(ctx); err != nil {
		return err
	}
	return p.Start(ctx)
}

// Pause freezes the server and its sessions: connections stay open, and
// nothing answers. Linux only.
func (p *Postgres) Pause() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.process.running() {
		return errors.New("pausing PostgreSQL: it does not run")
	}
	if runtime.GOOS != "linux" {
		return errors.New("pausing PostgreSQL: its processes can be told on Linux only")
	}
	return p.freeze()
}

// Resume ends a Pause.
func (p *Postgres) Resume() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.resume()
}

// Running reports whether its process lives.
func (p *Postgres) Running() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.process.running()
}

// Close ends it and removes the folder that was made for it. It may be called
// again.
func (p *Postgres) Close() error {
	err := p.Kill()
	freeSharedMemory(p.data())
	for _, release := range p.release {
		err = errors.Join(err, release())
	}
	return err
}
