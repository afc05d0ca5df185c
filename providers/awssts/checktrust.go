package awssts

import (
	"encoding/json"
	"net/url"
	"slices"
	"strings"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers/internal/awsaccess"
)

// trust tells who else can make sessions of the role: they are no leases, have
// all that the role allows, and nobody ends them.
func (c *check) trust(r *checked, raw string) {
	text, err := url.PathUnescape(raw)
	if err != nil {
		text = raw
	}
	var doc struct{ Statement json.RawMessage }
	type statement struct {
		Effect    string
		Principal json.RawMessage
		Condition json.RawMessage
	}
	var all []statement
	var one statement
	if json.Unmarshal([]byte(text), &doc) == nil {
		if json.Unmarshal(doc.Statement, &all) != nil && json.Unmarshal(doc.Statement, &one) == nil {
			all = []statement{one}
		}
	}
	if len(all) == 0 {
		c.note("", "", "%s: its trust policy cannot be read here, so that nothing is said of who else it trusts", r)
		return
	}
	const fix = "trust the broker's role alone"
	for _, s := range all {
		if s.Effect != "Allow" {
			continue
		}
		for _, p := range principals(s.Principal) {
			switch {
			case p == "*" && len(s.Condition) == 0:
				c.bad("", fix, "%s trusts everybody (*) in every account", r)
			case p == "*":
				c.note("", fix, "%s trusts everybody (*) under conditions: whoever meets them makes sessions that are no leases", r)
			case c.isCaller(p):
			case strings.HasSuffix(p, ":root") || len(p) == 12:
				c.note("", fix, "%s trusts the whole account (%s): whoever in it is allowed sts:AssumeRole makes sessions that are no leases", r, p)
			default:
				c.note("", fix, "%s also trusts %s: sessions that it makes are no leases", r, broker.Clean(broker.Shorten(p, 200)))
			}
		}
	}
}

// principals are all principals of a statement; what is no text is told as it is.
func principals(raw json.RawMessage) (all []string) {
	var one string
	if json.Unmarshal(raw, &one) == nil {
		return []string{one}
	}
	var kinds map[string]json.RawMessage
	if json.Unmarshal(raw, &kinds) != nil {
		return []string{string(raw)}
	}
	for _, values := range kinds {
		var many []string
		if json.Unmarshal(values, &one) == nil {
			many = []string{one}
		} else if json.Unmarshal(values, &many) != nil {
			many = []string{string(values)}
		}
		all = append(all, many...)
	}
	slices.Sort(all)
	return all
}

// isCaller reports whether a principal is who the check looks as: the ARN of a
// session has its role's name, and not the path.
func (c *check) isCaller(principal string) bool {
	if principal == c.caller || principal == c.config.Credentials.RoleARN {
		return true
	}
	role, err := awsaccess.ParseRole(principal)
	parts := strings.Split(c.caller, ":")
	return err == nil && len(parts) == 6 && parts[4] == role.Account && strings.HasPrefix(parts[5], "assumed-role/"+role.Name+"/")
}
