package token

import (
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"
)

const (
	keySuffix  = ".pem"
	keyLayout  = "2006-01-02T15-04-05Z"
	pemType    = "PRIVATE KEY" // PKCS #8
	maxKeys    = 64
	maxKeyFile = 16 << 10 // bytes

	// lookEvery is how often the directory is looked at, which costs a few
	// system calls. A rotation takes effect within so long.
	lookEvery = 2 * time.Second
)

// directory is a directory of key files, looked at again every now and then.
type directory struct {
	path string
	now  func() time.Time
	log  *slog.Logger

	mu        sync.Mutex
	looked    time.Time
	files     map[string]keyFile // the usable ones, by name
	set       *keySet
	complaint string // the last one logged, so that each is logged once
}

// keyFile is one file as it was when it was last read.
type keyFile struct {
	info   fs.FileInfo
	signer ed25519.PrivateKey
}

// unchanged reports whether the file still is what was read.
func (k keyFile) unchanged(info fs.FileInfo) bool {
	return os.SameFile(k.info, info) && k.info.Size() == info.Size() &&
		k.info.Mode() == info.Mode() && k.info.ModTime().Equal(info.ModTime())
}

// openDirectory reads every key, and refuses the directory for one that is
// unusable.
func openDirectory(path string, now func() time.Time, log *slog.Logger) (*directory, error) {
	if now == nil || log == nil {
		return nil, errors.New("opening signing keys: a clock and a logger are required")
	}
	d := &directory{path: path, now: now, log: log, looked: now()}
	files, problems, err := d.read()
	if err := errors.Join(append(problems, err)...); err != nil {
		return nil, fmt.Errorf("reading signing keys: %w", err)
	}
	if len(files) == 0 {
		return nil, fmt.Errorf("reading signing keys: there is no %s file in %s; make one with `mayflyd key new --dir %s`", keySuffix, path, path)
	}
	return d, d.use(files)
}

func (d *directory) current() *keySet {
	d.mu.Lock()
	defer d.mu.Unlock()
	if since := d.now().Sub(d.looked); since < 0 || since >= lookEvery {
		d.looked = d.now()
		d.look()
	}
	return d.set
}

// look takes up what changed in the directory. A key that is gone, or that
// others can read by now, is used no more; one that is new and unusable is not
// begun with. Only where the directory cannot be read for a reason that says
// nothing about the keys do they stay as they are.
func (d *directory) look() {
	files, problems, err := d.read()
	problem := errors.Join(append(problems, err)...)
	if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, errExposed) {
		d.complain("signing keys cannot be read; those read before stay in use", problem)
		return
	}
	d.complain("signing keys are missing or unusable, and are not used", problem)
	if same(files, d.files) {
		return
	}
	if err := d.use(files); err != nil {
		d.complain("signing keys cannot be used; those read before stay in use", err)
		return
	}
	d.log.Info("signing keys changed", "directory", d.path, "keys", len(d.set.verifies))
}

func (d *directory) complain(message string, err error) {
	complaint := ""
	if err != nil {
		complaint = message + err.Error()
	}
	if complaint != "" && complaint != d.complaint {
		d.log.Error(message, "directory", d.path, "error", err)
	}
	d.complaint = complaint
}

func same(a, b map[string]keyFile) bool {
	if len(a) != len(b) {
		return false
	}
	for name, file := range a {
		if before, ok := b[name]; !ok || !before.unchanged(file.info) {
			return false
		}
	}
	return true
}

// use makes files the keys in use.
func (d *directory) use(files map[string]keyFile) error {
	names := slices.Sorted(maps.Keys(files)) // by name, and so by age
	signers := make([]crypto.Signer, len(names))
	for i, name := range names {
		signers[i] = files[name].signer
	}
	set, err := newKeySet(signers)
	if err != nil {
		return err
	}
	d.files, d.set = files, set
	return nil
}

// errExposed means that others than the owner can read keys.
var errExposed = errors.New("others can read it")

