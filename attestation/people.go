package attestation

import (
	"context"
	"errors"
	"time"

	"github.com/mayfly-security/mayfly/broker"
)

// ErrPending means that a person has not finished a sign-in by device code yet.
var ErrPending = errors.New("the person has not finished the sign-in yet")

// IdentityProvider signs people in: an OpenID provider (OpenID Connect Core
// 1.0). What it returns was verified: signature, issuer, audience, nonce, time.
// Its errors are *broker.Error with ReasonTokenInvalid, ReasonSignIn or
// ReasonStepUp where a caller may see why, and never hold a token. Methods may
// be called from many goroutines.
type IdentityProvider interface {
	// Issuer is the provider's (iss).
	Issuer() string
	// Sample reports that this is mayflyd dev's own, with sample people.
	Sample() bool
	// AuthCodeURL is where the browser goes to sign in: authorization code with
	// PKCE S256 (RFC 7636). need asks for a fresh or stronger authentication
	// (max_age, acr_values); Exchange's caller compares.
	// Empty: nobody can sign in at present.
	AuthCodeURL(state, nonce, verifier string, need broker.StepUp) string
	// CheckResponse judges the parameter iss of what the browser brought back
	// (RFC 9207); empty if there was none. A provider that says it sends one must.
	CheckResponse(ctx context.Context, iss string) error
	// Exchange redeems the code that the browser brought back.
	Exchange(ctx context.Context, code, verifier, nonce string, now time.Time) (broker.Person, error)
	// CanDevice reports whether the provider takes device codes (RFC 8628).
	CanDevice() bool
	StartDevice(ctx context.Context, now time.Time) (DeviceSignIn, error)
	// PollDevice asks once, and returns ErrPending while the person is not done.
	PollDevice(ctx context.Context, d DeviceSignIn, now time.Time) (broker.Person, error)
	// VerifyBearer verifies a token of the provider's for the broker's audience
	// that somebody sent as a bearer token (RFC 6750). until is its end.
	VerifyBearer(ctx context.Context, raw string, now time.Time) (p broker.Person, until time.Time, err error)
	// VerifyUser verifies the token of a user on whose behalf an agent acts,
	// for the broker's audience (RFC 8693). id tells tokens apart, and is no
	// secret: a digest.
	VerifyUser(ctx context.Context, raw string, now time.Time) (u broker.User, id string, until time.Time, err error)
}

// DeviceSignIn is a sign-in by device code that is under way. DeviceCode is a
// secret: whoever has it gets the tokens.
type DeviceSignIn struct {
	DeviceCode      broker.Secret // field "device_code"
	UserCode        string
	VerificationURI string
	// VerificationURIComplete holds the user code; empty if the provider gives none.
	VerificationURIComplete string
	ExpiresAt               time.Time
	Interval                time.Duration // between two polls
}
