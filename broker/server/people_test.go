package server_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"io"
	"net/http"
	"net/url"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/mayfly-security/mayfly/attestation"
	"github.com/mayfly-security/mayfly/attestation/devidp"
	"github.com/mayfly-security/mayfly/attestation/oidctest"
	"github.com/mayfly-security/mayfly/broker"
	mayflyv1 "github.com/mayfly-security/mayfly/broker/api/mayfly/v1"
)

// TestSignIn is a person's whole way: by the browser to the identity provider
// and back to the program, with a session until the sign-out.
func TestSignIn(t *testing.T) {
	t.Parallel()
	for _, protocol := range protocols {
		r := newRig(t, withPeople)
		s := r.login(ada)
		if s.GetPerson() != "person:"+ada || !cmp.Equal(s.GetGroups(), []string{"support-leads"}) || s.GetAcr() != devidp.ACRSecurityKey {
			t.Errorf("session: %v", s)
		}
		p := r.personOver(s.GetToken(), protocol)
		res, err := p.access().WhoAmI(bounded(t), connect.NewRequest(&mayflyv1.WhoAmIRequest{}))
		if err != nil {
			t.Fatal(err)
		}
		want := &mayflyv1.WhoAmIResponse{
			Id: "person:" + ada, Groups: []string{"support-leads"}, SvidExpiresAt: s.GetExpiresAt(), AuthTime: s.GetAuthTime(),
			Acr: devidp.ACRSecurityKey, SignInMethod: "browser", BrokerId: mayfly.String(), InstallationId: string(r.engine.InstallationID()),
			CatalogDigest: r.engine.Catalog().Digest(), PolicyDigest: r.engine.Catalog().Policies().Digest(),
		}
		if diff := cmp.Diff(want, res.Msg, protocmp.Transform()); diff != "" {
			t.Errorf("whoami (-want +got):\n%s", diff)
		}
		out, err := p.signIn().SignOut(bounded(t), connect.NewRequest(&mayflyv1.SignOutRequest{}))
		if err != nil || out.Msg.GetSessions() != 1 {
			t.Fatalf("signing out: %v, %v", out, err)
		}
		a := p.post("AccessService/WhoAmI", "{}")
		a.wantRefused(t, "after the sign-out", 401, broker.ReasonSessionOver)
		if got := a.header.Get("WWW-Authenticate"); !strings.HasPrefix(got, `Bearer realm="mayfly", error="invalid_token", error_description="`) {
			t.Errorf("WWW-Authenticate: %q", got)
		}
	}
}

// TestPeopleAreNoAgents: whoever a person is, nobody's credential is theirs, and
// what they may not see is not there.
func TestPeopleAreNoAgents(t *testing.T) {
	t.Parallel()
	r := newRig(t, withPeople)
	r.grant(support, "db.read")
	lease := r.client(support).issue("db.read").GetLease()
	person, operator := r.person(r.login(ada).GetToken()), r.person(r.login(olga).GetToken())
	for name, c := range map[string]*client{"a person": person, "an operator": operator} {
		c.post(issue, `{"tool": "db.read"}`).wantRefused(t, name+" who draws a credential", 403, broker.ReasonPermissionDenied)
		c.post(issue, `{"tool": "db.asked"}`).wantRefused(t, name+" who draws another", 403, broker.ReasonPermissionDenied)
	}
	person.post("AccessService/ListLeases", "{}").wantRefused(t, "everybody's leases", 403, broker.ReasonPermissionDenied)
	person.post("GrantService/ListGrants", "{}").wantRefused(t, "everybody's grants", 403, broker.ReasonPermissionDenied)
	person.post("AccessService/GetLease", `{"id": "`+lease.GetId()+`"}`).wantRefused(t, "an agent's lease", 403, broker.ReasonPermissionDenied)
	person.post("AuditService/ListEvents", `{}`).wantRefused(t, "the evidence", 403, broker.ReasonPermissionDenied)
	person.post("OperatorService/ListStrays", `{}`).wantRefused(t, "strays", 403, broker.ReasonPermissionDenied)
	if a := person.post("AccessService/RevokeLease", `{"id": "`+lease.GetId()+`"}`); a.status != 404 {
		t.Errorf("ending an agent's lease: %d %s", a.status, a.body)
	}
	if a := operator.post("AccessService/ListLeases", "{}"); a.status != 200 || !bytes.Contains(a.body, []byte(lease.GetId())) {
		t.Errorf("an operator's list: %d %s", a.status, a.body)
	}
	if a := operator.post("AuditService/ListEvents", `{"type": "session.started"}`); a.status != 200 || !bytes.Contains(a.body, []byte("person:"+ada)) {
		t.Errorf("the evidence of sessions: %d %s", a.status, a.body)
	}
}

