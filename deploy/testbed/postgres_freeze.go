//go:build unix

package testbed

import (
	"errors"
	"fmt"
	"io"
	"os/exec"
	"strconv"
	"syscall"
)

// pause is a frozen PostgreSQL. Its guard is a shell that kills the frozen
// processes when its input ends, as it does when we are killed: a stopped
// process gets no other signal, and would stay for ever.
type pause struct {
	pids  []int // the server first
	guard *exec.Cmd
	alive io.WriteCloser
}

// freeze stops the server, and then its children: a stopped server starts
// none. Each has a session of its own, so that no process group has them all.
// p.paused is filled as far as it came, also with an error.
func (p *Postgres) freeze() error {
	if p.paused != nil {
		return nil
	}
	p.paused = &pause{pids: []int{p.process.pid()}}
	if err := p.process.signal(syscall.SIGSTOP); err != nil {
		return err
	}
	if err := stopped(p.process.pid()); err != nil {
		return err
	}
	children, err := childrenOf(p.process.pid())
	if err != nil {
		return fmt.Errorf("pausing PostgreSQL: %w", err)
	}
	for _, pid := range children {
		if err := syscall.Kill(pid, syscall.SIGSTOP); err == nil {
			p.paused.pids = append(p.paused.pids, pid)
		} else if !errors.Is(err, syscall.ESRCH) {
			return fmt.Errorf("pausing PostgreSQL: %w", err)
		}
	}
	for _, pid := range p.paused.pids[1:] {
		if err := stopped(pid); err != nil {
			return err
		}
	}
	return p.paused.watch(p.data())
}

func (p *Postgres) resume() error {
	if p.paused == nil {
		return nil
	}
	var err error
	for i := len(p.paused.pids) - 1; i >= 0; i-- {
		if e := syscall.Kill(p.paused.pids[i], syscall.SIGCONT); e != nil && !errors.Is(e, syscall.ESRCH) {
			err = errors.Join(err, fmt.Errorf("resuming PostgreSQL: %w", e))
		}
	}
	p.paused.over()
	p.paused = nil
	return err
}

func (s *pause) watch(data string) error {
	segment := ""
	if id, ok := sharedMemory(data); ok {
		segment = strconv.Itoa(id)
	}
	names := make([]string, len(s.pids))
	for i, pid := range s.pids {
		names[i] = strconv.Itoa(pid)
	}
	s.guard = exec.Command("/bin/sh", "-c", `read -r _; kill -KILL "$@"; test -z "$0" || ipcrm -m "$0"`, segment)
	s.guard.Args = append(s.guard.Args, names...)
	s.guard.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	var err error
	if s.alive, err = s.guard.StdinPipe(); err != nil {
		return fmt.Errorf("guarding a paused PostgreSQL: %w", err)
	}
	if err := s.guard.Start(); err != nil {
		s.guard = nil
		return fmt.Errorf("guarding a paused PostgreSQL: %w", err)
	}
	return nil
}

// over ends the guard before its input ends.
func (s *pause) over() {
	if s.guard == nil {
		return
	}
	_ = s.guard.Process.Kill()
	_ = s.guard.Wait()
	s.guard = nil
}
