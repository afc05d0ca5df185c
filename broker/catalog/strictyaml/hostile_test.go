package strictyaml_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-security/mayfly/broker/catalog/strictyaml"
)

// TestHostileFiles: a large file costs a bounded time and stack, whatever its
// shape. A stack that is used up cannot be recovered from: it would take the
// broker down on a reload. The size is an eighth of what is taken: enough for
// what grows with the square, and short under the race detector.
func TestHostileFiles(t *testing.T) {
	const size = strictyaml.MaxSize / 8
	fill := func(unit string) string { return strings.Repeat(unit, size/len(unit)) }
	var keys, stairs strings.Builder
	for i := 0; keys.Len() < size; i++ {
		fmt.Fprintf(&keys, "k%d: 1\n", i)
	}
	for i := 0; stairs.Len() < size; i++ {
		stairs.WriteString(strings.Repeat(" ", i) + "a:\n")
	}
	for name, in := range map[string]string{
		"flow lists":         fill("["),
		"flow mappings":      fill("{a: "),
		"flow pairs":         "{" + fill("a: "),
		"pairs in a list":    "[" + fill("a: "),
		"dashes in flow":     "[" + fill("- "),
		"lines in flow":      "[" + fill("\n- a:\n"),
		"flow after keys":    fill("a: [] b: "),
		"flow on stairs":     strings.ReplaceAll(stairs.String(), "a:", "a: ["),
		"lists at one place": fill("a:\n- b:\n"),
		"mixed flow":         fill("[{a: "),
		"lists on one line":  fill("- "),
		"lists and mappings": fill("- a: "),
		"question marks":     fill("? "),
		"keys on one line":   fill("a: "),
		"stairs":             stairs.String(),
		"one key for ever":   fill("a:\n"),
		"many keys":          keys.String(),
		"many flow keys":     "{" + strings.ReplaceAll(keys.String(), "\n", ","),
		"anchors":            fill("&a "),
		"tags":               fill("!a "),
		"closings":           fill("]"),
		"colons":             fill(":\n"),
		"documents":          fill("---\n"),
		"quotes":             fill("'a' "),
		"unclosed quote":     "\"" + fill("a\n"),
		"escapes":            "\"" + fill("\\"),
		"block text":         "a: |\n" + fill(" x\n"),
		"comments":           fill("#\n"),
		"spaces":             fill(" "),
		"lines":              fill("\n"),
	} {
		t.Run(name, func(t *testing.T) {
			var c config
			began := time.Now()
			if _, err := strictyaml.Decode("f.yaml", []byte(in), &c); err == nil {
				t.Error("it was read")
			}
			if took := time.Since(began); took > 10*time.Second {
				t.Errorf("it took %s", took)
			}
		})
	}
}

// TestLimits: what is just within them is read.
func TestLimits(t *testing.T) {
	var wide strings.Builder
	wide.WriteString("labels:\n")
	for i := range strictyaml.MaxKeys {
		fmt.Fprintf(&wide, "  k%d: x\n", i)
	}
	deep := "tools:\n- scope: " + strings.Repeat("[", strictyaml.MaxDepth-3) + strings.Repeat("]", strictyaml.MaxDepth-3) + "\n"
	many := "tools:\n" + strings.Repeat("- name: x\n  max_ttl: 15m\n  scope: {a: [1, 2]}\n", 5000)
	for _, in := range []string{wide.String(), deep, many} {
		var c config
		if _, err := strictyaml.Decode("f.yaml", []byte(in), &c); err != nil {
			t.Error(err)
		}
	}
	var c config
	wide.WriteString("  one: more\n")
	if _, err := strictyaml.Decode("f.yaml", []byte(wide.String()), &c); err == nil || !strings.Contains(err.Error(), "f.yaml:1002:6: this mapping has more than 1000 keys") {
		t.Errorf("one key more: %v", err)
	}
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte(sample))
	for _, in := range []string{
		"a: &x [*x]\n", "on: true\n---\n", "? a\n: b\n", "tools: [{name: x}, ]\n", "tools:\n- scope: {a: [1.5, 'b''c', \"\\u0041\"]}\n",
		"a: >-\n  b\n c: d\n", "{a: , b}\n", "- - - x\n", "%YAML 1.2\n---\n", "a: |2\n   b\n", "a: 'x\n", "tools:\n - name: \n", "\ufeffon: true\r\n",
	} {
		f.Add([]byte(in))
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		var c config
		doc, err := strictyaml.Decode("f.yaml", in, &c)
		if (doc == nil) == (err == nil) {
			t.Fatalf("document %v and error %v", doc, err)
		}
		lines := 1 + strings.Count(string(in), "\n")
		var errs strictyaml.Errors
		if err != nil && !errors.As(err, &errs) {
			t.Fatalf("%v is no Errors", err)
		}
		for _, e := range errs {
			if e.Line < 1 || e.Line > lines || e.Column < 1 {
				t.Errorf("%v is outside the file of %d lines", e, lines)
			}
			if strings.ContainsAny(e.Message, "\x1b\n\u202e") {
				t.Errorf("%q would not be one harmless line", e.Message)
			}
		}
		if err != nil {
			return
		}
		for i, tool := range c.Tools {
			if len(tool.Scope) > 0 && !json.Valid(tool.Scope) {
				t.Errorf("%s is no JSON", tool.Scope)
			}
			if at := doc.At(fmt.Sprintf("tools[%d].max_ttl", i)); at.Line < 1 || at.Line > lines {
				t.Errorf("a tool is at %v in a file of %d lines", at, lines)
			}
		}
	})
}
