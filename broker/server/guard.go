package server

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"runtime"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"connectrpc.com/connect"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/api/mayfly/v1/mayflyv1connect"
	"github.com/mayfly-security/mayfly/broker/policy"
)

// correlationHeader carries the correlation ID of a request in its answer.
const correlationHeader = "Mayfly-Correlation-Id"

// visit is one request: who makes it, and which deliveries it carries. It is
// made anew for each request, also on a connection that was seen before (I10).
type visit struct {
	door   *door
	caller broker.Caller
	from   string // the network that it comes from
	// again finds out anew who is calling: a stream asks before each message.
	again func() (broker.Caller, error)
	// more gives the answer more time to be taken, from now.
	more func() error

	mu   sync.Mutex
	done []func() // what to call when the answer has been written
}

type visitKey struct{}

// visitOf returns the request's visit; guard put it there.
func visitOf(ctx context.Context) *visit { return ctx.Value(visitKey{}).(*visit) }

// carry keeps a delivery under way until the answer has been written.
func (v *visit) carry(done func()) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.done = append(v.done, done)
}

// current is who is calling, now that the whole message is there: it may have
// taken its time to arrive, and a person's session may have been ended meanwhile.
// What an agent's request stands on besides its SVID, the engine reads anew.
func (v *visit) current() (broker.Caller, error) {
	if v.caller.Person == nil {
		return v.caller, nil
	}
	return own(v.anew())
}

// anew finds out again who is calling, and refuses somebody else.
func (v *visit) anew() (broker.Caller, error) {
	caller, err := v.again()
	if err == nil && caller.Principal() != v.caller.Principal() {
		err = broker.Refuse(broker.ReasonUnauthenticated, "the caller is not who it was", "ask again")
	}
	return caller, err
}

func (v *visit) finish() {
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, done := range v.done {
		done()
	}
	v.done = nil
}

// door is where requests come in: one listener. What bounds it is its own, so
// that who crowds at one keeps nobody out at the other.
type door struct {
	// admit finds out who makes a request, and refuses whoever may not come in.
	// The caller of a refusal is who it was, as far as that is certain.
	admit     func(r *http.Request, now time.Time) (broker.Caller, error)
	people    bool
	slots     chan struct{} // one for each request at once
	attesting chan struct{} // one for each attestation at once
	shares    shares
}

func (s *Server) newDoor(admit func(*door, *http.Request, time.Time) (broker.Caller, error), people bool) *door {
	d := &door{people: people, slots: make(chan struct{}, s.limits.Requests), attesting: make(chan struct{}, 4*runtime.GOMAXPROCS(0))}
	d.admit = func(r *http.Request, now time.Time) (broker.Caller, error) { return admit(d, r, now) }
	return d
}

// guard stands before every handler of a listener: it bounds how many requests
// run and how much they send, authenticates the caller of each, and lets nobody
// through who is unknown or disabled.
func (s *Server) guard(d *door, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		now := s.engine.Now()
		v := &visit{door: d, from: addressOf(r).String(), caller: broker.Caller{Correlation: broker.NewCorrelationID(now)}}
		defer v.finish()
		w.Header().Set(correlationHeader, string(v.caller.Correlation))
		w.Header().Set("Cache-Control", "no-store")
		most := s.limits.Body
		if r.URL.Path == mayflyv1connect.PolicyServicePreviewProcedure {
			most = s.limits.Policies
		}
		if r.ContentLength > most {
			s.refuse(w, r, v, broker.Refusef(broker.ReasonTooLarge, "send less",
				"the body is %d bytes long; at most %d are taken", r.ContentLength, most))
			return
		}
		r.Body = http.MaxBytesReader(w, r.Body, most+1<<10) // the RPC library has its own, exact limit
		caller, err := d.admit(r, now)
		caller.Correlation = v.caller.Correlation
		v.caller = caller
		from := caller.Principal()
		if from == "" && err == nil {
			from = strangerFrom(r)
		}
		if err == nil && !d.shares.take(from, s.limits.Identity) {
			err = broker.Refusef(broker.ReasonRateLimited, "ask less at once",
				"%s has %d requests under way, and no caller has more", from, s.limits.Identity)
		}
		if err != nil {
			s.refuse(w, r, v, err)
			return
		}
		defer d.shares.give(from)
		select {
		case d.slots <- struct{}{}:
			defer func() { <-d.slots }()
		default:
			s.refuse(w, r, v, broker.Refusef(broker.ReasonRateLimited, "try again in a moment",
				"the broker has %d requests under way and takes no more", cap(d.slots)))
			return
		}
		ctx := context.WithValue(r.Context(), visitKey{}, v)
		v.again = func() (broker.Caller, error) {
			c, err := d.admit(r, s.engine.Now())
			c.Correlation = caller.Correlation
			return c, err
		}
		control := http.NewResponseController(w)
		v.more = func() error {
			return errors.Join(control.SetReadDeadline(time.Time{}), control.SetWriteDeadline(time.Now().Add(s.limits.WriteTimeout)))
		}
		filled := &errorFiller{ResponseWriter: w, correlation: v.caller.Correlation}
		defer s.caught(ctx, filled, r, v)
		next.ServeHTTP(filled, r.WithContext(ctx))
		s.engine.Refused(ctx, v.caller, "connect", "", filled.finish())
		// The bytes are handed to the connection before the delivery counts
		// as done; what closes an incident waits for that.
		_ = control.Flush()
	})
}

