package lease

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/audit"
	"github.com/mayfly-security/mayfly/broker/policy"
	"github.com/mayfly-security/mayfly/store"
)

// Vote is one person's decision of a request.
type Vote struct {
	Request  broker.RequestID
	Approve  bool
	Digest   string // of the request as it was shown; needed for a yes
	Comment  string
	Duration *time.Duration // the longest that is agreed to; nil means what was asked
}

// Vote is a person's yes or no. A yes that completes the quorum makes the grant
// in the same commit. Everything that the decision stands on is read in that
// commit's transaction: the request, the catalog's generation, the incident,
// and what is known of each person who voted. A vote therefore counts only if
// its voter is eligible at the moment at which the quorum is met.
//
// The same vote again changes nothing; a person's other vote is refused.
func (e *Engine) Vote(ctx context.Context, caller broker.Caller, v Vote) (RequestView, error) {
	view, err := e.vote(ctx, caller, v)
	if err != nil {
		act := "deny_request"
		if v.Approve {
			act = "approve_request"
		}
		e.Refused(ctx, caller, act, "", err)
		return RequestView{}, err
	}
	return view, nil
}

func (e *Engine) vote(ctx context.Context, caller broker.Caller, v Vote) (RequestView, error) {
	if caller.Person == nil {
		return RequestView{}, broker.Refuse(broker.ReasonPermissionDenied,
			"only a person decides a request, and no agent or other workload ever does", "let a person sign in (`mayfly login`) and decide it")
	}
	if err := broker.CheckText("comment", v.Comment, broker.MaxReason); err != nil {
		return RequestView{}, err
	}
	if v.Approve {
		if err := e.giving(); err != nil {
			return RequestView{}, err
		}
		if v.Digest == "" {
			return RequestView{}, broker.Refuse(broker.ReasonInvalidArgument, "a yes names the digest of the request as it was shown", "look at the request first, and send its digest")
		}
		if v.Duration != nil && *v.Duration <= 0 {
			return RequestView{}, broker.Refuse(broker.ReasonInvalidArgument, "the duration that is agreed to is not above zero", "leave it out to agree to what was asked, or deny the request")
		}
	}
	for range 8 {
		b := &ballot{e: e, ep: e.settled(), caller: caller, vote: v, now: e.clock.now()}
		err := e.update(ctx, b.now, func(t store.Txn) error { return b.cast(t) })
		if err == errStale {
			continue
		}
		if err != nil {
			return RequestView{}, err
		}
		b.after()
		if b.refusal != nil {
			return RequestView{}, b.refusal
		}
		return e.Request(context.WithoutCancel(ctx), caller, v.Request)
	}
	return RequestView{}, again(errStale)
}

// ballot is one vote on its way into the store. cast may run more than once.
type ballot struct {
	e      *Engine
	ep     *epoch
	caller broker.Caller
	vote   Vote
	now    time.Time

	// What the last run came to.
	rec     requestRecord
	query   policy.Query
	verdict policy.Verdict
	grant   broker.Grant
	refusal error // that goes with a commit: the request turned out to be void
	changed bool
}

