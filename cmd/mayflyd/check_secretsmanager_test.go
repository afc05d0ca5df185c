package main

import (
	"strings"
	"testing"
)

// TestCheckSecretsManager: the example is good, the check tells that its secrets
// are static, and what is wrong with one is told with file and line.
func TestCheckSecretsManager(t *testing.T) {
	for _, test := range []struct {
		old, with string
		says      []string
		bad       bool
	}{
		{"", "", []string{"tool mail.send: its leases give a static secret, mail/${params.customer}/key", "cannot be revoked", "tool crm.db: its leases give a static secret",
			"which is rotated at the end of each", "only its rotation ends it"}, false},
		{"fields: [api_key]", "field: [api_key]", []string{"catalog.yaml:33", "field"}, true},
		{"secretsmanager:eu-central-1", "secretsmanager:us-east-1", []string{"catalog.yaml:42", "region us-east-1"}, true},
		{"rotate: true", "rotate: true\n      version_stage: AWSPREVIOUS", []string{"catalog.yaml:", "not AWSCURRENT"}, true},
	} {
		all, _, err := checkCatalog(t, "secretsmanager.yaml", test.old, test.with)
		if err != nil {
			all += err.Error()
		}
		if (err != nil) != test.bad {
			t.Errorf("%q: %v\n%s", test.with, err, all)
		}
		for _, want := range test.says {
			if !strings.Contains(all, want) {
				t.Errorf("%q: it does not say %q:\n%s", test.with, want, all)
			}
		}
	}
}
