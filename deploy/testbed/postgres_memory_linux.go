package testbed

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// sharedMemory is the small System V segment by which PostgreSQL sees that a
// folder is in use. The pid file names it on its seventh line.
func sharedMemory(data string) (id int, ok bool) {
	b, err := os.ReadFile(filepath.Join(data, "postmaster.pid"))
	if err != nil {
		return 0, false
	}
	lines := strings.Split(string(b), "\n")
	if len(lines) < 7 {
		return 0, false
	}
	key := strings.Fields(lines[6])
	if len(key) != 2 {
		return 0, false
	}
	id, err = strconv.Atoi(key[1])
	return id, err == nil
}

// freeSharedMemory frees the segment of a server that was killed. Only such a
// server leaves the pid file.
func freeSharedMemory(data string) {
	if id, ok := sharedMemory(data); ok {
		_, _ = unix.SysvShmCtl(id, unix.IPC_RMID, nil)
	}
}
