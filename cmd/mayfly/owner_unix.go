//go:build unix

package main

import (
	"io"
	"io/fs"
	"os"
	"syscall"
)

// ownedByUs reports whether a file belongs to the user who runs this.
func ownedByUs(info fs.FileInfo) bool {
	st, ok := info.Sys().(*syscall.Stat_t)
	return ok && int(st.Uid) == os.Geteuid()
}

// oursAlone reports whether nobody else could have read or written a file.
func oursAlone(info fs.FileInfo) bool {
	return info.Mode().IsRegular() && info.Mode().Perm()&0o077 == 0 && ownedByUs(info)
}

// maxOwn bounds what is read of a file of ours, in bytes.
const maxOwn = 64 << 10

// readOwn reads a small file, and follows no link in its place. Whether others
// could have written it the caller sees by info. What is no plain file is not read.
func readOwn(path string) (data []byte, info fs.FileInfo, err error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, err
	}
	defer f.Close() // it was only read
	if info, err = f.Stat(); err != nil || !info.Mode().IsRegular() {
		return nil, info, err
	}
	data, err = io.ReadAll(io.LimitReader(f, maxOwn))
	return data, info, err
}
