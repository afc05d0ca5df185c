package lease

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/audit"
	"github.com/mayfly-security/mayfly/broker/policy"
	"github.com/mayfly-security/mayfly/store"
)

// maxWindow is the most grants that one incident is opened with: they are made
// in one transaction.
const maxWindow = 24

// IncidentRequest is what an opener asks for. The incident is opened with a
// grant for each of the agents to each of the tools.
type IncidentRequest struct {
	Title     string // required
	Reference string // the incident system's name for it; may be empty
	Agents    []spiffeid.ID
	Tools     []string
	Duration  *time.Duration // nil means the opener's maximum
	Key       string         // idempotency key; may be empty
}

// OpenIncident opens a maintenance window.
func (e *Engine) OpenIncident(ctx context.Context, caller broker.Caller, req IncidentRequest) (broker.Incident, error) {
	in, err := e.openIncident(ctx, caller, req)
	if err != nil {
		e.Refused(ctx, caller, "open_incident", broker.Shorten(strings.Join(req.Tools, ","), 200), err)
	}
	return in, err
}

func (e *Engine) openIncident(ctx context.Context, caller broker.Caller, req IncidentRequest) (broker.Incident, error) {
	if err := e.giving(); err != nil {
		return broker.Incident{}, err
	}
	if err := checkIncident(&req); err != nil {
		return broker.Incident{}, err
	}
	ep := e.settled()
	opener, isOpener := ep.catalog.Opener(caller.ID)
	duration := opener.MaxDuration
	if req.Duration != nil {
		duration = *req.Duration
	}
	w := policy.Window{Agents: req.Agents, Tools: req.Tools, Duration: duration}
	if err := policy.OpenIncident(caller.ID, opener, isOpener, w).Err(); err != nil {
		return broker.Incident{}, err
	}

	now := e.clock.now()
	in := broker.Incident{
		ID: broker.NewIncidentID(now), Title: req.Title, Reference: req.Reference,
		OpenedBy: caller.Principal(), OpenedAt: now, EndsAt: now.Add(duration), State: broker.IncidentOpen,
	}
	var grants []broker.Grant
	var verdicts []policy.Verdict // what allowed each
	for _, agent := range req.Agents {
		for _, tool := range req.Tools {
			g, err := ep.newGrant(GrantRequest{Agent: agent, Tool: tool, NotAfter: in.EndsAt, Reason: in.Title}, caller.Principal(), now)
			if err != nil {
				return broker.Incident{}, err
			}
			verdict, err := e.mayOpen(ep, caller, g, in)
			if err != nil {
				return broker.Incident{}, err
			}
			verdicts = append(verdicts, verdict)
			g.Incident = in.ID
			grants = append(grants, g)
			in.Grants = append(in.Grants, g.ID)
		}
	}
	once := asked{caller: caller.Principal(), key: req.Key, kind: "incident",
		digest: requestDigest("incident", req.Title, req.Reference, req.Agents, req.Tools, req.Duration)}
	made := in
	err := e.update(ctx, now, func(t store.Txn) error {
		made = in
		if err := ep.same(t); err != nil {
			return err
		}
		id, err := once.take(t, string(in.ID), now)
		if err != nil {
			return err
		}
		if id != "" {
			made, err = madeBy[broker.Incident](t, once, keyIncident(broker.IncidentID(id)))
			return err
		}
		if err := e.paces.may(ep, caller, now); err != nil {
			return err
		}
		open, _, err := get[int](t, keyOpener(caller.Principal()))
		if err != nil {
			return err
		}
		if err := policy.AnotherIncident(opener, open).Err(); err != nil {
			return err
		}
		if err := put(t, keyOpener(caller.Principal()), open+1); err != nil {
			return err
		}
		if err := put(t, keyIncident(in.ID), in); err != nil {
			return err
		}
		if err := t.Put(keyHouse(in.EndsAt, houseIncident, string(in.ID)), nil); err != nil {
			return err
		}
		together := policy.Verdict{Allowed: true, Digest: ep.policies().Digest()}
		for i, g := range grants {
			if err := openGrant(t, g, caller, verdicts[i]); err != nil {
				return err
			}
			together.Policies = append(together.Policies, verdicts[i].Policies...)
		}
		slices.Sort(together.Policies)
		together.Policies = slices.Compact(together.Policies)
		return appendEvent(t, audit.Event{
			Time: now, Type: audit.IncidentOpened, Actor: caller.Principal().String(), Incident: in.ID,
			Tool: strings.Join(req.Tools, ","), Agent: joinIDs(req.Agents),
			Reason: in.Title, Correlation: caller.Correlation,
			Details: tellVerdict(map[string]string{"reference": in.Reference, "ends_at": in.EndsAt.Format(time.RFC3339)}, together),
		})
	})
	if err != nil {
		return broker.Incident{}, again(err)
	}
	if made.ID == in.ID {
		e.paces.gave(ep, caller, false, now)
	}
	e.house.dueAt(made.EndsAt)
	return made, nil
}

