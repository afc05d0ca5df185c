package lease

import (
	"context"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/audit"
	"github.com/mayfly-security/mayfly/store"
)

// A backup is a store with a mark in it. Whoever opens it restores: what was
// given before it was made is ended, for nobody knows what has become of it
// since. The mark goes when all of that is in the store; until then nothing is
// given, and a crash begins again where it was.

// backupRecord is the mark.
type backupRecord struct {
	MadeAt time.Time
	MadeBy string // as audit.Event.Actor
	Begun  bool   // the restore is in the evidence, and goes on
}

// restoredSlack is how long after a lease's end the restore takes it for
// certain that the provider's own end has worked: clocks differ.
const restoredSlack = time.Minute

// MarkBackup marks a store that was copied from a broker's: an Engine that
// opens it restores. It says when the copy was made, and who had it made. The
// store must be in use by nobody else.
func MarkBackup(ctx context.Context, s store.Store, at time.Time, by string) error {
	err := s.Update(ctx, func(t store.Txn) error {
		if _, ok, err := get[broker.InstallationID](t, keyInstallation); err != nil {
			return err
		} else if !ok {
			return fmt.Errorf("no broker has ever used this store: there is nothing to back up")
		}
		return put(t, keyBackup, backupRecord{MadeAt: at.UTC(), MadeBy: by})
	})
	if err != nil {
		return fmt.Errorf("marking the backup: %w", err)
	}
	return nil
}

// IsBackup reports whether the store has the mark of a backup: an Engine that
// opens it restores, and takes the mark away when it has.
func IsBackup(ctx context.Context, s store.Store) (marked bool, err error) {
	err = s.View(ctx, func(r store.Reader) error {
		_, marked, err = get[backupRecord](r, keyBackup)
		return err
	})
	return marked, err
}

// BackedUp records that a copy of the store leaves it. actor is who asked.
func (e *Engine) BackedUp(ctx context.Context, actor string) error {
	now := e.clock.now()
	return e.update(ctx, now, func(t store.Txn) error {
		return appendEvent(t, audit.Event{Time: now, Type: audit.StoreBackedUp, Actor: actor})
	})
}

// restore ends everything of before if the store is a backup. It returns when
// all of that is in the store: nothing is given, and nobody is served, before.
// That the providers end it comes after.
func (e *Engine) restore(ctx context.Context) error {
	var mark backupRecord
	var marked bool
	err := e.store.View(ctx, func(r store.Reader) (err error) {
		mark, marked, err = get[backupRecord](r, keyBackup)
		return err
	})
	if err != nil || !marked {
		return err
	}
	e.log.Warn("this store is a backup: what was given before it was made is ended", "made_at", mark.MadeAt, "made_by", mark.MadeBy)
	if err := e.beginRestore(ctx); err != nil {
		return err
	}
	why := sweepRecord{Cause: broker.CauseRestored, Actor: audit.Broker, Reason: "the store came back from a backup"}
	now := e.clock.now()
	const each = 8 // in one transaction: what is ended takes up to ten operations
	incidents, err := e.forAll(ctx, prefixIncident, isOpenIncident, each, func(t store.Txn, id string) error {
		_, err := closeIncident(t, broker.IncidentID(id), now, why)
		return err
	})
	if err != nil {
		return fmt.Errorf("closing incidents: %w", err)
	}
	grants, err := e.forAll(ctx, prefixGrants, every, grantChunk, func(t store.Txn, id string) error {
		g, _, err := get[broker.Grant](t, keyGrant(broker.GrantID(id)))
		if err != nil {
			return err
		}
		state := broker.GrantWithdrawn
		if g.Incident != "" {
			state = broker.GrantClosed
		}
		return endGrant(t, g.ID, now, state, why)
	})
	if err != nil {
		return fmt.Errorf("withdrawing grants: %w", err)
	}
	requests, err := e.forAll(ctx, prefixWaiting, every, each, func(t store.Txn, id string) error {
		_, err := endPending(t, broker.RequestID(id), now, broker.RequestVoid, brokerCaller, why.Reason)
		return err
	})
	if err != nil {
		return fmt.Errorf("ending requests: %w", err)
	}
	leases, err := e.forAll(ctx, prefixDue, isAlive, each, func(t store.Txn, id string) error {
		l, err := mustLease(t, broker.LeaseID(id))
		if err != nil {
			return err
		}
		l.doubt()
		return startRevoking(t, l, now, why.ending())
	})
	if err != nil {
		return fmt.Errorf("ending leases: %w", err)
	}
	if err := e.update(ctx, now, func(t store.Txn) error { return t.Delete(keyBackup) }); err != nil {
		return fmt.Errorf("taking the mark away: %w", err)
	}
	e.log.Warn("the store is restored", "incidents", incidents, "grants", grants, "requests", requests, "leases", leases)
	return nil
}

