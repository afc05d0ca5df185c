package bolt

import (
	"context"
	"encoding/binary"
	"fmt"
	"iter"
	"math"
	"runtime/debug"

	"go.etcd.io/bbolt"

	"github.com/mayfly-security/mayfly/store"
)

// ctxEvery is after how many entries a scan looks whether ctx is done.
const ctxEvery = 256

// View implements store.Store. The values that Scan and Log yield lie in the
// mapped file: they must not be changed (that is a fault which ends the
// process), and must be copied to be kept. ctx also ends scans.
func (db *DB) View(ctx context.Context, fn func(store.Reader) error) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("reading the store: %w", err)
	}
	if err := db.enter(); err != nil {
		return err
	}
	defer db.leave()
	tx, err := db.bolt.Begin(false)
	if err != nil {
		return fmt.Errorf("%w: beginning a snapshot of %s: %w", store.ErrUnavailable, db.path, err)
	}
	defer tx.Rollback()
	r := &reader{ctx: ctx, tx: tx, path: db.path}
	defer func() { r.tx = nil }()
	return fn(r)
}

// reader is a snapshot. tx is nil after the View has ended.
type reader struct {
	ctx  context.Context
	tx   *bbolt.Tx
	path string
}

func (r *reader) Get(key string) ([]byte, bool, error) {
	if r.tx == nil {
		return nil, false, fmt.Errorf("snapshot %w", errDone)
	}
	if err := checkKey("key", key); err != nil {
		return nil, false, err
	}
	return lookUp(r.path, r.tx, key)
}

func (r *reader) Scan(from, to string) iter.Seq2[store.Entry, error] {
	return func(yield func(store.Entry, error) bool) {
		if r.tx == nil {
			yield(store.Entry{}, fmt.Errorf("snapshot %w", errDone))
			return
		}
		b, err := r.bucket(keysBucket)
		if err != nil {
			yield(store.Entry{}, err)
			return
		}
		err = r.walk(b, []byte(from), func(k, v []byte) bool {
			if to != "" && string(k) >= to {
				return false
			}
			return yield(store.Entry{Key: string(k), Value: v}, nil)
		})
		if err != nil {
			yield(store.Entry{}, fmt.Errorf("scanning keys: %w", err))
		}
	}
}

func (r *reader) Log(log string, after uint64) iter.Seq2[store.LogEntry, error] {
	return func(yield func(store.LogEntry, error) bool) {
		if r.tx == nil {
			yield(store.LogEntry{}, fmt.Errorf("snapshot %w", errDone))
			return
		}
		if err := checkKey("log name", log); err != nil {
			yield(store.LogEntry{}, err)
			return
		}
		b, err := r.bucket(logBucket(log))
		if err != nil {
			yield(store.LogEntry{}, err)
			return
		}
		if b == nil || after == math.MaxUint64 {
			return
		}
		err = r.walk(b, binary.BigEndian.AppendUint64(nil, after+1), func(k, v []byte) bool {
			return yield(store.LogEntry{Seq: binary.BigEndian.Uint64(k), Value: v}, nil)
		})
		if err != nil {
			yield(store.LogEntry{}, fmt.Errorf("reading log %q: %w", log, err))
		}
	}
}

func (r *reader) bucket(name []byte) (b *bbolt.Bucket, err error) {
	defer guard(r.path, debug.SetPanicOnFault(true), &err)
	return r.tx.Bucket(name), nil
}

// walk calls fn with each entry of b from the key from on, until fn returns
// false or ctx is done.
func (r *reader) walk(b *bbolt.Bucket, from []byte, fn func(k, v []byte) bool) error {
	c := b.Cursor()
	n := 0
	if from == nil {
		from = []byte{}
	}
	for {
		k, v, err := r.at(c, from)
		if err != nil || k == nil {
			return err
		}
		from = nil
		if n++; n%ctxEvery == 0 && r.ctx.Err() != nil {
			return r.ctx.Err()
		}
		if !fn(k, v) {
			return nil
		}
	}
}
