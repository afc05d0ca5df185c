package strictyaml

import (
	"bytes"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/lexer"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"

	"github.com/mayfly-security/mayfly/broker"
)

type place struct{ line, column int }

// kind is what stands at a place.
type kind int

const (
	kindNull kind = iota
	kindText
	kindBool
	kindInteger
	kindNumber // with a fraction
	kindSequence
	kindMapping
)

func (k kind) String() string {
	return [...]string{"nothing", "text", "true or false", "a number", "a number with a fraction", "a list", "a mapping"}[k]
}

// node is one value. Its place is that of its key in a mapping, and that of
// its first character elsewhere.
type node struct {
	place
	kind    kind
	text    string // the value of a text, or a number as it is written in its plainest form
	items   []*node
	entries []entry // in the order of the file; no key twice
	raw     bool    // taken as JSON: its keys are for others to judge
}

type entry struct {
	key   string
	value *node
}

func (n *node) entry(key string) *node {
	for _, e := range n.entries {
		if e.key == key {
			return e.value
		}
	}
	return nil
}

// parse reads data into a tree. It returns nil if there is none.
func parse(errs *collector, data []byte) *node {
	if len(data) > MaxSize {
		errs.add(place{1, 1}, "the file is larger than %d MiB", MaxSize>>20)
		return nil
	}
	data = bytes.TrimPrefix(data, []byte("\ufeff"))
	if !checkText(errs, data) {
		return nil
	}
	body, err := parseBody(errs, data)
	var syntax yaml.Error
	switch {
	case len(errs.errors) > 0:
		return nil
	case errors.As(err, &syntax) && syntax.GetToken() != nil:
		at := syntax.GetToken().Position
		errs.add(place{at.Line, at.Column}, "%s", broker.Clean(syntax.GetMessage()))
		return nil
	case err != nil:
		errs.add(place{1, 1}, "%s", broker.Clean(broker.Shorten(err.Error(), 300)))
		return nil
	case body == nil:
		errs.add(place{1, 1}, "there is nothing in the file")
		return nil
	}
	t := tree{errs}
	root := t.value(body, place{1, 1}, 0)
	if len(errs.errors) > 0 {
		return nil
	}
	return root
}

// parseBody gives the one document's body; nil if it is empty.
func parseBody(errs *collector, data []byte) (body ast.Node, err error) {
	// A file that the parser cannot bear must not take a running broker down
	// with it when the catalog is reloaded.
	defer func() {
		if p := recover(); p != nil {
			body, err = nil, fmt.Errorf("this is no YAML that can be read: %v", p)
		}
	}()
	// The lexer drops a tag that ends the file without ending the line.
	tokens := lexer.Tokenize(string(data) + "\n")
	if !checkTokens(errs, tokens) {
		return nil, nil
	}
	file, err := parser.Parse(tokens, 0, parser.AllowDuplicateMapKey()) // we find them, and name both places
	if err != nil {
		return nil, err
	}
	for _, d := range file.Docs {
		if d.Body == nil {
			continue
		}
		if body != nil {
			at := d.Body.GetToken().Position
			errs.add(place{at.Line, at.Column}, "a second document begins here; one file is one document")
			return nil, nil
		}
		body = d.Body
	}
	return body, nil
}

// tree makes nodes of the parser's.
type tree struct{ errs *collector }

