// Package audit is the evidence: who did what, when, why, and what became of
// it. An event is written in the same transaction as the change that it tells
// of, and that record is the evidence; what feeds other systems reads it from
// there, in order.
package audit

import (
	"encoding/json"
	"fmt"
	"time"

	"github.com/mayfly-security/mayfly/broker"
)

// Log is the name of the store's log that holds the evidence.
const Log = "evidence"

// version is the newest version of the record that this code writes and reads.
const version = 1

// Broker is the actor of what the broker does by itself.
const Broker = "broker"

// Type says what happened, as noun.verb.
type Type string

// The types of events.
const (
	CatalogLoaded      Type = "catalog.loaded"
	CatalogRefused     Type = "catalog.refused"
	GrantCreated       Type = "grant.created"
	GrantEnded         Type = "grant.ended"
	IncidentOpened     Type = "incident.opened"
	IncidentClosed     Type = "incident.closed"
	LeaseIntended      Type = "lease.intended"
	LeaseActive        Type = "lease.active"
	LeaseRevoking      Type = "lease.revoking"
	LeaseProgressed    Type = "lease.progressed"
	LeaseRevoked       Type = "lease.revoked"
	LeaseExpired       Type = "lease.expired"
	LeaseLapsed        Type = "lease.lapsed"
	LeaseReplayed      Type = "lease.replayed"
	RequestCreated     Type = "request.created"
	RequestApproved    Type = "request.approved" // one person's yes
	RequestDenied      Type = "request.denied"
	RequestGranted     Type = "request.granted"
	RequestEnded       Type = "request.ended" // expired, withdrawn or void
	SessionStarted     Type = "session.started"
	SessionEnded       Type = "session.ended"
	PersonChanged      Type = "person.changed"  // the identity provider tells other groups of a person than before
	AccessEnding       Type = "access.ending"   // the kill switch
	AccessEnded        Type = "access.ended"    // all that it matched is dead, or lapsed
	RecoveryOpened     Type = "recovery.opened" // somebody may administer whatever the policies say
	RecoveryClosed     Type = "recovery.closed"
	RequestRefused     Type = "request.refused"
	RefusalsSuppressed Type = "request.refusals_suppressed"
	BrokerStarted      Type = "broker.started"
	ClockUntrusted     Type = "clock.untrusted"
	ClockTrusted       Type = "clock.trusted"
	StoreBackedUp      Type = "store.backed_up"
	StoreRestored      Type = "store.restored"
	StrayFound         Type = "stray.found"      // something at a provider bears our name and no lease of ours
	StrayEnding        Type = "stray.ending"     // an operator decided that it is to be ended
	StrayRemoved       Type = "stray.removed"    // it was ended and removed, or was gone
	CutOffRequested    Type = "cutoff.requested" // an operator decided that every session of a role is to be ended
	CutOffWritten      Type = "cutoff.written"
	CutOffVerified     Type = "cutoff.verified"
	CutOffFailed       Type = "cutoff.failed" // the provider did not take it; it is tried again
	CutOffEnded        Type = "cutoff.ended"  // it need not stand any more: whatever it was to end is dead by itself
)

// Event is one piece of evidence. Empty fields do not apply. No field ever
// holds a secret.
type Event struct {
	Sequence    uint64               `json:"-"` // the place in the log; set when read
	Time        time.Time            `json:"time"`
	Type        Type                 `json:"type"`
	Actor       string               `json:"actor,omitempty"` // a broker.Principal, or who reached the host: "signal:SIGHUP"
	Agent       string               `json:"agent,omitempty"`
	Tool        string               `json:"tool,omitempty"`
	Provider    string               `json:"provider,omitempty"`
	Lease       broker.LeaseID       `json:"lease,omitempty"`
	Grant       broker.GrantID       `json:"grant,omitempty"`
	Incident    broker.IncidentID    `json:"incident,omitempty"`
	Request     broker.RequestID     `json:"request,omitempty"`
	OnBehalfOf  broker.Principal     `json:"on_behalf_of,omitempty"` // the user for whom the agent acts (RFC 8693); the agent stays the actor
	Reason      string               `json:"reason,omitempty"`       // why, in the actor's words
	Cause       string               `json:"cause,omitempty"`        // why, as a stable word: a broker.Reason or broker.Cause
	Correlation broker.CorrelationID `json:"correlation,omitempty"`
	Details     map[string]string    `json:"details,omitempty"`
}

type record struct {
	Version int `json:"v"`
	Event
}

// Encode returns the event as it stands in the log.
func Encode(e Event) ([]byte, error) {
	b, err := json.Marshal(record{Version: version, Event: e})
	if err != nil {
		return nil, fmt.Errorf("encoding event %s: %w", e.Type, err)
	}
	return b, nil
}

// Decode reads an entry of the log.
func Decode(sequence uint64, value []byte) (Event, error) {
	var r record
	if err := json.Unmarshal(value, &r); err != nil {
		return Event{}, fmt.Errorf("decoding event %d: %w", sequence, err)
	}
	if r.Version > version {
		return Event{}, fmt.Errorf("event %d has version %d and this broker reads up to %d: it was written by a newer Mayfly", sequence, r.Version, version)
	}
	r.Event.Sequence = sequence
	return r.Event, nil
}
