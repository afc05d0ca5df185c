package main

import (
	"os"

	"golang.org/x/sys/unix"
)

// isTerminal reports whether a person may be at the other end. A character
// device is not enough: /dev/null is one.
func isTerminal(f *os.File) bool {
	c, err := f.SyscallConn()
	if err != nil {
		return false
	}
	is := false
	err = c.Control(func(fd uintptr) {
		_, err := unix.IoctlGetTermios(int(fd), termiosRequest)
		is = err == nil
	})
	return err == nil && is
}
