package bolt_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"testing"

	"go.etcd.io/bbolt"

	"github.com/mayfly-security/mayfly/store"
)

// BenchmarkUpdate compares Update with bbolt's Update and Batch. One operation
// is what the commit of a lease does: it reads a guard, writes a record and an
// index, and appends an event.
func BenchmarkUpdate(b *testing.B) {
	record := make([]byte, 400)
	for _, callers := range []int{1, 32, 256} {
		b.Run(fmt.Sprintf("callers=%d/store", callers), func(b *testing.B) {
			db := open(b, filepath.Join(b.TempDir(), "store.db"))
			spread(b, callers, func(i int) error {
				return db.Update(b.Context(), func(tx store.Txn) error {
					_, _, err := tx.Get("guard")
					return errors.Join(err,
						tx.Put(fmt.Sprintf("lease/%09d", i), record),
						tx.Put(fmt.Sprintf("expiry/%09d", i), nil),
						tx.Append("evidence", record))
				})
			})
		})
		for _, kind := range []string{"bbolt.Update", "bbolt.Batch"} {
			b.Run(fmt.Sprintf("callers=%d/%s", callers, kind), func(b *testing.B) {
				db := openPlain(b)
				run := db.Update
				if kind == "bbolt.Batch" {
					run = db.Batch
				}
				spread(b, callers, func(i int) error {
					return run(func(tx *bbolt.Tx) error {
						keys, log := tx.Bucket([]byte("keys")), tx.Bucket([]byte("log"))
						keys.Get([]byte("guard"))
						seq, err := log.NextSequence()
						return errors.Join(err,
							keys.Put(fmt.Appendf(nil, "lease/%09d", i), record),
							keys.Put(fmt.Appendf(nil, "expiry/%09d", i), nil),
							log.Put(binary.BigEndian.AppendUint64(nil, seq), record))
					})
				})
			})
		}
	}
}

func openPlain(b *testing.B) *bbolt.DB {
	b.Helper()
	db, err := bbolt.Open(filepath.Join(b.TempDir(), "plain.db"), 0o600, &bbolt.Options{
		FreelistType: bbolt.FreelistMapType, InitialMmapSize: 1 << 30, NoStatistics: true,
	})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { db.Close() })
	err = db.Update(func(tx *bbolt.Tx) error {
		_, err1 := tx.CreateBucket([]byte("keys"))
		_, err2 := tx.CreateBucket([]byte("log"))
		return errors.Join(err1, err2)
	})
	if err != nil {
		b.Fatal(err)
	}
	return db
}

// spread runs fn b.N times in so many goroutines, each of which waits for one
// call before it makes the next.
func spread(b *testing.B, callers int, fn func(i int) error) {
	b.Helper()
	var wg sync.WaitGroup
	next := make(chan int)
	for range callers {
		wg.Go(func() {
			for i := range next {
				if err := fn(i); err != nil {
					b.Error(err)
				}
			}
		})
	}
	b.ResetTimer()
	for i := range b.N {
		next <- i
	}
	close(next)
	wg.Wait()
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "ops/s")
}

// BenchmarkView reads one key, with nobody writing and with writers at work.
func BenchmarkView(b *testing.B) {
	for _, writers := range []int{0, 32} {
		b.Run(fmt.Sprintf("writers=%d", writers), func(b *testing.B) {
			db := open(b, filepath.Join(b.TempDir(), "store.db"))
			put(b, db, "k", "v")
			stop := make(chan struct{})
			var wg sync.WaitGroup
			for w := range writers {
				wg.Go(func() {
					for i := 0; ; i++ {
						select {
						case <-stop:
							return
						default:
							put(b, db, fmt.Sprint(w, i), "v")
						}
					}
				})
			}
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					if get(b, db, "k") != "v" {
						b.Error("the value is lost")
					}
				}
			})
			close(stop)
			wg.Wait()
		})
	}
}

// BenchmarkOpen opens a store of 100,000 records of a kilobyte.
func BenchmarkOpen(b *testing.B) {
	path := filepath.Join(b.TempDir(), "store.db")
	db := open(b, path)
	for i := range 1000 {
		err := db.Update(b.Context(), func(tx store.Txn) error {
			var errs []error
			for j := range 100 {
				errs = append(errs, tx.Put(fmt.Sprintf("%d/%d", j, i), make([]byte, 1000)))
			}
			return errors.Join(errs...)
		})
		if err != nil {
			b.Fatal(err)
		}
	}
	db.Close()
	for b.Loop() {
		open(b, path).Close()
	}
}
