package client_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/broker"
	mayflyv1 "github.com/mayfly-security/mayfly/broker/api/mayfly/v1"
	"github.com/mayfly-security/mayfly/broker/client"
	"github.com/mayfly-security/mayfly/broker/client/clienttest"
)

var ids = cmpopts.EquateComparable(spiffeid.ID{})

// people is a stand-in's listener for people.
type people struct {
	*clienttest.Broker
	addr, ca string
	browser  *http.Client // follows no redirect
}

func newPeople(t *testing.T) *people {
	t.Helper()
	// The certificate of httptest's servers is for 127.0.0.1 and example.com.
	s := httptest.NewUnstartedServer(nil)
	s.StartTLS()
	cert := s.TLS.Certificates[0]
	s.Close()
	p := &people{Broker: &clienttest.Broker{Tools: []*mayflyv1.Tool{
		{Name: "crm.read"}, {Name: "payments.initiate", Approval: "finance", Requestable: true, Sensitivity: "high", BreakGlass: "emergency"},
	}}}
	addr, stop, err := p.StartPeople(&tls.Config{Certificates: []tls.Certificate{cert}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stop)
	p.addr = addr
	p.ca = filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(p.ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Certificate[0]}), 0o600); err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(s.Certificate())
	p.browser = &http.Client{
		Transport:     &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	t.Cleanup(p.browser.CloseIdleConnections)
	return p
}

