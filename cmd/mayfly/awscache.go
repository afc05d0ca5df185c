//go:build unix

package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/client"
)

const (
	// lockPause is the pause between two tries for a lock that somebody has.
	lockPause = 20 * time.Millisecond
	// awsKeptPause is how long a renewal that failed is not tried again while the
	// kept lease lives.
	awsKeptPause = 5 * time.Second
	// awsKeptLook and awsKeptRenew bound the questions about a lease that lives, and
	// so can be printed without an answer.
	awsKeptLook  = 2 * time.Second
	awsKeptRenew = 10 * time.Second
	// awsKeptWait bounds the waiting for another process that asks, if nothing was
	// said: as long as a call may take.
	awsKeptWait = time.Minute
	keptEnd     = ".json"
	lockEnd     = ".lock"
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
	Looked time.Time         `json:"looked"`         // when the broker was last asked whether it lives
	Again  time.Time         `json:"again,omitzero"` // no sooner is its renewal tried again
	Secret map[string]string `json:"secret"`
}

// kept is a lease out of the file, with what is remembered of it there.
type kept struct {
	awsLease
	looked, again time.Time
}

// settled reports whether the lease can be printed with nobody asked: it was
// looked at a moment ago, and need not or cannot be renewed now.
func (k kept) settled(now time.Time) bool {
	return k.alive(now) && within(now, k.looked, awsLook) && (k.fresh(now) || within(now, k.again.Add(-awsKeptPause), awsKeptPause))
}

// within reports whether at lies less than span before now. What lies after it
// was written by a clock that has been set back, and counts for nothing.
func within(now, at time.Time, span time.Duration) bool {
	return !at.After(now) && now.Before(at.Add(span))
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
	dir := p.runtimeDir()
	if dir == "" {
		dir = p.getenv("XDG_CACHE_HOME")
	}
	if !filepath.IsAbs(dir) {
		home := p.getenv("HOME")
		if !filepath.IsAbs(home) {
			return "", usagef("there is no place to keep a lease: neither XDG_RUNTIME_DIR, XDG_CACHE_HOME nor HOME is set to an absolute path; use --no-cache")
		}
		dir = filepath.Join(home, ".cache")
	}
	above := filepath.Join(dir, "mayfly")
	dir = filepath.Join(above, "aws")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", fmt.Errorf("making a place to keep a lease: %w", err)
	}
	if err := ownDir(above, 0o022); err != nil { // who may write there can put another in the place of ours
		return "", err
	}
	return dir, ownDir(dir, 0o077)
}

// runtimeDir is XDG_RUNTIME_DIR; empty if it is not set, or not as its
// specification wants it. One of another user's, as sudo and su may leave it, would
// let them put their own files in the place of ours.
func (p *program) runtimeDir() string {
	dir := p.getenv("XDG_RUNTIME_DIR")
	if !filepath.IsAbs(dir) || ownDir(dir, 0o022) != nil {
		return ""
	}
	return dir
}

// ownDir refuses what is no directory of this user's, and one with a mode that
// has any of others' bits.
func ownDir(dir string, others fs.FileMode) error {
	info, err := os.Lstat(dir)
	switch {
	case err != nil:
		return fmt.Errorf("looking at the place to keep a lease: %w", err)
	case !info.IsDir() || !ownedByUs(info):
		return usagef("%s is not a directory of yours, and leases are not kept in others': remove it, or use --no-cache", dir)
	case info.Mode().Perm()&others != 0:
		return usagef("%s is not a directory of yours alone (mode %04o): remove it, or chmod 700 it", dir, info.Mode().Perm())
	}
	return nil
}

