package fakeaws

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"
)

// denied is why everything is denied to a session; empty if it is not.
func (f *Fake) denied(s *Session) string {
	now := f.c.Now()
	if f.denies(s.Policy, s, now) {
		return "session policy"
	}
	for name, versions := range f.roles[s.Role].policies {
		if f.denies(at(versions, now, func(v version) time.Time { return v.force }), s, now) {
			return "policy " + name
		}
	}
	return ""
}

type policyDocument struct {
	Statement []struct {
		Effect    string
		Action    any
		Condition map[string]map[string]any
	}
	tails map[string]bool // of the session names that are denied with * before them
}

func texts(v any) (all []string) {
	switch v := v.(type) {
	case string:
		return []string{v}
	case []any:
		for _, e := range v {
			all = append(all, fmt.Sprint(e))
		}
	}
	return all
}

// denies reports whether a policy denies everything to a session.
func (f *Fake) denies(text string, s *Session, now time.Time) bool {
	if text == "" {
		return false
	}
	d, parsed := f.parsed[text]
	if !parsed {
		if err := json.Unmarshal([]byte(text), &d); err != nil {
			f.problems = append(f.problems, "a policy that is no JSON: "+text)
			return true
		}
		if len(f.parsed) > 20_000 {
			clear(f.parsed)
		}
		d.tails = map[string]bool{}
		for _, st := range d.Statement {
			for _, v := range texts(st.Condition["StringLike"]["aws:userid"]) {
				if tail, ok := strings.CutPrefix(v, "*:"); ok {
					d.tails[tail] = true
				}
			}
		}
		f.parsed[text] = d
	}
	for _, st := range d.Statement {
		if st.Effect != "Deny" || !slices.Contains(texts(st.Action), "*") {
			continue
		}
		all := true
		for operator, keys := range st.Condition {
			for key, values := range keys {
				if operator == "StringLike" && key == "aws:userid" && len(st.Condition) == 1 {
					all = all && d.tails[s.Name]
					continue
				}
				all = all && f.holds(operator, key, texts(values), s, now)
			}
		}
		if all {
			return true
		}
	}
	return false
}

func (f *Fake) holds(operator, key string, values []string, s *Session, now time.Time) bool {
	var have string
	switch {
	case key == "aws:userid":
		have = "AROA" + strings.ToUpper(s.Role) + ":" + s.Name
	case key == "aws:SourceIdentity":
		have = s.Source
	case strings.HasPrefix(key, "aws:PrincipalTag/"):
		have = s.Tags[strings.TrimPrefix(key, "aws:PrincipalTag/")]
	case key == "aws:CurrentTime":
		have = now.UTC().Format(time.RFC3339)
	case key == "aws:TokenIssueTime":
		have = s.Issued.UTC().Format(time.RFC3339)
	default:
		f.problems = append(f.problems, "a condition on "+key)
		return true
	}
	if have == "" {
		return false
	}
	return slices.ContainsFunc(values, func(v string) bool {
		switch operator {
		case "StringEquals":
			return v == have
		case "StringLike":
			// Mayfly writes * at the beginning, and nowhere else.
			if tail, ok := strings.CutPrefix(v, "*"); ok && !strings.ContainsAny(tail, "*?") {
				return strings.HasSuffix(have, tail)
			}
		case "DateGreaterThan", "DateLessThanEquals":
			bound, err1 := time.Parse(time.RFC3339, v)
			is, err2 := time.Parse(time.RFC3339, have)
			if err1 == nil && err2 == nil {
				return is.After(bound) == (operator == "DateGreaterThan")
			}
		}
		f.problems = append(f.problems, "a condition "+operator+" on "+key+" of "+v)
		return true
	})
}
