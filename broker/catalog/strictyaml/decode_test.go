package strictyaml_test

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/broker/catalog/strictyaml"
)

type config struct {
	Number int               `yaml:"number"`
	Small  int8              `yaml:"small"`
	On     bool              `yaml:"on"`
	Text   string            `yaml:"text"`
	Labels map[string]string `yaml:"labels"`
	Tools  []tool            `yaml:"tools"`
	Domain spiffeid.ID       `yaml:"id"`
	Hidden string            // no tag: not to be read
}

type tool struct {
	Name   string           `yaml:"name"`
	MaxTTL time.Duration    `yaml:"max_ttl"`
	Min    *int64           `yaml:"min"`
	Params map[string]param `yaml:"params"`
	Scope  json.RawMessage  `yaml:"scope"`
}

type param struct {
	Pattern string `yaml:"pattern"`
}

const sample = `# a comment
number: 3
on: true
text: "12"
labels: {a: "1", b.c: two}
id: spiffe://acme.test/agent/support
tools:
  - name: x
    max_ttl: 15m
    min: -4
    params:
      customer.id: {pattern: "c-[0-9]+"}
    scope:
      b: [1, 2.50, true, null, <text>]
      a: {c: d}
  - name: | # kept as it is
      two
      lines
    scope:
`

func TestDecode(t *testing.T) {
	var got config
	if _, err := strictyaml.Decode("f.yaml", []byte(sample), &got); err != nil {
		t.Fatal(err)
	}
	four := int64(-4)
	want := config{
		Number: 3, On: true, Text: "12", Labels: map[string]string{"a": "1", "b.c": "two"},
		Domain: spiffeid.RequireFromString("spiffe://acme.test/agent/support"),
		Tools: []tool{
			{Name: "x", MaxTTL: 15 * time.Minute, Min: &four, Params: map[string]param{"customer.id": {"c-[0-9]+"}},
				Scope: json.RawMessage(`{"a":{"c":"d"},"b":[1,2.5,true,null,"<text>"]}`)},
			{Name: "two\nlines\n", Scope: json.RawMessage("null")},
		},
	}
	if d := cmp.Diff(want, got, cmp.Comparer(func(a, b spiffeid.ID) bool { return a == b })); d != "" {
		t.Error(d)
	}
}

func TestAt(t *testing.T) {
	var c config
	doc, err := strictyaml.Decode("f.yaml", []byte(sample), &c)
	if err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		"":                                    "f.yaml:1:1",
		"number":                              "f.yaml:2:1",
		"labels.b.c":                          "f.yaml:5:18", // the key has a dot
		"tools":                               "f.yaml:7:1",
		"tools[0]":                            "f.yaml:8:5",
		"tools[0].max_ttl":                    "f.yaml:9:5",
		"tools[0].params.customer.id.pattern": "f.yaml:12:21",
		"tools[0].scope.b[4]":                 "f.yaml:14:32",
		"tools[0].scope.b[9]":                 "f.yaml:14:7",
		"tools[0].scope.a.c":                  "f.yaml:15:11",
		"tools[0].scope.c":                    "f.yaml:15:11", // below: a driver's path may be short
		"tools.max_ttl":                       "f.yaml:9:5",   // the index left away
		"tools[0].pattern":                    "f.yaml:8:5",   // missing here; not that of a parameter
		"tools[1].max_ttl":                    "f.yaml:16:5",
		"tools[7].name":                       "f.yaml:7:1",
		"nothing.here":                        "f.yaml:1:1",
	} {
		if got := doc.At(path).String(); got != want {
			t.Errorf("%q is at %s, want %s", path, got, want)
		}
	}
	if got := doc.Errorf("tools[0].max_ttl", "%d is too much", 3).Error(); got != "f.yaml:9:5: 3 is too much" {
		t.Error(got)
	}
}

