package broker

import (
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// Limits on text that others send us, in bytes. They are checked before
// anything is stored.
const (
	MaxReason    = 1000 // a reason for a grant or an incident
	MaxReference = 200  // an incident system's or ticket system's name for something
	MaxKey       = 128  // an idempotency key
	MaxParam     = 1000 // one parameter's value
)

// Clean makes text from others safe to show to a person: every control
// character (ANSI escapes and line ends among them), every bidirectional
// override or mark, every other invisible format character, and every byte
// that is not UTF-8 becomes U+FFFD, so that what was tried stays visible. It
// is idempotent.
func Clean(s string) string {
	if !needsCleaning(s) {
		return s
	}
	var b strings.Builder
	b.Grow(len(s))
	for _, r := range s {
		if unsafeRune(r) {
			r = utf8.RuneError
		}
		b.WriteRune(r)
	}
	return b.String()
}

// OneLine is Clean for text of several lines, such as errors that are joined:
// they come behind one another, and stay apart.
func OneLine(s string) string {
	return Clean(strings.Join(strings.FieldsFunc(s, func(r rune) bool { return r == '\n' }), "; "))
}

// Span is a duration as people write it: without zeros at its end.
func Span(d time.Duration) string {
	s := d.String()
	if rest, ok := strings.CutSuffix(s, "m0s"); ok {
		s = rest + "m"
	}
	if rest, ok := strings.CutSuffix(s, "h0m"); ok {
		s = rest + "h"
	}
	return s
}

func needsCleaning(s string) bool {
	for i, r := range s {
		if unsafeRune(r) {
			return true
		}
		if r == utf8.RuneError {
			if _, size := utf8.DecodeRuneInString(s[i:]); size == 1 {
				return true
			}
		}
	}
	return false
}

// unsafeRune reports whether r can change how the text around it is shown:
// controls (Cc), format characters (Cf, which holds the bidi overrides, the
// zero-width characters and the tag characters), line and paragraph
// separators (Zl, Zp), and code points that are no characters (Cs, Co).
func unsafeRune(r rune) bool {
	return unicode.In(r, unicode.Cc, unicode.Cf, unicode.Zl, unicode.Zp, unicode.Cs, unicode.Co)
}

// Shorten cuts s to at most n bytes at a rune's edge and shows the cut.
func Shorten(s string, n int) string {
	if len(s) <= n {
		return s
	}
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n] + "…"
}

// CheckText validates free text from a caller (a reason, a reference): valid
// UTF-8 of at most limit bytes without control, bidirectional or invisible
// characters. field names the field in the refusal. Unlike Clean it refuses:
// what is stored must be what was meant.
func CheckText(field, s string, limit int) error {
	if len(s) > limit {
		return Refusef(ReasonInvalidArgument, "shorten it",
			"%s is %d bytes long; at most %d are taken", field, len(s), limit)
	}
	if needsCleaning(s) {
		return Refusef(ReasonInvalidArgument, "send plain text",
			"%s has control, bidirectional or invisible characters, or is not UTF-8", field)
	}
	return nil
}
