package bolt

import (
	"bytes"
	"encoding/binary"
	"fmt"

	"go.etcd.io/bbolt"

	"github.com/mayfly-security/mayfly/store"
)

// txn is one caller's part of a batch. It keeps its writes to itself until fn
// has returned without an error; throwing them away undoes nothing.
type txn struct {
	tx      *bbolt.Tx
	path    string
	ops     int
	bytes   int
	writes  map[string][]byte // nil means deleted; an empty value is not nil
	appends []appended
	err     error // the first failure; it stays, so that fn cannot overlook it
	done    bool
}

type appended struct {
	log   string
	value []byte
}

func (t *txn) run(fn func(store.Txn) error) error {
	defer func() { t.done = true }()
	if err := fn(t); err != nil {
		return err
	}
	return t.err
}

func (t *txn) wrote() bool { return len(t.writes) > 0 || len(t.appends) > 0 }

func (t *txn) Get(key string) ([]byte, bool, error) {
	if err := t.op("key", key, nil); err != nil {
		return nil, false, err
	}
	v, ok := t.writes[key]
	if !ok {
		v, ok, err := lookUp(t.path, t.tx, key)
		if err != nil {
			t.err = err
		}
		return v, ok, err
	}
	return bytes.Clone(v), v != nil, nil
}

func (t *txn) Put(key string, value []byte) error {
	if err := t.op("key", key, value); err != nil {
		return err
	}
	t.set(key, copyOf(value))
	return nil
}

func (t *txn) Delete(key string) error {
	if err := t.op("key", key, nil); err != nil {
		return err
	}
	t.set(key, nil)
	return nil
}

func (t *txn) Append(log string, value []byte) error {
	if err := t.op("log name", log, value); err != nil {
		return err
	}
	t.appends = append(t.appends, appended{log, copyOf(value)})
	return nil
}

// op counts one operation and checks it against the limits.
func (t *txn) op(kind, key string, value []byte) error {
	if t.done {
		return fmt.Errorf("transaction %w", errDone)
	}
	if t.err != nil {
		return t.err
	}
	t.ops++
	t.bytes += len(key) + len(value)
	t.err = checkKey(kind, key)
	switch {
	case t.err != nil:
	case len(value) > store.MaxValue:
		t.err = fmt.Errorf("%w: value of %d bytes; it must have %d at most", store.ErrLimit, len(value), store.MaxValue)
	case t.ops > store.MaxOps:
		t.err = fmt.Errorf("%w: more than %d operations in one transaction", store.ErrLimit, store.MaxOps)
	}
	return t.err
}

func (t *txn) set(key string, value []byte) {
	if t.writes == nil {
		t.writes = make(map[string][]byte)
	}
	t.writes[key] = value
}

// apply brings the writes into the bbolt transaction. After an error that is
// half changed.
func (t *txn) apply() error {
	keys := t.tx.Bucket(keysBucket)
	for k, v := range t.writes {
		var err error
		if v == nil {
			err = keys.Delete([]byte(k))
		} else {
			err = keys.Put([]byte(k), v)
		}
		if err != nil {
			return fmt.Errorf("writing a key: %w", err)
		}
	}
	for _, a := range t.appends {
		if err := t.applyAppend(a); err != nil {
			return fmt.Errorf("appending to log %q: %w", a.log, err)
		}
	}
	return nil
}

func (t *txn) applyAppend(a appended) error {
	b, err := t.tx.CreateBucketIfNotExists(logBucket(a.log))
	if err != nil {
		return err
	}
	// Entries come at the end only, so pages are filled instead of left half
	// empty for what will never come between.
	b.FillPercent = 1
	seq, err := b.NextSequence()
	if err != nil {
		return err
	}
	return b.Put(binary.BigEndian.AppendUint64(nil, seq), a.value)
}

func logBucket(log string) []byte { return []byte(logPrefix + log) }

// copyOf never returns nil: bbolt could not tell a nil value from an absent
// key before the commit.
func copyOf(value []byte) []byte { return append([]byte{}, value...) }
