package signin_test

import (
	"errors"
	"fmt"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/mayfly-security/mayfly/attestation"
	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/signin"
)

// TestRedirectURIs: a code goes to a port of the person's own machine, and
// nowhere else.
func TestRedirectURIs(t *testing.T) {
	for uri, good := range map[string]bool{
		"http://127.0.0.1:8080/callback":                     true,
		"http://[::1]:1/":                                    true,
		"http://127.0.0.1:65535/a/b.c_d~e-f":                 true,
		"":                                                   false,
		"/callback":                                          false,
		"//evil.test/callback":                               false,
		"https://evil.test/":                                 false,
		"http://evil.test:80/":                               false,
		"http://127.0.0.1/callback":                          false, // no port
		"http://127.0.0.1:/callback":                         false,
		"http://127.0.0.1:0/callback":                        false,
		"http://127.0.0.1:65536/callback":                    false,
		"http://127.0.0.1:99999999999999999999/callback":     false,
		"http://127.0.0.1:8080":                              false, // no path
		"http://127.0.0.1:8080@evil.test/":                   false,
		"http://127.0.0.1:8080@evil.test:80/":                false,
		"http://user@127.0.0.1:8080/":                        false,
		"http://user:pw@127.0.0.1:8080/":                     false,
		"http://127.0.0.1.evil.test:8080/":                   false,
		"http://127.0.0.1:8080.evil.test/":                   false,
		"http://127.0.0.2:8080/":                             false,
		"http://127.1:8080/":                                 false,
		"http://2130706433:8080/":                            false,
		"http://0x7f.0.0.1:8080/":                            false,
		"http://0.0.0.0:8080/":                               false,
		"http://localhost:8080/":                             false,
		"http://LOCALHOST:8080/":                             false,
		"http://[::]:8080/":                                  false,
		"http://[::ffff:127.0.0.1]:8080/":                    false,
		"http://[0:0:0:0:0:0:0:1]:8080/":                     false,
		"http://[::1%25lo]:8080/":                            false,
		"HTTP://127.0.0.1:8080/":                             false,
		"https://127.0.0.1:8080/":                            false,
		"javascript:alert(1)//127.0.0.1:8080/":               false,
		"http://127.0.0.1:8080/?next=https://evil.test":      false,
		"http://127.0.0.1:8080/callback#x":                   false,
		"http://127.0.0.1:8080/callback\r\nSet-Cookie:a=b":   false,
		"http://127.0.0.1:8080/callback\n":                   false,
		"http://127.0.0.1:8080/%0d%0aSet-Cookie:a=b":         false,
		`http://127.0.0.1:8080\@evil.test/`:                  false,
		`http:\\127.0.0.1:8080/`:                             false,
		"http://127.0.0.1:8080/ ":                            false,
		" http://127.0.0.1:8080/":                            false,
		"http://127.0.0.1:8080/" + strings.Repeat("a", 101):  false,
		"http://127.0.0.1:8080/\u202eevil":                   false,
		"http://127.0.0.1:8080/callback;http://evil.test:80": false,
	} {
		r := newRig(t)
		s := start()
		s.RedirectURI = uri
		_, err := r.m.Begin(s)
		if (err == nil) != good {
			t.Errorf("%q: %v; want good: %t", uri, err, good)
		}
		if err != nil && broker.ReasonOf(err) != broker.ReasonInvalidArgument {
			t.Errorf("%q: %v", uri, err)
		}
	}
}

