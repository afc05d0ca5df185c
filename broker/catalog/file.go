package catalog

import (
	"encoding/json"
	"time"
)

// file is one catalog file as it is written. Every field says what leaving it
// out means.
type file struct {
	Agents    []agent    `yaml:"agents"`         // none: nobody gets a credential
	Groups    []group    `yaml:"groups"`         // none
	Operators []operator `yaml:"operators"`      // none: nobody can make a grant or read the evidence
	Providers []provider `yaml:"providers"`      // none
	Tools     []tool     `yaml:"tools"`          // none: there is nothing to give
	Openers   []opener   `yaml:"openers"`        // none: nobody can open an incident
	Rules     []rule     `yaml:"approval_rules"` // none: policy alone decides what is asked for
}

// agent is one agent.
type agent struct {
	ID          string            `yaml:"id"`           // SPIFFE ID; required
	Owner       string            `yaml:"owner"`        // who answers for it; required
	Environment string            `yaml:"environment"`  // such as production; required
	Labels      map[string]string `yaml:"labels"`       // none
	Disabled    bool              `yaml:"disabled"`     // it is enabled
	MaxLeases   *int              `yaml:"max_leases"`   // leases that have not ended, at once, 1 to 100000; 1000
	MaxPerHour  *int              `yaml:"max_per_hour"` // leases and requests together, 1 to 1000000; 3600
}

// group is a named set of identities.
type group struct {
	Name    string   `yaml:"name"`    // required
	Members []string `yaml:"members"` // SPIFFE IDs; none: no workload is in it
	People  []string `yaml:"people"`  // names of people, besides those that the identity provider puts into it; none
}

// operator is one operator, or a group of them. Exactly one field is set.
type operator struct {
	ID    string `yaml:"id"`
	Group string `yaml:"group"`
}

// provider is one provider.
type provider struct {
	Name   string          `yaml:"name"`   // required
	Driver string          `yaml:"driver"` // the kind of provider; required
	Config json.RawMessage `yaml:"config"` // the driver says what belongs here; empty
}

// tool is one tool.
type tool struct {
	Name        string               `yaml:"name"`        // required
	Provider    string               `yaml:"provider"`    // required
	Description string               `yaml:"description"` // for people; required
	MaxTTL      time.Duration        `yaml:"max_ttl"`     // the longest lease, 1s to 24h; required
	Params      map[string]parameter `yaml:"params"`      // the tool has no parameters
	Scope       json.RawMessage      `yaml:"scope"`       // the driver says what belongs here; empty
	Env         map[string]string    `yaml:"env"`         // environment variable -> field of the secret; none are set
	Labels      map[string]string    `yaml:"labels"`      // for policies and people; none
	Sensitivity string               `yaml:"sensitivity"` // low, medium or high, for policies and people; medium
	Approval    string               `yaml:"approval"`    // the approval rule that a request waits under; none: policy alone decides
	BreakGlass  string               `yaml:"break_glass"` // another, for emergencies, that a request may name; none
}

// rule is one approval rule.
type rule struct {
	Name               string        `yaml:"name"`                       // required
	Need               []quorum      `yaml:"need"`                       // all of them; required
	Never              []string      `yaml:"never"`                      // requester, owner, user: who must not approve; none
	Reauthenticate     time.Duration `yaml:"reauthenticate_within"`      // how old an approver's sign-in may be; any age
	ACR                []string      `yaml:"acr"`                        // classes of an approver's sign-in, one of which it must be; any
	UserReauthenticate time.Duration `yaml:"user_reauthenticate_within"` // the same of the user on whose behalf the agent acts; any age
	UserACR            []string      `yaml:"user_acr"`                   // any
	MaxDuration        time.Duration `yaml:"max_duration"`               // of the grant, 1s to 744h (31 days); required
	Expires            time.Duration `yaml:"expires"`                    // how long a request waits, 1s to 744h; 1h
	SingleUse          bool          `yaml:"single_use"`                 // the grant gives any number of leases
	Standing           bool          `yaml:"standing"`                   // a grant outlives its approvers' membership
	BreakGlass         bool          `yaml:"break_glass"`                // it is an ordinary rule
}

// quorum is a number of people of one group.
type quorum struct {
	Group string `yaml:"group"` // the identity provider's or the catalog's; required
	Count *int   `yaml:"count"` // 1 to 20; 1
}

// parameter is one parameter of a tool.
type parameter struct {
	Type        string   `yaml:"type"`        // string, integer or boolean; required
	Pattern     string   `yaml:"pattern"`     // strings: a regular expression (RE2) that the whole value matches; this or one_of is required
	OneOf       []string `yaml:"one_of"`      // strings: the only values
	Min         *int64   `yaml:"min"`         // integers: no lower bound
	Max         *int64   `yaml:"max"`         // integers: no upper bound
	Optional    bool     `yaml:"optional"`    // the caller must give it
	Description string   `yaml:"description"` // for people; none
}

// opener says which incidents one identity may open.
type opener struct {
	ID          string        `yaml:"id"`           // SPIFFE ID; required
	Tools       []string      `yaml:"tools"`        // required
	Agents      []string      `yaml:"agents"`       // SPIFFE IDs; never the opener's own; required
	MaxDuration time.Duration `yaml:"max_duration"` // 1s to 24h; required
	MaxOpen     int           `yaml:"max_open"`     // incidents at once, 1 to 1000; required
	MaxPerHour  *int          `yaml:"max_per_hour"` // incidents opened in an hour, 1 to 1000000; 3600
	Closers     string        `yaml:"closers"`      // a group that may close too; empty: only the opener closes
}
