// Package lease is the engine: it issues, revokes, expires and recovers. It
// owns the state of grants, incidents and leases in the store, and keeps the
// invariants of the design (I1 to I8):
//
//   - nothing is made at a provider before a durable intent (issue.go, mint.go);
//   - nothing is delivered before the commit that makes its lease active, and
//     that commit reads again what the lease lives on (guard.go);
//   - what must end is in the store's due index, and a worker for each
//     provider retries for ever (worker.go);
//   - a change that ends leases is one commit and a durable sweep (sweep.go).
package lease

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/audit"
	"github.com/mayfly-security/mayfly/broker/catalog"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/store"
)

// Config is what an Engine is made of.
type Config struct {
	Store   store.Store                 // required
	Catalog *catalog.Snapshot           // required: the catalog to begin with
	Drivers map[string]providers.Driver // required: by the name that the catalog uses
	Log     *slog.Logger                // required
	// Metrics takes the engine's metrics; nil means that nobody reads them.
	Metrics prometheus.Registerer
	// Wall is the machine's clock; nil means time.Now.
	Wall func() time.Time
	// Retention is how long the record of a lease, a request, a grant or an
	// incident stays after its end; zero means 30 days. Its evidence stays for
	// ever.
	Retention time.Duration
	// ReplayWindow is how long, after an answer, the same idempotency key is
	// given the same secret again; zero means 2 minutes. For so long the
	// secret stays in memory. Secrets of inert providers are made again
	// instead, for as long as their lease lives, and never kept.
	ReplayWindow time.Duration
	// Room reports an error while the store has so little room left that it is
	// kept for ending: then nothing is given. Nil means that there is always
	// room. It is asked at most once a second.
	Room func() error
	// EndWait is how long a call that ends leases waits for their deaths to be
	// confirmed before it answers how many are still being revoked; zero means
	// 5 seconds.
	EndWait time.Duration
	// RetryMin and RetryMax bound the pause between two tries to end a lease;
	// zero means 500 ms and 1 minute.
	RetryMin, RetryMax time.Duration
	// MintWait is how long a request waits while a provider has as many mints
	// under way as it takes, before it is refused; zero means 2 seconds.
	MintWait time.Duration
	// InventoryEvery is how often each provider that can list what it has is
	// compared with the store; zero means 1 minute.
	InventoryEvery time.Duration
}

// Engine issues leases and ends them. Its methods may be called from many
// goroutines.
type Engine struct {
	cfg          Config
	store        store.Store
	log          *slog.Logger
	clock        *clock
	installation broker.InstallationID
	metrics      *metrics

	loading sync.Mutex   // one Load at a time
	loadMu  sync.RWMutex // held while the catalog is exchanged, which is one commit
	current atomic.Pointer[epoch]

	deliveries *deliveries
	replays    *replays
	keys       keyLocks
	refusals   *refusals
	paces      *paces
	decisions  decisions
	watch      *broadcast // signalled when leases end
	asks       *broadcast // signalled when requests change
	ending     endings    // kill switches under way in this process
	carriers   carriers   // cut-offs under way in this process

	mintMu  sync.Mutex
	minting map[broker.LeaseID]struct{} // attempts under way in this process

	workMu  sync.Mutex
	workers map[string]*worker // by provider
	house   *housekeeper

	limbo *limbo

	gateMu sync.Mutex
	gates  map[string]*gate // by provider

	inventories  map[string]*inventory // by provider; with workMu
	metricStrays *prometheus.CounterVec

	highWater atomic.Int64 // the clock mark in the store, Unix nanoseconds
	clockBad  atomic.Bool  // as last told to operators

	roomMu   sync.Mutex
	roomAt   time.Time // when room was last asked for
	roomLeft error     // what it said

	ctx    context.Context // ends when Close is called
	cancel context.CancelFunc
	wg     sync.WaitGroup
	closed atomic.Bool
}

// New opens the engine on its store, loads the catalog, recovers what an
// earlier run left, and starts its workers. It returns when leases can be
// issued.
func New(ctx context.Context, cfg Config) (*Engine, error) {
	switch {
	case cfg.Store == nil:
		return nil, errors.New("lease: Config.Store is nil")
	case cfg.Catalog == nil:
		return nil, errors.New("lease: Config.Catalog is nil")
	case cfg.Drivers == nil:
		return nil, errors.New("lease: Config.Drivers is nil")
	case cfg.Log == nil:
		return nil, errors.New("lease: Config.Log is nil")
	}
	if cfg.Wall == nil {
		cfg.Wall = time.Now
	}
	setDefault(&cfg.Retention, 30*24*time.Hour)
	setDefault(&cfg.ReplayWindow, 2*time.Minute)
	setDefault(&cfg.EndWait, 5*time.Second)
	setDefault(&cfg.RetryMin, 500*time.Millisecond)
	setDefault(&cfg.RetryMax, time.Minute)
	setDefault(&cfg.MintWait, 2*time.Second)
	setDefault(&cfg.InventoryEvery, time.Minute)

	e := &Engine{
		cfg: cfg, store: cfg.Store, log: cfg.Log,
		deliveries:  newDeliveries(),
		watch:       newBroadcast(),
		asks:        newBroadcast(),
		minting:     map[broker.LeaseID]struct{}{},
		workers:     map[string]*worker{},
		limbo:       newLimbo(),
		gates:       map[string]*gate{},
		inventories: map[string]*inventory{},
	}
	e.replays = newReplays(cfg.ReplayWindow)
	e.ctx, e.cancel = context.WithCancel(context.WithoutCancel(ctx))
	if err := e.openStore(ctx); err != nil {
		e.cancel()
		return nil, err
	}
	e.metrics = newMetrics(cfg.Metrics, e)
	e.metricStrays = newStrayCounter(cfg.Metrics, e)
	e.refusals = newRefusals(e)
	e.paces = newPaces()
	e.house = newHousekeeper(e)
	if err := e.restore(ctx); err != nil {
		e.cancel()
		return nil, fmt.Errorf("restoring the store from a backup: %w", err)
	}
	if err := e.recoverMints(ctx); err != nil {
		e.cancel()
		return nil, fmt.Errorf("recovering leases: %w", err)
	}
	if err := e.load(ctx, cfg.Catalog, audit.Broker, true); err != nil {
		e.Close()
		return nil, err
	}
	e.wg.Go(e.house.run)
	e.wg.Go(e.watchTime)
	return e, nil
}

