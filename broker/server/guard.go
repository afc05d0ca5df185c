package server

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"runtime/debug"
	"slices"
	"strings"
	"sync"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/mayfly-security/mayfly/broker"
	mayflyv1 "github.com/mayfly-security/mayfly/broker/api/mayfly/v1"
	"github.com/mayfly-security/mayfly/broker/policy"
)

// correlationHeader carries the correlation ID of a request in its answer.
const correlationHeader = "Mayfly-Correlation-Id"

// visit is one request: who makes it, and which deliveries it carries. It is
// made anew for each request, also on a connection that was seen before (I10).
type visit struct {
	caller broker.Caller

	mu   sync.Mutex
	done []func() // what to call when the answer has been written
}

type visitKey struct{}

// visitOf returns the request's visit; guard put it there.
func visitOf(ctx context.Context) *visit { return ctx.Value(visitKey{}).(*visit) }

func callerOf(ctx context.Context) broker.Caller { return visitOf(ctx).caller }

// carry keeps a delivery under way until the answer has been written.
func (v *visit) carry(done func()) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.done = append(v.done, done)
}

func (v *visit) finish() {
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, done := range v.done {
		done()
	}
	v.done = nil
}

// guard stands before every handler of the agents' listener: it bounds how
// many requests run and how much they send, attests the caller of each, and
// lets nobody through who is unknown or disabled.
func (s *Server) guard(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		now := s.engine.Now()
		v := &visit{caller: broker.Caller{Correlation: broker.NewCorrelationID(now)}}
		defer v.finish()
		w.Header().Set(correlationHeader, string(v.caller.Correlation))
		w.Header().Set("Cache-Control", "no-store")
		select {
		case s.slots <- struct{}{}:
			defer func() { <-s.slots }()
		default:
			s.refuse(w, r, v, broker.Refusef(broker.ReasonRateLimited, "try again in a moment",
				"the broker has %d requests under way and takes no more", cap(s.slots)))
			return
		}
		if r.ContentLength > s.limits.Body {
			s.refuse(w, r, v, broker.Refusef(broker.ReasonTooLarge, "send less",
				"the body is %d bytes long; at most %d are taken", r.ContentLength, s.limits.Body))
			return
		}
		r.Body = http.MaxBytesReader(w, r.Body, s.limits.Body+1<<10) // the RPC library has its own, exact limit
		caller, err := s.attestor.Attest(r, now)
		if err == nil {
			caller.Correlation = v.caller.Correlation
			v.caller = caller
			err = s.known(r, caller)
		}
		if err != nil {
			s.refuse(w, r, v, err)
			return
		}
		ctx := context.WithValue(r.Context(), visitKey{}, v)
		filled := &errorFiller{ResponseWriter: w, correlation: v.caller.Correlation}
		next.ServeHTTP(filled, r.WithContext(ctx))
		filled.finish()
		// The bytes are handed to the connection before the delivery counts
		// as done; what closes an incident waits for that.
		_ = http.NewResponseController(w).Flush()
	})
}

