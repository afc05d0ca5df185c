package oidc

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/mayfly-security/mayfly/broker"
)

const (
	clockSkew   = time.Minute // by which the provider's clock may be ahead of ours
	maxGroups   = 200
	maxGroup    = 256          // bytes of a group's name
	maxSubject  = 255          // bytes (Core, section 2)
	maxACR      = 256          // bytes
	lastSeconds = 253402300799 // the end of the year 9999, beyond which times do not print
)

// claims are what a token says, before anybody has judged it. Names are
// matched exactly, unlike those of a struct's fields.
type claims map[string]json.RawMessage

func readClaims(payload []byte) (claims, error) {
	var c claims
	if err := json.Unmarshal(payload, &c); err != nil || c == nil {
		return nil, fault("what it says is no JSON object")
	}
	for name, value := range c {
		if bytes.Equal(value, []byte("null")) {
			delete(c, name)
		}
	}
	return c, nil
}

func (c claims) has(name string) bool { _, ok := c[name]; return ok }

// text is a claim that is a string; "" if there is none.
func (c claims) text(name string) (string, error) {
	raw, ok := c[name]
	if !ok {
		return "", nil
	}
	var s string
	if json.Unmarshal(raw, &s) != nil {
		return "", fault("its claim " + name + " is no string")
	}
	return s, nil
}

// time is a claim that is a NumericDate (RFC 7519, section 2); zero if there is
// none.
func (c claims) time(name string) (time.Time, error) {
	raw, ok := c[name]
	if !ok {
		return time.Time{}, nil
	}
	var seconds float64
	if json.Unmarshal(raw, &seconds) != nil || math.IsNaN(seconds) || seconds <= 0 || seconds > lastSeconds {
		return time.Time{}, fault("its claim " + name + " is no time")
	}
	whole, part := math.Modf(seconds)
	return time.Unix(int64(whole), int64(part*1e9)).UTC(), nil
}

// strings is a claim that is an array of strings, or one string.
func (c claims) strings(name string) ([]string, error) {
	raw, ok := c[name]
	if !ok {
		return nil, nil
	}
	var one string
	if json.Unmarshal(raw, &one) == nil {
		return []string{one}, nil
	}
	var many []*string // a pointer tells null from ""
	if json.Unmarshal(raw, &many) != nil || slices.Contains(many, nil) {
		return nil, fault("its claim " + name + " is no list of strings")
	}
	all := make([]string, len(many))
	for i, s := range many {
		all[i] = *s
	}
	return all, nil
}

// truth is a claim that is true, or "true" as some providers have it.
func (c claims) truth(name string) bool {
	raw := string(c[name])
	return raw == "true" || raw == `"true"`
}

// verdict is what is known of a token that passed judge.
type verdict struct {
	claims   claims
	subject  string
	authTime time.Time // zero if the provider did not say
	acr      string    // empty if the provider did not say
	issued   time.Time // when it was issued; never zero
	until    time.Time
}

// judge holds what every token must be, whatever it came for: of this issuer,
// for somebody, and good now. The audience is judged by whoever knows it.
func judge(c claims, issuer string, now time.Time) (verdict, error) {
	v := verdict{claims: c}
	from, err := c.text("iss")
	if err != nil {
		return verdict{}, err
	}
	if from != issuer {
		return verdict{}, fault("it was issued by somebody else")
	}
	if v.subject, err = c.text("sub"); err != nil {
		return verdict{}, err
	}
	if v.subject == "" || len(v.subject) > maxSubject || unprintable(v.subject) {
		return verdict{}, fault(fmt.Sprintf("its subject is missing, longer than %d bytes, or has characters that cannot be shown", maxSubject))
	}
	if v.until, err = c.time("exp"); err != nil {
		return verdict{}, err
	}
	if v.until.IsZero() {
		return verdict{}, fault("it does not say until when it is good")
	}
	if !now.Before(v.until) {
		return verdict{}, fault("it has expired")
	}
	latest := now.Add(clockSkew)
	if v.issued, err = c.time("iat"); err != nil {
		return verdict{}, err
	}
	if v.issued.IsZero() || v.issued.After(latest) {
		return verdict{}, fault("it does not say when it was issued, or was issued in the future: compare the clocks")
	}
	begin, err := c.time("nbf")
	if err != nil {
		return verdict{}, err
	}
	if begin.After(latest) {
		return verdict{}, fault("it is not good yet: compare the clocks")
	}
	if v.authTime, err = c.time("auth_time"); err != nil {
		return verdict{}, err
	}
	if v.authTime.After(latest) {
		return verdict{}, fault("it says that the person will sign in in the future: compare the clocks")
	}
	if v.acr, err = c.text("acr"); err != nil {
		return verdict{}, err
	}
	if len(v.acr) > maxACR || unprintable(v.acr) {
		return verdict{}, fault(fmt.Sprintf("its acr is longer than %d bytes, or has characters that cannot be shown", maxACR))
	}
	return v, nil
}

