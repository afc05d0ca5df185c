package providertest

import (
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"strings"
	"testing"

	"github.com/mayfly-security/mayfly/broker"
)

// TestFindLeak plants a secret in every way that FindLeak knows.
func TestFindLeak(t *testing.T) {
	const value = `c4nary"\<ÿ>?/+ and some more`
	secret := broker.NewSecret(map[string]string{"password": value, "username": "public-name"})
	quoted, _ := json.Marshal(map[string]string{"error": "it said " + value})
	planted := map[string]string{
		"as it is":  "x" + value + "y",
		"hex":       hex.EncodeToString([]byte("x" + value)),
		"upper hex": strings.ToUpper(hex.EncodeToString([]byte(value))),
		"JSON":      string(quoted),
	}
	for _, before := range []string{"", "a", "ab", "abc"} {
		for _, after := range []string{"", "z", "zy"} {
			planted["base64 "+before+after] = base64.StdEncoding.EncodeToString([]byte(before + value + after))
			planted["base64url "+before+after] = base64.RawURLEncoding.EncodeToString([]byte(before + value + after))
		}
	}
	for name, text := range planted {
		if FindLeak([]byte(text), secret) == "" {
			t.Errorf("%s: %q was not found", name, text)
		}
	}
	if found := FindLeak([]byte("public-name logged in, nothing to see"), secret, "username"); found != "" {
		t.Errorf("found %s where nothing is", found)
	}
}
