package broker

import (
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Principal names whoever does something, as evidence and records have it: a
// workload by its SPIFFE ID, a person as "person:NAME", or the broker itself
// as "broker". The zero Principal is nobody.
type Principal string

const personPrefix = "person:"

// WorkloadPrincipal is the principal of a workload; the zero ID is nobody.
func WorkloadPrincipal(id spiffeid.ID) Principal {
	if id.IsZero() {
		return ""
	}
	return Principal(id.String())
}

// PersonPrincipal is the principal of a person; the empty name is nobody.
func PersonPrincipal(name string) Principal {
	if name == "" {
		return ""
	}
	return Principal(personPrefix + name)
}

// Person returns the name of the person that p is; false for everything else.
func (p Principal) Person() (name string, ok bool) {
	return strings.CutPrefix(string(p), personPrefix)
}

// Workload returns the SPIFFE ID of the workload that p is; false for everything else.
func (p Principal) Workload() (spiffeid.ID, bool) {
	id, err := spiffeid.FromString(string(p))
	return id, err == nil
}

func (p Principal) String() string { return string(p) }
