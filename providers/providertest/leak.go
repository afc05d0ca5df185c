package providertest

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/url"
	"slices"

	"github.com/mayfly-security/mayfly/broker"
)

// FindLeak looks for the secret in text, as it is, in hex, in base64 (both
// alphabets, at each alignment), and escaped as JSON, Go or URL (I7). It
// returns what it found as "field, encoding", or "". Fields listed in public,
// such as a user name, are not looked for.
func FindLeak(text []byte, secret broker.Secret, public ...string) string {
	lower := bytes.ToLower(text)
	for _, field := range secret.Names() {
		if slices.Contains(public, field) {
			continue
		}
		value, _ := secret.Reveal(field)
		if value == "" {
			continue
		}
		for name, pattern := range encodings(value) {
			haystack := text
			if name == "hex" {
				haystack = lower
			}
			if bytes.Contains(haystack, []byte(pattern)) {
				return field + ", " + name
			}
		}
	}
	return ""
}

func encodings(value string) map[string]string {
	quoted, _ := json.Marshal(value)
	patterns := map[string]string{
		"as it is": value,
		"hex":      hex.EncodeToString([]byte(value)),
		"JSON":     string(quoted[1 : len(quoted)-1]),
		"Go":       fmt.Sprintf("%q", value)[1 : len(fmt.Sprintf("%q", value))-1],
		"URL":      url.QueryEscape(value),
	}
	// Base64 maps three bytes to four characters. Where the value stands one
	// or two bytes into a group, its first and last characters depend on its
	// neighbours; what is between them does not.
	for shift := range 3 {
		end := (shift + len(value)) / 3 * 4
		begin := []int{0, 2, 3}[shift]
		if end-begin < 8 {
			continue // too short to be told from chance
		}
		padded := append(make([]byte, shift), value...)
		patterns[fmt.Sprintf("base64 at %d", shift)] = base64.RawStdEncoding.EncodeToString(padded)[begin:end]
		patterns[fmt.Sprintf("base64url at %d", shift)] = base64.RawURLEncoding.EncodeToString(padded)[begin:end]
	}
	return patterns
}
