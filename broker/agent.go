package broker

import (
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Agent is a workload as the catalog knows it.
type Agent struct {
	ID          spiffeid.ID
	Owner       string // who answers for it: a person's or a team's address
	Environment string // "production", "staging", …; never empty
	Labels      map[string]string
	Disabled    bool // a disabled agent gets nothing, and its leases end
	MaxLeases   int  // leases that have not ended, at once; never zero
	MaxPerHour  int  // leases and requests together in an hour, and so many at once; never zero
}

// Caller is who makes one request, as attested for this request alone: a
// workload or a person, and never both.
type Caller struct {
	ID          spiffeid.ID // of a workload; zero for a person
	Person      *Person     // nil for a workload
	Certificate [32]byte    // SHA-256 of the caller's leaf certificate (DER); zero where it used none
	ValidUntil  time.Time   // the end of the SVID's, the session's or the token's validity
	Correlation CorrelationID
}

// Principal names the caller; empty if it is nobody.
func (c Caller) Principal() Principal {
	if c.Person != nil {
		return c.Person.Principal()
	}
	return WorkloadPrincipal(c.ID)
}
