package policy

import (
	"strings"
	"unicode/utf8"
)

// token is one token of Cedar's language and its place. The parser keeps no
// places but that of each policy, so that messages need them found again.
type token struct {
	text         string
	offset       int
	line, column int
}

// tokenize splits text that the parser has taken, or may take. It loses
// comments and layout alone, and never fails: what is no token is one of one
// character.
func tokenize(text string) []token {
	var all []token
	line, column := 1, 1
	advance := func(s string) {
		if n := strings.Count(s, "\n"); n > 0 {
			line += n
			column = 1 + utf8.RuneCountInString(s[strings.LastIndexByte(s, '\n')+1:])
			return
		}
		column += utf8.RuneCountInString(s)
	}
	for i := 0; i < len(text); {
		n, skip := lex(text[i:])
		if !skip {
			all = append(all, token{text: text[i : i+n], offset: i, line: line, column: column})
		}
		advance(text[i : i+n])
		i += n
	}
	return all
}

// lex returns the length of what s begins with, and whether it is no token but
// space or a comment.
func lex(s string) (n int, skip bool) {
	switch c := s[0]; {
	case c == ' ' || c == '\t' || c == '\n' || c == '\r':
		return 1, true
	case strings.HasPrefix(s, "//"):
		if end := strings.IndexByte(s, '\n'); end >= 0 {
			return end, true
		}
		return len(s), true
	case strings.HasPrefix(s, "/*"):
		if end := strings.Index(s[2:], "*/"); end >= 0 {
			return end + 4, true
		}
		return len(s), true
	case c == '"':
		for i := 1; i < len(s); i++ {
			switch s[i] {
			case '\\':
				i++
			case '"':
				return i + 1, false
			}
		}
		return len(s), false
	case wordByte(c):
		for n = 1; n < len(s) && wordByte(s[n]); n++ {
		}
		return n, false
	}
	for _, two := range []string{"::", "==", "!=", "<=", ">=", "&&", "||"} {
		if strings.HasPrefix(s, two) {
			return 2, false
		}
	}
	_, n = utf8.DecodeRuneInString(s)
	return n, false
}

func wordByte(c byte) bool {
	return c == '_' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
}

// find returns where these tokens first stand in a row, -1 if they do nowhere.
func find(tokens []token, row ...string) int {
	for i := 0; i+len(row) <= len(tokens); i++ {
		all := true
		for j, want := range row {
			if tokens[i+j].text != want {
				all = false
				break
			}
		}
		if all {
			return i
		}
	}
	return -1
}
