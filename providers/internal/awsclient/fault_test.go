package awsclient

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"

	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/smithy-go"
	smithyhttp "github.com/aws/smithy-go/transport/http"

	"github.com/mayfly-security/mayfly/providers"
)

// TestNoSecretOfAWS: AWS repeats, to a signature that it does not take, the
// headers that it has read. What is in them is not in our errors.
func TestNoSecretOfAWS(t *testing.T) {
	const token = "FwoGZXIvYXdzEBYaDsessiontoken"
	for code, said := range map[string]string{
		"SignatureDoesNotMatch":     "The request signature we calculated does not match the signature you provided.\n\nThe Canonical String for this request should have been\n'POST\n/\n\nhost:sts.amazonaws.com\nx-amz-security-token:" + token + "\n'",
		"InvalidSignatureException": "The request signature we calculated does not match.\n\nThe Canonical String for this request should have been\n'POST\n/\n\nhost:secretsmanager.eu-central-1.amazonaws.com\nx-amz-security-token:" + token + "\n'",
		"IncompleteSignature":       "Authorization header requires existence of either a 'X-Amz-Date' or a 'Date' header. Authorization=AWS4-HMAC-SHA256 Credential=AKIA/x, Signature=" + token,
	} {
		err := FaultOf(t.Context(), "asking", api{code, said})
		if text := err.Error(); strings.Contains(text, token) || !strings.Contains(text, said[:30]) {
			t.Errorf("%s", text)
		}
		if KindOf(err) != Login || !errors.Is(err, providers.ErrAway) {
			t.Errorf("%s: kind %d", code, KindOf(err))
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

// TestKinds: what an answer, or none, means for what is done next.
func TestKinds(t *testing.T) {
	over, cancel := context.WithCancel(t.Context())
	cancel()
	answered := func(status int, err error) error {
		return &awshttp.ResponseError{ResponseError: &smithyhttp.ResponseError{Response: &smithyhttp.Response{Response: &http.Response{StatusCode: status}}, Err: err}}
	}
	for name, test := range map[string]struct {
		ctx           context.Context
		err           error
		kind          Kind
		away, refused bool
	}{
		"a login that failed":   {t.Context(), fmt.Errorf("signing: %w", &loginError{errors.New("no SVID")}), Login, true, true},
		"throttled":             {t.Context(), answered(400, api{"ThrottlingException", "slow"}), Throttled, true, true},
		"a code in the table":   {t.Context(), answered(400, api{"ResourceNotFoundException", "none"}), Missing, false, true},
		"a code of no table":    {t.Context(), answered(400, api{"SomethingElse", "no"}), Bad, false, true},
		"a failure with a code": {t.Context(), answered(500, api{"InternalServiceError", "oh"}), Failed, false, false},
		"a code and no status":  {t.Context(), api{"SomethingElse", "no"}, Failed, false, false},
		"a failure":             {t.Context(), answered(502, errors.New("no code")), Failed, false, false},
		"nobody there":          {t.Context(), &net.OpError{Op: "dial", Err: errors.New("refused")}, Away, true, true},
		"another's certificate": {t.Context(), &tls.CertificateVerificationError{Err: errors.New("unknown authority")}, Away, true, true},
		"the caller gave up":    {over, errors.New("stopped"), Late, false, false},
		"a deadline":            {t.Context(), fmt.Errorf("sending: %w", context.DeadlineExceeded), Late, false, false},
		"cut":                   {t.Context(), io.ErrUnexpectedEOF, Cut, false, false},
	} {
		err := FaultOf(test.ctx, "asking", test.err)
		f := AsFault(err)
		if f == nil {
			t.Fatalf("%s: no fault", name)
		}
		if KindOf(err) != test.kind || errors.Is(err, providers.ErrAway) != test.away || f.Refused() != test.refused || !errors.Is(err, test.err) || !strings.HasPrefix(err.Error(), "asking: ") {
			t.Errorf("%s: kind %d, away %v, refused %v: %v", name, f.Kind, errors.Is(err, providers.ErrAway), f.Refused(), err)
		}
	}
	if err := FaultOf(t.Context(), "asking", nil); err != nil || KindOf(nil) != None || AsFault(nil) != nil {
		t.Errorf("no error is %v", err)
	}
	if err := errors.New("ours"); KindOf(err) != Bad || AsFault(err) != nil {
		t.Errorf("one of ours has kind %d", KindOf(err))
	}
}