// TestRefusals is what people read: the whole message each time.
func TestRefusals(t *testing.T) {
	for name, c := range map[string]struct{ in, want string }{
		"misspelt":           {"tools:\n  - name: x\n    max_tll: 15m\n", `3:5: unknown key "max_tll" in tool; did you mean "max_ttl"?`},
		"exchanged letters":  {"txet: a\n", `1:1: unknown key "txet"; did you mean "text"?`},
		"case":               {"Number: 1\n", `1:1: unknown key "Number"; did you mean "number"?`},
		"far from any":       {"tools:\n- zzzz: 1\n", `2:3: unknown key "zzzz" in tool; the keys are name, max_ttl, min, params, scope`},
		"untagged field":     {"Hidden: a\n", `1:1: unknown key "Hidden"; the keys are number, small, on, text, labels, tools, id`},
		"twice":              {"on: true\nnumber: 1\n\"on\": false\n", `3:1: key "on" is here a second time; the first is on line 1`},
		"twice in flow":      {"labels: {a: x, a: y}\n", `1:16: key "a" is here a second time; the first is on line 1`},
		"twice in free form": {"tools:\n- scope:\n    a: {b: 1, b: 2}\n", `3:15: key "b" is here a second time; the first is on line 3`},
		"case alone":         {"tools:\n- scope:\n    audience: a\n    Audience: b\n", `4:5: key "Audience" differs from "audience" on line 3 in case alone`},
		"text for number":    {"number: \"3\"\n", "1:1: text stands where a number belongs"},
		"fraction":           {"number: 3.5\n", "1:1: a number with a fraction stands where a number belongs"},
		"number for text":    {"labels: {a: 1}\n", "1:10: a number stands where text belongs; put it in quotes"},
		"bool for text":      {"text: true\n", "1:1: true or false stands where text belongs; put it in quotes"},
		"yes is text":        {"on: yes\n", "1:1: text stands where true or false belongs"},
		"list for mapping":   {"labels: [a]\n", "1:1: a list stands where a mapping belongs"},
		"mapping for list":   {"tools: {a: b}\n", "1:1: a mapping stands where a list belongs"},
		"list for struct":    {"- a\n", "1:1: a list stands where a mapping belongs"},
		"empty item":         {"tools:\n-\n", "2:3: this item of the list is empty"},
		"empty value":        {"labels: {a: }\n", `1:10: "a" has no value`},
		"too large":          {"small: 128\n", "1:1: 128 is too large"},
		"octal":              {"number: 010\n", `1:1: "010" is no plain decimal number: write it without sign, leading zeros and underscores, or quote it if it is text`},
		"hexadecimal":        {"number: 0x10\n", `1:1: "0x10" is no plain decimal number: write it without sign, leading zeros and underscores, or quote it if it is text`},
		"underscores":        {"tools:\n- scope: [1_000]\n", `2:11: "1_000" is no plain decimal number: write it without sign, leading zeros and underscores, or quote it if it is text`},
		"zeros and an eight": {"text: 0800\n", `1:1: "0800" is a number to some readers and text to others: write it plainly, or quote it if it is text`},
		"exponent":           {"text: 1e3\n", `1:1: "1e3" is a number to some readers and text to others: write it plainly, or quote it if it is text`},
		"many digits":        {"text: 99999999999999999999\n", `1:1: "99999999999999999999" is a number to some readers and text to others: write it plainly, or quote it if it is text`},
		"not a number":       {"tools:\n- scope: .nan\n", "2:3: this kind of YAML value is not taken; quote it if it is text"},
		"no duration":        {"tools:\n- max_ttl: 15 minutes\n", `2:3: "15 minutes" is no duration such as "90s", "15m" or "1h30m"`},
		"bare duration":      {"tools:\n- max_ttl: 15\n", `2:3: a number stands where a duration such as "90s" or "15m" belongs`},
		"unmarshaller":       {"id: acme\n", `1:1: "acme": scheme is missing or invalid`},
		"two documents":      {"on: true\n---\non: false\n", "2:1: a second document begins here; one file is one document"},
		"second empty":       {"on: true\n---\n", "2:1: a second document begins here; one file is one document"},
		"after the end":      {"on: true\n...\non: false\n", "3:1: the document has ended, and there is more after it"},
		"anchor":             {"labels: &x {a: b}\n", "1:9: anchors, aliases and merge keys are not taken: write it out, or quote the text if it is text"},
		"alias":              {"text: *x\n", "1:7: anchors, aliases and merge keys are not taken: write it out, or quote the text if it is text"},
		"merge":              {"labels:\n  <<: {a: b}\n", "2:3: anchors, aliases and merge keys are not taken: write it out, or quote the text if it is text"},
		"tag":                {"number: !!int \"3\"\n", "1:9: tags are not taken: leave it away, or quote the text if it is text"},
		"tag at the end":     {"text: !x", "1:7: tags are not taken: leave it away, or quote the text if it is text"},
		"directive":          {"%YAML 1.1\n---\non: true\n", "1:1: directives are not taken: leave it away, or quote the text if it is text"},
		"text on two lines":  {"text: one\n  two\n", "1:7: text over several lines must be in quotes, or a block that begins with | or >"},
		"question mark":      {"? on\n: true\n", `1:1: "?" keys are not taken: write "key: value"`},
		"number as key":      {"labels: {1: a}\n", "1:10: a key must be text; quote it"},
		"null as key":        {"labels: {null: a}\n", "1:10: a key must be text; quote it"},
		"empty":              {"", "1:1: there is nothing in the file"},
		"comments alone":     {"# a\n---\n# b\n", "1:1: there is nothing in the file"},
		"unclosed":           {"tools: [\n", "1:8: sequence end token ']' not found"},
		"dash in brackets":   {"tools: [- name: x]\n", `1:9: "- " cannot stand within brackets; separate the items with commas`},
		"closed twice":       {"tools: []]\n", "1:10: ] closes nothing that is open here"},
		"tab":                {"labels:\n\ta: b\n", "2:1: found character '\t' that cannot start any token"},
		"too deep":           {"tools:\n- scope: " + strings.Repeat("[", 40) + "\n", "2:39: this is more than 32 levels deep"},
		"too many bytes":     {strings.Repeat("#", strictyaml.MaxSize+1), "1:1: the file is larger than 1 MiB"},
		"not UTF-8":          {"text: a\n# \xff\n", "2:3: the byte 0xff is not UTF-8"},
		"escape":             {"text: \x1b[31m\n", "1:7: the character U+001B cannot be seen; write it as an escape within double quotes"},
		"bidi in a comment":  {"text: a # \u202e\n", "1:11: the character U+202E cannot be seen; write it as an escape within double quotes"},
		"escape in a key":    {"\"a\\x1b[31m\": 1\n", `1:1: unknown key "a\x1b[31m"; the keys are number, small, on, text, labels, tools, id`},
	} {
		t.Run(name, func(t *testing.T) {
			var got config
			doc, err := strictyaml.Decode("f.yaml", []byte(c.in), &got)
			var errs strictyaml.Errors
			if !errors.As(err, &errs) || len(errs) != 1 || doc != nil {
				t.Fatalf("%v, want one error and no document", err)
			}
			want := "f.yaml:" + strings.ReplaceAll(c.want, "\t", "\ufffd")
			if err.Error() != want {
				t.Errorf("\ngot  %v\nwant %s", err, want)
			}
		})
	}
}

