package lease

import (
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/audit"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/store"
)

// recordVersion is the newest version of a record that this code writes and
// reads. A record of an older version is read as it is; one of a newer version
// is refused, for this code cannot know what it would overlook.
//
// Version 2 binds grants to their approval rule, to those who voted and to what
// policies say, which a broker of version 1 would not look at.
const recordVersion = 2

var errNewerRecord = errors.New("written by a newer Mayfly: run that version, or restore a backup of this one's")

// envelope puts the version in front of every record.
type envelope[T any] struct {
	Version int `json:"v"`
	Record  T   `json:"r"`
}

func encode[T any](v T) ([]byte, error) {
	return json.Marshal(envelope[T]{Version: recordVersion, Record: v})
}

func decode[T any](key string, value []byte) (T, error) {
	var e envelope[T]
	if err := json.Unmarshal(value, &e); err != nil {
		var zero T
		return zero, fmt.Errorf("decoding record %s: %w", key, err)
	}
	if e.Version > recordVersion {
		var zero T
		return zero, fmt.Errorf("record %s has version %d: %w", key, e.Version, errNewerRecord)
	}
	return e.Record, nil
}

// getter is what View's Reader and Update's Txn have in common.
type getter interface {
	Get(key string) ([]byte, bool, error)
}

func get[T any](r getter, key string) (v T, ok bool, err error) {
	value, ok, err := r.Get(key)
	if err != nil || !ok {
		return v, false, err
	}
	v, err = decode[T](key, value)
	return v, err == nil, err
}

func put[T any](t store.Txn, key string, v T) error {
	value, err := encode(v)
	if err != nil {
		return fmt.Errorf("encoding record %s: %w", key, err)
	}
	return t.Put(key, value)
}

func appendEvent(t store.Txn, e audit.Event) error {
	value, err := audit.Encode(e)
	if err != nil {
		return err
	}
	return t.Append(audit.Log, value)
}

// leaseRecord is a lease as the store has it: the lease, and what only the
// engine needs to know of it.
type leaseRecord struct {
	broker.Lease
	Handle providers.Handle `json:",omitempty"`
	// MintDone: the attempt to mint came back, so that nothing of it can still
	// take effect. While it is false a confirmed death is only believed after
	// Settles.
	MintDone bool
	// Settles is when an attempt of unknown outcome can have no effect any
	// more: its deadline and the provider's bound for late effects.
	Settles time.Time
	// Due is the instant in the lease's due key.
	Due time.Time
	// Attempts counts the revocations that did not come to an end.
	Attempts int `json:",omitempty"`
	// Key is the caller's idempotency key; empty if it gave none.
	Key string `json:",omitempty"`
	// Certificate is the SHA-256 of the certificate that the lease was asked
	// with; kept where there is a Key, for making the same secret again.
	Certificate []byte `json:",omitempty"`
	// Stands: what ends it stands at the provider until it dies by itself.
	Stands bool `json:",omitempty"`
	// Counted: it is one of those that its agent holds (quota.go).
	Counted bool `json:",omitempty"`
	// Refund: the use of the grant is given back once the lease is dead.
	Refund bool `json:",omitempty"`
}

// ending is what the provider is told of a lease that is to be ended. Settles
// is told only while something of the attempt may still be under way.
func (l *leaseRecord) ending() providers.Ending {
	e := providers.Ending{Lease: l.ID, Tool: l.Tool, Handle: l.Handle, DiesAt: l.DiesAt}
	if !l.MintDone && l.ActiveAt.IsZero() {
		e.Settles = l.Settles
	}
	return e
}

// event makes the evidence of a change to the lease. The actor is the broker
// unless the caller sets another.
func (l *leaseRecord) event(now time.Time, what audit.Type) audit.Event {
	e := audit.Event{
		Time: now, Type: what, Actor: audit.Broker,
		Agent: l.Agent.String(), Tool: l.Tool, Provider: l.Provider,
		Lease: l.ID, Grant: l.Grant, Incident: l.Incident,
		Cause: string(l.Cause), Correlation: l.Correlation,
	}
	if l.Survives != "" {
		e.Details = map[string]string{"survives": l.Survives}
	}
	return e
}

// catalogRecord is the guard key that ties deliveries to the catalog.
type catalogRecord struct {
	Generation uint64
	Digest     string
	Systems    map[string]string // which system each provider stands for, as a digest
}

// idemRecord is what an idempotency key made.
type idemRecord struct {
	Kind   string // "lease", "grant", "incident" or "request"
	ID     string
	Digest string // of the request, so that a key is not used for two
}
