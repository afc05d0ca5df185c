package policy

import (
	"crypto/sha256"
	_ "embed"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"

	"github.com/cedar-policy/cedar-go"
	"github.com/cedar-policy/cedar-go/types"
	"github.com/cedar-policy/cedar-go/x/exp/ast"
)

// Source is one file of policies, in Cedar's language.
type Source struct {
	Name string // the file's
	Text string
}

// Set is a loaded policy set. It never changes, and may be used from many
// goroutines.
type Set struct {
	digest   string
	policies []*member // in the order of their IDs
	index    map[Action]index
	timed    map[Action]bool // a policy about it reads the time
	names    []Name
	literals map[string][]string // what attributes are compared with, for Candidates
}

// member is one policy of a set.
type member struct {
	id          string
	description string
	text        string // its tokens, one space between each: layout and comments are not part of it
	at          Position
	policy      *cedar.Policy
	reads       map[string]bool // of the context; see contextOf
}

// ast is the policy as the schema's and evaluator's packages have it.
func (m *member) ast() *ast.Policy { return (*ast.Policy)(m.policy.AST()) }

// Name is an entity that a policy names. The catalog knows whether there is
// one of it.
type Name struct {
	Position
	Type   string // as in the schema: "Tool", "Agent", "Group", …
	ID     string
	Policy string // the policy's ID
}

//go:embed builtin.cedar
var builtinText string

// Builtin is the set that decides where the catalog has no policies: a tool
// with an approval rule may be asked for, a grant gives, whoever the rules
// name may approve, openers may open, operators may administer. It gives
// nothing for the mere asking.
func Builtin() *Set {
	s, err := load([]Source{{Name: "builtin.cedar", Text: builtinText}}, true)
	if err != nil {
		panic("policy: the built-in policies: " + err.Error()) // a test loads them
	}
	return s
}

// Load reads a policy set from files, as one set. It refuses what the schema
// does not allow, and every name that is not there; the error is Errors, with
// everything that is wrong and its place. No source gives a set that allows
// nothing.
func Load(sources []Source) (*Set, error) { return load(sources, false) }

// Digest is the SHA-256, in hex, of the policies: of what they say, not of
// their layout, comments, files or order.
func (s *Set) Digest() string { return s.digest }

// IDs are the policies' IDs, sorted.
func (s *Set) IDs() []string {
	ids := make([]string, len(s.policies))
	for i, m := range s.policies {
		ids[i] = m.id
	}
	return ids
}

// Text is what a policy says, on one line and without comments; empty if there
// is none of that ID.
func (s *Set) Text(id string) string {
	if m := s.member(id); m != nil {
		return m.text
	}
	return ""
}

// At is where a policy begins.
func (s *Set) At(id string) (Position, bool) {
	if m := s.member(id); m != nil {
		return m.at, true
	}
	return Position{}, false
}

func (s *Set) member(id string) *member {
	i, ok := slices.BinarySearchFunc(s.policies, id, func(m *member, id string) int { return strings.Compare(m.id, id) })
	if !ok {
		return nil
	}
	return s.policies[i]
}

// Names are the entities that the policies name, actions and entities of
// requests left out, in the order of their places.
func (s *Set) Names() []Name { return s.names }

// Diff tells the IDs of the policies that next has and old has not, the other
// way round, and that both have but with another text.
func Diff(old, next *Set) (added, removed, changed []string) {
	for _, m := range next.policies {
		switch was := old.member(m.id); {
		case was == nil:
			added = append(added, m.id)
		case was.text != m.text:
			changed = append(changed, m.id)
		}
	}
	for _, m := range old.policies {
		if next.member(m.id) == nil {
			removed = append(removed, m.id)
		}
	}
	return added, removed, changed
}

// seal computes what follows from a set's policies.
func (s *Set) seal() {
	slices.SortFunc(s.policies, func(a, b *member) int { return strings.Compare(a.id, b.id) })
	h := sha256.New()
	s.timed = map[Action]bool{}
	for _, m := range s.policies {
		m.reads = contextOf(m.ast())
		for _, a := range Actions() {
			s.timed[a] = s.timed[a] || concerns(m.ast().Action, actionUID(a)) && readsTime(m.ast())
		}
		for _, part := range []string{m.id, m.text} {
			var n [8]byte
			binary.BigEndian.PutUint64(n[:], uint64(len(part)))
			h.Write(n[:])
			h.Write([]byte(part))
		}
	}
	s.digest = hex.EncodeToString(h.Sum(nil))
	s.index = buildIndex(s.policies)
}

func actionUID(a Action) types.EntityUID { return types.NewEntityUID(typeAction, types.String(a)) }

// where names a policy and its place, for people.
func (m *member) where() string {
	if m.at.File == "" {
		return fmt.Sprintf("policy %q", m.id)
	}
	return fmt.Sprintf("policy %q (%s:%d)", m.id, m.at.File, m.at.Line)
}
