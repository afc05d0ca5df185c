package broker

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"testing"
)

// TestSecretShowsItself to nobody: neither by itself, nor as a field of
// another struct, exported or not, at any depth and by any verb.
func TestSecretShowsItself(t *testing.T) {
	const canary = "hunter2-canary"
	s := NewSecret(map[string]string{"password": canary})
	type outer struct {
		Shown  Secret
		hidden Secret
		inner  *struct{ deep []Secret }
	}
	o := outer{Shown: s, hidden: s, inner: &struct{ deep []Secret }{[]Secret{s}}}
	o.inner.deep = append(o.inner.deep, o.hidden)
	for _, v := range []any{s, &s, o, &o, []Secret{s}, []any{s}, map[string]Secret{"k": s}, []outer{o}, fmt.Errorf("with %v", o)} {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
			if out := fmt.Sprintf(verb, v); strings.Contains(out, canary) || strings.Contains(out, fmt.Sprintf("%x", canary)) {
				t.Errorf("%s of %T shows it: %s", verb, v, out)
			}
		}
		if out, err := json.Marshal(v); err == nil && strings.Contains(string(out), canary) {
			t.Errorf("the JSON of %T shows it: %s", v, out)
		}
		var log strings.Builder
		slog.New(slog.NewJSONHandler(&log, nil)).Info("x", "v", v)
		slog.New(slog.NewTextHandler(&log, nil)).Info("x", "v", v)
		if strings.Contains(log.String(), canary) {
			t.Errorf("the log of %T shows it: %s", v, log.String())
		}
	}
	if got, ok := s.Reveal("password"); !ok || got != canary || s.IsZero() || len(s.Names()) != 1 || s.RevealAll()["password"] != canary {
		t.Error("whoever asks by name does not get it")
	}
	var zero Secret
	if _, ok := zero.Reveal("password"); ok || !zero.IsZero() || len(zero.Names()) != 0 || len(zero.RevealAll()) != 0 {
		t.Error("the zero Secret holds something")
	}
}
