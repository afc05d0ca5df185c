//go:build unix

package testbed

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// childrenOf are the processes whose parent is pid: none where there is no
// /proc to see them in. PostgreSQL's end by themselves, soon after the server.
func childrenOf(pid int) ([]int, error) {
	found, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil, err
	}
	var children []int
	for _, dir := range found {
		child, err := strconv.Atoi(filepath.Base(dir))
		if err != nil {
			continue
		}
		if _, parent := stat(child); parent == pid {
			children = append(children, child)
		}
	}
	return children, nil
}

// stat is a process's state and parent, see proc_pid_stat(5); 0 where it is
// gone.
func stat(pid int) (state byte, parent int) {
	return readStat(fmt.Sprintf("/proc/%d/stat", pid))
}

func readStat(file string) (state byte, parent int) {
	b, err := os.ReadFile(file)
	if err != nil {
		return 0, 0
	}
	text := string(b)
	fields := strings.Fields(text[strings.LastIndexByte(text, ')')+1:]) // the name before it may have anything in it
	if len(fields) < 2 {
		return 0, 0
	}
	parent, _ = strconv.Atoi(fields[1])
	return fields[0][0], parent
}

// stopped waits until a process that was sent SIGSTOP does nothing any more:
// each of its threads stops when it next looks for signals.
func stopped(pid int) error {
	return await(pid, "runs still", func() bool {
		threads, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
		return !slices.ContainsFunc(threads, func(file string) bool {
			state, _ := readStat(file)
			return state != 'T' && state != 't' && state != 'Z' && state != 0
		})
	})
}

func gone(pid int) error {
	return await(pid, "is there still", func() bool {
		state, _ := stat(pid)
		return state == 'Z' || state == 0 // a zombie is for init to reap
	})
}

func await(pid int, otherwise string, is func() bool) error {
	for deadline := time.Now().Add(stopTime); !is(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			return fmt.Errorf("process %d %s", pid, otherwise)
		}
	}
	return nil
}
