package oidc_test

import (
	"crypto/elliptic"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/mayfly-security/mayfly/attestation/oidc"
	"github.com/mayfly-security/mayfly/broker"
)

// A flip of one character of a signature.
func damaged(raw string) string {
	last := raw[len(raw)-10]
	other := byte('A')
	if last == other {
		other = 'B'
	}
	return raw[:len(raw)-10] + string(other) + raw[len(raw)-9:]
}

// forUsers takes the tokens for the audience as those of users.
func forUsers(c oidc.Config) oidc.Config {
	c.Audience, c.UserAudience = "", c.Audience
	return c
}

// shown are the claims of a good token for the broker's audience.
func shown(f *forge, c *clock) map[string]any {
	now := c.Now()
	return map[string]any{
		"iss": f.issuer, "sub": "s-1", "aud": audience, "iat": now.Unix(), "exp": now.Add(5 * time.Minute).Unix(),
		"email": alice, "email_verified": true, "groups": []string{"b", "a"}, "auth_time": now.Add(-time.Minute).Unix(),
		"acr": "mfa", "client_id": "some-app", "jti": "j-1",
	}
}

func TestShownTokens(t *testing.T) {
	t.Parallel()
	f, c := newForge(t), newClock()
	p, users := open(t, f.config(c)), open(t, forUsers(f.config(c)))
	now, good := c.Now(), shown(f, c)
	signed := f.sign(jose.ES256, nil, good)
	parts := strings.Split(signed, ".")

	accepted := map[string]string{
		"ES256":                     signed,
		"RS256":                     f.sign(jose.RS256, nil, good),
		"PS256":                     f.sign(jose.PS256, nil, good),
		"EdDSA":                     f.sign(jose.EdDSA, nil, good),
		"typ JWT":                   f.sign(jose.ES256, map[string]any{"typ": "JWT"}, good),
		"typ at+jwt":                f.sign(jose.ES256, map[string]any{"typ": "at+jwt"}, good),
		"typ application/at+jwt":    f.sign(jose.ES256, map[string]any{"typ": "Application/AT+JWT"}, good),
		"no kid":                    f.sign(jose.ES256, map[string]any{"kid": ""}, good),
		"audience in an array":      f.sign(jose.ES256, nil, with(good, map[string]any{"aud": []string{audience}})),
		"clock behind by a minute":  f.sign(jose.ES256, nil, with(good, map[string]any{"iat": now.Add(time.Minute).Unix(), "nbf": now.Add(time.Minute).Unix()})),
		"times with fractions":      f.sign(jose.ES256, nil, with(good, map[string]any{"iat": float64(now.Unix()) + 0.5})),
		"email_verified as string":  f.sign(jose.ES256, nil, with(good, map[string]any{"email_verified": "true"})),
		"without groups and times":  f.sign(jose.ES256, nil, with(good, map[string]any{"groups": nil, "auth_time": nil, "acr": nil})),
		"last moment":               f.sign(jose.ES256, nil, with(good, map[string]any{"exp": now.Add(time.Second).Unix()})),
		"a subject with a bar":      f.sign(jose.ES256, nil, with(good, map[string]any{"sub": "auth0|1234"})),
		"claims of no concern here": f.sign(jose.ES256, nil, with(good, map[string]any{"EMAIL": "mallory@evil.example", "Aud": "x", "_claim_names": map[string]any{"other": "s"}, "_claim_sources": map[string]any{"s": map[string]any{"endpoint": "x"}}})),
	}
	for name, raw := range accepted {
		if person, _, err := p.VerifyBearer(t.Context(), raw, now); err != nil || person.Name != alice {
			t.Errorf("bearer, %s: %+v, %v", name, person, err)
		}
		if u, _, _, err := users.VerifyUser(t.Context(), raw, now); err != nil || u.Name != alice {
			t.Errorf("user, %s: %+v, %v", name, u, err)
		}
	}

	const malformed, signature, alg = "no signed JWT", "signature is not the identity provider's", "signed in a way that is not taken"
	type attack struct{ name, raw, why string }
	attacks := []attack{
		{"nothing", "", malformed},
		{"no token", "opaque", malformed},
		{"two parts", parts[0] + "." + parts[1], malformed},
		{"four parts", signed + ".AA", malformed},
		{"encrypted", signed + ".AA.AA", malformed},
		{"no signature", parts[0] + "." + parts[1] + ".", malformed},
		{"line end within", parts[0] + "." + parts[1] + ".\n" + parts[2], malformed},
		{"space around", " " + signed, malformed},
		{"padding", signed + "==", malformed},
		{"JSON", fmt.Sprintf(`{"protected":%q,"payload":%q,"signature":%q}`, parts[0], parts[1], parts[2]), malformed},
		{"too long", signed + strings.Repeat("A", 17<<10), "longer than 16 KiB"},
		{"damaged signature", damaged(signed), signature},
		{"another's claims", parts[0] + "." + strings.Split(f.sign(jose.ES256, nil, with(good, map[string]any{"email": bob})), ".")[1] + "." + parts[2], signature},
		{"another's key", signWith(t, newEC(t, elliptic.P256()), jose.ES256, nil, good), signature},
		{"another's key, unknown kid", signWith(t, newEC(t, elliptic.P256()), jose.ES256, map[string]any{"kid": "x"}, good), signature},
		{"another's key in the header", signWith(t, newEC(t, elliptic.P256()), jose.ES256, map[string]any{"jwk": jose.JSONWebKey{Key: newEC(t, elliptic.P256()).Public()}, "jku": "http://127.0.0.1:1/"}, good), signature},
		{"none", unsigned(t, map[string]any{"alg": "none"}, good, "AA"), alg},
		{"None", unsigned(t, map[string]any{"alg": "None"}, good, "AA"), alg},
		{"none without a signature", unsigned(t, map[string]any{"alg": "none"}, good, ""), malformed},
		{"no algorithm", unsigned(t, map[string]any{}, good, "AA"), alg},
		{"algorithm is no string", unsigned(t, map[string]any{"alg": []string{"ES256"}}, good, "AA"), malformed},
		{"HS256 with a published key", f.sign(jose.HS256, nil, good), alg},
		{"HS256 with the public key", signWith(t, []byte(fmt.Sprint(f.keys[jose.RS256].Public())), jose.HS256, map[string]any{"kid": "RS256"}, good), alg},
		{"ES384, which is advertised", f.sign(jose.ES384, nil, good), alg},
		{"RS256 said, ES256 done", unsigned(t, map[string]any{"alg": "RS256", "kid": "ES256"}, good, parts[2]), signature},
		{"critical header", f.sign(jose.ES256, map[string]any{"crit": []string{"b64"}, "b64": true}, good), "header asks for something"},
		{"logout token", f.sign(jose.ES256, map[string]any{"typ": "logout+jwt"}, good), "another kind"},
		{"security event", f.sign(jose.ES256, map[string]any{"typ": "secevent+jwt"}, good), "another kind"},
		{"bound by typ", f.sign(jose.ES256, map[string]any{"typ": "dpop+jwt"}, good), "another kind"},
		{"claims are no object", strings.Join([]string{parts[0], base64.RawURLEncoding.EncodeToString([]byte(`["a"]`)), parts[2]}, "."), signature},
	}
	claims := func(name, why string, changes map[string]any) {
		attacks = append(attacks, attack{name, f.sign(jose.ES256, nil, with(good, changes)), why})
	}
	type m = map[string]any
	claims("another issuer", "issued by somebody else", m{"iss": "https://evil.example"})
	claims("issuer with a slash", "issued by somebody else", m{"iss": f.issuer + "/"})
	claims("no issuer", "issued by somebody else", m{"iss": nil})
	claims("another audience", "for another audience", m{"aud": "https://other.example"})
	claims("the client's ID token", "for another audience", m{"aud": clientID})
	claims("no audience", "for another audience", m{"aud": nil})
	claims("an empty list of audiences", "for another audience", m{"aud": []string{}})
	claims("audience as a prefix", "for another audience", m{"aud": audience + "/"})
	claims("several audiences", "other audiences besides", m{"aud": []string{audience, "https://other.example"}})
	claims("several audiences, for us", "other audiences besides", m{"aud": []string{"https://other.example", audience}, "azp": clientID})
	claims("expired", "has expired", m{"exp": now.Unix()})
	claims("expired long ago", "has expired", m{"exp": now.Add(-time.Hour).Unix()})
	claims("no end", "until when", m{"exp": nil})
	claims("end in words", "not what it should be", m{"exp": "tomorrow"})
	claims("issued in the future", "issued in the future", m{"iat": now.Add(61 * time.Second).Unix()})
	claims("no issue time", "when it was issued", m{"iat": nil})
	claims("not yet", "not good yet", m{"nbf": now.Add(61 * time.Second).Unix()})
	claims("signs in tomorrow", "sign in in the future", m{"auth_time": now.Add(24 * time.Hour).Unix()})
	claims("auth_time in words", "auth_time is no time", m{"auth_time": "now"})
	claims("negative auth_time", "auth_time is no time", m{"auth_time": -1})
	claims("acr is a list", "acr is no string", m{"acr": []string{"mfa"}})
	claims("acr with an escape", "its acr", m{"acr": "mfa\x1b[0m"})
	claims("no subject", "subject is missing", m{"sub": nil})
	claims("long subject", "subject is missing, longer", m{"sub": strings.Repeat("s", 256)})
	claims("subject with bidi", "subject", m{"sub": "s\u202e"})
	claims("no e-mail", `no claim "email"`, m{"email": nil})
	claims("e-mail not verified", "not verified", m{"email_verified": false})
	claims("e-mail not said to be verified", "not verified", m{"email_verified": nil})
	claims("e-mail verified as 1", "not verified", m{"email_verified": 1})
	claims("e-mail is a list", "not what it should be|email is no string", m{"email": []string{alice}})
	claims("name with a bar", "name has", m{"email": "a|" + alice})
	claims("name with bidi", "name has", m{"email": "a\u202e" + alice})
	claims("name with a zero-width space", "name has", m{"email": "a\u200b" + alice})
	claims("name with an escape", "name has", m{"email": "\x1b[31m" + alice})
	claims("name with spaces around", "name has", m{"email": alice + " "})
	claims("name with what could not be read", "name has", m{"email": "\ufffd" + alice})
	claims("long name", "longer than 200", m{"email": strings.Repeat("a", broker.MaxPersonName) + "@x"})
	claims("groups are an object", "no list of strings", m{"groups": m{"a": true}})
	claims("groups are numbers", "no list of strings", m{"groups": []int{1}})
	claims("a group is null", "no list of strings", m{"groups": []any{"a", nil}})
	claims("an empty group", "a group's name", m{"groups": []string{""}})
	claims("a group with a line end", "a group's name", m{"groups": []string{"a\nb"}})
	claims("a long group", "a group's name", m{"groups": []string{strings.Repeat("g", 257)}})
	claims("too many groups", "more than 200 groups", m{"groups": many(201)})
	claims("groups elsewhere", "too many", m{"groups": nil, "_claim_names": m{"groups": "src1"}, "_claim_sources": m{"src1": m{"endpoint": "https://x.example"}}})
	claims("a client's own", "no person's", m{"client_id": "s-1"})
	claims("an event", "tells of an event", m{"events": m{"http://schemas.openid.net/event/backchannel-logout": m{}}})
	claims("bound to a key", "bound to a key", m{"cnf": m{"jkt": "x"}})

	for _, a := range attacks {
		_, _, err := p.VerifyBearer(t.Context(), a.raw, now)
		refusedOneOf(t, a.name, err, a.why)
		_, id, _, err := users.VerifyUser(t.Context(), a.raw, now)
		refusedOneOf(t, a.name+" (user)", err, a.why)
		if id != "" {
			t.Errorf("%s: refused, and has the id %s", a.name, id)
		}
		if err != nil {
			hides(t, err, append(strings.Split(a.raw, "."), a.raw, "evil.example", alice)...)
		}
	}

	// A token with an actor is good for whom somebody acts, and is no sign-in.
	acted := f.sign(jose.ES256, nil, with(good, m{"act": m{"sub": "agent"}}))
	_, _, err := p.VerifyBearer(t.Context(), acted, now)
	refused(t, err, broker.ReasonTokenInvalid, "somebody else acts")
	if _, _, _, err := users.VerifyUser(t.Context(), acted, now); err != nil {
		t.Error(err)
	}

	// The two kinds have two audiences: what a user lets an agent have is no
	// sign-in of the user's, and what a person comes with is for no agent.
	_, _, _, err = p.VerifyUser(t.Context(), signed, now)
	refused(t, err, broker.ReasonTokenInvalid, "no audience configured")
	config := f.config(c)
	config.UserAudience = "https://agents.mayfly.acme.example"
	both := open(t, config)
	_, _, _, err = both.VerifyUser(t.Context(), signed, now)
	refused(t, err, broker.ReasonTokenInvalid, "another audience")
	lent := f.sign(jose.ES256, nil, with(good, m{"aud": config.UserAudience}))
	if _, _, _, err := both.VerifyUser(t.Context(), lent, now); err != nil {
		t.Error(err)
	}
	_, _, err = both.VerifyBearer(t.Context(), lent, now)
	refused(t, err, broker.ReasonTokenInvalid, "another audience")
	for _, same := range []string{config.Audience, config.ClientID} {
		config.UserAudience = same
		if _, err := oidc.New(config); err == nil {
			t.Errorf("users' tokens are for %s, as others are", same)
		}
	}
}