// issuedTo judges an ID token's audience (Core, section 3.1.3.7, rules 3 to 5):
// it is this client's, and where it is others' as well, it was made for this
// one.
func (c claims) issuedTo(client string) error {
	audience, err := c.strings("aud")
	if err != nil {
		return err
	}
	if !slices.Contains(audience, client) {
		return fault("it is for another audience")
	}
	party, err := c.text("azp")
	if err != nil {
		return err
	}
	if (len(audience) > 1 || c.has("azp")) && party != client {
		return fault("it was made for another client")
	}
	return nil
}

// onlyFor judges the audience of a token that somebody shows: who else takes it
// could show it too, so that nobody else may.
func (c claims) onlyFor(audience string) error {
	all, err := c.strings("aud")
	if err != nil {
		return err
	}
	switch {
	case audience == "":
		return fault("this broker has no audience configured, and so takes no tokens")
	case !slices.Contains(all, audience):
		return fault("it is for another audience")
	case len(all) > 1:
		return fault("it is for other audiences besides the broker's")
	}
	return nil
}

// personName is what the person is called by. An e-mail address counts only if
// the provider verified it; who could enter another's would be the other.
func (c claims) personName(claim string) (string, error) {
	name, err := c.text(claim)
	switch {
	case err != nil:
		return "", err
	case name == "":
		return "", fault(fmt.Sprintf("it has no claim %q, which people are named by here", claim))
	case claim == "email" && !c.truth("email_verified"):
		return "", fault("its e-mail address is not verified")
	case len(name) > broker.MaxPersonName:
		return "", fault(fmt.Sprintf("the person's name is longer than %d bytes", broker.MaxPersonName))
	case unprintable(name), strings.Contains(name, "|"), strings.TrimSpace(name) != name:
		return "", fault(`the person's name has "|", spaces around it, or characters that cannot be shown`)
	}
	return name, nil
}

// groups are the person's, sorted, each once. What cannot be a group is
// refused, not left out: a policy may forbid something to a group.
func (c claims) groups(claim string) ([]string, error) {
	var elsewhere map[string]json.RawMessage // Core, section 5.6.2
	if raw, ok := c["_claim_names"]; ok && json.Unmarshal(raw, &elsewhere) != nil {
		return nil, fault("its claim _claim_names is no object")
	}
	if _, ok := elsewhere[claim]; ok {
		return nil, fault("the identity provider does not list the person's groups in it: there are too many, so have it send only those that matter here")
	}
	groups, err := c.strings(claim)
	if err != nil {
		return nil, err
	}
	if len(groups) > maxGroups {
		return nil, fault(fmt.Sprintf("it lists more than %d groups: have the identity provider send only those that matter here", maxGroups))
	}
	for _, g := range groups {
		if g == "" || len(g) > maxGroup || unprintable(g) {
			return nil, fault(fmt.Sprintf("a group's name in it is empty, longer than %d bytes, or has characters that cannot be shown", maxGroup))
		}
	}
	slices.Sort(groups)
	return slices.Compact(groups), nil
}

// unprintable reports whether s has characters that change how the text around
// them is shown, or is not UTF-8.
func unprintable(s string) bool {
	return broker.Clean(s) != s || strings.ContainsRune(s, '\uFFFD')
}
