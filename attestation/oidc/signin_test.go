package oidc_test

import (
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/mayfly-security/mayfly/attestation/oidc"
	"github.com/mayfly-security/mayfly/attestation/oidctest"
	"github.com/mayfly-security/mayfly/broker"
)

// appToken is the token that an application gets for the broker's audience when
// its user signs in (RFC 8707), at the certified provider.
func appToken(t *testing.T, issuer, redirect string, answers map[string]string) string {
	t.Helper()
	app := oidctest.App{ClientID: "app", RedirectURI: redirect, AuthorizeURL: issuer + "/auth", TokenURL: issuer + "/token", Scopes: []string{"openid", "email", "groups"}}
	raw, err := app.AccessToken(t.Context(), audience, answers)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func TestSignIn(t *testing.T) {
	worlds(t, func(t *testing.T, w world) {
		for _, c := range []struct {
			name   string
			config func(*oidc.Config)
		}{
			{"confidential client", func(*oidc.Config) {}},
			{"public client", func(c *oidc.Config) { c.ClientID, c.ClientSecretFile = "public", "" }},
			{"scopes of one's own", func(c *oidc.Config) { c.Scopes = []string{"openid", "email", "groups"} }},
		} {
			config := w.config
			c.config(&config)
			p := open(t, config)
			person, err := exchange(t.Context(), w, p, bring(t, w, p, browser(), broker.StepUp{}, w.answers(alice, w.strong, 0)))
			if err != nil {
				t.Fatalf("%s: %v", c.name, err)
			}
			if person.Subject == "" || person.Subject == alice {
				t.Errorf("%s: subject = %q", c.name, person.Subject)
			}
			if age := w.now().Sub(person.AuthTime); age < -time.Second || age > time.Minute {
				t.Errorf("%s: signed in %s ago", c.name, age)
			}
			want := broker.Person{Name: alice, Issuer: config.Issuer, Groups: []string{"finance", "security"}, ACR: w.strong, Method: broker.SignInBrowser}
			if age := w.now().Sub(person.IssuedAt); age < -time.Second || age > time.Minute {
				t.Errorf("the ID token is of %s", person.IssuedAt)
			}
			person.Subject, person.AuthTime, person.IssuedAt = "", time.Time{}, time.Time{}
			if diff := cmp.Diff(want, person); diff != "" {
				t.Errorf("%s: (-want +got)\n%s", c.name, diff)
			}
		}
		p := open(t, w.config)
		person, err := exchange(t.Context(), w, p, bring(t, w, p, browser(), broker.StepUp{}, w.answers(bob, w.password, 0)))
		if err != nil || person.Name != bob || len(person.Groups) != 0 {
			t.Errorf("somebody without groups: %+v, %v", person, err)
		}
	})
}

// TestClaimsInIDToken: a provider that puts all into the ID token needs no
// userinfo endpoint; TestSignIn has the other kind.
func TestClaimsInIDToken(t *testing.T) {
	t.Parallel()
	w := certifiedWorld(t, true)
	p := open(t, w.config)
	person, err := exchange(t.Context(), w, p, bring(t, w, p, browser(), broker.StepUp{}, w.answers(alice, "", 0)))
	if err != nil || person.Name != alice || len(person.Groups) != 2 {
		t.Errorf("%+v, %v", person, err)
	}
}

func TestNames(t *testing.T) {
	t.Parallel()
	w := certifiedWorld(t, false)
	config := w.config
	config.NameClaim = "sub"
	p := open(t, config)
	person, err := exchange(t.Context(), w, p, bring(t, w, p, browser(), broker.StepUp{}, w.answers(alice, "", 0)))
	if err != nil || person.Name != "a-1" || person.Subject != "a-1" {
		t.Errorf("named by subject: %+v, %v", person, err)
	}
	config.NameClaim, config.GroupsClaim = "preferred_username", "roles"
	p = open(t, config)
	_, err = exchange(t.Context(), w, p, bring(t, w, p, browser(), broker.StepUp{}, w.answers(alice, "", 0)))
	refused(t, err, broker.ReasonSignIn, `it has no claim "preferred_username"`)
	p = open(t, w.config)
	_, err = exchange(t.Context(), w, p, bring(t, w, p, browser(), broker.StepUp{}, w.answers("mallory@acme.example", "", 0)))
	refused(t, err, broker.ReasonSignIn, "its e-mail address is not verified")
}

// TestStepUp: a second sign-in is silent and old; max_age and acr_values bring
// a new one about, whose time and class the caller sees.
func TestStepUp(t *testing.T) {
	worlds(t, func(t *testing.T, w world) {
		p, b := open(t, w.config), browser()
		const old = time.Hour / 2
		if _, err := exchange(t.Context(), w, p, bring(t, w, p, b, broker.StepUp{}, w.answers(alice, w.password, old))); err != nil {
			t.Fatal(err)
		}
		w.answers("", "", old) // the built-in provider's clock moves
		for _, c := range []struct {
			name    string
			need    broker.StepUp
			form    bool
			acr     string
			oldest  time.Duration
			noLater time.Duration
		}{
			{"nothing is asked", broker.StepUp{}, false, w.password, old + time.Minute, old - time.Minute},
			{"old enough", broker.StepUp{MaxAge: time.Hour}, false, w.password, old + time.Minute, old - time.Minute},
			{"too old", broker.StepUp{MaxAge: 10 * time.Minute}, true, w.password, time.Minute, -time.Minute},
			{"fresh now", broker.StepUp{MaxAge: 10 * time.Minute, ACR: []string{w.password}}, false, w.password, time.Minute, -time.Minute},
			{"too weak", broker.StepUp{ACR: []string{"urn:unknown", w.strong}}, true, w.strong, time.Minute, -time.Minute},
			{"strong now", broker.StepUp{MaxAge: 10 * time.Minute, ACR: []string{w.strong}}, false, w.strong, time.Minute, -time.Minute},
		} {
			came := bring(t, w, p, b, c.need, w.answers(alice, c.acr, 0))
			if came.forms != c.form {
				t.Errorf("%s: the person was asked: %t", c.name, came.forms)
			}
			person, err := exchange(t.Context(), w, p, came)
			if err != nil {
				t.Fatalf("%s: %v", c.name, err)
			}
			if age := w.now().Sub(person.AuthTime); person.ACR != c.acr || age > c.oldest || age < c.noLater {
				t.Errorf("%s: acr %q, %s old", c.name, person.ACR, age)
			}
		}
	})
}

// TestCode: a code is good once, with its verifier, its nonce and its client.
func TestCode(t *testing.T) {
	worlds(t, func(t *testing.T, w world) {
		p, b := open(t, w.config), browser()
		fresh := func() came { return bring(t, w, p, b, broker.StepUp{}, w.answers(alice, w.password, 0)) }
		const code = "the identity provider does not take the code"
		for _, c := range []struct {
			name   string
			change func(*came)
			why    string
		}{
			{"another nonce", func(c *came) { c.nonce = "another" }, "the nonce differs"},
			{"another verifier", func(c *came) { c.verifier = strings.Repeat("x", 50) }, code},
			{"another code", func(c *came) { c.code = "another" }, code},
			{"no code", func(c *came) { c.code = "" }, "is missing"},
			{"no verifier", func(c *came) { c.verifier = "" }, "is missing"},
			{"no nonce", func(c *came) { c.nonce = "" }, "is missing"},
		} {
			got := fresh()
			c.change(&got)
			_, err := exchange(t.Context(), w, p, got)
			refused(t, err, broker.ReasonSignIn, c.why)
			hides(t, err, got.code, got.verifier, clientSecret)
		}
		got := fresh()
		if _, err := exchange(t.Context(), w, p, got); err != nil {
			t.Fatal(err)
		}
		_, err := exchange(t.Context(), w, p, got)
		refused(t, err, broker.ReasonSignIn, code)

		// The provider gives no code to an application without PKCE, and
		// redeems none without the verifier.
		start := p.AuthCodeURL(state, nonce, verifier, broker.StepUp{})
		u, err := url.Parse(start)
		if err != nil {
			t.Fatal(err)
		}
		q := u.Query()
		q.Del("code_challenge")
		q.Del("code_challenge_method")
		u.RawQuery = q.Encode()
		end, err := browser().Walk(t.Context(), u.String(), w.answers(alice, "", 0))
		if err != nil || !end.Stopped || end.URL.Query().Get("error") != "invalid_request" || end.URL.Query().Has("code") {
			t.Errorf("without PKCE: %+v, %v", end, err)
		}
		got = fresh()
		var meta struct {
			Token string `json:"token_endpoint"`
		}
		getJSON(t, w.config.Issuer+"/.well-known/openid-configuration", &meta)
		form := url.Values{"grant_type": {"authorization_code"}, "code": {got.code}, "redirect_uri": {redirectURL}}
		r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, meta.Token, strings.NewReader(form.Encode()))
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		r.SetBasicAuth(url.QueryEscape(clientID), url.QueryEscape(clientSecret))
		resp, err := http.DefaultClient.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		body, _ := io.ReadAll(resp.Body)
		if resp.StatusCode != http.StatusBadRequest || !strings.Contains(string(body), `"invalid_grant"`) {
			t.Errorf("redeemed without a verifier: %s %s", resp.Status, body)
		}
	})
}