func TestBeginRefusals(t *testing.T) {
	r := newRig(t)
	for name, change := range map[string]func(*signin.Start){
		"no state":                    func(s *signin.Start) { s.State = "" },
		"a long state":                func(s *signin.Start) { s.State = strings.Repeat("s", 513) },
		"a state with a line end":     func(s *signin.Start) { s.State = "a\r\nb" },
		"a state with a space":        func(s *signin.Start) { s.State = "a b" },
		"a state beyond ASCII":        func(s *signin.Start) { s.State = "é" },
		"no challenge":                func(s *signin.Start) { s.Challenge = "" },
		"a plain challenge":           func(s *signin.Start) { s.Challenge = verifier },
		"a challenge that is none":    func(s *signin.Start) { s.Challenge = strings.Repeat("!", 43) },
		"a challenge with spare bits": func(s *signin.Start) { s.Challenge = strings.Repeat("_", 43) },
		"a challenge with a line end": func(s *signin.Start) { s.Challenge = s.Challenge[:42] + "\n" },
		"a negative age":              func(s *signin.Start) { s.Need.MaxAge = -1 },
		"an absurd age":               func(s *signin.Start) { s.Need.MaxAge = 31 * 24 * time.Hour },
		"an empty class":              func(s *signin.Start) { s.Need.ACR = []string{""} },
		"a class with a space":        func(s *signin.Start) { s.Need.ACR = []string{"a b"} },
		"a long class":                func(s *signin.Start) { s.Need.ACR = []string{strings.Repeat("a", 101)} },
		"eleven classes":              func(s *signin.Start) { s.Need.ACR = strings.Split("a b c d e f g h i j k", " ") },
	} {
		s := start()
		change(&s)
		_, err := r.m.Begin(s)
		wantReason(t, name, err, broker.ReasonInvalidArgument)
	}
	if n := r.m.Pending(); n != 0 {
		t.Errorf("%d refused sign-ins are under way", n)
	}
	s := start()
	s.State = strings.Repeat("s", 512)
	if _, err := r.m.Begin(s); err != nil {
		t.Errorf("a state of 512 characters: %v", err)
	}
}

// TestWrongReturns are returns of a browser that lead to a page, and not to a
// program: nobody knows whose browser it is. None of them ends the sign-in.
func TestWrongReturns(t *testing.T) {
	r := newRig(t)
	state, browser := r.begin(start())
	otherState, otherBrowser := r.begin(start())
	for name, ret := range map[string]signin.Return{
		"no cookie":                   {State: state, Code: "idp-code"},
		"another browser's cookie":    {State: state, Code: "idp-code", Browser: otherBrowser},
		"another browser's state":     {State: otherState, Code: "idp-code", Browser: browser},
		"no state":                    {Code: "idp-code", Browser: browser},
		"a state that nobody gave":    {State: "x", Code: "idp-code", Browser: browser},
		"the program's state":         {State: start().State, Code: "idp-code", Browser: browser},
		"another identity provider":   {State: state, Code: "idp-code", Browser: browser, Issuer: "https://evil.test"},
		"an error in another browser": {State: state, Error: "access_denied", Browser: otherBrowser},
	} {
		to, err := r.m.Callback(t.Context(), ret)
		wantReason(t, name, err, broker.ReasonSignIn)
		if to != (signin.Landing{}) {
			t.Errorf("%s: the browser would be at %+v", name, to)
		}
	}
	if r.idp.asked != 0 {
		t.Error("the identity provider was asked")
	}
	if r.back(state, browser).Get("code") == "" {
		t.Error("the sign-in was ended by somebody else's return")
	}
	_, err := r.m.Callback(t.Context(), signin.Return{State: state, Code: "idp-code", Browser: browser})
	wantReason(t, "the same return again", err, broker.ReasonSignIn)
}

// TestABrowserKeepsItsSecret: two sign-ins at once in one browser both end well;
// a secret that is malformed is not taken on.
func TestABrowserKeepsItsSecret(t *testing.T) {
	r := newRig(t)
	one, browser := r.begin(start())
	s := start()
	s.Browser = browser
	two, same := r.begin(s)
	if same != browser || one == two {
		t.Errorf("browser: %t, state: %t", same == browser, one == two)
	}
	for _, state := range []string{one, two} {
		if r.back(state, browser).Get("code") == "" {
			t.Error("there is no code")
		}
	}
	for _, bad := range []string{"x", browser + "x", strings.Repeat("!", 43)} {
		s.Browser = bad
		if _, got := r.begin(s); got == bad || len(got) != 43 {
			t.Errorf("the browser keeps %q", got)
		}
	}
}

