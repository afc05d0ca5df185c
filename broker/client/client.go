package client

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/cenkalti/backoff/v4"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/api/mayfly/v1/mayflyv1connect"
)

// maxAnswer bounds one answer of the broker, in bytes.
const maxAnswer = 16 << 20

// The pauses between tries of a call. The first is short: a broker that was
// restarted is back within a moment.
const (
	firstPause = 100 * time.Millisecond
	maxPause   = 2 * time.Second
	maxTries   = 6
)

// Client asks one broker. Its methods may be called from many goroutines.
type Client struct {
	as        As
	addr      string
	timeout   time.Duration
	source    Source // nil for a person
	id        spiffeid.ID
	broker    spiffeid.ID
	transport interface {
		http.RoundTripper
		close()
	}

	access    mayflyv1connect.AccessServiceClient
	grants    mayflyv1connect.GrantServiceClient
	incidents mayflyv1connect.IncidentServiceClient
	audit     mayflyv1connect.AuditServiceClient
	operator  mayflyv1connect.OperatorServiceClient
	requests  mayflyv1connect.RequestServiceClient
	policy    mayflyv1connect.PolicyServiceClient
	signIn    mayflyv1connect.SignInServiceClient
}

// New opens our identity and returns a client of the broker. It returns once
// there is an identity; it does not connect yet: the first call does.
func New(ctx context.Context, cfg Config) (*Client, error) {
	cfg = cfg.withDefaults()
	switch as := cfg.ComesAs(); as {
	case AsPerson:
		return newPerson(cfg)
	case AsWorkload:
	default:
		return nil, broker.Refusef(broker.ReasonInvalidArgument, "it is workload or person", "%q is no way to come to the broker", clean(broker.Shorten(string(as), 60)))
	}
	addr, err := parseAddr(cfg.Addr, EnvAddr)
	if err != nil {
		return nil, err
	}
	source, err := OpenSource(ctx, cfg)
	if err != nil {
		return nil, err
	}
	c, err := with(cfg, addr, source)
	if err != nil {
		return nil, errors.Join(err, source.Close())
	}
	return c, nil
}

func with(cfg Config, addr string, source Source) (*Client, error) {
	svid, err := source.GetX509SVID()
	if err != nil {
		return nil, identityError(err, "look at the Workload API", "our own SVID cannot be had: %s", clean(err.Error()))
	}
	pinned := cfg.BrokerID
	if pinned.IsZero() {
		if pinned, err = spiffeid.FromPath(svid.ID.TrustDomain(), brokerPath); err != nil {
			return nil, fmt.Errorf("making the broker's ID: %w", err)
		}
	}
	c := &Client{
		as: AsWorkload, addr: addr, timeout: cfg.Timeout, source: source, id: svid.ID, broker: pinned,
		transport: &transport{source: source, broker: pinned},
	}
	c.serve()
	return c, nil
}

// serve makes the services' clients.
func (c *Client) serve() {
	hc := &http.Client{
		Transport:     c.transport,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }, // the broker sends nobody elsewhere
	}
	limit := connect.WithReadMaxBytes(maxAnswer)
	c.access = mayflyv1connect.NewAccessServiceClient(hc, c.addr, limit)
	c.grants = mayflyv1connect.NewGrantServiceClient(hc, c.addr, limit)
	c.incidents = mayflyv1connect.NewIncidentServiceClient(hc, c.addr, limit)
	c.audit = mayflyv1connect.NewAuditServiceClient(hc, c.addr, limit)
	c.operator = mayflyv1connect.NewOperatorServiceClient(hc, c.addr, limit)
	c.requests = mayflyv1connect.NewRequestServiceClient(hc, c.addr, limit)
	c.policy = mayflyv1connect.NewPolicyServiceClient(hc, c.addr, limit)
	c.signIn = mayflyv1connect.NewSignInServiceClient(hc, c.addr, limit)
}

// parseAddr reads an address; variable is where it goes.
func parseAddr(s, variable string) (string, error) {
	u, err := url.Parse(s)
	if err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return "", broker.Refusef(broker.ReasonInvalidArgument, fmt.Sprintf("give it as https://host:port in %s (or --addr)", variable),
			"%q is no address of a broker", clean(broker.Shorten(s, 200)))
	}
	return strings.TrimRight(u.String(), "/"), nil
}

// As says how the client comes to the broker.
func (c *Client) As() As { return c.as }

// ID is our own SPIFFE ID, as it was when the client was made; zero for a person.
func (c *Client) ID() spiffeid.ID { return c.id }

// BrokerID is the SPIFFE ID that the broker must prove to have; zero for a
// person, to whom the broker shows a certificate for its host.
func (c *Client) BrokerID() spiffeid.ID { return c.broker }

// Addr is the broker's address.
func (c *Client) Addr() string { return c.addr }

// Close closes connections, and the identity unless it was given in Config.Source.
func (c *Client) Close() error {
	c.transport.close()
	if c.source == nil {
		return nil
	}
	return c.source.Close()
}

// call makes one call and tries again where that is safe and may help. It is
// safe for every call: those that only read, those that end something, and
// those that give and carry an idempotency key.
func call[Req, Res any](ctx context.Context, c *Client, do func(context.Context, *connect.Request[Req]) (*connect.Response[Res], error), req *Req) (*Res, error) {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	pause := backoff.NewExponentialBackOff(
		backoff.WithInitialInterval(firstPause), backoff.WithMaxInterval(maxPause), backoff.WithMaxElapsedTime(c.timeout))
	var res *Res
	var last error // says more than that the time is over, which is all that backoff says then
	try := func() error {
		r, err := do(ctx, connect.NewRequest(req))
		if err == nil {
			res, last = r.Msg, nil
			return nil
		}
		if last = c.decode(ctx, err); ctx.Err() == nil && again(last) {
			return last
		}
		return backoff.Permanent(last)
	}
	if err := backoff.Retry(try, backoff.WithContext(backoff.WithMaxRetries(pause, maxTries-1), ctx)); err != nil && last == nil {
		last = c.decode(ctx, err) // the context was over before the first try
	}
	return res, last
}

// again reports whether the same call may succeed in a moment: the broker was
// not reached, is stopping, or cannot write. What a provider failed to do is
// not asked for again: with the same key the answer stays the same.
func again(err error) bool {
	if e, ok := asType[*ConnectionError](err); ok {
		return e.kind == ErrUnreachable && !e.final
	}
	switch broker.ReasonOf(err) {
	case broker.ReasonShuttingDown, broker.ReasonStore:
		return true
	}
	return false
}
