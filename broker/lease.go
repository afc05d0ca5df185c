package broker

import (
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// LeaseState is where a lease is in its life; the design's picture has the arrows.
type LeaseState string

// The states of a lease. Overdue is a flag and no state: see Lease.Overdue.
const (
	LeaseMinting  LeaseState = "minting"  // intent is durable; the provider may have made something
	LeaseActive   LeaseState = "active"   // committed with its handle; may be delivered
	LeaseRevoking LeaseState = "revoking" // must die; its death is not confirmed
	LeaseRevoked  LeaseState = "revoked"  // the provider confirmed its death
	LeaseExpired  LeaseState = "expired"  // DiesAt passed, and nothing is left behind
	LeaseLapsed   LeaseState = "lapsed"   // over, and not known to be dead: a static secret, or one that an operator had forgotten
)

// Ended reports whether s is final.
func (s LeaseState) Ended() bool {
	return s == LeaseRevoked || s == LeaseExpired || s == LeaseLapsed
}

// Progress says how far a revocation has come at a provider that can only be
// asked. The words are ordered: each includes those before.
type Progress string

// The steps of a revocation.
const (
	ProgressNone      Progress = ""
	ProgressRequested Progress = "requested" // the provider was told
	ProgressWritten   Progress = "written"   // what will end it stands at the provider
	ProgressVerified  Progress = "verified"  // its death was observed, or the provider vouches for it
)

// Cause says why a lease ended or was ended.
type Cause string

// The causes.
const (
	CauseTTL             Cause = "ttl"              // its end came
	CauseReturned        Cause = "returned"         // the agent gave it back
	CauseRevoked         Cause = "revoked"          // an operator ended it
	CauseIncidentClosed  Cause = "incident_closed"  // the incident it was for closed
	CauseIncidentExpired Cause = "incident_expired" // the incident's hard end came
	CauseGrantWithdrawn  Cause = "grant_withdrawn"
	CauseGrantExpired    Cause = "grant_expired"
	CauseAgentDisabled   Cause = "agent_disabled"     // or removed from the catalog
	CauseToolChanged     Cause = "tool_changed"       // or removed from the catalog
	CausePolicy          Cause = "policy_changed"     // the policy set does not allow it any more
	CauseRuleChanged     Cause = "rule_changed"       // the approval rule that its grant came by, or removed from the tool
	CauseVoterLost       Cause = "voter_not_eligible" // a person whose vote its grant needed left the group that made the vote count
	CauseMintFailed      Cause = "mint_failed"        // the provider failed, or did not answer: what it may have made is ended
	CauseRestarted       Cause = "broker_restarted"
	CauseClockSetBack    Cause = "clock_set_back" // it was made while the clock ran ahead, and would live too long
	CauseSecretGone      Cause = "secret_gone"    // its agent asked for the secret again, which cannot be handed out any more
	CauseUndelivered     Cause = "undelivered"    // nobody was there to take it
	CauseForgotten       Cause = "forgotten"      // an operator gave up waiting for its death
	CauseCutOff          Cause = "cut_off"        // an operator ended every session of the role that it was one of
	CauseRestored        Cause = "store_restored" // the store came back from a backup: nothing of before is given any more
)

// Lease is one credential that was, or may have been, made under a grant. It
// holds everything about it but the secret.
type Lease struct {
	ID          LeaseID
	Agent       spiffeid.ID
	Tool        string
	ToolDigest  string
	Provider    string
	Params      map[string]string
	Grant       GrantID
	Incident    IncidentID // empty unless the grant belongs to one
	Reason      string     // the agent's, for this use; may be empty
	Correlation CorrelationID

	State    LeaseState
	Progress Progress
	Cause    Cause // empty while minting or active

	CreatedAt time.Time
	ActiveAt  time.Time // zero if it never became active
	End       time.Time // when it must be dead; moved to the present by what ends it early
	DiesAt    time.Time // when it dies by itself at the provider, by the provider's clock and with skew; zero if not known
	EndedAt   time.Time // when its death was confirmed; zero before

	// Survives tells people what of it outlives a revocation, and until when
	// that is; empty if nothing does.
	Survives string
	// Static: the secret was there before the lease and stays after it; only a
	// rotation ends it.
	Static bool `json:",omitempty"`
	// Left tells people what may still be there of an ended lease although it
	// works nowhere; empty if nothing is left.
	Left string `json:",omitempty"`
}

// Overdue reports whether the lease is past its end without its death being
// confirmed.
func (l Lease) Overdue(now time.Time) bool { return !l.State.Ended() && now.After(l.End) }

// Usable reports whether the lease's credential is to be accepted now: what a
// resource server that asks the broker is told.
func (l Lease) Usable(now time.Time) bool { return l.State == LeaseActive && now.Before(l.End) }