// TestFailedSignIns are told to the program, which is the browser's own.
func TestFailedSignIns(t *testing.T) {
	for name, c := range map[string]struct {
		ret    signin.Return
		change func(*rig)
		want   string
	}{
		"the person said no":         {ret: signin.Return{Error: "access_denied"}, want: "access_denied"},
		"an error nobody knows":      {ret: signin.Return{Error: "\x1b[31mevil&code=x"}, want: "server_error"},
		"no code":                    {want: "server_error"},
		"the identity provider errs": {ret: signin.Return{Code: "idp-code"}, change: func(r *rig) { r.idp.err = errors.New("upstream-says") }, want: "server_error"},
		"a person without a name":    {ret: signin.Return{Code: "idp-code"}, change: func(r *rig) { r.idp.person.Name = "" }, want: "server_error"},
		"a name that divides keys":   {ret: signin.Return{Code: "idp-code"}, change: func(r *rig) { r.idp.person.Name = "a|b" }, want: "server_error"},
		"a name with a trick":        {ret: signin.Return{Code: "idp-code"}, change: func(r *rig) { r.idp.person.Name = "a\u202eb" }, want: "server_error"},
		"a long name":                {ret: signin.Return{Code: "idp-code"}, change: func(r *rig) { r.idp.person.Name = strings.Repeat("a", 201) }, want: "server_error"},
		"a person without an issuer": {ret: signin.Return{Code: "idp-code"}, change: func(r *rig) { r.idp.person.Issuer = "" }, want: "server_error"},
		"a person without a subject": {ret: signin.Return{Code: "idp-code"}, change: func(r *rig) { r.idp.person.Subject = "" }, want: "server_error"},
		"a code of somebody else's":  {ret: signin.Return{Code: "stolen"}, want: "server_error"},
	} {
		r := newRig(t)
		if c.change != nil {
			c.change(r)
		}
		c.ret.State, c.ret.Browser = r.begin(start())
		l, err := r.m.Callback(t.Context(), c.ret)
		to := l.To
		u, perr := url.Parse(to)
		if err != nil || perr != nil || !strings.HasPrefix(to, loopback+"?") {
			t.Errorf("%s: %q, %v", name, to, err)
			continue
		}
		q := u.Query()
		if q.Get("error") != c.want || q.Get("state") != "the-program's-state" || q.Has("code") || strings.Contains(to, "upstream-says") || strings.Contains(to, "evil") {
			t.Errorf("%s: %v", name, q)
		}
	}
}

// TestStepUp: what was asked of the sign-in is compared by us, whatever the
// identity provider did with it (RFC 9470).
func TestStepUp(t *testing.T) {
	need := broker.StepUp{MaxAge: 5 * time.Minute, ACR: []string{"gold", "silver"}}
	for name, c := range map[string]struct {
		age  time.Duration
		none bool
		acr  string
		took time.Duration // by the person, at the identity provider
		ok   bool
	}{
		"fresh and strong":               {acr: "gold", ok: true},
		"the other class":                {acr: "silver", ok: true},
		"just fresh enough":              {acr: "gold", age: 5 * time.Minute, ok: true},
		"too old":                        {acr: "gold", age: 5*time.Minute + time.Second},
		"no auth_time":                   {acr: "gold", none: true},
		"a minute to come":               {acr: "gold", age: -time.Minute, ok: true},
		"more than a minute to come":     {acr: "gold", age: -61 * time.Second},
		"another class":                  {acr: "bronze"},
		"no class":                       {},
		"after the beginning, but slow":  {acr: "gold", took: 8 * time.Minute, ok: true},
		"before the beginning, and slow": {acr: "gold", took: 8 * time.Minute, age: time.Second},
	} {
		r := newRig(t)
		s := start()
		s.Need = need
		state, browser := r.begin(s)
		r.idp.person.AuthTime, r.idp.person.ACR = r.now.Add(-c.age), c.acr
		if c.none {
			r.idp.person.AuthTime = time.Time{}
		}
		r.now = r.now.Add(c.took)
		q := r.back(state, browser)
		if ok := q.Has("code"); ok != c.ok || !ok && q.Get("error") != "insufficient_user_authentication" {
			t.Errorf("%s: %v; want ok: %t", name, q, c.ok)
		}
	}
}

