package awsscope

import (
	"regexp"
	"regexp/syntax"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/mayfly-security/mayfly/broker"
)

// escape writes a parameter's value so that IAM takes every character of it for
// itself: what would be a wildcard or begin a variable becomes the variable
// that stands for it. Policies have Version 2012-10-17, in which these are.
func escape(value string) string {
	return strings.NewReplacer("*", "${*}", "?", "${?}", "$", "${$}").Replace(value)
}

// special reports whether value has characters that mean something to IAM.
func special(value string) bool { return strings.ContainsAny(value, "*?$") }

// inPolicy reports whether AWS takes every character of text in a session policy.
func inPolicy(text string) bool {
	return !strings.ContainsFunc(text, func(r rune) bool { return r < ' ' || r > 0xFF || r == utf8.RuneError })
}

// cost is how many characters of the policy one character of a value takes at most.
func cost(r rune) int {
	switch {
	case r == '*', r == '?', r == '$':
		return len("${*}")
	case r == '"', r == '\\':
		return 2
	case r < ' ' || r == 0x7f || r > 0xFF:
		return 6 // refused where it comes; never more than this
	}
	return 1
}

// longest is how many characters of a policy a value of the parameter takes at most.
func longest(p broker.Param) int {
	switch p.Type {
	case broker.ParamInteger:
		lowest, highest := int64(-1<<63), int64(1<<63-1)
		if p.Min != nil {
			lowest = *p.Min
		}
		if p.Max != nil {
			highest = *p.Max
		}
		return max(len(strconv.FormatInt(lowest, 10)), len(strconv.FormatInt(highest, 10)))
	case broker.ParamBoolean:
		return len("false")
	}
	n := 0
	for _, v := range p.OneOf {
		n = max(n, textCost(v))
	}
	if len(p.OneOf) > 0 {
		return n
	}
	return longestMatch(p.Pattern)
}

func textCost(text string) (n int) {
	for _, r := range text {
		n += cost(r)
	}
	return n
}

// unbounded is what a pattern without a bound may take: every value is at most
// broker.MaxParam bytes long.
const unbounded = broker.MaxParam

// longestMatch is how many characters of a policy what matches a pattern takes at most.
func longestMatch(pattern *regexp.Regexp) int {
	if pattern == nil {
		return 0
	}
	tree, err := syntax.Parse(pattern.String(), syntax.Perl)
	if err != nil {
		return unbounded
	}
	return matchCost(tree)
}

func matchCost(t *syntax.Regexp) int {
	most := func() (n int) {
		for _, sub := range t.Sub {
			n = max(n, matchCost(sub))
		}
		return n
	}
	switch t.Op {
	case syntax.OpLiteral:
		n := 0
		for _, r := range t.Rune {
			n += cost(r)
		}
		return n
	case syntax.OpCharClass:
		n := 0
		for i := 0; i+1 < len(t.Rune); i += 2 {
			for _, r := range []rune{'*', '?', '$', '"', '\\', t.Rune[i], t.Rune[i+1]} {
				if t.Rune[i] <= r && r <= t.Rune[i+1] {
					n = max(n, cost(r))
				}
			}
		}
		return n
	case syntax.OpAnyChar, syntax.OpAnyCharNotNL:
		return cost('*')
	case syntax.OpCapture, syntax.OpQuest, syntax.OpAlternate:
		return most()
	case syntax.OpStar, syntax.OpPlus:
		return min(unbounded*most(), unbounded*6)
	case syntax.OpRepeat:
		if t.Max < 0 {
			return min(unbounded*most(), unbounded*6)
		}
		return min(t.Max*most(), unbounded*6)
	case syntax.OpConcat:
		n := 0
		for _, sub := range t.Sub {
			n = min(n+matchCost(sub), unbounded*6)
		}
		return n
	}
	return 0
}