// mayOpen asks the policy set whether a window may be opened for one grant.
func (e *Engine) mayOpen(ep *epoch, caller broker.Caller, g broker.Grant, in broker.Incident) (policy.Verdict, error) {
	agent, _ := ep.catalog.Agent(g.Agent)
	tool, _ := ep.catalog.Tool(g.Tool)
	v := e.decide(ep, policy.Query{
		Action: policy.ActionOpenIncident, Subject: ep.catalog.Subject(caller), Tool: &tool, Agent: &agent,
		Duration: in.EndsAt.Sub(in.OpenedAt), Reason: in.Title, Incident: in, Requester: caller.Principal(), Now: in.OpenedAt,
	})
	if !v.Allowed {
		return v, v.Refusal(callerName(caller), fmt.Sprintf("open a window with %s for %s", g.Tool, g.Agent))
	}
	return v, nil
}

func checkIncident(req *IncidentRequest) error {
	if err := broker.CheckText("title", req.Title, broker.MaxReason); err != nil {
		return err
	}
	if err := broker.CheckText("reference", req.Reference, broker.MaxReference); err != nil {
		return err
	}
	if err := checkKey(req.Key); err != nil {
		return err
	}
	switch {
	case strings.TrimSpace(req.Title) == "":
		return broker.Refuse(broker.ReasonInvalidArgument, "an incident needs a title", "say what happened with --title")
	case len(req.Agents) == 0, len(req.Tools) == 0:
		return broker.Refuse(broker.ReasonInvalidArgument, "a window needs at least one agent and one tool", "name them with --agent and --tool")
	case len(req.Agents) > maxWindow, len(req.Tools) > maxWindow, len(req.Agents)*len(req.Tools) > maxWindow:
		return broker.Refusef(broker.ReasonInvalidArgument, "open several incidents",
			"%d agents and %d tools would need %d grants; one incident makes at most %d",
			len(req.Agents), len(req.Tools), len(req.Agents)*len(req.Tools), maxWindow)
	}
	req.Agents, req.Tools = slices.Clone(req.Agents), slices.Clone(req.Tools) // the caller's stay as they are
	slices.SortFunc(req.Agents, func(a, b spiffeid.ID) int { return strings.Compare(a.String(), b.String()) })
	slices.Sort(req.Tools)
	if len(slices.Compact(slices.Clone(req.Agents))) != len(req.Agents) || len(slices.Compact(slices.Clone(req.Tools))) != len(req.Tools) {
		return broker.Refuse(broker.ReasonInvalidArgument, "an agent or a tool is named twice", "name each once")
	}
	return nil
}

func joinIDs(ids []spiffeid.ID) string {
	s := make([]string, len(ids))
	for i, id := range ids {
		s[i] = id.String()
	}
	return strings.Join(s, ",")
}

