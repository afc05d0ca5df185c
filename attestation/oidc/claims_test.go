package oidc

import (
	"errors"
	"slices"
	"testing"
	"time"
	"unicode"

	"github.com/mayfly-security/mayfly/broker"
)

// FuzzClaims: whatever a provider signs, what comes out of it is a person that
// the broker can keep and show, or a fault without a word of it.
func FuzzClaims(f *testing.F) {
	const issuer, audience = "https://id.example", "https://mayfly.example"
	now := time.Unix(1_900_000_000, 0)
	for _, seed := range []string{
		`{"iss":"https://id.example","sub":"s","aud":"https://mayfly.example","exp":1900000300,"iat":1900000000,"email":"a@b.example","email_verified":true,"groups":["b","a","b"],"auth_time":1899999999,"acr":"x"}`,
		`{"iss":"https://id.example","sub":"s|t","aud":["https://mayfly.example"],"exp":1900000300.5,"iat":1.9e9,"nbf":1,"email":"a@b.example","email_verified":"true","groups":"g"}`,
		`{"iss":"https://id.example","sub":"s","aud":["https://mayfly.example","x"],"azp":"mayfly","exp":1e400,"iat":-1}`,
		`{"iss":null,"sub":"\u202e","email":"a\u0000","groups":[null],"_claim_names":{"groups":"x"}}`,
		`[]`, `null`, `{"exp":"x"}`, `{"groups":{"a":1}}`, "{\"email\":\"\xff\"}",
	} {
		f.Add([]byte(seed))
	}
	p, err := New(Config{Issuer: issuer, ClientID: "mayfly", Audience: audience})
	if err != nil {
		f.Fatal(err)
	}
	check := func(t *testing.T, err error) bool {
		var known fault
		if err != nil && !errors.As(err, &known) {
			t.Errorf("%T: %v", err, err)
		}
		if broker.Clean(string(known)) != string(known) || len(known) > 300 {
			t.Errorf("a fault that cannot be shown: %q", known)
		}
		return err == nil
	}
	f.Fuzz(func(t *testing.T, payload []byte) {
		c, err := readClaims(payload)
		if !check(t, err) {
			return
		}
		v, err := judge(c, issuer, now)
		if !check(t, err) {
			return
		}
		shown, issued := check(t, c.onlyFor(audience)), check(t, c.issuedTo("mayfly"))
		if all, _ := c.strings("aud"); shown && !slices.Equal(all, []string{audience}) || issued && !slices.Contains(all, "mayfly") {
			t.Errorf("taken for the audience %q", all)
		}
		check(t, c.shows(v.subject, true))
		if !now.Before(v.until) || v.authTime.After(now.Add(clockSkew)) || v.subject == "" || v.until.Year() > 9999 {
			t.Errorf("judged good: %+v", v)
		}
		person, err := p.person(v, broker.SignInBearer)
		if !check(t, err) {
			return
		}
		texts := append(slices.Clone(person.Groups), person.Name, person.Subject)
		for _, s := range texts {
			if s == "" || !utf8Shown(s) {
				t.Errorf("cannot be shown: %q", s)
			}
		}
		if len(person.Name) > broker.MaxPersonName || slices.Contains([]byte(person.Name), '|') || !c.truth("email_verified") {
			t.Errorf("the name %q", person.Name)
		}
		if len(person.Groups) > maxGroups || !slices.IsSorted(person.Groups) || len(slices.Compact(slices.Clone(person.Groups))) != len(person.Groups) {
			t.Errorf("the groups %q", person.Groups)
		}
	})
}

// utf8Shown is another way to the same end as unprintable.
func utf8Shown(s string) bool {
	for _, r := range s {
		if r == unicode.ReplacementChar || unicode.IsControl(r) || unicode.In(r, unicode.Cf, unicode.Zl, unicode.Zp) {
			return false
		}
	}
	return true
}

// FuzzToken: whatever is shown as a token, its form is judged without a panic,
// and what passes is written in one way.
func FuzzToken(f *testing.F) {
	f.Add("eyJhbGciOiJFUzI1NiJ9.e30.AAAA")
	f.Add("eyJhbGciOiJub25lIn0.e30.")
	f.Add("a.b.c")
	f.Add("eyJhbGciOiJFUzI1NiIsInR5cCI6ImF0K2p3dCJ9.e30.AA")
	f.Add("eyJhbGciOiJFUzI1NiJ9.e31.AAAA\n")
	f.Fuzz(func(t *testing.T, raw string) {
		token, err := readToken(raw, bearerTypes)
		if err != nil {
			var known fault
			if !errors.As(err, &known) {
				t.Errorf("%T: %v", err, err)
			}
			return
		}
		if token.raw != raw || len(token.id) != 64 {
			t.Errorf("%+v", token)
		}
		for _, r := range raw {
			if r != '.' && r != '-' && r != '_' && (r < '0' || r > '9') && (r < 'A' || r > 'Z') && (r < 'a' || r > 'z') {
				t.Errorf("taken with %q in it", r)
			}
		}
	})
}