func refusedOneOf(t *testing.T, name string, err error, why string) {
	t.Helper()
	if err == nil {
		t.Errorf("%s: taken", name)
		return
	}
	for _, w := range strings.Split(why, "|") {
		if strings.Contains(err.Error(), w) {
			why = w
		}
	}
	if broker.ReasonOf(err) != broker.ReasonTokenInvalid || !strings.Contains(err.Error(), why) {
		t.Errorf("%s: want a refusal that says %q, got %v", name, why, err)
	}
}

func many(n int) (all []string) {
	for i := range n {
		all = append(all, fmt.Sprint("group-", i))
	}
	return all
}

// TestOneTokenOneID: whoever has a token can write its signature in another
// way, (r, n-s) for (r, s), and shows the same token.
func TestOneTokenOneID(t *testing.T) {
	t.Parallel()
	f, c := newForge(t), newClock()
	p := open(t, forUsers(f.config(c)))
	raw := f.sign(jose.ES256, nil, shown(f, c))
	parts := strings.Split(raw, ".")
	signature, err := base64.RawURLEncoding.DecodeString(parts[2])
	if err != nil {
		t.Fatal(err)
	}
	s := new(big.Int).SetBytes(signature[32:])
	s.Sub(elliptic.P256().Params().N, s).FillBytes(signature[32:])
	other := parts[0] + "." + parts[1] + "." + base64.RawURLEncoding.EncodeToString(signature)
	if other == raw {
		t.Fatal("the signature is the same")
	}
	_, id, _, err := p.VerifyUser(t.Context(), raw, c.Now())
	if err != nil {
		t.Fatal(err)
	}
	_, id2, _, err := p.VerifyUser(t.Context(), other, c.Now())
	if err != nil || id != id2 {
		t.Errorf("%q and %q, %v", id, id2, err)
	}
	want := sha256.Sum256([]byte(parts[0] + "." + parts[1]))
	if id != fmt.Sprintf("%x", want) {
		t.Errorf("id = %s", id)
	}
}