func TestRedeem(t *testing.T) {
	r := newRig(t)
	token, s := r.signIn()
	p, until, err := r.m.Authenticate(t.Context(), token)
	if err != nil {
		t.Fatal(err)
	}
	want := r.idp.person
	want.Method, want.Session = broker.SignInBrowser, s.Person.Session
	if diff := cmp.Diff(want, p); diff != "" || !until.Equal(r.now.Add(time.Hour)) || s.Person.Session == "" {
		t.Errorf("until %v; person (-want +got):\n%s", until, diff)
	}
	if len(r.seen) != 1 || r.seen[0].Name != "ada@acme.test" {
		t.Errorf("the engine heard of %v", r.seen)
	}
	if !strings.HasPrefix(token, "mayfly_session_") || len(token) != len("mayfly_session_")+43 {
		t.Errorf("the token has %d characters", len(token))
	}
}

// TestRedeemRefusals: a code is good for one try, of the program that began.
func TestRedeemRefusals(t *testing.T) {
	type try struct{ code, verifier, redirect string }
	for name, c := range map[string]struct {
		change func(*try)
		after  time.Duration
	}{
		"another code":         {change: func(s *try) { s.code = "x" }},
		"another verifier":     {change: func(s *try) { s.verifier = strings.Repeat("v", 43) }},
		"no verifier":          {change: func(s *try) { s.verifier = "" }},
		"the challenge itself": {change: func(s *try) { s.verifier = challengeOf(verifier) }},
		"another address":      {change: func(s *try) { s.redirect = "http://127.0.0.1:54322/callback" }},
		"no address":           {change: func(s *try) { s.redirect = "" }},
		"the other loopback":   {change: func(s *try) { s.redirect = "http://[::1]:54321/callback" }},
		"a minute later":       {after: time.Minute},
		"the next day":         {after: 24 * time.Hour},
	} {
		r := newRig(t)
		code := r.code()
		s := try{code, verifier, loopback}
		if c.change != nil {
			c.change(&s)
		}
		r.now = r.now.Add(c.after)
		_, err := r.m.Redeem(t.Context(), s.code, s.verifier, s.redirect, "c1")
		wantReason(t, name, err, broker.ReasonSignIn)
		if s.code == code {
			if _, err := r.redeem(code); err == nil {
				t.Errorf("%s: the code was good for another try", name)
			}
		}
		if len(r.seen) != 0 || len(r.events()) != 0 {
			t.Errorf("%s: something came of it", name)
		}
	}
	r := newRig(t)
	code := r.code()
	r.deny = broker.Refuse(broker.ReasonStore, "no", "no")
	_, err := r.redeem(code)
	wantReason(t, "an engine that cannot hear of the person", err, broker.ReasonStore)
	if len(r.events()) != 0 {
		t.Error("a session began without the engine")
	}
	short := start()
	short.Challenge = challengeOf("too-short")
	r = newRig(t)
	_, err = r.m.Redeem(t.Context(), r.back(r.begin(short)).Get("code"), "too-short", loopback, "c1")
	wantReason(t, "a short verifier", err, broker.ReasonSignIn)
}

