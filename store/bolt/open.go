package bolt

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"
	"time"

	"go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"

	"github.com/mayfly-security/mayfly/store"
)

// The file's buckets. Logs lie at the top, and not in a bucket of their own,
// because a level more is a page more to write at every commit.
var (
	metaBucket = []byte("meta") // formatKey: the format's number in decimal
	keysBucket = []byte("keys")
	formatKey  = []byte("format")
)

const (
	logPrefix = "log/" // then the log's name; its keys are big-endian sequence numbers

	// format is the newest format that this code reads, and the one it writes.
	format = 1
)

const (
	mode            = 0o600
	defaultLockWait = time.Second
	defaultMmapSize = 16 << 30
)

// Open opens the store in the file at path and creates it, with mode 0600, if
// it is not there. The directory must exist.
//
// The error is store.ErrInUse if another process has the file open,
// store.ErrNewer if a newer Mayfly wrote it, and store.ErrUnavailable if the
// disk is full or the file cannot be written.
func Open(path string, config Config) (*DB, error) {
	if err := checkFile(path); err != nil {
		return nil, fmt.Errorf("opening store %s: %w", path, err)
	}
	bolt, err := openBolt(path, config)
	if err != nil {
		return nil, fmt.Errorf("opening store %s: %w", path, err)
	}
	if err := checkMetas(path); err != nil { // now that nobody else can be writing it
		return nil, errors.Join(fmt.Errorf("opening store %s: %w", path, err), bolt.Close())
	}
	db := &DB{path: path, bolt: bolt, closed: make(chan struct{}), commit: (*bbolt.Tx).Commit}
	if err := db.prepare(); err != nil {
		return nil, errors.Join(fmt.Errorf("opening store %s: %w", path, err), db.Close())
	}
	return db, nil
}

// checkFile looks for what bbolt would not tell, or not clearly.
func checkFile(path string) error {
	if path == "" {
		return errors.New("no path is given")
	}
	dir := filepath.Dir(path)
	if info, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("its directory does not exist: create %s with mode 0700, owned by the user that runs Mayfly: %w", dir, err)
	} else if err != nil {
		return err
	} else if !info.IsDir() {
		return fmt.Errorf("%s is not a directory", dir)
	}
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return errors.New("it is not a regular file")
	}
	// Who can write the store can make grants. The group is let be: Kubernetes
	// (fsGroup) gives it access to every file of a volume.
	if runtime.GOOS != "windows" && info.Mode().Perm()&0o007 != 0 {
		return fmt.Errorf("every user of the machine may use it (mode %04o): run chmod 600 %s", info.Mode().Perm(), path)
	}
	return nil
}

func openBolt(path string, config Config) (*bbolt.DB, error) {
	return openBoltWith(path, options(config))
}

func openBoltWith(path string, opts *bbolt.Options) (db *bbolt.DB, err error) {
	// bbolt panics on some damage, and a file that was cut short faults when
	// its mapping is read.
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil { // the file stays locked until the process ends
			db, err = nil, damaged(p)
		}
	}()
	db, err = bbolt.Open(path, mode, opts)
	switch {
	case errors.Is(err, berrors.ErrTimeout):
		return nil, fmt.Errorf("%w: one file serves one broker; stop the other process first", store.ErrInUse)
	case errors.Is(err, berrors.ErrInvalid), errors.Is(err, berrors.ErrChecksum), errors.Is(err, berrors.ErrVersionMismatch),
		err != nil && strings.Contains(err.Error(), "file size too small"): // it has no name
		return nil, damaged(err)
	case unwritable(err):
		return nil, fmt.Errorf("%w: %w", store.ErrUnavailable, err)
	}
	return db, err
}

func damaged(cause any) error {
	return fmt.Errorf("it is damaged, or not a store of Mayfly (%v): restore a backup, or give another path", cause)
}

