package oidc

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"

	"golang.org/x/oauth2"

	"github.com/mayfly-security/mayfly/broker"
)

// fault is what is wrong with what came: a clause in our own words, which may
// be shown. It never holds a part of a token.
type fault string

func (f fault) Error() string { return string(f) }

// away means that the provider was not heard, or spoke no sense. cause is for
// the log, and was made by cause().
type away struct{ cause error }

func (a away) Error() string { return "the identity provider is away: " + a.cause.Error() }
func (a away) Unwrap() error { return a.cause }

// A purpose is what a token came for, and how its refusal is told.
type purpose struct {
	reason        broker.Reason
	message, next string
}

var (
	signIn = purpose{broker.ReasonSignIn, "the sign-in was refused", "begin again with `mayfly login`; if it stays so, tell an operator"}
	bearer = purpose{broker.ReasonTokenInvalid, "the bearer token was refused", "get a token of the configured identity provider for the audience that the broker has for people (audience)"}
	user   = purpose{broker.ReasonTokenInvalid, "the user's token was refused", "have the user get a token of the configured identity provider, for the audience that the broker has for users' tokens (user_audience)"}
)

// refuse makes the refusal of err, which is a fault or away.
func (p purpose) refuse(err error) error {
	var f fault
	if errors.As(err, &f) {
		return broker.Refuse(p.reason, p.message+": "+string(f), p.next)
	}
	return broker.Refuse(broker.ReasonSignIn, "the identity provider is away, or does not work with this broker",
		"try again in a minute; operators find the cause in the log").Because(err)
}

// cause says what went wrong on the way to the provider without a word of what
// it sent: errors of the libraries quote answers, and answers hold tokens.
func cause(what string, err error) error {
	var (
		known       away
		answer      *oauth2.RetrieveError
		address     *url.Error
		network     *net.OpError
		certificate *tls.CertificateVerificationError
		timeout     interface{ Timeout() bool }
	)
	switch {
	case errors.As(err, &known):
		return known.cause
	case errors.As(err, &answer):
		return fmt.Errorf("%s: it answered %d %s", what, answer.Response.StatusCode, errorCode(answer.ErrorCode))
	case errors.Is(err, errTooLarge):
		return fmt.Errorf("%s: %w", what, errTooLarge)
	case errors.Is(err, errRedirect):
		return fmt.Errorf("%s: %w", what, errRedirect)
	case errors.Is(err, context.Canceled):
		return fmt.Errorf("%s: %w", what, context.Canceled)
	case errors.As(err, &timeout) && timeout.Timeout(), errors.Is(err, os.ErrDeadlineExceeded):
		return fmt.Errorf("%s: it did not answer in time", what)
	case errors.As(err, &network):
		return fmt.Errorf("%s: %w", what, network)
	case errors.As(err, &certificate):
		return fmt.Errorf("%s: %w", what, certificate)
	case errors.As(err, &address): // its text may quote the answer
		return fmt.Errorf("%s: the connection failed", what)
	}
	return fmt.Errorf("%s: what it answered makes no sense", what)
}

// errorCode is an OAuth error code as it may be logged: the registered ones are
// short words, and everything else is hidden.
func errorCode(s string) string {
	if s == "" || len(s) > 40 {
		return "without a code"
	}
	for _, r := range s {
		if r != '_' && (r < 'a' || r > 'z') {
			return "without a code"
		}
	}
	return s
}
