package broker

import (
	"errors"
	"fmt"
)

// Reason is a stable, machine-readable word for why something was refused. It
// is part of the API: a reason is never renamed, only added.
type Reason string

// The reasons. Reasons() describes each.
const (
	ReasonUnauthenticated  Reason = "unauthenticated"
	ReasonSVIDExpired      Reason = "svid_expired"
	ReasonSVIDNotYetValid  Reason = "svid_not_yet_valid"
	ReasonSVIDMalformed    Reason = "svid_malformed"
	ReasonUntrusted        Reason = "svid_untrusted"
	ReasonTrustDomain      Reason = "trust_domain_unknown"
	ReasonAgentUnknown     Reason = "agent_unknown"
	ReasonAgentDisabled    Reason = "agent_disabled"
	ReasonPermissionDenied Reason = "permission_denied"
	ReasonNotFound         Reason = "not_found"
	ReasonInvalidArgument  Reason = "invalid_argument"
	ReasonParameter        Reason = "parameter_invalid"
	ReasonTTL              Reason = "ttl_invalid"
	ReasonToolUnknown      Reason = "tool_unknown"
	ReasonNoGrant          Reason = "no_grant"
	ReasonGrantSuspended   Reason = "grant_suspended"
	ReasonGrantUsed        Reason = "grant_used_up"
	ReasonIncidentClosed   Reason = "incident_closed"
	ReasonIncidentLimit    Reason = "incident_limit"
	ReasonLeaseLimit       Reason = "lease_limit"
	ReasonSelfService      Reason = "self_service"
	ReasonKeyReused        Reason = "idempotency_key_reused"
	ReasonSecretGone       Reason = "secret_gone"
	ReasonProvider         Reason = "provider_unavailable"
	ReasonProviderRefused  Reason = "provider_refused"
	ReasonStore            Reason = "store_unavailable"
	ReasonClock            Reason = "clock_untrusted"
	ReasonShuttingDown     Reason = "shutting_down"
	ReasonRateLimited      Reason = "rate_limited"
	ReasonTooLarge         Reason = "too_large"
	ReasonConflict         Reason = "conflict"
	ReasonInternal         Reason = "internal"
	ReasonPolicy           Reason = "policy_denied"
	ReasonPolicyInvalid    Reason = "policy_invalid"
	ReasonRequestLimit     Reason = "request_limit"
	ReasonRequestOver      Reason = "request_over"
	ReasonNotEligible      Reason = "not_eligible"
	ReasonStepUp           Reason = "insufficient_user_authentication" // RFC 9470's word
	ReasonSessionOver      Reason = "session_over"
	ReasonTokenInvalid     Reason = "token_invalid"
	ReasonTokenReplayed    Reason = "token_replayed"
	ReasonSignIn           Reason = "sign_in_failed"
	ReasonSignInPending    Reason = "sign_in_pending"
	ReasonLockout          Reason = "lockout"
)

// ReasonDoc describes one reason for the reference.
type ReasonDoc struct {
	Reason  Reason
	Meaning string // what happened
	Next    string // what the caller can do about it
}