// known refuses identities that are nothing to this broker, and agents that
// are disabled. Resource servers are known to the providers they ask, and to
// nobody else.
func (s *Server) known(r *http.Request, caller broker.Caller) error {
	if isOAuth(r) {
		return nil
	}
	c := s.engine.Catalog()
	if a, isAgent := c.Agent(caller.ID); isAgent && a.Disabled {
		return policy.AgentRefusal(caller.ID.String(), true)
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
	w.Header().Set("Connection", "close") // HTTP/1.1: what is left of the body is not read
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

func (s *Server) notFound(w http.ResponseWriter, r *http.Request) {
	v := visitOf(r.Context())
	s.refuse(w, r, v, broker.Refusef(broker.ReasonNotFound, "see the API's definition for what there is",
		"there is nothing at %s", broker.Clean(broker.Shorten(r.URL.Path, 100))))
}

// errorFiller gives an ErrorDetail to the errors that the RPC library makes by
// itself, so that every error of the JSON protocol has a stable reason. It
// holds back the bodies of error answers only; they are small.
type errorFiller struct {
	http.ResponseWriter
	correlation broker.CorrelationID
	status      int // 0 until the header is written, or held back
	held        bytes.Buffer
	holding     bool
}

func (f *errorFiller) Unwrap() http.ResponseWriter { return f.ResponseWriter }

func (f *errorFiller) WriteHeader(status int) {
	if f.status != 0 {
		return
	}
	f.status = status
	if status >= 400 && isJSON(f.Header().Get("Content-Type")) {
		f.holding = true
		return
	}
	f.ResponseWriter.WriteHeader(status)
}

func (f *errorFiller) Write(b []byte) (int, error) {
	if f.status == 0 {
		f.WriteHeader(http.StatusOK)
	}
	if f.holding {
		return f.held.Write(b)
	}
	return f.ResponseWriter.Write(b)
}

func isJSON(contentType string) bool {
	media, _, _ := strings.Cut(contentType, ";")
	return strings.TrimSpace(media) == "application/json"
}

// connectError is an error as the Connect protocol writes it.
type connectError struct {
	Code    string          `json:"code"`
	Message string          `json:"message,omitempty"`
	Details []connectDetail `json:"details,omitempty"`
}

type connectDetail struct {
	Type  string          `json:"type"`
	Value string          `json:"value"`
	Debug json.RawMessage `json:"debug,omitempty"`
}

func (f *errorFiller) finish() {
	if !f.holding {
		return
	}
	body := f.held.Bytes()
	var e connectError
	if json.Unmarshal(body, &e) == nil && e.Code != "" && len(e.Details) == 0 {
		body = f.fill(e, body)
	}
	f.Header().Del("Content-Length")
	f.ResponseWriter.WriteHeader(f.status)
	_, _ = f.ResponseWriter.Write(body) // a caller that is gone is no error of ours
}

func (f *errorFiller) fill(e connectError, body []byte) []byte {
	var code connect.Code
	if code.UnmarshalText([]byte(e.Code)) != nil {
		return body
	}
	refusal := reasonOfCode(code)
	detail := &mayflyv1.ErrorDetail{Reason: string(refusal.Reason), Next: refusal.Next, CorrelationId: string(f.correlation)}
	value, err := proto.Marshal(detail)
	if err != nil {
		return body
	}
	debug, err := protojson.Marshal(detail)
	if err != nil {
		return body
	}
	e.Message = broker.Clean(broker.Shorten(e.Message, 300))
	e.Details = []connectDetail{{
		Type:  string(detail.ProtoReflect().Descriptor().FullName()),
		Value: base64.RawStdEncoding.EncodeToString(value), Debug: debug,
	}}
	filled, err := json.Marshal(e)
	if err != nil {
		return body
	}
	return filled
}

// strictJSON is the JSON of the API. Unlike the RPC library's own it refuses
// fields that it does not know: a misspelt limit must not pass as none.
type strictJSON struct{}

func (strictJSON) Name() string { return "json" }

func (strictJSON) Marshal(m any) ([]byte, error) {
	msg, ok := m.(proto.Message)
	if !ok {
		return nil, fmt.Errorf("%T is no message", m)
	}
	return protojson.Marshal(msg)
}

func (strictJSON) Unmarshal(data []byte, m any) error {
	msg, ok := m.(proto.Message)
	if !ok {
		return fmt.Errorf("%T is no message", m)
	}
	if len(data) == 0 {
		data = []byte("{}")
	}
	return protojson.Unmarshal(data, msg)
}

var oauthPaths = []string{"/oauth2/introspect", "/.well-known/jwks.json"}

func isOAuth(r *http.Request) bool { return slices.Contains(oauthPaths, r.URL.Path) }
