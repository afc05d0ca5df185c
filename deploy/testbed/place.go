//go:build unix

package testbed

import (
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"time"
)

const (
	placePrefix = "mayfly-testbed-"
	placeAge    = time.Minute // younger ones may not have their lock yet
	lockFile    = "lock"
)

// places is where this process's servers have their folders: one folder of
// this process in the system's temporary folder. It goes with the last server.
var places struct {
	sync.Mutex
	dir  string
	lock *os.File
	used int
}

// newPlace makes a folder for one server. Its path is short: a Unix socket's
// may have 107 bytes. release removes it.
func newPlace(kind string) (dir string, release func() error, err error) {
	places.Lock()
	defer places.Unlock()
	if places.used == 0 {
		if err := openPlaces(); err != nil {
			return "", nil, fmt.Errorf("making a folder for %s: %w", kind, err)
		}
	}
	if dir, err = os.MkdirTemp(places.dir, kind+"-"); err != nil {
		if places.used == 0 {
			err = errors.Join(err, closePlaces())
		}
		return "", nil, fmt.Errorf("making a folder for %s: %w", kind, err)
	}
	places.used++
	var once sync.Once
	return dir, func() (err error) {
		once.Do(func() {
			places.Lock()
			defer places.Unlock()
			err = os.RemoveAll(dir)
			if places.used--; places.used == 0 {
				err = errors.Join(err, closePlaces())
			}
		})
		return err
	}, nil
}

func openPlaces() (err error) {
	root := os.TempDir()
	if len(root) > 40 {
		root = "/tmp"
	}
	sweep(root)
	places.dir, places.lock, err = lockedFolder(root)
	return err
}

// lockedFolder makes a folder that is its process's as long as lock is open.
func lockedFolder(root string) (dir string, lock *os.File, err error) {
	if dir, err = os.MkdirTemp(root, placePrefix); err != nil {
		return "", nil, err
	}
	made := dir
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(made))
		}
	}()
	// The servers' users pass through it; each server's folder is its own.
	if err := os.Chmod(dir, 0o711); err != nil {
		return "", nil, err
	}
	if lock, err = os.OpenFile(filepath.Join(dir, lockFile), os.O_CREATE|os.O_RDWR, 0o600); err != nil {
		return "", nil, err
	}
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		return "", nil, errors.Join(err, lock.Close())
	}
	return dir, lock, nil
}

func closePlaces() error {
	err := os.RemoveAll(places.dir)
	err = errors.Join(err, places.lock.Close())
	places.dir, places.lock = "", nil
	return err
}

// sweep removes what killed processes left: folders of our user that no
// process has locked. It is a courtesy, so its errors are of no interest.
func sweep(root string) {
	found, _ := filepath.Glob(filepath.Join(root, placePrefix+"*"))
	for _, dir := range found {
		info, err := os.Lstat(dir)
		if err != nil || !info.IsDir() || !ours(info) || time.Since(info.ModTime()) < placeAge {
			continue
		}
		lock, err := os.OpenFile(filepath.Join(dir, lockFile), os.O_RDWR|syscall.O_NOFOLLOW, 0)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err == nil {
			free := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) == nil
			if free {
				_ = os.RemoveAll(dir)
			}
			lock.Close()
			continue
		}
		_ = os.RemoveAll(dir)
	}
}

func ours(info fs.FileInfo) bool {
	s, ok := info.Sys().(*syscall.Stat_t)
	return ok && int(s.Uid) == os.Getuid()
}

const (
	firstPort = 15000 // below the ports that systems hand out to clients,
	lastPort  = 32000 // so that no connection takes one while its server restarts
	portTries = 200
)

var ports struct {
	sync.Mutex
	given map[int]bool
}

// freePort finds a port on loopback that nobody listens on, and never gives it
// twice. Another process may still take it first: whoever starts a server on
// it tries again with another.
func freePort() (int, error) {
	ports.Lock()
	defer ports.Unlock()
	if ports.given == nil {
		ports.given = make(map[int]bool)
	}
	var last error
	for range portTries {
		port := firstPort + rand.IntN(lastPort-firstPort)
		if ports.given[port] {
			continue
		}
		l, err := net.Listen("tcp", loopback(port))
		if err != nil {
			last = err
			continue
		}
		l.Close()
		ports.given[port] = true
		return port, nil
	}
	return 0, fmt.Errorf("finding a free port on loopback: %w", last)
}

func loopback(port int) string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(port)) }
