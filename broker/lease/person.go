package lease

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/audit"
	"github.com/mayfly-security/mayfly/broker/failpoint"
	"github.com/mayfly-security/mayfly/broker/policy"
	"github.com/mayfly-security/mayfly/store"
)

// personRecord is what the identity provider said last of a person. It is a
// guard key: a vote reads it in the transaction in which it counts.
type personRecord struct {
	Name, Issuer, Subject string
	Groups                []string  `json:",omitempty"`
	AuthTime              time.Time `json:",omitzero"` // the latest that was seen
	IssuedAt              time.Time `json:",omitzero"` // the latest that was seen
	SeenAt                time.Time
}

// personDigest names a person in keys: the identity provider's name for them,
// which may hold anything.
func personDigest(issuer, subject string) string {
	sum := sha256.Sum256([]byte(issuer + "\x00" + subject))
	return hex.EncodeToString(sum[:])
}

func newPersonRecord(p broker.Person, now time.Time) personRecord {
	groups := slices.Compact(slices.Sorted(slices.Values(p.Groups)))
	return personRecord{Name: p.Name, Issuer: p.Issuer, Subject: p.Subject, Groups: groups, AuthTime: p.AuthTime, IssuedAt: p.IssuedAt, SeenAt: now}
}

// next is the record after the identity provider said p. What it said earlier
// than the last, or of an earlier sign-in, takes groups away, and gives none.
func (r personRecord) next(p broker.Person, now time.Time) personRecord {
	is := newPersonRecord(p, now)
	if p.AuthTime.Before(r.AuthTime) || p.IssuedAt.Before(r.IssuedAt) {
		is.Name, is.AuthTime, is.IssuedAt = r.Name, later(r.AuthTime, p.AuthTime), later(r.IssuedAt, p.IssuedAt)
		is.Groups = slices.DeleteFunc(is.Groups, func(g string) bool { return !slices.Contains(r.Groups, g) })
	}
	return is
}

// same reports whether two records say the same, but for when.
func (r personRecord) same(o personRecord) bool {
	return r.Name == o.Name && slices.Equal(r.Groups, o.Groups) && r.AuthTime.Equal(o.AuthTime) && r.IssuedAt.Equal(o.IssuedAt)
}

// subject is a caller as policies see it now. A person has the name and the
// groups that the identity provider said last, whatever their session began
// with, and is in those of this epoch's catalog; one whom it never told of is
// what the caller says.
func (ep *epoch) subject(r getter, caller broker.Caller) (policy.Subject, error) {
	if caller.Person == nil {
		return ep.catalog.Subject(caller), nil
	}
	p := *caller.Person
	rec, known, err := get[personRecord](r, keyPerson(personDigest(p.Issuer, p.Subject)))
	if err != nil {
		return policy.Subject{}, err
	}
	if known {
		p.Name, p.Groups = rec.Name, rec.Groups
	}
	return ep.catalog.Subject(broker.Caller{Person: &p}), nil
}

// groupsOf are all groups that a person is in now.
func (ep *epoch) groupsOf(r getter, p broker.Person) ([]string, error) {
	s, err := ep.subject(r, broker.Caller{Person: &p})
	return s.Groups, err
}

// voter is a person as one who decides a request, and a refusal if its rule
// does not let them: by the name that they come with, or by the one that they
// have now.
func (ep *epoch) voter(r getter, rec requestRecord, b basis, p broker.Person) (s policy.Subject, refusal, err error) {
	if s, err = ep.subject(r, broker.Caller{Person: &p}); err != nil {
		return s, nil, err
	}
	if refusal = b.eligible(rec, p, s.Groups); refusal == nil {
		refusal = b.eligible(rec, *s.Person, s.Groups)
	}
	return s, refusal, nil
}

// lost is the first of the grant's voters who stood for it and does so no
// more; the zero Voter if all do.
func (ep *epoch) lost(r getter, g broker.Grant) (broker.Voter, error) {
	for _, v := range g.Voters {
		if !v.Standing {
			continue
		}
		groups, err := ep.groupsOf(r, broker.Person{Name: v.Name, Issuer: v.Issuer, Subject: v.Subject})
		if err != nil {
			return broker.Voter{}, err
		}
		if !slices.Contains(groups, v.Group) {
			return v, nil
		}
	}
	return broker.Voter{}, nil
}