// cast is the transaction of a vote.
func (b *ballot) cast(t store.Txn) error {
	b.grant, b.refusal, b.changed, b.query = broker.Grant{}, nil, false, policy.Query{}
	if err := b.ep.same(t); err != nil {
		return err
	}
	var ok bool
	var err error
	if b.rec, ok, err = get[requestRecord](t, keyRequest(b.vote.Request)); err != nil {
		return err
	}
	if !ok {
		return policy.NotFound("request", string(b.vote.Request))
	}
	person := *b.caller.Person
	was, voted := votedBy(b.rec, person)
	if voted {
		if err := b.again(was); err != nil || b.rec.State != broker.RequestPending {
			return err
		}
	}
	if b.rec.State != broker.RequestPending {
		return requestOver(b.rec.Request)
	}
	if !b.e.clock.late().Before(b.rec.ExpiresAt) {
		return broker.Refusef(broker.ReasonRequestOver, "let it be asked again", "request %s expired at %s", b.rec.ID, b.rec.ExpiresAt.Format(time.RFC3339))
	}
	if b.e.limbo.closed(b.rec.Incident) {
		return incidentOver(b.rec.Incident)
	}
	if b.e.limbo.withdrawn(b.ep, b.rec) {
		return broker.Refusef(broker.ReasonRequestOver, "let it be asked again", "request %s is being withdrawn", b.rec.ID)
	}
	basis, err := b.ep.basis(t, b.rec, b.now)
	if err != nil {
		return err
	}
	if basis.void != "" {
		// A refusal that leaves evidence is a commit.
		b.refusal = broker.Refusef(broker.ReasonRequestOver, "let it be asked again", "request %s is void: %s", b.rec.ID, basis.void)
		b.changed = true
		return b.rec.end(t, b.now, broker.RequestVoid, brokerCaller, basis.void)
	}
	if err := b.know(t, person); err != nil {
		return err
	}
	subject, refusal, err := b.ep.voter(t, b.rec, basis, person)
	if err != nil {
		return err
	}
	if refusal != nil {
		return refusal
	}
	b.query, b.verdict = b.ep.mayApprove(b.rec, basis, subject, b.now)
	if !b.verdict.Allowed {
		return b.verdict.Refusal(callerName(b.caller), "decide request "+string(b.rec.ID))
	}
	approval := broker.Approval{Person: person, Approved: b.vote.Approve, At: b.now, Comment: b.vote.Comment, Digest: b.vote.Digest,
		By: broker.Shorten(strings.Join(b.verdict.Policies, ","), 1000)}
	approval.Person.Groups = nil // what they are now is read anew each time
	b.changed = true
	if !b.vote.Approve {
		b.rec.Approvals = append(b.rec.Approvals, approval)
		who := byCaller(b.caller)
		who.by = permissionOf(b.verdict)
		return b.rec.end(t, b.now, broker.RequestDenied, who, b.vote.Comment)
	}
	if err := policy.StepUp(basis.rule.StepUp, person.AuthTime, person.ACR, person.Method, b.now); err != nil {
		return err
	}
	if b.vote.Digest != b.rec.Digest {
		return broker.Refuse(broker.ReasonConflict, "the request is not the one that was shown: the digests differ", "look at the request again, and decide by what it says")
	}
	if d := b.vote.Duration; d != nil && *d < b.rec.Duration {
		approval.Duration = *d
	}
	if len(b.rec.Approvals) >= maxApprovals {
		return broker.Refusef(broker.ReasonConflict, "let it be asked again", "request %s has %d votes already", b.rec.ID, maxApprovals)
	}
	if !voted { // one that stands is only counted anew
		b.rec.Approvals = append(b.rec.Approvals, approval)
		ev := b.rec.event(b.now, audit.RequestApproved, b.caller, b.verdict)
		tellApproval(&ev, approval)
		if err := appendEvent(t, ev); err != nil {
			return err
		}
	}
	tally, err := b.ep.count(t, b.rec, basis)
	if err != nil {
		return err
	}
	if !tally.Met {
		return put(t, keyRequest(b.rec.ID), b.rec)
	}
	if err := b.rec.leave(t); err != nil {
		return err
	}
	b.grant, err = b.rec.give(t, b.caller, b.now, tally.Duration, tally.Voters, b.verdict)
	return err
}

// know keeps the record of a person of whom there is none.
func (b *ballot) know(t store.Txn, p broker.Person) error {
	key := keyPerson(personDigest(p.Issuer, p.Subject))
	if _, known, err := get[personRecord](t, key); err != nil || known {
		return err
	}
	return put(t, key, newPersonRecord(p, b.now))
}

// again answers a person who voted before.
func (b *ballot) again(was broker.Approval) error {
	same := was.Approved == b.vote.Approve && (!b.vote.Approve || was.Digest == b.vote.Digest)
	if d := b.vote.Duration; same && b.vote.Approve {
		asked := time.Duration(0)
		if d != nil && *d < b.rec.Duration {
			asked = *d
		}
		same = was.Duration == asked
	}
	if same {
		return nil
	}
	said := "no"
	if was.Approved {
		said = "yes"
	}
	return broker.Refusef(broker.ReasonConflict, "a vote stands; withdraw the request, or let another decide",
		"%s said %s to request %s at %s", b.caller.Person.Name, said, b.rec.ID, was.At.Format(time.RFC3339))
}

