package lease

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/audit"
	"github.com/mayfly-security/mayfly/broker/policy"
	"github.com/mayfly-security/mayfly/store"
)

// A refusal is evidence, but whoever is refused must not be able to make the
// broker write without bounds. In each window the first few refusals of a kind
// are written one by one; the rest are counted, and the counts are written at
// the window's end.
const (
	refusalWindow = 10 * time.Second
	refusalsEach  = 5    // written one by one, of the same caller, act and reason
	refusalsAll   = 200  // written one by one, altogether
	refusalKinds  = 1000 // kinds told apart in one window; what is beyond is counted together
)

type refusalKind struct {
	actor, act string
	reason     broker.Reason
}

// refusalCount is how often one kind of refusal happened in a window, and how
// many of them were written one by one.
type refusalCount struct{ seen, written int }

type refusals struct {
	e *Engine

	mu      sync.Mutex
	began   time.Time
	written int
	counts  map[refusalKind]refusalCount
}

func newRefusals(e *Engine) *refusals {
	return &refusals{e: e, counts: map[refusalKind]refusalCount{}}
}

// Refused records that a caller was refused: as a metric always, as evidence
// within bounds. act says what was refused; tool may be empty. The caller may
// be nobody (a failed attestation). A nil err is no refusal.
func (e *Engine) Refused(ctx context.Context, caller broker.Caller, act, tool string, err error) {
	if err == nil || ctx.Err() != nil && context.Cause(ctx) == err {
		return
	}
	reason := broker.ReasonOf(err)
	e.metrics.refused.WithLabelValues(string(reason)).Inc()
	actor := "unknown"
	if p := caller.Principal(); p != "" {
		actor = p.String()
	}
	if reason == broker.ReasonInternal || reason == broker.ReasonStore {
		e.log.Error("a call was not carried out", "act", act, "actor", actor, "correlation", caller.Correlation, "error", err)
		return // there is nobody to blame, and perhaps nowhere to write
	}
	if !e.refusals.admit(refusalKind{actor, act, reason}) {
		return
	}
	now := e.clock.now()
	ev := audit.Event{
		Time: now, Type: audit.RequestRefused, Actor: actor,
		Tool: broker.Clean(broker.Shorten(tool, 64)), Cause: string(reason),
		Reason:      broker.Clean(broker.Shorten(messageOf(err), 500)),
		Correlation: caller.Correlation, Details: map[string]string{"act": act},
	}
	var denied policy.DeniedBy
	if errors.As(err, &denied) {
		tellVerdict(ev.Details, denied.Verdict)
	}
	if _, isAgent := e.Catalog().Agent(caller.ID); isAgent {
		ev.Agent = actor
	}
	if err := e.update(context.WithoutCancel(ctx), now, func(t store.Txn) error { return appendEvent(t, ev) }); err != nil {
		e.log.Error("recording a refusal", "reason", reason, "actor", actor, "error", err)
	}
}

// messageOf is what the caller was told, without the cause behind it.
func messageOf(err error) string {
	var e *broker.Error
	if errors.As(err, &e) {
		return e.Message
	}
	return string(broker.ReasonInternal)
}

// admit counts a refusal and reports whether it may be written by itself.
func (r *refusals) admit(kind refusalKind) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.began.IsZero() {
		r.began = r.e.clock.now()
	}
	if _, known := r.counts[kind]; !known && len(r.counts) >= refusalKinds {
		kind = refusalKind{actor: "others", act: kind.act, reason: kind.reason}
	}
	c := r.counts[kind]
	c.seen++
	alone := c.written < refusalsEach && r.written < refusalsAll
	if alone {
		c.written++
		r.written++
	}
	r.counts[kind] = c
	return alone
}

// flush writes what was only counted, once the window is over.
func (r *refusals) flush(ctx context.Context) {
	e := r.e
	now := e.clock.now()
	r.mu.Lock()
	if r.began.IsZero() || now.Sub(r.began) < refusalWindow && !e.closed.Load() {
		r.mu.Unlock()
		return
	}
	began, counts, budget := r.began, r.counts, refusalsAll
	r.began, r.written, r.counts = time.Time{}, 0, map[refusalKind]refusalCount{}
	r.mu.Unlock()

	var events []audit.Event
	rest := 0
	for kind, c := range counts {
		n := c.seen - c.written
		if n == 0 {
			continue
		}
		if len(events) == budget {
			rest += n
			continue
		}
		events = append(events, suppressed(now, began, kind, n))
	}
	if rest > 0 {
		events = append(events, suppressed(now, began, refusalKind{actor: "others"}, rest))
	}
	for i := 0; i < len(events); i += 100 {
		part := events[i:min(i+100, len(events))]
		err := e.update(ctx, now, func(t store.Txn) error {
			for _, ev := range part {
				if err := appendEvent(t, ev); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			e.log.Error("recording counted refusals", "error", err)
			return
		}
	}
}

func suppressed(now, since time.Time, kind refusalKind, n int) audit.Event {
	return audit.Event{
		Time: now, Type: audit.RefusalsSuppressed, Actor: kind.actor, Cause: string(kind.reason),
		Details: map[string]string{"act": kind.act, "count": fmt.Sprint(n), "since": since.Format(time.RFC3339)},
	}
}
