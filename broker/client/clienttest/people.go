package clienttest

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"encoding/base64"
	"net/http"
	"net/url"
	"strings"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/mayfly-security/mayfly/broker"
	mayflyv1 "github.com/mayfly-security/mayfly/broker/api/mayfly/v1"
	"github.com/mayfly-security/mayfly/broker/api/mayfly/v1/mayflyv1connect"
)

// People is how people sign in at the stand-in: whoever comes is Name.
type People struct {
	Name   string // empty: ada@acme.test
	Groups []string
	// Deny is the error that the browser brings back in place of a code.
	Deny string
	// Pending is how often PollDevice says that the person is not done.
	Pending int
	Sample  bool

	sessions map[string]string     // who, by token
	codes    map[string]url.Values // what /signin was asked with, by code
	asked    []url.Values
	bearers  []string
}

func (p People) name() string {
	if p.Name == "" {
		return "ada@acme.test"
	}
	return p.Name
}

func bearerOf(h http.Header) string { return strings.TrimPrefix(h.Get("Authorization"), "Bearer ") }

// SignIns are the queries that /signin was asked with, in order.
func (b *Broker) SignIns() []url.Values {
	b.Lock()
	defer b.Unlock()
	return b.People.asked
}

// Bearers are the tokens that calls came with, in order; empty for none.
func (b *Broker) Bearers() []string {
	b.Lock()
	defer b.Unlock()
	return b.People.bearers
}

// NewSession makes a session and returns its token.
func (b *Broker) NewSession() string {
	b.Lock()
	defer b.Unlock()
	return b.session()
}

func (b *Broker) session() string {
	if b.People.sessions == nil {
		b.People.sessions = map[string]string{}
	}
	token := "mfs_" + rand.Text()
	b.People.sessions[token] = b.People.name()
	return token
}

// EndSessions ends all sessions.
func (b *Broker) EndSessions() {
	b.Lock()
	defer b.Unlock()
	clear(b.People.sessions)
}

// StartPeople serves people on a port of loopback, as Start does workloads:
// without a session's token, they can only sign in.
func (b *Broker) StartPeople(config *tls.Config) (addr string, stop func(), err error) {
	mux := http.NewServeMux()
	b.services(mux)
	path, handler := mayflyv1connect.NewSignInServiceHandler(signIn{Broker: b})
	mux.Handle(path, handler)
	mux.HandleFunc("GET /signin", b.browser)
	errors := connect.NewErrorWriter()
	return b.listen(config, b.around(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		token := bearerOf(r.Header)
		b.Lock()
		b.People.bearers = append(b.People.bearers, token)
		_, good := b.People.sessions[token]
		b.Unlock()
		open := strings.HasPrefix(r.URL.Path, path) && !strings.HasSuffix(r.URL.Path, "/SignOut") || r.URL.Path == "/signin"
		if !good && !open {
			_ = errors.Write(w, r, Refusal(connect.CodeUnauthenticated, broker.ReasonSessionOver, "the session is over", "sign in again with `mayfly login`")) // a caller that is gone is no error of ours
			return
		}
		mux.ServeHTTP(w, r)
	})))
}

// browser is the browser's part: it knows everybody already, and sends back.
func (b *Broker) browser(w http.ResponseWriter, r *http.Request) {
	b.Lock()
	defer b.Unlock()
	q := r.URL.Query()
	b.People.asked = append(b.People.asked, q)
	back := url.Values{"state": {q.Get("state")}}
	if b.People.Deny != "" {
		back.Set("error", "access_denied")
		back.Set("error_description", b.People.Deny)
	} else {
		if b.People.codes == nil {
			b.People.codes = map[string]url.Values{}
		}
		code := rand.Text()
		b.People.codes[code] = q
		back.Set("code", code)
	}
	http.Redirect(w, r, q.Get("redirect_uri")+"?"+back.Encode(), http.StatusSeeOther)
}

type signIn struct {
	*Broker
	mayflyv1connect.UnimplementedSignInServiceHandler
}

func (s signIn) GetSignIn(context.Context, *connect.Request[mayflyv1.GetSignInRequest]) (*connect.Response[mayflyv1.GetSignInResponse], error) {
	s.Lock()
	defer s.Unlock()
	return connect.NewResponse(&mayflyv1.GetSignInResponse{Issuer: "https://id.acme.test", Device: true, SamplePeople: s.People.Sample}), nil
}

// started is a new session. The caller holds the lock.
func (s signIn) started() *connect.Response[mayflyv1.Session] {
	now := s.now()
	return connect.NewResponse(&mayflyv1.Session{
		Token: s.session(), Id: string(broker.NewSessionID(now)), Person: s.People.name(), Groups: s.People.Groups,
		ExpiresAt: timestamppb.New(now.Add(time.Hour + 30*time.Second)), AuthTime: timestamppb.New(now), Acr: "urn:acme:mfa",
	})
}

func (s signIn) RedeemCode(_ context.Context, c *connect.Request[mayflyv1.RedeemCodeRequest]) (*connect.Response[mayflyv1.Session], error) {
	s.Lock()
	defer s.Unlock()
	s.keep("RedeemCode", c.Msg)
	q, ok := s.People.codes[c.Msg.GetCode()]
	delete(s.People.codes, c.Msg.GetCode())
	sum := sha256.Sum256([]byte(c.Msg.GetCodeVerifier()))
	if !ok || q.Get("code_challenge") != base64.RawURLEncoding.EncodeToString(sum[:]) || q.Get("redirect_uri") != c.Msg.GetRedirectUri() {
		return nil, Refusal(connect.CodeUnauthenticated, broker.ReasonSignIn, "the code is none", "begin again with `mayfly login`")
	}
	return s.started(), nil
}

func (s signIn) StartDevice(context.Context, *connect.Request[mayflyv1.StartDeviceRequest]) (*connect.Response[mayflyv1.StartDeviceResponse], error) {
	s.Lock()
	defer s.Unlock()
	return connect.NewResponse(&mayflyv1.StartDeviceResponse{
		Handle: "handle-of-the-device", UserCode: "WDJB-MJHT", VerificationUri: "https://id.acme.test/device",
		ExpiresAt: timestamppb.New(s.now().Add(5 * time.Minute)), Interval: durationpb.New(time.Millisecond),
	}), nil
}

func (s signIn) PollDevice(_ context.Context, c *connect.Request[mayflyv1.PollDeviceRequest]) (*connect.Response[mayflyv1.Session], error) {
	s.Lock()
	defer s.Unlock()
	s.keep("PollDevice", c.Msg)
	if s.People.Pending > 0 {
		s.People.Pending--
		return nil, Refusal(connect.CodeFailedPrecondition, broker.ReasonSignInPending, "the person is not done", "ask again")
	}
	return s.started(), nil
}

func (s signIn) SignOut(_ context.Context, c *connect.Request[mayflyv1.SignOutRequest]) (*connect.Response[mayflyv1.SignOutResponse], error) {
	s.Lock()
	defer s.Unlock()
	s.keep("SignOut", c.Msg)
	if c.Msg.GetPerson() != "" {
		return connect.NewResponse(&mayflyv1.SignOutResponse{Sessions: 2}), nil
	}
	delete(s.People.sessions, bearerOf(c.Header()))
	return connect.NewResponse(&mayflyv1.SignOutResponse{Sessions: 1}), nil
}
