//go:build unix && !linux

package testbed

import "syscall"

// endWithParent does nothing: only Linux has such a signal. Elsewhere a
// server outlives a process that was killed before it closed the server.
func endWithParent(*syscall.SysProcAttr, syscall.Signal) {}
