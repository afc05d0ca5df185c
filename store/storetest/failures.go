package storetest

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"testing"

	"github.com/mayfly-security/mayfly/store"
)

func testErrorRollsBackOnlyItself(t *testing.T, open Open) {
	s := fresh(t, open)
	want := make(map[string]string)
	for round := range 5 {
		const callers = 32
		errs, results := make([]error, callers), make([]error, callers)
		for i := range callers {
			if i%2 == 1 {
				errs[i] = fmt.Errorf("error of %d", i)
			} else {
				want[fmt.Sprintf("%d/%d", round, i)] = "kept"
			}
		}
		together(callers, func(i int) {
			results[i] = s.Update(t.Context(), func(tx store.Txn) error {
				return errors.Join(
					tx.Put(fmt.Sprintf("%d/%d", round, i), []byte("kept")),
					tx.Append("log", fmt.Append(nil, i)),
					errs[i])
			})
		})
		for i, err := range results {
			if !errors.Is(err, errs[i]) {
				t.Errorf("caller %d got %v, want its own %v", i, err, errs[i])
			}
		}
	}
	wantContents(t, s, want)
	if got, _ := entries(t, s, "log", 0); len(got) != len(want) {
		t.Errorf("the log has %d entries, want %d: those of the callers without an error", len(got), len(want))
	}

	put(t, s, "k", "before")
	s.Update(t.Context(), func(tx store.Txn) error {
		return errors.Join(tx.Delete("k"), errors.New("no"))
	})
	if got := contents(t, s)["k"]; got != "before" {
		t.Errorf("a key deleted by a refused Update is %q", got)
	}
}

func testPanicRollsBackOnlyItself(t *testing.T, open Open) {
	s := fresh(t, open)
	const callers = 16
	panics := make([]any, callers)
	together(callers, func(i int) {
		defer func() { panics[i] = recover() }()
		update(t, s, func(tx store.Txn) error {
			err := tx.Put(fmt.Sprint(i), nil)
			if i%2 == 1 {
				panic(i)
			}
			return err
		})
	})
	want := make(map[string]string)
	for i, p := range panics {
		switch {
		case i%2 == 0 && p == nil:
			want[fmt.Sprint(i)] = ""
		case i%2 == 0 || p != i:
			t.Errorf("caller %d panicked with %v", i, p)
		}
	}
	wantContents(t, s, want)

	func() {
		defer func() { recover() }()
		view(t, s, func(store.Reader) error { panic("in View") })
	}()
	put(t, s, "after", "") // nothing is left locked
	wantError := errors.New("mine")
	if err := s.View(t.Context(), func(store.Reader) error { return wantError }); err != wantError {
		t.Errorf("View = %v, want its function's error", err)
	}
}

func testContext(t *testing.T, open Open) {
	s := fresh(t, open)
	over, cancel := context.WithCancel(t.Context())
	cancel()
	err := s.Update(over, func(tx store.Txn) error { return tx.Put("k", nil) })
	if !errors.Is(err, context.Canceled) {
		t.Errorf("Update with a context that is over = %v, want %v", err, context.Canceled)
	}
	if err := s.View(over, func(store.Reader) error { return nil }); !errors.Is(err, context.Canceled) {
		t.Errorf("View with a context that is over = %v, want %v", err, context.Canceled)
	}
	wantContents(t, s, map[string]string{})

	// Once fn has run, the commit is awaited.
	during, cancel := context.WithCancel(t.Context())
	defer cancel()
	err = s.Update(during, func(tx store.Txn) error {
		defer cancel()
		return tx.Put("k", nil)
	})
	if err != nil {
		t.Errorf("Update whose context ended in its function = %v, want it to be committed", err)
	}
	wantContents(t, s, map[string]string{"k": ""})

	// Whoever is cancelled while it waits has done all or nothing, and says which.
	for round := range 20 {
		ctx, cancel := context.WithCancel(t.Context())
		errs := make([]error, 8)
		together(len(errs)+1, func(i int) {
			if i == len(errs) {
				cancel()
				return
			}
			errs[i] = s.Update(ctx, func(tx store.Txn) error { return tx.Put(fmt.Sprintf("%d/%d", round, i), nil) })
		})
		got := contents(t, s)
		for i, err := range errs {
			_, there := got[fmt.Sprintf("%d/%d", round, i)]
			if there != (err == nil) || err != nil && !errors.Is(err, context.Canceled) {
				t.Errorf("round %d: Update = %v, and its key is there: %v", round, err, there)
			}
		}
	}
}