func TestRefusedByThePerson(t *testing.T) {
	worlds(t, func(t *testing.T, w world) {
		p := open(t, w.config)
		answers := w.answers(alice, w.password, 0)
		answers["how"] = "deny"
		got := bring(t, w, p, browser(), broker.StepUp{}, answers)
		if got.params.Get("error") != "access_denied" || got.code != "" {
			t.Errorf("came back with %v", got.params)
		}
	})
}

// TestCheckResponse: both providers name themselves in what the browser brings
// (RFC 9207); an answer without the name, or with another, is somebody else's.
func TestCheckResponse(t *testing.T) {
	worlds(t, func(t *testing.T, w world) {
		p := open(t, w.config)
		for _, iss := range []string{"", "https://evil.example", w.config.Issuer + "/"} {
			refused(t, p.CheckResponse(t.Context(), iss), broker.ReasonSignIn, "is not the identity provider's")
		}
		if err := p.CheckResponse(t.Context(), w.config.Issuer); err != nil {
			t.Error(err)
		}
	})
}

// TestShown: JWT access tokens of both providers.
func TestShown(t *testing.T) {
	worlds(t, func(t *testing.T, w world) {
		p := open(t, w.config)
		raw := w.jwt(t, alice)
		person, until, err := p.VerifyBearer(t.Context(), raw, w.now())
		if err != nil {
			t.Fatal(err)
		}
		if left := until.Sub(w.now()); left < 4*time.Minute || left > 5*time.Minute {
			t.Errorf("good for %s", left)
		}
		want := broker.Person{Name: alice, Issuer: w.config.Issuer, Groups: []string{"finance", "security"}, ACR: w.password, Method: broker.SignInBearer,
			Subject: person.Subject, AuthTime: person.AuthTime, IssuedAt: person.IssuedAt}
		if diff := cmp.Diff(want, person); diff != "" || person.IssuedAt.IsZero() || person.Subject == "" || w.now().Sub(person.AuthTime) > time.Minute {
			t.Errorf("%s: %+v (-want +got)\n%s", w.name, person, diff)
		}
		users := open(t, forUsers(w.config))
		u, id, userUntil, err := users.VerifyUser(t.Context(), raw, w.now())
		if err != nil || u != (broker.User{Name: alice, Issuer: person.Issuer, Subject: person.Subject, AuthTime: person.AuthTime, ACR: person.ACR}) || !userUntil.Equal(until) || len(id) != 64 {
			t.Errorf("as a user: %+v, %q, %s, %v", u, id, userUntil, err)
		}
		if _, again, _, err := users.VerifyUser(t.Context(), raw, w.now()); err != nil || again != id {
			t.Errorf("the same token is %q and %q, %v", id, again, err)
		}
		if _, other, _, err := users.VerifyUser(t.Context(), w.jwt(t, bob), w.now()); err != nil || other == id {
			t.Errorf("two tokens are one: %q, %v", other, err)
		}
		_, _, err = p.VerifyBearer(t.Context(), raw, until)
		refused(t, err, broker.ReasonTokenInvalid, "it has expired")

		config := w.config
		config.Audience = "https://other.acme.example"
		_, _, err = open(t, config).VerifyBearer(t.Context(), raw, w.now())
		refused(t, err, broker.ReasonTokenInvalid, "it is for another audience")
		config.Audience = ""
		_, _, err = open(t, config).VerifyBearer(t.Context(), raw, w.now())
		refused(t, err, broker.ReasonTokenInvalid, "no audience configured")
		_, _, _, err = open(t, config).VerifyUser(t.Context(), raw, w.now())
		refused(t, err, broker.ReasonTokenInvalid, "no audience configured")
	})
}

func getJSON(t *testing.T, from string, into any) {
	t.Helper()
	resp, err := http.Get(from)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(resp.Body).Decode(into); err != nil {
		t.Fatal(err)
	}
}

// refused checks a refusal: its reason, its words, and that it says what to do.
func refused(t *testing.T, err error, reason broker.Reason, words string) {
	t.Helper()
	var e *broker.Error
	if !errors.As(err, &e) {
		t.Errorf("want a refusal that says %q, got %v", words, err)
		return
	}
	if e.Reason != reason || !strings.Contains(e.Message, words) || e.Next == "" {
		t.Errorf("want %s %q, got %s %q, next %q", reason, words, e.Reason, e.Message, e.Next)
	}
}

// hides checks that an error, its cause included, holds none of some texts.
func hides(t *testing.T, err error, texts ...string) {
	t.Helper()
	for _, s := range texts {
		if len(s) > 8 && strings.Contains(err.Error(), s) {
			t.Errorf("%v holds %q", err, s)
		}
	}
}
