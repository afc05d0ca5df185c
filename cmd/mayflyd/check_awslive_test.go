package main

import (
	"bytes"
	"errors"
	"fmt"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"

	"github.com/mayfly-security/mayfly/providers/awssts/fakeaws"
)

// checkAWSLive runs `mayflyd check --live` on a catalog of one AWS tool, with the
// broker's SVID, at an account that change makes otherwise than it should be.
func checkAWSLive(t *testing.T, audience string, change func(*fakeaws.Role)) (string, error) {
	t.Helper()
	people := newPeople(t)
	fake := fakeaws.New(fakeaws.Config{Broker: "mayfly-broker", Token: func(token string) error {
		svid, err := jwtsvid.ParseAndValidate(token, people.trust.Bundle(), []string{"sts.amazonaws.com"})
		if err == nil && svid.ID.Path() != "/mayfly" {
			err = errors.New("it is not the broker's")
		}
		return err
	}}, "mayfly-broker", "crm")
	role := fakeaws.Role{Boundary: "arn:aws:iam::123456789012:policy/mayfly/mayfly-boundary", MaxSession: time.Hour,
		Trust: `{"Statement":{"Effect":"Allow","Principal":{"AWS":"arn:aws:iam::123456789012:role/mayfly-broker"},"Action":"sts:AssumeRole"}}`}
	if change != nil {
		change(&role)
	}
	fake.SetRole("crm", role)
	server := httptest.NewServer(fake)
	defer server.Close()
	dir := t.TempDir()
	for name, text := range map[string]string{
		"mayflyd.yaml": "store: mayfly.db\ncatalog: [catalog.yaml]\nworkload_api: " + people.sockets["/mayfly"] + "\n",
		"catalog.yaml": fmt.Sprintf(`
providers:
  - name: aws
    driver: awssts
    config:
      region: eu-central-1
      account: "123456789012"
      endpoint_url: %s
      credentials: {method: web_identity, role_arn: "arn:aws:iam::123456789012:role/mayfly-broker", audience: %q}
      early_revoke: {mode: deny_list}
tools:
  - name: crm.read
    provider: aws
    description: Reads
    max_ttl: 30m
    scope: {role: "arn:aws:iam::123456789012:role/mayfly/crm", statements: [{Effect: Allow, Action: "s3:GetObject", Resource: "arn:aws:s3:::crm/*"}]}
`, server.URL, audience),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv(envVaultToken, "")
	var out bytes.Buffer
	root := rootCommand()
	root.SetArgs([]string{"check", "--live", "--config", filepath.Join(dir, "mayflyd.yaml")})
	root.SetOut(&out)
	root.SetErr(&out)
	err := root.ExecuteContext(t.Context())
	for _, problem := range fake.Problems() {
		t.Errorf("the fake was asked %s", problem)
	}
	return out.String(), err
}

// TestCheckAWSLive: the broker's own SVID looks at AWS, and the exit says whether
// anything is bad.
func TestCheckAWSLive(t *testing.T) {
	const aud = "sts.amazonaws.com"
	for _, test := range []struct {
		name, audience string
		change         func(*fakeaws.Role)
		err            bool
		says           []string
	}{
		{"good", aud, nil, false, []string{
			"note: provider aws: looked as arn:aws:sts::123456789012:assumed-role/mayfly-broker/mayfly-broker",
			"its boundary is arn:aws:iam::123456789012:policy/mayfly/mayfly-boundary", "provider aws: nothing is missing"}},
		{"audience", "vault", nil, true, []string{"bad: provider aws: the broker cannot log in (", "do: see that IAM has an OIDC provider for the issuer", "audience vault"}},
		{"broken", aud, func(r *fakeaws.Role) { r.Boundary, r.Refuses = "", []string{"iam:PutRolePolicy", "sts:TagSession"} }, true, []string{
			"bad: provider aws: role crm (of tool crm.read) has no permissions boundary", "may not write its policies", "the broker is not allowed sts:TagSession ("}},
	} {
		t.Run(test.name, func(t *testing.T) {
			out, err := checkAWSLive(t, test.audience, test.change)
			if (err != nil) != test.err {
				t.Errorf("the error is %v", err)
			}
			for _, want := range test.says {
				if !strings.Contains(out, want) {
					t.Errorf("it does not say %q:\n%s", want, out)
				}
			}
			if strings.Contains(out, "trusts") {
				t.Errorf("the broker's own role is told as another's:\n%s", out)
			}
			if test.name == "good" {
				t.Logf("it says\n%s", out)
			}
		})
	}
}
