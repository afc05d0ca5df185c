package lease

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"iter"
	"maps"
	"slices"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/audit"
	"github.com/mayfly-security/mayfly/broker/policy"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/store"
)

// A cut-off ends every session of a role of a provider at one instant, whoever
// has it: the broker's own leases, and what it knows nothing of. Nothing but an
// operator's word begins one. The decision is one commit of
//
//	cutoff|ID                      a role that is cut off, until what was made before is dead by itself   (guard)
//
// and a sweep key. From there on it is carried out whatever becomes of the
// caller or the broker (cutoffsweep.go), and the provider renders what must stand
// from the store. The commit of an intent, and the one that makes a lease active,
// read the key: after the decision no session is handed out that falls under it.

const prefixCutOff = "cutoff|"

func keyCutOff(id string) string { return prefixCutOff + id }

// cutOffID names the cut-off of a role in keys: what a provider calls a role
// may hold anything. A role has one, which a later decision takes further.
func cutOffID(provider, role string) string {
	sum := sha256.Sum256([]byte(provider + "\x00" + role))
	return hex.EncodeToString(sum[:])
}

// cutOffRecord is a cut-off as the store has it.
type cutOffRecord struct {
	Provider    string
	Cut         providers.Cut
	Decision    string // names the decision in the evidence
	At          time.Time
	Actor       string
	Reason      string
	Correlation broker.CorrelationID `json:",omitempty"`
	By          permission           `json:",omitzero"`
	Leases      int                  // open ones that it hit when it was decided

	Told     bool            `json:",omitempty"` // every lease that it hits is being ended
	Progress broker.Progress // at the provider
	Failing  bool            `json:",omitempty"` // the last try came to nothing
}

// done reports whether nothing is left to carry out.
func (c cutOffRecord) done() bool { return c.Told && c.Progress == broker.ProgressVerified }

// hits reports whether a lease that was begun then may be of a session that the
// cut-off ends. In doubt it is.
func (c cutOffRecord) hits(created time.Time) bool { return !created.After(c.Cut.Clear) }

func (c cutOffRecord) ending() ending {
	return ending{cause: broker.CauseCutOff, actor: c.Actor, reason: c.Reason, correlation: c.Correlation, by: c.By}
}

// event is the evidence of what becomes of a cut-off.
func (c cutOffRecord) event(now time.Time, what audit.Type, actor string) audit.Event {
	return audit.Event{Time: now, Type: what, Actor: actor, Provider: c.Provider, Reason: c.Reason, Cause: string(broker.CauseCutOff), Correlation: c.Correlation,
		Details: map[string]string{"role": c.Cut.Role, "cut_off": c.Decision,
			"made_before": c.Cut.Before.Format(time.RFC3339), "until": c.Cut.Until.Format(time.RFC3339)}}
}

// CutOffRequest asks for a cut-off.
type CutOffRequest struct {
	Provider string
	Role     string // as the catalog names it
	Reason   string // required unless Dry
	Dry      bool   // only say what it would hit
}

const (
	maxProviderName = 64
	maxRole         = 1024
	// maxRunAway is how far a cut-off follows a machine's clock that is ahead of
	// the engine's time, where there is no other.
	maxRunAway = 12 * time.Hour
)

// CutOff ends every session of a role that was made up to now, and says how far
// it came after a moment. It goes on without the caller, and after a crash. To
// do it again is a decision of its own: it ends what was made meanwhile, too.
func (e *Engine) CutOff(ctx context.Context, caller broker.Caller, req CutOffRequest) (CutOff, error) {
	c, err := e.cutOff(ctx, caller, req)
	if _, refused := err.(*broker.Error); refused {
		e.Refused(ctx, caller, "cut_off", "", err)
	}
	return c, err
}

func (e *Engine) cutOff(ctx context.Context, caller broker.Caller, req CutOffRequest) (CutOff, error) {
	if e.closed.Load() {
		return CutOff{}, broker.Refuse(broker.ReasonShuttingDown, "the broker is stopping", "try again")
	}
	ep := e.current.Load() // ending does not wait for a reload
	for range 2 {          // each may wait for the provider
		c, err := e.tryCutOff(ctx, ep, caller, req, false)
		if err != errStale {
			return c, err
		}
		ep = e.settled()
	}
	// The store has another catalog than we, as after a reload of unknown outcome:
	// that stops giving, and not ending.
	return e.tryCutOff(ctx, ep, caller, req, true)
}

