// Package signin is people's sessions, and the sign-ins that are under way.
//
// The broker is the OpenID relying party: the browser goes from here to the
// identity provider and comes back here, its person is asked, and a program on
// their machine gets a one-time code on a loopback address (RFC 8252), which it redeems for a
// session with its own proof (RFC 7636). Sign-ins under way are in memory, and
// bounded; sessions are in the store, which has no more than the SHA-256 of a
// session's token.
package signin

import (
	"context"
	"errors"
	"log/slog"
	"net/url"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/mayfly-security/mayfly/attestation"
	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/store"
)

// The bounds of what is under way, and of sessions.
const (
	DefaultSessionTTL = time.Hour
	MaxSessionTTL     = 12 * time.Hour

	flowLife    = 10 * time.Minute // from /signin to the return of the browser
	codeLife    = time.Minute      // of a one-time code, until it is redeemed
	codeMemory  = 10 * time.Minute // for so long a code is known, so that a replay is seen
	mostFlows   = 1000             // of each kind; the oldest is dropped
	mostBearers = 10_000           // tokens whose person was told to the engine
	bearerLife  = 10 * time.Minute // and for how long

	// MaxSessions is how many sessions one person may have at once; the oldest ends.
	MaxSessions = 20
	// MaxToken is the longest bearer token that is looked at, in bytes.
	MaxToken = 8 << 10

	exchangeTime = 20 * time.Second // for the identity provider to answer
	sweepEvery   = 15 * time.Second
	skew         = time.Minute // how far the identity provider's clock may be ahead
)

// Config is what a Manager is made of.
type Config struct {
	Store    store.Store                  // required
	Provider attestation.IdentityProvider // required
	Log      *slog.Logger                 // required
	// Now is the broker's time. Required.
	Now func() time.Time
	// Late is the later of the broker's time and the machine's clock: what must
	// be over is judged by it. Nil means Now.
	Late func() time.Time
	// PersonSeen is told what the identity provider says of a person, before
	// anything is given to them. If it fails they are refused. Required.
	PersonSeen func(context.Context, broker.Person) error
	// SessionTTL is how long a session lasts; zero means DefaultSessionTTL, and
	// MaxSessionTTL is the most.
	SessionTTL time.Duration
	// Metrics takes the metrics of sign-ins and sessions; nil means that nobody
	// reads them.
	Metrics prometheus.Registerer
}

// Manager keeps sign-ins and sessions. Its methods may be called from many
// goroutines.
type Manager struct {
	cfg     Config
	flows   *pending[*flow]
	asks    *pending[*asked]
	codes   *pending[*code]
	devices *pending[*device]
	bearers *pending[struct{}]
	metrics *metrics

	mu      sync.Mutex
	changed chan struct{}    // closed when a session ends
	over    map[digest]ended // sessions that are over although the store may have them still
	cuts    map[string]cut   // by principal; those that the store may not have yet
	ctx     context.Context  // ends when Close is called
	cancel  context.CancelFunc
	wg      sync.WaitGroup
}

// New makes a Manager, which Close stops.
func New(cfg Config) (*Manager, error) {
	switch {
	case cfg.Store == nil:
		return nil, errors.New("signin: Config.Store is nil")
	case cfg.Provider == nil:
		return nil, errors.New("signin: Config.Provider is nil")
	case cfg.Log == nil:
		return nil, errors.New("signin: Config.Log is nil")
	case cfg.Now == nil:
		return nil, errors.New("signin: Config.Now is nil")
	case cfg.PersonSeen == nil:
		return nil, errors.New("signin: Config.PersonSeen is nil")
	case cfg.SessionTTL < 0 || cfg.SessionTTL > MaxSessionTTL:
		return nil, errors.New("signin: Config.SessionTTL is negative or longer than MaxSessionTTL")
	}
	if cfg.Late == nil {
		cfg.Late = cfg.Now
	}
	if cfg.SessionTTL == 0 {
		cfg.SessionTTL = DefaultSessionTTL
	}
	m := &Manager{
		cfg:     cfg,
		flows:   newPending[*flow](mostFlows, flowLife),
		asks:    newPending[*asked](mostFlows, flowLife),
		codes:   newPending[*code](mostFlows, codeMemory),
		devices: newPending[*device](mostFlows, 2*flowLife),
		bearers: newPending[struct{}](mostBearers, bearerLife),
		changed: make(chan struct{}), over: map[digest]ended{}, cuts: map[string]cut{},
	}
	m.metrics = newMetrics(cfg.Metrics, m)
	m.ctx, m.cancel = context.WithCancel(context.Background())
	m.wg.Go(m.run)
	return m, nil
}

// Close stops what runs by itself. Sessions stay as they are. It may be called
// more than once.
func (m *Manager) Close() {
	m.cancel()
	m.wg.Wait()
}

// Provider is who signs people in.
func (m *Manager) Provider() attestation.IdentityProvider { return m.cfg.Provider }

// Changed returns a channel that is closed when a session or a token ends by
// somebody's act: what goes on by one asks again then.
func (m *Manager) Changed() <-chan struct{} {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.changed
}

// signal closes that channel. Its caller holds mu.
func (m *Manager) signal() {
	close(m.changed)
	m.changed = make(chan struct{})
}

func (m *Manager) run() {
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			if err := m.sweep(m.ctx); err != nil && m.ctx.Err() == nil {
				m.cfg.Log.Error("ending sessions that are over; it is tried again", "error", err)
			}
		case <-m.ctx.Done():
			return
		}
	}
}

// failed is the refusal of a sign-in that cannot go on.
func failed(message string) *broker.Error {
	return broker.Refuse(broker.ReasonSignIn, message, "begin again with `mayfly login`")
}

// withQuery adds parameters to a redirect URI, which has none.
func withQuery(uri string, q url.Values) string { return uri + "?" + q.Encode() }
