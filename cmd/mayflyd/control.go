package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/net/netutil"

	"github.com/mayfly-security/mayfly/broker"
)

// The control socket is how other mayflyd commands talk to the broker that has
// the store open. It lies beside the store, is there for root and the broker's
// user alone, and goes with the broker. Who calls is asked of the kernel.

const (
	controlSuffix = ".control"
	// maxSocketPath is the longest path that a Unix socket can have everywhere.
	maxSocketPath = 103
	// takeTimeout bounds how long one piece of a backup may take to be taken.
	// Until it is taken the store's file grows instead of using space again.
	takeTimeout = 30 * time.Second
)

// The headers that go with a backup.
const (
	headerBackupTime  = "Mayfly-Backup-Time"     // when it was made, RFC 3339
	headerBackupBy    = "Mayfly-Backup-By"       // who had it made, as the evidence names it
	headerBackupNoted = "Mayfly-Backup-Evidence" // "no" if the broker could not record it
)

func controlPath(store string) string { return store + controlSuffix }

// controlled is what a control socket needs of a broker.
type controlled interface {
	Now() time.Time
	BackedUp(ctx context.Context, actor string) error
	Recover(ctx context.Context, p broker.Principal, d time.Duration, reason, who string) error
}

// control serves the control socket of one broker.
type control struct {
	http   *http.Server
	ln     net.Listener
	engine controlled
	copy   func(io.Writer) (int64, error)
	token  func(person string, forAgent bool) (string, error) // of a sample person's; nil but in dev; set before serve
	log    *slog.Logger
	one    chan struct{} // one backup at a time
}

// openControl takes the socket beside the store. Whoever has the store's lock
// calls it, so that a socket which is there is one that a crash left.
func openControl(store string, engine controlled, copy func(io.Writer) (int64, error), log *slog.Logger) (*control, error) {
	path := controlPath(store)
	if info, err := os.Lstat(path); err == nil && info.Mode().Type() != fs.ModeSocket {
		return nil, fmt.Errorf("opening the control socket: %s is there and is no socket: move it away", path)
	} else if err == nil {
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("opening the control socket: removing the one that a crash left: %w", err)
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("opening the control socket: %w", err)
	}
	ln, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("opening the control socket: %w", err)
	}
	// Until here its mode is that of the umask. Nobody gets in by that: each
	// connection is judged by who made it.
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("opening the control socket: %w", err), ln.Close())
	}
	c := &control{ln: netutil.LimitListener(&peerListener{ln, log}, 8), engine: engine, copy: copy, log: log, one: make(chan struct{}, 1)}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /v1/backup", c.backup)
	mux.HandleFunc("POST /v1/recover", c.recover)
	mux.HandleFunc("POST /v1/sample-token", c.sampleToken)
	c.http = &http.Server{
		Handler:           http.MaxBytesHandler(mux, 4<<10),
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       5 * time.Second,
		IdleTimeout:       10 * time.Second,
		MaxHeaderBytes:    8 << 10,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	return c, nil
}

func (c *control) serve() error {
	if err := c.http.Serve(c.ln); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// shutdown ends the socket. A backup under way may end, for as long as ctx lasts.
func (c *control) shutdown(ctx context.Context) error {
	if err := c.http.Shutdown(ctx); err != nil {
		return c.http.Close()
	}
	return nil
}

// backup streams a consistent copy of the store while the broker goes on.
func (c *control) backup(w http.ResponseWriter, r *http.Request) {
	actor := "uid:" + r.RemoteAddr // see peerConn
	select {
	case c.one <- struct{}{}:
		defer func() { <-c.one }()
	default:
		http.Error(w, "another backup is being made: wait for its end", http.StatusConflict)
		return
	}
	now := c.engine.Now()
	if err := c.engine.BackedUp(r.Context(), actor); err != nil {
		// A store that cannot be written is when a backup is needed most.
		c.log.Error("recording a backup; it goes on", "actor", actor, "error", err)
		w.Header().Set(headerBackupNoted, "no")
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	w.Header().Set(headerBackupTime, now.UTC().Format(time.RFC3339Nano))
	w.Header().Set(headerBackupBy, actor)
	out := &takenWriter{w: w, rc: http.NewResponseController(w)}
	n, err := c.copy(out)
	switch {
	case err == nil:
		c.log.Info("a backup was made", "actor", actor, "bytes", n)
	case n == 0 && !out.wrote:
		c.log.Error("making a backup", "actor", actor, "error", err)
		http.Error(w, "the store could not be read: "+err.Error(), http.StatusServiceUnavailable)
	default:
		c.log.Error("making a backup", "actor", actor, "bytes", n, "error", err)
		panic(http.ErrAbortHandler) // what was taken must not look whole
	}
}

// takenWriter gives each piece its own time to be taken.
type takenWriter struct {
	w     io.Writer
	rc    *http.ResponseController
	wrote bool
}

func (t *takenWriter) Write(b []byte) (int, error) {
	t.wrote = true
	if err := t.rc.SetWriteDeadline(time.Now().Add(takeTimeout)); err != nil {
		return 0, err
	}
	return t.w.Write(b)
}

// peerListener lets root and our own user in, and nobody else.
type peerListener struct {
	net.Listener
	log *slog.Logger
}

func (l *peerListener) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		uid, err := peerUID(conn)
		if err == nil && uid != 0 && uid != os.Geteuid() {
			err = fmt.Errorf("user %d may not use the control socket", uid)
		}
		if err == nil {
			return peerConn{conn, uid}, nil
		}
		l.log.Warn("refusing a connection to the control socket", "error", err)
		_ = conn.Close() // nothing was sent on it
	}
}

// peerConn is a connection whose address is the user at its other end.
type peerConn struct {
	net.Conn
	uid int
}

func (c peerConn) RemoteAddr() net.Addr { return uidAddr(c.uid) }

type uidAddr int

func (uidAddr) Network() string  { return "unix" }
func (a uidAddr) String() string { return fmt.Sprint(int(a)) }

// dialControl connects to the control socket of the broker that has the store
// open. The other end must be root's or the store's owner's: whoever else can
// make files beside the store could pass for the broker.
func dialControl(ctx context.Context, store string) (net.Conn, error) {
	path := controlPath(store)
	if len(path) > maxSocketPath {
		return nil, fs.ErrNotExist
	}
	info, err := os.Stat(store)
	if err != nil {
		return nil, err
	}
	conn, err := new(net.Dialer).DialContext(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	uid, err := peerUID(conn)
	if err == nil && uid != 0 && !ownedBy(info, uid) {
		err = fmt.Errorf("%s is served by user %d, who does not own the store", filepath.Base(path), uid)
	}
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return conn, nil
}