// testAfterItsFunction: who keeps a transaction or a snapshot gets errors.
func testAfterItsFunction(t *testing.T, open Open) {
	s := fresh(t, open)
	var tx store.Txn
	update(t, s, func(given store.Txn) error { tx = given; return tx.Put("k", []byte("v")) })
	var r store.Reader
	view(t, s, func(given store.Reader) error { r = given; return nil })

	_, _, errGet := tx.Get("k")
	_, _, errRead := r.Get("k")
	var errScan, errLog error
	for _, err := range r.Scan("", "") {
		errScan = err
	}
	for _, err := range r.Log("log", 0) {
		errLog = err
	}
	for what, err := range map[string]error{
		"Get": errGet, "Put": tx.Put("k", nil), "Delete": tx.Delete("k"), "Append": tx.Append("log", nil),
		"Get in View": errRead, "Scan": errScan, "Log": errLog,
	} {
		if err == nil {
			t.Errorf("%s worked after its function had returned", what)
		}
	}
	wantContents(t, s, map[string]string{"k": "v"})
	wantEntries(t, s, "log")
}

func testClose(t *testing.T, open Open) {
	s := open(t, t.TempDir())
	put(t, s, "k", "v")
	for range 2 {
		if err := s.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	}
	if err := s.View(t.Context(), func(store.Reader) error { return nil }); !errors.Is(err, store.ErrClosed) {
		t.Errorf("View after Close = %v, want %v", err, store.ErrClosed)
	}
	if err := s.Update(t.Context(), func(store.Txn) error { return nil }); !errors.Is(err, store.ErrClosed) {
		t.Errorf("Update after Close = %v, want %v", err, store.ErrClosed)
	}
}

// testCloseWaits for a View and an Update that run.
func testCloseWaits(t *testing.T, open Open) {
	dir := t.TempDir()
	s := open(t, dir)
	put(t, s, "k", "v")
	running, goOn := make(chan struct{}, 2), make(chan struct{})
	errs := make(chan error, 2)
	go func() {
		errs <- s.View(t.Context(), func(r store.Reader) error {
			running <- struct{}{}
			<-goOn
			v, _, err := r.Get("k")
			if string(v) != "v" {
				err = errors.Join(err, fmt.Errorf("reading %q in a View while Close waits", v))
			}
			return err
		})
	}()
	go func() {
		once := running
		errs <- s.Update(t.Context(), func(tx store.Txn) error {
			if once != nil { // it may run again
				once <- struct{}{}
				once = nil
			}
			<-goOn
			return tx.Put("last", nil)
		})
	}()
	<-running
	<-running
	closed := make(chan error, 1)
	go func() { closed <- s.Close() }()
	for { // until Close has begun
		err := s.View(t.Context(), func(store.Reader) error { return nil })
		if errors.Is(err, store.ErrClosed) {
			break
		}
		if err != nil {
			t.Fatalf("View: %v", err)
		}
		runtime.Gosched()
	}
	select {
	case err := <-closed:
		t.Errorf("Close returned %v while calls ran", err)
	default:
	}
	close(goOn)
	for range 2 {
		if err := <-errs; err != nil {
			t.Errorf("a call that ran when Close was called: %v", err)
		}
	}
	if err := <-closed; err != nil {
		t.Errorf("Close: %v", err)
	}
	s = open(t, dir)
	defer s.Close()
	wantContents(t, s, map[string]string{"k": "v", "last": ""})
}

func testReopen(t *testing.T, open Open) {
	dir := t.TempDir()
	var last uint64
	for round := range 4 {
		s := open(t, dir)
		want := make(map[string]string)
		var log []string
		for i := range round {
			want[fmt.Sprint(i)] = fmt.Sprint("value ", i)
			log = append(log, fmt.Sprint("entry ", i))
		}
		wantContents(t, s, want)
		wantEntries(t, s, "log", log...)
		put(t, s, fmt.Sprint(round), fmt.Sprint("value ", round))
		appendTo(t, s, "log", fmt.Sprint("entry ", round))
		put(t, s, "deleted", "")
		update(t, s, func(tx store.Txn) error { return tx.Delete("deleted") })
		_, numbers := entries(t, s, "log", last)
		if len(numbers) != 1 {
			t.Errorf("round %d: %d entries after %d, want 1", round, len(numbers), last)
		} else {
			last = numbers[0]
		}
		checkWhole(t, s)
		if err := s.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	}
}
