package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/mayfly-security/mayfly/deploy/examples/story"
)

// TestDemo builds the programs and tells the story with them, as `make demo` does.
func TestDemo(t *testing.T) {
	if err := story.LookAtSources("../../.."); err != nil {
		t.Fatal(err)
	}
	bin := t.TempDir()
	for out, pkg := range map[string]string{"mayfly": "cmd/mayfly", "mayflyd": "cmd/mayflyd", "examples/crm": "deploy/examples/crm"} {
		cmd := exec.Command("go", "build", "-o", filepath.Join(bin, out), "github.com/mayfly-security/mayfly/"+pkg)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if said, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("building %s: %v\n%s", pkg, err, said)
		}
	}
	if err := story.Tell(t.Context(), bin, tell); err != nil {
		t.Fatal(err)
	}
}
