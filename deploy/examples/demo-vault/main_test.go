package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/mayfly-security/mayfly/deploy/examples/story"
)

// TestDemoVault builds the programs and tells the story with them, as `make
// demo-vault` does.
func TestDemoVault(t *testing.T) {
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
	if err := story.Tell(t.Context(), bin, tell); err != nil {
		t.Fatal(err)
	}
}