// client comes with a token; empty for none.
func (p *people) client(t *testing.T, token string, change ...func(*client.Config)) *client.Client {
	t.Helper()
	cfg := client.Config{PeopleAddr: p.addr, PeopleCA: p.ca, Token: client.NewToken(token)}
	for _, c := range change {
		c(&cfg)
	}
	c, err := client.New(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func TestComesAs(t *testing.T) {
	token := client.NewToken("t")
	for _, tt := range []struct {
		name string
		c    client.Config
		want client.As
	}{
		{"nothing", client.Config{}, client.AsWorkload},
		{"a workload", client.Config{WorkloadAPI: "unix:///x"}, client.AsWorkload},
		{"a token without an address", client.Config{Token: token}, client.AsWorkload},
		{"a person", client.Config{PeopleAddr: "https://x"}, client.AsPerson},
		{"a person with a token", client.Config{PeopleAddr: "https://x", Token: token}, client.AsPerson},
		{"both", client.Config{PeopleAddr: "https://x", WorkloadAPI: "unix:///x"}, client.AsWorkload},
		{"both, by files", client.Config{PeopleAddr: "https://x", Files: client.Files{Cert: "x"}}, client.AsWorkload},
		{"both, and a token", client.Config{PeopleAddr: "https://x", WorkloadAPI: "unix:///x", Token: token}, client.AsPerson},
		{"both, and said", client.Config{As: client.AsPerson, PeopleAddr: "https://x", WorkloadAPI: "unix:///x"}, client.AsPerson},
		{"said against it all", client.Config{As: client.AsWorkload, PeopleAddr: "https://x", Token: token}, client.AsWorkload},
	} {
		if got := tt.c.ComesAs(); got != tt.want {
			t.Errorf("%s comes as %s", tt.name, got)
		}
	}
	env := map[string]string{client.EnvPeopleAddr: "https://x", client.EnvPeopleCA: "ca", client.EnvToken: "secret-token"}
	c, err := client.ConfigFromEnv(func(name string) string { return env[name] })
	if err != nil || c.ComesAs() != client.AsPerson || c.PeopleCA != "ca" || c.PeopleAddr != "https://x" {
		t.Errorf("the environment gives %+v, %v", c, err)
	}
	if s := fmt.Sprintf("%v %+v %#v", c, c, c); strings.Contains(s, "secret-token") {
		t.Errorf("printing a configuration shows its token: %s", s)
	}
}

func TestWrongConfigurationsOfPeople(t *testing.T) {
	for _, tt := range []struct {
		name   string
		c      client.Config
		reason broker.Reason
		is     error
	}{
		{"no address", client.Config{As: client.AsPerson}, broker.ReasonInvalidArgument, nil},
		{"no https", client.Config{PeopleAddr: "http://127.0.0.1"}, broker.ReasonInvalidArgument, nil},
		{"somebody in the address", client.Config{PeopleAddr: "https://ada@broker.test"}, broker.ReasonInvalidArgument, nil},
		{"another way to come", client.Config{As: "ghost", PeopleAddr: "https://x"}, broker.ReasonInvalidArgument, nil},
		{"a token of two lines", client.Config{PeopleAddr: "https://x", Token: client.NewToken("secret\r\nX-Evil: 1")}, broker.ReasonTokenInvalid, nil},
		{"a token with a space", client.Config{PeopleAddr: "https://x", Token: client.NewToken("secret x")}, broker.ReasonTokenInvalid, nil},
		{"a token without end", client.Config{PeopleAddr: "https://x", Token: client.NewToken(strings.Repeat("secret", 10000))}, broker.ReasonTokenInvalid, nil},
		{"no authorities", client.Config{PeopleAddr: "https://x", PeopleCA: "/nowhere"}, broker.ReasonInternal, client.ErrIdentity},
		{"authorities that are none", client.Config{PeopleAddr: "https://x", PeopleCA: "people_test.go"}, broker.ReasonInternal, client.ErrIdentity},
	} {
		c, err := client.New(t.Context(), tt.c)
		if c != nil || broker.ReasonOf(err) != tt.reason || tt.is != nil && !errors.Is(err, tt.is) || strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
}

func TestSignIn(t *testing.T) {
	p := newPeople(t)
	nobody := p.client(t, "")
	if _, err := nobody.WhoAmI(t.Context()); broker.ReasonOf(err) != broker.ReasonSessionOver {
		t.Errorf("nobody is %v", err)
	}
	info, err := nobody.SignInInfo(t.Context())
	if err != nil || info != (client.SignInInfo{Issuer: "https://id.acme.test", Device: true}) {
		t.Errorf("signing in: %+v, %v", info, err)
	}

	const back = "http://127.0.0.1:1/callback"
	b := nobody.StartBrowser(back, broker.StepUp{MaxAge: 90*time.Second + time.Millisecond, ACR: []string{"a", "b"}})
	res, err := p.browser.Get(b.URL)
	if err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	to, err := url.Parse(res.Header.Get("Location"))
	if err != nil || !strings.HasPrefix(to.String(), back+"?") || to.Query().Get("state") != b.State {
		t.Fatalf("the browser is sent to %s, %v", to, err)
	}
	asked := p.SignIns()[0]
	if asked.Get("max_age") != "90" || asked.Get("acr_values") != "a b" || len(b.State) < 26 {
		t.Errorf("it is asked for %v", asked)
	}
	if want := broker.SignInCheck(asked.Get("code_challenge")); b.Check != want {
		t.Errorf("the person is shown %q, and on the broker's page %q", b.Check, want)
	}
	if other := nobody.StartBrowser(back, broker.StepUp{}); other.State == b.State || strings.Contains(other.URL, "max_age") {
		t.Errorf("the next sign-in is %v", other)
	} else if _, err := nobody.Redeem(t.Context(), other, to.Query().Get("code")); broker.ReasonOf(err) != broker.ReasonSignIn {
		t.Errorf("a code of another sign-in: %v", err)
	}

	res, err = p.browser.Get(b.URL)
	if err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	to, _ = url.Parse(res.Header.Get("Location"))
	s, err := nobody.Redeem(t.Context(), b, to.Query().Get("code"))
	if err != nil || s.Person != "ada@acme.test" || s.AuthTime.IsZero() || s.ExpiresAt.Before(time.Now()) || s.ACR != "urn:acme:mfa" {
		t.Fatalf("the session is %+v, %v", s, err)
	}
	token, _ := s.Token.Reveal("token")
	d, err := nobody.StartDevice(t.Context())
	if err != nil || d.UserCode != "WDJB-MJHT" || d.Interval <= 0 {
		t.Fatalf("by device: %+v, %v", d, err)
	}
	if out := fmt.Sprintf("%v %+v %#v %+v %#v %+v", s, s, s, b, b, d); token == "" || strings.Contains(out, token) || strings.Contains(out, "handle-of") {
		t.Errorf("printing shows a secret: %s", out)
	}

	c := p.client(t, token)
	who, err := c.WhoAmI(t.Context())
	if err != nil || who.Principal != "person:ada@acme.test" || !who.ID.IsZero() || who.Method != broker.SignInBrowser || who.SessionUntil.IsZero() || !who.SVIDExpiresAt.IsZero() {
		t.Errorf("somebody is %+v, %v", who, err)
	}
	if c.As() != client.AsPerson || !c.ID().IsZero() || c.Addr() != p.addr {
		t.Errorf("the client comes as %s, %s, to %s", c.As(), c.ID(), c.Addr())
	}
	if n, err := c.SignOut(t.Context(), "", ""); n != 1 || err != nil {
		t.Errorf("signing out: %d, %v", n, err)
	}
	if _, err := c.WhoAmI(t.Context()); broker.ReasonOf(err) != broker.ReasonSessionOver {
		t.Errorf("after signing out: %v", err)
	}

	p.Lock()
	p.People.Pending = 1
	p.Unlock()
	if _, err := nobody.PollDevice(t.Context(), d); broker.ReasonOf(err) != broker.ReasonSignInPending {
		t.Errorf("too early: %v", err)
	}
	if s, err := nobody.PollDevice(t.Context(), d); err != nil || s.Token.IsZero() {
		t.Errorf("by device: %+v, %v", s, err)
	}
}

// Whoever answers must prove its name; a token goes to nobody else, also where
// an answer points elsewhere.
func TestPeopleListenerMustProveItsName(t *testing.T) {
	p := newPeople(t)
	for _, tt := range []struct {
		name   string
		change func(*client.Config)
	}{
		{"the system's authorities", func(c *client.Config) { c.PeopleCA = "" }},
		{"another name", func(c *client.Config) { c.PeopleAddr = strings.Replace(c.PeopleAddr, "127.0.0.1", "localhost", 1) }},
	} {
		_, err := p.client(t, "token", tt.change).WhoAmI(t.Context())
		if e := (*client.ConnectionError)(nil); !errors.Is(err, client.ErrIdentity) || !errors.As(err, &e) || !strings.Contains(e.Next, client.EnvPeopleCA) {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
	if got := p.Bearers(); len(got) != 0 {
		t.Errorf("tokens went to whoever answered: %d", len(got))
	}

	var leaked []string
	elsewhere := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		leaked = append(leaked, r.Header.Get("Authorization"))
	}))
	defer elsewhere.Close()
	pointing := httptest.NewUnstartedServer(http.RedirectHandler(elsewhere.URL, http.StatusTemporaryRedirect))
	pointing.EnableHTTP2 = true
	pointing.StartTLS()
	defer pointing.Close()
	c := p.client(t, "token", func(c *client.Config) { c.PeopleAddr, c.Timeout = pointing.URL, time.Second })
	if _, err := c.WhoAmI(t.Context()); err == nil {
		t.Error("a redirect was an answer")
	}
	if len(leaked) != 0 {
		t.Errorf("the redirect was followed, with %q", leaked)
	}
}

func TestRequests(t *testing.T) {
	p := newPeople(t)
	c := p.client(t, p.NewSession())
	p.Drop = func(procedure string, n int) bool { return procedure == "CreateRequest" && n == 1 } // the answer is lost
	made, err := c.CreateRequest(t.Context(), client.AccessRequest{
		Tool: "payments.initiate", Agent: agentID, Params: map[string]string{"amount": "40"}, For: time.Hour, MaxUses: 2, Reason: "why",
		Ticket: "FIN-1", SubjectToken: client.NewToken("users"), BreakGlass: true,
	})
	if err != nil || made.State != broker.RequestPending || made.Agent != agentID || made.Params["amount"] != "40" || made.Duration != time.Hour ||
		made.MaxUses != 2 || made.Ticket != "FIN-1" || !made.BreakGlass || made.OnBehalfOf.Name != "user@acme.test" || made.CreatedBy != "person:ada@acme.test" ||
		made.Rule != "finance" || !made.Votable || made.Sensitivity != "high" || !slices.Equal(made.Missing, []string{"1 of finance"}) || made.Digest == "" {
		t.Fatalf("the request is %+v, %v", made, err)
	}
	if len(p.Requests) != 1 {
		t.Errorf("a lost answer cost %d requests", len(p.Requests))
	}
	if m := p.Asked("CreateRequest").(*mayflyv1.CreateRequestRequest); m.GetSubjectToken() != "users" || len(m.GetIdempotencyKey()) < 26 {
		t.Errorf("it is asked for with %v", m)
	}
	got, err := c.Request(t.Context(), made.ID)
	if diff := cmp.Diff(made, got, ids); err != nil || diff != "" {
		t.Errorf("the request is %v, and differs by %s", err, diff)
	}

	p.PageSize = 1
	for range 2 {
		if _, err := c.CreateRequest(t.Context(), client.AccessRequest{Tool: "payments.initiate", Reason: "again"}); err != nil {
			t.Fatal(err)
		}
	}
	list := func(f client.RequestFilter) (n int) {
		for _, err := range c.Requests(t.Context(), f) {
			if err != nil {
				t.Fatal(err)
			}
			n++
		}
		return n
	}
	if all, glass, none := list(client.RequestFilter{Votable: true}), list(client.RequestFilter{BreakGlass: true}), list(client.RequestFilter{Tool: "crm.read"}); all != 3 || glass != 1 || none != 0 {
		t.Errorf("it lists %d, %d, %d", all, glass, none)
	}

	if _, err := c.Approve(t.Context(), client.Vote{Request: made.ID, Digest: "other"}); broker.ReasonOf(err) != broker.ReasonConflict {
		t.Errorf("a yes to something else: %v", err)
	}
	yes, err := c.Approve(t.Context(), client.Vote{Request: made.ID, Digest: made.Digest, Comment: "fine", For: time.Minute})
	if err != nil || yes.State != broker.RequestGranted || yes.Grant == "" || len(yes.Approvals) != 1 || yes.DecidedBy != "person:ada@acme.test" {
		t.Fatalf("the yes gives %+v, %v", yes, err)
	}
	if a := yes.Approvals[0]; !a.Approved || a.Comment != "fine" || a.Duration != time.Minute || a.Person.Name != "ada@acme.test" {
		t.Errorf("the approval is %+v", a)
	}
	if _, err := c.Deny(t.Context(), client.Vote{Request: made.ID}); broker.ReasonOf(err) != broker.ReasonRequestOver {
		t.Errorf("a no to what is granted: %v", err)
	}
	if _, err := c.WithdrawRequest(t.Context(), made.ID, ""); broker.ReasonOf(err) != broker.ReasonRequestOver {
		t.Errorf("taking back what is granted: %v", err)
	}
	tools, err := c.Tools(t.Context())
	if err != nil || tools[1].ApprovalRule != "finance" || tools[1].BreakGlassRule != "emergency" || !tools[1].Requestable || tools[1].Sensitivity != "high" {
		t.Errorf("the tools are %+v, %v", tools, err)
	}
}

// What a fresh sign-in must be comes with the refusal (RFC 9470).
func TestStepUp(t *testing.T) {
	p := newPeople(t)
	c := p.client(t, p.NewSession())
	for _, tt := range []struct {
		age  time.Duration
		want time.Duration
	}{{5 * time.Minute, 5 * time.Minute}, {0, 0}, {-time.Hour, 0}} {
		p.Lock()
		p.Refuse = func(string, int) error { return clienttest.NeedsStepUp(tt.age, "urn:acme:mfa") }
		p.Unlock()
		_, err := c.Approve(t.Context(), client.Vote{Request: "r"})
		var refusal *broker.Error
		if !errors.As(err, &refusal) || refusal.Reason != broker.ReasonStepUp || refusal.StepUp.MaxAge != tt.want || !slices.Equal(refusal.StepUp.ACR, []string{"urn:acme:mfa"}) {
			t.Errorf("%s: %+v", tt.age, err)
		}
	}
}

func pending(t *testing.T, c *client.Client) broker.RequestID {
	t.Helper()
	r, err := c.CreateRequest(t.Context(), client.AccessRequest{Tool: "payments.initiate", Reason: "why"})
	if err != nil {
		t.Fatal(err)
	}
	return r.ID
}

// Waiting goes on where a broker stops and another, or itself, comes back.
func TestWatchGoesOn(t *testing.T) {
	p := newPeople(t)
	c := p.client(t, p.NewSession())
	id := pending(t, c)
	p.Lock()
	p.Refuse = func(procedure string, n int) error {
		if procedure == "WatchRequest" && n == 1 {
			return clienttest.Refusal(connect.CodeUnavailable, broker.ReasonShuttingDown, "stopping", "")
		}
		return nil
	}
	p.Cut = func(procedure string, n int) bool { return procedure == "WatchRequest" && n == 2 }
	p.Unlock()
	var states []broker.RequestState
	for r, err := range c.WatchRequest(t.Context(), id) {
		if err != nil {
			t.Fatal(err)
		}
		if states = append(states, r.State); len(states) == 2 { // of the third stream
			p.Decide(broker.RequestGranted, "person:ada@acme.test", "")
		}
	}
	if want := []broker.RequestState{broker.RequestPending, broker.RequestPending, broker.RequestGranted}; !slices.Equal(states, want) || p.Calls("WatchRequest") != 3 {
		t.Errorf("it saw %v in %d streams", states, p.Calls("WatchRequest"))
	}
}

// A broker that goes away is waited for anew each time, however long the
// waiting for the decision has lasted.
func TestWatchOutlastsOneCall(t *testing.T) {
	p := newPeople(t)
	const timeout = 200 * time.Millisecond
	c := p.client(t, p.NewSession(), func(c *client.Config) { c.Timeout = timeout })
	id := pending(t, c)
	p.Lock()
	p.Cut = func(procedure string, n int) bool {
		if n == 1 {
			time.Sleep(timeout + timeout/2) // by the clock of the client, which is the real one
		}
		return n == 1
	}
	p.Unlock()
	for r, err := range c.WatchRequest(t.Context(), id) {
		if err != nil {
			t.Fatal(err)
		}
		if p.Calls("WatchRequest") == 2 && r.State == broker.RequestPending {
			p.Decide(broker.RequestGranted, "person:ada@acme.test", "")
		}
	}
}

func TestWatchEnds(t *testing.T) {
	p := newPeople(t)
	c := p.client(t, p.NewSession(), func(c *client.Config) { c.Timeout = 300 * time.Millisecond })
	id := pending(t, c)
	last := func(ctx context.Context, id broker.RequestID, stop bool) (n int, err error) {
		for _, e := range c.WatchRequest(ctx, id) {
			if err = e; err == nil {
				n++
			}
			if stop {
				break
			}
		}
		return n, err
	}
	if n, err := last(t.Context(), "r0", false); n != 0 || broker.ReasonOf(err) != broker.ReasonNotFound {
		t.Errorf("what there is not: %d, %v", n, err)
	}
	if n, err := last(t.Context(), id, true); n != 1 || err != nil {
		t.Errorf("enough after the first: %d, %v", n, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if n, err := last(ctx, id, false); n != 1 || err == nil {
		t.Errorf("out of time: %d, %v", n, err)
	}
	gone, stop := context.WithCancel(t.Context())
	stop()
	if _, err := last(gone, id, false); !errors.Is(err, context.Canceled) {
		t.Errorf("given up: %v", err)
	}
	p.Lock()
	p.Refuse = func(string, int) error {
		return clienttest.Refusal(connect.CodeUnavailable, broker.ReasonShuttingDown, "stopping", "")
	}
	p.Unlock()
	if n, err := last(t.Context(), id, false); n != 0 || broker.ReasonOf(err) != broker.ReasonShuttingDown {
		t.Errorf("a broker that stays away: %d, %v", n, err)
	}
	p.Lock()
	p.Refuse = nil
	p.Unlock()
	p.EndSessions()
	if n, err := last(t.Context(), id, false); n != 0 || broker.ReasonOf(err) != broker.ReasonSessionOver {
		t.Errorf("after the session: %d, %v", n, err)
	}
}

// The kill switch is pulled once: what was begun is not begun again because its
// telling broke off.
func TestEndAccess(t *testing.T) {
	p := newPeople(t)
	c := p.client(t, p.NewSession())
	p.Ends = []*mayflyv1.EndAccessProgress{
		{Grants: 1, Requests: 2, Leases: 3, Alive: 3, Overdue: 1, ByTool: map[string]int32{"crm.read": 3}, Survives: []string{"sessions"}},
		{Grants: 1, Requests: 2, Leases: 3, Lapsed: 1, Done: true},
	}
	walk := func(dry bool) (all []client.Radius, err error) {
		for r, e := range c.EndAccess(t.Context(), client.Selector{Agent: agentID}, dry, "why") {
			if e != nil {
				return all, e
			}
			all = append(all, r)
		}
		return all, nil
	}
	first := client.Radius{Grants: 1, Requests: 2, Leases: 3, Alive: 3, Overdue: 1, ByTool: map[string]int{"crm.read": 3}, Survives: []string{"sessions"}}
	all, err := walk(false)
	if diff := cmp.Diff([]client.Radius{first, {Grants: 1, Requests: 2, Leases: 3, Lapsed: 1, Done: true}}, all); err != nil || diff != "" {
		t.Errorf("%v, %s", err, diff)
	}
	if m := p.Asked("EndAccess").(*mayflyv1.EndAccessRequest); m.GetAgent() != agentID.String() || m.GetReason() != "why" || m.GetDryRun() {
		t.Errorf("it was asked with %v", m)
	}
	if all, err := walk(true); err != nil || len(all) != 1 {
		t.Errorf("a dry run: %d, %v", len(all), err)
	}
	p.Lock()
	before := p.Calls
	p.Cut = func(procedure string, _ int) bool { return procedure == "EndAccess" }
	p.Unlock()
	n := before("EndAccess")
	if all, err := walk(false); len(all) != 1 || broker.ReasonOf(err) != broker.ReasonShuttingDown || before("EndAccess") != n+1 {
		t.Errorf("broken off: %d, %v, asked %d times", len(all), err, before("EndAccess")-n)
	}
	p.Lock()
	p.Cut = nil
	p.Refuse = func(_ string, k int) error {
		if k == n+2 {
			return clienttest.Refusal(connect.CodeUnavailable, broker.ReasonStore, "no store", "")
		}
		return nil
	}
	p.Unlock()
	if all, err := walk(false); len(all) != 2 || err != nil || before("EndAccess") != n+3 {
		t.Errorf("not begun: %d, %v", len(all), err)
	}
}

func TestPolicyQuestions(t *testing.T) {
	p := newPeople(t)
	c := p.client(t, p.NewSession())
	p.Explained = &mayflyv1.ExplainResponse{Summary: "s", Policies: []string{"p"}, Errors: []string{"e"}, WouldAllow: []string{"w"}, PolicyDigest: "d", Grants: []string{"g"}}
	e, err := c.Explain(t.Context(), client.Question{
		Action: "approve", Principal: "person:bob", Tool: "crm.read", Agent: agentID, Params: map[string]string{"a": "b"}, Incident: "i", Groups: []string{"g"}, Verb: "v",
	})
	if diff := cmp.Diff(client.Explanation{Summary: "s", Policies: []string{"p"}, Errors: []string{"e"}, WouldAllow: []string{"w"}, PolicyDigest: "d", Grants: []string{"g"}}, e); err != nil || diff != "" {
		t.Errorf("%v, %s", err, diff)
	}
	if m := p.Asked("Explain").(*mayflyv1.ExplainRequest); m.GetPrincipal() != "person:bob" || m.GetAgent() != agentID.String() || m.GetVerb() != "v" || m.GetIncidentId() != "i" || m.GetGroups()[0] != "g" {
		t.Errorf("it was asked with %v", m)
	}
	p.Previewed = &mayflyv1.PreviewResponse{
		Digest: "d", PresentDigest: "e", Added: []string{"a"}, Grants: 5, Decisions: 6,
		Ends:  []*mayflyv1.PreviewGrant{{GrantId: "g", Agent: agentID.String(), Tool: "t", Leases: 2, Why: "w"}},
		Turns: []*mayflyv1.PreviewDecision{{Principal: "person:bob", Action: "issue", About: "t", WasAllowed: true, Why: "w"}},
	}
	v, err := c.Preview(t.Context(), []client.PolicyFile{{Name: "a.cedar", Text: "permit"}})
	want := client.Preview{
		Digest: "d", PresentDigest: "e", Added: []string{"a"}, Grants: 5, Decisions: 6,
		Ends:  []client.PreviewGrant{{Grant: "g", Agent: agentID, Tool: "t", Leases: 2, Why: "w"}},
		Turns: []client.PreviewDecision{{Principal: "person:bob", Action: "issue", About: "t", WasAllowed: true, Why: "w"}},
	}
	if diff := cmp.Diff(want, v, ids); err != nil || diff != "" {
		t.Errorf("%v, %s", err, diff)
	}
	if m := p.Asked("Preview").(*mayflyv1.PreviewRequest); m.GetFiles()[0].GetText() != "permit" {
		t.Errorf("it was asked with %v", m)
	}
	p.Previewed.Ends[0].Agent = "no agent"
	if _, err := c.Preview(t.Context(), nil); err == nil {
		t.Error("an agent that is none was read")
	}
}