// tryCutOff decides by one epoch. errStale, which is not told with anyway, means
// that another is to decide: the provider may not be in its catalog, and then
// nobody would carry it out.
func (e *Engine) tryCutOff(ctx context.Context, ep *epoch, caller broker.Caller, req CutOffRequest, anyway bool) (CutOff, error) {
	verdict, err := e.administer(ctx, ep, caller, policy.VerbCutOff)
	if err != nil {
		return CutOff{}, err
	}
	if req.Dry {
		err = broker.CheckText("reason", req.Reason, broker.MaxReason)
	} else {
		err = requireReason(req.Reason, "cutting a role off")
	}
	if err != nil {
		return CutOff{}, err
	}
	p, able, err := e.cutter(ep, req.Provider)
	if err != nil {
		return CutOff{}, err
	}
	defer p.release()
	if err := e.knownRole(ctx, ep, able, req.Provider, req.Role); err != nil {
		return CutOff{}, err
	}
	now := e.clock.now()
	cut, err := e.planCutOff(ctx, p, able, req)
	if err != nil {
		return CutOff{}, err
	}
	rec := cutOffRecord{Provider: req.Provider, Cut: cut, Decision: string(broker.NewCorrelationID(now)), At: now, Actor: caller.Principal().String(),
		Reason: req.Reason, Correlation: caller.Correlation, By: permissionOf(verdict)}
	hit, err := e.hitBy(ctx, able, rec)
	if err != nil {
		return CutOff{}, err
	}
	rec.Leases = len(hit)
	if req.Dry {
		rec.Actor, rec.Reason, rec.At = "", "", time.Time{}
		return rec.view(hit), nil
	}
	id := cutOffID(req.Provider, req.Role)
	err = e.update(ctx, now, func(t store.Txn) error {
		if err := ep.same(t); err != nil && !(err == errStale && anyway) {
			return err
		}
		return beginCutOff(t, id, rec, verdict)
	})
	if err != nil {
		if untellable(err) {
			return CutOff{}, e.cutOffAnyway(id, begunCutOff{rec, verdict}, hit, err)
		}
		return CutOff{}, err
	}
	e.log.Warn("CUT-OFF: every session of a role is being ended", "provider", req.Provider, "role", req.Role, "made_before", cut.Before,
		"actor", rec.Actor, "reason", req.Reason, "correlation", rec.Correlation)
	e.carryOutNow(id)
	return e.awaitCutOff(ctx, id, able, rec)
}

// cutter is the provider of that name, with a reference taken, if it can cut
// roles off.
func (e *Engine) cutter(ep *epoch, name string) (*openProvider, providers.CutOff, error) {
	if err := broker.CheckText("provider", name, maxProviderName); err != nil {
		return nil, nil, err
	}
	p, err := e.provider(name)
	if err != nil {
		return nil, nil, broker.Refusef(broker.ReasonNotFound, "name a provider of the catalog; a provider that is not in it can be put back, or its role denied by hand",
			"provider %q is not in the catalog%s", name, broker.Suggest(name, "providers", slices.Sorted(maps.Keys(ep.providers))))
	}
	able, ok := p.Provider.(providers.CutOff)
	if !ok {
		p.release()
		return nil, nil, broker.Refusef(broker.ReasonConflict, "end what there is of it with the kill switch (`mayfly revoke --provider`)",
			"provider %s has no roles that can be cut off", name)
	}
	return p, able, nil
}

// knownRole refuses a role that neither a tool of the catalog nor an open lease has.
func (e *Engine) knownRole(ctx context.Context, ep *epoch, able providers.CutOff, provider, role string) error {
	if err := broker.CheckText("role", role, maxRole); err != nil {
		return err
	}
	roles := map[string]struct{}{}
	for _, t := range ep.catalog.Tools() {
		if t.Provider == provider {
			for _, r := range able.Roles(t) {
				roles[r] = struct{}{}
			}
		}
	}
	if _, ok := roles[role]; ok && role != "" {
		return nil
	}
	// The tool may be gone from the catalog, and its leases not.
	found := false
	err := e.openLeases(ctx, provider, func(l *leaseRecord) bool {
		found = role != "" && able.RoleOf(l.ending()) == role
		return !found
	})
	if err != nil || found {
		return err
	}
	return broker.Refusef(broker.ReasonNotFound, "name a role as the catalog's tools of the provider do",
		"no tool of provider %s has the role %q%s", provider, broker.Shorten(role, 200), broker.Suggest(role, "roles", slices.Sorted(maps.Keys(roles))))
}

