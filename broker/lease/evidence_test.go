package lease_test

import (
	"context"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mayfly-security/mayfly/broker/audit"
	"github.com/mayfly-security/mayfly/store"
)

// witnessStore looks at the store after each commit.
type witnessStore struct {
	store.Store
	mu    sync.Mutex
	wrong []string
	seen  int // commits with something given in the store
}

func (w *witnessStore) wrap(s store.Store) store.Store { w.Store = s; return w }

func (w *witnessStore) Update(ctx context.Context, fn func(store.Txn) error) error {
	err := w.Store.Update(ctx, fn)
	if err == nil {
		err = w.Store.View(ctx, w.look)
	}
	return err
}

// look compares what was given with the evidence, in one snapshot.
func (w *witnessStore) look(r store.Reader) error {
	told := map[string]bool{}
	for entry, err := range r.Log(audit.Log, 0) {
		if err != nil {
			return err
		}
		ev, err := audit.Decode(entry.Seq, entry.Value)
		if err != nil {
			return err
		}
		switch ev.Type {
		case audit.GrantCreated:
			told["grant|"+string(ev.Grant)] = true
		case audit.IncidentOpened:
			told["incident|"+string(ev.Incident)] = true
		case audit.LeaseIntended:
			told["lease|"+string(ev.Lease)] = true
		case audit.LeaseActive:
			told["lease|"+string(ev.Lease)] = true
			told["active|"+string(ev.Lease)] = true
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for entry, err := range r.Scan("", "") {
		if err != nil {
			return err
		}
		kind, id, _ := strings.Cut(entry.Key, "|")
		var need string
		switch {
		case slices.Contains([]string{"grant", "incident", "lease"}, kind):
			need = entry.Key
		case kind == "due" && string(entry.Value) == "active":
			need = "active|" + id[strings.LastIndexByte(id, '|')+1:]
		default:
			continue
		}
		w.seen++
		if !told[need] && !slices.Contains(w.wrong, need) {
			w.wrong = append(w.wrong, need)
		}
	}
	return nil
}

// TestI6_OneCommit: there is no instant at which something is given and its
// evidence is not there.
func TestI6_OneCommit(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := &witnessStore{}
		r := newRig(t, func(r *rig) { r.wrap = w.wrap })
		r.open(time.Hour, tools...)
		for _, tool := range tools {
			r.grant(support, tool, time.Hour)
			r.mustIssue(tool, key(tool))
		}
		time.Sleep(20 * time.Minute)
		w.mu.Lock()
		defer w.mu.Unlock()
		if len(w.wrong) != 0 {
			t.Errorf("given before its evidence was there: %q", w.wrong)
		}
		if w.seen == 0 {
			t.Error("nothing was looked at")
		}
	})
}