// Reasons describes every reason, in the order of the reference.
func Reasons() []ReasonDoc {
	return []ReasonDoc{
		{ReasonUnauthenticated, "No client certificate, or none that names anybody.", "Connect with an X.509-SVID; see `mayfly whoami`."},
		{ReasonSVIDExpired, "The SVID's validity period is over.", "Fetch a fresh SVID from the Workload API and connect again."},
		{ReasonSVIDNotYetValid, "The SVID's validity period has not begun.", "Compare the clocks of both machines."},
		{ReasonSVIDMalformed, "The certificate is no X.509-SVID: it has no SPIFFE ID or more than one, or it is a CA certificate.", "Use a leaf certificate with exactly one SPIFFE ID as its URI SAN."},
		{ReasonUntrusted, "The SVID does not chain to the current bundle of its trust domain.", "Its authority may have been rotated out: fetch a fresh SVID."},
		{ReasonTrustDomain, "The SVID's trust domain is neither the broker's own nor federated with it.", "Ask an operator to federate the trust domain."},
		{ReasonAgentUnknown, "The SPIFFE ID is authentic, but the catalog does not know it, or not as an agent.", "Ask an operator to add the agent to the catalog."},
		{ReasonAgentDisabled, "The agent is disabled in the catalog.", "Ask the agent's owner or an operator."},
		{ReasonPermissionDenied, "The caller may not do this.", "The message says who may."},
		{ReasonNotFound, "There is no such thing, or it is not the caller's.", "List what is yours and copy the ID whole."},
		{ReasonInvalidArgument, "A field of the request is malformed, too long or contradictory.", "The message names the field."},
		{ReasonParameter, "A parameter is missing, not declared by the tool, or outside its type or pattern.", "See the tool's parameters with `mayfly tools`."},
		{ReasonTTL, "The TTL is zero, negative, or beyond the tool's maximum.", "Ask for a TTL between 1s and the tool's maximum."},
		{ReasonToolUnknown, "There is no tool of that name for this caller.", "See `mayfly tools`."},
		{ReasonNoGrant, "The agent has no grant for the tool that is good now.", "Ask an operator for a grant, or the incident's opener for a window."},
		{ReasonGrantSuspended, "The tool was changed after the grant was made, so the grant no longer says what would be given.", "Ask for a new grant."},
		{ReasonGrantUsed, "The grant's uses are used up.", "Ask for a new grant."},
		{ReasonIncidentClosed, "The incident that the grant belongs to is closed.", "Access ended with the incident; nothing to do."},
		{ReasonIncidentLimit, "The opener has as many incidents open as it may.", "Close one first."},
		{ReasonLeaseLimit, "The agent has as many leases as it may have at once.", "Give some back (`mayfly revoke`), or have `max_leases` of the agent raised in the catalog."},
		{ReasonSelfService, "Nobody opens a window, or makes a grant, for itself.", "Let another identity do it."},
		{ReasonKeyReused, "The idempotency key was used for a different request.", "Use a new key for a new request."},
		{ReasonSecretGone, "The lease of this idempotency key exists, but its secret can no longer be handed out. The lease is being ended.", "Ask again with a new idempotency key; a grant that counts its uses has spent one."},
		{ReasonProvider, "The provider did not answer, or not in time. What it may have made is being ended.", "Try again later; operators see the cause in the log by correlation ID."},
		{ReasonProviderRefused, "The provider refused to make the credential.", "An operator finds the cause in the log by correlation ID."},
		{ReasonStore, "The broker cannot write its store, so it gives nothing.", "Try again later; operators see the cause in the log."},
		{ReasonClock, "The broker's clock jumped, so it gives nothing until it is trusted again.", "Operators: set the clock right; see the guide's page on time."},
		{ReasonShuttingDown, "The broker is stopping.", "Try again."},
		{ReasonRateLimited, "Too many requests at once, or too fast.", "Slow down and try again."},
		{ReasonTooLarge, "The request is larger than is taken.", "Send less."},
		{ReasonConflict, "The thing is already in a state that excludes this.", "Look at its present state."},
		{ReasonPolicy, "The policy does not allow it.", "The message names the policies; `mayfly policy explain` says what would allow it."},
		{ReasonPolicyInvalid, "The policy set, or a case of its tests, is not valid.", "The message names file, line and the nearest valid name."},
		{ReasonRequestLimit, "The agent has as many requests waiting as it may.", "Withdraw one (`mayfly request withdraw`), or wait until one is decided."},
		{ReasonRequestOver, "The request was decided, expired or is void, so that it takes no vote.", "Look at its state; ask again if it is void or expired."},
		{ReasonNotEligible, "The approval rule does not let this person decide this request.", "The message says who may."},
		{ReasonStepUp, "The sign-in is too old, or of a weaker kind, than this act needs (RFC 9470).", "Sign in again as max_age and acr_values say; `mayfly` does it by itself. A sign-in by device code never counts."},
		{ReasonSessionOver, "The session has ended: it expired, or was signed out.", "Sign in again with `mayfly login`."},
		{ReasonTokenInvalid, "The bearer token, or the user's token, is not one that this broker takes: malformed, forged, expired, or for another audience.", "Get a token of the configured identity provider for the broker's audience."},
		{ReasonTokenReplayed, "The token was used before by somebody else, or can be used once.", "Get a new one."},
		{ReasonSignIn, "The sign-in did not come to an end.", "Begin again with `mayfly login`."},
		{ReasonSignInPending, "The person has not finished the sign-in yet.", "Ask again after the interval."},
		{ReasonLockout, "The new policy set would let nobody administer the broker.", "Keep a policy that permits `administer` to somebody."},
		{ReasonInternal, "Something unexpected happened.", "Give the correlation ID to an operator."},
	}
}

// Error is a refusal that a caller may see. Message says what happened and
// why, Next what to do; neither ever holds upstream text or a secret. An error
// that is no *Error reaches a caller as ReasonInternal with a correlation ID,
// never as itself.
type Error struct {
	Reason  Reason
	Message string
	Next    string
	Lease   LeaseID // the lease that this is about; empty for most
	StepUp  StepUp  // what a new sign-in must be; zero unless Reason is ReasonStepUp
	// Correlation ties the refusal to the broker's log and evidence. It is set
	// where the refusal reached a caller (broker/client), and nowhere else.
	Correlation CorrelationID
	err         error // the cause, for the log; never for the caller
}

func (e *Error) Error() string {
	if e.err != nil {
		return fmt.Sprintf("%s: %s: %v", e.Reason, e.Message, e.err)
	}
	return fmt.Sprintf("%s: %s", e.Reason, e.Message)
}

// Unwrap gives the cause, which is for logs and never for callers.
func (e *Error) Unwrap() error { return e.err }

// Because returns a copy of e that carries cause for the log.
func (e *Error) Because(cause error) *Error {
	c := *e
	c.err = cause
	return &c
}

// Refuse makes an Error.
func Refuse(reason Reason, message, next string) *Error {
	return &Error{Reason: reason, Message: message, Next: next}
}

// Refusef makes an Error whose message is formatted. Arguments that come from
// others are to be cleaned by the caller, or printed with %q.
func Refusef(reason Reason, next, format string, args ...any) *Error {
	return &Error{Reason: reason, Message: fmt.Sprintf(format, args...), Next: next}
}

// ReasonOf returns the reason of err: ReasonInternal if it has none, and "" if
// err is nil.
func ReasonOf(err error) Reason {
	if err == nil {
		return ""
	}
	var e *Error
	if errors.As(err, &e) {
		return e.Reason
	}
	return ReasonInternal
}
