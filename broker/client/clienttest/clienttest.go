// Package clienttest is a stand-in for a broker: it speaks the real API over
// real TLS and keeps its leases, grants, incidents and events in memory. It is
// for tests of what asks a broker. It decides nothing: whoever connects gets
// whatever the test has put in.
package clienttest

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"maps"
	"net"
	"net/http"
	"slices"
	"sync"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/mayfly-security/mayfly/broker"
	mayflyv1 "github.com/mayfly-security/mayfly/broker/api/mayfly/v1"
	"github.com/mayfly-security/mayfly/broker/api/mayfly/v1/mayflyv1connect"
)

// Broker is the stand-in. Set its fields before Start, or hold Lock.
type Broker struct {
	sync.Mutex
	WhoAmI    *mayflyv1.WhoAmIResponse
	Tools     []*mayflyv1.Tool
	Leases    []*mayflyv1.Lease
	Grants    []*mayflyv1.Grant
	Incidents []*mayflyv1.Incident
	Events    []*mayflyv1.Event
	Strays    []*mayflyv1.Stray
	// CutOffs are the roles that are cut off, or would be: CutOff answers with
	// the one of the role, and takes it one step further each time it is shown.
	CutOffs  []*mayflyv1.RoleCutOff
	Requests []*mayflyv1.Request
	// Explained and Previewed are what PolicyService answers.
	Explained *mayflyv1.ExplainResponse
	Previewed *mayflyv1.PreviewResponse
	// Ends is what EndAccess sends, one after the other; for a dry run, only
	// the first. After the last one that is not done, it stays silent.
	Ends []*mayflyv1.EndAccessProgress
	// People is how people sign in.
	People   People
	Secret   map[string]string // what every lease gives
	TTL      time.Duration     // of leases that ask for none; zero means 5 minutes
	Static   bool              // leases are static
	PageSize int               // how many items there are on a page at most; zero means as many as are asked for

	// Refuse says how a call is refused; nil lets it pass. n counts the calls
	// of the procedure from 1. The procedure is without its package.
	Refuse func(procedure string, n int) error
	// Drop says whether the answer to a call that was carried out gets lost.
	Drop func(procedure string, n int) bool
	// Cut says whether a stream breaks off after its first message, as that of a
	// broker that stops.
	Cut func(procedure string, n int) bool
	// Hold is waited for within every call, if it is set.
	Hold func(ctx context.Context, procedure string)
	// Now is the clock. Nil means time.Now.
	Now func() time.Time

	serial sync.Mutex // held while a call is carried out and answered
	calls  map[string]int
	minted map[string]*mayflyv1.IssueLeaseResponse // by idempotency key
	peers  []string
	resume bool
	wanted map[string]*mayflyv1.Request // by idempotency key
	// changed is closed when a request changed, and made anew.
	changed chan struct{}
	asked   map[string]any // the last message of a procedure
}

// Refusal is an error as the broker sends it.
func Refusal(code connect.Code, reason broker.Reason, message, next string) error {
	return detailed(code, message, &mayflyv1.ErrorDetail{Reason: string(reason), Next: next, CorrelationId: "c0correlation"})
}

// NeedsStepUp is the refusal of a sign-in that is too old or too weak (RFC 9470).
func NeedsStepUp(maxAge time.Duration, acr ...string) error {
	return detailed(connect.CodeUnauthenticated, "the sign-in is too old", &mayflyv1.ErrorDetail{
		Reason: string(broker.ReasonStepUp), Next: "sign in again", CorrelationId: "c0correlation",
		MaxAge: int64(maxAge / time.Second), AcrValues: acr,
	})
}

func detailed(code connect.Code, message string, detail *mayflyv1.ErrorDetail) error {
	e := connect.NewError(code, errors.New(message))
	d, err := connect.NewErrorDetail(detail)
	if err != nil {
		panic(err) // it can always be encoded
	}
	e.AddDetail(d)
	return e
}