func TestAllErrorsAtOnce(t *testing.T) {
	var got config
	_, err := strictyaml.Decode("f.yaml", []byte("tools: 4\nnumer: 1\non: maybe\nlabels: {b: 1, a: 2}\n"), &got)
	want := `f.yaml:1:1: a number stands where a list belongs
f.yaml:2:1: unknown key "numer"; did you mean "number"?
f.yaml:3:1: text stands where true or false belongs
f.yaml:4:10: a number stands where text belongs; put it in quotes
f.yaml:4:16: a number stands where text belongs; put it in quotes`
	if err == nil || err.Error() != want {
		t.Errorf("\ngot\n%v\nwant\n%s", err, want)
	}
	var one *strictyaml.Error
	if !errors.As(err, &one) || one.Line != 1 {
		t.Errorf("errors.As finds %v", one)
	}
	_, err = strictyaml.Decode("f.yaml", []byte(strings.Repeat("a: 1\n", 90)), &got)
	if err == nil || strings.Count(err.Error(), "\n") != 50 || !strings.HasSuffix(err.Error(), "\nand 39 more") {
		t.Errorf("a long report: %v", err)
	}
}

func TestErrorsSort(t *testing.T) {
	at := func(file string, line, column int) *strictyaml.Error {
		return &strictyaml.Error{Position: strictyaml.Position{File: file, Line: line, Column: column}, Message: "x"}
	}
	e := strictyaml.Errors{at("z", 2, 1), at("a", 1, 1), at("z", 1, 9), at("z", 1, 2)}
	e.Sort()
	if got := e.Error(); got != "z:1:2: x\nz:1:9: x\nz:2:1: x\na:1:1: x" {
		t.Error(got)
	}
}

// TestCanonical: what means the same is the same bytes.
func TestCanonical(t *testing.T) {
	free := func(scope string) string {
		var c config
		if _, err := strictyaml.Decode("f.yaml", []byte("tools:\n- scope:"+scope), &c); err != nil {
			t.Fatal(err)
		}
		return string(c.Tools[0].Scope)
	}
	for _, each := range []string{
		" {a: 1.50, b: [x, \"y\"]}\n",
		" {b: ['x', y], \"a\": 1.5}\n",
		"\n    b:\n    # why\n    - x\n    - \"\\x79\"\n    a: 1.5\n",
	} {
		if got := free(each); got != `{"a":1.5,"b":["x","y"]}` {
			t.Errorf("%q is %s", each, got)
		}
	}
	if got := free(" \"\\u2028<&>\\0\\\"\"\n"); got != `"\u2028<&>\u0000\""` {
		t.Errorf("odd text is %s", got)
	}
	for _, plain := range []string{"15m", "10.0.0.1", "2026-01-01", "c-[0-9]{1,8}", "1.2.3", "no", "inf", "a:b"} {
		if got := free(" " + plain + "\n"); got != `"`+plain+`"` {
			t.Errorf("%s is %s", plain, got)
		}
	}
	if got := free(" 18446744073709551615\n"); got != "18446744073709551615" {
		t.Errorf("a large number is %s", got)
	}
}

func TestReadFile(t *testing.T) {
	var c config
	dir := t.TempDir()
	name := filepath.Join(dir, "c.yaml")
	if err := os.WriteFile(name, []byte("number: x\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := strictyaml.ReadFile(name, &c); err == nil || err.Error() != name+":1:1: text stands where a number belongs" {
		t.Errorf("a bad file: %v", err)
	}
	if _, err := strictyaml.ReadFile(filepath.Join(dir, "none"), &c); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
	if _, err := strictyaml.ReadFile(dir, &c); err == nil || !strings.Contains(err.Error(), "no regular file") {
		t.Errorf("a directory: %v", err)
	}
	if err := os.WriteFile(name, make([]byte, strictyaml.MaxSize+2), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := strictyaml.ReadFile(name, &c); err == nil || !strings.Contains(err.Error(), "larger than") {
		t.Errorf("a large file: %v", err)
	}
}
