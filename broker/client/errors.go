package client

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"math"
	"net"
	"net/http"
	"syscall"
	"time"

	"connectrpc.com/connect"

	"github.com/mayfly-security/mayfly/broker"
	mayflyv1 "github.com/mayfly-security/mayfly/broker/api/mayfly/v1"
)

// Why the broker was not heard. Every *ConnectionError is one of them for errors.Is.
var (
	// ErrUnreachable: no answer came. Trying again may help.
	ErrUnreachable = errors.New("broker unreachable")
	// ErrIdentity: we have no identity to connect with, or who answers is not
	// the broker that we want. Trying again does not help.
	ErrIdentity = errors.New("identity")
)

// ConnectionError says that the broker was not heard: what happened, why, and
// what to do. What the broker itself refuses is a *broker.Error instead.
type ConnectionError struct {
	Message string
	Next    string
	kind    error // ErrUnreachable or ErrIdentity
	final   bool  // trying again does not help, though the kind is ErrUnreachable
	err     error // the cause; may be nil
}

func (e *ConnectionError) Error() string { return e.Message }

// Unwrap gives the kind and the cause.
func (e *ConnectionError) Unwrap() []error {
	if e.err == nil {
		return []error{e.kind}
	}
	return []error{e.kind, e.err}
}

func identityError(cause error, next, format string, args ...any) *ConnectionError {
	return &ConnectionError{Message: fmt.Sprintf(format, args...), Next: next, kind: ErrIdentity, err: cause}
}

func unreachable(cause error, next, format string, args ...any) *ConnectionError {
	return &ConnectionError{Message: fmt.Sprintf(format, args...), Next: next, kind: ErrUnreachable, err: cause}
}

func final(e *ConnectionError, is bool) *ConnectionError {
	e.final = is
	return e
}

// decode turns what a call returned into what callers see: a *broker.Error for
// what the broker said, a *ConnectionError where it was not heard, the
// context's error where the caller gave up.
func (c *Client) decode(ctx context.Context, err error) error {
	if refusal := refusalOf(err); refusal != nil {
		return refusal
	}
	if e, ok := asType[*ConnectionError](err); ok {
		return e
	}
	if errors.Is(ctx.Err(), context.Canceled) {
		return context.Canceled
	}
	return c.explain(err)
}

// refusalOf is what the broker said; nil if it did not speak.
func refusalOf(err error) *broker.Error {
	e, ok := asType[*connect.Error](err)
	if !ok {
		return nil
	}
	for _, d := range e.Details() {
		v, err := d.Value()
		if err != nil {
			continue
		}
		if m, ok := v.(*mayflyv1.ErrorDetail); ok && m.GetReason() != "" {
			return &broker.Error{
				Reason: broker.Reason(m.GetReason()), Message: e.Message(), Next: m.GetNext(),
				Lease: broker.LeaseID(m.GetLeaseId()), Correlation: broker.CorrelationID(m.GetCorrelationId()),
				StepUp: broker.StepUp{MaxAge: seconds(m.GetMaxAge()), ACR: m.GetAcrValues()},
			}
		}
	}
	return nil
}

// seconds is a whole number of them; what no clock can hold is the most that
// there is, and what is negative is nothing.
func seconds(n int64) time.Duration {
	return time.Duration(min(max(n, 0), int64(math.MaxInt64/time.Second))) * time.Second
}

// explain says why no answer came.
func (c *Client) explain(err error) *ConnectionError {
	variable := EnvAddr
	if c.as == AsPerson {
		variable = EnvPeopleAddr
	}
	isRunning := fmt.Sprintf("is the broker running at %s? Another address goes into %s (or --addr)", c.addr, variable)
	if cert, ok := asType[*tls.CertificateVerificationError](err); ok {
		return identityError(err, fmt.Sprintf("if it is the listener for people, with a certificate of your own authority, name the authority's PEM file in %s; if not, do not trust it", EnvPeopleCA),
			"who answers at %s cannot prove to be it: %s", c.addr, clean(broker.Shorten(cert.Err.Error(), 300)))
	}
	if dns, ok := asType[*net.DNSError](err); ok {
		return final(unreachable(err, fmt.Sprintf("correct the address in %s (or --addr)", variable),
			"the broker's host %q has no address", clean(dns.Name)), dns.IsNotFound)
	}
	// Where the answer looks like plain HTTP, net/http has an error of its own.
	if _, ok := asType[tls.RecordHeaderError](err); ok || errors.Is(err, http.ErrSchemeMismatch) {
		return final(unreachable(err, fmt.Sprintf("correct the address in %s (or --addr); the broker speaks https", variable),
			"what answers at %s does not speak TLS", c.addr), true)
	}
	var code connect.Code
	if e, ok := asType[*connect.Error](err); ok {
		code = e.Code()
	}
	switch {
	case alertOf(err) && c.as == AsPerson:
		return identityError(err, fmt.Sprintf("see whether %s is the address of the broker's listener for people; workloads have another", c.addr),
			"what answers at %s broke off the TLS handshake: %s", c.addr, clean(err.Error()))
	case alertOf(err):
		return identityError(err, "look at our SVID with `mayfly svid`: the broker's log says what it has against it",
			"the broker at %s broke off the TLS handshake: %s", c.addr, clean(err.Error()))
	case errors.Is(err, syscall.ECONNREFUSED):
		return unreachable(err, isRunning, "the connection to %s is refused: nothing listens there", c.addr)
	case errors.Is(err, context.DeadlineExceeded), code == connect.CodeDeadlineExceeded:
		return unreachable(err, "try again; if it goes on, see whether the broker is overloaded or a firewall drops packets",
			"the broker at %s did not answer in time", c.addr)
	case code == connect.CodeUnimplemented, code == connect.CodeNotFound, code == connect.CodePermissionDenied,
		code == connect.CodeUnauthenticated, code == connect.CodeInvalidArgument:
		// An answer, and not one of Mayfly's: those have a detail.
		return final(unreachable(err, "see whether a proxy stands before the broker, and whether the address is the broker's",
			"what answers at %s does not answer as Mayfly does: %s", c.addr, clean(broker.Shorten(err.Error(), 300))), true)
	}
	return unreachable(err, isRunning, "the connection to %s broke: %s", c.addr, clean(broker.Shorten(err.Error(), 300)))
}

func asType[E error](err error) (e E, ok bool) {
	ok = errors.As(err, &e)
	return e, ok
}

// clean is for text from others that goes into a message.
func clean(s string) string { return broker.Clean(s) }
