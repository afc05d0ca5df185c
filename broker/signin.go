package broker

import (
	"crypto/sha256"
	"encoding/base32"
)

// SignInCheck is what a person compares before they agree to a sign-in: their
// terminal shows it, and so does the broker's page. It follows from the
// challenge (RFC 7636) of the program that began. Somebody else's program would
// need a challenge of the same, which is 50 bits of SHA-256.
func SignInCheck(challenge string) string {
	sum := sha256.Sum256([]byte("mayfly sign-in check\x00" + challenge))
	s := base32.StdEncoding.EncodeToString(sum[:])[:10]
	return s[:5] + "-" + s[5:]
}
