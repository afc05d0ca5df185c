package lease

import (
	"context"
	"sync"
	"time"

	"github.com/mayfly-security/mayfly/broker"
)

// deliveries knows which secrets are on their way to their agents, by grant. A
// delivery is registered before the commit (or the read) that decides it, so
// that whoever commits an end and then waits has waited for every delivery
// that was decided before.
type deliveries struct {
	mu  sync.Mutex
	now map[broker.GrantID]map[chan struct{}]struct{}
}

func newDeliveries() *deliveries {
	return &deliveries{now: map[broker.GrantID]map[chan struct{}]struct{}{}}
}

// begin registers a delivery and returns what ends it; that may be called more
// than once.
func (d *deliveries) begin(grant broker.GrantID) (done func()) {
	ch := make(chan struct{})
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.now[grant] == nil {
		d.now[grant] = map[chan struct{}]struct{}{}
	}
	d.now[grant][ch] = struct{}{}
	return sync.OnceFunc(func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		delete(d.now[grant], ch)
		if len(d.now[grant]) == 0 {
			delete(d.now, grant)
		}
		close(ch)
	})
}

// wait returns when every delivery of the grant that had begun has ended.
func (d *deliveries) wait(ctx context.Context, grant broker.GrantID) error {
	d.mu.Lock()
	pending := make([]chan struct{}, 0, len(d.now[grant]))
	for ch := range d.now[grant] {
		pending = append(pending, ch)
	}
	d.mu.Unlock()
	for _, ch := range pending {
		select {
		case <-ch:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// replayed is a secret that is kept for a moment for a caller whose answer was
// lost on the way.
type replayed struct {
	secret broker.Secret
	env    map[string]string
	until  time.Time
}

// maxReplays bounds the secrets that are in memory at once.
const maxReplays = 4096

// replays keeps the secrets of the last moments by idempotency key.
type replays struct {
	window time.Duration

	mu    sync.Mutex
	byKey map[string]replayed
	order []string // by until, oldest first; may name keys that are gone
}

func newReplays(window time.Duration) *replays {
	return &replays{window: window, byKey: map[string]replayed{}}
}

func (r *replays) put(key string, s replayed, now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.prune(now)
	s.until = now.Add(r.window)
	r.byKey[key] = s
	r.order = append(r.order, key)
	for len(r.order) > maxReplays {
		delete(r.byKey, r.order[0])
		r.order = r.order[1:]
	}
}

func (r *replays) get(key string, now time.Time) (replayed, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.prune(now)
	s, ok := r.byKey[key]
	return s, ok
}

// forget drops what is too old.
func (r *replays) forget(now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.prune(now)
}

func (r *replays) prune(now time.Time) {
	for len(r.order) > 0 {
		s, ok := r.byKey[r.order[0]]
		if ok && now.Before(s.until) {
			return
		}
		delete(r.byKey, r.order[0])
		r.order = r.order[1:]
	}
}

// keyLocks lets one request at a time work under an idempotency key. The zero
// value is ready.
type keyLocks struct {
	mu sync.Mutex
	m  map[string]*keyLock
}

type keyLock struct {
	held  chan struct{} // has room for one
	users int
}

func (k *keyLocks) lock(ctx context.Context, key string) (unlock func(), err error) {
	k.mu.Lock()
	if k.m == nil {
		k.m = map[string]*keyLock{}
	}
	l := k.m[key]
	if l == nil {
		l = &keyLock{held: make(chan struct{}, 1)}
		k.m[key] = l
	}
	l.users++
	k.mu.Unlock()

	leave := func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		if l.users--; l.users == 0 {
			delete(k.m, key)
		}
	}
	select {
	case l.held <- struct{}{}:
		return func() { <-l.held; leave() }, nil
	case <-ctx.Done():
		leave()
		return nil, ctx.Err()
	}
}

// broadcast wakes everybody who waits for something to change.
type broadcast struct {
	mu sync.Mutex
	ch chan struct{}
}

func newBroadcast() *broadcast { return &broadcast{ch: make(chan struct{})} }

// next returns a channel that is closed at the next signal.
func (b *broadcast) next() <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.ch
}

func (b *broadcast) signal() {
	b.mu.Lock()
	defer b.mu.Unlock()
	close(b.ch)
	b.ch = make(chan struct{})
}
