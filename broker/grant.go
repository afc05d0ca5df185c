package broker

import (
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Grant is the right of one agent to one tool between two instants, under
// conditions.
type Grant struct {
	ID         GrantID
	Agent      spiffeid.ID
	Tool       string
	ToolDigest string            // the tool as it was when the grant was made
	Params     map[string]string // values that are fixed: a lease must ask for exactly these. Other parameters are free
	NotBefore  time.Time
	NotAfter   time.Time
	MaxUses    int        // 0 means any number of leases
	Uses       int        // leases made under it; kept only where MaxUses is not 0
	Incident   IncidentID // empty for a grant made by an operator's call
	Reason     string     // why it was made
	CreatedBy  Principal
	CreatedAt  time.Time
	State      GrantState
	EndedAt    time.Time // zero while State is GrantOpen
	EndedBy    string    // who or what ended it; empty while State is GrantOpen

	// What a grant that was asked for came from; zero for one that an operator
	// or an incident's window made.
	Request      RequestID `json:",omitempty"`
	Ticket       string    `json:",omitempty"`
	OnBehalfOf   *User     `json:",omitempty"`
	Rule         string    `json:",omitempty"` // the approval rule; empty if policy granted it
	RuleDigest   string    `json:",omitempty"`
	PolicyDigest string    `json:",omitempty"` // the policy set that it was made under
	Voters       []Voter   `json:",omitempty"` // whose votes made it
	BreakGlass   bool      `json:",omitempty"`
}

// Voter is a person whose vote a grant was made by, and the group that made
// the vote count.
type Voter struct {
	Name    string
	Issuer  string
	Subject string
	Group   string
	// Standing: the grant ends as soon as the person is not in Group any more.
	Standing bool `json:",omitempty"`
}

// GrantState says whether a grant can still give.
type GrantState string

// The states of a grant. Suspension is none of them: it is found by comparing
// digests, and ends when the tool is what it was.
const (
	GrantOpen      GrantState = "open"
	GrantWithdrawn GrantState = "withdrawn" // by a person's or operator's call
	GrantClosed    GrantState = "closed"    // its incident closed
	GrantExpired   GrantState = "expired"   // NotAfter passed
)

// Incident is the reason for a maintenance window. While it is open, the
// grants attached to it are good; when it closes, they are over.
type Incident struct {
	ID        IncidentID
	Title     string
	Reference string // the incident system's name for it; may be empty
	OpenedBy  Principal
	OpenedAt  time.Time
	EndsAt    time.Time // the hard end: it closes by itself then
	Grants    []GrantID // made with it, or asked for under it while it was open; a closed incident gains none
	State     IncidentState
	ClosedBy  string    // who or what closed it; empty while open
	ClosedAt  time.Time // zero while open
}

// IncidentState says whether an incident is open.
type IncidentState string

// The states of an incident. A closed incident never opens again.
const (
	IncidentOpen   IncidentState = "open"
	IncidentClosed IncidentState = "closed"
)
