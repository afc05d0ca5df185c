package catalog

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/mayfly-security/mayfly/broker"
)

// Limits on approval rules.
const (
	maxGrant       = 31 * 24 * time.Hour // of a grant, and of a request that waits
	maxNeed        = 10                  // groups of one rule
	maxACR         = 10
	defaultExpires = time.Hour
)

// person checks the name of a person.
func (l *loader) person(s source, path, name string) {
	switch {
	case name == "" || len(name) > broker.MaxPersonName:
		l.fail(s, path, "a person's name has 1 to %d bytes", broker.MaxPersonName)
	case strings.Contains(name, "|") || broker.Clean(name) != name:
		l.fail(s, path, "%s has characters that no person's name has", show(name))
	}
}

func (l *loader) rules(s source) {
	for i, e := range s.file.Rules {
		path := fmt.Sprintf("approval_rules[%d]", i)
		named := l.name(s, path+".name", e.Name) && l.define(s, path+".name", "rule", e.Name)
		if e.Expires == 0 {
			e.Expires = defaultExpires
		}
		l.longSpan(s, path+".max_duration", "max_duration", e.MaxDuration, false)
		l.longSpan(s, path+".expires", "expires", e.Expires, false)
		l.longSpan(s, path+".reauthenticate_within", "reauthenticate_within", e.Reauthenticate, true)
		l.longSpan(s, path+".user_reauthenticate_within", "user_reauthenticate_within", e.UserReauthenticate, true)
		r := broker.ApprovalRule{Name: e.Name, Need: l.need(s, path+".need", e.Need),
			StepUp:      broker.StepUp{MaxAge: e.Reauthenticate, ACR: l.acr(s, path+".acr", e.ACR)},
			UserStepUp:  broker.StepUp{MaxAge: e.UserReauthenticate, ACR: l.acr(s, path+".user_acr", e.UserACR)},
			MaxDuration: e.MaxDuration, Expires: e.Expires, SingleUse: e.SingleUse, Standing: e.Standing, BreakGlass: e.BreakGlass}
		for j, who := range e.Never {
			switch who {
			case "requester":
				r.NotRequester = true
			case "owner":
				r.NotOwner = true
			case "user":
				r.NotUser = true
			default:
				l.fail(s, fmt.Sprintf("%s.never[%d]", path, j), "never is for requester, owner and user, not %s%s", show(who),
					broker.Suggest(who, "words", []string{"requester", "owner", "user"}))
			}
		}
		if named {
			r.Digest = digest(r)
			l.snapshot.rules[r.Name] = r
		}
	}
}

// longSpan checks a duration that can be longer than a lease lives.
func (l *loader) longSpan(s source, path, what string, d time.Duration, optional bool) {
	if optional && d == 0 {
		return
	}
	if d < time.Second || d > maxGrant {
		l.fail(s, path, "%s is %s; it must be between 1s and %s", what, d, maxGrant)
	}
}

func (l *loader) need(s source, path string, entries []quorum) []broker.Quorum {
	if len(entries) == 0 || len(entries) > maxNeed {
		l.fail(s, path, "a rule needs people of 1 to %d groups", maxNeed)
	}
	var all []broker.Quorum
	people := 0
	for i, e := range entries {
		at, count := fmt.Sprintf("%s[%d]", path, i), 1
		if e.Count != nil {
			count = *e.Count
		}
		if count < 1 || count > broker.MaxVoters {
			l.fail(s, at+".count", "count is %d; it must be between 1 and %d", count, broker.MaxVoters)
		} else if people += count; people > broker.MaxVoters && people-count <= broker.MaxVoters {
			l.fail(s, path, "the rule needs more than %d people, who cannot be counted in one transaction", broker.MaxVoters)
		}
		l.text(s, at+".group", "group", e.Group, true)
		if strings.HasPrefix(e.Group, reserved) {
			l.fail(s, at+".group", "groups that begin with %q are the broker's own", reserved)
		}
		if slices.ContainsFunc(all, func(q broker.Quorum) bool { return q.Group == e.Group }) {
			l.fail(s, at+".group", "group %s is named twice; say how many with count", show(e.Group))
		}
		all = append(all, broker.Quorum{Group: e.Group, Count: count})
	}
	return all
}

func (l *loader) acr(s source, path string, classes []string) []string {
	if len(classes) > maxACR {
		l.fail(s, path, "there are %d classes; at most %d are taken", len(classes), maxACR)
	}
	for i, c := range classes {
		at := fmt.Sprintf("%s[%d]", path, i)
		l.text(s, at, "a class", c, true)
		if strings.ContainsAny(c, " ") {
			l.fail(s, at, "a class has no space (OpenID Connect Core, section 3.1.2.1: acr_values)")
		}
	}
	return classes
}

// approval finds the rules that a tool names.
func (l *loader) approval(s source, path string, e tool, t *broker.Tool) {
	find := func(at, name string, breakGlass bool) *broker.ApprovalRule {
		if name == "" {
			return nil
		}
		r, ok := l.snapshot.rules[name]
		switch {
		case !ok:
			if _, defined := l.at["rule "+name]; !defined {
				l.fail(s, at, "there is no approval rule %s%s", show(name), suggest(name, "rules", l.snapshot.rules))
			}
			return nil
		case r.BreakGlass && !breakGlass:
			l.fail(s, at, "rule %s is for emergencies (break_glass: true); an ordinary request cannot wait under it", name)
		case !r.BreakGlass && breakGlass:
			l.fail(s, at, "rule %s is an ordinary one; a rule for emergencies says break_glass: true", name)
		}
		return &r
	}
	t.Approval = find(path+".approval", e.Approval, false)
	t.BreakGlass = find(path+".break_glass", e.BreakGlass, true)
}

// sensitivity reads a tool's sensitivity.
func (l *loader) sensitivity(s source, path, word string) string {
	known := []string{"low", "medium", "high"}
	switch {
	case word == "":
		return "medium"
	case !slices.Contains(known, word):
		l.fail(s, path, "sensitivity is %s; it must be low, medium or high%s", show(word), broker.Suggest(word, "words", known))
	}
	return word
}
