package bolt

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"os"
	"runtime/debug"

	"go.etcd.io/bbolt"

	"github.com/mayfly-security/mayfly/store"
)

// checkedAtOpen is the size of the largest file that is read whole when it is
// opened, to find damage before anything is decided by what is left. A larger
// one would keep the broker from starting for too long: its damage is found
// when it is read, or by DB.Check.
const checkedAtOpen = 256 << 20

// metaFields and metaSize are what bbolt's meta page has after the page's
// header: the fields that the checksum is of, and with it.
const (
	pageHeader = 16
	metaFields = 56
	metaSize   = metaFields + 8
	metaMagic  = 0xED0CDAED
)

// checkMetas refuses a file of which one of the two meta pages is damaged.
// bbolt would go on with the other, which may be of the commit before: a
// change that was acknowledged, such as the end of a grant, would be undone and
// nobody told. A stop cannot leave such a page: what counts of it lies in the
// one sector that its write begins with.
func checkMetas(path string) error {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return nil // bbolt tells
	}
	defer f.Close()
	first, size := readMeta(f, 0)
	if size == 0 { // where the second is, only the first tells
		for try := int64(1 << 10); try <= 64<<10 && size == 0; try <<= 1 {
			if _, its := readMeta(f, try); its == try {
				size = its
			}
		}
	}
	if size == 0 {
		return nil // empty, or no store: bbolt tells
	}
	if second, _ := readMeta(f, size); first == second {
		return nil
	}
	return errors.New("it is damaged: one of its two first pages is not whole, so that the last change may be missing: " +
		"restore a backup, or back this file up and restore that, which ends everything that it gave")
}

// readMeta reports whether there is a whole meta page at an offset, and the
// file's page size if it is.
func readMeta(f io.ReaderAt, at int64) (whole bool, pageSize int64) {
	b := make([]byte, pageHeader+metaSize)
	if _, err := f.ReadAt(b, at); err != nil {
		return false, 0
	}
	m := b[pageHeader:]
	sum := fnv.New64a()
	sum.Write(m[:metaFields])
	if binary.NativeEndian.Uint32(m) != metaMagic || binary.NativeEndian.Uint64(m[metaFields:]) != sum.Sum64() {
		return false, 0
	}
	return true, int64(binary.NativeEndian.Uint32(m[8:]))
}

// verify reads everything, in this goroutine, whose faults are caught, and then
// has bbolt check the structure.
func verify(tx *bbolt.Tx) error {
	err := tx.ForEach(func(name []byte, b *bbolt.Bucket) error {
		var last []byte
		c := b.Cursor()
		for k, v := c.First(); k != nil; k, v = c.Next() {
			touch(k, v)
			if last != nil && bytes.Compare(last, k) >= 0 {
				return fmt.Errorf("the keys of %q are not in order", name)
			}
			last = k
		}
		return nil
	})
	if err != nil {
		return err
	}
	return check(tx)
}

// touch reads the ends of what bbolt says is in the file, so that what is not
// there faults here and not at the caller.
func touch(parts ...[]byte) (sum byte) {
	for _, p := range parts {
		if len(p) > 0 {
			sum += p[0] + p[len(p)-1]
		}
	}
	return sum
}

// guard turns a panic of bbolt, or a fault of the mapped file, into an error:
// some of the file is damaged. What is whole can still be read. It is deferred,
// with the result of debug.SetPanicOnFault(true).
func guard(path string, was bool, err *error) {
	p := recover()
	debug.SetPanicOnFault(was)
	if p != nil {
		*err = fmt.Errorf("%w: %s is damaged (%v): stop the broker and restore a backup", store.ErrUnavailable, path, p)
	}
}

// at moves a cursor: to the first key from seek on, or to the next one.
func (r *reader) at(c *bbolt.Cursor, seek []byte) (k, v []byte, err error) {
	defer guard(r.path, debug.SetPanicOnFault(true), &err)
	if seek != nil {
		k, v = c.Seek(seek)
	} else {
		k, v = c.Next()
	}
	touch(k, v)
	return k, v, nil
}

// lookUp returns a copy of a key's value.
func lookUp(path string, tx *bbolt.Tx, key string) (value []byte, ok bool, err error) {
	defer guard(path, debug.SetPanicOnFault(true), &err)
	v := tx.Bucket(keysBucket).Get([]byte(key))
	return bytes.Clone(v), v != nil, nil
}
