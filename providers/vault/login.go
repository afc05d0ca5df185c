package vault

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/mayfly-security/mayfly/attestation"
)

const (
	loginLimit = 15 * time.Second
	// The pause after a login that failed, jittered. Within it nobody tries
	// again: a Vault that comes back is not met by all callers at once.
	loginPauseMin = 250 * time.Millisecond
	loginPauseMax = 5 * time.Second
	// A login without an end of its own is made again after this.
	loginForGood = 15 * time.Minute
)

// session is the broker's login to Vault: one token, fetched with the broker's
// SVID, and again when two thirds of its life are over. One login is under way
// at a time, whoever waits for it. It has no goroutine of its own but for a
// login that is under way.
type session struct {
	client   *client
	identity attestation.LoginSource
	path     string // auth/jwt/login
	role     string
	audience string // empty: cert auth

	ctx  context.Context // ends with the provider
	stop context.CancelFunc
	wg   sync.WaitGroup

	mu      sync.Mutex
	token   string
	renewAt time.Time
	diesAt  time.Time     // of the token; by the monotonic clock, which is no business of Vault's or ours
	running chan struct{} // closed when the login that is under way is over; nil if none is
	err     error         // of the last login
	retryAt time.Time     // not before
	pause   time.Duration
}

func newSession(c *client, identity attestation.LoginSource, path, role, audience string) *session {
	s := &session{client: c, identity: identity, path: path, role: role, audience: audience}
	s.ctx, s.stop = context.WithCancel(context.Background())
	return s
}

// close ends a login that is under way, and waits for it.
func (s *session) close() {
	s.mu.Lock()
	s.stop()
	s.mu.Unlock()
	s.wg.Wait()
}

// get returns a token that is good as far as we know.
func (s *session) get(ctx context.Context) (string, error) {
	for {
		s.mu.Lock()
		now := time.Now()
		if s.token != "" && now.Before(s.renewAt) {
			token := s.token
			s.mu.Unlock()
			return token, nil
		}
		alive := s.token != "" && now.Before(s.diesAt)
		if s.running == nil {
			if now.Before(s.retryAt) || s.ctx.Err() != nil {
				token, err := s.token, s.err
				s.mu.Unlock()
				switch {
				case alive:
					return token, nil
				case err == nil:
					err = &fault{kind: login, what: "logging in to Vault", err: errors.New("the provider is closed")}
				}
				return "", err
			}
			s.running = make(chan struct{})
			s.wg.Go(s.login)
		}
		token, running := s.token, s.running
		s.mu.Unlock()
		if alive {
			return token, nil // good for a third of its life still
		}
		select {
		case <-running:
		case <-ctx.Done():
			return "", &fault{kind: login, what: "waiting for the login to Vault", err: ctx.Err()}
		}
	}
}

// dropped says that Vault does not know token any more.
func (s *session) dropped(token string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.token == token {
		s.token = ""
	}
}

// login fetches a token and lets those who wait go on.
func (s *session) login() {
	ctx, cancel := context.WithTimeout(s.ctx, loginLimit)
	defer cancel()
	asked := time.Now()
	token, ttl, err := s.fetch(ctx)
	s.mu.Lock()
	defer s.mu.Unlock()
	close(s.running)
	s.running, s.err = nil, err
	if err != nil {
		s.pause = min(max(2*s.pause, loginPauseMin), loginPauseMax)
		s.retryAt = time.Now().Add(s.pause/2 + rand.N(s.pause))
		return
	}
	s.token, s.pause, s.retryAt = token, 0, time.Time{}
	s.renewAt, s.diesAt = asked.Add(ttl*2/3), asked.Add(ttl)
}

func (s *session) fetch(ctx context.Context) (token string, ttl time.Duration, err error) {
	r := request{what: "logging in to Vault at " + s.path, path: s.path, quiet: true}
	if s.audience != "" {
		svid, _, err := s.identity.JWTSVID(ctx, s.audience)
		if err != nil {
			return "", 0, &fault{kind: login, what: "logging in to Vault", err: err}
		}
		r.body = map[string]string{"role": s.role, "jwt": svid}
	} else {
		r.body = map[string]string{"name": s.role}
	}
	secret, err := do(ctx, s.client.login, r)
	if err == nil && (secret == nil || secret.Auth == nil || secret.Auth.ClientToken == "") {
		err = &fault{kind: login, what: r.what, err: errors.New("the answer has no token: is this an auth method's path?")}
	}
	if err != nil {
		// Whatever Vault has against it, nothing can be done without a login:
		// the whole provider is away.
		if f := asFault(err); f.kind != away && f.kind != throttled {
			f.kind = login
		}
		return "", 0, err
	}
	ttl = time.Duration(secret.Auth.LeaseDuration) * time.Second
	if ttl <= 0 {
		ttl = loginForGood
	}
	return secret.Auth.ClientToken, ttl, nil
}

// with makes one call with the broker's token. If Vault does not know the
// token any more it logs in again and makes the call once more: a token that
// is not known has done nothing.
func (s *session) with(ctx context.Context, call func(token string) (*api.Secret, error)) (*api.Secret, error) {
	for attempt := 0; ; attempt++ {
		token, err := s.get(ctx)
		if err != nil {
			return nil, err
		}
		secret, err := call(token)
		if kindOf(err) != badToken {
			return secret, err
		}
		s.dropped(token)
		if attempt > 0 {
			f := asFault(err)
			f.kind, f.err = login, fmt.Errorf("a token that Vault just gave is not known to it")
			return nil, f
		}
	}
}