// Start serves workloads on a port of loopback and returns the address and what
// stops it.
func (b *Broker) Start(config *tls.Config) (addr string, stop func(), err error) {
	mux := http.NewServeMux()
	b.services(mux)
	return b.listen(config, b.around(mux))
}

func (b *Broker) services(mux *http.ServeMux) {
	mux.Handle(mayflyv1connect.NewAccessServiceHandler(access{Broker: b}))
	mux.Handle(mayflyv1connect.NewGrantServiceHandler(grants{Broker: b}))
	mux.Handle(mayflyv1connect.NewIncidentServiceHandler(incidents{Broker: b}))
	mux.Handle(mayflyv1connect.NewAuditServiceHandler(audit{Broker: b}))
	mux.Handle(mayflyv1connect.NewOperatorServiceHandler(operator{Broker: b}))
	mux.Handle(mayflyv1connect.NewRequestServiceHandler(requests{Broker: b}))
	mux.Handle(mayflyv1connect.NewPolicyServiceHandler(policy{Broker: b}))
}

func (b *Broker) listen(config *tls.Config, handler http.Handler) (addr string, stop func(), err error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", nil, err
	}
	protocols := new(http.Protocols)
	protocols.SetHTTP2(true)
	protocols.SetHTTP1(true) // for the browser's part
	srv := &http.Server{Handler: handler, Protocols: protocols, TLSConfig: config, ReadHeaderTimeout: 10 * time.Second,
		ErrorLog: log.New(io.Discard, "", 0)} // clients that break off are part of the tests
	config.NextProtos = []string{"h2", "http/1.1"}
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = srv.Serve(tls.NewListener(ln, config)) // it ends with Close
	}()
	return "https://" + ln.Addr().String(), func() { _ = srv.Close(); <-served }, nil
}

// around counts calls, remembers who called, and injects what the test wants.
func (b *Broker) around(next http.Handler) http.Handler {
	errors := connect.NewErrorWriter()
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		procedure := r.URL.Path[max(0, 1+lastSlash(r.URL.Path)):]
		b.Lock()
		if b.calls == nil {
			b.calls = map[string]int{}
		}
		b.calls[procedure]++
		n := b.calls[procedure]
		if r.TLS != nil && len(r.TLS.PeerCertificates) > 0 {
			b.peers = append(b.peers, r.TLS.PeerCertificates[0].SerialNumber.Text(16))
			b.resume = b.resume || r.TLS.DidResume
		}
		refuse, drop, hold := b.Refuse, b.Drop, b.Hold
		b.Unlock()
		if hold != nil {
			hold(r.Context(), procedure)
		}
		if refuse != nil {
			if err := refuse(procedure, n); err != nil {
				_ = errors.Write(w, r, err) // a caller that is gone is no error of ours
				return
			}
		}
		if procedure == "WatchRequest" || procedure == "EndAccess" { // they last
			next.ServeHTTP(w, r)
			return
		}
		b.serial.Lock()
		defer b.serial.Unlock()
		if drop != nil && drop(procedure, n) {
			next.ServeHTTP(discard{w}, r)
			panic(http.ErrAbortHandler)
		}
		next.ServeHTTP(w, r)
	})
}

// discard takes an answer that never leaves.
type discard struct{ http.ResponseWriter }

func (discard) Write(b []byte) (int, error) { return len(b), nil }
func (discard) WriteHeader(int)             {}
func (discard) Flush()                      {}

func lastSlash(s string) int {
	for i := len(s) - 1; i >= 0; i-- {
		if s[i] == '/' {
			return i
		}
	}
	return -1
}

// Calls says how often a procedure was called.
func (b *Broker) Calls(procedure string) int {
	b.Lock()
	defer b.Unlock()
	return b.calls[procedure]
}

// cut is an error where a stream is to break off.
func (b *Broker) cut(procedure string) error {
	b.Lock()
	defer b.Unlock()
	if b.Cut == nil || !b.Cut(procedure, b.calls[procedure]) {
		return nil
	}
	return Refusal(connect.CodeUnavailable, broker.ReasonShuttingDown, "the broker is stopping", "try again")
}