func unwritable(err error) bool {
	for _, e := range []error{fs.ErrPermission, syscall.EROFS, syscall.ENOSPC, syscall.EDQUOT, syscall.EFBIG, syscall.EIO} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

func options(config Config) *bbolt.Options {
	wait := config.LockWait
	switch {
	case wait == 0:
		wait = defaultLockWait
	case wait < 0:
		wait = 1 // bbolt takes 0 as for ever, and gives up after one try on less than its interval of 50 ms
	}
	size := config.MmapSize
	if size == 0 && strconv.IntSize == 64 && runtime.GOOS != "windows" { // there bbolt makes the file as large as the map
		size = defaultMmapSize & (1<<(strconv.IntSize-1) - 1)
	}
	return &bbolt.Options{
		Timeout:         wait,
		InitialMmapSize: size,
		// The map of free spans does not slow down when the file is large and
		// fragmented, as the array does.
		FreelistType: bbolt.FreelistMapType,
		// The list of free pages is written at each commit. Without it a start,
		// and the recovery from a full disk, would read the whole file.
		NoFreelistSync: false,
		// Statistics cost every View a lock, and nobody reads them.
		NoStatistics: true,
	}
}

// prepare makes what was found durable, and brings the file to the format that
// this code works with.
func (db *DB) prepare() (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = damaged(p)
		}
	}()
	// The process before may have died between writing and syncing the meta
	// page. What is in the kernel's memory must be on the disk before the
	// next commit writes over pages that the older meta page still needs.
	if err := db.bolt.Sync(); err != nil {
		return fmt.Errorf("%w: syncing: %w", store.ErrUnavailable, err)
	}
	empty, err := db.inspect()
	if err != nil || !empty {
		return err
	}
	err = db.bolt.Update(func(tx *bbolt.Tx) error {
		meta, err := tx.CreateBucket(metaBucket)
		if err != nil {
			return err
		}
		if _, err := tx.CreateBucket(keysBucket); err != nil {
			return err
		}
		return meta.Put(formatKey, strconv.AppendInt(nil, format, 10))
	})
	if err != nil {
		return fmt.Errorf("%w: creating it: %w", store.ErrUnavailable, err)
	}
	if err := syncDir(filepath.Dir(db.path)); err != nil {
		return fmt.Errorf("%w: syncing its directory: %w", store.ErrUnavailable, err)
	}
	return nil
}

// inspect reports whether the file is as bbolt made it, with nothing in it,
// and refuses one that is not for this code.
func (db *DB) inspect() (empty bool, err error) {
	err = db.bolt.View(func(tx *bbolt.Tx) error {
		info, err := os.Stat(db.path)
		if err != nil {
			return err
		}
		if info.Size() < tx.Size() {
			return damaged(fmt.Sprintf("it has %d bytes of %d", info.Size(), tx.Size()))
		}
		if k, _ := tx.Cursor().First(); k == nil {
			empty = true
			return nil
		}
		meta := tx.Bucket(metaBucket)
		if meta == nil {
			return damaged("it has no format")
		}
		n, err := strconv.Atoi(string(meta.Get(formatKey)))
		if err != nil || n < 1 {
			return damaged(fmt.Sprintf("its format is %q", meta.Get(formatKey)))
		}
		if n > format {
			return fmt.Errorf("%w: it has format %d and this Mayfly reads up to %d: run the newer version again, or restore a backup made before the upgrade", store.ErrNewer, n, format)
		}
		if tx.Bucket(keysBucket) == nil {
			return damaged("it has no keys")
		}
		if info.Size() <= checkedAtOpen {
			if err := verify(tx); err != nil {
				return damaged(err)
			}
		}
		return tx.ForEach(func(name []byte, b *bbolt.Bucket) error {
			if b == nil || !(bytes.Equal(name, metaBucket) || bytes.Equal(name, keysBucket) || strings.HasPrefix(string(name), logPrefix)) {
				return damaged(fmt.Sprintf("it has an unknown part %q", name))
			}
			return nil
		})
	})
	return empty, err
}