// planCutOff asks the provider what a cut-off comes to.
func (e *Engine) planCutOff(ctx context.Context, p *openProvider, able providers.CutOff, req CutOffRequest) (providers.Cut, error) {
	attempt, cancel := context.WithTimeout(ctx, p.traits.RevokeTimeout)
	defer cancel()
	cut, err := called(attempt, e.gate(req.Provider), p, callCutOff, func(ctx context.Context) (providers.Cut, error) { return able.PlanCutOff(ctx, req.Role) }, nil)
	if err != nil {
		var refusal *broker.Error
		if asRefusal(err, &refusal) {
			return cut, refusal
		}
		return cut, broker.Refusef(broker.ReasonProvider, "try again; nothing was decided. An operator may deny the role at the provider by hand",
			"provider %s does not say what cutting the role off comes to", req.Provider).Because(err)
	}
	if cut.Role != req.Role || cut.Before.IsZero() || cut.Clear.IsZero() || cut.Until.Before(cut.Clear) {
		return cut, fmt.Errorf("provider %s plans a cut-off that is none: %+v", req.Provider, cut)
	}
	// The provider's clock is the one that is certain to have passed; leases are
	// made by the engine's.
	ahead := max(e.clock.now().Sub(e.clock.early()), 0)
	if cut.Ours {
		// Nobody knows which of our clocks is right: the later one reaches as far
		// as it must. One that has run away is not followed for ever, or nobody
		// could have the role any more.
		ahead += min(max(e.clock.late().Sub(e.clock.now()), 0), maxRunAway)
		cut.Before = cut.Before.Add(ahead)
	}
	cut.Clear, cut.Until = cut.Clear.Add(ahead), cut.Until.Add(ahead)
	cut.Others = broker.Clean(broker.Shorten(cut.Others, 500))
	return cut, nil
}

// openLeases calls each with the leases of a provider that have not ended,
// until each says that it has seen enough.
func (e *Engine) openLeases(ctx context.Context, provider string, each func(l *leaseRecord) (more bool)) error {
	return Selector{Provider: provider}.matching(ctx, e, e.clock.late(), each)
}

// hitBy are the open leases that a cut-off ends.
func (e *Engine) hitBy(ctx context.Context, able providers.CutOff, rec cutOffRecord) (map[broker.LeaseID]*leaseRecord, error) {
	hit := map[broker.LeaseID]*leaseRecord{}
	err := e.openLeases(ctx, rec.Provider, func(l *leaseRecord) bool {
		if rec.hits(l.CreatedAt) && able.RoleOf(l.ending()) == rec.Cut.Role {
			hit[l.ID] = l
		}
		return true
	})
	return hit, err
}

// further is a cut-off that reaches as far as both.
func further(a, b providers.Cut) providers.Cut {
	a.Before, a.Clear, a.Until = later(a.Before, b.Before), later(a.Clear, b.Clear), later(a.Until, b.Until)
	return a
}

// beginCutOff is the commit that decides a cut-off.
func beginCutOff(t store.Txn, id string, rec cutOffRecord, verdict policy.Verdict) error {
	was, again, err := get[cutOffRecord](t, keyCutOff(id))
	if err != nil || again && was.Decision == rec.Decision && was.Cut == further(was.Cut, rec.Cut) {
		return err
	}
	ev := rec.event(rec.At, audit.CutOffRequested, rec.Actor)
	if again {
		// What the one before reaches is not given up, whatever clocks said.
		rec.Cut = further(rec.Cut, was.Cut)
		ev = rec.event(rec.At, audit.CutOffRequested, rec.Actor)
		ev.Details["takes_further"] = was.Decision
		if err := t.Delete(keyHouse(was.Cut.Until, houseCutOff, id)); err != nil {
			return err
		}
	}
	if err := put(t, keyCutOff(id), rec); err != nil {
		return err
	}
	if err := put(t, keySweep(sweepCutOff, id), sweepRecord{Cause: broker.CauseCutOff, Actor: rec.Actor, Reason: rec.Reason, Correlation: rec.Correlation, By: rec.By}); err != nil {
		return err
	}
	if err := t.Put(keyHouse(rec.Cut.Until, houseCutOff, id), nil); err != nil {
		return err
	}
	ev.Details["leases"] = fmt.Sprint(rec.Leases)
	ev.Details = tellVerdict(ev.Details, verdict)
	return appendEvent(t, ev)
}

// cutOffAnyway cuts off although the store could not be told.
func (e *Engine) cutOffAnyway(id string, b begunCutOff, hit map[broker.LeaseID]*leaseRecord, cause error) error {
	e.limbo.cutsOff(id, b)
	e.log.Error("a cut-off cannot be written, and goes on without the store", "provider", b.rec.Provider, "role", b.rec.Cut.Role,
		"actor", b.rec.Actor, "reason", b.rec.Reason, "correlation", b.rec.Correlation, "error", cause)
	e.carryOutNow(id)
	e.doom(slices.Sorted(maps.Keys(hit)), b.rec.ending())
	e.house.poke()
	return underWay(cause)
}