// Asked is the last message that a procedure was called with; nil for none. It
// is kept for requests, policies, sign-ins and EndAccess.
func (b *Broker) Asked(procedure string) any {
	b.Lock()
	defer b.Unlock()
	return b.asked[procedure]
}

// keep remembers a message. The caller holds the lock.
func (b *Broker) keep(procedure string, m any) {
	if b.asked == nil {
		b.asked = map[string]any{}
	}
	b.asked[procedure] = m
}

// Minted says how many leases were made.
func (b *Broker) Minted() int {
	b.Lock()
	defer b.Unlock()
	return len(b.minted)
}

// Peers are the serial numbers of the certificates that calls came with, in
// order, in hex; Resumed says whether any TLS session was resumed.
func (b *Broker) Peers() (serials []string, resumed bool) {
	b.Lock()
	defer b.Unlock()
	return slices.Clone(b.peers), b.resume
}

// Lease returns a copy of the state of one lease: state and cause.
func (b *Broker) Lease(id string) (state, cause string) {
	b.Lock()
	defer b.Unlock()
	for _, l := range b.Leases {
		if l.GetId() == id {
			return l.GetState(), l.GetCause()
		}
	}
	return "", ""
}

func (b *Broker) now() time.Time {
	if b.Now == nil {
		return time.Now()
	}
	return b.Now()
}

// page cuts one page out of all; tokens are places.
func page[T any](b *Broker, all []T, size int32, token string) (items []T, next string, err error) {
	at := 0
	if token != "" {
		if _, err := fmt.Sscanf(token, "at%d", &at); err != nil || at > len(all) {
			return nil, "", Refusal(connect.CodeInvalidArgument, broker.ReasonInvalidArgument, "the page token is malformed", "")
		}
	}
	n := int(size)
	if n == 0 {
		n = 100
	}
	if b.PageSize > 0 {
		n = min(n, b.PageSize)
	}
	end := min(len(all), at+n)
	if end < len(all) {
		next = fmt.Sprintf("at%d", end)
	}
	return all[at:end], next, nil
}

func notFound(what string) error {
	return Refusal(connect.CodeNotFound, broker.ReasonNotFound, "there is no such "+what, "list what is yours and copy the ID whole")
}

type access struct {
	*Broker
	mayflyv1connect.UnimplementedAccessServiceHandler
}

func (a access) WhoAmI(_ context.Context, r *connect.Request[mayflyv1.WhoAmIRequest]) (*connect.Response[mayflyv1.WhoAmIResponse], error) {
	a.Lock()
	defer a.Unlock()
	if r.Header().Get("Authorization") != "" {
		return connect.NewResponse(&mayflyv1.WhoAmIResponse{
			Id: "person:" + a.People.sessions[bearerOf(r.Header())], Roles: []string{"operator"}, Groups: a.People.Groups, BrokerId: "spiffe://acme.test/mayfly",
			SvidExpiresAt: timestamppb.New(a.now().Add(time.Hour + 30*time.Second)), AuthTime: timestamppb.New(a.now().Add(-2*time.Minute - time.Second)),
			Acr: "urn:acme:mfa", SignInMethod: string(broker.SignInBrowser),
		}), nil
	}
	return connect.NewResponse(a.Broker.WhoAmI), nil
}

func (a access) ListTools(context.Context, *connect.Request[mayflyv1.ListToolsRequest]) (*connect.Response[mayflyv1.ListToolsResponse], error) {
	a.Lock()
	defer a.Unlock()
	return connect.NewResponse(&mayflyv1.ListToolsResponse{Tools: a.Tools}), nil
}