func setDefault(d *time.Duration, v time.Duration) {
	if *d == 0 {
		*d = v
	}
}

// openStore makes or reads the installation ID and the clock's high-water mark.
func (e *Engine) openStore(ctx context.Context) error {
	var highWater time.Time
	var id broker.InstallationID
	err := e.store.Update(ctx, func(t store.Txn) error {
		var ok bool
		var err error
		if highWater, _, err = get[time.Time](t, keyClock); err != nil {
			return err
		}
		if id, ok, err = get[broker.InstallationID](t, keyInstallation); err != nil || ok {
			return err
		}
		id = broker.NewInstallationID(e.cfg.Wall())
		return put(t, keyInstallation, id)
	})
	if err != nil {
		return fmt.Errorf("opening the store: %w", err)
	}
	e.installation = id
	e.clock = newClock(e.cfg.Wall, highWater)
	e.highWater.Store(highWater.UnixNano())
	return nil
}

// Close stops the workers and waits for them. Leases stay as they are: the
// next run goes on with them. It does not close the store. It may be called
// more than once.
func (e *Engine) Close() {
	if e.closed.Swap(true) {
		return
	}
	e.refusals.flush(context.WithoutCancel(e.ctx))
	e.cancel()
	e.wg.Wait()
	if ep := e.current.Load(); ep != nil {
		for _, p := range ep.providers {
			p.release()
		}
	}
}

// InstallationID is the store's.
func (e *Engine) InstallationID() broker.InstallationID { return e.installation }

// Catalog is the snapshot that decisions are made by now.
func (e *Engine) Catalog() *catalog.Snapshot { return e.current.Load().catalog }

// Now is the engine's time.
func (e *Engine) Now() time.Time { return e.clock.now() }

// Late is the later of the engine's time and the machine's clock: what must be
// over is judged by it.
func (e *Engine) Late() time.Time { return e.clock.late() }

// Ready returns an error while the engine gives nothing: its clock is not
// trusted, its store cannot be written, or it is closed.
func (e *Engine) Ready(ctx context.Context) error {
	if e.closed.Load() {
		return broker.Refuse(broker.ReasonShuttingDown, "the broker is stopping", "try again")
	}
	if err := e.clock.trusted(); err != nil {
		return err
	}
	if err := e.room(); err != nil {
		return err
	}
	return e.house.storeError()
}

// room refuses while the store's last room is kept for ending.
func (e *Engine) room() error {
	if e.cfg.Room == nil {
		return nil
	}
	e.roomMu.Lock()
	defer e.roomMu.Unlock()
	if now := e.clock.now(); e.roomAt.IsZero() || now.Sub(e.roomAt) >= time.Second {
		e.roomAt, e.roomLeft = now, e.cfg.Room()
	}
	if e.roomLeft == nil {
		return nil
	}
	return broker.Refuse(broker.ReasonStore, "the broker's store is nearly full, and what is left is kept for ending",
		"an operator makes room; see the log").Because(e.roomLeft)
}

// update runs one transaction that gives or ends something. It keeps the
// clock's high-water mark with it, and turns a store that cannot be written
// into a refusal.
func (e *Engine) update(ctx context.Context, now time.Time, fn func(t store.Txn) error) error {
	const step = time.Second // the mark is written at most this often
	err := e.store.Update(ctx, func(t store.Txn) error {
		if err := fn(t); err != nil {
			return err
		}
		if now.UnixNano()-e.highWater.Load() >= int64(step) {
			return put(t, keyClock, now)
		}
		return nil
	})
	if err == nil {
		for {
			old := e.highWater.Load()
			if now.UnixNano()-old < int64(step) || e.highWater.CompareAndSwap(old, now.UnixNano()) {
				break
			}
		}
	}
	return storeRefusal(err)
}

// storeRefusal turns the store's own errors into a refusal that a caller may see.
func storeRefusal(err error) error {
	if errors.Is(err, store.ErrUnavailable) || errors.Is(err, store.ErrUnknown) || errors.Is(err, store.ErrClosed) {
		return broker.Refuse(broker.ReasonStore, "the broker cannot write its store",
			"try again later; operators see the cause in the log").Because(err)
	}
	return err
}
