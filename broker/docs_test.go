package broker_test

import (
	"io/fs"
	"net/url"
	"os"
	"path"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode"
)

var (
	testName = regexp.MustCompile(`\b(?:Test|Fuzz|Benchmark)[A-Z]\w*`)
	script   = regexp.MustCompile(`\bTestScripts/(\w+)`)
	testFunc = regexp.MustCompile(`(?m)^func (?:\(\w+ \*?\w+\) )?((?:Test|Fuzz|Benchmark)[A-Z]\w*)\(`)
	link     = regexp.MustCompile(`\]\(([^)\s]+)\)`)
	heading  = regexp.MustCompile(`(?m)^(#+) +(.+)$`)
	entry    = regexp.MustCompile(`^- \[(.+)\]\(#(.+)\)$`)
	fenced   = regexp.MustCompile("(?ms)^```.*?^```$")
)

// textsOf are the tree's files by their paths, for the ends of their names.
func textsOf(t *testing.T, ends ...string) map[string]string {
	t.Helper()
	tree, texts := os.DirFS(".."), map[string]string{}
	err := fs.WalkDir(tree, ".", func(name string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && (name == "bin" || d.Name() == "node_modules" || len(name) > 1 && d.Name()[0] == '.'):
			return fs.SkipDir
		case d.IsDir() || !slices.ContainsFunc(ends, func(end string) bool { return strings.HasSuffix(name, end) }):
			return nil
		}
		text, err := fs.ReadFile(tree, name)
		texts[name] = string(text)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return texts
}

// TestDocsNameTests: a test that a page names as what holds a claim is there.
func TestDocsNameTests(t *testing.T) {
	there, scripts, named := map[string]bool{}, map[string]bool{}, 0
	for name, text := range textsOf(t, ".go", ".txtar") {
		scripts[strings.TrimSuffix(path.Base(name), ".txtar")] = strings.HasSuffix(name, ".txtar")
		for _, m := range testFunc.FindAllStringSubmatch(text, -1) {
			there[m[1]] = true
		}
	}
	for page, text := range textsOf(t, ".md") {
		for _, name := range testName.FindAllString(text, -1) {
			named++
			if !there[name] {
				t.Errorf("%s names %s, and there is no such test", page, name)
			}
		}
		for _, m := range script.FindAllStringSubmatch(text, -1) {
			if !scripts[m[1]] {
				t.Errorf("%s names the script %s, and there is none", page, m[1])
			}
		}
	}
	if named < 100 {
		t.Errorf("only %d names were found in the pages", named)
	}
}

// TestDocsLinks: what a page links to is there, to the heading; and a table of
// contents has the page's headings, in their order.
func TestDocsLinks(t *testing.T) {
	pages, links := textsOf(t, ".md"), 0
	for page, text := range pages {
		text = fenced.ReplaceAllString(text, "")
		for _, m := range link.FindAllStringSubmatch(text, -1) {
			to, err := url.Parse(m[1])
			if err != nil || to.Scheme != "" {
				continue
			}
			links++
			file := path.Join(path.Dir(page), to.Path)
			if to.Path == "" {
				file = page
			}
			if _, err := fs.Stat(os.DirFS(".."), file); err != nil {
				t.Errorf("%s links to %s: %v", page, m[1], err)
			} else if to.Fragment != "" && !slices.Contains(anchors(pages[file]), to.Fragment) {
				t.Errorf("%s links to %s, and there is no such heading", page, m[1])
			}
		}
		var contents, sections []string
		for line := range strings.SplitSeq(text, "\n") {
			if m := heading.FindStringSubmatch(line); m != nil && m[1] == "##" {
				sections = append(sections, m[2])
			} else if m := entry.FindStringSubmatch(line); m != nil && len(sections) == 0 {
				contents = append(contents, m[1])
			}
		}
		if contents != nil && !slices.Equal(contents, sections) {
			t.Errorf("%s: the table of contents has %q, and the page %q", page, contents, sections)
		}
	}
	if links < 100 {
		t.Errorf("only %d links were found in the pages", links)
	}
}

// anchors are how a page's headings are linked to, as GitHub makes them.
func anchors(text string) (all []string) {
	for _, m := range heading.FindAllStringSubmatch(fenced.ReplaceAllString(text, ""), -1) {
		all = append(all, strings.Map(func(r rune) rune {
			switch {
			case r == ' ':
				return '-'
			case r == '-' || r == '_' || unicode.IsLetter(r) || unicode.IsDigit(r):
				return unicode.ToLower(r)
			}
			return -1
		}, m[2]))
	}
	return all
}