// after is what follows a commit.
func (b *ballot) after() {
	if b.query.Action != "" {
		b.e.decisions.add(b.query, b.verdict)
	}
	if !b.changed {
		return
	}
	b.e.asks.signal()
	if b.rec.State != broker.RequestPending {
		b.e.metrics.requests.WithLabelValues(string(b.rec.State)).Inc()
	}
	if b.grant.ID != "" {
		b.e.house.dueAt(b.grant.NotAfter)
		if b.grant.BreakGlass {
			b.e.log.Warn("BREAK-GLASS: access was given under a rule for emergencies", "request", b.rec.ID, "grant", b.grant.ID,
				"agent", b.grant.Agent.String(), "tool", b.grant.Tool, "by", callerName(b.caller))
		}
	}
}

// votedBy is the vote that a person cast before.
func votedBy(rec requestRecord, p broker.Person) (broker.Approval, bool) {
	for _, a := range rec.Approvals {
		if a.Person.Same(p) {
			return a, true
		}
	}
	return broker.Approval{}, false
}

// requestOver is the refusal of what needs a request that is pending.
func requestOver(r broker.Request) *broker.Error {
	return broker.Refusef(broker.ReasonRequestOver, "look at its state; ask again if it is void or expired", "request %s is %s", r.ID, r.State)
}

// mayApprove asks the policy set whether a person may decide a request.
func (ep *epoch) mayApprove(rec requestRecord, b basis, voter policy.Subject, now time.Time) (policy.Query, policy.Verdict) {
	q := ep.about(policy.ActionApprove, rec, voter, b.incident, now)
	return q, ep.decide(q)
}

// voting is what the rule is asked about.
func (b basis) voting(rec requestRecord) policy.Voting {
	return policy.Voting{Rule: b.rule, Request: rec.Request, Owner: b.agent.Owner}
}

// eligible is Voting.Eligible, and knows whoever made the request by all of
// their names.
func (b basis) eligible(rec requestRecord, p broker.Person, groups []string) error {
	if b.rule.NotRequester && rec.Creator != nil && rec.Creator.Same(p) {
		return broker.Refusef(broker.ReasonNotEligible, "have somebody else decide",
			"%s made the request, and rule %s lets nobody approve their own", p.Name, b.rule.Name)
	}
	return b.voting(rec).Eligible(p, groups)
}

// count finds what the votes come to that count now: a vote does if its voter
// is eligible now, and policies let them approve.
func (ep *epoch) count(r getter, rec requestRecord, b basis) (policy.Tally, error) {
	var ballots []policy.Ballot
	for _, a := range rec.Approvals {
		if !a.Approved || a.Digest != rec.Digest {
			continue
		}
		subject, refusal, err := ep.voter(r, rec, b, a.Person)
		if err != nil {
			return policy.Tally{}, err
		}
		if refusal != nil {
			continue
		}
		// By what is so now, and the sign-in as old as it was at the vote.
		if _, v := ep.mayApprove(rec, b, subject, a.At); !v.Allowed {
			continue
		}
		ballots = append(ballots, policy.Ballot{Person: a.Person, Groups: subject.Groups, Duration: a.Duration})
	}
	return b.voting(rec).Tally(ballots), nil
}

func tellApproval(ev *audit.Event, a broker.Approval) {
	p := a.Person
	ev.Details["issuer"], ev.Details["subject"] = broker.Clean(broker.Shorten(p.Issuer, 300)), broker.Clean(broker.Shorten(p.Subject, 300))
	ev.Details["method"] = string(p.Method)
	if !p.AuthTime.IsZero() {
		ev.Details["auth_time"] = p.AuthTime.UTC().Format(time.RFC3339)
	}
	if p.ACR != "" {
		ev.Details["acr"] = broker.Clean(broker.Shorten(p.ACR, 200))
	}
	if a.Comment != "" {
		ev.Details["comment"] = a.Comment
	}
	if a.Duration > 0 {
		ev.Details["agreed_duration"] = fmt.Sprint(a.Duration)
	}
}
