package main

import (
	"strings"
	"testing"
)

// TestConfirm: only the word itself is a yes, and only from a person.
func TestConfirm(t *testing.T) {
	for _, tt := range []struct {
		typed    string
		terminal bool
		ok       bool
		code     int
	}{
		{"forget\n", true, true, 0},
		{"  forget ", true, true, 0},
		{"", true, false, exitRefused},
		{"y\n", true, false, exitRefused},
		{"yes\nforget\n", true, false, exitRefused},
		{strings.Repeat("x", 1<<20), true, false, exitRefused},
		{"forget\n", false, false, exitUsage},
	} {
		var out strings.Builder
		p := &program{stdin: strings.NewReader(tt.typed), stderr: &out, terminal: func() bool { return tt.terminal }}
		err := p.confirm("Lease x\x1b[2J is revoking.", "forget")
		if (err == nil) != tt.ok || codeOf(err) != tt.code {
			t.Errorf("%.20q on a terminal %v: %v, code %d", tt.typed, tt.terminal, err, codeOf(err))
		}
		if strings.ContainsRune(out.String(), 0x1b) || tt.terminal && !strings.Contains(out.String(), "revoking") {
			t.Errorf("it asked %q", out.String())
		}
	}
	p := &program{stdin: strings.NewReader("")}
	if p.interactive() {
		t.Error("a reader was taken for a person")
	}
}
