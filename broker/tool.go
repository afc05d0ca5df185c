package broker

import (
	"encoding/json"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Tool is a named scope: this provider, these permissions, at most this long.
// It is the unit that is granted; nothing wider exists.
type Tool struct {
	Name        string
	Description string
	Provider    string
	Scope       json.RawMessage   // what the provider's driver reads and validates; canonical JSON
	Params      []Param           // sorted by name
	MaxTTL      time.Duration     // never zero
	Env         map[string]string // environment variable -> the secret's field; fixed by the catalog, never by a provider
	Labels      map[string]string // for policies and people; not part of the digest
	Sensitivity string            // "low", "medium" or "high", for policies and people; never empty; not part of the digest
	// Approval is the rule that a request waits under; nil means that policy
	// alone decides. BreakGlass is another, that a request may name; nil for most.
	Approval, BreakGlass *ApprovalRule
	// Digest is the SHA-256, in hex, of everything that decides what a lease
	// of this tool can do: provider and its configuration, scope, parameters
	// and maximum TTL. The description is not part of it. A grant is bound to it.
	Digest string
}

// ParamType is the type of a tool's parameter.
type ParamType string

// The types of parameters.
const (
	ParamString  ParamType = "string"
	ParamInteger ParamType = "integer"
	ParamBoolean ParamType = "boolean"
)

// Param declares one parameter of a tool. Values travel as text; the type says
// which texts are values.
type Param struct {
	Name        string
	Type        ParamType
	Pattern     *regexp.Regexp // strings only: must match the whole value; nil admits nothing, so a string has one or OneOf
	OneOf       []string       // strings only: the only values; empty means any that match Pattern
	Min, Max    *int64         // integers only, inclusive; nil means no bound
	Optional    bool           // false: the caller must give it
	Description string
}

// Check returns a refusal unless value is one that p admits.
func (p Param) Check(value string) error {
	switch p.Type {
	case ParamString:
		if len(value) > MaxParam {
			return p.refuse("is %d bytes long; at most %d are taken", len(value), MaxParam)
		}
		if needsCleaning(value) {
			return p.refuse("has control, bidirectional or invisible characters, or is not UTF-8")
		}
		if len(p.OneOf) > 0 {
			if !slices.Contains(p.OneOf, value) {
				return p.refuse("is %q; it must be one of %q", Shorten(value, 60), p.OneOf)
			}
			return nil
		}
		if p.Pattern == nil || !p.Pattern.MatchString(value) {
			return p.refuse("is %q, which does not match the pattern %s", Shorten(value, 60), p.PatternText())
		}
	case ParamInteger:
		n, err := strconv.ParseInt(value, 10, 64)
		if err != nil || strconv.FormatInt(n, 10) != value {
			return p.refuse("is %q, which is no decimal integer in its shortest form", Clean(Shorten(value, 60)))
		}
		if p.Min != nil && n < *p.Min || p.Max != nil && n > *p.Max {
			return p.refuse("is %d; it must be %s", n, p.bounds())
		}
	case ParamBoolean:
		if value != "true" && value != "false" {
			return p.refuse("is %q; it must be true or false", Clean(Shorten(value, 60)))
		}
	default:
		return p.refuse("has the unknown type %q", p.Type)
	}
	return nil
}

func (p Param) refuse(format string, args ...any) error {
	return Refuse(ReasonParameter, fmt.Sprintf("parameter %s "+format, append([]any{p.Name}, args...)...),
		"`mayfly tools TOOL` shows the tool's parameters")
}

// PatternText is Pattern as the catalog has it: without what anchors it. It is
// empty if there is none.
func (p Param) PatternText() string {
	if p.Pattern == nil {
		return ""
	}
	return strings.TrimSuffix(strings.TrimPrefix(p.Pattern.String(), "^(?:"), ")$")
}

// bounds says what an integer may be.
func (p Param) bounds() string {
	switch {
	case p.Min == nil:
		return fmt.Sprintf("%d or less", *p.Max)
	case p.Max == nil:
		return fmt.Sprintf("%d or more", *p.Min)
	}
	return fmt.Sprintf("from %d to %d", *p.Min, *p.Max)
}

// CheckParams validates a request's parameters against the tool's declarations:
// none unknown, none missing, each of its type.
func (t Tool) CheckParams(params map[string]string) error {
	for _, name := range slices.Sorted(maps.Keys(params)) {
		i := slices.IndexFunc(t.Params, func(p Param) bool { return p.Name == name })
		if i < 0 {
			var known []string
			for _, p := range t.Params {
				known = append(known, p.Name)
			}
			return Refusef(ReasonParameter, fmt.Sprintf("`mayfly tools %s` shows its parameters", t.Name),
				"tool %s has no parameter %q%s", t.Name, Clean(Shorten(name, 60)), Suggest(name, "parameters", known))
		}
		if err := t.Params[i].Check(params[name]); err != nil {
			return err
		}
	}
	for _, p := range t.Params {
		if _, ok := params[p.Name]; !ok && !p.Optional {
			return Refusef(ReasonParameter, fmt.Sprintf("give --param %s=…", p.Name),
				"parameter %s of tool %s is missing", p.Name, t.Name)
		}
	}
	return nil
}