// awaitCutOff waits, for at most the configured time, until the provider says
// that the cut-off is in force and all leases that it hit are dead.
func (e *Engine) awaitCutOff(ctx context.Context, id string, able providers.CutOff, rec cutOffRecord) (CutOff, error) {
	timer := time.NewTimer(e.cfg.EndWait)
	defer timer.Stop()
	detached := context.WithoutCancel(ctx)
	for {
		changed := e.watch.next()
		began := time.Now()
		err := e.view(detached, func(r store.Reader) error {
			is, ok, err := get[cutOffRecord](r, keyCutOff(id))
			if ok {
				rec = is
			}
			return err
		})
		if err != nil {
			return CutOff{}, err
		}
		alive, err := e.hitBy(detached, able, rec)
		if err != nil || rec.done() && len(alive) == 0 {
			return rec.view(alive), err
		}
		// A look at very many takes its time; most of the time is for others.
		pause := time.NewTimer(max(tellEvery, 10*time.Since(began)))
		for waiting := true; waiting; {
			select {
			case <-pause.C:
				pause.C = nil
			case <-changed:
				changed = nil
			case <-timer.C:
				return rec.view(alive), nil
			case <-ctx.Done():
				return rec.view(alive), nil
			case <-e.ctx.Done():
				return rec.view(alive), nil
			}
			waiting = pause.C != nil || changed != nil
		}
	}
}

// cutOffOf tells of the cut-off that the session of a lease with that handle falls
// under, if one does: of its role, and not certain to be later than what it ends.
func (e *Engine) cutOffOf(r getter, p *openProvider, l *leaseRecord, h providers.Handle) (rec cutOffRecord, is bool, err error) {
	if p == nil || h == nil {
		return rec, false, nil
	}
	able, ok := p.Provider.(providers.CutOff)
	if !ok {
		return rec, false, nil
	}
	role := able.RoleOf(providers.Ending{Lease: l.ID, Tool: l.Tool, Handle: h})
	if role == "" {
		return rec, false, nil
	}
	id := cutOffID(l.Provider, role)
	if b, begun := e.limbo.cutOff(id); begun && b.rec.hits(l.CreatedAt) {
		return b.rec, true, nil
	}
	rec, is, err = get[cutOffRecord](r, keyCutOff(id))
	return rec, is && rec.hits(l.CreatedAt), err
}

// notNow refuses an attempt whose session would be dead on arrival.
func (c cutOffRecord) notNow(tool string, now time.Time) *broker.Error {
	left := max(c.Cut.Clear.Sub(now), 0).Truncate(time.Second) + time.Second
	return broker.Refusef(broker.ReasonProvider, "try again in "+broker.Span(left),
		"an operator has just ended every session of the role of %s (provider %s), and one that is made now would not work", tool, c.Provider)
}

// cutOffsStay refuses a catalog in which a provider is missing, or stands for
// another system, at which a cut-off is not written yet: nobody could write it.
func cutOffsStay(r store.Reader, ep *epoch, was catalogRecord) error {
	for rec, err := range cutOffsToWrite(r) {
		if err != nil {
			return err
		}
		p := ep.providers[rec.Provider]
		same := p != nil && (was.Systems[rec.Provider] == "" || was.Systems[rec.Provider] == p.system)
		if !same {
			return broker.Refusef(broker.ReasonConflict, "keep the provider as it is until the cut-off is written",
				"provider %s is to cut the role %s off, and has not done so yet", rec.Provider, broker.Shorten(rec.Cut.Role, 200))
		}
	}
	return nil
}

// cutOffsToWrite are the cut-offs that no provider has written yet.
func cutOffsToWrite(r store.Reader) iter.Seq2[cutOffRecord, error] {
	return func(yield func(cutOffRecord, error) bool) {
		for rec, err := range cutOffsOf(r) {
			if err == nil && steps(rec.Progress) >= steps(broker.ProgressWritten) {
				continue
			}
			if !yield(rec, err) {
				return
			}
		}
	}
}

// cutOffsOf are all cut-offs.
func cutOffsOf(r store.Reader) iter.Seq2[cutOffRecord, error] {
	return func(yield func(cutOffRecord, error) bool) {
		for entry, err := range r.Scan(store.Prefix(prefixCutOff)) {
			var rec cutOffRecord
			if err == nil {
				rec, err = decode[cutOffRecord](entry.Key, entry.Value)
			}
			if !yield(rec, err) || err != nil {
				return
			}
		}
	}
}
