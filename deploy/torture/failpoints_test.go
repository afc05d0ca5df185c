//go:build unix

package main

import (
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// TestFailpoints: the points that are drawn from are those that are there, and
// docs/torture.md names each.
func TestFailpoints(t *testing.T) {
	there := map[string]bool{}
	at := regexp.MustCompile(`failpoint\.At\("([a-z.]+)"\)`)
	for _, dir := range []string{"broker/lease", "providers/vault"} {
		files, err := filepath.Glob(filepath.Join("../..", dir, "*.go"))
		if err != nil || len(files) == 0 {
			t.Fatalf("%s has no files: %v", dir, err)
		}
		for _, f := range files {
			b, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			for _, m := range at.FindAllStringSubmatch(string(b), -1) {
				there[m[1]] = true
			}
		}
	}
	named := slices.Sorted(slices.Values(failpoints))
	if found := slices.Sorted(maps.Keys(there)); !slices.Equal(found, named) {
		t.Errorf("the code has the points %v, and these are drawn from: %v", found, named)
	}
	doc, err := os.ReadFile("../../docs/torture.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range named {
		last := name[strings.LastIndexByte(name, '.'):]
		if !strings.Contains(string(doc), "`"+name+"`") && !strings.Contains(string(doc), "`"+last+"`") {
			t.Errorf("docs/torture.md does not name %s", name)
		}
	}
}
