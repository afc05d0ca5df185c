package lease

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/audit"
	"github.com/mayfly-security/mayfly/store"
)

// AcceptClock takes the machine's present time for true although the store has
// seen a later one: the recovery from a clock that ran ahead and was set back.
// Without it the engine's time stays ahead for ever, for it never goes back.
//
// What was made in the time that never was is ended, for its ends lie too late:
// incidents are closed, grants withdrawn, and leases set to be revoked by the
// next start. That it was done, by whom and how far the clock went back, is
// evidence. The store must be in use by nobody else. It returns the time that
// the store had seen; if that is not ahead of now, nothing is done.
func AcceptClock(ctx context.Context, s store.Store, now time.Time, actor string, log *slog.Logger) (was time.Time, err error) {
	now = now.Round(0).UTC()
	var grants []broker.GrantID
	var incidents []broker.IncidentID
	var leases []broker.LeaseID
	var cuts []string
	err = s.View(ctx, func(r store.Reader) (err error) {
		if was, _, err = get[time.Time](r, keyClock); err != nil || !was.After(now) {
			return err
		}
		for entry, err := range r.Scan(store.Prefix(prefixGrants)) {
			if err != nil {
				return err
			}
			g, _, err := get[broker.Grant](r, keyGrant(broker.GrantID(lastPart(entry.Key))))
			if err != nil {
				return err
			}
			if g.CreatedAt.After(now) {
				grants = append(grants, g.ID)
			}
		}
		for entry, err := range r.Scan(store.Prefix(prefixIncident)) {
			if err != nil {
				return err
			}
			in, err := decode[broker.Incident](entry.Key, entry.Value)
			if err != nil {
				return err
			}
			if in.State == broker.IncidentOpen && in.OpenedAt.After(now) {
				incidents = append(incidents, in.ID)
			}
		}
		for entry, err := range r.Scan(store.Prefix(prefixDue)) {
			if err != nil {
				return err
			}
			l, err := mustLease(r, broker.LeaseID(lastPart(entry.Key)))
			if err != nil {
				return err
			}
			if l.CreatedAt.After(now) {
				leases = append(leases, l.ID)
			}
		}
		for rec, err := range cutOffsOf(r) {
			if err != nil {
				return err
			}
			if rec.At.After(now) {
				cuts = append(cuts, cutOffID(rec.Provider, rec.Cut.Role))
			}
		}
		return nil
	})
	if err != nil || !was.After(now) {
		return was, err
	}
	why := sweepRecord{Cause: broker.CauseClockSetBack, Actor: actor, Reason: "the clock ran ahead and was set back"}
	for _, id := range incidents {
		if err := s.Update(ctx, func(t store.Txn) error { _, err := closeIncident(t, id, now, why); return err }); err != nil {
			return was, fmt.Errorf("closing incident %s: %w", id, err)
		}
	}
	for _, id := range grants {
		err := s.Update(ctx, func(t store.Txn) error {
			if err := endGrant(t, id, now, broker.GrantWithdrawn, why); err != nil {
				return err
			}
			return put(t, keySweep(sweepGrants, string(id)), why)
		})
		if err != nil {
			return was, fmt.Errorf("withdrawing grant %s: %w", id, err)
		}
	}
	for part := range slices.Chunk(leases, chunk) {
		err := s.Update(ctx, func(t store.Txn) error {
			for _, id := range part {
				l, err := mustLease(t, id)
				if err != nil {
					return err
				}
				if err := startRevoking(t, l, now, why.ending()); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return was, fmt.Errorf("ending leases: %w", err)
		}
	}
	for _, id := range cuts {
		if err := s.Update(ctx, func(t store.Txn) error { return cutOffBack(t, id, now) }); err != nil {
			return was, fmt.Errorf("setting back a cut-off: %w", err)
		}
	}
	err = s.Update(ctx, func(t store.Txn) error {
		if err := put(t, keyClock, now); err != nil {
			return err
		}
		return appendEvent(t, audit.Event{Time: now, Type: audit.ClockTrusted, Actor: actor,
			Reason: "an operator accepted the machine's clock", Cause: string(broker.CauseClockSetBack),
			Details: map[string]string{"was": was.Format(time.RFC3339), "back": was.Sub(now).Round(time.Second).String(),
				"grants": fmt.Sprint(len(grants)), "incidents": fmt.Sprint(len(incidents)),
				"leases": fmt.Sprint(len(leases))}})
	})
	if err != nil {
		return was, fmt.Errorf("accepting the clock: %w", err)
	}
	log.Warn("the clock was accepted", "was", was, "now", now, "grants", len(grants), "incidents", len(incidents), "leases", len(leases))
	return was, nil
}

// cutOffBack has a cut-off of the time that never was hold new leases back no
// longer than it would have by the clock as it is: by the one that ran ahead it
// would for as long as that did. What it ends is measured by the provider's
// clock, and stays; where it was measured by ours, no session works before.
// Until when it stands stays too: that is only longer than it need be.
func cutOffBack(t store.Txn, id string, now time.Time) error {
	rec, ok, err := get[cutOffRecord](t, keyCutOff(id))
	if err != nil || !ok {
		return err
	}
	clear := now.Add(rec.Cut.Clear.Sub(rec.At))
	if !rec.Cut.Before.Before(clear) || !clear.Before(rec.Cut.Clear) {
		return nil
	}
	rec.Cut.Clear = clear
	return put(t, keyCutOff(id), rec)
}
