//go:build unix

package main

import (
	"testing"
	"time"

	"github.com/mayfly-security/mayfly/deploy/examples/story"
)

// TestOutage is the short form of `make outage`: what is promised is the same.
func TestOutage(t *testing.T) {
	bin := t.TempDir()
	if err := story.Build(t.Context(), "../../..", bin, "mayfly", "mayflyd"); err != nil {
		t.Fatal(err)
	}
	r, err := run(t.Context(), bin, options{leases: 100, away: 20 * time.Second, clients: 8}, t.Output())
	if err != nil {
		t.Fatal(err)
	}
	if len(r.meanwhile) == 0 || len(r.refused) == 0 {
		t.Errorf("nothing was asked for while Vault was away: %d of the other provider's leases, %d of Vault's", len(r.meanwhile), len(r.refused))
	}
}
