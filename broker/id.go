package broker

import (
	"crypto/rand"
	"fmt"
	"time"
)

// IDs are 26 characters: one letter that tells the kind, nine that tell the
// millisecond of creation, and sixteen of randomness (82 bits), all from
// [0-9a-z]. The time is there so that neighbours in time are neighbours in the
// store; nothing relies on the order. The alphabet and length let a lease ID
// stand as it is in a PostgreSQL role name, an AWS role session name, a
// certificate's key ID or a URL.
const (
	idLength     = 26
	idTimeDigits = 9
	idAlphabet   = "0123456789abcdefghijklmnopqrstuvwxyz"

	leaseLetter        = 'l'
	grantLetter        = 'g'
	incidentLetter     = 'i'
	installationLetter = 'm'
	correlationLetter  = 'c'
	requestLetter      = 'r'
	sessionLetter      = 's'
)

// LeaseID names one lease, for ever. It is not a secret.
type LeaseID string

// GrantID names one grant.
type GrantID string

// IncidentID names one incident. It is the broker's own; the incident system's
// name for it is Incident.Reference.
type IncidentID string

// RequestID names one request.
type RequestID string

// SessionID names one session of a person's. It is not the session's token, and no secret.
type SessionID string

// InstallationID names one Mayfly installation: one store, and every broker on
// it. It is made once and is part of every name given outside, so that two
// installations never sweep each other's credentials.
type InstallationID string

// CorrelationID ties together a request, its log lines and its evidence.
type CorrelationID string

// NewLeaseID makes a lease ID. now decides nothing but where the record lies
// in the store.
func NewLeaseID(now time.Time) LeaseID { return LeaseID(newID(leaseLetter, now)) }

// NewGrantID makes a grant ID.
func NewGrantID(now time.Time) GrantID { return GrantID(newID(grantLetter, now)) }

// NewIncidentID makes an incident ID.
func NewIncidentID(now time.Time) IncidentID { return IncidentID(newID(incidentLetter, now)) }

// NewInstallationID makes an installation ID.
func NewInstallationID(now time.Time) InstallationID {
	return InstallationID(newID(installationLetter, now))
}

// NewCorrelationID makes a correlation ID.
func NewCorrelationID(now time.Time) CorrelationID {
	return CorrelationID(newID(correlationLetter, now))
}

// NewRequestID makes a request ID.
func NewRequestID(now time.Time) RequestID { return RequestID(newID(requestLetter, now)) }

// NewSessionID makes a session ID.
func NewSessionID(now time.Time) SessionID { return SessionID(newID(sessionLetter, now)) }

// ParseRequestID checks that s has the form of a request ID.
func ParseRequestID(s string) (RequestID, error) {
	return RequestID(s), checkID(s, requestLetter, "request")
}

// ParseLeaseID checks that s has the form of a lease ID; it does not say that
// such a lease exists.
func ParseLeaseID(s string) (LeaseID, error) {
	return LeaseID(s), checkID(s, leaseLetter, "lease")
}

// ParseGrantID checks that s has the form of a grant ID.
func ParseGrantID(s string) (GrantID, error) {
	return GrantID(s), checkID(s, grantLetter, "grant")
}

// ParseIncidentID checks that s has the form of an incident ID.
func ParseIncidentID(s string) (IncidentID, error) {
	return IncidentID(s), checkID(s, incidentLetter, "incident")
}

func newID(letter byte, now time.Time) string {
	var id [idLength]byte
	id[0] = letter
	ms := now.UnixMilli()
	for i := idTimeDigits; i >= 1; i-- {
		id[i] = idAlphabet[ms%36]
		ms /= 36
	}
	fillRandom(id[1+idTimeDigits:])
	return string(id[:])
}

// fillRandom fills b with uniformly drawn characters of the alphabet. Bytes of
// 252 and above are thrown away: 252 is the largest multiple of 36 in a byte,
// and keeping the rest would favour the first characters.
func fillRandom(b []byte) {
	var pool [32]byte
	for n := 0; n < len(b); {
		rand.Read(pool[:]) // crypto/rand.Read never returns an error; it aborts the program instead
		for _, r := range pool {
			if r < 252 && n < len(b) {
				b[n] = idAlphabet[r%36]
				n++
			}
		}
	}
}

func checkID(s string, letter byte, kind string) error {
	ok := len(s) == idLength && s[0] == letter
	for i := 0; ok && i < len(s); i++ {
		c := s[i]
		ok = c >= '0' && c <= '9' || c >= 'a' && c <= 'z'
	}
	if !ok {
		return Refuse(ReasonInvalidArgument,
			fmt.Sprintf("%q is no %s ID", Clean(Shorten(s, 40)), kind),
			fmt.Sprintf("the ID of a %s is %d lowercase letters and digits and begins with %q; copy it whole from a listing", kind, idLength, letter))
	}
	return nil
}
