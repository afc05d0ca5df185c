//go:build unix

package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/mayfly-security/mayfly/deploy/examples/story"
)

// TestOutage is the short form of `make outage`: what is promised is the same.
func TestOutage(t *testing.T) {
	if err := story.LookAtSources("../../.."); err != nil {
		t.Fatal(err)
	}
	bin := t.TempDir()
	for _, name := range []string{"mayfly", "mayflyd"} {
		cmd := exec.Command("go", "build", "-o", filepath.Join(bin, name), "github.com/mayfly-security/mayfly/cmd/"+name)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if said, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("building %s: %v\n%s", name, err, said)
		}
	}
	r, err := run(t.Context(), bin, options{leases: 100, away: 20 * time.Second, clients: 8}, t.Output())
	if err != nil {
		t.Fatal(err)
	}
	if len(r.meanwhile) == 0 || len(r.refused) == 0 {
		t.Errorf("nothing was asked for while Vault was away: %d of the other provider's leases, %d of Vault's", len(r.meanwhile), len(r.refused))
	}
}
