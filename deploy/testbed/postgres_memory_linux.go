package testbed

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// freeSharedMemory frees the small System V segment by which PostgreSQL sees
// that a folder is in use: a server that was killed leaves it. The pid file,
// which only such a server leaves too, names it on its seventh line.
func freeSharedMemory(data string) {
	b, err := os.ReadFile(filepath.Join(data, "postmaster.pid"))
	if err != nil {
		return
	}
	lines := strings.Split(string(b), "\n")
	if len(lines) < 7 {
		return
	}
	key := strings.Fields(lines[6])
	if len(key) != 2 {
		return
	}
	if id, err := strconv.Atoi(key[1]); err == nil {
		_, _ = unix.SysvShmCtl(id, unix.IPC_RMID, nil)
	}
}