// lock waits until nobody else is about to renew the lease, for as long as a
// call may take. The lock ends with the process, however that ends. Who finds a
// lease meanwhile that is known to live does not wait: somebody else sees to it.
func (c awsCache) lock(ctx context.Context, limit time.Duration, now func() time.Time) (unlock func(), alive kept, err error) {
	tick := time.NewTicker(lockPause)
	defer tick.Stop()
	over := time.NewTimer(limit)
	defer over.Stop()
	for {
		unlock, taken, err := tryLock(c.lockPath())
		if err != nil || taken {
			return unlock, kept{}, err
		}
		if k, err := c.load(); err != nil || k.alive(now()) && within(now(), k.looked, awsLook) {
			return nil, k, err
		}
		select {
		case <-ctx.Done():
			return nil, kept{}, ctx.Err()
		case <-over.C:
			return nil, kept{}, &exitError{exitUnavailable, fmt.Errorf("another mayfly has been asking for this lease for %s, and has no answer: see whether the broker is well", limit)}
		case <-tick.C:
		}
	}
}

func (c awsCache) lockPath() string { return strings.TrimSuffix(c.path, keptEnd) + lockEnd }

// load reads the kept lease; the zero lease if there is none that can be used.
// A file that others could have read or written is refused.
func (c awsCache) load() (kept, error) {
	data, info, err := readOwn(c.path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return kept{}, nil
	case err != nil:
		return kept{}, fmt.Errorf("reading the kept lease: %w", err)
	case !oursAlone(info):
		return kept{}, usagef("%s is not yours alone (mode %04o), so that others may have its credential: revoke its lease and remove it", c.path, info.Mode().Perm())
	}
	var k keptLease
	if json.Unmarshal(data, &k) != nil || k.Key != c.key {
		return kept{}, nil // not one that we wrote for this; it is written anew
	}
	return kept{awsLease{ID: k.Lease, Made: k.Made, End: k.End, Secret: broker.NewSecret(k.Secret)}, k.Looked, k.Again}, nil
}

// keep puts a lease into the file that was prepared for it.
func (c awsCache) keep(f *secretFile, k kept) error {
	doc, err := json.Marshal(keptLease{Key: c.key, Lease: k.ID, Made: k.Made, End: k.End, Looked: k.looked, Again: k.again, Secret: k.Secret.RevealAll()})
	if err != nil {
		return err
	}
	return f.commit(doc)
}

// note writes down what has become known of a kept lease. What cannot be written
// is found out again by the next call.
func (c awsCache) note(k kept) {
	f, err := newSecretFile(c.path)
	if err != nil {
		return
	}
	defer f.abort()
	_ = c.keep(f, k) // see above
}

// forget removes the kept lease, and what a process that was killed has left. The
// caller holds the lock.
func (c awsCache) forget() {
	_ = os.Remove(c.path)                                                          // what stays is not printed either: its lease is over
	left, _ := filepath.Glob(filepath.Join(c.dir, "."+filepath.Base(c.path)+".*")) // the pattern is good
	for _, path := range left {
		_ = os.Remove(path) // as above
	}
}

// prune removes leases that have ended. What it cannot remove it leaves to the
// next call: their credentials are dead.
func (c awsCache) prune(now time.Time) {
	paths, _ := filepath.Glob(filepath.Join(c.dir, "*"+lockEnd)) // the pattern is good
	for _, path := range paths {
		if path != c.lockPath() {
			awsCache{dir: c.dir, path: strings.TrimSuffix(path, lockEnd) + keptEnd}.pruneOne(now)
		}
	}
}

func (c awsCache) pruneOne(now time.Time) {
	unlock, taken, err := tryLock(c.lockPath())
	if err != nil || !taken {
		return
	}
	defer unlock()
	if c.ended(now) {
		c.forget()
		_ = os.Remove(c.lockPath()) // see tryLock
	}
}

// ended reports whether the file has a lease that has ended, or is not there.
func (c awsCache) ended(now time.Time) bool {
	data, _, err := readOwn(c.path)
	if err != nil {
		return errors.Is(err, fs.ErrNotExist)
	}
	var k keptLease
	return json.Unmarshal(data, &k) == nil && now.After(k.End)
}
