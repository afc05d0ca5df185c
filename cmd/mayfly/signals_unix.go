//go:build unix

package main

import (
	"os"
	"os/signal"
	"slices"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// passed are the signals that go to the command of exec.
var passed = []syscall.Signal{
	syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGTERM,
	syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGWINCH,
}

// typed are those that a terminal sends to everybody in the foreground.
var typed = []syscall.Signal{syscall.SIGINT, syscall.SIGQUIT, syscall.SIGWINCH}

// signals are the signals that come in while a command runs.
type signals struct {
	c    chan syscall.Signal
	from []chan os.Signal
	done chan struct{}
	wait sync.WaitGroup
}

// listen takes the signals that would otherwise end us, so that nothing keeps
// us from giving a credential back. Those that we were told to ignore (nohup)
// stay ignored, for the command, too.
//
// As with the kernel, a signal that comes while one of its kind is waiting is
// one with it, and none is lost to others: each kind has a place of its own.
func listen() *signals {
	s := &signals{c: make(chan syscall.Signal), done: make(chan struct{})}
	for _, sig := range passed {
		if signal.Ignored(sig) {
			continue
		}
		from := make(chan os.Signal, 1)
		signal.Notify(from, sig)
		s.from = append(s.from, from)
		s.wait.Go(func() {
			for {
				select {
				case <-from:
				case <-s.done:
					return
				}
				select {
				case s.c <- sig:
				case <-s.done:
					return
				}
			}
		})
	}
	return s
}

// stop ends the taking.
func (s *signals) stop() {
	for _, from := range s.from {
		signal.Stop(from)
	}
	close(s.done)
	s.wait.Wait()
}

// fromTerminal reports whether a terminal has sent the signal to the command,
// too: it is one that is typed, and we are in the foreground of a terminal. A
// signal does not tell who sent it, so one that somebody sends with kill to a
// mayfly in the foreground counts as typed.
func fromTerminal(sig syscall.Signal) bool {
	if !slices.Contains(typed, sig) {
		return false
	}
	tty, err := os.Open("/dev/tty")
	if err != nil {
		return false // there is no terminal
	}
	defer tty.Close()
	foreground, err := unix.IoctlGetInt(int(tty.Fd()), unix.TIOCGPGRP)
	return err == nil && foreground == unix.Getpgrp()
}