// TestBearerTokens are taken of the identity provider, for the broker's
// audience, and in no other way.
func TestBearerTokens(t *testing.T) {
	t.Parallel()
	r := newRig(t, withPeople)
	good := r.mint(devidp.Mint{Person: ada})
	if a := r.person(good).post("AccessService/WhoAmI", "{}"); a.status != 200 || !bytes.Contains(a.body, []byte(`"bearer"`)) {
		t.Fatalf("a good token: %d %s", a.status, a.body)
	}
	parts := strings.Split(good, ".")
	claims, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		t.Fatal(err)
	}
	var c map[string]any
	if err := json.Unmarshal(claims, &c); err != nil {
		t.Fatal(err)
	}
	c["email"] = olga
	forged, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	none := base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"none","typ":"at+jwt"}`))
	session := r.login(ada).GetToken()
	for name, header := range map[string][]string{
		"for another audience": {"Bearer " + r.mint(devidp.Mint{Person: ada, Audience: "https://other.acme.test"})},
		"with another claim":   {"Bearer " + parts[0] + "." + base64.RawURLEncoding.EncodeToString(forged) + "." + parts[2]},
		"without a signature":  {"Bearer " + none + "." + parts[1] + "."},
		"cut off":              {"Bearer " + good[:len(good)-5]},
		"no token":             {"Bearer x.y.z"},
		"a session's, changed": {"Bearer " + session[:len(session)-1] + "~"},
		"Basic":                {"Basic " + base64.StdEncoding.EncodeToString([]byte("ada:x"))},
		"two headers":          {"Bearer " + session, "Bearer " + good},
		"an empty one":         {"Bearer "},
		"with a space":         {"Bearer " + session + " x"},
	} {
		req := request(t, "POST", r.people.url+"/mayfly.v1.AccessService/WhoAmI", "application/json", strings.NewReader("{}"))
		req.Header["Authorization"] = header
		a := r.person("").send(req)
		want := broker.ReasonTokenInvalid
		if name == "a session's, changed" {
			want = broker.ReasonSessionOver
		}
		a.wantRefused(t, name, 401, want)
		if got := a.header.Get("WWW-Authenticate"); !strings.Contains(got, `error="invalid_token"`) {
			t.Errorf("%s: WWW-Authenticate: %q", name, got)
		}
	}
	a := r.person("").post("AccessService/WhoAmI", "{}")
	a.wantRefused(t, "nothing", 401, broker.ReasonUnauthenticated)
	if got := a.header.Get("WWW-Authenticate"); got != `Bearer realm="mayfly"` {
		t.Errorf("WWW-Authenticate: %q", got)
	}
	for _, where := range []string{"?access_token=" + session, "?token=" + session} {
		a := r.person("").send(request(t, "POST", r.people.url+"/mayfly.v1.AccessService/WhoAmI"+where, "application/json", strings.NewReader("{}")))
		a.wantRefused(t, "a token in the address", 401, broker.ReasonUnauthenticated)
	}
	short := r.person(r.mint(devidp.Mint{Person: ada, TTL: 5 * time.Second}))
	if a := short.post("AccessService/WhoAmI", "{}"); a.status != 200 {
		t.Fatalf("before its end: %d %s", a.status, a.body)
	}
	r.ahead.Store(int64(6 * time.Second))
	short.post("AccessService/WhoAmI", "{}").wantRefused(t, "after its end", 401, broker.ReasonTokenInvalid)
}

// TestTheListenersAreApart: what lets one in at the one is nothing at the other.
func TestTheListenersAreApart(t *testing.T) {
	t.Parallel()
	r := newRig(t, withPeople)
	session := r.login(olga).GetToken()
	cert := svid(t, r.trust, sam)
	for _, protocol := range protocols {
		c := r.over(&tls.Config{RootCAs: r.people.roots, Certificates: []tls.Certificate{cert}}, protocol)
		c.url = r.people.url
		c.post("AccessService/WhoAmI", "{}").wantRefused(t, "an SVID at the people's", 401, broker.ReasonUnauthenticated)

		agents := r.clientWith(tls.Certificate{}, protocol)
		agents.http.Transport = withToken{session, agents.transport}
		agents.post("AccessService/WhoAmI", "{}").wantRefused(t, "a session at the agents'", 401, broker.ReasonUnauthenticated)
		both := r.clientWith(svid(t, r.trust, support), protocol)
		both.http.Transport = withToken{session, both.transport}
		if a := both.post("AccessService/WhoAmI", "{}"); a.status != 200 || !bytes.Contains(a.body, []byte(support.String())) {
			t.Errorf("an agent with a session's token: %d %s", a.status, a.body)
		}
		both.post("AuditService/ListEvents", "{}").wantRefused(t, "an agent with an operator's token", 403, broker.ReasonPermissionDenied)
	}
	people, agents := r.person(session), r.client(sam)
	for _, path := range []string{"/oauth2/introspect", "/.well-known/jwks.json", "/healthz", "/metrics", "/readyz"} {
		people.send(request(t, "GET", people.base()+path, "", nil)).wantRefused(t, path, 404, broker.ReasonNotFound)
	}
	for _, path := range []string{"/signin", "/signin/callback", "/", "/mayfly.v1.SignInService/GetSignIn", "/mayfly.v1.SignInService/RedeemCode"} {
		if a := agents.send(request(t, "POST", agents.base()+path, "application/json", strings.NewReader("{}"))); a.status != 404 {
			t.Errorf("agents, %s: %d", path, a.status)
		}
	}
}

// TestOtherSites: a page of another site has no business with the API.
func TestOtherSites(t *testing.T) {
	t.Parallel()
	r := newRig(t, withPeople)
	token := r.login(ada).GetToken()
	port := r.people.url[strings.LastIndexByte(r.people.url, ':'):]
	for _, origin := range []string{"https://evil.test", "null", "http://localhost" + port, "https://localhost", "https://localhost" + port + ".evil.test", "https://LOCALHOST" + port, ""} {
		for _, path := range []string{"/mayfly.v1.AccessService/WhoAmI", "/mayfly.v1.SignInService/GetSignIn", "/mayfly.v1.SignInService/StartDevice"} {
			req := request(t, "POST", r.people.url+path, "application/json", strings.NewReader("{}"))
			req.Header["Origin"] = []string{origin}
			a := r.person(token).send(req)
			a.wantRefused(t, origin+" at "+path, 403, broker.ReasonPermissionDenied)
			if a.header.Get("Access-Control-Allow-Origin") != "" {
				t.Errorf("%s is let in by CORS", origin)
			}
		}
	}
	req := request(t, "POST", r.people.url+"/mayfly.v1.AccessService/WhoAmI", "application/json", strings.NewReader("{}"))
	req.Header["Origin"] = []string{r.people.url}
	if a := r.person(token).send(req); a.status != 200 {
		t.Errorf("our own origin: %d %s", a.status, a.body)
	}
	preflight := request(t, "OPTIONS", r.people.url+"/mayfly.v1.AccessService/WhoAmI", "", nil)
	preflight.Header.Set("Origin", "https://evil.test")
	preflight.Header.Set("Access-Control-Request-Method", "POST")
	if a := r.person("").send(preflight); a.status != 403 {
		t.Errorf("a preflight: %d", a.status)
	}
}

// TestBrowserOfAnother: an attacker begins a sign-in, and has a victim's browser
// finish it; and the reverse.
func TestBrowserOfAnother(t *testing.T) {
	t.Parallel()
	r := newRig(t, withPeople)
	callback := r.people.url + "/signin/callback"
	attacker := r.browser()
	attacker.StopAt(callback)
	page, err := attacker.Walk(bounded(t), r.beginURL(), map[string]string{"person": finn, "how": "key"})
	if err != nil || !page.Stopped {
		t.Fatal(page, err)
	}
	stolen := page.URL.String() // with a good code and a good state
	victim := r.browser()
	busy := r.browser()
	r.walk(busy, ada) // has a cookie of its own
	for name, b := range map[string]*oidctest.Browser{"without a cookie": victim, "with another's cookie": busy} {
		page, err := b.Get(bounded(t), stolen)
		if err != nil || page.Stopped || page.Status != 400 || !strings.Contains(page.Body, "another browser") {
			t.Errorf("%s: %+v, %v", name, page, err)
		}
	}
	attacker.StopAt(loopback)
	page, err = attacker.Walk(bounded(t), stolen, nil)
	if err != nil || !page.Stopped || page.URL.Query().Get("code") == "" {
		t.Fatalf("the browser that began: %+v, %v", page, err)
	}
	page, err = attacker.Get(bounded(t), stolen)
	if err != nil || page.Stopped || page.Status != 400 {
		t.Errorf("the same again: %+v, %v", page, err)
	}
	u, err := url.Parse(stolen)
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(url.Values){
		"another state": func(q url.Values) { q.Set("state", challengeOf("x")) },
		"no state":      func(q url.Values) { q.Del("state") },
		"two states":    func(q url.Values) { q.Add("state", q.Get("state")) },
		"two codes":     func(q url.Values) { q.Add("code", "x") },
		"a long code":   func(q url.Values) { q.Set("code", strings.Repeat("x", 9000)) },
	} {
		q := u.Query()
		change(q)
		page, err := attacker.Get(bounded(t), callback+"?"+q.Encode())
		if err != nil || page.Stopped || page.Status != 400 {
			t.Errorf("%s: %+v, %v", name, page, err)
		}
	}
}

// question walks a browser to where its person is asked.
func (r *rig) question(b *oidctest.Browser, person, start string) *oidctest.Page {
	r.t.Helper()
	b.StopAt(r.people.url + "/signin/callback")
	page, err := b.Walk(bounded(r.t), start, map[string]string{"person": person, "how": "key"})
	if err != nil || !page.Stopped {
		r.t.Fatal(page, err)
	}
	b.StopAt(loopback)
	if page, err = b.Get(bounded(r.t), page.URL.String()); err != nil {
		r.t.Fatal(err)
	}
	return page
}

// TestASignInIsAgreedTo: a link that somebody sends to a person, who is signed in
// at the identity provider, gets nobody a session before the person has read
// what it is for and said yes, on a page that no other site can press.
func TestASignInIsAgreedTo(t *testing.T) {
	t.Parallel()
	r := newRig(t, withPeople)
	b := r.browser()
	r.walk(b, ada) // from now on the identity provider asks nothing
	page := r.question(b, "", r.beginURL())
	if page.Stopped || page.Status != 200 || len(page.Forms) != 1 {
		t.Fatalf("the browser is at %+v", page)
	}
	for _, want := range []string{ada, "port 54321", broker.SignInCheck(challengeOf(verifier))} {
		if !strings.Contains(page.Body, want) {
			t.Errorf("the page does not say %q:\n%s", want, page.Body)
		}
	}
	for name, want := range map[string]string{
		"Referrer-Policy": "same-origin", "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff",
	} {
		if got := page.Header.Get(name); got != want {
			t.Errorf("%s is %q; want %q", name, got, want)
		}
	}
	if got, want := page.Header.Get("Content-Security-Policy"), "'; base-uri 'none'; form-action 'self' http://127.0.0.1:54321; frame-ancestors 'none'"; !strings.HasPrefix(got, "default-src 'none'; style-src 'sha256-") || !strings.HasSuffix(got, want) {
		t.Errorf("Content-Security-Policy is %q; want it to end in %q", got, want)
	}
	form := page.Forms[0]
	if form.Method != "POST" || form.Action.String() != r.people.url+"/signin/agree" {
		t.Fatalf("form: %+v", form)
	}
	post := func(b *oidctest.Browser, origin, kind string, fields url.Values) *http.Response {
		t.Helper()
		req := request(t, "POST", form.Action.String(), kind, strings.NewReader(fields.Encode()))
		if origin != "" {
			req.Header.Set("Origin", origin)
		}
		res, err := b.Client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		return res
	}
	const kind = "application/x-www-form-urlencoded"
	with := func(more ...string) url.Values {
		q := url.Values{"question": form.Fields["question"], "answer": {"yes"}}
		for i := 0; i+1 < len(more); i += 2 {
			q.Add(more[i], more[i+1])
		}
		return q
	}
	busy := r.browser()
	r.walk(busy, finn)
	for name, res := range map[string]*http.Response{
		"another site's page":     post(b, "https://evil.test", kind, with()),
		"a page without a name":   post(b, "null", kind, with()),
		"plain HTTP":              post(b, strings.Replace(r.people.url, "https:", "http:", 1), kind, with()),
		"without a cookie":        post(r.browser(), r.people.url, kind, with()),
		"with another's cookie":   post(busy, r.people.url, kind, with()),
		"two answers":             post(b, r.people.url, kind, with("answer", "no")),
		"two questions":           post(b, r.people.url, kind, with("question", "x")),
		"no answer":               post(b, r.people.url, kind, url.Values{"question": form.Fields["question"]}),
		"another answer":          post(b, r.people.url, kind, url.Values{"question": form.Fields["question"], "answer": {"maybe"}}),
		"nothing":                 post(b, r.people.url, kind, nil),
		"text, as a form can say": post(b, r.people.url, "text/plain", with()),
	} {
		if res.StatusCode/100 != 4 || res.Header.Get("Location") != "" {
			t.Errorf("%s: %s to %q", name, res.Status, res.Header.Get("Location"))
		}
	}
	target := form.Action.String() + "?" + with().Encode()
	if got, err := b.Get(bounded(t), target); err != nil || got.Stopped || got.Status/100 != 4 {
		t.Errorf("by a link: %+v, %v", got, err)
	}
	// None of them ended it.
	page, err := b.Send(bounded(t), page, form, nil)
	if err != nil || !page.Stopped || page.URL.Query().Get("code") == "" {
		t.Fatalf("yes: %+v, %v", page, err)
	}
	r.redeem(page.URL.Query().Get("code"))

	page = r.question(b, "", r.beginURL())
	page, err = b.Send(bounded(t), page, page.Forms[0], map[string]string{"answer": "no"})
	if err != nil || !page.Stopped || page.URL.Query().Get("error") != "access_denied" || page.URL.Query().Has("code") {
		t.Fatalf("no: %+v, %v", page, err)
	}
	a := r.client(sam).post("AuditService/ListEvents", `{"type": "request.refused", "pageSize": 1000}`)
	if !bytes.Contains(a.body, []byte("person:"+ada)) || !bytes.Contains(a.body, []byte("did not agree")) {
		t.Errorf("a no is no evidence: %s", a.body)
	}

	page = r.question(b, "", r.beginURL("redirect_uri", "http://[::1]:54321/callback"))
	if csp := page.Header.Get("Content-Security-Policy"); !strings.Contains(csp, "form-action 'self' http:;") || !strings.Contains(page.Body, "port 54321") {
		t.Errorf("IPv6: %s\n%s", csp, page.Body)
	}
}

// TestNoOpenRedirects: /signin sends nobody anywhere but to the identity
// provider, and a code goes to a loopback address alone.
func TestNoOpenRedirects(t *testing.T) {
	t.Parallel()
	r := newRig(t, withPeople)
	p := r.person("")
	get := func(target string) answer { return p.send(request(t, "GET", target, "", nil)) }
	bad := map[string]string{"twice": r.beginURL() + "&redirect_uri=" + url.QueryEscape(loopback), "nothing": r.people.url + "/signin",
		"plain PKCE": r.beginURL("code_challenge_method", "plain"), "no age": r.beginURL("max_age", "soon"), "a negative age": r.beginURL("max_age", "-1"),
		"empty classes": r.beginURL("acr_values", "a  b"), "a broken query": r.people.url + "/signin?%zz"}
	for _, uri := range []string{"https://evil.test/", "//evil.test", "http://127.0.0.1:80@evil.test/", "http://localhost:80/", "http://127.0.0.1:1/?x", "http://127.0.0.1:1/#x", "javascript:alert(1)"} {
		bad[uri] = r.beginURL("redirect_uri", uri)
	}
	for name, target := range bad {
		a := get(target)
		if a.status != 400 || a.header.Get("Location") != "" || a.header.Get("Set-Cookie") != "" || !strings.HasPrefix(a.header.Get("Content-Type"), "text/html") || bytes.Contains(a.body, []byte("evil")) {
			t.Errorf("%s: %d %v %s", name, a.status, a.header, a.body)
		}
	}
	a := get(r.beginURL())
	if a.status != 303 || !strings.HasPrefix(a.header.Get("Location"), r.people.idp.Issuer()+"/") {
		t.Errorf("a good one: %d %v", a.status, a.header)
	}
	cookie, err := http.ParseSetCookie(a.header.Get("Set-Cookie"))
	if err != nil || !strings.HasPrefix(cookie.Name, "__Host-") || !cookie.Secure || !cookie.HttpOnly || cookie.SameSite != http.SameSiteLaxMode || cookie.Path != "/" || cookie.Domain != "" {
		t.Errorf("cookie: %+v, %v", cookie, err)
	}
	if a := p.send(request(t, "HEAD", r.beginURL(), "", nil)); a.status != 400 || a.header.Get("Set-Cookie") != "" {
		t.Errorf("HEAD: %d %v", a.status, a.header)
	}
	if a := p.send(request(t, "POST", r.beginURL(), "application/x-www-form-urlencoded", nil)); a.status == 303 {
		t.Errorf("POST: %d %v", a.status, a.header)
	}
}

// TestPageHeaders: what browsers are told with every answer.
func TestPageHeaders(t *testing.T) {
	t.Parallel()
	r := newRig(t, withPeople)
	p := r.person("")
	for _, path := range []string{"/", "/signin", "/signin/callback", "/signin/agree", "/nothing"} {
		a := p.send(request(t, "GET", r.people.url+path, "", nil))
		policy := a.header.Get("Content-Security-Policy")
		if !strings.HasPrefix(policy, "default-src 'none'; style-src 'sha256-") || !strings.HasSuffix(policy, "'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'") {
			t.Errorf("%s: Content-Security-Policy is %q", path, policy)
		}
		if _, style, ok := strings.Cut(string(a.body), "<style>"); ok {
			style, _, _ = strings.Cut(style, "</style>")
			if sum := sha256.Sum256([]byte(style)); !strings.Contains(policy, base64.StdEncoding.EncodeToString(sum[:])) {
				t.Errorf("%s: the page's style is not the one that the policy allows", path)
			}
		} else if path != "/nothing" {
			t.Errorf("%s: the page has no style: %s", path, a.body)
		}
		for name, want := range map[string]string{
			"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-store",
			"Strict-Transport-Security": "", // it is localhost, and would hold for every other program there
		} {
			if got := a.header.Get(name); got != want {
				t.Errorf("%s: %s is %q; want %q", path, name, got, want)
			}
		}
	}
	if a := p.send(request(t, "GET", r.people.url+"/", "", nil)); a.status != 200 || !bytes.Contains(a.body, []byte("sample people")) {
		t.Errorf("/: %d %s", a.status, a.body)
	}
}

// TestRedeemOnce: a code of another program, and one that comes again.
func TestRedeemOnce(t *testing.T) {
	t.Parallel()
	r := newRig(t, withPeople)
	p := r.person("")
	redeem := func(code, verifier, uri string) answer {
		body, err := json.Marshal(map[string]string{"code": code, "codeVerifier": verifier, "redirectUri": uri})
		if err != nil {
			t.Fatal(err)
		}
		return p.post("SignInService/RedeemCode", string(body))
	}
	redeem(r.walk(r.browser(), ada).Get("code"), strings.Repeat("x", 43), loopback).wantRefused(t, "another verifier", 401, broker.ReasonSignIn)
	redeem(r.walk(r.browser(), ada).Get("code"), verifier, "http://127.0.0.1:1/").wantRefused(t, "another address", 401, broker.ReasonSignIn)
	code := r.walk(r.browser(), ada).Get("code")
	s := r.redeem(code)
	redeem(code, verifier, loopback).wantRefused(t, "again", 403, broker.ReasonTokenReplayed)
	r.person(s.GetToken()).post("AccessService/WhoAmI", "{}").wantRefused(t, "the session it made", 401, broker.ReasonSessionOver)
}

// TestSessionsStandAlone takes away what a session's requests live on, while
// the connection stays open (I10).
func TestI10_SessionsStandAlone(t *testing.T) {
	t.Parallel()
	for name, lose := range map[string]func(r *rig, s *mayflyv1.Session){
		"it expires":          func(r *rig, _ *mayflyv1.Session) { r.ahead.Store(int64(time.Hour + time.Second)) },
		"an operator ends it": func(r *rig, _ *mayflyv1.Session) { r.endSessions(ada) },
		"it is signed out elsewhere": func(r *rig, s *mayflyv1.Session) {
			if a := r.person(s.GetToken()).post("SignInService/SignOut", "{}"); a.status != 200 {
				r.t.Fatal(a.status, string(a.body))
			}
		},
	} {
		for _, protocol := range protocols {
			r := newRig(t, withPeople)
			s := r.login(ada)
			p := r.personOver(s.GetToken(), protocol)
			for i, reused := range []bool{false, true} {
				if a := p.post("AccessService/WhoAmI", "{}"); a.status != 200 || a.reused != reused {
					t.Fatalf("request %d: %d %s, connection reused: %t", i, a.status, a.body, a.reused)
				}
			}
			lose(r, s)
			a := p.post("AccessService/WhoAmI", "{}")
			a.wantRefused(t, name+", "+protocol, 401, broker.ReasonSessionOver)
			if !a.reused {
				t.Errorf("%s, %s: the connection was not reused", name, protocol)
			}
		}
	}
}

// TestI10_AVoteThatWaited: a vote whose message arrives after its session was
// ended does not count, though its header was there before.
func TestI10_AVoteThatWaited(t *testing.T) {
	t.Parallel()
	for name, token := range map[string]func(r *rig) string{
		"a session": func(r *rig) string { return r.login(ada).GetToken() },
		"a token":   func(r *rig) string { r.login(ada); return r.mint(devidp.Mint{Person: ada}) },
	} {
		r := newRig(t, withPeople)
		q := r.ask()
		conn, err := tls.Dial("tcp", r.people.ln.Addr().String(), &tls.Config{RootCAs: r.people.roots, ServerName: "localhost"})
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if err := conn.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
			t.Fatal(err)
		}
		in := bufio.NewReader(conn)
		send := func(text string) *http.Response {
			t.Helper()
			if _, err := io.WriteString(conn, text); err != nil {
				t.Fatal(err)
			}
			res, err := http.ReadResponse(in, nil)
			if err != nil {
				t.Fatal(err)
			}
			return res
		}
		body := approve(q)
		// The server asks for the body when it has let the request in.
		res := send("POST /mayfly.v1.RequestService/ApproveRequest HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer " + token(r) +
			"\r\nContent-Type: application/json\r\nExpect: 100-continue\r\nContent-Length: " + strconv.Itoa(len(body)) + "\r\n\r\n")
		if res.StatusCode != http.StatusContinue {
			t.Fatalf("%s: %s", name, res.Status)
		}
		r.endSessions(ada)
		res = send(body)
		text, err := io.ReadAll(res.Body)
		if err != nil || res.StatusCode != 401 {
			t.Errorf("%s: %s %s, %v", name, res.Status, text, err)
		}
		if a := r.client(support).post("RequestService/GetRequest", `{"id": "`+q.GetId()+`"}`); !bytes.Contains(a.body, []byte(`"pending"`)) {
			t.Errorf("%s: the vote counted: %s", name, a.body)
		}
	}
}

// endSessions has an operator end all of a person's sessions.
func (r *rig) endSessions(person string) {
	r.t.Helper()
	a := r.person(r.login(olga).GetToken()).post("SignInService/SignOut", `{"person": "`+person+`", "reason": "a test"}`)
	if a.status != 200 || !bytes.Contains(a.body, []byte(`"sessions":1`)) {
		r.t.Fatalf("ending sessions: %d %s", a.status, a.body)
	}
}

func TestSignOutOfOthers(t *testing.T) {
	t.Parallel()
	r := newRig(t, withPeople)
	adas, finns := r.login(ada), r.login(finn)
	r.person(adas.GetToken()).post("SignInService/SignOut", `{"person": "`+finn+`"}`).wantRefused(t, "another's", 403, broker.ReasonPermissionDenied)
	if a := r.person(finns.GetToken()).post("AccessService/WhoAmI", "{}"); a.status != 200 {
		t.Errorf("finn: %d", a.status)
	}
	second := r.login(ada)
	if a := r.person(adas.GetToken()).post("SignInService/SignOut", `{"person": "person:`+ada+`"}`); a.status != 200 || !bytes.Contains(a.body, []byte(`"sessions":2`)) {
		t.Errorf("all of one's own: %d %s", a.status, a.body)
	}
	r.person(second.GetToken()).post("AccessService/WhoAmI", "{}").wantRefused(t, "the other of hers", 401, broker.ReasonSessionOver)
	r.person("").post("SignInService/SignOut", "{}").wantRefused(t, "nobody's", 401, broker.ReasonUnauthenticated)
	r.person(r.mint(devidp.Mint{Person: finn})).post("SignInService/SignOut", "{}").wantRefused(t, "a bearer token", 400, broker.ReasonInvalidArgument)
}

// TestSignInsAreLimited: strangers get so many tries, and those who are signed
// in are not kept out by them.
func TestSignInsAreLimited(t *testing.T) {
	t.Parallel()
	r := newRig(t, withPeople, func(r *rig) { r.limits.Attempts = 10 })
	token := r.login(ada).GetToken()
	stranger := r.person("")
	var last answer
	for range 30 {
		if last = stranger.post("SignInService/GetSignIn", "{}"); last.status != 200 {
			break
		}
	}
	last.wantRefused(t, "one too many", 429, broker.ReasonRateLimited)
	if a := stranger.send(request(t, "GET", r.beginURL(), "", nil)); a.status != 429 || !strings.HasPrefix(a.header.Get("Content-Type"), "text/html") {
		t.Errorf("the page: %d %s", a.status, a.body)
	}
	if a := r.person(token).post("AccessService/WhoAmI", "{}"); a.status != 200 {
		t.Errorf("somebody who is signed in: %d %s", a.status, a.body)
	}
}

// hanging is an identity provider that does not answer when tokens are shown.
type hanging struct {
	attestation.IdentityProvider
	asked chan struct{}
}

func (h *hanging) VerifyBearer(ctx context.Context, _ string, _ time.Time) (broker.Person, time.Time, error) {
	h.asked <- struct{}{}
	<-ctx.Done()
	return broker.Person{}, time.Time{}, ctx.Err()
}

// TestForgedTokensKeepNobodyOut: while the identity provider hangs, tokens that
// need its keys wait for them. Those who have a session do not wait with them,
// or strangers could keep people from the kill switch.
func TestForgedTokensKeepNobodyOut(t *testing.T) {
	t.Parallel()
	r := newRig(t, withPeople)
	token := r.login(olga).GetToken()
	places := 4 * runtime.GOMAXPROCS(0)
	h := &hanging{r.people.provider, make(chan struct{}, 2*places)}
	r.stop()
	r.people.shown = h
	r.start()
	var strangers sync.WaitGroup
	ctx, cancel := context.WithCancel(bounded(t))
	defer strangers.Wait()
	defer cancel()
	for range 2 * places {
		req := request(t, "POST", r.people.url+"/mayfly.v1.AccessService/WhoAmI", "application/json", strings.NewReader("{}")).WithContext(ctx)
		req.Header.Set("Authorization", "Bearer x.y.z")
		strangers.Go(func() {
			if res, err := r.person("").http.Do(req); err == nil {
				res.Body.Close()
			}
		})
	}
	for range places {
		<-h.asked
	}
	p := r.person(token)
	p.http.Timeout = 5 * time.Second
	if a := p.post("AccessService/WhoAmI", "{}"); a.status != 200 {
		t.Errorf("somebody with a session: %d %s", a.status, a.body)
	}
}

// TestPartsOfOtherPages: a page of somebody else's that names our addresses as
// its images, in the browser of an approver, does not use up the sign-ins of the
// approver's network.
func TestPartsOfOtherPages(t *testing.T) {
	t.Parallel()
	r := newRig(t, withPeople, func(r *rig) { r.limits.Attempts = 10 })
	p := r.person("")
	get := func(mode, dest string) answer {
		req := request(t, "GET", r.beginURL(), "", nil)
		req.Header.Set("Sec-Fetch-Mode", mode)
		req.Header.Set("Sec-Fetch-Dest", dest)
		return p.send(req)
	}
	for range 10 {
		for _, part := range [][2]string{{"no-cors", "image"}, {"navigate", "iframe"}, {"cors", "empty"}} {
			if a := get(part[0], part[1]); a.status != 403 || a.header.Get("Set-Cookie") != "" {
				t.Fatalf("%v: %d %v", part, a.status, a.header)
			}
		}
	}
	for range 20 {
		req := request(t, "GET", r.people.url+"/mayfly.v1.SignInService/GetSignIn", "", nil)
		req.Header.Set("Sec-Fetch-Site", "cross-site") // such a request has no Origin
		if a := p.send(req); a.status != 403 {
			t.Fatalf("an image at the API: %d", a.status)
		}
	}
	if a := get("navigate", "document"); a.status != 303 {
		t.Errorf("a person's own: %d %s", a.status, a.body)
	}
}

// ask has the agent support ask for what ada's group decides about.
func (r *rig) ask() *mayflyv1.Request {
	r.t.Helper()
	res, err := r.client(support).requests().CreateRequest(bounded(r.t), connect.NewRequest(&mayflyv1.CreateRequestRequest{Tool: "db.asked", Reason: "a ticket"}))
	if err != nil {
		r.t.Fatal(err)
	}
	if res.Msg.GetState() != "pending" {
		r.t.Fatalf("the request is %v", res.Msg)
	}
	return res.Msg
}

func approve(q *mayflyv1.Request) string {
	return `{"id": "` + q.GetId() + `", "digest": "` + q.GetDigest() + `"}`
}

// TestApproval: from an agent's request to its credential, by a person's yes.
func TestApproval(t *testing.T) {
	t.Parallel()
	r := newRig(t, withPeople)
	q := r.ask()
	r.client(support).post(issue, `{"tool": "db.asked"}`).wantRefused(t, "before", 403, broker.ReasonNoGrant)
	r.client(support).post("RequestService/ApproveRequest", approve(q)).wantRefused(t, "an agent that approves", 403, broker.ReasonPermissionDenied)
	r.person(r.login(finn).GetToken()).post("RequestService/ApproveRequest", approve(q)).wantRefused(t, "somebody else", 403, broker.ReasonNotEligible)
	a := r.person(r.login(ada).GetToken()).post("RequestService/ApproveRequest", approve(q))
	if a.status != 200 || !bytes.Contains(a.body, []byte(`"granted"`)) {
		t.Fatalf("approving: %d %s", a.status, a.body)
	}
	r.client(support).issue("db.asked")
}

// TestStepUp: an approval with an old sign-in, or by device code, is answered
// with what would do (RFC 9470); a new sign-in does.
func TestStepUp(t *testing.T) {
	t.Parallel()
	r := newRig(t, withPeople)
	browser := r.browser()
	s := r.redeem(r.walk(browser, ada).Get("code"))
	q := r.ask()
	old := r.mint(devidp.Mint{Person: ada, AuthTime: time.Now().Add(-6 * time.Minute)})
	a := r.person(old).post("RequestService/ApproveRequest", approve(q))
	a.wantRefused(t, "an old sign-in", 401, broker.ReasonStepUp)
	if a.detail.GetMaxAge() != 300 {
		t.Errorf("detail: %v", a.detail)
	}
	if got := a.header.Get("WWW-Authenticate"); !strings.Contains(got, `error="insufficient_user_authentication"`) || !strings.Contains(got, `max_age="300"`) {
		t.Errorf("WWW-Authenticate: %q", got)
	}
	device := r.device(ada)
	a = r.person(device.GetToken()).post("RequestService/ApproveRequest", approve(q))
	a.wantRefused(t, "a fresh device code", 401, broker.ReasonStepUp)
	// The browser is signed in at the identity provider still; max_age makes it ask.
	fresh := r.redeem(r.walk(browser, ada, "max_age", "300").Get("code"))
	a = r.person(fresh.GetToken()).post("RequestService/ApproveRequest", approve(q))
	if a.status != 200 {
		t.Errorf("after a new sign-in: %d %s", a.status, a.body)
	}
	if a := r.person(s.GetToken()).post("AccessService/WhoAmI", "{}"); a.status != 200 {
		t.Errorf("the session of before: %d %s", a.status, a.body)
	}
}

// TestDeviceCodesMakeNoGrants: an operator's grant asks nobody, whatever rule the
// tool has. Whoever phished the code of an operator would have every tool.
func TestDeviceCodesMakeNoGrants(t *testing.T) {
	t.Parallel()
	r := newRig(t, withPeople)
	const grant = `{"agent": "spiffe://acme.test/agent/support", "tool": "db.asked", "duration": "600s", "reason": "a ticket"}`
	phished := r.person(r.device(olga).GetToken())
	a := phished.post("GrantService/CreateGrant", grant)
	a.wantRefused(t, "by device code", 401, broker.ReasonStepUp)
	if got := a.header.Get("WWW-Authenticate"); !strings.Contains(got, `error="insufficient_user_authentication"`) {
		t.Errorf("WWW-Authenticate: %q", got)
	}
	r.client(support).post(issue, `{"tool": "db.asked"}`).wantRefused(t, "what it would give", 403, broker.ReasonNoGrant)
	if a := phished.post("GrantService/ListGrants", "{}"); a.status != 200 {
		t.Errorf("what gives nothing goes on: %d %s", a.status, a.body)
	}
	if a := r.person(r.login(olga).GetToken()).post("GrantService/CreateGrant", grant); a.status != 200 {
		t.Errorf("with a browser: %d %s", a.status, a.body)
	}
}

// device is a whole sign-in by device code.
func (r *rig) device(person string) *mayflyv1.Session {
	r.t.Helper()
	p := r.person("").signIn()
	d, err := p.StartDevice(bounded(r.t), connect.NewRequest(&mayflyv1.StartDeviceRequest{}))
	if err != nil {
		r.t.Fatal(err)
	}
	poll := connect.NewRequest(&mayflyv1.PollDeviceRequest{Handle: d.Msg.GetHandle()})
	_, err = p.PollDevice(bounded(r.t), poll)
	wantRefused(r.t, "before the person has finished", err, broker.ReasonSignInPending)
	page, err := r.browser().Walk(bounded(r.t), d.Msg.GetVerificationUriComplete(), map[string]string{"person": person, "how": "key"})
	if err != nil || page.Status != 200 {
		r.t.Fatalf("at the identity provider: %+v, %v", page, err)
	}
	r.ahead.Add(int64(d.Msg.GetInterval().AsDuration()) + int64(time.Second))
	s, err := p.PollDevice(bounded(r.t), poll)
	if err != nil {
		r.t.Fatal(err)
	}
	return s.Msg
}

// TestActFor: an agent acts on behalf of the user whose token it shows, and of
// nobody else.
func TestActFor(t *testing.T) {
	t.Parallel()
	r := newRig(t, withPeople)
	ask := func(c *client, token string) answer {
		return c.post("RequestService/CreateRequest", `{"tool": "db.asked", "reason": "for finn", "subjectToken": "`+token+`"}`)
	}
	token := r.mint(devidp.Mint{Person: finn, Audience: userAudience})
	a := ask(r.client(support), token)
	if a.status != 200 || !bytes.Contains(a.body, []byte(`"onBehalfOf":"person:`+finn+`"`)) {
		t.Fatalf("asking for finn: %d %s", a.status, a.body)
	}
	list, err := r.client(support).requests().ListRequests(bounded(t), connect.NewRequest(&mayflyv1.ListRequestsRequest{}))
	if err != nil || len(list.Msg.GetRequests()) != 1 {
		t.Fatal(list, err)
	}
	if a := r.person(r.login(ada).GetToken()).post("RequestService/ApproveRequest", approve(list.Msg.GetRequests()[0])); a.status != 200 {
		t.Fatalf("approving: %d %s", a.status, a.body)
	}
	if got := r.client(support).issue("db.asked").GetLease().GetOnBehalfOf(); got != "person:"+finn {
		t.Errorf("the lease is on behalf of %q", got)
	}
	if a := r.client(support).post("AccessService/ListLeases", "{}"); !bytes.Contains(a.body, []byte(`"onBehalfOf":"person:`+finn+`"`)) {
		t.Errorf("leases: %s", a.body)
	}
	ask(r.client(other), token).wantRefused(t, "the same token by another agent", 403, broker.ReasonTokenReplayed)
	for name, token := range map[string]string{
		"another audience": r.mint(devidp.Mint{Person: finn, Audience: "https://other.acme.test"}),
		"a bearer token":   r.mint(devidp.Mint{Person: finn}),
		"no token":         "x",
		"a session's":      r.login(finn).GetToken(),
		"a changed one":    token[:len(token)-5] + "AAAAA",
		"an endless one":   strings.Repeat("x", 9000),
	} {
		ask(r.client(support), token).wantRefused(t, name, 401, broker.ReasonTokenInvalid)
	}
	// What the agent was shown does not make it the user.
	r.person(token).post("AccessService/WhoAmI", "{}").wantRefused(t, "coming as the user", 401, broker.ReasonTokenInvalid)
	without := newRig(t)
	ask(without.client(support), token).wantRefused(t, "a broker without an identity provider", 401, broker.ReasonTokenInvalid)
}

// TestWatch follows a request on both listeners until it is granted.
func TestWatch(t *testing.T) {
	t.Parallel()
	for _, protocol := range protocols {
		r := newRig(t, withPeople)
		q := r.ask()
		states := make(chan string, 10)
		watch := func(c *client) {
			s, err := c.requests().WatchRequest(bounded(t), connect.NewRequest(&mayflyv1.WatchRequestRequest{Id: q.GetId()}))
			if err != nil {
				states <- err.Error()
				return
			}
			for s.Receive() {
				states <- s.Msg().GetState()
			}
			if s.Err() != nil {
				states <- s.Err().Error()
			}
			states <- "over"
		}
		session := r.login(ada).GetToken()
		watchers := []*client{r.clientWith(svid(t, r.trust, support), protocol), r.personOver(session, protocol)}
		for _, c := range watchers {
			go watch(c)
			if got := <-states; got != "pending" {
				t.Fatalf("%s: first %q", protocol, got)
			}
		}
		if a := r.person(session).post("RequestService/ApproveRequest", approve(q)); a.status != 200 {
			t.Fatalf("approving: %d %s", a.status, a.body)
		}
		got := map[string]int{}
		for range 2 * len(watchers) {
			got[<-states]++
		}
		if diff := cmp.Diff(map[string]int{"granted": 2, "over": 2}, got); diff != "" {
			t.Errorf("%s: %s", protocol, diff)
		}
	}
}

// TestI10_StreamsStandAlone takes away what a stream lives on while it waits:
// it ends, with the reason.
func TestI10_StreamsStandAlone(t *testing.T) {
	t.Parallel()
	cases := map[string]struct {
		person bool
		lose   func(*rig)
		want   broker.Reason
	}{
		"the session is signed out": {true, func(r *rig) { r.endSessions(ada) }, broker.ReasonSessionOver},
		"the session expires":       {true, func(r *rig) { r.ahead.Store(int64(time.Hour + time.Second)) }, broker.ReasonSessionOver},
		"the agent is disabled":     {false, func(r *rig) { r.reload("disabled: false # support", "disabled: true") }, broker.ReasonAgentDisabled},
		"the authority is gone":     {false, (*rig).rotateAuthority, broker.ReasonUntrusted},
		"the broker stops":          {false, func(r *rig) { go r.server.Shutdown(context.Background()) }, broker.ReasonShuttingDown},
		"the hour is over":          {false, func(*rig) {}, ""},
	}
	for name, c := range cases {
		for _, protocol := range protocols {
			t.Run(name+", "+protocol, func(t *testing.T) {
				t.Parallel()
				r := newRig(t, withPeople, func(r *rig) {
					r.limits.StreamTick = 20 * time.Millisecond
					if name == "the hour is over" {
						r.limits.StreamTime = 200 * time.Millisecond
					}
				})
				q := r.ask()
				watcher := r.clientWith(svid(t, r.trust, support), protocol)
				if c.person {
					watcher = r.personOver(r.login(ada).GetToken(), protocol)
				}
				s, err := watcher.requests().WatchRequest(bounded(t), connect.NewRequest(&mayflyv1.WatchRequestRequest{Id: q.GetId()}))
				if err != nil || !s.Receive() {
					t.Fatalf("watching: %v, %v", err, s.Err())
				}
				c.lose(r)
				if s.Receive() {
					t.Errorf("another message came: %v", s.Msg())
				}
				if got := broker.Reason(refusal(s.Err()).GetReason()); got != c.want || c.want == "" && s.Err() != nil {
					t.Errorf("it ended with %v; want %q", s.Err(), c.want)
				}
			})
		}
	}
}

// TestStreamsOutlastTheTimeouts of whole requests, while nothing is to be told.
func TestStreamsOutlastTheTimeouts(t *testing.T) {
	t.Parallel()
	for _, protocol := range protocols {
		r := newRig(t, withPeople, func(r *rig) {
			r.limits.StreamTick, r.limits.ReadTimeout, r.limits.WriteTimeout = 50*time.Millisecond, 300*time.Millisecond, 300*time.Millisecond
		})
		q := r.ask()
		s, err := r.clientWith(svid(t, r.trust, support), protocol).requests().WatchRequest(bounded(t), connect.NewRequest(&mayflyv1.WatchRequestRequest{Id: q.GetId()}))
		if err != nil || !s.Receive() {
			t.Fatalf("watching: %v, %v", err, s.Err())
		}
		token := r.login(ada).GetToken()
		<-time.After(700 * time.Millisecond) // the machine's own time is what is tested
		if a := r.person(token).post("RequestService/DenyRequest", `{"id": "`+q.GetId()+`", "comment": "no"}`); a.status != 200 {
			t.Fatalf("denying: %d %s", a.status, a.body)
		}
		if !s.Receive() || s.Msg().GetState() != "denied" {
			t.Errorf("%s: %v, %v", protocol, s.Msg(), s.Err())
		}
	}
}

// TestEndAccess is the kill switch by its stream, on both listeners, and the
// end of the telling where the operator's session ends meanwhile.
func TestEndAccess(t *testing.T) {
	t.Parallel()
	r := newRig(t, withPeople, func(r *rig) { r.limits.StreamTick = 20 * time.Millisecond })
	r.grant(support, "db.read")
	r.client(support).issue("db.read")
	end := func(c *client, m *mayflyv1.EndAccessRequest) (last *mayflyv1.EndAccessProgress, err error) {
		s, err := c.operations().EndAccess(bounded(t), connect.NewRequest(m))
		if err != nil {
			return nil, err
		}
		for s.Receive() {
			last = s.Msg()
		}
		return last, s.Err()
	}
	session := r.login(olga).GetToken()
	operator := r.person(session)
	for name, c := range map[string]*client{"a person": r.person(r.login(ada).GetToken()), "an agent": r.client(support)} {
		_, err := end(c, &mayflyv1.EndAccessRequest{All: true, Reason: "why"})
		wantRefused(t, name, err, broker.ReasonPermissionDenied)
	}
	_, err := end(operator, &mayflyv1.EndAccessRequest{All: true})
	wantRefused(t, "without a reason", err, broker.ReasonInvalidArgument)
	_, err = end(operator, &mayflyv1.EndAccessRequest{Agent: "support", Reason: "why"})
	wantRefused(t, "no agent", err, broker.ReasonInvalidArgument)
	for name, c := range map[string]*client{"a person": operator, "a workload": r.client(sam)} {
		got, err := end(c, &mayflyv1.EndAccessRequest{Agent: support.String(), DryRun: true})
		if err != nil || got.GetLeases() != 1 || got.GetGrants() != 1 || got.GetByTool()["db.read"] != 1 {
			t.Errorf("%s, a dry run: %v, %v", name, got, err)
		}
	}
	got, err := end(operator, &mayflyv1.EndAccessRequest{Agent: support.String(), Reason: "a test"})
	if err != nil || !got.GetDone() || got.GetAlive() != 0 {
		t.Errorf("%v, %v", got, err)
	}
	r.client(support).post(issue, `{"tool": "db.read"}`).wantRefused(t, "afterwards", 403, broker.ReasonNoGrant)

	// A provider that is deaf: it is being ended for as long as it takes.
	r.grant(support, "hostile.read")
	r.client(support).issue("hostile.read")
	r.hostile.deaf.Store(true)
	s, err := operator.operations().EndAccess(bounded(t), connect.NewRequest(&mayflyv1.EndAccessRequest{All: true, Reason: "a test"}))
	if err != nil || !s.Receive() {
		t.Fatalf("%v, %v", err, s.Err())
	}
	if a := r.person(session).post("SignInService/SignOut", "{}"); a.status != 200 {
		t.Fatal(a.status)
	}
	for s.Receive() {
		if s.Msg().GetDone() {
			t.Error("it is said to be done")
		}
	}
	wantRefused(t, "the telling", s.Err(), broker.ReasonSessionOver)
	r.hostile.deaf.Store(false)
}