// PersonSeen records what the identity provider says of a person. When it has
// returned, no vote counts for a group that they are not in any more, and what
// stood on one is being ended.
//
// It is called when somebody signs in, or shows a token of the provider's. One
// of before the last sign-in gives back no group that the last one took away.
func (e *Engine) PersonSeen(ctx context.Context, p broker.Person) error {
	if p.Name == "" || p.Issuer == "" || p.Subject == "" {
		return broker.Refuse(broker.ReasonTokenInvalid, "the identity provider did not say who this is", "an operator compares the claims with the broker's configuration")
	}
	digest := personDigest(p.Issuer, p.Subject)
	now := e.clock.now()
	// Whoever shows a token does so with each call: most of them tell nothing new.
	told := false
	err := e.view(ctx, func(r store.Reader) error {
		was, known, err := get[personRecord](r, keyPerson(digest))
		told = known && was.same(was.next(p, now))
		return err
	})
	if err != nil || told {
		return err
	}
	var lost []string
	sweep := false
	err = e.update(ctx, now, func(t store.Txn) error {
		lost, sweep = nil, false
		was, known, err := get[personRecord](t, keyPerson(digest))
		if err != nil {
			return err
		}
		is := newPersonRecord(p, now)
		if known {
			is = was.next(p, now)
		}
		if known && was.same(is) {
			return nil
		}
		if err := put(t, keyPerson(digest), is); err != nil {
			return err
		}
		for _, g := range was.Groups {
			if !slices.Contains(is.Groups, g) {
				lost = append(lost, g)
			}
		}
		// The catalog's groups go by the name.
		renamed := known && was.Name != is.Name
		if sweep = len(lost) > 0 || renamed; !sweep {
			return nil
		}
		if err := put(t, keySweep(sweepPerson, digest), sweepRecord{Cause: broker.CauseVoterLost, Actor: audit.Broker}); err != nil {
			return err
		}
		ev := audit.Event{Time: now, Type: audit.PersonChanged, Actor: p.Principal().String(),
			Details: map[string]string{
				"issuer": broker.Shorten(p.Issuer, 500), "lost": broker.Shorten(strings.Join(lost, ","), 2000),
				"groups": broker.Shorten(strings.Join(is.Groups, ","), 2000),
			}}
		if renamed {
			ev.Details["name_was"] = was.Name
		}
		return appendEvent(t, ev)
	})
	if err != nil || !sweep {
		return err
	}
	grants, err := e.sweepPerson(context.WithoutCancel(ctx), digest, sweepRecord{Cause: broker.CauseVoterLost, Actor: audit.Broker})
	if err != nil {
		e.house.poke() // it goes on with the sweep
		return err
	}
	return e.awaitDeliveries(ctx, grants...)
}

// sweepPerson ends the grants that stood on a person's vote for a group that
// they are not in any more, and their leases. It returns those grants.
func (e *Engine) sweepPerson(ctx context.Context, digest string, why sweepRecord) ([]broker.GrantID, error) {
	ep := e.settled()
	var gone []broker.GrantID
	var rec personRecord
	err := e.view(ctx, func(r store.Reader) (err error) {
		gone = gone[:0]
		if rec, _, err = get[personRecord](r, keyPerson(digest)); err != nil {
			return err
		}
		for entry, err := range r.Scan(store.Prefix(prefixVotesOf(digest))) {
			if err != nil {
				return err
			}
			id := broker.GrantID(lastPart(entry.Key))
			g, ok, err := get[broker.Grant](r, keyGrant(id))
			if err != nil {
				return err
			}
			if !ok {
				continue // the others are looked at all the same
			}
			v, err := ep.lost(r, g)
			if err != nil {
				return err
			}
			if v != (broker.Voter{}) {
				gone = append(gone, id)
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	failpoint.At("lease.sweep.begin")
	if err := e.endForGood(ctx, gone, why); err != nil {
		return nil, err
	}
	// What was told of the person meanwhile has a sweep of its own to do.
	return gone, e.update(ctx, e.clock.now(), func(t store.Txn) error {
		now, _, err := get[personRecord](t, keyPerson(digest))
		if err != nil || !now.SeenAt.Equal(rec.SeenAt) {
			return err
		}
		return t.Delete(keySweep(sweepPerson, digest))
	})
}

// endForGood withdraws grants and ends their leases.
func (e *Engine) endForGood(ctx context.Context, grants []broker.GrantID, why sweepRecord) error {
	now := e.clock.now()
	for part := range slices.Chunk(grants, grantChunk) {
		err := e.update(ctx, now, func(t store.Txn) error {
			for _, id := range part {
				if err := withdraw(t, id, now, why); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	for _, id := range grants {
		if _, err := e.sweepGrant(ctx, id, why); err != nil {
			return err
		}
	}
	return nil
}

// indexVotes keeps the index of the grants that stand on a person's vote.
func indexVotes(g broker.Grant, change func(key string) error) error {
	digests := map[string]struct{}{}
	for _, v := range g.Voters {
		if v.Standing {
			digests[personDigest(v.Issuer, v.Subject)] = struct{}{}
		}
	}
	for _, digest := range slices.Sorted(maps.Keys(digests)) {
		if err := change(keyVote(digest, g.ID)); err != nil {
			return err
		}
	}
	return nil
}