func (t tree) value(n ast.Node, at place, depth int) *node {
	if depth > MaxDepth {
		t.errs.add(at, "this is more than %d levels deep", MaxDepth)
		return &node{place: at}
	}
	switch n := n.(type) {
	case *ast.NullNode:
		return &node{place: at, kind: kindNull}
	case *ast.BoolNode:
		return &node{place: at, kind: kindBool, text: strconv.FormatBool(n.Value)}
	case *ast.StringNode:
		if n.Token.Type == token.StringType && likeNumber(n.Value) {
			t.errs.add(at, "%s is a number to some readers and text to others: write it plainly, or quote it if it is text", quote(n.Value))
		}
		return &node{place: at, kind: kindText, text: n.Value}
	case *ast.LiteralNode:
		return &node{place: at, kind: kindText, text: n.Value.Value}
	case *ast.IntegerNode:
		return t.integer(n, at)
	case *ast.FloatNode:
		text := n.Token.Value
		// ParseFloat takes underscores in hexadecimal only, and no infinity is a FloatNode.
		if f, err := strconv.ParseFloat(text, 64); err != nil {
			t.errs.add(at, "%s is no plain decimal number; quote it if it is text", quote(text))
		} else {
			text = strconv.FormatFloat(f, 'g', -1, 64)
		}
		return &node{place: at, kind: kindNumber, text: text}
	case *ast.SequenceNode:
		s := &node{place: at, kind: kindSequence}
		for _, item := range n.Values {
			s.items = append(s.items, t.value(item, start(item, at), depth+1))
		}
		return s
	case *ast.MappingValueNode:
		return t.mapping([]*ast.MappingValueNode{n}, at, depth)
	case *ast.MappingNode:
		return t.mapping(n.Values, at, depth)
	}
	t.errs.add(at, "this kind of YAML value is not taken; quote it if it is text")
	return &node{place: at}
}

// start is the place of the first character of an item of a sequence.
func start(n ast.Node, otherwise place) place {
	switch m := n.(type) {
	case *ast.MappingValueNode:
		n = m.Key
	case *ast.MappingNode:
		if !m.IsFlowStyle && len(m.Values) > 0 {
			n = m.Values[0].Key
		}
	}
	if n == nil || n.GetToken() == nil {
		return otherwise
	}
	at := n.GetToken().Position
	return place{at.Line, at.Column}
}

func (t tree) integer(n *ast.IntegerNode, at place) *node {
	text := ""
	switch v := n.Value.(type) {
	case int64:
		text = strconv.FormatInt(v, 10)
	case uint64:
		text = strconv.FormatUint(v, 10)
	}
	// 010 is eight to some readers and ten to others.
	if text == "" || text != n.Token.Value {
		t.errs.add(at, "%s is no plain decimal number: write it without sign, leading zeros and underscores, or quote it if it is text", quote(n.Token.Value))
	}
	return &node{place: at, kind: kindInteger, text: text}
}

// likeNumber reports whether plain text that is no number here may be one to
// another parser: 1e3, 0800, 0o17, or more digits than an integer has.
func likeNumber(s string) bool {
	if !strings.ContainsAny(s[:min(len(s), 2)], "0123456789") {
		return false
	}
	s = strings.ReplaceAll(s, "_", "")
	_, notFloat := strconv.ParseFloat(s, 64)
	_, notInteger := strconv.ParseInt(s, 0, 64)
	return !errors.Is(notFloat, strconv.ErrSyntax) || !errors.Is(notInteger, strconv.ErrSyntax)
}

func (t tree) mapping(values []*ast.MappingValueNode, at place, depth int) *node {
	m := &node{place: at, kind: kindMapping}
	seen := make(map[string]place, len(values))
	for _, v := range values {
		if v == nil || v.Key == nil || v.Key.GetToken() == nil {
			t.errs.add(at, "a key is missing here")
			continue
		}
		keyAt := place{v.Key.GetToken().Position.Line, v.Key.GetToken().Position.Column}
		name, ok := keyText(v.Key)
		if !ok {
			t.errs.add(keyAt, "a key must be text; quote it")
			continue
		}
		value := t.value(v.Value, keyAt, depth+1)
		if first, again := seen[name]; again {
			t.errs.add(keyAt, "key %s is here a second time; the first is on line %d", quote(name), first.line)
			continue
		}
		seen[name] = keyAt
		m.entries = append(m.entries, entry{key: name, value: value})
	}
	return m
}

func keyText(k ast.MapKeyNode) (string, bool) {
	s, ok := k.(*ast.StringNode)
	if !ok {
		return "", false
	}
	return s.Value, true
}