// TestIDTokens: what a token endpoint may answer, and what is refused of it.
func TestIDTokens(t *testing.T) {
	t.Parallel()
	f, c := newForge(t), newClock()
	p := open(t, f.config(c))
	now := c.Now()
	const access = "opaque-access-4711"
	half := sha256.Sum256([]byte(access))
	good := with(shown(f, c), map[string]any{
		"aud": clientID, "nonce": nonce, "client_id": nil, "at_hash": base64.RawURLEncoding.EncodeToString(half[:16]),
	})
	type m = map[string]any
	redeem := func(header, claims m) (broker.Person, error) {
		f.answer("/token", 200, m{"access_token": access, "token_type": "Bearer", "id_token": f.sign(jose.ES256, header, claims)})
		return p.Exchange(t.Context(), "the code of this sign-in", verifier, nonce, now)
	}
	for name, changes := range map[string]m{
		"as it is":          {},
		"no at_hash":        {"at_hash": nil},
		"for others too":    {"aud": []string{"other", clientID}, "azp": clientID},
		"azp":               {"azp": clientID},
		"no auth_time":      {"auth_time": nil},
		"one group, string": {"groups": "b"},
	} {
		person, err := redeem(nil, with(good, changes))
		if err != nil || person.Name != alice || person.Method != broker.SignInBrowser {
			t.Errorf("%s: %+v, %v", name, person, err)
		}
		// max_age was asked, and auth_time is not there: the caller sees it.
		if _, said := with(good, changes)["auth_time"]; person.AuthTime.IsZero() == said {
			t.Errorf("%s: signed in at %s", name, person.AuthTime)
		}
	}
	if got := f.sent("code_verifier"); got != verifier {
		t.Errorf("the verifier that was sent is %q", got)
	}
	for _, a := range []struct {
		name, why string
		changes   m
	}{
		{"another nonce", "nonce differs", m{"nonce": "another"}},
		{"no nonce", "nonce differs", m{"nonce": nil}},
		{"a longer nonce", "nonce differs", m{"nonce": nonce + "x"}},
		{"another client's", "another audience", m{"aud": "other"}},
		{"for others too, unnamed", "another client", m{"aud": []string{clientID, "other"}}},
		{"for others too, made for them", "another client", m{"aud": []string{clientID, "other"}, "azp": "other"}},
		{"made for others", "another client", m{"azp": "other"}},
		{"another's access token", "access token that came with it", m{"at_hash": "AAAAAAAAAAAAAAAAAAAAAA"}},
		{"expired", "expired", m{"exp": now.Unix()}},
		{"another issuer", "somebody else", m{"iss": "https://evil.example"}},
		{"e-mail not verified", "not verified", m{"email_verified": false}},
	} {
		_, err := redeem(nil, with(good, a.changes))
		if broker.ReasonOf(err) != broker.ReasonSignIn {
			t.Errorf("%s: %v", a.name, err)
		}
		refused(t, err, broker.ReasonSignIn, a.why)
		hides(t, err, nonce, access, "evil.example", verifier)
	}
	_, err := redeem(m{"typ": "at+jwt"}, good)
	refused(t, err, broker.ReasonSignIn, "another kind")

	for name, a := range map[string]struct {
		body any
		why  string
	}{
		"no ID token":      {m{"access_token": access, "token_type": "Bearer"}, "gave no ID token"},
		"ID token a list":  {m{"access_token": access, "id_token": []string{"x"}}, "gave no ID token"},
		"opaque ID token":  {m{"access_token": access, "id_token": "opaque"}, "no signed JWT"},
		"damaged ID token": {m{"access_token": access, "id_token": damaged(f.sign(jose.ES256, nil, good))}, "signature"},
		"no access token":  {m{"id_token": f.sign(jose.ES256, nil, good)}, "away"},
		"no JSON":          {"<html>" + access, "away"},
		"too much":         {`{"access_token":"` + strings.Repeat("a", 2<<20) + `"}`, "away"},
	} {
		f.answer("/token", 200, a.body)
		_, err := p.Exchange(t.Context(), "the code of this sign-in", verifier, nonce, now)
		if err == nil {
			t.Errorf("%s: taken", name)
			continue
		}
		refused(t, err, broker.ReasonSignIn, a.why)
		hides(t, err, access, "the code of this sign-in")
	}
	// A refusal whose text quotes what was sent, as some providers have it.
	f.answer("/token", 401, m{"error": "invalid_client", "error_description": "unknown: " + access})
	_, err = p.Exchange(t.Context(), "the code of this sign-in", verifier, nonce, now)
	refused(t, err, broker.ReasonSignIn, "does not work with this broker")
	hides(t, err, access)
	if !strings.Contains(err.Error(), "401 invalid_client") {
		t.Errorf("the log is not told: %v", err)
	}
	f.answer("/token", 400, m{"error": "the code of this sign-in " + access})
	_, err = p.Exchange(t.Context(), "the code of this sign-in", verifier, nonce, now)
	hides(t, err, access, "the code of this sign-in")
}

