package broker

import (
	"slices"
	"strings"
	"time"
)

// Person is somebody who signed in, as the identity provider told of them.
type Person struct {
	// Name is what evidence and people call them: the configured claim of the
	// identity provider, such as a verified e-mail address. It has no control
	// characters, no "|", and at most MaxPersonName bytes.
	Name    string
	Issuer  string // of the identity provider (OIDC Core, section 2: iss)
	Subject string // the identity provider's own, never reassigned name for them (sub)
	// Groups are what the identity provider says, sorted. The catalog may put
	// the person into further ones: see catalog.Snapshot.PersonGroups.
	Groups []string

	AuthTime time.Time // when they last proved who they are (auth_time); zero if the identity provider did not say
	ACR      string    // how, as a class (acr); empty if it did not say
	Method   SignInMethod
	IssuedAt time.Time `json:",omitzero"` // when the identity provider said all of this (iat); zero if that is not known
	Session  SessionID // of the broker's session; empty for a bearer token of the identity provider's
}

// MaxPersonName bounds a person's name, in bytes.
const MaxPersonName = 200

// Principal is the person's.
func (p Person) Principal() Principal { return PersonPrincipal(p.Name) }

// Same reports whether p and o are one person: by the identity provider's name
// for them, or by ours, in which case says nothing: many are addresses. Either
// is enough, so that nobody counts twice.
func (p Person) Same(o Person) bool {
	return strings.EqualFold(p.Name, o.Name) || p.Issuer == o.Issuer && p.Subject == o.Subject
}

// In reports whether the identity provider says that the person is in group.
func (p Person) In(group string) bool { return slices.Contains(p.Groups, group) }

// SignInMethod says how a person signed in.
type SignInMethod string

// The methods of signing in.
const (
	SignInBrowser SignInMethod = "browser" // authorization code with PKCE (RFC 7636) in a browser on the person's machine
	SignInDevice  SignInMethod = "device"  // device code (RFC 8628): proves no fresh person at this machine, and so never counts for step-up
	SignInBearer  SignInMethod = "bearer"  // a token of the identity provider's for the broker's audience
)

// User is the person on whose behalf an agent acts, as their verified token
// said (RFC 8693, section 4.1: the subject; the agent is the actor).
type User struct {
	Name     string
	Issuer   string
	Subject  string
	AuthTime time.Time `json:",omitzero"` // zero if the token did not say
	ACR      string    `json:",omitempty"`
}

// Principal is the user's: a user is a person.
func (u User) Principal() Principal { return PersonPrincipal(u.Name) }

// StepUp is what an authentication must be for an act (RFC 9470): no older than
// MaxAge, and of one of the classes ACR. Zero fields ask for nothing.
type StepUp struct {
	MaxAge time.Duration
	ACR    []string
}

// IsZero reports whether s asks for nothing.
func (s StepUp) IsZero() bool { return s.MaxAge == 0 && len(s.ACR) == 0 }
