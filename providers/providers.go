// Package providers is the contract between the engine and the systems that
// make credentials. A Driver knows one kind of system and opens configured
// Providers; a Provider mints, revokes and confirms.
//
// providertest is the contract as a test suite; every implementation passes it.
package providers

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/broker"
)

// Errors of Mint, told apart with errors.Is. Any other error means that the
// outcome is not known: the engine ends whatever may have been made.
var (
	// ErrNothingMade means that the provider is certain to have made nothing,
	// and that nothing of the attempt is still under way.
	ErrNothingMade = errors.New("nothing was made")
	// ErrRefused goes with ErrNothingMade where trying again is of no use
	// until somebody changes something.
	ErrRefused = errors.New("refused by the provider")
	// ErrAway means that the system behind the provider answers nobody now: it
	// is down, sealed, has no leader, throttles, or refuses our login. It says
	// nothing of one lease: the engine stops asking for a while, for all of the
	// provider's leases, and finds out with few calls when it is back. It may
	// go with ErrNothingMade, and with a Death.
	ErrAway = errors.New("the provider is away")
)

// Refused is an error of Mint that is certain to have made nothing, where trying
// again is of no use until somebody changes something.
func Refused(err error) error {
	return fmt.Errorf("%w: %w: %w", ErrNothingMade, ErrRefused, err)
}

// Driver is one kind of provider: "token", "vault". Its methods may be called
// from many goroutines.
type Driver interface {
	// ValidateConfig checks a provider's configuration without reaching for
	// the provider. A *FieldError says which field is wrong.
	ValidateConfig(config json.RawMessage) error
	// ValidateScope checks a tool's scope and parameters against a valid
	// configuration when the catalog is loaded, and says what is to be known
	// of leases of it.
	ValidateScope(config json.RawMessage, tool broker.Tool) (ScopeInfo, error)
	// Open makes a Provider. It blocks until the Provider is usable, or until
	// it is sure that it will become so by itself when the system behind it
	// returns: a provider that is away must not keep the broker from starting.
	Open(ctx context.Context, config Config) (Provider, error)
}

// Meaning is implemented by a Driver part of whose configuration does not
// decide what a lease can do: where keys lie, who may ask about tokens. A grant
// is bound to what Meaning returns, and outlives a change of the rest. Without
// it a grant is bound to the whole configuration.
type Meaning interface {
	// Meaning returns the part of a valid configuration that decides what a
	// lease can do, as JSON.
	Meaning(config json.RawMessage) (json.RawMessage, error)
}

// Config is what a Driver opens a Provider with.
type Config struct {
	Name         string                // the catalog's name for the provider
	Installation broker.InstallationID // part of every name that the provider gives outside
	Raw          json.RawMessage       // as ValidateConfig saw it
	Log          *slog.Logger          // required
	Now          func() time.Time      // required: the broker's clock
	// Known tells of all leases of the provider whose credentials may be alive,
	// as the store has them; with begun of those alone whose ending has begun,
	// which costs as much as these are many. It is for a provider with
	// Traits.Stands, which renders from it what must stand at the system, and
	// for one that gives something to one lease at a time. Nil only where nothing
	// is made or ended, as in a live check.
	Known func(ctx context.Context, begun bool) ([]Known, error)
	// Cuts tells of all cut-offs of the provider that must stand, as the store
	// has them. It is for a provider that implements CutOff; nil means none.
	Cuts func(ctx context.Context) ([]Cut, error)
}

// Known is one lease of a provider, as the store has it: one that has not
// ended, or whose death was confirmed before it died by itself.
type Known struct {
	Ending
	Incident broker.IncidentID // may be empty
	Begun    bool              // its ending has begun: it must be denied until it dies by itself
	Cause    broker.Cause      // why, if it has
}

// ScopeInfo is what the catalog learns of a tool from its driver.
type ScopeInfo struct {
	// Fields are the names of the secret's fields; a tool's environment
	// variables may name only these.
	Fields []string
	// Survives says, for people, what of a lease outlives a revocation, and
	// until when; empty if nothing does.
	Survives string
	// MinTTL is the shortest TTL that leases of this tool can have; zero means one second.
	MinTTL time.Duration
	// Static: the secret was there before the lease and stays after it; only a
	// rotation ends it. Such leases lapse: they are never said to be dead.
	Static bool
}

