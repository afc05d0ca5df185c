package lease

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/store"
	"github.com/mayfly-security/mayfly/store/bolt"
)

// keeper is an engine that does nothing but read what its store has of leases.
func keeper(t testing.TB) *Engine {
	db, err := bolt.Open(filepath.Join(t.TempDir(), "store"), bolt.Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return &Engine{store: db, clock: newClock(time.Now, time.Now())}
}

// keep writes leases in these states, as their transitions do.
func (e *Engine) keep(t testing.TB, states ...broker.LeaseState) {
	now := time.Now()
	for part := range slices.Chunk(states, 20) {
		err := e.store.Update(t.Context(), func(txn store.Txn) error {
			for i, state := range part {
				l := &leaseRecord{
					Lease:  broker.Lease{ID: broker.NewLeaseID(now), Agent: spiffeid.RequireFromString("spiffe://acme.test/agent/a"), Tool: "crm.read", Provider: "aws", State: state, DiesAt: now.Add(time.Hour)},
					Handle: fmt.Appendf(nil, `{"v":1,"role":"arn:aws:iam::123456789012:role/mayfly/crm%d","session":"l%025d"}`, i, i), Stands: true,
				}
				if !state.Ended() {
					if err := moveDue(txn, l, now.Add(time.Hour)); err != nil {
						return err
					}
				} else if err := put(txn, keyLease(l.ID), l); err != nil {
					return err
				} else if err := standOn(txn, l, state); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}

// TestKnownBegun: those whose ending has begun are told alone, all of them.
func TestKnownBegun(t *testing.T) {
	e := keeper(t)
	e.keep(t, broker.LeaseMinting, broker.LeaseActive, broker.LeaseActive, broker.LeaseRevoking, broker.LeaseRevoking, broker.LeaseRevoked)
	all, err := e.known(t.Context(), "aws", false)
	if err != nil || len(all) != 6 {
		t.Fatalf("%d leases, %v", len(all), err)
	}
	begun, err := e.known(t.Context(), "aws", true)
	if err != nil || len(begun) != 3 {
		t.Fatalf("%d leases, %v", len(begun), err)
	}
	want := slices.DeleteFunc(all, func(k providers.Known) bool { return !k.Begun })
	if diff := cmp.Diff(want, begun); diff != "" {
		t.Errorf("-of all +alone:\n%s", diff)
	}
}

// BenchmarkKnown: what it costs to read which leases of a provider must be
// denied, with 20,000 that are open and 200 that are being ended.
func BenchmarkKnown(b *testing.B) {
	e := keeper(b)
	e.keep(b, append(slices.Repeat([]broker.LeaseState{broker.LeaseActive}, 20_000), slices.Repeat([]broker.LeaseState{broker.LeaseRevoking}, 200)...)...)
	for name, only := range map[string]bool{"all": false, "begun": true} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				if all, err := e.known(b.Context(), "aws", only); err != nil || len(all) < 200 {
					b.Fatalf("%d: %v", len(all), err)
				}
			}
		})
	}
}

// deaf is a store that can be read, and not written.
type deaf struct{ store.Store }

func (deaf) Update(context.Context, func(store.Txn) error) error {
	return errors.New("the disk is full")
}

// TestKnownUnwritten: who must be denied is told though what need not be any
// more cannot be taken out of the store.
func TestKnownUnwritten(t *testing.T) {
	e := keeper(t)
	e.log = slog.New(slog.DiscardHandler)
	e.keep(t, broker.LeaseRevoked, broker.LeaseRevoking)
	e.clock.base = e.clock.base.Add(2 * time.Hour) // what has ended is dead by itself
	e.clock.wall = func() time.Time { return time.Now().Add(2 * time.Hour) }
	e.store = deaf{e.store}
	if all, err := e.known(t.Context(), "aws", true); err != nil || len(all) != 1 {
		t.Errorf("%d leases, %v", len(all), err)
	}
}
