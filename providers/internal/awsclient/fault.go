package awsclient

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"strings"

	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/smithy-go"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
)

// Kind is what went wrong with a call to AWS, as far as it matters to what is
// done next and to what is told.
type Kind int

// The kinds.
const (
	None      Kind = iota
	Away           // nobody was reached, and nothing was sent
	Throttled      // AWS takes no more for the moment
	Login          // the broker has no credentials, or AWS does not take them
	Denied         // AWS does not allow it
	Missing        // there is no such role, policy or secret
	TooLarge       // PackedPolicyTooLarge
	Malformed      // AWS cannot read the policy
	Region         // STS is not active in the region
	Full           // a quota of IAM is used up
	Bad            // AWS refuses what is asked
	Failed         // AWS failed: whether it did it is not known
	Late           // no answer in time
	Cut            // the connection ended before the answer did
)

// codes is the table from AWS's error codes to kinds.
var codes = map[string]Kind{
	"Throttling": Throttled, "ThrottlingException": Throttled, "RequestLimitExceeded": Throttled, "TooManyRequestsException": Throttled, "SlowDown": Throttled,
	"ExpiredToken": Login, "ExpiredTokenException": Login, "InvalidClientTokenId": Login, "UnrecognizedClientException": Login,
	"SignatureDoesNotMatch": Login, "InvalidAccessKeyId": Login, "MissingAuthenticationToken": Login, "RequestExpired": Login,
	"IncompleteSignature": Login, "InvalidSignatureException": Login, "InvalidIdentityToken": Login, "IDPRejectedClaim": Login, "IDPCommunicationError": Login,
	"AccessDenied": Denied, "AccessDeniedException": Denied, "UnauthorizedOperation": Denied,
	"NoSuchEntity": Missing, "ResourceNotFoundException": Missing, "PackedPolicyTooLarge": TooLarge, "MalformedPolicyDocument": Malformed,
	"RegionDisabledException": Region, "LimitExceeded": Full,
}

// Fault is an error of one call to AWS. Its text is for operators.
type Fault struct {
	Kind Kind
	What string // what was done
	Code string // AWS's; empty if it did not answer with one
	Err  error
}

func (f *Fault) Error() string {
	text := f.Err.Error()
	for _, mark := range []string{"The Canonical String", "Authorization="} {
		// AWS repeats the headers of a request whose signature it does not take.
		// Among them is the token of a session.
		text, _, _ = strings.Cut(text, mark)
	}
	return f.What + ": " + broker.Clean(broker.Shorten(strings.TrimSpace(text), 600))
}

// Unwrap tells the engine whether anybody would be answered now.
func (f *Fault) Unwrap() []error {
	switch f.Kind {
	case Away, Throttled, Login:
		return []error{f.Err, providers.ErrAway}
	}
	return []error{f.Err}
}

// Refused reports that AWS itself said no, or was never asked: nothing came of it.
func (f *Fault) Refused() bool {
	switch f.Kind {
	case Failed, Late, Cut:
		return false
	}
	return true
}

// AsFault is the Fault in an error; nil if there is none.
func AsFault(err error) *Fault {
	var f *Fault
	if errors.As(err, &f) {
		return f
	}
	return nil
}

// KindOf is the kind of an error: Bad of one that is no Fault, None of nil.
func KindOf(err error) Kind {
	if f := AsFault(err); f != nil {
		return f.Kind
	}
	if err != nil {
		return Bad
	}
	return None
}

// FaultOf tells what an error of the SDK means, as a *Fault. what is what was
// done. Without an error there is none.
func FaultOf(ctx context.Context, what string, err error) error {
	if err == nil {
		return nil
	}
	f := &Fault{What: what, Err: err, Kind: Cut}
	var own *loginError
	var api smithy.APIError
	var answer *awshttp.ResponseError
	var op *net.OpError
	var certificate *tls.CertificateVerificationError
	var cancelled *smithy.CanceledError
	status := 0
	if errors.As(err, &answer) {
		status = answer.HTTPStatusCode()
	}
	switch {
	case errors.As(err, &own):
		f.Kind = Login
	case errors.As(err, &api):
		f.Code = api.ErrorCode()
		known, ok := codes[f.Code]
		switch {
		case ok:
			f.Kind = known
		case status >= 500 || status == 0:
			f.Kind = Failed
		default:
			f.Kind = Bad
		}
	case errors.As(err, &op) && op.Op == "dial", errors.As(err, &certificate), strings.Contains(err.Error(), "TLS handshake timeout"):
		f.Kind = Away
	case ctx.Err() != nil, errors.As(err, &cancelled), errors.Is(err, context.DeadlineExceeded), isTimeout(err):
		f.Kind = Late
	case status >= 500:
		f.Kind = Failed
	}
	return f
}

func isTimeout(err error) bool {
	var n net.Error
	return errors.As(err, &n) && n.Timeout()
}
