package catalog

import (
	"encoding/json"
	"time"
)

// file is one catalog file as it is written. Every field says what leaving it
// out means.
type file struct {
	Agents    []agent    `yaml:"agents"`    // none: nobody gets a credential
	Groups    []group    `yaml:"groups"`    // none
	Operators []operator `yaml:"operators"` // none: nobody can make a grant or read the evidence
	Providers []provider `yaml:"providers"` // none
	Tools     []tool     `yaml:"tools"`     // none: there is nothing to give
	Openers   []opener   `yaml:"openers"`   // none: nobody can open an incident
}

// agent is one agent.
type agent struct {
	ID          string            `yaml:"id"`          // SPIFFE ID; required
	Owner       string            `yaml:"owner"`       // who answers for it; required
	Environment string            `yaml:"environment"` // such as production; required
	Labels      map[string]string `yaml:"labels"`      // none
	Disabled    bool              `yaml:"disabled"`    // it is enabled
}

// group is a named set of identities.
type group struct {
	Name    string   `yaml:"name"`    // required
	Members []string `yaml:"members"` // SPIFFE IDs; none: the group is empty
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
	Closers     string        `yaml:"closers"`      // a group that may close too; empty: only the opener closes
}