// Traits are what the engine must know of a Provider to run it safely.
type Traits struct {
	// Inert: minting has no effect outside the broker's process until somebody
	// holds the secret (a signed token). An inert provider needs no record of
	// intent; Mint gets no record function.
	Inert bool
	// Stands: what ends a lease is something that must stand at the system until
	// the credential dies by itself, also after its death was confirmed.
	Stands bool
	// MintTimeout bounds one Mint; zero means 30 seconds.
	MintTimeout time.Duration
	// LateBound is how long after a Mint's deadline the system behind the
	// provider may still make something of it. The engine does not call such a
	// lease revoked before that has passed.
	LateBound time.Duration
	// RevokeTimeout bounds one Revoke or Confirm; zero means 30 seconds.
	RevokeTimeout time.Duration
	// Batch is the most Endings that one Revoke takes; zero means 64.
	Batch int
	// Concurrency is the most Revokes at a time; zero means 4.
	Concurrency int
	// MintConcurrency is the most Mints at a time; zero means 64. Requests
	// beyond it wait for a short while and are then refused.
	MintConcurrency int
}

// Handle is what a Provider needs to revoke one lease. It is opaque to the
// engine, is stored, and is no secret: whoever holds it can end the lease and
// nothing else. A nil Handle means that nothing was recorded.
type Handle []byte

// MintRequest is one lease to be minted.
type MintRequest struct {
	Lease       broker.LeaseID
	Agent       spiffeid.ID
	Certificate [32]byte // SHA-256 of the agent's certificate; zero where it used none
	Tool        broker.Tool
	Params      map[string]string // checked against the tool
	Incident    broker.IncidentID // may be empty
	Now         time.Time         // the engine's time
	End         time.Time         // the credential must be dead by then, by the provider's own means
}

// Minted is a new credential.
type Minted struct {
	Secret broker.Secret
	Handle Handle
	// DiesAt is when the credential dies by itself, by the provider's clock
	// and with skew. It is never zero (I8) but for a Static one, and where the
	// provider can do it, not after MintRequest.End.
	DiesAt time.Time
	// Static is ScopeInfo.Static for this very lease.
	Static bool
	// Ends, if not zero, is an end earlier than the one asked for that the
	// provider has set; the lease's end moves to it.
	Ends time.Time
	// Survives is ScopeInfo.Survives for this very lease, with its instants.
	Survives string
}

// Ending is one lease to be ended.
type Ending struct {
	Lease  broker.LeaseID
	Tool   string // its name; the tool may be gone from the catalog
	Handle Handle // nil if the broker stopped before anything was recorded
	DiesAt time.Time
	// Settles is zero once the attempt to mint is over. Until then something
	// of it may still be under way and appear at the provider, at the latest
	// at Settles. A provider at which ending one part strands another waits
	// for it, with a Death whose RetryAt is Settles.
	Settles time.Time
}

// Death is what a Provider knows of the end of one lease.
type Death struct {
	// Progress is how far the ending has come. ProgressVerified means dead:
	// the provider confirms that the credential works nowhere any more and
	// that nothing of it is left. It is never said when it is only likely.
	Progress broker.Progress
	// Err is why it came no further; nil if there is nothing to tell. With a
	// Progress below verified and a nil Err, there is nothing more to do but
	// to wait for RetryAt.
	Err error
	// RetryAt, if not zero, is when to look again: the engine asks no sooner.
	RetryAt time.Time
	// Lapsed: there is nothing that the provider can do, now or later, and the
	// credential does not die by itself (a static secret). The lease is over,
	// and is said to have lapsed, never to be dead. Progress is below verified.
	Lapsed bool
	// Left tells, with ProgressVerified, what may still be there although it
	// works nowhere, such as a role that cannot log in; for the evidence. Empty
	// if nothing is left.
	Left string
}

