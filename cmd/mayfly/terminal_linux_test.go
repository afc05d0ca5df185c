package main

import (
	"os"
	"path/filepath"
	"testing"
)

// Only a terminal has a person at its other end. /dev/null is a character
// device as well, and so is /dev/zero.
func TestIsTerminal(t *testing.T) {
	_, slave := terminal(t)
	t.Cleanup(func() { slave.Close() })
	if !isTerminal(slave) {
		t.Error("a pseudo-terminal is taken for none")
	}
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { read.Close(); write.Close() })
	file, err := os.Create(filepath.Join(t.TempDir(), "file"))
	if err != nil {
		t.Fatal(err)
	}
	file.Close()
	others := map[string]*os.File{"a pipe": read, "a closed file": file}
	for _, path := range []string{os.DevNull, "/dev/zero"} {
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		others[path] = f
	}
	for name, f := range others {
		if isTerminal(f) {
			t.Errorf("%s is taken for a terminal", name)
		}
		p := &program{stdin: f, stderr: f}
		if p.interactive() || p.onScreen() {
			t.Errorf("a person is asked at %s", name)
		}
	}
}
