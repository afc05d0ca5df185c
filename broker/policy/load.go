package policy

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/cedar-policy/cedar-go"
	"github.com/cedar-policy/cedar-go/x/exp/schema/resolved"
	"github.com/cedar-policy/cedar-go/x/exp/schema/validate"

	"github.com/mayfly-security/mayfly/broker"
)

// Limits on a policy set. They are far above what people write, and far below
// what would cost a reader time, memory or stack.
const (
	maxSource = 1 << 20 // bytes of a file
	maxTokens = 10_000  // of one policy
	maxNested = 64      // brackets within one another
	maxSet    = 10_000  // policies
)

// idForm is how a policy's ID looks: it is printed in evidence and messages.
var idForm = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._/-]{0,127}$`)

// builtinIDs begins the IDs of the built-in policies, so that evidence tells
// them apart.
const builtinIDs = "builtin."

type loader struct {
	schema    *resolved.Schema
	validator *validate.Validator
	errs      Errors
	set       *Set
	first     map[string]Position // where each ID was first used
	builtin   bool
}

func load(sources []Source, builtin bool) (*Set, error) {
	s, err := loadSchema()
	if err != nil {
		return nil, err
	}
	l := &loader{schema: s, validator: validate.New(s), set: &Set{literals: map[string][]string{}}, first: map[string]Position{}, builtin: builtin}
	for _, src := range sources {
		l.source(src)
	}
	if len(l.set.policies) > maxSet {
		l.errs = append(l.errs, &Error{Position: l.set.policies[maxSet].at,
			Message: fmt.Sprintf("there are %d policies; at most %d are taken", len(l.set.policies), maxSet)})
	}
	if len(l.errs) > 0 {
		return nil, l.errs.sort()
	}
	l.set.seal()
	return l.set, nil
}

// source reads one file.
func (l *loader) source(src Source) {
	fail := func(at token, format string, args ...any) {
		l.errs = append(l.errs, &Error{Position: Position{File: src.Name, Line: at.line, Column: at.column}, Message: fmt.Sprintf(format, args...)})
	}
	if len(src.Text) > maxSource {
		fail(token{line: 1, column: 1}, "the file is larger than %d bytes", maxSource)
		return
	}
	if at, bad := unsafe(src.Text); bad {
		fail(at, "here is a control, bidirectional or invisible character, or one that is not UTF-8")
		return
	}
	tokens := tokenize(src.Text)
	if at, problem := tooDeep(tokens); problem != "" {
		fail(at, "%s", problem)
		return
	}
	policies, err := cedar.NewPolicyListFromBytes(src.Name, []byte(src.Text))
	if err != nil {
		at, message := syntaxError(err)
		fail(at, "%s", message)
		return
	}
	for i, p := range policies {
		begin, end := p.Position().Offset, len(src.Text)
		if i+1 < len(policies) {
			end = policies[i+1].Position().Offset
		}
		own := tokens[indexAt(tokens, begin):indexAt(tokens, end)]
		l.policy(src.Name, p, own)
	}
}

func indexAt(tokens []token, offset int) int {
	i, _ := slices.BinarySearchFunc(tokens, offset, func(t token, o int) int { return t.offset - o })
	return i
}

// policy checks one policy and adds it to the set.
func (l *loader) policy(file string, p *cedar.Policy, tokens []token) {
	c := &check{loader: l, file: file, tokens: tokens}
	m := &member{policy: p, at: Position{File: file, Line: p.Position().Line, Column: p.Position().Column}, text: joined(tokens)}
	c.member = m
	c.annotations()
	c.expressions()
	if !c.failed {
		c.validate()
	}
	l.set.policies = append(l.set.policies, m)
	l.set.names = append(l.set.names, c.names...)
}

func joined(tokens []token) string {
	words := make([]string, len(tokens))
	for i, t := range tokens {
		words[i] = t.text
	}
	return strings.Join(words, " ")
}

// unsafe finds the first character that could make a policy look other than
// it is.
func unsafe(text string) (token, bool) {
	line := 0
	for each := range strings.Lines(text) {
		line++
		plain := strings.ReplaceAll(strings.TrimSuffix(strings.TrimSuffix(each, "\n"), "\r"), "\t", " ")
		if clean := broker.Clean(plain); clean != plain {
			column := 1
			for rest := plain; rest != ""; column++ {
				_, size := utf8.DecodeRuneInString(rest)
				if broker.Clean(rest[:size]) != rest[:size] {
					break
				}
				rest = rest[size:]
			}
			return token{line: line, column: column}, true
		}
	}
	return token{}, false
}

// tooDeep refuses, before the parser reads it, what could exhaust its stack.
func tooDeep(tokens []token) (token, string) {
	depth, count := 0, 0
	for _, t := range tokens {
		count++
		switch t.text {
		case "(", "[", "{":
			if depth++; depth > maxNested {
				return t, fmt.Sprintf("this is more than %d brackets deep", maxNested)
			}
		case ")", "]", "}":
			depth--
		case ";":
			count = 0
		}
		if count > maxTokens {
			return t, fmt.Sprintf("this policy has more than %d words and signs; divide it", maxTokens)
		}
	}
	return token{}, ""
}

var syntaxPlace = regexp.MustCompile(`<input>:(\d+):(\d+)`)

// syntaxError is what the parser says, with its place taken out of the text.
func syntaxError(err error) (token, string) {
	text := err.Error()
	at := token{line: 1, column: 1}
	if m := syntaxPlace.FindStringSubmatch(text); m != nil {
		at.line, _ = strconv.Atoi(m[1])
		at.column, _ = strconv.Atoi(m[2])
	}
	text = syntaxPlace.ReplaceAllString(text, "here")
	text = strings.TrimPrefix(text, "parser error: ")
	return at, "this is not Cedar: " + broker.Clean(broker.Shorten(strings.TrimPrefix(text, "parse error at "), 200))
}
