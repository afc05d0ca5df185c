package awssts

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"strings"

	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/smithy-go"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
)

// kind is what went wrong with a call to AWS, as far as it matters to what is
// done next and to what is told.
type kind int

// The kinds.
const (
	none      kind = iota
	away           // nobody was reached, and nothing was sent
	throttled      // AWS takes no more for the moment
	login          // the broker has no credentials, or AWS does not take them
	denied         // AWS does not allow it
	missing        // there is no such role or policy
	tooLarge       // PackedPolicyTooLarge
	malformed      // AWS cannot read the policy
	region         // STS is not active in the region
	full           // a quota of IAM is used up
	bad            // AWS refuses what is asked
	failed         // AWS failed: whether it did it is not known
	late           // no answer in time
	cut            // the connection ended before the answer did
)

// codes is the table from AWS's error codes to kinds.
var codes = map[string]kind{
	"Throttling": throttled, "ThrottlingException": throttled, "RequestLimitExceeded": throttled, "TooManyRequestsException": throttled, "SlowDown": throttled,
	"ExpiredToken": login, "ExpiredTokenException": login, "InvalidClientTokenId": login, "UnrecognizedClientException": login,
	"SignatureDoesNotMatch": login, "InvalidAccessKeyId": login, "MissingAuthenticationToken": login, "RequestExpired": login,
	"IncompleteSignature": login, "InvalidIdentityToken": login, "IDPRejectedClaim": login, "IDPCommunicationError": login,
	"AccessDenied": denied, "AccessDeniedException": denied, "UnauthorizedOperation": denied,
	"NoSuchEntity": missing, "PackedPolicyTooLarge": tooLarge, "MalformedPolicyDocument": malformed,
	"RegionDisabledException": region, "LimitExceeded": full,
}

// fault is an error of one call to AWS. Its text is for operators.
type fault struct {
	kind kind
	what string
	code string
	err  error
}

func (f *fault) Error() string {
	text := f.err.Error()
	for _, mark := range []string{"The Canonical String", "Authorization="} {
		// AWS repeats the headers of a request whose signature it does not take.
		// Among them is the token of a session.
		text, _, _ = strings.Cut(text, mark)
	}
	return f.what + ": " + broker.Clean(broker.Shorten(strings.TrimSpace(text), 600))
}

// Unwrap tells the engine whether anybody would be answered now.
func (f *fault) Unwrap() []error {
	switch f.kind {
	case away, throttled, login:
		return []error{f.err, providers.ErrAway}
	}
	return []error{f.err}
}

// refused reports that AWS itself said no, or was never asked: nothing came of it.
func (f *fault) refused() bool {
	switch f.kind {
	case failed, late, cut:
		return false
	}
	return true
}

func asFault(err error) *fault {
	var f *fault
	if errors.As(err, &f) {
		return f
	}
	return nil
}

func kindOf(err error) kind {
	if f := asFault(err); f != nil {
		return f.kind
	}
	if err != nil {
		return bad
	}
	return none
}

// faultOf tells what an error of the SDK means.
func faultOf(ctx context.Context, what string, err error) error {
	if err == nil {
		return nil
	}
	f := &fault{what: what, err: err, kind: cut}
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
		f.kind = login
	case errors.As(err, &api):
		f.code = api.ErrorCode()
		known, ok := codes[f.code]
		switch {
		case ok:
			f.kind = known
		case status >= 500 || status == 0:
			f.kind = failed
		default:
			f.kind = bad
		}
	case errors.As(err, &op) && op.Op == "dial", errors.As(err, &certificate), strings.Contains(err.Error(), "TLS handshake timeout"):
		f.kind = away
	case ctx.Err() != nil, errors.As(err, &cancelled), errors.Is(err, context.DeadlineExceeded), isTimeout(err):
		f.kind = late
	case status >= 500:
		f.kind = failed
	}
	return f
}

func isTimeout(err error) bool {
	var n net.Error
	return errors.As(err, &n) && n.Timeout()
}

// told is what an agent is told of a kind: our own words, never AWS's.
func (p *provider) told(k kind, tool string) *broker.Error {
	const (
		later    = "try again later; operators see the cause in the log by correlation ID"
		operator = "give the correlation ID to an operator"
	)
	unavailable := func(format string, args ...any) *broker.Error {
		return broker.Refusef(broker.ReasonProvider, later, format, args...)
	}
	refused := func(format string, args ...any) *broker.Error {
		return broker.Refusef(broker.ReasonProviderRefused, operator, format, args...)
	}
	switch k {
	case away:
		return unavailable("AWS STS (provider %s) cannot be reached", p.name)
	case throttled:
		return unavailable("AWS STS (provider %s) takes no more requests for the moment", p.name)
	case login:
		return unavailable("the broker cannot log in to AWS (provider %s)", p.name)
	case denied:
		return refused("AWS (provider %s) does not allow the broker to make a session for %s: the role's trust policy must allow it sts:AssumeRole, sts:TagSession and sts:SetSourceIdentity", p.name, tool)
	case missing:
		return refused("the role of tool %s is not there in AWS (provider %s)", tool, p.name)
	case tooLarge:
		return refused("the catalog's tool %s has too many permissions for a session: AWS (provider %s) says that policy and tags are too large when packed; an operator shortens the tool's statements", tool, p.name)
	case malformed:
		return refused("the catalog's tool %s has statements that AWS (provider %s) cannot read", tool, p.name)
	case region:
		return refused("AWS STS is not active in the region of provider %s", p.name)
	case bad, full:
		return refused("AWS (provider %s) refuses what tool %s asks for", p.name, tool)
	case late:
		return unavailable("AWS STS (provider %s) did not answer in time", p.name)
	case cut:
		return unavailable("the connection to AWS STS (provider %s) broke", p.name)
	}
	return unavailable("AWS STS (provider %s) failed", p.name)
}

// nothingMade is an error of Mint where nothing was made.
func (p *provider) nothingMade(tool string, cause error) error {
	k := kindOf(cause)
	err := fmt.Errorf("%w: %w", providers.ErrNothingMade, p.told(k, tool).Because(cause))
	switch k {
	case away, throttled, login:
	default:
		err = fmt.Errorf("%w: %w", err, providers.ErrRefused)
	}
	return err
}
