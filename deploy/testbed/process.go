//go:build unix

package testbed

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"time"
)

const (
	readyTime = 60 * time.Second      // for a server to answer, where the context has no nearer end
	stopTime  = 20 * time.Second      // for a server to end by itself, before it is killed
	pollPause = 10 * time.Millisecond // between two questions whether it is ready
	logTail   = 4 << 10               // bytes of its log in an error
)

// process is a running server: one generation of it between a start and the
// next.
type process struct {
	name string
	log  string // the file that its output is appended to
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended
}

// spawn starts cmd with its output appended to the file log. When the thread
// that started a child ends, Linux sends the child its parent-death signal,
// and Go ends threads as it likes; so one goroutine keeps its thread until
// the child has ended.
func spawn(name, log string, cmd *exec.Cmd, death syscall.Signal) (*process, error) {
	out, err := os.OpenFile(log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, fmt.Errorf("starting %s: %w", name, err)
	}
	defer out.Close()
	cmd.Stdout, cmd.Stderr = out, out
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Setpgid = true // a Ctrl-C at the terminal is ours to handle, not the server's
	endWithParent(cmd.SysProcAttr, death)

	p := &process{name: name, log: log, cmd: cmd, done: make(chan struct{})}
	started := make(chan error)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait() // how it ended is seen by whoever wanted it to live
			close(p.done)
		}
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("starting %s: %w", name, err)
	}
	return p, nil
}

func (p *process) pid() int { return p.cmd.Process.Pid }

func (p *process) running() bool {
	if p == nil {
		return false
	}
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// signal is for a process that may have ended meanwhile.
func (p *process) signal(s syscall.Signal) error {
	if !p.running() {
		return nil
	}
	if err := p.cmd.Process.Signal(s); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("sending %s to %s: %w", s, p.name, err)
	}
	return nil
}

// stop sends s and waits until the process has ended; it kills it when the
// context ends first, or after a while.
func (p *process) stop(ctx context.Context, s syscall.Signal) error {
	if err := p.signal(s); err != nil {
		return err
	}
	if !p.running() {
		return nil
	}
	late := time.NewTimer(stopTime)
	defer late.Stop()
	select {
	case <-p.done:
		return nil
	case <-ctx.Done():
	case <-late.C:
	}
	_ = p.kill()
	return fmt.Errorf("stopping %s: it did not end by itself and was killed: %s", p.name, p.tail())
}

func (p *process) kill() error {
	if err := p.signal(syscall.SIGKILL); err != nil {
		return err
	}
	if p != nil {
		<-p.done
	}
	return nil
}

// until asks ready again and again until it has no error, the process ends, or
// the time is over.
func (p *process) until(ctx context.Context, what string, ready func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, readyTime)
	defer cancel()
	tick := time.NewTicker(pollPause)
	defer tick.Stop()
	for {
		err := ready(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-p.done:
			return fmt.Errorf("%s: it ended: %s", what, p.tail())
		case <-ctx.Done():
			return fmt.Errorf("%s: %w (last seen: %w): %s", what, context.Cause(ctx), err, p.tail())
		case <-tick.C:
		}
	}
}

// tail is the end of the server's log, for errors.
func (p *process) tail() string { return tail(p.log) }

func tail(log string) string {
	f, err := os.Open(log)
	if err != nil {
		return "its log cannot be read: " + err.Error()
	}
	defer f.Close()
	if size, err := f.Seek(0, io.SeekEnd); err == nil {
		_, _ = f.Seek(max(0, size-logTail), io.SeekStart)
	}
	b, _ := io.ReadAll(io.LimitReader(f, logTail))
	return fmt.Sprintf("the end of its log, %s:\n%s", log, b)
}
