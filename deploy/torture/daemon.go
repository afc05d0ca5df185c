//go:build unix

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"
)

// daemon is one life of the broker: a process of its own, from its start to
// the kill.
type daemon struct {
	cmd  *exec.Cmd
	up   chan struct{} // closed when it serves
	gone chan struct{} // closed when the process has ended

	mu        sync.Mutex
	exchanged int           // catalogs that it took over
	refused   int           // catalogs that it refused
	changed   chan struct{} // closed, and replaced, when one of those grows
	failpoint string        // where it killed itself; empty if it did not
	errors    map[string]int
}

// startDaemon starts the broker. log gets its whole log.
func startDaemon(bin, config string, env []string, log io.Writer) (*daemon, error) {
	d := &daemon{up: make(chan struct{}), gone: make(chan struct{}), changed: make(chan struct{}), errors: map[string]int{}}
	d.cmd = exec.Command(bin, "server", "--config", config)
	d.cmd.Env = append(os.Environ(), env...)
	stderr, err := d.cmd.StderrPipe()
	if err != nil {
		return nil, err
	}
	if err := d.cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting the broker: %w", err)
	}
	go func() {
		d.follow(stderr, log)
		_ = d.cmd.Wait() // it was killed; that is no news
		close(d.gone)
	}()
	return d, nil
}

// follow reads the broker's log and learns from it what no call tells.
func (d *daemon) follow(r io.Reader, log io.Writer) {
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		_, _ = log.Write(append(lines.Bytes(), '\n'))
		var line struct {
			Level, Msg, Name string
		}
		if json.Unmarshal(lines.Bytes(), &line) != nil {
			continue
		}
		d.mu.Lock()
		switch line.Msg {
		case "serving":
			close(d.up)
		case "failpoint":
			d.failpoint = line.Name
		case "the catalog was exchanged":
			if line.Level == "INFO" { // with WARN it was, but what it ends may still be delivered
				d.exchanged++
				close(d.changed)
				d.changed = make(chan struct{})
			}
		case "the catalog was not exchanged; the present one stays":
			d.refused++
			close(d.changed)
			d.changed = make(chan struct{})
		}
		if line.Level == "ERROR" || line.Level == "WARN" {
			d.errors[line.Msg]++
		}
		d.mu.Unlock()
	}
	_, _ = io.Copy(log, r)
}

var errGone = errors.New("the broker is gone")

// serving waits until the broker serves.
func (d *daemon) serving(ctx context.Context) error {
	select {
	case <-d.up:
		return nil
	case <-d.gone:
		select {
		case <-d.up: // it served, and died at once
			return nil
		default:
			return errGone
		}
	case <-ctx.Done():
		return fmt.Errorf("waiting for the broker to serve: %w", ctx.Err())
	}
}

// reload has the broker read its catalog again, and returns when it says that
// it did: true if it took it.
func (d *daemon) reload(ctx context.Context) (taken bool, err error) {
	d.mu.Lock()
	exchanged, refused, changed := d.exchanged, d.refused, d.changed
	d.mu.Unlock()
	if err := d.cmd.Process.Signal(syscall.SIGHUP); err != nil {
		return false, errGone
	}
	for {
		select {
		case <-changed:
		case <-d.gone:
			return false, errGone
		case <-ctx.Done():
			return false, ctx.Err()
		}
		d.mu.Lock()
		took, turned := d.exchanged > exchanged, d.refused > refused
		changed = d.changed
		d.mu.Unlock()
		if took || turned {
			return took, nil
		}
	}
}

// kill ends the broker with SIGKILL and waits until it is gone.
func (d *daemon) kill() {
	_ = d.cmd.Process.Kill()
	<-d.gone
}

// alive reports whether the process runs.
func (d *daemon) alive() bool {
	select {
	case <-d.gone:
		return false
	default:
		return true
	}
}

// atFailpoint is where it killed itself; empty if it did not.
func (d *daemon) atFailpoint() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.failpoint
}

// within waits for the process's end for at most so long.
func (d *daemon) within(t time.Duration) bool {
	select {
	case <-d.gone:
		return true
	case <-time.After(t):
		return false
	}
}