// attest finds out which workload is calling. It comes before a request takes a
// place, so that strangers take none from those who are known, and few run at
// once, for it costs signatures to check. An SVID must be valid by the later
// clock, too: while the machine's clock is ahead, the engine's time is no excuse
// for one that has expired.
func (s *Server) attest(d *door, r *http.Request, now time.Time) (broker.Caller, error) {
	leave, err := d.enter(r)
	if err != nil {
		return broker.Caller{}, err
	}
	defer leave()
	caller, err := s.attestor.Attest(r, now)
	if err == nil && s.engine.Late().After(caller.ValidUntil) {
		err = broker.Refusef(broker.ReasonSVIDExpired, "fetch a fresh SVID from the Workload API",
			"the SVID expired at %s", caller.ValidUntil.UTC().Format(time.RFC3339))
	}
	if err != nil {
		return broker.Caller{}, err
	}
	return caller, s.known(r, caller)
}

// enter waits for a place among those who are being authenticated.
func (d *door) enter(r *http.Request) (leave func(), err error) {
	select {
	case d.attesting <- struct{}{}:
		return func() { <-d.attesting }, nil
	case <-r.Context().Done():
		return nil, r.Context().Err()
	}
}

// known refuses identities that are nothing to this broker, and agents that
// are disabled. Resource servers are known to the providers they ask, and to
// nobody else.
func (s *Server) known(r *http.Request, caller broker.Caller) error {
	c := s.engine.Catalog()
	if a, isAgent := c.Agent(caller.ID); isAgent && a.Disabled {
		return policy.AgentRefusal(caller.ID.String(), true)
	}
	if isOAuth(r) {
		return nil
	}
	if len(c.Roles(caller.ID)) == 0 {
		return policy.AgentRefusal(caller.ID.String(), false)
	}
	return nil
}

// refuse answers a request that does not come to a handler.
func (s *Server) refuse(w http.ResponseWriter, r *http.Request, v *visit, err error) {
	s.engine.Refused(r.Context(), v.caller, "connect", "", err)
	e := rpcError(r.Context(), s.log, v.caller.Correlation, err)
	if v.door.people {
		if isPage(r) {
			s.people.failedPage(w, err)
			return
		}
		if c := challenge(err); c != "" {
			w.Header().Set("WWW-Authenticate", c)
		}
	}
	if r.ProtoMajor == 1 {
		// What is left of the body is not read. On HTTP/2 this header would
		// end the connection, and with it what others of it are waiting for.
		w.Header().Set("Connection", "close")
	}
	if werr := s.errors.Write(w, r, e); werr != nil {
		s.log.DebugContext(r.Context(), "writing a refusal", "error", werr)
	}
}

func (s *Server) recovered(ctx context.Context, spec connect.Spec, _ http.Header, p any) error {
	v := visitOf(ctx)
	s.log.ErrorContext(ctx, "a handler panicked", "procedure", spec.Procedure, "correlation", v.caller.Correlation,
		"panic", fmt.Sprint(p), "stack", string(debug.Stack()))
	return rpcError(ctx, s.log, v.caller.Correlation, broker.Refuse(broker.ReasonInternal, "something unexpected happened",
		"give the correlation ID to an operator"))
}

// caught answers for a handler that panicked outside of the RPC library, such
// as in a provider's introspection. What was answered in part is cut off.
func (s *Server) caught(ctx context.Context, w *errorFiller, r *http.Request, v *visit) {
	p := recover()
	if p == nil {
		return
	}
	if p == http.ErrAbortHandler {
		panic(p)
	}
	s.log.ErrorContext(ctx, "a handler panicked", "path", broker.Clean(broker.Shorten(r.URL.Path, 100)), "correlation", v.caller.Correlation,
		"panic", fmt.Sprint(p), "stack", string(debug.Stack()))
	if w.status != 0 && !w.holding {
		panic(http.ErrAbortHandler)
	}
	s.refuse(w.ResponseWriter, r, v, broker.Refuse(broker.ReasonInternal, "something unexpected happened",
		"give the correlation ID to an operator"))
}

func (s *Server) notFound(w http.ResponseWriter, r *http.Request) {
	v := visitOf(r.Context())
	s.refuse(w, r, v, broker.Refusef(broker.ReasonNotFound, "see the API's definition for what there is",
		"there is nothing at %s", broker.Clean(broker.Shorten(r.URL.Path, 100))))
}

var oauthPaths = []string{"/oauth2/introspect", "/.well-known/jwks.json"}

func isOAuth(r *http.Request) bool { return slices.Contains(oauthPaths, r.URL.Path) }
