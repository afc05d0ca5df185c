package catalog

import (
	"encoding/json"
	"time"
)

// file is one catalog file as it is written. Every field says what leaving it
// out means.
type file struct {
	Agents    []agentEntry    `yaml:"agents"`    // none: nobody gets a credential
	Groups    []groupEntry    `yaml:"groups"`    // none
	Operators []operatorEntry `yaml:"operators"` // none: nobody can make a grant or read the evidence
	Providers []providerEntry `yaml:"providers"` // none
	Tools     []toolEntry     `yaml:"tools"`     // none: there is nothing to give
	Openers   []openerEntry   `yaml:"openers"`   // none: nobody can open an incident
}

// agentEntry is one agent.
type agentEntry struct {
	ID          string            `yaml:"id"`          // SPIFFE ID; required
	Owner       string            `yaml:"owner"`       // who answers for it; required
	Environment string            `yaml:"environment"` // such as production; required
	Labels      map[string]string `yaml:"labels"`      // none
	Disabled    bool              `yaml:"disabled"`    // it is enabled
}

// groupEntry is a named set of identities.
type groupEntry struct {
	Name    string   `yaml:"name"`    // required
	Members []string `yaml:"members"` // SPIFFE IDs; none: the group is empty
}

// operatorEntry is one operator, or a group of them. Exactly one field is set.
type operatorEntry struct {
	ID    string `yaml:"id"`
	Group string `yaml:"group"`
}

// providerEntry is one provider.
type providerEntry struct {
	Name   string          `yaml:"name"`   // required
	Driver string          `yaml:"driver"` // the kind of provider; required
	Config json.RawMessage `yaml:"config"` // the driver says what belongs here; empty
}

// toolEntry is one tool.
type toolEntry struct {
	Name        string                `yaml:"name"`        // required
	Provider    string                `yaml:"provider"`    // required
	Description string                `yaml:"description"` // for people; required
	MaxTTL      time.Duration         `yaml:"max_ttl"`     // the longest lease, 1s to 24h; required
	Params      map[string]paramEntry `yaml:"params"`      // the tool has no parameters
	Scope       json.RawMessage       `yaml:"scope"`       // the driver says what belongs here; empty
	Env         map[string]string     `yaml:"env"`         // environment variable -> field of the secret; none are set
}

// paramEntry is one parameter of a tool.
type paramEntry struct {
	Type        string   `yaml:"type"`        // string, integer or boolean; required
	Pattern     string   `yaml:"pattern"`     // strings: a regular expression (RE2) that the whole value matches; this or one_of is required
	OneOf       []string `yaml:"one_of"`      // strings: the only values
	Min         *int64   `yaml:"min"`         // integers: no lower bound
	Max         *int64   `yaml:"max"`         // integers: no upper bound
	Optional    bool     `yaml:"optional"`    // the caller must give it
	Description string   `yaml:"description"` // for people; none
}

// openerEntry says which incidents one identity may open.
type openerEntry struct {
	ID          string        `yaml:"id"`           // SPIFFE ID; required
	Tools       []string      `yaml:"tools"`        // required
	Agents      []string      `yaml:"agents"`       // SPIFFE IDs; never the opener's own; required
	MaxDuration time.Duration `yaml:"max_duration"` // 1s to 24h; required
	MaxOpen     int           `yaml:"max_open"`     // incidents at once, 1 to 1000; required
	Closers     string        `yaml:"closers"`      // a group that may close too; empty: only the opener closes
}
