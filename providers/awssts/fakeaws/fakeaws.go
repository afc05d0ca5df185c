// Package fakeaws is a fake of the parts of AWS STS and IAM that ending
// sessions needs: roles with inline policies and their quota, sessions with
// session policies and tags, writes that are seen and in force late, requests
// that are throttled or held in the middle. It is for tests: AWS itself cannot
// run here. It takes every signature for good, and evaluates only what Mayfly
// writes; what it does not know it reports as an error.
package fakeaws

import (
	"net/url"
	"slices"
	"sync"
	"time"
)

// Config is how a Fake behaves. The zero Config is a prompt and patient AWS.
type Config struct {
	Now func() time.Time // AWS's clock; nil means time.Now
	// Seen and Force are how long after a write reads show it, and sessions are
	// judged by it. Each gets the number of the write.
	Seen, Force func(n int) time.Duration
	// Fail, if not nil, may answer a request with an error code instead, such
	// as "Throttling" (400) or "ServiceFailure" (500): before anything is done.
	Fail func(action string, n int) (code string, status int)
	// Hold, if not nil, is called before a request is acted upon and after it
	// came in: it may block.
	Hold func(action string, form url.Values)
	// Quiet acts and answers nothing, cutting the connection, where it returns true.
	Quiet func(action string, n int) bool
	// NoProbe: roles do not allow sts:DecodeAuthorizationMessage.
	NoProbe bool
	// Above, if not nil, is the kind of a policy above the role's own, such as
	// "service control policy", that denies everything to sessions; empty: none does.
	Above func() string
	// Broker names the role whose sessions alone may assume the others and write
	// their policies. Empty: whoever has keys may.
	Broker string
	// Token, if not nil, looks at the token of who comes with a web identity.
	Token func(token string) error
}

// Fake is a fake AWS account. It is an http.Handler.
type Fake struct {
	c Config

	mu       sync.Mutex
	roles    map[string]*role
	sessions map[string]*Session // by access key
	serial   int
	writes   int
	counts   map[string]int
	problems []string
	most     int // characters that a role's policies had at most
	parsed   map[string]policyDocument
}

type role struct {
	policies map[string][]version
	about    Role
}

// New makes a Fake with the roles of these names.
func New(c Config, roles ...string) *Fake {
	if c.Now == nil {
		c.Now = time.Now
	}
	none := func(int) time.Duration { return 0 }
	if c.Seen == nil {
		c.Seen = none
	}
	if c.Force == nil {
		c.Force = none
	}
	f := &Fake{c: c, roles: map[string]*role{}, sessions: map[string]*Session{}, counts: map[string]int{}, parsed: map[string]policyDocument{}}
	for _, name := range roles {
		f.roles[name] = &role{policies: map[string][]version{}}
	}
	return f
}

// Problems are what the Fake was asked and does not know.
func (f *Fake) Problems() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.problems)
}

// Most is how many characters the policies of a role had at most.
func (f *Fake) Most() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.most
}

// Count is how many requests of an action were acted upon.
func (f *Fake) Count(action string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.counts[action]
}