// read reads the directory. files are the usable ones; problems are about the
// others.
func (d *directory) read() (files map[string]keyFile, problems []error, err error) {
	if err := checkDirectory(d.path); err != nil {
		return nil, nil, err
	}
	entries, err := os.ReadDir(d.path)
	if err != nil {
		return nil, nil, err
	}
	files = make(map[string]keyFile)
	for _, entry := range entries {
		name := entry.Name()
		if !isKeyName(name) {
			continue
		}
		if len(files) == maxKeys {
			return nil, nil, fmt.Errorf("there are more than %d keys in %s; remove the oldest", maxKeys, d.path)
		}
		path := filepath.Join(d.path, name)
		info, err := os.Stat(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue // removed since
		}
		if err != nil {
			problems = append(problems, err)
			continue
		}
		if before, ok := d.files[name]; ok && before.unchanged(info) {
			files[name] = before
			continue
		}
		signer, err := readKey(path)
		if err != nil {
			problems = append(problems, err)
			continue
		}
		files[name] = keyFile{info, signer}
	}
	return files, problems, nil
}

func isKeyName(name string) bool {
	return strings.HasSuffix(name, keySuffix) && !strings.HasPrefix(name, ".")
}

func checkDirectory(path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	if !info.IsDir() {
		return fmt.Errorf("%s is no directory", path)
	}
	if info.Mode().Perm()&0o077 != 0 {
		return fmt.Errorf("%s has mode %#o and must have 0700: %w; run chmod 0700 %s, and make new keys if others may have read them", path, info.Mode().Perm(), errExposed, path)
	}
	return nil
}

// readKey reads one key. No error holds any of the file's content.
func readKey(path string) (ed25519.PrivateKey, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() { // a pipe would block the open
		return nil, fmt.Errorf("%s is no regular file", path)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if info, err = f.Stat(); err != nil {
		return nil, err
	}
	if info.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("%s has mode %#o and must have 0600: %w; remove it and make a new key", path, info.Mode().Perm(), errExposed)
	}
	content, err := io.ReadAll(io.LimitReader(f, maxKeyFile))
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", path, err)
	}
	block, rest := pem.Decode(content)
	if block == nil || block.Type != pemType || len(strings.TrimSpace(string(rest))) != 0 {
		return nil, fmt.Errorf("%s is no single PEM block %q (PKCS #8)", path, pemType)
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%s holds no PKCS #8 private key", path)
	}
	private, ok := key.(ed25519.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("%s holds a %T and not an Ed25519 key", path, key)
	}
	return private, nil
}

// NewKey writes a new signing key into directory, which it makes if there is
// none, and returns the file's path. The key signs from when a provider next
// looks at the directory, within seconds. The file's name is now, in UTC; it
// is an error if a newer one is there, because the new key would never sign.
func NewKey(directory string, now time.Time) (path string, err error) {
	if err := os.MkdirAll(directory, 0o700); err != nil {
		return "", fmt.Errorf("making key directory: %w", err)
	}
	if err := checkDirectory(directory); err != nil {
		return "", fmt.Errorf("checking key directory: %w", err)
	}
	entries, err := os.ReadDir(directory)
	if err != nil {
		return "", fmt.Errorf("reading key directory: %w", err)
	}
	name := now.UTC().Format(keyLayout) + keySuffix
	for _, entry := range entries {
		if isKeyName(entry.Name()) && entry.Name() >= name {
			return "", fmt.Errorf("%s is there and sorts after %s, so the new key would not sign; is the clock right?", entry.Name(), name)
		}
	}
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return "", fmt.Errorf("making key: %w", err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		return "", fmt.Errorf("encoding key: %w", err)
	}
	path = filepath.Join(directory, name)
	if err := writeNew(path, pem.EncodeToMemory(&pem.Block{Type: pemType, Bytes: der})); err != nil {
		return "", fmt.Errorf("writing key: %w", err)
	}
	return path, nil
}

// writeNew writes a file that is there whole or not at all, with mode 0600,
// and replaces none.
func writeNew(path string, content []byte) (err error) {
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, ".new-*") // mode 0600; a hidden name is no key
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(content)
	if err == nil {
		err = f.Sync()
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := os.Link(f.Name(), path); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
