package awsscope

import (
	"fmt"
	"strings"

	"github.com/mayfly-security/mayfly/broker"
)

func (s Statement) checkAction(action string) error {
	if action == "*" {
		if s.Effect == deny {
			return nil
		}
		return fmt.Errorf("is *, which is everything; name what the tool may do, such as s3:GetObject")
	}
	if !actionForm.MatchString(action) {
		return fmt.Errorf("is %q; it is SERVICE:ACTION, such as s3:GetObject, with wildcards in the action alone", broker.Clean(broker.Shorten(action, 80)))
	}
	if s.Effect == deny {
		return nil
	}
	lower := strings.ToLower(action)
	if strings.HasPrefix(lower, "iam:") {
		return fmt.Errorf("is %s: a tool cannot have actions of IAM, with which it could widen what roles can do", action)
	}
	for _, n := range never {
		if matches(lower, n) {
			return fmt.Errorf("is %s: a session or token that is made with it has a name of its own, and neither the lease's end nor an early end reaches it", action)
		}
	}
	return nil
}

// never are what no tool may do: it would make a session, or a token for other
// systems, that neither the lease's end nor its early end reaches.
var never = []string{
	"sts:assumerole", "sts:assumerolewithsaml", "sts:assumerolewithwebidentity", "sts:assumeroot",
	"sts:getdelegatedaccesstoken", "sts:getfederationtoken", "sts:getsessiontoken", "sts:getwebidentitytoken",
}

// denied are the same, with those of IAM, as a session policy has them where
// managed policies say what the tool may do.
var denied = []string{"iam:*", "sts:Assume*", "sts:GetDelegatedAccessToken", "sts:GetFederationToken", "sts:GetSessionToken", "sts:GetWebIdentityToken"}

// matches reports whether a pattern with * and ? matches the whole text. It goes
// back to the last * alone, so that no pattern takes long.
func matches(pattern, text string) bool {
	p, t, star, from := 0, 0, -1, 0
	for t < len(text) {
		switch {
		case p < len(pattern) && pattern[p] == '*':
			star, from = p, t
			p++
		case p < len(pattern) && (pattern[p] == '?' || pattern[p] == text[t]):
			p++
			t++
		case star >= 0:
			from++
			p, t = star+1, from
		default:
			return false
		}
	}
	return strings.Trim(pattern[p:], "*") == ""
}
