package main

import (
	"os/exec"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/mayfly-security/mayfly/broker/client"
)

// A real shell evaluates the lines and prints what it set, byte for byte.
func shellHolds(t interface {
	Helper()
	Fatalf(string, ...any)
}, values map[string]string) {
	t.Helper()
	var vars []client.Variable
	var script strings.Builder
	var want strings.Builder
	for name, value := range values {
		vars = append(vars, client.Variable{Name: name, Value: value})
		script.WriteString(`printf '%s.' "$` + name + "\"\n")
		want.WriteString(value + ".")
	}
	out, err := exec.Command("sh", "-c", exports(vars)+script.String()).Output()
	if err != nil {
		t.Fatalf("sh: %v on %q", err, exports(vars))
	}
	if string(out) != want.String() {
		t.Fatalf("the shell holds %q, want %q", out, want.String())
	}
}

func TestShellHoldsWhatWasQuoted(t *testing.T) {
	for _, value := range []string{
		"", "plain", "'", "''", `'\''`, "a'b", `\`, `\'`, "$(touch /tmp/x)", "`id`", "${HOME}", "!!", "a\nb\n", "\n",
		"; rm -rf /", "' ; echo injected ; '", "*", "~", "a  b", "\t", "#c", "\x1b[31m", "\u202e", "日本", "\xff\xfe", "-n", "%s%n",
	} {
		shellHolds(t, map[string]string{"MAYFLY_TEST_VALUE": value})
	}
	rapid.Check(t, func(t *rapid.T) {
		piece := rapid.OneOf(rapid.String(), rapid.SampledFrom([]string{"'", `\`, "$", "`", "\n", `"`, ";", "!", "\\'", "'\"'"}))
		value := strings.ReplaceAll(strings.Join(rapid.SliceOf(piece).Draw(t, "value"), ""), "\x00", "")
		shellHolds(t, map[string]string{"MAYFLY_TEST_VALUE": value})
	})
}

// FuzzQuote is the same, for as long as one likes.
func FuzzQuote(f *testing.F) {
	f.Add("it's")
	f.Fuzz(func(t *testing.T, value string) {
		if strings.Contains(value, "\x00") {
			return // no environment can hold it, and Credential.Variables refuses it
		}
		shellHolds(t, map[string]string{"MAYFLY_TEST_VALUE": value})
	})
}
