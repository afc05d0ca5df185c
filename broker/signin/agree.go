package signin

import (
	"context"
	"crypto/subtle"
	"net/url"

	"github.com/mayfly-security/mayfly/broker"
)

// Landing is where a browser is that comes back from the identity provider:
// either it goes on to To, or its person is asked.
type Landing struct {
	To  string
	Ask *Question
}

// Question is what a person is asked before a program gets a session of theirs.
// Identity providers sign people in without a word where they are signed in
// already. Whoever can have a browser open a link, and listens on the machine,
// would have a session without anybody noticing (RFC 8252, section 8.6).
type Question struct {
	Secret      string // the answer comes with it
	Person      broker.Person
	RedirectURI string // where the program listens
	Check       string // what the program shows, too
}

// Answer is a person's.
type Answer struct {
	Secret  string
	Browser string // the secret that Begun gave it
	Yes     bool
}

// asked is a sign-in that waits for its person's answer.
type asked struct {
	flow   *flow
	person broker.Person
}

// ask asks the person.
func (m *Manager) ask(f *flow, p broker.Person) Landing {
	secret := newSecret()
	m.asks.add(secret, &asked{f, p}, f.from, m.cfg.Now())
	return Landing{Ask: &Question{Secret: secret, Person: p, RedirectURI: f.redirectURI, Check: broker.SignInCheck(f.challenge)}}
}

// Agree takes the person's answer, and returns where the browser goes with it:
// to the program, with a code or with an error. denied is the refusal that a no
// is, and by whom: somebody may have tried to get a session of theirs.
func (m *Manager) Agree(ctx context.Context, a Answer) (to string, by broker.Person, denied, err error) {
	now := m.cfg.Now()
	over := failed("no sign-in waits for this answer: it took longer than ten minutes, or was finished before")
	w, ok := m.asks.get(a.Secret, now)
	if !ok {
		m.metrics.signIn(broker.SignInBrowser, "unknown")
		return "", by, nil, over
	}
	browser := digestOf(a.Browser)
	if subtle.ConstantTimeCompare(browser[:], w.flow.browser[:]) != 1 {
		m.metrics.signIn(broker.SignInBrowser, "other_browser")
		return "", by, nil, failed("this sign-in was begun in another browser, or this one keeps no cookies")
	}
	if _, first := m.asks.take(a.Secret, now); !first {
		m.metrics.signIn(broker.SignInBrowser, "unknown")
		return "", by, nil, over
	}
	if !a.Yes {
		m.metrics.signIn(broker.SignInBrowser, "denied")
		m.cfg.Log.WarnContext(ctx, "a person did not agree to a sign-in as them: somebody else may have begun it", "person", w.person.Name)
		denied = failed("the person did not agree to it")
		return withQuery(w.flow.redirectURI, errorQuery(denied, "access_denied", w.flow.state)), w.person, denied, nil
	}
	one := newSecret()
	m.codes.add(one, &code{person: w.person, redirectURI: w.flow.redirectURI, challenge: w.flow.challenge, signedIn: w.flow.returned, made: now}, w.flow.from, now)
	return withQuery(w.flow.redirectURI, url.Values{"code": {one}, "state": {w.flow.state}}), w.person, nil, nil
}
