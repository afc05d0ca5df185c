package lease

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/policy"
	"github.com/mayfly-security/mayfly/store"
)

// Preview is what a policy set would change.
type Preview struct {
	Problems                []string // then nothing else is filled
	Digest, Present         string
	Added, Removed, Changed []string // policy IDs
	Ends                    []PreviewGrant
	Grants                  int // open grants looked at
	Turns                   []PreviewDecision
	Decisions               int // decisions looked at
}

// PreviewGrant is an open grant that a new set would end.
type PreviewGrant struct {
	Grant  broker.Grant
	Leases int // that have not ended, and would end
	Why    string
}

// PreviewDecision is a decision that a new set would turn.
type PreviewDecision struct {
	At        time.Time
	Principal broker.Principal
	Action    policy.Action
	About     string
	Was, Now  bool
	Why       string
}

// Bounds on what a preview is made of.
const (
	maxSources    = 100
	maxSourceText = 1 << 20 // bytes of all files together
	maxProblems   = 100
)

// Preview says what a policy set would change if it were loaded beside the
// present catalog. Open grants are judged as the reload would judge them.
func (e *Engine) Preview(ctx context.Context, caller broker.Caller, files []policy.Source) (Preview, error) {
	p, err := e.preview(ctx, caller, files)
	if err != nil {
		e.Refused(ctx, caller, "preview", "", err)
	}
	return p, err
}

func (e *Engine) preview(ctx context.Context, caller broker.Caller, files []policy.Source) (Preview, error) {
	ep := e.current.Load()
	if _, err := e.administer(ctx, ep, caller, policy.VerbPolicy); err != nil {
		return Preview{}, err
	}
	size := 0
	for _, f := range files {
		size += len(f.Name) + len(f.Text)
	}
	if len(files) > maxSources || size > maxSourceText {
		return Preview{}, broker.Refusef(broker.ReasonTooLarge, "send fewer or smaller files",
			"%d files of %d bytes were sent; at most %d of %d bytes together are taken", len(files), size, maxSources, maxSourceText)
	}
	set, err := ep.catalog.LoadPolicies(files)
	if err != nil {
		return Preview{Present: ep.policies().Digest(), Problems: problemsOf(err)}, nil
	}
	now := e.clock.now()
	if err := ep.lockout(set, now); err != nil {
		return Preview{Present: ep.policies().Digest(), Problems: []string{messageOf(err)}}, nil
	}
	p := Preview{Digest: set.Digest(), Present: ep.policies().Digest()}
	p.Added, p.Removed, p.Changed = policy.Diff(ep.policies(), set)
	next := *ep
	next.tried = set
	if p.Ends, p.Grants, err = e.previewGrants(ctx, ep, &next, now); err != nil {
		return Preview{}, err
	}
	for _, d := range e.decisions.all() {
		p.Decisions++
		v := set.Decide(d.query)
		if v.Allowed == d.allowed {
			continue
		}
		p.Turns = append(p.Turns, PreviewDecision{
			At: d.query.Now, Principal: d.query.Subject.Principal(), Action: d.query.Action, About: about(d.query),
			Was: d.allowed, Now: v.Allowed, Why: set.Explain(d.query).Summary,
		})
	}
	return p, nil
}

// previewGrants finds the open grants that hold now and would not by the next
// epoch, as a reload would find them.
func (e *Engine) previewGrants(ctx context.Context, ep, next *epoch, now time.Time) (ends []PreviewGrant, looked int, err error) {
	err = e.paged(ctx, prefixGrants, func(r store.Reader, key string) (bool, error) {
		looked++
		id := broker.GrantID(lastPart(key))
		would, is, err := next.over(r, id, now)
		if err != nil || !is || would.cause != broker.CausePolicy {
			return true, err
		}
		was, over, err := ep.over(r, id, now)
		if err != nil {
			return false, err
		}
		if over && len(was.leases) >= len(would.leases) {
			return true, nil // it is over already
		}
		ends = append(ends, PreviewGrant{Grant: would.grant, Leases: len(would.leases) - len(was.leases),
			Why: would.verdict.Refusal(would.grant.Agent.String(), "be given "+would.grant.Tool).Message})
		return true, nil
	})
	return ends, looked, err
}

// about says what a decision was about, for people.
func about(q policy.Query) string {
	if q.Action == policy.ActionAdminister {
		return string(q.Verb)
	}
	text := ""
	if q.Tool != nil {
		text = q.Tool.Name
	}
	if q.Agent != nil && broker.WorkloadPrincipal(q.Agent.ID) != q.Subject.Principal() {
		text += " for " + q.Agent.ID.String()
	}
	return text
}

// problemsOf are the lines of what is wrong with a policy set.
func problemsOf(err error) (all []string) {
	var wrong policy.Errors
	if !errors.As(err, &wrong) {
		return []string{broker.Clean(broker.Shorten(err.Error(), 1000))}
	}
	for i, w := range wrong {
		if i == maxProblems {
			return append(all, fmt.Sprintf("and %d more", len(wrong)-i))
		}
		all = append(all, broker.Clean(broker.Shorten(w.Error(), 1000)))
	}
	return all
}

// lockout refuses a set that would let nobody administer beside this epoch's catalog.
func (ep *epoch) lockout(set *policy.Set, now time.Time) error {
	subjects := ep.catalog.Administrators(now)
	for _, p := range policy.MadeUp(set, ep.catalog.KnownGroups(), nil, now) {
		subjects = append(subjects, ep.catalog.Subject(broker.Caller{Person: &p}))
	}
	return policy.Lockout(set, subjects, now)
}