// Provider is one configured system that makes credentials. Methods may be
// called from many goroutines. Errors may hold upstream text: they go to the
// operator's log and never to an agent. They never hold a secret.
type Provider interface {
	Traits() Traits

	// Mint makes one credential for exactly the request's tool.
	//
	// Before it makes anything that can only be revoked with a handle, it
	// calls record with that handle and goes on only if record returns nil.
	// What it makes before that must be harmless and die by itself. record is
	// nil for an inert provider. Mint may call it again with a better handle.
	//
	// An error that is ErrNothingMade and holds a *broker.Error is told to the
	// agent in those words, so they must be the provider's own and never
	// upstream text. Every other error goes to the log alone.
	//
	// Mint must not repeat a step that may have had an effect. ctx carries the
	// attempt's deadline and not the agent's patience. A panic in Mint is a
	// failure of unknown outcome.
	Mint(ctx context.Context, req MintRequest, record func(Handle) error) (Minted, error)

	// Revoke ends leases and returns one Death for each, in order. It is
	// idempotent; what is already gone is verified. It never returns fewer.
	Revoke(ctx context.Context, endings []Ending) []Death

	// Confirm tells, without ending anything, whether each lease is dead. It
	// returns one Death for each, in order.
	Confirm(ctx context.Context, endings []Ending) []Death

	// Close releases what Open took. It is idempotent.
	Close() error
}

// Planner is implemented by a Provider whose handle follows from the request
// alone (an external name made of the lease ID). The engine then stores the
// handle with the intent, and Mint need not call record.
type Planner interface {
	Plan(req MintRequest) (Handle, error)
}

// Introspector is implemented by a Provider whose credentials resource servers
// check with the broker (OAuth 2.0 Token Introspection, RFC 7662).
type Introspector interface {
	// Introspect verifies a token for one authenticated resource server. ok is
	// false, with nothing else said, for every token that is not this
	// provider's, is forged or expired, or is not for that server. Whether the
	// lease is still usable is for the caller to ask of the engine.
	Introspect(ctx context.Context, token string, server spiffeid.ID) (in Introspection, ok bool)
}

// Introspection is what a resource server is told of a token whose lease is usable.
type Introspection struct {
	Lease  broker.LeaseID
	Claims map[string]any // the members of RFC 7662 section 2.2, without "active"
}

// KeySet is implemented by a Provider whose credentials are verified with public keys.
type KeySet interface {
	// JWKS returns the JSON Web Key Set (RFC 7517) of every key whose
	// signatures may still be valid.
	JWKS() json.RawMessage
}

// Found is one thing at the system behind a provider that bears the
// installation's name.
type Found struct {
	Name   string         // as the system has it: the name of a role
	Kind   string         // for people: "PostgreSQL role"
	Lease  broker.LeaseID // that its name tells of
	DiesAt time.Time      // when it dies by itself, by the system's clock and with skew; zero if it does not, or that is not known
}

// Inventory is implemented by a Provider that can list what there is of the
// installation's at the system behind it, independently of what the broker
// remembers. With it the engine finds what the system lost track of, and what a
// restored store does not know.
type Inventory interface {
	// List returns everything that bears the installation's name. It never
	// returns what bears another installation's.
	List(ctx context.Context) ([]Found, error)
	// Remove ends and removes what List returned, whether it is alive or not.
	// It is idempotent, and returns one error for each, in order; nil means
	// that the thing is gone.
	Remove(ctx context.Context, found []Found) []error
}

// Warner is implemented by a Driver that can say of a valid tool, without
// asking anybody, what it can do in the end and what is to be known of it.
type Warner interface {
	// Warnings returns what there is to say. They name no tool, and none is bad;
	// one with a Fix is a warning, and one without says what the tool can do.
	Warnings(config json.RawMessage, tool broker.Tool) []Finding
}

// Finding is one thing that a check has to say.
type Finding struct {
	Tool    string // its name; empty for the provider as a whole
	Bad     bool   // the tool or provider does not work, or can do too much; else for information
	Message string // what is wrong
	Fix     string // what to do
}

// LiveChecker is implemented by a Driver that can compare a provider's
// configuration and tools with the real system behind it, changing nothing.
type LiveChecker interface {
	// CheckLive returns what is missing or too wide. An error means that the
	// check could not be made.
	CheckLive(ctx context.Context, config Config, tools []broker.Tool) ([]Finding, error)
}