// TestReplayedCode: a code that comes again, from whomever, ends the session
// that it made.
func TestReplayedCode(t *testing.T) {
	r := newRig(t)
	code := r.code()
	s, err := r.redeem(code)
	if err != nil {
		t.Fatal(err)
	}
	token, _ := s.Token.Reveal("token")
	bystander, _ := r.signIn()
	changed := r.m.Changed()
	r.now = r.now.Add(5 * time.Minute)
	_, err = r.m.Redeem(t.Context(), code, "another verifier", loopback, "c2")
	wantReason(t, "the replay", err, broker.ReasonTokenReplayed)
	r.wantSession(token, broker.ReasonSessionOver)
	r.wantSession(bystander, "")
	select {
	case <-changed:
	default:
		t.Error("streams did not hear of it")
	}
	if diff := cmp.Diff([]string{"code_replayed"}, r.causes()); diff != "" {
		t.Error(diff)
	}
}

// TestFlowsAreBounded: strangers can begin as many sign-ins as they like.
func TestFlowsAreBounded(t *testing.T) {
	r := newRig(t)
	first, browser := r.begin(start())
	for range signin.MostFlows - 1 {
		r.begin(start())
	}
	if n := r.m.Pending(); n != signin.MostFlows {
		t.Fatalf("%d under way", n)
	}
	second, sb := r.begin(start())
	if n := r.m.Pending(); n != signin.MostFlows {
		t.Fatalf("%d under way", n)
	}
	_, err := r.m.Callback(t.Context(), signin.Return{State: first, Code: "idp-code", Browser: browser})
	wantReason(t, "the oldest", err, broker.ReasonSignIn)
	if !r.back(second, sb).Has("code") {
		t.Error("the newest does not go on")
	}
	r.now = r.now.Add(10 * time.Minute)
	if n := r.m.Pending(); n != 0 {
		t.Errorf("%d under way after ten minutes", n)
	}
}

// TestAFloodEndsItsOwn: whoever begins very many sign-ins, by browser or device
// code, ends their own, and those of nobody else.
func TestAFloodEndsItsOwn(t *testing.T) {
	r := newRig(t)
	r.idp.device = attestation.DeviceSignIn{DeviceCode: broker.NewSecret(map[string]string{"device_code": "x"}), ExpiresAt: r.now.Add(time.Hour), Interval: time.Second}
	honest := start()
	honest.From = "192.0.2.1/32"
	state, browser := r.begin(honest)
	d, err := r.m.StartDevice(t.Context(), honest.From)
	if err != nil {
		t.Fatal(err)
	}
	handle, _ := d.Handle.Reveal("handle")
	s := start()
	var last, lastBrowser string
	for i := range 3 * signin.MostFlows {
		s.From = fmt.Sprint("198.51.100.", i%3)
		last, lastBrowser = r.begin(s)
		if _, err := r.m.StartDevice(t.Context(), s.From); err != nil {
			t.Fatal(err)
		}
	}
	if n := r.m.Pending(); n != signin.MostFlows {
		t.Errorf("%d under way", n)
	}
	if !r.back(state, browser).Has("code") || !r.back(last, lastBrowser).Has("code") {
		t.Error("a sign-in does not go on")
	}
	if _, err := r.m.PollDevice(t.Context(), handle, "c1"); err != nil {
		t.Errorf("the device code: %v", err)
	}
}

// TestAnAnswerWithoutItsIssuer: where the identity provider says that its answers
// name it (RFC 9207), one that does not is another's.
func TestAnAnswerWithoutItsIssuer(t *testing.T) {
	r := newRig(t)
	r.idp.named = true
	state, browser := r.begin(start())
	for name, ret := range map[string]signin.Return{
		"a code":   {State: state, Code: "idp-code", Browser: browser},
		"an error": {State: state, Error: "access_denied", Browser: browser},
	} {
		to, err := r.m.Callback(t.Context(), ret)
		wantReason(t, name, err, broker.ReasonSignIn)
		if to != (signin.Landing{}) || r.idp.asked != 0 {
			t.Errorf("%s: the browser would be at %+v, and %d codes were redeemed", name, to, r.idp.asked)
		}
	}
	to, err := r.m.Callback(t.Context(), signin.Return{State: state, Code: "idp-code", Browser: browser, Issuer: "https://idp.test"})
	if err != nil || to.Ask == nil {
		t.Errorf("the provider's own answer: %+v, %v", to, err)
	}
}