// TestUserInfo: what is there completes an ID token of the same person, and
// nothing else.
func TestUserInfo(t *testing.T) {
	t.Parallel()
	f, c := newForge(t), newClock()
	f.set("userinfo_endpoint", f.issuer+"/me")
	p := open(t, f.config(c))
	type m = map[string]any
	id := with(shown(f, c), m{"aud": clientID, "nonce": nonce, "client_id": nil, "email": nil, "email_verified": nil, "groups": nil})
	info := m{"sub": "s-1", "email": alice, "email_verified": true, "groups": []string{"g"}}
	for _, a := range []struct {
		name     string
		id, info m
		want     []string
		why      string
	}{
		{"completes", nil, nil, []string{"g"}, ""},
		{"name is there", m{"email": alice, "email_verified": true}, m{"email": bob}, []string{"g"}, ""},
		{"groups are there", m{"groups": []string{"h"}}, nil, []string{"h"}, ""},
		{"no groups anywhere", nil, m{"groups": nil}, nil, ""},
		{"another person's", nil, m{"sub": "s-2"}, nil, "another person's"},
		{"nobody's", nil, m{"sub": nil}, nil, "another person's"},
		{"not verified there, said to be in the token", m{"email_verified": true}, m{"email_verified": false}, nil, "not verified"},
		{"not said there, said to be in the token", m{"email_verified": true}, m{"email_verified": nil}, nil, "not verified"},
		{"too many groups for the token", m{"_claim_names": m{"groups": "s"}, "_claim_sources": m{"s": m{"endpoint": "x"}}}, m{"groups": nil}, nil, "too many"},
		{"issuer and times do not count", nil, m{"iss": "x", "acr": "better", "auth_time": 1}, []string{"g"}, ""},
	} {
		f.answer("/token", 200, m{"access_token": "a", "id_token": f.sign(jose.RS256, nil, with(id, a.id))})
		f.answer("/me", 200, with(info, a.info))
		person, err := p.Exchange(t.Context(), "code", verifier, nonce, c.Now())
		if a.why != "" {
			refused(t, err, broker.ReasonSignIn, a.why)
			continue
		}
		if err != nil || person.Name != alice || fmt.Sprint(person.Groups) != fmt.Sprint(a.want) || person.ACR != "mfa" || person.AuthTime.Unix() == 1 {
			t.Errorf("%s: %+v, %v", a.name, person, err)
		}
	}
	f.answer("/me", 500, "the provider's secret trouble")
	f.answer("/token", 200, m{"access_token": "a", "id_token": f.sign(jose.RS256, nil, id)})
	_, err := p.Exchange(t.Context(), "code", verifier, nonce, c.Now())
	refused(t, err, broker.ReasonSignIn, "away")
	hides(t, err, "the provider's secret trouble")
}
