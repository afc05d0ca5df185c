package fakeaws

import (
	"encoding/json"
	"regexp"
	"slices"
	"strings"
)

// May reports whether the session with that access key may do one thing to one
// resource now, by its session policy and by what its role denies. What the role
// itself allows the Fake does not know: it takes it for enough.
func (f *Fake) May(key, action, resource string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	s := f.sessions[key]
	if s == nil || !f.c.Now().Before(s.Expires) || f.denied(s) != "" {
		return false
	}
	var d struct {
		Statement []struct {
			Effect           string
			Action, Resource any
			Condition        json.RawMessage
		}
	}
	if err := json.Unmarshal([]byte(s.Policy), &d); err != nil {
		f.problems = append(f.problems, "whether a session without a policy may do something")
		return false
	}
	for _, st := range d.Statement {
		if st.Effect != "Allow" {
			continue
		}
		if st.Condition != nil || st.Action == nil || st.Resource == nil {
			f.problems = append(f.problems, "a statement that allows under conditions, or anything but something")
			return false
		}
		is := func(patterns any, text string) bool {
			return slices.ContainsFunc(texts(patterns), func(p string) bool { return like(p, text) })
		}
		if is(lower(st.Action), strings.ToLower(action)) && is(st.Resource, resource) {
			return true
		}
	}
	return false
}

func lower(v any) any {
	var all []any
	for _, text := range texts(v) {
		all = append(all, strings.ToLower(text))
	}
	return all
}

var tokens = regexp.MustCompile(`\$\{[*?$]\}|[*?]|[^*?$]+|\$`)

// like matches as IAM does: * and ? are wildcards, and ${*}, ${?} and ${$} are
// the characters themselves.
func like(pattern, text string) bool {
	var b strings.Builder
	for _, t := range tokens.FindAllString(pattern, -1) {
		switch {
		case t == "*":
			b.WriteString(".*")
		case t == "?":
			b.WriteString(".")
		case strings.HasPrefix(t, "${"):
			b.WriteString(regexp.QuoteMeta(t[2:3]))
		default:
			b.WriteString(regexp.QuoteMeta(t))
		}
	}
	return regexp.MustCompile("(?s)^(?:" + b.String() + ")$").MatchString(text)
}
