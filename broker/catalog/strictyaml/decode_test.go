package strictyaml_test

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/mayfly-security/mayfly/broker/catalog/strictyaml"
)

type inner struct {
	Name string          `yaml:"name"`
	TTL  time.Duration   `yaml:"max_ttl"`
	Min  *int64          `yaml:"min"`
	Free json.RawMessage `yaml:"scope"`
}

type outer struct {
	On     bool              `yaml:"on"`
	Number int               `yaml:"number"`
	Labels map[string]string `yaml:"labels"`
	Tools  []inner           `yaml:"tools"`
}

func TestDecode(t *testing.T) {
	var got outer
	doc, err := strictyaml.Decode("f.yaml", []byte(`
# a comment
on: true
number: 3
labels: {a: "1", b: two}
tools:
  - name: x
    max_ttl: 15m
    min: -4
    scope:
      b: [1, 2.5, true, null, text]
      a: {c: d}
  - name: |
      lines
`), &got)
	if err != nil {
		t.Fatal(err)
	}
	four := int64(-4)
	want := outer{On: true, Number: 3, Labels: map[string]string{"a": "1", "b": "two"}, Tools: []inner{
		{Name: "x", TTL: 15 * time.Minute, Min: &four, Free: json.RawMessage(`{"a":{"c":"d"},"b":[1,2.5,true,null,"text"]}`)},
		{Name: "lines\n"},
	}}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	if p := doc.At("tools[0].scope.a.c"); p.Line != 12 {
		t.Errorf("tools[0].scope.a.c is at %v; want line 12", p)
	}
	if p := doc.At("tools[0].nothing.here"); p.Line != 7 {
		t.Errorf("what is missing in tools[0] is at %v; want line 7", p)
	}
}

func TestRefusals(t *testing.T) {
	for name, c := range map[string]struct{ in, want string }{
		"misspelt":        {"tools:\n  - name: x\n    max_tll: 15m\n", `f.yaml:3:5: unknown key "max_tll"; did you mean "max_ttl"?`},
		"far from any":    {"zzzzzz: 1\n", `f.yaml:1:1: unknown key "zzzzzz"; there are labels, number, on, tools`},
		"twice":           {"on: true\nnumber: 1\non: false\n", "f.yaml:3:1:"},
		"text for number": {"number: \"3\"\n", "f.yaml:1:9: number is text where a whole number belongs"},
		"number for text": {"labels: {a: 1}\n", `f.yaml:1:13: labels.a is a number where text (put it in quotes) belongs`},
		"list for map":    {"labels: [a]\n", "f.yaml:1:9: labels is a list where a mapping (key: value) belongs"},
		"map for list":    {"tools: {a: b}\n", "tools is a mapping where a list belongs"},
		"no duration":     {"tools:\n- max_ttl: 15 minutes\n", `tools[0].max_ttl is "15 minutes", which is no duration; write one such as 90s, 15m or 1h`},
		"two documents":   {"on: true\n---\non: false\n", "there is a second document in the file"},
		"alias":           {"labels: &x {a: b}\n", "anchors, aliases and merge keys are not taken"},
		"merge":           {"labels:\n  <<: {a: b}\n", "f.yaml:2:3: anchors, aliases and merge keys"},
		"tag":             {"number: !!int \"3\"\n", "tags and directives are not taken"},
		"syntax":          {"on: [\n", "f.yaml:1:"},
		"deep flow":       {"tools: " + strings.Repeat("[", 100_000), "nested too deeply"},
		"deep block":      {deep(40), "nested more than 32 levels deep"},
		"too large":       {strings.Repeat("#", strictyaml.MaxSize+1), "at most 4194304 are read"},
		"control":         {"\"a\\x1b[31m\": 1\n", "unknown key"},
	} {
		t.Run(name, func(t *testing.T) {
			var got outer
			_, err := strictyaml.Decode("f.yaml", []byte(c.in), &got)
			var errs strictyaml.Errors
			if !errors.As(err, &errs) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got  %v\nwant %s", err, c.want)
			}
			if err != nil && strings.Contains(err.Error(), "\x1b") {
				t.Errorf("an escape reaches the terminal: %q", err)
			}
		})
	}
}

// deep is a block mapping within scope of that many levels.
func deep(levels int) string {
	var b strings.Builder
	b.WriteString("tools:\n- scope:\n")
	for i := range levels {
		b.WriteString(strings.Repeat(" ", 4+i) + "a:\n")
	}
	return b.String()
}

func TestAllErrorsAtOnce(t *testing.T) {
	var got outer
	_, err := strictyaml.Decode("f.yaml", []byte("numer: 1\non: yes please\ntools: 4\n"), &got)
	var errs strictyaml.Errors
	if !errors.As(err, &errs) || len(errs) != 3 || errs[0].Position.Line != 1 || errs[2].Position.Line != 3 {
		t.Errorf("got %v; want three errors in order", err)
	}
}

func TestNearest(t *testing.T) {
	among := []string{"max_ttl", "provider", "scope"}
	for word, want := range map[string]string{"max-ttl": "max_ttl", "providers": "provider", "scop": "scope", "description": "", "": ""} {
		if got := strictyaml.Nearest(word, among); got != want {
			t.Errorf("Nearest(%q) = %q; want %q", word, got, want)
		}
	}
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte("tools:\n  - name: x\n    max_ttl: 15m\n    scope: {a: [1]}\n"))
	f.Add([]byte("on: true\nlabels: {a: b}\n"))
	f.Add([]byte("a: &x [*x]\n"))
	f.Fuzz(func(t *testing.T, in []byte) {
		var got outer
		doc, err := strictyaml.Decode("f.yaml", in, &got)
		if doc == nil {
			t.Fatal("no document")
		}
		for _, tool := range got.Tools {
			if len(tool.Free) > 0 && !json.Valid(tool.Free) {
				t.Fatalf("free form %q is no JSON", tool.Free)
			}
		}
		_ = err // refusing is fine; a panic is not
	})
}
