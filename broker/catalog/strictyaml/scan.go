package strictyaml

import (
	"bytes"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/goccy/go-yaml/token"

	"github.com/mayfly-security/mayfly/broker"
)

// checkText refuses what people cannot see as it is: bytes that are not UTF-8,
// and control, bidirectional and invisible characters, also in comments. It
// reports whether the text can be read on.
func checkText(errs *collector, data []byte) bool {
	ok, line := true, 0
	for each := range bytes.Lines(data) {
		line++
		text := strings.TrimSuffix(strings.TrimSuffix(string(each), "\n"), "\r")
		text = strings.ReplaceAll(text, "\t", " ")
		if broker.Clean(text) == text {
			continue
		}
		ok = false
		column := 1
		for i, r := range text {
			_, size := utf8.DecodeRuneInString(text[i:])
			if broker.Clean(text[i:i+size]) != text[i:i+size] {
				if r == utf8.RuneError && size == 1 {
					errs.add(place{line, column}, "the byte %#02x is not UTF-8", text[i])
				} else {
					errs.add(place{line, column}, "the character %U cannot be seen; write it as an escape within double quotes", r)
				}
				break
			}
			column++
		}
	}
	return ok
}

// checkTokens refuses what the parser is not to meet: features of YAML that
// make one text stand for another, and nesting and mappings so large that the
// parser would need too much time or stack. It counts from the text's shape
// alone and may count too much, never too little.
func checkTokens(errs *collector, tokens token.Tokens) bool {
	s := shape{errs: errs}
	var content, ended bool // of the document so far; whether it was ended
	for i, t := range tokens {
		at := place{t.Position.Line, t.Position.Column}
		if ended && t.Type != token.CommentType {
			errs.add(at, "the document has ended, and there is more after it")
			return false
		}
		begun := content
		content = content || t.Type != token.CommentType
		switch t.Type {
		case token.InvalidType:
			errs.add(at, "%s", broker.Clean(t.Error))
			return false
		case token.AnchorType, token.AliasType, token.MergeKeyType:
			errs.add(at, "anchors, aliases and merge keys are not taken: write it out, or quote the text if it is text")
			return false
		case token.TagType:
			errs.add(at, "tags are not taken: leave it away, or quote the text if it is text")
			return false
		case token.DirectiveType:
			errs.add(at, "directives are not taken: leave it away, or quote the text if it is text")
			return false
		case token.StringType:
			// Parsers do not agree on where such text ends, or on what is a
			// comment in it.
			if strings.Contains(strings.TrimSpace(t.Origin), "\n") && !blockText(tokens[:i]) {
				errs.add(at, "text over several lines must be in quotes, or a block that begins with | or >")
				return false
			}
		case token.MappingKeyType:
			errs.add(at, `"?" keys are not taken: write "key: value"`)
			return false
		case token.DocumentHeaderType:
			if begun {
				errs.add(at, "a second document begins here; one file is one document")
				return false
			}
		case token.DocumentEndType:
			ended = true
		case token.SequenceStartType, token.MappingStartType:
			s.flow = append(s.flow, collection{mapping: t.Type == token.MappingStartType})
		case token.SequenceEndType, token.MappingEndType:
			n := len(s.flow)
			if n == 0 || s.flow[n-1].mapping != (t.Type == token.MappingEndType) {
				errs.add(at, "%s closes nothing that is open here", t.Value)
				return false
			}
			s.flow = s.flow[:n-1]
		case token.CollectEntryType:
			if n := len(s.flow); n > 0 {
				s.flow[n-1].entries++
				s.flow[n-1].values = 0
			}
		case token.SequenceEntryType:
			if len(s.flow) > 0 {
				errs.add(at, `"- " cannot stand within brackets; separate the items with commas`)
				return false
			}
			s.entry(t.Position.Column, false)
		case token.MappingValueType:
			if n := len(s.flow); n > 0 {
				s.flow[n-1].values++
			} else if i > 0 {
				s.entry(tokens[i-1].Position.Column, true)
			}
		default:
			continue
		}
		if !s.small(at) {
			return false
		}
	}
	return true
}

// blockText reports whether the tokens end with the header of a block of text.
func blockText(tokens token.Tokens) bool {
	for _, t := range slices.Backward(tokens) {
		if t.Type != token.CommentType {
			return t.Type == token.LiteralType || t.Type == token.FoldedType
		}
	}
	return false
}

// shape is what is open at one token.
type shape struct {
	errs  *collector
	block []collection
	flow  []collection // within the innermost block
}

type collection struct {
	mapping bool
	column  int // block only
	entries int
	values  int // flow only: colons since the last comma; more than one nest
}

// entry counts one entry of a block collection at a column and closes those
// that it ends.
func (s *shape) entry(column int, mapping bool) {
	for n := len(s.block); n > 0; n = len(s.block) {
		top := s.block[n-1]
		// A sequence may stand at the column of the key that it belongs to.
		if top.column < column || top.column == column && (top.mapping == mapping || top.mapping) {
			break
		}
		s.block = s.block[:n-1]
	}
	if n := len(s.block); n == 0 || s.block[n-1].column != column || s.block[n-1].mapping != mapping {
		s.block = append(s.block, collection{mapping: mapping, column: column})
	}
	s.block[len(s.block)-1].entries++
}

// small refuses what is too deep or too wide.
func (s *shape) small(at place) bool {
	depth := len(s.block) + len(s.flow)
	if n := len(s.flow); n > 0 {
		depth += s.flow[n-1].values
	}
	if depth > MaxDepth {
		s.errs.add(at, "this is more than %d levels deep", MaxDepth)
		return false
	}
	for _, open := range [][]collection{s.block, s.flow} {
		if n := len(open); n > 0 && open[n-1].mapping && open[n-1].entries > MaxKeys {
			s.errs.add(at, "this mapping has more than %d keys", MaxKeys)
			return false
		}
	}
	return true
}