func (a access) IssueLease(_ context.Context, r *connect.Request[mayflyv1.IssueLeaseRequest]) (*connect.Response[mayflyv1.IssueLeaseResponse], error) {
	a.Lock()
	defer a.Unlock()
	m := r.Msg
	if res := a.minted[m.GetIdempotencyKey()]; res != nil {
		return connect.NewResponse(res), nil
	}
	i := slices.IndexFunc(a.Tools, func(t *mayflyv1.Tool) bool { return t.GetName() == m.GetTool() })
	if i < 0 {
		return nil, Refusal(connect.CodeNotFound, broker.ReasonToolUnknown, "there is no such tool", "see `mayfly tools`")
	}
	now, ttl := a.now(), a.TTL
	if ttl == 0 {
		ttl = 5 * time.Minute
	}
	if m.GetTtl() != nil {
		ttl = m.GetTtl().AsDuration()
	}
	l := &mayflyv1.Lease{
		Id: string(broker.NewLeaseID(now)), Agent: "spiffe://acme.test/agent/troubleshooter", Tool: m.GetTool(), Provider: a.Tools[i].GetProvider(),
		Parameters: m.GetParameters(), GrantId: "g0grant", Reason: m.GetReason(), CorrelationId: "c0correlation",
		State: string(broker.LeaseActive), CreatedAt: timestamppb.New(now), End: timestamppb.New(now.Add(ttl)), DiesAt: timestamppb.New(now.Add(ttl)),
		Survives: a.Tools[i].GetSurvives(), IsStatic: a.Static,
	}
	a.Leases = append(a.Leases, l)
	res := &mayflyv1.IssueLeaseResponse{Lease: l, Secret: maps.Clone(a.Secret), Env: a.Tools[i].GetEnv()}
	if a.minted == nil {
		a.minted = map[string]*mayflyv1.IssueLeaseResponse{}
	}
	key := m.GetIdempotencyKey()
	if key == "" {
		key = fmt.Sprint("none ", len(a.minted))
	}
	a.minted[key] = res
	return connect.NewResponse(res), nil
}

func (a access) find(id string) *mayflyv1.Lease {
	i := slices.IndexFunc(a.Leases, func(l *mayflyv1.Lease) bool { return l.GetId() == id })
	if i < 0 {
		return nil
	}
	return a.Leases[i]
}

func (a access) GetLease(_ context.Context, r *connect.Request[mayflyv1.GetLeaseRequest]) (*connect.Response[mayflyv1.Lease], error) {
	a.Lock()
	defer a.Unlock()
	if l := a.find(r.Msg.GetId()); l != nil {
		return connect.NewResponse(l), nil
	}
	return nil, notFound("lease")
}

func (a access) ListLeases(_ context.Context, r *connect.Request[mayflyv1.ListLeasesRequest]) (*connect.Response[mayflyv1.ListLeasesResponse], error) {
	a.Lock()
	defer a.Unlock()
	m := r.Msg
	var all []*mayflyv1.Lease
	for _, l := range a.Leases {
		ended := broker.LeaseState(l.GetState()).Ended()
		if (m.GetAll() || !ended) && (m.GetTool() == "" || m.GetTool() == l.GetTool()) && (!m.GetOverdue() || l.GetOverdue()) &&
			(m.GetAgent() == "" || m.GetAgent() == l.GetAgent()) && (m.GetIncidentId() == "" || m.GetIncidentId() == l.GetIncidentId()) &&
			(m.GetGrantId() == "" || m.GetGrantId() == l.GetGrantId()) {
			all = append(all, l)
		}
	}
	items, next, err := page(a.Broker, all, m.GetPageSize(), m.GetPageToken())
	return connect.NewResponse(&mayflyv1.ListLeasesResponse{Leases: items, NextPageToken: next}), err
}

func (a access) RevokeLease(_ context.Context, r *connect.Request[mayflyv1.RevokeLeaseRequest]) (*connect.Response[mayflyv1.Lease], error) {
	a.Lock()
	defer a.Unlock()
	l := a.find(r.Msg.GetId())
	if l == nil {
		return nil, notFound("lease")
	}
	if !broker.LeaseState(l.GetState()).Ended() {
		l.State, l.Cause, l.EndedAt = string(broker.LeaseRevoked), string(broker.CauseReturned), timestamppb.New(a.now())
	}
	return connect.NewResponse(l), nil
}
