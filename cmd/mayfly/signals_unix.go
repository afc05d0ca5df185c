//go:build unix

package main

import (
	"os"
	"os/signal"
	"slices"
	"syscall"

	"golang.org/x/sys/unix"
)

// passed are the signals that go to the command of exec.
var passed = []syscall.Signal{
	syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGTERM,
	syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGWINCH,
}

// ends are those of them that end whoever does nothing about them.
var ends = []syscall.Signal{
	syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGTERM, syscall.SIGUSR1, syscall.SIGUSR2,
}

// typed are those that a terminal sends to everybody in the foreground.
var typed = []syscall.Signal{syscall.SIGINT, syscall.SIGQUIT, syscall.SIGWINCH}

// signals are the signals that come in while a command runs.
type signals struct{ c chan os.Signal }

// listen takes the signals that would otherwise end us, so that nothing keeps
// us from giving a credential back. Those that we were told to ignore (nohup)
// stay ignored, for the command, too.
func listen() *signals {
	s := &signals{make(chan os.Signal, 32)}
	for _, sig := range passed {
		if !signal.Ignored(sig) {
			signal.Notify(s.c, sig)
		}
	}
	return s
}

func (s *signals) stop() { signal.Stop(s.c) }

// ending reports whether a signal to end is waiting.
func (s *signals) ending() (syscall.Signal, bool) {
	for {
		select {
		case sig := <-s.c:
			if n, ok := sig.(syscall.Signal); ok && slices.Contains(ends, n) {
				return n, true
			}
		default:
			return 0, false
		}
	}
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
