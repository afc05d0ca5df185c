package broker_test

import (
	"strings"
	"testing"

	"github.com/mayfly-security/mayfly/broker"
)

func TestNearest(t *testing.T) {
	among := []string{"max_ttl", "provider", "scope", "scopes"}
	for word, want := range map[string]string{"max-ttl": "max_ttl", "providers": "provider", "scop": "scope",
		"socpe": "scope", "SCOPE": "scope", "description": "", "": "", "x": "", strings.Repeat("s", 300): ""} {
		if got, ok := broker.Nearest(word, among); got != want || ok != (want != "") {
			t.Errorf("Nearest(%q) = %q, %v; want %q", word, got, ok, want)
		}
	}
	if got := broker.Suggest("x", "tools", nil); got != "" {
		t.Errorf("of nothing: %q", got)
	}
	if got := broker.Suggest("zzzz", "tools", strings.Split(strings.Repeat("a,", 30), ",")); strings.Count(got, "a, ") > 20 || !strings.HasSuffix(got, "and more tools") {
		t.Errorf("of many: %q", got)
	}
}
