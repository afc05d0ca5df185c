//go:build unix

package main

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// keptForEnding is how many bytes of the store's file system are kept for
// ending: an agent that fills the disk must not keep its access by that.
const keptForEnding = 64 << 20

// roomFor returns an error if the file system of dir has less room than that.
func roomFor(dir string) error {
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return fmt.Errorf("asking for the room in %s: %w", dir, err)
	}
	if free := fs.Bavail * uint64(fs.Bsize); free < keptForEnding {
		return fmt.Errorf("%s has %d bytes left; the last %d are kept for ending", dir, free, keptForEnding)
	}
	return nil
}
