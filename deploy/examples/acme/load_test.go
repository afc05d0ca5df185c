package acme_test

import (
	"slices"
	"testing"
	"time"

	"github.com/mayfly-security/mayfly/broker/catalog"
	"github.com/mayfly-security/mayfly/broker/catalog/strictyaml"
	"github.com/mayfly-security/mayfly/broker/policy"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/token"
)

func load(t *testing.T) *catalog.Snapshot {
	t.Helper()
	s, err := catalog.Load([]string{"catalog.yaml", "policies.cedar"}, map[string]providers.Driver{"token": token.Driver{}})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// TestCases asks what `mayfly policy test` asks.
func TestCases(t *testing.T) {
	s := load(t)
	var file policy.CaseFile
	if _, err := strictyaml.ReadFile("cases.yaml", &file); err != nil {
		t.Fatal(err)
	}
	if len(file.Cases) < 25 {
		t.Errorf("there are only %d cases", len(file.Cases))
	}
	decided := map[string]bool{}
	for _, r := range policy.RunCases(s.Policies(), s, file.Cases, time.Now()) {
		if !r.Passed {
			t.Errorf("%s: %s", r.Name, r.Problem)
		}
		for _, id := range r.Verdict.Policies {
			decided[id] = true
		}
	}
	for _, id := range s.Policies().IDs() {
		if !decided[id] {
			t.Errorf("no case is decided by the policy %s", id)
		}
	}
}

// TestPeople holds the sample people to the groups that the catalog knows.
func TestPeople(t *testing.T) {
	var file struct {
		People []struct {
			Name     string   `yaml:"name"`
			FullName string   `yaml:"full_name"`
			Groups   []string `yaml:"groups"`
		} `yaml:"people"`
	}
	if _, err := strictyaml.ReadFile("people.yaml", &file); err != nil {
		t.Fatal(err)
	}
	known := load(t).KnownGroups()
	in := map[string]bool{"mayfly-admins": true} // the catalog's own
	for _, p := range file.People {
		for _, g := range p.Groups {
			if in[g] = true; !slices.Contains(known, g) {
				t.Errorf("%s is in the group %s, which means nothing", p.Name, g)
			}
		}
	}
	for _, g := range known {
		if !in[g] {
			t.Errorf("nobody is in the group %s", g)
		}
	}
}
