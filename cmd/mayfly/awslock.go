//go:build unix

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"
)

// editWait is how long one waits for somebody else who edits the same files.
const editWait = 10 * time.Second

// tryLock takes a lock if nobody has it.
func tryLock(path string) (unlock func(), taken bool, err error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, false, fmt.Errorf("locking the kept lease: %w", err)
	}
	err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	if err == nil && sameFile(f, path) {
		return func() { _ = f.Close() }, true, nil // that unlocks it
	}
	_ = f.Close() // nothing was written
	if err == nil || errors.Is(err, syscall.EWOULDBLOCK) || errors.Is(err, syscall.EINTR) {
		return nil, false, nil
	}
	return nil, false, fmt.Errorf("locking the kept lease: %w", err)
}

// sameFile reports whether an open file is still the one at the path: whoever
// tidied up in between has removed it, and a lock on it keeps nobody out.
func sameFile(f *os.File, path string) bool {
	open, err := f.Stat()
	if err != nil {
		return false
	}
	there, err := os.Lstat(path)
	return err == nil && os.SameFile(open, there)
}

// lockDir waits until no other mayfly edits the files of a directory. Where the
// file system knows no such locks it goes on without.
func lockDir(ctx context.Context, dir string) (unlock func(), err error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("locking %s: %w", dir, err)
	}
	ctx, cancel := context.WithTimeout(ctx, editWait)
	defer cancel()
	tick := time.NewTicker(lockPause)
	defer tick.Stop()
	for {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if !errors.Is(err, syscall.EWOULDBLOCK) && !errors.Is(err, syscall.EINTR) {
			return func() { _ = f.Close() }, nil // that unlocks it
		}
		select {
		case <-ctx.Done():
			_ = f.Close() // nothing was written
			return nil, &exitError{exitUnavailable, fmt.Errorf("another mayfly is writing in %s: try again", dir)}
		case <-tick.C:
		}
	}
}
