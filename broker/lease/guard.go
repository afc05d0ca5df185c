package lease

import (
	"errors"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/policy"
)

// errStale means that the catalog was exchanged between a decision and its
// commit; the decision is to be made again by the new one.
var errStale = errors.New("the catalog was exchanged meanwhile")

// guard reads, in the transaction that it guards, everything that a lease of
// the grant lives on: the catalog's generation, the grant and its incident
// (I5). A reload, a withdrawal and a close each write one of these keys, so
// that a commit which read them before cannot stand beside one of those.
func (ep *epoch) guard(r getter, grant broker.GrantID) (policy.GrantFacts, error) {
	cat, _, err := get[catalogRecord](r, keyCatalog)
	if err != nil {
		return policy.GrantFacts{}, err
	}
	if cat.Generation != ep.generation {
		return policy.GrantFacts{}, errStale
	}
	return ep.read(r, grant)
}

// read is guard without the generation: for readers, who decide nothing that
// a commit makes last.
func (ep *epoch) read(r getter, grant broker.GrantID) (policy.GrantFacts, error) {
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
	return ep.facts(g, in), nil
}

// idem looks up what an idempotency key of this caller made. It returns "" if
// the key is empty or new, and a refusal if it was used for something else.
func idem(r getter, key string, kind, digest string) (id string, err error) {
	if key == "" {
		return "", nil
	}
	rec, ok, err := get[idemRecord](r, key)
	if err != nil || !ok {
		return "", err
	}
	if rec.Kind != kind || rec.Digest != digest {
		return "", broker.Refuse(broker.ReasonKeyReused,
			"this idempotency key was used for a different request", "use a new key for a new request")
	}
	return rec.ID, nil
}
