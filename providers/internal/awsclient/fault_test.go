package awsclient

import (
	"strings"
	"testing"

	"github.com/aws/smithy-go"
)

// TestNoSecretOfAWS: AWS repeats, to a signature that it does not take, the
// headers that it has read. What is in them is not in our errors.
func TestNoSecretOfAWS(t *testing.T) {
	const token = "FwoGZXIvYXdzEBYaDsessiontoken"
	for code, said := range map[string]string{
		"SignatureDoesNotMatch": "The request signature we calculated does not match the signature you provided.\n\nThe Canonical String for this request should have been\n'POST\n/\n\nhost:sts.amazonaws.com\nx-amz-security-token:" + token + "\n'",
		"IncompleteSignature":   "Authorization header requires existence of either a 'X-Amz-Date' or a 'Date' header. Authorization=AWS4-HMAC-SHA256 Credential=AKIA/x, Signature=" + token,
	} {
		err := FaultOf(t.Context(), "asking", api{code, said})
		if text := err.Error(); strings.Contains(text, token) || !strings.Contains(text, said[:30]) {
			t.Errorf("%s", text)
		}
	}
}

type api struct{ code, said string }

func (a api) Error() string {
	return "operation error STS: AssumeRole, api error " + a.code + ": " + a.said
}
func (a api) ErrorCode() string             { return a.code }
func (a api) ErrorMessage() string          { return a.said }
func (a api) ErrorFault() smithy.ErrorFault { return smithy.FaultClient }