// beginRestore is the commit from which on there is a new epoch: decisions of
// before hold no more.
func (e *Engine) beginRestore(ctx context.Context) error {
	now := e.clock.now()
	return e.update(ctx, now, func(t store.Txn) error {
		mark, _, err := get[backupRecord](t, keyBackup)
		if err != nil || mark.Begun {
			return err
		}
		mark.Begun = true
		if err := put(t, keyBackup, mark); err != nil {
			return err
		}
		if err := t.Delete(keyRecovery); err != nil {
			return err
		}
		cat, ok, err := get[catalogRecord](t, keyCatalog)
		if err != nil {
			return err
		}
		if ok {
			cat.Generation++
			if err := put(t, keyCatalog, cat); err != nil {
				return err
			}
		}
		return appendEvent(t, audit.Event{
			Time: now, Type: audit.StoreRestored, Actor: audit.Broker, Cause: string(broker.CauseRestored),
			Details: map[string]string{"made_at": mark.MadeAt.Format(time.RFC3339), "made_by": mark.MadeBy,
				"installation": string(e.installation)},
		})
	})
}

// doubt is for a lease that was being made when the backup was. The attempt
// went on, and the store that was lost may have had a handle that this one has
// not: what a provider says of a lease without a handle is worth nothing until
// the credential is dead by its own end.
func (l *leaseRecord) doubt() {
	if l.State != broker.LeaseMinting || l.Handle != nil {
		return
	}
	dead := l.End.Add(restoredSlack)
	if dead.After(l.Settles) {
		l.Settles = dead
	}
	if dead.After(l.DiesAt) {
		l.DiesAt = dead
	}
}

func every(store.Entry) (bool, error) { return true, nil }

func isOpenIncident(entry store.Entry) (bool, error) {
	in, err := decode[broker.Incident](entry.Key, entry.Value)
	return in.State == broker.IncidentOpen, err
}

// isAlive is for due keys: those in state revoking are being ended already.
func isAlive(entry store.Entry) (bool, error) {
	return broker.LeaseState(entry.Value) != broker.LeaseRevoking, nil
}

// forAll calls do, each in a transaction, with the ID behind each key
// of the prefix that pick wants, and returns how many there were. What do does
// must take the key away or make pick pass over it.
func (e *Engine) forAll(ctx context.Context, prefix string, pick func(store.Entry) (bool, error), each int, do func(t store.Txn, id string) error) (int, error) {
	const atOnce = 5000 // IDs that are held in memory
	from, to := store.Prefix(prefix)
	var done atomic.Int64
	for {
		var ids []string
		next := ""
		err := e.store.View(ctx, func(r store.Reader) error {
			ids, next = ids[:0], ""
			for entry, err := range r.Scan(from, to) {
				if err != nil {
					return err
				}
				if len(ids) == atOnce {
					next = entry.Key
					return nil
				}
				ok, err := pick(entry)
				if err != nil {
					return err
				}
				if ok {
					ids = append(ids, lastPart(entry.Key))
				}
			}
			return nil
		})
		if err != nil {
			return 0, err
		}
		g, gctx := errgroup.WithContext(ctx)
		g.SetLimit(16) // they share commits
		for part := range slices.Chunk(ids, each) {
			g.Go(func() error {
				err := e.update(gctx, e.clock.now(), func(t store.Txn) error {
					for _, id := range part {
						if err := do(t, id); err != nil {
							return err
						}
					}
					return nil
				})
				if err == nil {
					done.Add(int64(len(part)))
				}
				return err
			})
		}
		if err := g.Wait(); err != nil {
			return 0, err
		}
		if next == "" {
			return int(done.Load()), nil
		}
		from = next
	}
}
