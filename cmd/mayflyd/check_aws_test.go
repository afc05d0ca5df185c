package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// checkCatalog runs `mayflyd check` on an example of a catalog with one text
// replaced by another, and also tells in which line that stands.
func checkCatalog(t *testing.T, example, old, with string) (string, int, error) {
	t.Helper()
	text, err := os.ReadFile("../../deploy/examples/catalog/" + example)
	if err != nil {
		t.Fatal(err)
	}
	if old != "" && strings.Count(string(text), old) != 1 {
		t.Fatalf("%q stands %d times in the example", old, strings.Count(string(text), old))
	}
	line := 1 + strings.Count(strings.SplitN(string(text), old, 2)[0], "\n")
	dir := t.TempDir()
	for name, content := range map[string]string{
		"catalog.yaml": strings.Replace(string(text), old, with, 1),
		"mayflyd.yaml": "store: mayfly.db\ncatalog: [catalog.yaml]\nlisten: 127.0.0.1:0\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	var out bytes.Buffer
	root := rootCommand()
	root.SetArgs([]string{"check", "--config", filepath.Join(dir, "mayflyd.yaml")})
	root.SetOut(&out)
	root.SetErr(&out)
	err = root.ExecuteContext(t.Context())
	return out.String(), line, err
}

// TestCheckExamples: every catalog of the examples is good.
func TestCheckExamples(t *testing.T) {
	catalogs, err := filepath.Glob("../../deploy/examples/catalog/*.yaml")
	if err != nil || len(catalogs) < 4 {
		t.Fatalf("%q, %v", catalogs, err)
	}
	for _, catalog := range catalogs {
		catalog, err := filepath.Abs(catalog)
		if err != nil {
			t.Fatal(err)
		}
		config := filepath.Join(t.TempDir(), "mayflyd.yaml")
		if err := os.WriteFile(config, fmt.Appendf(nil, "store: mayfly.db\ncatalog: [%q]\nlisten: 127.0.0.1:0\n", catalog), 0o600); err != nil {
			t.Fatal(err)
		}
		var out bytes.Buffer
		root := rootCommand()
		root.SetArgs([]string{"check", "--config", config})
		root.SetOut(&out)
		root.SetErr(&out)
		if err := root.ExecuteContext(t.Context()); err != nil || !strings.Contains(out.String(), " is good: ") {
			t.Errorf("%s: %v\n%s", catalog, err, out.String())
		}
	}
}

// TestCheckAWS: the example is good, and the check says what its tool can do in
// the end.
func TestCheckAWS(t *testing.T) {
	out, _, err := checkCatalog(t, "aws.yaml", "", "")
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, want := range []string{"tool crm.export: statement 0: may s3:GetObject on arn:aws:s3:::acme-crm/${params.customer}/*", "session by its ARN", "survives a revocation"} {
		if !strings.Contains(out, want) {
			t.Errorf("it does not say %q:\n%s", want, out)
		}
	}
	out, _, err = checkCatalog(t, "aws.yaml", "Action: s3:GetObject", `Action: ["s3:*"]`)
	if err != nil || !strings.Contains(out, "wildcard s3:*") || !strings.Contains(out, "s3:putbucketpolicy") {
		t.Errorf("%v\n%s", err, out)
	}
}

// TestCheckAWSLimits: what can be known of AWS's limits without asking is told
// with file and line, before anything is made.
func TestCheckAWSLimits(t *testing.T) {
	for _, test := range []struct{ old, with, says string }{
		{"max_ttl: 30m", "max_ttl: 90m", "role chaining"},
		{"arn:aws:iam::123456789012:role/mayfly/crm", "arn:aws-cn:iam::123456789012:role/mayfly/crm", "partition aws-cn"},
		{`pattern: "[a-z0-9-]{1,40}"`, `pattern: ".{1,300}"`, "AWS takes 2048"},
		{`pattern: "[a-z0-9-]{1,40}"`, `pattern: "[a-z0-9-]*"`, "may be empty"},
		{"Action: s3:GetObject", "Action: sts:AssumeRole", "a name of its own"},
		{"Action: s3:GetObject", "Action: iam:PassRole", "actions of IAM"},
		{"Action: s3:GetObject", "NotAction: s3:GetObject", "gives everything"},
		{"role/mayfly/crm", "role/crm", "below /mayfly/"},
		{"role: arn:aws:iam::123456789012", "role: arn:aws:iam::210987654321", "of account 210987654321"},
		{"method: web_identity", "method: static", "it must be web_identity"},
		{"role_arn: arn:aws:iam::123456789012", "role_arn: arn:aws:iam::210987654321", "IAM writes policies of its caller's own account alone"},
		{"mode: deny_list", "mode: hope", "say what is to happen"},
		{"Resource: arn:aws:s3:::acme-crm/${params.customer}/*", "Resource: " + fmt.Sprintf("arn:aws:s3:::%01999d", 0), "AWS takes 2048"},
	} {
		out, line, err := checkCatalog(t, "aws.yaml", test.old, test.with)
		if err == nil {
			t.Errorf("%s: it is good", test.with)
			continue
		}
		text := err.Error() + out
		if !strings.Contains(text, test.says) {
			t.Errorf("%s: it does not say %q:\n%s", test.with, test.says, text)
		}
		got := regexp.MustCompile(`catalog\.yaml:(\d+)`).FindStringSubmatch(text)
		if got == nil {
			t.Errorf("%s: it names no line:\n%s", test.with, text)
			continue
		}
		if at, _ := strconv.Atoi(got[1]); at < line-4 || at > line+6 { // at what is wrong, or at what it is wrong for
			t.Errorf("%s, at line %d, is told of at line %d:\n%s", test.with, line, at, text)
		}
	}
}
