package aws

import (
	"bytes"
	"context"
	"encoding/json"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// thumbprint is of no CA. The provider that is built here wants one; those that
// the template asks for can do without.
const thumbprint = "0123456789abcdef0123456789abcdef01234567"

// terraform is the real Terraform with the real AWS provider, in a folder that
// has the template as it is shipped.
type terraform struct {
	t           *testing.T
	binary, dir string
	env         []string
}

// newTerraform sets up Terraform against an IAM at url, with those secrets.
func newTerraform(t *testing.T, url string, g secrets) *terraform {
	t.Helper()
	bin, err := filepath.Abs("../../bin/testbed")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"terraform", "terraform-provider-aws"} {
		if _, err := os.Stat(filepath.Join(bin, name)); err != nil {
			t.Fatal("Terraform and its AWS provider are not built: run `make testbed-terraform`")
		}
	}
	dir := t.TempDir()
	template, err := os.ReadFile("main.tf")
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]string{
		"main.tf": string(template),
		"here.tf": `
provider "aws" {
  region                      = "` + region + `"
  access_key                  = "AKIAEXAMPLE"
  secret_key                  = "example"
  skip_credentials_validation = true
  skip_requesting_account_id  = true
  skip_metadata_api_check     = true
  skip_get_ec2_platforms      = true
  endpoints {
    iam = "` + url + `"
    sts = "` + url + `"
  }
}
`,
		"terraform.rc": `provider_installation {
  dev_overrides { "hashicorp/aws" = "` + bin + `" }
}
`,
		"terraform.tfvars.json": jsonOf(t, map[string]any{"issuer": issuer, "broker_id": brokerID, "bucket": bucket, "thumbprints": []string{thumbprint},
			"secrets": g.read, "rotated_secrets": g.rotated}),
	}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return &terraform{t: t, binary: filepath.Join(bin, "terraform"), dir: dir, env: []string{
		"HOME=" + dir, "TMPDIR=" + dir, "PATH=" + os.Getenv("PATH"), "TF_CLI_CONFIG_FILE=" + filepath.Join(dir, "terraform.rc"),
		"CHECKPOINT_DISABLE=1", "TF_IN_AUTOMATION=1", "AWS_EC2_METADATA_DISABLED=true",
	}}
}

func jsonOf(t *testing.T, v any) string {
	t.Helper()
	text, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// run runs one command and returns its exit code with what it said.
func (tf *terraform) run(args ...string) (code int, said string) {
	tf.t.Helper()
	ctx, cancel := context.WithTimeout(tf.t.Context(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, tf.binary, args...)
	cmd.Dir, cmd.Env = tf.dir, tf.env
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil && cmd.ProcessState.ExitCode() < 0 {
		tf.t.Fatalf("terraform %s: %v\n%s", strings.Join(args, " "), err, out.String())
	}
	return cmd.ProcessState.ExitCode(), out.String()
}

// must runs a command that is to succeed.
func (tf *terraform) must(args ...string) string {
	tf.t.Helper()
	code, said := tf.run(args...)
	if code != 0 {
		tf.t.Fatalf("terraform %s: exit code %d\n%s", strings.Join(args, " "), code, said)
	}
	return said
}

// applied is the account that Terraform makes of the template.
func applied(t *testing.T, g secrets) (*terraform, *fakeIAM) {
	t.Helper()
	iam := newFakeIAM(t)
	s := httptest.NewServer(iam)
	t.Cleanup(s.Close)
	tf := newTerraform(t, s.URL, g)
	tf.must("apply", "-no-color", "-input=false", "-auto-approve")
	return tf, iam
}

// TestTerraformValidate: Terraform takes the template, its form is Terraform's,
// and a template that is wrong is refused.
func TestTerraformValidate(t *testing.T) {
	tf := newTerraform(t, "http://127.0.0.1:1", both)
	tf.must("fmt", "-check", "-diff", "main.tf")
	var got struct {
		Valid       bool
		Diagnostics []struct{ Severity, Summary string }
	}
	if err := json.Unmarshal([]byte(tf.must("validate", "-json")), &got); err != nil {
		t.Fatal(err)
	}
	if !got.Valid {
		t.Errorf("not valid: %v", got.Diagnostics)
	}
	for _, d := range got.Diagnostics {
		if d.Severity != "warning" || d.Summary != "Provider development overrides are in effect" { // that of this test
			t.Errorf("%s: %s", d.Severity, d.Summary)
		}
	}

	template, err := os.ReadFile("main.tf")
	if err != nil {
		t.Fatal(err)
	}
	for what, change := range map[string][2]string{
		"an argument that there is not": {"permissions_boundary =", "permission_boundary ="},
		"a value out of bounds":         {"max_session_duration = 3600", "max_session_duration = 360"},
		"a resource that there is not":  {"aws_iam_policy.crm.arn", "aws_iam_policy.cmr.arn"},
	} {
		text := strings.ReplaceAll(string(template), change[0], change[1])
		if text == string(template) {
			t.Fatalf("%s: %q is not in the template", what, change[0])
		}
		if err := os.WriteFile(filepath.Join(tf.dir, "main.tf"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if code, said := tf.run("validate", "-no-color"); code == 0 {
			t.Errorf("%s is valid: %s", what, said)
		}
	}
}

// TestTerraformApply: what Terraform made stays as it is, also when the broker
// has written its deny list, and goes with it.
func TestTerraformApply(t *testing.T) {
	tf, iam := applied(t, both)
	unchanged := func(what string) {
		t.Helper()
		if code, said := tf.run("plan", "-no-color", "-input=false", "-detailed-exitcode"); code != 0 {
			t.Errorf("%s: a plan exits with %d, and is to change nothing\n%s", what, code, said)
		}
	}
	unchanged("after apply")
	iam.mu.Lock()
	iam.Roles[crmARN].Inline["mayfly-deny-here-0"] = `{"Version":"2012-10-17","Statement":[{"Effect":"Deny","Action":"*","Resource":"*","Condition":{"StringLike":{"aws:userid":["*:l1"]}}}]}`
	iam.mu.Unlock()
	unchanged("with a deny list")
	tf.must("destroy", "-no-color", "-input=false", "-auto-approve", "-refresh=false") // the list came after Terraform looked
	if left := iam.made(); len(left.Roles)+len(left.Policies)+len(left.Providers) > 0 {
		t.Errorf("left: %v", left)
	}
}
