package main

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"unicode"

	"pgregory.net/rapid"
)

// hostileText is text of which much could change what a terminal shows.
func hostileText(t *rapid.T) string {
	return strings.Join(rapid.SliceOf(rapid.OneOf(
		rapid.String(),
		rapid.SampledFrom([]string{
			"\x1b[2J", "\x1b]0;title\a", "\x1b]52;c;aGk=\a", "\u009b31m", "\r", "\n", "\t", "\b", "\x7f", "\x00",
			"\u202e", "\u2066", "\u200f", "\u2028", "\u200b", "\ufeff", "\U000e0041", "\ufffd", "é", "日本", "'", `\`, `"`,
		}),
	)).Draw(t, "text"), "")
}

// acts reports the first character that a terminal could act on.
func acts(out string) (rune, bool) {
	for _, r := range out {
		if r != '\n' && unicode.In(r, unicode.Cc, unicode.Cf, unicode.Zl, unicode.Zp) {
			return r, true
		}
	}
	return 0, false
}

func TestTextNeverCommandsTheTerminal(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := hostileText(t)
		var p page
		p.line("a %s b", s)
		p.table([]string{"A", "B"}, [][]string{{s, "x"}, {"y", s}})
		p.fields("# ", "name", s)
		if r, ok := acts(p.String()); ok {
			t.Fatalf("%U gets through in %q", r, p.String())
		}
		// A line end from others would forge a row, or leave a comment of get.
		if n := strings.Count(p.String(), "\n"); n > 5 {
			t.Fatalf("five lines became %d: %q", n, p.String())
		}
	})
}

// JSON escapes instead: it must mean what was meant.
func TestJSONNeverCommandsTheTerminal(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := hostileText(t)
		var out bytes.Buffer
		if err := writeJSON(&out, map[string]string{"k": s, s: "v"}); err != nil {
			t.Fatal(err)
		}
		if r, ok := acts(out.String()); ok {
			t.Fatalf("%U gets through in %q", r, out.String())
		}
		var back map[string]string
		if err := json.Unmarshal(out.Bytes(), &back); err != nil {
			t.Fatalf("%v in %q", err, out.String())
		}
		if back["k"] != strings.ToValidUTF8(s, "\ufffd") && back["k"] != s {
			t.Fatalf("%q came back as %q", s, back["k"])
		}
	})
}
