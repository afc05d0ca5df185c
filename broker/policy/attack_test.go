package policy_test

import (
	"strings"
	"testing"
)

// TestOddPoliciesAreRefused: what could be read in two ways, or stands for
// something to be filled in later, is no policy.
func TestOddPoliciesAreRefused(t *testing.T) {
	const rest = `, action == Action::"request", resource);`
	for name, text := range map[string]string{
		"template principal":   `@id("a") permit (principal == ?principal` + rest,
		"template in":          `@id("a") permit (principal in ?principal` + rest,
		"template resource":    `@id("a") permit (principal, action, resource == ?resource);`,
		"two IDs":              `@id("a") @id("b") permit (principal` + rest,
		"no ID":                `permit (principal` + rest,
		"another annotation":   `@id("a") @allow("everybody") permit (principal` + rest,
		"another action":       `@id("a") forbid (principal, action in [Action::"request", Action::"approev"], resource);`,
		"action of another":    `@id("a") forbid (principal, action == Other::Action::"request", resource);`,
		"action group":         `@id("a") forbid (principal, action in Action::"everything", resource);`,
		"no action":            `@id("a") forbid (principal, action in [], resource);`,
		"a variable of cedar":  `@id("a") permit (principal == __cedar::variable::"principal"` + rest,
		"a reserved group":     `@id("a") permit (principal in Group::"mayfly:everybody"` + rest,
		"never applies":        `@id("a") forbid (principal is Tool` + rest,
		"right-to-left":        "@id(\"a\") permit (principal, action == Action::\"request\", resource) when { context.reason == \"\u202e\" };",
		"a comment that hides": "@id(\"a\") permit (principal, action == Action::\"request\", resource) // \u2066 when { false }\n;",
	} {
		if s, err := load(text); err == nil {
			t.Errorf("%s: taken, with the IDs %s", name, strings.Join(s.IDs(), ", "))
		}
	}
}