// TestNobodyIsSentNowhere: while the identity provider is away there is no
// address to send a browser to.
func TestNobodyIsSentNowhere(t *testing.T) {
	r := newRig(t)
	r.idp.away = true
	b, err := r.m.Begin(start())
	wantReason(t, "a sign-in", err, broker.ReasonSignIn)
	if b != (signin.Begun{}) || r.m.Pending() != 0 {
		t.Errorf("it began: %+v, %d under way", b, r.m.Pending())
	}
}

// TestASignInIsAgreedTo: the program gets nothing before the person has said
// yes, in the browser that began, once.
func TestASignInIsAgreedTo(t *testing.T) {
	ask := func(r *rig) (*signin.Question, string) {
		t.Helper()
		state, browser := r.begin(start())
		l, err := r.m.Callback(t.Context(), signin.Return{State: state, Code: "idp-code", Browser: browser})
		if err != nil || l.To != "" || l.Ask == nil {
			t.Fatal(l, err)
		}
		return l.Ask, browser
	}
	r := newRig(t)
	q, browser := ask(r)
	if q.Person.Name != "ada@acme.test" || q.RedirectURI != loopback || q.Check != broker.SignInCheck(challengeOf(verifier)) || len(q.Check) != 11 {
		t.Errorf("asked: %+v", q)
	}
	_, other := ask(r)
	for name, a := range map[string]signin.Answer{
		"no cookie":         {Secret: q.Secret, Yes: true},
		"another browser":   {Secret: q.Secret, Browser: other, Yes: true},
		"another's no":      {Secret: q.Secret, Browser: other},
		"no secret":         {Browser: browser, Yes: true},
		"a secret made up":  {Secret: challengeOf("x"), Browser: browser, Yes: true},
		"the check, for it": {Secret: q.Check, Browser: browser, Yes: true},
	} {
		to, _, denied, err := r.m.Agree(t.Context(), a)
		wantReason(t, name, err, broker.ReasonSignIn)
		if to != "" || denied != nil {
			t.Errorf("%s: the browser would be sent to %s", name, to)
		}
	}
	_, err := r.redeem(q.Secret)
	wantReason(t, "the question for a code", err, broker.ReasonSignIn)
	to, by, denied, err := r.m.Agree(t.Context(), signin.Answer{Secret: q.Secret, Browser: browser, Yes: true})
	if err != nil || denied != nil || by.Name != "ada@acme.test" || !strings.HasPrefix(to, loopback+"?code=") {
		t.Errorf("yes: %q, %v, %v, %v", to, by, denied, err)
	}
	_, _, _, err = r.m.Agree(t.Context(), signin.Answer{Secret: q.Secret, Browser: browser, Yes: true})
	wantReason(t, "yes again", err, broker.ReasonSignIn)

	q, browser = ask(r)
	to, by, denied, err = r.m.Agree(t.Context(), signin.Answer{Secret: q.Secret, Browser: browser})
	if err != nil || by.Name != "ada@acme.test" || !strings.HasPrefix(to, loopback+"?error=access_denied&") || strings.Contains(to, "code=") {
		t.Errorf("no: %q, %v, %v", to, by, err)
	}
	wantReason(t, "no", denied, broker.ReasonSignIn)
	_, _, _, err = r.m.Agree(t.Context(), signin.Answer{Secret: q.Secret, Browser: browser, Yes: true})
	wantReason(t, "yes after no", err, broker.ReasonSignIn)

	q, browser = ask(r)
	r.now = r.now.Add(10 * time.Minute)
	_, _, _, err = r.m.Agree(t.Context(), signin.Answer{Secret: q.Secret, Browser: browser, Yes: true})
	wantReason(t, "too late", err, broker.ReasonSignIn)
	if n := r.m.Pending(); n != 0 {
		t.Errorf("%d under way", n)
	}
}
