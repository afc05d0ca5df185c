package main

import (
	"testing"

	"github.com/mayfly-security/mayfly/deploy/examples/story"
)

// TestDemo builds the programs and tells the story with them, as `make demo` does.
func TestDemo(t *testing.T) {
	bin := t.TempDir()
	if err := story.Build(t.Context(), "../../..", bin, "mayfly", "mayflyd", "examples/crm"); err != nil {
		t.Fatal(err)
	}
	if err := story.Tell(t.Context(), bin, tell); err != nil {
		t.Fatal(err)
	}
}
