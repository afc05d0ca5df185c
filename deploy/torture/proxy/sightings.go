package proxy

import (
	"encoding/json"
	"net/http"
	"strings"
	"sync"
)

// sightings are what passes of attempts to mint: a token is made for a lease,
// a credential is read with it.
type sightings struct {
	mu      sync.Mutex
	lease   map[string]string   // by token
	minting map[string]struct{} // leases whose attempt is under way
	twice   map[string]struct{} // leases one of whose mint requests was repeated
	users   map[string]string   // user names that Vault told of, and their leases
	ids     map[string]string   // Vault's lease IDs, by lease
}

func newSightings() *sightings {
	return &sightings{
		lease: map[string]string{}, minting: map[string]struct{}{}, twice: map[string]struct{}{},
		users: map[string]string{}, ids: map[string]string{},
	}
}

func isCreate(r *http.Request) bool { return strings.Contains(r.URL.Path, "/auth/token/create/") }
func isRead(r *http.Request) bool   { return strings.Contains(r.URL.Path, "/creds/") }

// began notes a request, and returns the lease that it is for.
func (s *sightings) began(r *http.Request, body []byte) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case isCreate(r):
		var ask struct {
			Meta map[string]string `json:"meta"`
		}
		if json.Unmarshal(body, &ask) != nil {
			return ""
		}
		id := ask.Meta["mayfly_lease"]
		if id != "" {
			s.minting[id] = struct{}{}
		}
		return id
	case isRead(r) && !strings.Contains(r.URL.Path, "/sys/"):
		return s.lease[r.Header.Get("X-Vault-Token")]
	}
	return ""
}

// over notes the end of a request: a is nil if there was no answer.
func (s *sightings) over(r *http.Request, lease string, a *answer) {
	if lease == "" {
		return
	}
	if a != nil {
		s.told(r, lease, a)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if isRead(r) || a == nil || a.status >= 300 {
		delete(s.minting, lease)
	}
}

// told notes what the real server answered.
func (s *sightings) told(r *http.Request, lease string, a *answer) {
	var said struct {
		LeaseID string `json:"lease_id"`
		Auth    struct {
			Token string `json:"client_token"`
		} `json:"auth"`
		Data struct {
			Username string `json:"username"`
		} `json:"data"`
	}
	if lease == "" || json.Unmarshal(a.body, &said) != nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if isCreate(r) && said.Auth.Token != "" {
		s.lease[said.Auth.Token] = lease
	}
	if isRead(r) && said.Data.Username != "" {
		s.users[said.Data.Username] = lease
		s.ids[lease] = said.LeaseID
	}
}

func (s *sightings) doubled(lease string) {
	if lease == "" {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.twice[lease] = struct{}{}
}

// Minting is how many attempts to mint are under way: a token was asked for,
// and the credential's answer has not come.
func (p *Proxy) Minting() int {
	p.seen.mu.Lock()
	defer p.seen.mu.Unlock()
	return len(p.seen.minting)
}

// Gone forgets the attempts under way: whoever made them is dead.
func (p *Proxy) Gone() {
	p.seen.mu.Lock()
	defer p.seen.mu.Unlock()
	clear(p.seen.minting)
}

// Doubled reports whether a request of a lease's attempt to mint was repeated.
// Its token has two uses, so that Vault may have ended it, and the credential.
func (p *Proxy) Doubled(lease string) bool {
	p.seen.mu.Lock()
	defer p.seen.mu.Unlock()
	_, is := p.seen.twice[lease]
	return is
}

// Told reports whether Vault answered with a user name, to whomever.
func (p *Proxy) Told(user string) bool {
	p.seen.mu.Lock()
	defer p.seen.mu.Unlock()
	_, is := p.seen.users[user]
	return is
}

// VaultLease is Vault's ID of a lease's credential; empty if it is not known.
func (p *Proxy) VaultLease(lease string) string {
	p.seen.mu.Lock()
	defer p.seen.mu.Unlock()
	return p.seen.ids[lease]
}
