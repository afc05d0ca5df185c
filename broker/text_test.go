package broker

import (
	"errors"
	"regexp"
	"strings"
	"testing"
	"time"
)

func TestOneLine(t *testing.T) {
	for in, want := range map[string]string{
		"":           "",
		"one":        "one",
		"a\nb\n":     "a; b",
		"\n\na\n\nb": "a; b",
		"a\x1b[2J":   "a\ufffd[2J",
		"a\r\nb":     "a\ufffd; b",
		errors.Join(errors.New("first"), errors.New("second")).Error(): "first; second",
	} {
		if got := OneLine(in); got != want {
			t.Errorf("OneLine(%q) = %q; want %q", in, got, want)
		}
	}
}

func TestSpan(t *testing.T) {
	for want, d := range map[string]time.Duration{
		"0s": 0, "10s": 10 * time.Second, "10m": 10 * time.Minute, "1h": time.Hour, "20h": 20 * time.Hour,
		"1h5m": 65 * time.Minute, "1h0m1s": time.Hour + time.Second, "1m30s": 90 * time.Second, "-5m": -5 * time.Minute, "1h10m": 70 * time.Minute,
	} {
		got := Span(d)
		if got != want {
			t.Errorf("Span(%s) = %q; want %q", d, got, want)
		}
		if back, err := time.ParseDuration(got); err != nil || back != d {
			t.Errorf("%q is read as %s, %v", got, back, err)
		}
	}
}

// TestParameterRefusals: what is wrong with a parameter is said with what would
// be right.
func TestParameterRefusals(t *testing.T) {
	one, ten := int64(1), int64(10)
	tool := Tool{Name: "crm.read", Params: []Param{
		{Name: "customer", Type: ParamString, Pattern: regexp.MustCompile(`^(?:c-[0-9]+)$`)},
		{Name: "both", Type: ParamInteger, Min: &one, Max: &ten, Optional: true},
		{Name: "least", Type: ParamInteger, Min: &one, Optional: true},
		{Name: "most", Type: ParamInteger, Max: &ten, Optional: true},
	}}
	for _, c := range []struct{ name, value, want string }{
		{"customer", "17", `is "17", which does not match the pattern c-[0-9]+`},
		{"both", "11", "is 11; it must be from 1 to 10"},
		{"least", "0", "is 0; it must be 1 or more"},
		{"most", "11", "is 11; it must be 10 or less"},
		{"custmer", "c-17", `has no parameter "custmer"; did you mean "customer"?`},
		{"x", "c-17", `has no parameter "x"; the parameters are customer, both, least, most`},
	} {
		params := map[string]string{"customer": "c-17"}
		params[c.name] = c.value
		var refusal *Error
		if err := tool.CheckParams(params); !errors.As(err, &refusal) || refusal.Reason != ReasonParameter ||
			!strings.HasSuffix(refusal.Message, c.want) || !strings.Contains(refusal.Next, "mayfly tools") {
			t.Errorf("%s=%s: %v; want %q", c.name, c.value, err, c.want)
		}
	}
}
