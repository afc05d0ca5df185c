//go:build unix

package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/client"
)

const (
	// maxKept bounds what is read of a kept lease, in bytes.
	maxKept = 64 << 10
	// lockPause is the pause between two tries for a lock that somebody has.
	lockPause = 20 * time.Millisecond
	keptEnd   = ".json"
	lockEnd   = ".lock"
)

// awsCache is the file that one lease is kept in, for calls that come soon after
// one another. The file is a secret.
type awsCache struct {
	key  string // what the lease is for; see awsCache
	dir  string
	path string
}

// keptLease is the file's content.
type keptLease struct {
	Key    string            `json:"key"`
	Lease  broker.LeaseID    `json:"lease"`
	Made   time.Time         `json:"made"`
	End    time.Time         `json:"end"`
	Secret map[string]string `json:"secret"`
}

// awsCache is the place for one broker, identity, tool, set of parameters and
// TTL. Whatever of these differs has another place.
func (p *program) awsCache(c *client.Client, req client.GetRequest) (awsCache, error) {
	// JSON, so that no two sets are one text; maps are in order there.
	doc, err := json.Marshal([]any{c.Addr(), c.BrokerID().String(), c.ID().String(), req.Tool, req.Params, req.TTL})
	if err != nil {
		return awsCache{}, err
	}
	sum := sha256.Sum256(doc)
	key := hex.EncodeToString(sum[:])
	dir, err := p.awsDir()
	if err != nil {
		return awsCache{}, err
	}
	return awsCache{key: key, dir: dir, path: filepath.Join(dir, key[:32]+keptEnd)}, nil
}

// awsDir is where leases are kept, made if it is not there. A directory that
// others may look into or write to is refused.
func (p *program) awsDir() (string, error) {
	dir := p.getenv("XDG_RUNTIME_DIR")
	if !filepath.IsAbs(dir) { // the base directory specification: others are to be ignored
		dir = p.getenv("XDG_CACHE_HOME")
	}
	if !filepath.IsAbs(dir) {
		home := p.getenv("HOME")
		if !filepath.IsAbs(home) {
			return "", usagef("there is no place to keep a lease: neither XDG_RUNTIME_DIR, XDG_CACHE_HOME nor HOME is set to an absolute path; use --no-cache")
		}
		dir = filepath.Join(home, ".cache")
	}
	dir = filepath.Join(dir, "mayfly", "aws")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", fmt.Errorf("making a place to keep a lease: %w", err)
	}
	info, err := os.Lstat(dir)
	if err != nil {
		return "", fmt.Errorf("looking at the place to keep a lease: %w", err)
	}
	if !info.IsDir() || info.Mode().Perm()&0o077 != 0 || !ownedByUs(info) {
		return "", usagef("%s is not a directory of yours alone (mode %04o): remove it, or chmod 700 it", dir, info.Mode().Perm())
	}
	return dir, nil
}

// lock waits until nobody else is about to renew the lease. The lock ends with
// the process, however that ends.
func (c awsCache) lock(ctx context.Context) (unlock func(), err error) {
	tick := time.NewTicker(lockPause)
	defer tick.Stop()
	for {
		unlock, taken, err := tryLock(strings.TrimSuffix(c.path, keptEnd) + lockEnd)
		if err != nil || taken {
			return unlock, err
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-tick.C:
		}
	}
}

// tryLock takes a lock if nobody has it. Its file stays: whoever removed it
// could take away what another has just locked.
func tryLock(path string) (unlock func(), taken bool, err error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, false, fmt.Errorf("locking the kept lease: %w", err)
	}
	switch err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); {
	case err == nil:
		return func() { _ = f.Close() }, true, nil // that unlocks it
	case errors.Is(err, syscall.EWOULDBLOCK), errors.Is(err, syscall.EINTR):
		_ = f.Close()
		return nil, false, nil
	default:
		_ = f.Close()
		return nil, false, fmt.Errorf("locking the kept lease: %w", err)
	}
}

// load reads the kept lease; the zero lease if there is none that can be used.
// A file that others could have read or written is refused.
func (c awsCache) load() (awsLease, error) {
	f, err := openOwn(c.path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return awsLease{}, nil
	case err != nil:
		return awsLease{}, fmt.Errorf("reading the kept lease: %w", err)
	}
	defer f.Close() // it was only read
	info, err := f.Stat()
	if err != nil {
		return awsLease{}, fmt.Errorf("reading the kept lease: %w", err)
	}
	if !info.Mode().IsRegular() || info.Mode().Perm()&0o077 != 0 || !ownedByUs(info) {
		return awsLease{}, usagef("%s is not yours alone (mode %04o), so that others may have its credential: revoke its lease and remove it", c.path, info.Mode().Perm())
	}
	var kept keptLease
	if json.NewDecoder(io.LimitReader(f, maxKept)).Decode(&kept) != nil || kept.Key != c.key {
		return awsLease{}, nil // not one that we wrote for this; it is written anew
	}
	return awsLease{ID: kept.Lease, Made: kept.Made, End: kept.End, Secret: broker.NewSecret(kept.Secret)}, nil
}

// keep puts a lease into the file that was prepared for it.
func (c awsCache) keep(f *secretFile, l awsLease) error {
	doc, err := json.Marshal(keptLease{Key: c.key, Lease: l.ID, Made: l.Made, End: l.End, Secret: l.Secret.RevealAll()})
	if err != nil {
		return err
	}
	return f.commit(doc)
}

// prune removes leases that have ended. What it cannot remove it leaves to the
// next call: their credentials are dead.
func (c awsCache) prune(now time.Time) {
	paths, _ := filepath.Glob(filepath.Join(c.dir, "*"+keptEnd)) // the pattern is good
	for _, path := range paths {
		if path == c.path {
			continue
		}
		pruneOne(path, now)
	}
}

func pruneOne(path string, now time.Time) {
	unlock, taken, err := tryLock(strings.TrimSuffix(path, keptEnd) + lockEnd)
	if err != nil || !taken {
		return
	}
	defer unlock()
	f, err := openOwn(path)
	if err != nil {
		return
	}
	defer f.Close() // it was only read
	var kept keptLease
	if json.NewDecoder(io.LimitReader(f, maxKept)).Decode(&kept) == nil && now.After(kept.End) {
		_ = os.Remove(path) // see prune
	}
}
