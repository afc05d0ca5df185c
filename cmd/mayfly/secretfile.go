package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// secretFile is a file under way that only its owner may read. It comes into
// being whole, at commit, or not at all.
type secretFile struct {
	path string
	temp *os.File
}

// newSecretFile checks that path may be written and prepares it, so that no
// credential is asked for that could not be put down. What is there already
// must be a plain file of this user's that nobody else may read; links are not
// followed.
func newSecretFile(path string) (*secretFile, error) {
	switch info, err := os.Lstat(path); {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return nil, fmt.Errorf("looking at %s: %w", path, err)
	case info.Mode()&fs.ModeSymlink != 0:
		return nil, usagef("%s is a symbolic link, and a secret is not written through one: name the file itself", path)
	case !info.Mode().IsRegular():
		return nil, usagef("%s is no plain file", path)
	case info.Mode().Perm()&0o077 != 0:
		return nil, usagef("%s may be read or written by others (mode %04o): remove it, or chmod 600 it", path, info.Mode().Perm())
	case !ownedByUs(info):
		return nil, usagef("%s belongs to another user", path)
	}
	// CreateTemp makes the file with mode 0600 and never opens one that exists.
	temp, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return nil, fmt.Errorf("preparing %s: %w", path, err)
	}
	return &secretFile{path, temp}, nil
}

// commit writes the file and puts it in its place. After an error there is
// nothing left of it.
func (f *secretFile) commit(data []byte) error {
	_, err := f.temp.Write(data)
	if err == nil {
		err = f.temp.Sync()
	}
	err = errors.Join(err, f.temp.Close())
	if err == nil {
		err = os.Rename(f.temp.Name(), f.path) // replaces a link that came in between, and does not follow it
	}
	if err != nil {
		return errors.Join(fmt.Errorf("writing %s: %w", f.path, err), os.Remove(f.temp.Name()))
	}
	return nil
}

// abort leaves nothing behind.
func (f *secretFile) abort() {
	_ = f.temp.Close() // nothing was written
	_ = os.Remove(f.temp.Name())
}
