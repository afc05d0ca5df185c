package lease

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/broker"
)

// The store's layout. Parts of a key are joined with "|", which stands in no
// SPIFFE ID, name or ID. Guard keys, the ones that conflicts are made on, are
// marked (guard).
//
//	meta|installation              installation ID, made once
//	meta|clock                     high-water mark of time
//	meta|catalog                   generation and digest of the catalog   (guard)
//	lease|ID                       the lease
//	grant|ID                       the grant                              (guard)
//	incident|ID                    the incident                           (guard)
//	opener|principal               how many incidents it has open         (guard)
//	idem|principal|key             what an idempotency key made           (guard)
//	grants|agent|tool|ID           the open grants of an agent for a tool
//	leases|agent|ID                the leases of an agent
//	open|grant|ID                  the leases of a grant that have not ended
//	due|provider|time|ID           when a lease that has not ended is next looked at
//	house|time|kind|ID             when a grant, an incident or an ended lease is next looked at
//	ended|time|kind|ID             when a request, a grant or an incident ended (retire.go)
//	revoking|time|ID               the leases in state revoking, by their end
//	sweep|kind|ID                  a change whose leases may not all have been told
//	request|ID                     the request                            (guard)
//	requests|agent|ID              the requests of an agent
//	waiting|ID                     the requests that are pending; the value is their incident
//	held|agent                     how many leases of an agent have not ended (guard)
//	asking|agent                   how many requests of an agent are pending (guard)
//	person|digest                  what the identity provider said last of a person (guard)
//	votes|digest|grant             the open grants that stand on a person's vote
//	usertoken|digest               the agent that a user's token is bound to (guard)
//	meta|recovery                  who may administer for a while whatever the policies say
//	cutoff|ID                      a role of a provider that is cut off, by cutOffID                      (guard)
//	stands|provider|ID             a lease that is denied at the provider until it dies by itself (standing.go)
//	meta|restored                  the mark of a backup that was put in place: the restore is not done
//	stray|provider|name            something at a provider that nobody here answers for
const (
	keyInstallation = "meta|installation"
	keyClock        = "meta|clock"
	keyCatalog      = "meta|catalog"
	keyBackup       = "meta|restored"
	keyRecovery     = "meta|recovery"

	prefixLease    = "lease|"
	prefixGrant    = "grant|"
	prefixIncident = "incident|"
	prefixGrants   = "grants|"
	prefixOpens    = "open|"
	prefixRevoking = "revoking|"
	prefixSweep    = "sweep|"
	prefixHouse    = "house|"
	prefixDue      = "due|"
	prefixEnded    = "ended|"
	prefixStray    = "stray|"
	prefixRequest  = "request|"
	prefixWaiting  = "waiting|"
)

func keyLease(id broker.LeaseID) string       { return prefixLease + string(id) }
func keyGrant(id broker.GrantID) string       { return prefixGrant + string(id) }
func keyIncident(id broker.IncidentID) string { return prefixIncident + string(id) }
func keyOpener(p broker.Principal) string     { return "opener|" + p.String() }

func keyIdem(caller broker.Principal, key string) string {
	return "idem|" + caller.String() + "|" + key
}

func prefixGrantsOf(agent spiffeid.ID) string { return prefixGrants + agent.String() + "|" }

func prefixGrantsFor(agent spiffeid.ID, tool string) string {
	return prefixGrantsOf(agent) + tool + "|"
}

func keyGrantOf(g broker.Grant) string {
	return prefixGrantsFor(g.Agent, g.Tool) + string(g.ID)
}

func prefixLeasesOf(agent spiffeid.ID) string { return "leases|" + agent.String() + "|" }

func keyLeaseOf(agent spiffeid.ID, id broker.LeaseID) string {
	return prefixLeasesOf(agent) + string(id)
}

func prefixOpen(grant broker.GrantID) string { return prefixOpens + string(grant) + "|" }

func keyOpen(grant broker.GrantID, id broker.LeaseID) string {
	return prefixOpen(grant) + string(id)
}

func prefixDueOf(provider string) string { return prefixDue + provider + "|" }

func keyDue(provider string, at time.Time, id broker.LeaseID) string {
	return prefixDueOf(provider) + keyTime(at) + "|" + string(id)
}

func keyRevoking(end time.Time, id broker.LeaseID) string {
	return prefixRevoking + keyTime(end) + "|" + string(id)
}

func keyHouse(at time.Time, kind, id string) string {
	return prefixHouse + keyTime(at) + "|" + kind + "|" + id
}

func keyEnded(at time.Time, kind, id string) string {
	return prefixEnded + keyTime(at) + "|" + kind + "|" + id
}

func keySweep(kind, id string) string { return prefixSweep + kind + "|" + id }

func prefixStraysOf(provider string) string { return prefixStray + provider + "|" }

// The name of a stray is another system's, and may hold a "|".
func keyStray(provider, name string) string { return prefixStraysOf(provider) + name }

func keyRequest(id broker.RequestID) string { return prefixRequest + string(id) }
func keyWaiting(id broker.RequestID) string { return prefixWaiting + string(id) }
func keyAsking(agent spiffeid.ID) string    { return "asking|" + agent.String() }
func keyHeld(agent spiffeid.ID) string      { return "held|" + agent.String() }

func prefixRequestsOf(agent spiffeid.ID) string { return "requests|" + agent.String() + "|" }

func keyRequestOf(agent spiffeid.ID, id broker.RequestID) string {
	return prefixRequestsOf(agent) + string(id)
}

// A person is named by personDigest: what the identity provider calls them may
// hold anything.
func keyPerson(digest string) string     { return "person|" + digest }
func prefixVotesOf(digest string) string { return "votes|" + digest + "|" }

func keyVote(digest string, grant broker.GrantID) string {
	return prefixVotesOf(digest) + string(grant)
}

func keyUserToken(digest string) string { return "usertoken|" + digest }

// keyTime writes an instant so that the order of keys is the order of time.
// Instants before 1970 count as 1970.
func keyTime(t time.Time) string { return fmt.Sprintf("%016x", max(t.UnixNano(), 0)) }

// timeOfKey reads the instant of a key whose part at index i is a keyTime.
func timeOfKey(key string, i int) (time.Time, error) {
	parts := strings.Split(key, "|")
	if i >= len(parts) {
		return time.Time{}, fmt.Errorf("key %q has no part %d", key, i)
	}
	ns, err := strconv.ParseInt(parts[i], 16, 64)
	if err != nil {
		return time.Time{}, fmt.Errorf("reading the time in key %q: %w", key, err)
	}
	return time.Unix(0, ns).UTC(), nil
}

// lastPart is what stands behind the last "|" of a key: the ID.
func lastPart(key string) string { return key[strings.LastIndexByte(key, '|')+1:] }
