package lease

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/store"
)

// What is forgotten once it ended long ago, as it stands in the store's keys.
// Leases are, too (house.go).
const (
	retiredRequest  = "request"
	retiredGrant    = "grant"
	retiredIncident = "incident"
	retiredIdem     = "key" // an idempotency key that made one of these; the value is where it stands
)

// longestKey is how long after it was used an idempotency key may stand for
// something that has not ended: a request that waits, and then its grant.
const longestKey = 2 * maxGrant

const (
	retirePage  = 256
	retireChunk = 24 // one takes up to five operations
)

// retire removes the records of requests, grants and incidents that ended
// longer ago than the retention, by the earlier clock. Their evidence stays. It
// does a page, and says whether there may be more: what must end goes first.
func (e *Engine) retire(ctx context.Context) (more bool, err error) {
	before := e.clock.early().Add(-e.cfg.Retention)
	var old []store.Entry
	held := map[string]bool{} // keys of grants that have leases still
	err = e.store.View(ctx, func(r store.Reader) error {
		old = old[:0]
		clear(held)
		for entry, err := range r.Scan(prefixEnded, prefixEnded+keyTime(before)) {
			if err != nil {
				return err
			}
			if strings.Contains(entry.Key, "|"+retiredGrant+"|") {
				for _, err := range r.Scan(store.Prefix(prefixOpen(broker.GrantID(lastPart(entry.Key))))) {
					if err != nil {
						return err
					}
					held[entry.Key] = true
					break
				}
			}
			if old = append(old, entry); len(old) == retirePage {
				break
			}
		}
		return nil
	})
	if err != nil {
		return false, err
	}
	now := e.clock.now()
	for part := range slices.Chunk(old, retireChunk) {
		err := e.update(ctx, now, func(t store.Txn) error {
			for _, entry := range part {
				if err := retire(t, entry, held[entry.Key], before, now); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return false, err
		}
	}
	return len(old) == retirePage, nil
}

// retire forgets one thing that ended before then. A grant that has leases still
// is looked at again when the retention is over once more; a request for as long
// as there is its grant, and an incident until all of it was told of its close.
func retire(t store.Txn, entry store.Entry, held bool, before, now time.Time) error {
	if err := t.Delete(entry.Key); err != nil {
		return err
	}
	parts := strings.Split(entry.Key, "|")
	if len(parts) != 4 {
		return fmt.Errorf("the key %q of what has ended is malformed", entry.Key)
	}
	switch kind, id := parts[2], parts[3]; kind {
	case retiredRequest:
		rec, ok, err := get[requestRecord](t, keyRequest(broker.RequestID(id)))
		if err != nil || !ok || rec.State == broker.RequestPending {
			return err
		}
		if rec.Grant != "" {
			g, kept, err := get[broker.Grant](t, keyGrant(rec.Grant))
			if err != nil {
				return err
			}
			if kept {
				at := g.EndedAt
				if g.State == broker.GrantOpen {
					at = g.NotAfter
				}
				if !at.After(before) {
					at = now
				}
				return t.Put(keyEnded(at, retiredRequest, id), nil)
			}
		}
		if err := t.Delete(keyRequestOf(rec.Agent, rec.ID)); err != nil {
			return err
		}
		return t.Delete(keyRequest(rec.ID))
	case retiredGrant:
		g, ok, err := get[broker.Grant](t, keyGrant(broker.GrantID(id)))
		switch {
		case err != nil || !ok || g.State == broker.GrantOpen:
			return err
		case held:
			return t.Put(keyEnded(now, retiredGrant, id), nil)
		}
		return t.Delete(keyGrant(g.ID))
	case retiredIncident:
		in, ok, err := get[broker.Incident](t, keyIncident(broker.IncidentID(id)))
		if err != nil || !ok || in.State == broker.IncidentOpen {
			return err
		}
		if _, swept, err := t.Get(keySweep(sweepIncident, id)); err != nil {
			return err
		} else if swept {
			return t.Put(keyEnded(now, retiredIncident, id), nil) // the sweep goes by its grants
		}
		return t.Delete(keyIncident(in.ID))
	case retiredIdem:
		return t.Delete(string(entry.Value))
	default:
		return fmt.Errorf("nothing of kind %q is ever retired", kind)
	}
}
