package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// maxAWSConfig bounds what is read of ~/.aws/config, in bytes.
const maxAWSConfig = 4 << 20

// awsFile is a file of AWS's configuration. A link to it is followed: it stays,
// and what it leads to is written.
func (p *program) awsFile(variable, name string) (string, error) {
	path := p.getenv(variable)
	if path == "" {
		home := p.getenv("HOME")
		if !filepath.IsAbs(home) {
			return "", usagef("neither %s nor HOME says where AWS's configuration is", variable)
		}
		path = filepath.Join(home, ".aws", name)
	} else if rest, ok := strings.CutPrefix(path, "~/"); ok {
		path = filepath.Join(p.getenv("HOME"), rest)
	}
	real, err := filepath.EvalSymlinks(path)
	switch {
	case err == nil:
		return real, nil
	case !errors.Is(err, fs.ErrNotExist):
		return "", fmt.Errorf("looking for %s: %w", path, err)
	}
	if info, err := os.Lstat(path); err == nil && info.Mode()&fs.ModeSymlink != 0 {
		return "", usagef("%s is a link that leads nowhere", path)
	}
	return path, nil
}

// editAWS changes the file. Of many who do at once, each finds what the others
// have written.
func (p *program) editAWS(ctx context.Context, w awsProfile, edit func(path string, before []byte) ([]byte, error)) (awsConfiguredView, error) {
	path, err := p.awsFile(envAWSConfig, "config")
	if err != nil {
		return awsConfiguredView{}, err
	}
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return awsConfiguredView{}, fmt.Errorf("making the directory of %s: %w", path, err)
	}
	unlock, err := lockDir(ctx, dir)
	if err != nil {
		return awsConfiguredView{}, err
	}
	defer unlock()
	before, mode, err := readAWS(path)
	if err != nil {
		return awsConfiguredView{}, err
	}
	after, err := edit(path, before)
	if err != nil {
		return awsConfiguredView{}, err
	}
	v := awsConfiguredView{Profile: w.name, File: path, CredentialProcess: w.process, Region: w.region, Changed: !bytes.Equal(before, after)}
	if !v.Changed {
		return v, nil
	}
	return v, replaceAWS(path, before, after, mode)
}

// readAWS reads a file of AWS's configuration; one that is not there is empty.
func readAWS(path string) ([]byte, fs.FileMode, error) {
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, 0o600, nil
	case err != nil:
		return nil, 0, fmt.Errorf("reading %s: %w", path, err)
	case !info.Mode().IsRegular() || info.Size() > maxAWSConfig:
		return nil, 0, usagef("%s is no plain file, or too large to be AWS's configuration", path)
	case !ownedByUs(info):
		return nil, 0, usagef("%s belongs to another user", path)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, 0, fmt.Errorf("reading %s: %w", path, err)
	}
	return text, info.Mode().Perm(), nil
}

// replaceAWS puts the new file in the place of the old one, if that is as it was
// when it was read.
func replaceAWS(path string, before, after []byte, mode fs.FileMode) (err error) {
	temp, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	defer func() {
		if err != nil {
			_ = temp.Close() // closed or not, it goes
			_ = os.Remove(temp.Name())
		}
	}()
	_, err = temp.Write(after)
	if err == nil {
		err = errors.Join(temp.Chmod(mode), temp.Sync())
	}
	if err = errors.Join(err, temp.Close()); err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	now, _, err := readAWS(path)
	if err != nil {
		return err
	}
	if !bytes.Equal(now, before) {
		return &exitError{exitUnavailable, fmt.Errorf("somebody else was writing %s: try again", path)}
	}
	if err := os.Rename(temp.Name(), path); err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	return nil
}

// noKeysFor refuses a profile whose name has keys in the file for credentials:
// SDKs take those first, and would never ask us.
func (p *program) noKeysFor(w awsProfile, force bool) error {
	path, err := p.awsFile(envAWSCredentials, "credentials")
	if err != nil {
		return err
	}
	text, _, err := readAWS(path)
	if err != nil {
		return err
	}
	if _, _, state := w.find(strings.SplitAfter(string(text), "\n"), true); state == profileAbsent {
		return nil
	}
	if !force {
		return usagef("%s has a profile %s, whose keys SDKs take before any credential_process: remove it there, or choose another name", path, w.name)
	}
	p.warn("%s has a profile %s, whose keys SDKs take before what is written now: remove it there", path, w.name)
	return nil
}
