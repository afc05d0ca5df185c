//go:build unix

package testbed

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// MinIO is a real MinIO with one drive: an STS that enforces session policies
// on S3. Those that start and stop it are called one at a time.
type MinIO struct {
	Addr     string // its URL, the same after a restart
	User     string // root's access key
	Password string // and secret key
	Dir      string
	LogFile  string

	binary  string
	listen  string
	release func() error
	process *process
}

// StartMinIO starts a MinIO. binary is the server; empty: bin/testbed/minio, in
// the working folder or one above it. The caller closes it.
func StartMinIO(ctx context.Context, binary string) (_ *MinIO, err error) {
	m := &MinIO{User: "mayfly-root"}
	if m.binary, err = findBinary("minio", binary); err != nil {
		return nil, err
	}
	if m.Dir, m.release, err = newPlace("minio"); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, m.Close())
		}
	}()
	var secret [16]byte
	_, _ = rand.Read(secret[:]) // never fails
	m.Password = hex.EncodeToString(secret[:])
	m.LogFile = filepath.Join(m.Dir, "minio.log")
	for try := 1; ; try++ {
		port, err := freePort()
		if err != nil {
			return nil, err
		}
		m.listen = loopback(port)
		m.Addr = "http://" + m.listen
		if err = m.Start(ctx); err == nil {
			return m, nil
		}
		if try == startTries || !strings.Contains(err.Error(), "in use") {
			return nil, err
		}
		_ = os.Remove(m.LogFile)
	}
}

// Start starts it, and waits until it answers. It is for one that was stopped.
func (m *MinIO) Start(ctx context.Context) error {
	cmd := exec.Command(m.binary, "server", "--quiet", "--address", m.listen, "--console-address", "127.0.0.1:0", filepath.Join(m.Dir, "data"))
	cmd.Env = append(os.Environ(), "MINIO_ROOT_USER="+m.User, "MINIO_ROOT_PASSWORD="+m.Password, "MINIO_BROWSER=off", "MINIO_UPDATE=off", "HOME="+m.Dir, "MINIO_CI_CD=on")
	p, err := spawn("minio", m.LogFile, cmd, syscall.SIGKILL)
	if err != nil {
		return err
	}
	m.process = p
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 2 * time.Second}
	return p.until(ctx, "waiting for MinIO", func(ctx context.Context) error {
		r, err := http.NewRequestWithContext(ctx, http.MethodGet, m.Addr+"/minio/health/cluster", nil)
		if err != nil {
			return err
		}
		answer, err := client.Do(r)
		if err != nil {
			return err
		}
		answer.Body.Close()
		if answer.StatusCode != http.StatusOK {
			return fmt.Errorf("it answers %s", answer.Status)
		}
		return nil
	})
}

// Stop stops it; Start starts it again with what it has stored.
func (m *MinIO) Stop(ctx context.Context) error { return m.process.stop(ctx, syscall.SIGTERM) }

// Close stops it and removes its folder.
func (m *MinIO) Close() error {
	var err error
	if m.process != nil {
		err = m.process.kill()
	}
	return errors.Join(err, m.release())
}

// TestMinIO is StartMinIO for a test: it fails the test on an error, and closes
// the server at its end.
func TestMinIO(t TB) *MinIO {
	t.Helper()
	m, err := StartMinIO(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { finish(t, m.LogFile, m.Close) })
	return m
}
