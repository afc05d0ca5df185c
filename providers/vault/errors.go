package vault

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"

	"github.com/hashicorp/vault/api"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
)

// kind is what went wrong with a call to Vault, as far as it matters to what
// is done next and to what is told.
type kind int

// The kinds. Only unsent and those that are Vault's own refusals are certain
// to have had no effect.
const (
	none      kind = iota
	away           // down, sealed, without a leader
	throttled      // a quota or rate limit
	login          // our own login does not come about
	badToken       // the token is not, or no longer, known
	denied         // the token's policies do not allow it
	missing        // there is no such mount, role or path
	bad            // Vault refuses what is asked: an unknown role, a wrong value
	failed         // Vault, or the system behind it, failed
	late           // no answer in time
	cut            // the connection ended before the answer did
	unwanted       // the answer is not what the catalog says, or not what can be ended
	broken         // a fault of ours
)

// shape is one form in which Vault says what is wrong. The first that fits counts.
type shape struct {
	status int    // 0: any
	text   string // part of one of the messages, in lower case; empty: any
	kind   kind
}

// shapes is the table from Vault's answers (and those of proxies before it) to
// kinds. It was made by looking at a real Vault in each condition.
var shapes = []shape{
	{0, "vault is sealed", away},
	{0, "local node not active", away},
	{0, "active cluster node not found", away},
	{0, "no leader", away},
	{http.StatusForbidden, "invalid token", badToken},
	{http.StatusForbidden, "bad token", badToken},
	{http.StatusForbidden, "", denied},
	{http.StatusUnauthorized, "", denied},
	{http.StatusTooManyRequests, "", throttled},
	{http.StatusNotFound, "", missing},
	{http.StatusMethodNotAllowed, "", missing},
	{http.StatusInternalServerError, "", failed},
	{http.StatusPreconditionFailed, "", away}, // a standby that has not caught up
	{472, "", away},                           // a node for disaster recovery
	{473, "", away},                           // a standby for performance
	{http.StatusNotImplemented, "", away},     // not initialized
	{http.StatusBadGateway, "", away},
	{http.StatusServiceUnavailable, "", away},
	{http.StatusGatewayTimeout, "", late},
}

// fault is an error of one call to Vault. Its text is for operators.
type fault struct {
	kind   kind
	what   string // what was done
	status int    // 0: no answer
	texts  []string
	unsent bool // the request never left
	err    error
}

func (f *fault) Error() string {
	var b strings.Builder
	b.WriteString(f.what)
	if f.status != 0 {
		fmt.Fprintf(&b, ": Vault answered %d", f.status)
	}
	for _, text := range f.texts {
		b.WriteString(": " + broker.Clean(broker.Shorten(strings.Join(strings.Fields(text), " "), 600)))
	}
	if f.err != nil {
		b.WriteString(": " + f.err.Error())
	}
	return b.String()
}

// Unwrap tells the engine whether anybody would be answered now.
func (f *fault) Unwrap() []error {
	errs := make([]error, 0, 2)
	if f.err != nil {
		errs = append(errs, f.err)
	}
	switch f.kind {
	case away, throttled, login:
		errs = append(errs, providers.ErrAway)
	}
	return errs
}

// refused reports that Vault itself said no, so that the call had no effect.
func (f *fault) refused() bool {
	switch f.kind {
	case throttled, login, badToken, denied, missing, bad:
		return true
	}
	return f.unsent
}

// says reports whether one of Vault's messages holds text, given in lower case.
func (f *fault) says(text string) bool {
	for _, each := range f.texts {
		if strings.Contains(strings.ToLower(each), text) {
			return true
		}
	}
	return false
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
		return broken
	}
	return none
}

// faultOf tells what an error of the client means.
func faultOf(ctx context.Context, r request, err error) *fault {
	f := &fault{what: r.what}
	var answer *api.ResponseError
	if errors.As(err, &answer) {
		f.status = answer.StatusCode
		if !answer.RawError {
			f.texts = answer.Errors
		} else if !r.quiet && len(answer.Errors) > 0 {
			f.texts = []string{broker.Shorten(answer.Errors[0], 200)}
		}
		f.kind = f.shape()
		return f
	}
	f.err = err
	var op *net.OpError
	var certificate *tls.CertificateVerificationError
	var record tls.RecordHeaderError
	switch {
	case errors.As(err, &op) && op.Op == "dial", errors.As(err, &certificate), errors.As(err, &record),
		strings.Contains(err.Error(), "TLS handshake timeout"): // its type is net/http's own
		f.kind, f.unsent = away, true
	case op != nil && op.Op == "remote error": // a TLS alert
		f.kind = away
	case ctx.Err() != nil:
		f.kind = late
	default:
		f.kind = cut
	}
	return f
}

func (f *fault) shape() kind {
	for _, s := range shapes {
		if (s.status == 0 || s.status == f.status) && (s.text == "" || f.says(s.text)) {
			return s.kind
		}
	}
	if f.status >= 500 {
		return failed
	}
	return bad
}

// told is what an agent is told of a kind: our own words, never Vault's.
func (p *provider) told(k kind, tool string) *broker.Error {
	switch k {
	case away:
		return providers.SayLater("Vault (provider %s) cannot be reached, is sealed or has no leader", p.name)
	case throttled:
		return providers.SayLater("Vault (provider %s) takes no more requests for the moment: a quota is used up", p.name)
	case login, badToken:
		return providers.SayLater("the broker cannot log in to Vault (provider %s)", p.name)
	case denied:
		return providers.SayRefused("Vault (provider %s) does not allow the broker to make a credential for %s: its policies there are not as `mayfly vault setup` prints them", p.name, tool)
	case missing:
		return providers.SayRefused("what tool %s names in Vault (provider %s) is not there: a mount, path or token role", tool, p.name)
	case bad:
		return providers.SayRefused("Vault (provider %s) refuses what tool %s asks for: a role that is not there, or a value that it does not take", p.name, tool)
	case unwanted:
		return providers.SayRefused("Vault (provider %s) answered for tool %s with something else than the catalog says", p.name, tool)
	case late:
		return providers.SayLater("Vault (provider %s) did not answer in time", p.name)
	case cut:
		return providers.SayLater("the connection to Vault (provider %s) broke", p.name)
	}
	return providers.SayLater("Vault (provider %s), or the system behind it, failed", p.name)
}

// nothingMade is an error of Mint where nothing was made.
func (p *provider) nothingMade(tool string, cause error) error {
	k := kindOf(cause)
	told := p.told(k, tool).Because(cause)
	switch k {
	case denied, missing, bad, unwanted:
		return providers.Refused(told)
	}
	return fmt.Errorf("%w: %w", providers.ErrNothingMade, told)
}