// CloseIncident closes an incident and ends its grants and leases. When it has
// returned nil, no lease of the incident is ever delivered; Ended says how many
// of those that were alive are confirmed dead, and how many are still being
// revoked. Closing what is closed tells how its leases stand.
func (e *Engine) CloseIncident(ctx context.Context, caller broker.Caller, id broker.IncidentID, reason string) (broker.Incident, Ended, error) {
	in, ended, err := e.closeIncident(ctx, caller, id, reason)
	if err != nil {
		e.Refused(ctx, caller, "close_incident", "", err)
	}
	return in, ended, err
}

func (e *Engine) closeIncident(ctx context.Context, caller broker.Caller, id broker.IncidentID, reason string) (broker.Incident, Ended, error) {
	if err := broker.CheckText("reason", reason, broker.MaxReason); err != nil {
		return broker.Incident{}, Ended{}, err
	}
	ep := e.current.Load() // ending does not wait for a reload
	sees := e.seesAll(ctx, ep, caller)
	why := sweepRecord{Cause: broker.CauseIncidentClosed, Actor: caller.Principal().String(), Reason: reason, Correlation: caller.Correlation}
	var in broker.Incident
	now := e.clock.now()
	err := e.update(ctx, now, func(t store.Txn) error {
		was, ok, err := get[broker.Incident](t, keyIncident(id))
		if err != nil {
			return err
		}
		if !ok {
			return policy.NotFound("incident", string(id))
		}
		if err := policy.CloseIncident(caller.ID, was, ep.isCloser(caller.ID, was), sees || ep.sees(caller, was)).Err(); err != nil {
			return err
		}
		in, err = closeIncident(t, id, now, why)
		return err
	})
	if untellable(err) {
		err = e.closeAnyway(ctx, caller, ep, sees, id, why, err)
	}
	if err != nil {
		return broker.Incident{}, Ended{}, err
	}
	ids, err := e.sweepIncident(context.WithoutCancel(ctx), id, why) // only the waiting is the caller's
	if err != nil {
		e.house.poke() // it goes on with the sweep
		return broker.Incident{}, Ended{}, err
	}
	if err := e.awaitDeliveries(ctx, in.Grants...); err != nil {
		return broker.Incident{}, Ended{}, err
	}
	ended, err := e.awaitEnd(ctx, ids)
	return in, ended, err
}

// isCloser reports whether the catalog lets id close what the incident's
// opener opened.
func (ep *epoch) isCloser(id spiffeid.ID, in broker.Incident) bool {
	by, _ := in.OpenedBy.Workload()
	opener, ok := ep.catalog.Opener(by)
	return ok && opener.Closers != "" && ep.catalog.InGroup(id, opener.Closers)
}

// closeIncident closes an open incident: the commit of this is the instant
// from which nothing of it can be delivered. One that is closed stays as it is.
func closeIncident(t store.Txn, id broker.IncidentID, now time.Time, why sweepRecord) (broker.Incident, error) {
	in, ok, err := get[broker.Incident](t, keyIncident(id))
	if err != nil || !ok || in.State != broker.IncidentOpen {
		return in, err
	}
	in.State, in.ClosedBy, in.ClosedAt = broker.IncidentClosed, why.Actor, now
	if err := put(t, keyIncident(id), in); err != nil {
		return in, err
	}
	open, _, err := get[int](t, keyOpener(in.OpenedBy))
	if err != nil {
		return in, err
	}
	if err := put(t, keyOpener(in.OpenedBy), max(open-1, 0)); err != nil {
		return in, err
	}
	if err := put(t, keySweep(sweepIncident, string(id)), why); err != nil {
		return in, err
	}
	if err := t.Put(keyEnded(now, retiredIncident, string(id)), nil); err != nil {
		return in, err
	}
	return in, appendEvent(t, audit.Event{
		Time: now, Type: audit.IncidentClosed, Actor: why.Actor, Incident: id,
		Reason: why.Reason, Cause: string(why.Cause), Correlation: why.Correlation,
	})
}
