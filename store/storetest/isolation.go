package storetest

import (
	"errors"
	"fmt"
	"strconv"
	"sync"
	"testing"

	"github.com/mayfly-security/mayfly/store"
)

// number reads a key as a number; 0 if it is not there.
func number(g interface {
	Get(string) ([]byte, bool, error)
}, key string) (int, error) {
	v, ok, err := g.Get(key)
	if err != nil || !ok {
		return 0, err
	}
	return strconv.Atoi(string(v))
}

func setNumber(tx store.Txn, key string, n int) error {
	return tx.Put(key, strconv.AppendInt(nil, int64(n), 10))
}

// together runs fn in n goroutines that begin at once, and waits for them.
func together(n int, fn func(i int)) {
	var wg sync.WaitGroup
	start := make(chan struct{})
	for i := range n {
		wg.Go(func() {
			<-start
			fn(i)
		})
	}
	close(start)
	wg.Wait()
}

// testLogOrder: the order of a log is the order of commits. Each transaction
// appends what it read from a counter.
func testLogOrder(t *testing.T, open Open) {
	const workers, each = 8, 15
	s := fresh(t, open)
	together(workers, func(w int) {
		for range each {
			update(t, s, func(tx store.Txn) error {
				n, err := number(tx, "n")
				if err != nil {
					return err
				}
				return errors.Join(
					tx.Append("log", fmt.Appendf(nil, "%d first", n)),
					tx.Append("other", fmt.Append(nil, w)),
					tx.Append("log", fmt.Appendf(nil, "%d second", n)),
					setNumber(tx, "n", n+1))
			})
		}
	})
	var want []string
	for n := range workers * each {
		want = append(want, fmt.Sprintf("%d first", n), fmt.Sprintf("%d second", n))
	}
	wantEntries(t, s, "log", want...)
	if got, _ := entries(t, s, "other", 0); len(got) != workers*each {
		t.Errorf("log other has %d entries, want %d", len(got), workers*each)
	}
}

// testSnapshot reads before and after an Update within one View.
func testSnapshot(t *testing.T, open Open) {
	s := fresh(t, open)
	put(t, s, "a", "1")
	put(t, s, "gone", "1")
	appendTo(t, s, "log", "1")
	read := func(r store.Reader) string {
		var out string
		for _, k := range []string{"a", "b", "gone"} {
			v, ok, err := r.Get(k)
			out += fmt.Sprintf("%s=%s %v %v; ", k, v, ok, err)
		}
		for e, err := range r.Scan("", "") {
			out += fmt.Sprintf("%s=%s %v; ", e.Key, e.Value, err)
		}
		for e, err := range r.Log("log", 0) {
			out += fmt.Sprintf("%s %v; ", e.Value, err)
		}
		return out
	}
	ready, changed := make(chan struct{}), make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		view(t, s, func(r store.Reader) error {
			before := read(r)
			close(ready)
			<-changed
			if after := read(r); after != before {
				t.Errorf("the snapshot was %q and is %q", before, after)
			}
			return nil
		})
	})
	<-ready
	for i := range 50 { // enough to use pages again, were they thought to be free
		update(t, s, func(tx store.Txn) error {
			return errors.Join(setNumber(tx, "a", i), tx.Put("b", make([]byte, 3000)), tx.Delete("gone"), tx.Append("log", []byte("2")))
		})
	}
	close(changed)
	wg.Wait()
}

func testViewSeesReturnedUpdates(t *testing.T, open Open) {
	s := fresh(t, open)
	together(8, func(w int) {
		key := strconv.Itoa(w)
		for i := range 20 {
			update(t, s, func(tx store.Txn) error { return setNumber(tx, key, i) })
			view(t, s, func(r store.Reader) error {
				n, err := number(r, key)
				if n != i {
					t.Errorf("View sees %d after Update of %d", n, i)
				}
				return err
			})
		}
	})
}

// testIncrements loses no increment, and no View sees half of a transfer.
func testIncrements(t *testing.T, open Open) {
	const workers, each = 8, 25
	s := fresh(t, open)
	stop := make(chan struct{})
	var readers sync.WaitGroup
	for range 2 {
		readers.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				view(t, s, func(r store.Reader) error {
					up, err1 := number(r, "up")
					down, err2 := number(r, "down")
					if up+down != 0 {
						t.Errorf("View sees up %d and down %d", up, down)
					}
					return errors.Join(err1, err2)
				})
			}
		})
	}
	together(workers, func(int) {
		for range each {
			update(t, s, func(tx store.Txn) error {
				up, err1 := number(tx, "up")
				down, err2 := number(tx, "down")
				return errors.Join(err1, err2, setNumber(tx, "up", up+1), setNumber(tx, "down", down-1))
			})
		}
	})
	close(stop)
	readers.Wait()
	wantContents(t, s, map[string]string{"up": strconv.Itoa(workers * each), "down": strconv.Itoa(-workers * each)})
}

// testWriteSkew: each of two may leave while the other stays. Snapshot
// isolation lets both leave.
func testWriteSkew(t *testing.T, open Open) {
	s := fresh(t, open)
	errAlone := errors.New("the other has left")
	for round := range 30 {
		left := make([]error, 2)
		together(2, func(i int) {
			me, other := fmt.Sprintf("%d/%d", round, i), fmt.Sprintf("%d/%d", round, 1-i)
			left[i] = s.Update(t.Context(), func(tx store.Txn) error {
				if _, gone, err := tx.Get(other); err != nil || gone {
					return errors.Join(err, errAlone)
				}
				return tx.Put(me, nil)
			})
		})
		if (left[0] == nil) == (left[1] == nil) {
			t.Fatalf("round %d: leaving gave %v and %v, want exactly one to leave", round, left[0], left[1])
		}
	}
}

// testGuardKey is how the engine closes an incident: after one write on the
// guard has returned, nothing that reads the guard is given any more.
func testGuardKey(t *testing.T, open Open) {
	s := fresh(t, open)
	errClosed := errors.New("closed")
	for round := range 10 {
		guard, given := fmt.Sprintf("guard/%d", round), fmt.Sprintf("given/%d", round)
		var atClose, atEnd int
		together(5, func(i int) {
			if i == 0 {
				update(t, s, func(tx store.Txn) error { return tx.Put(guard, nil) })
				view(t, s, func(r store.Reader) (err error) { atClose, err = number(r, given); return err })
				return
			}
			for range 5 {
				err := s.Update(t.Context(), func(tx store.Txn) error {
					if _, closed, err := tx.Get(guard); err != nil || closed {
						return errors.Join(err, errClosed)
					}
					n, err := number(tx, given)
					return errors.Join(err, setNumber(tx, given, n+1))
				})
				if err != nil && !errors.Is(err, errClosed) {
					t.Errorf("Update: %v", err)
				}
			}
		})
		view(t, s, func(r store.Reader) (err error) { atEnd, err = number(r, given); return err })
		if atEnd != atClose {
			t.Errorf("round %d: %d were given when close had returned, and %d in the end", round, atClose, atEnd)
		}
	}
}
