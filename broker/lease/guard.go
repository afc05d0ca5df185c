package lease

import (
	"errors"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/policy"
	"github.com/mayfly-security/mayfly/store"
)

// errStale means that the catalog was exchanged between a decision and its
// commit; the decision is to be made again by the new one.
var errStale = errors.New("the catalog was exchanged meanwhile")

// guard reads, in the transaction that it guards, everything that a lease of
// the grant lives on: the catalog's generation, the grant, its incident, and
// what is known of those on whose votes it stands (I5). A reload, a withdrawal,
// a close and a group lost each write one of these keys, so that a commit which
// read them before cannot stand beside one of those. params are the lease's,
// for the policies; nil means those of the grant.
func (ep *epoch) guard(r getter, grant broker.GrantID, params map[string]string, now time.Time) (policy.GrantFacts, error) {
	cat, _, err := get[catalogRecord](r, keyCatalog)
	if err != nil {
		return policy.GrantFacts{}, err
	}
	if cat.Generation != ep.generation {
		return policy.GrantFacts{}, errStale
	}
	return ep.read(r, grant, params, now)
}

// read is guard without the generation: for readers, who decide nothing that
// a commit makes last.
func (ep *epoch) read(r getter, grant broker.GrantID, params map[string]string, now time.Time) (policy.GrantFacts, error) {
	g, ok, err := get[broker.Grant](r, keyGrant(grant))
	if err != nil {
		return policy.GrantFacts{}, err
	}
	if !ok {
		return policy.GrantFacts{}, policy.NotFound("grant", string(grant))
	}
	var in broker.Incident
	if g.Incident != "" {
		// One that is missing is the zero Incident, which no grant holds under.
		if in, _, err = get[broker.Incident](r, keyIncident(g.Incident)); err != nil {
			return policy.GrantFacts{}, err
		}
	}
	return ep.weigh(r, g, in, params, now)
}

// weigh is read for a grant and an incident that were read.
func (ep *epoch) weigh(r getter, g broker.Grant, in broker.Incident, params map[string]string, now time.Time) (f policy.GrantFacts, err error) {
	f = policy.GrantFacts{Grant: g, Incident: in}
	f.Agent, f.AgentKnown = ep.catalog.Agent(g.Agent)
	f.Tool, f.ToolKnown = ep.catalog.Tool(g.Tool)
	if f.Lost, err = ep.lost(r, g); err != nil {
		return policy.GrantFacts{}, err
	}
	if f.AgentKnown && f.ToolKnown { // of what is not known nothing is allowed
		f.Policy = ep.decide(ep.aboutGrant(f, params, now))
	}
	return f, nil
}

// kindLease is the kind of what an IssueRequest makes.
const kindLease = "lease"

// asked is a request that may carry an idempotency key.
type asked struct {
	caller broker.Principal
	key    string // empty: the request stands alone
	kind   string // of what it makes: kindLease, "grant", "incident" or "request"
	digest string // of the request, so that a key is not used for two
}

// made returns the ID of what the key has made: "" if it is new or empty, and
// a refusal if it was used for something else.
func (a asked) made(r getter) (id string, err error) {
	if a.key == "" {
		return "", nil
	}
	rec, ok, err := get[idemRecord](r, keyIdem(a.caller, a.key))
	if err != nil || !ok {
		return "", err
	}
	if rec.Kind != a.kind || rec.Digest != a.digest {
		return "", broker.Refuse(broker.ReasonKeyReused,
			"this idempotency key was used for a different request", "use a new key for a new request")
	}
	return rec.ID, nil
}

// forgotten refuses a request whose key made something of which no record is left.
func (a asked) forgotten() *broker.Error {
	return broker.Refusef(broker.ReasonConflict, "use a new key for a new request; the evidence has what became of it",
		"the %s of this idempotency key ended long ago, and is forgotten", a.kind)
}

// madeBy is the record of what a key has made.
func madeBy[T any](r getter, a asked, key string) (T, error) {
	made, kept, err := get[T](r, key)
	if err == nil && !kept {
		err = a.forgotten()
	}
	return made, err
}

// take notes that the key makes id, or returns what it has made already.
func (a asked) take(t store.Txn, id string, now time.Time) (already string, err error) {
	if already, err = a.made(t); err != nil || already != "" || a.key == "" {
		return already, err
	}
	if a.kind != kindLease { // a lease's is forgotten with it
		if err := t.Put(keyEnded(now.Add(longestKey), retiredIdem, id), []byte(keyIdem(a.caller, a.key))); err != nil {
			return "", err
		}
	}
	return "", put(t, keyIdem(a.caller, a.key), idemRecord{Kind: a.kind, ID: id, Digest: a.digest})
}
