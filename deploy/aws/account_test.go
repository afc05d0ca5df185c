// Package aws has the tests of the templates that set up an AWS account. See
// docs/aws.md.
package aws

import (
	"encoding/json"
	"reflect"
	"testing"
)

// What the templates are given here.
const (
	accountID = "123456789012"
	region    = "eu-central-1"
	issuer    = "oidc.acme.test/spire"
	brokerID  = "spiffe://acme.test/prod/mayfly"
	audience  = "sts.amazonaws.com"
	bucket    = "acme-crm"
	secret    = "arn:aws:secretsmanager:" + region + ":" + accountID + ":secret:billing-AbCdEf"
	rotated   = "arn:aws:secretsmanager:" + region + ":" + accountID + ":secret:ledger-GhIjKl"
)

// ARNs of what the templates make.
const (
	boundaryARN = "arn:aws:iam::" + accountID + ":policy/mayfly/mayfly-boundary"
	brokerARN   = "arn:aws:iam::" + accountID + ":role/mayfly-broker"
	crmARN      = "arn:aws:iam::" + accountID + ":role/mayfly/crm"
)

// secrets are those that a template is given.
type secrets struct{ read, rotated []string }

var (
	both  = secrets{read: []string{secret, rotated}, rotated: []string{rotated}}
	plain = secrets{read: []string{secret}, rotated: []string{}}
	none  = secrets{read: []string{}, rotated: []string{}}
)

// account is what a template makes in IAM, by ARN.
type account struct {
	Providers map[string]provider
	Policies  map[string]string // managed policies: their documents
	Roles     map[string]role
}

type provider struct {
	URL       string
	Audiences []string
}

type role struct {
	Trust    string
	Boundary string
	Session  string            // seconds
	Inline   map[string]string // documents by name
	Managed  []string          // ARNs
}

// sameDocument reports whether two texts are the same JSON: the template's
// language decides on white space, on the order of keys and on no more.
func sameDocument(t *testing.T, a, b string) bool {
	t.Helper()
	var x, y any
	for text, v := range map[string]*any{a: &x, b: &y} {
		if err := json.Unmarshal([]byte(text), v); err != nil {
			t.Fatalf("a policy that is no JSON: %v\n%s", err, text)
		}
	}
	if a == b {
		return true
	}
	return reflect.DeepEqual(x, y)
}
