package lease

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/audit"
	"github.com/mayfly-security/mayfly/broker/catalog"
	"github.com/mayfly-security/mayfly/broker/policy"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/store"
)

// epoch is one loaded catalog with its open providers. It never changes; a
// reload makes the next one.
type epoch struct {
	generation uint64
	catalog    *catalog.Snapshot
	providers  map[string]*openProvider
	tried      *policy.Set // a set that is tried and not loaded; nil but in previews
}

// openProvider is a provider in use. It is closed when the epoch that holds it
// is over and the last call on it has returned.
type openProvider struct {
	providers.Provider
	traits providers.Traits
	driver string
	raw    []byte
	system string // a digest of the driver and of what of the configuration says which system it is

	mu   sync.Mutex
	refs int
}

func openOne(ctx context.Context, driver providers.Driver, name string, cfg providers.Config) (*openProvider, error) {
	p, err := driver.Open(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("opening provider %s: %w", cfg.Name, err)
	}
	t := p.Traits()
	setDefault(&t.MintTimeout, 30*time.Second)
	setDefault(&t.RevokeTimeout, 30*time.Second)
	if t.Batch <= 0 {
		t.Batch = 64
	}
	if t.Concurrency <= 0 {
		t.Concurrency = 4
	}
	if t.MintConcurrency <= 0 {
		t.MintConcurrency = 64
	}
	meaning := cfg.Raw
	if m, ok := driver.(providers.Meaning); ok {
		if meaning, err = m.Meaning(cfg.Raw); err != nil {
			p.Close()
			return nil, fmt.Errorf("opening provider %s: %w", cfg.Name, err)
		}
	}
	return &openProvider{Provider: p, traits: t, driver: name, raw: cfg.Raw, system: requestDigest(name, meaning), refs: 1}, nil
}

// acquire takes a reference; it reports false if the provider is closed.
func (p *openProvider) acquire() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.refs == 0 {
		return false
	}
	p.refs++
	return true
}

func (p *openProvider) release() {
	p.mu.Lock()
	p.refs--
	last := p.refs == 0
	p.mu.Unlock()
	if last {
		p.Provider.Close()
	}
}

// provider returns the provider of that name with a reference taken.
func (e *Engine) provider(name string) (*openProvider, error) {
	for {
		ep := e.current.Load()
		p, ok := ep.providers[name]
		if !ok {
			return nil, fmt.Errorf("provider %s is not in the catalog", name)
		}
		if p.acquire() {
			return p, nil
		}
		if e.current.Load() == ep {
			return nil, errors.New("the engine is closed")
		}
	}
}

// settled waits for a reload under way and returns the epoch after it.
func (e *Engine) settled() *epoch {
	e.loadMu.RLock()
	defer e.loadMu.RUnlock()
	return e.current.Load()
}

// agent returns a refusal unless the caller is a known and enabled agent.
func (ep *epoch) agent(id spiffeid.ID) error {
	a, known := ep.catalog.Agent(id)
	if !known || a.Disabled {
		return policy.AgentRefusal(id.String(), known)
	}
	return nil
}

// Load exchanges the catalog. When it has returned nil, every later delivery
// is decided by the new one, and the leases that it no longer allows are being
// ended. A set that cannot take the place of the present one is refused as a
// whole, the refusal is evidence, and the present one stays. actor says who
// asked for it.
func (e *Engine) Load(ctx context.Context, next *catalog.Snapshot, actor string) error {
	return e.load(ctx, next, actor, false)
}

// ErrExchanged goes with an error of Load that came after the exchange: the new
// catalog decides, and what it ends is being ended.
var ErrExchanged = errors.New("the catalog was exchanged, and what it ends is still being ended")

// RefuseLoad records that a new catalog was refused before it came to Load.
func (e *Engine) RefuseLoad(ctx context.Context, cause error, actor string) {
	e.loadRefused(ctx, cause, actor)
}

func (e *Engine) loadRefused(ctx context.Context, cause error, actor string) {
	now := e.clock.now()
	err := e.update(ctx, now, func(t store.Txn) error {
		return appendEvent(t, audit.Event{Time: now, Type: audit.CatalogRefused, Actor: actor,
			Reason: broker.OneLine(broker.Shorten(cause.Error(), 2000))})
	})
	if err != nil {
		e.log.Error("recording a refused catalog", "error", err)
	}
}

func (e *Engine) load(ctx context.Context, next *catalog.Snapshot, actor string, first bool) error {
	if e.closed.Load() {
		return broker.Refuse(broker.ReasonShuttingDown, "the broker is stopping", "try again")
	}
	if err := e.keepsAdministrators(next, first); err != nil {
		e.loadRefused(ctx, err, actor)
		return err
	}
	opened, err := e.exchange(ctx, next, actor)
	if err != nil {
		for _, p := range opened {
			p.release()
		}
		if !first {
			e.loadRefused(ctx, err, actor)
		}
		return err
	}
	e.house.poke()
	if !first {
		// Deliveries that were decided by the old catalog end before this
		// returns, and so do the leases that they were of.
		grants, err := e.sweepCatalog(ctx)
		if err == nil {
			err = e.awaitDeliveries(ctx, grants...)
		}
		if err != nil {
			return fmt.Errorf("%w: %w", ErrExchanged, err)
		}
	}
	return nil
}

// keepsAdministrators refuses a catalog that would let nobody administer. One
// that the broker begins with is taken all the same, and said aloud: a broker
// that does not start lets nobody recover, and ends nothing.
func (e *Engine) keepsAdministrators(next *catalog.Snapshot, first bool) error {
	err := policy.Lockout(next.Policies(), next.Administrators(e.clock.now()), e.clock.now())
	if err != nil && first {
		e.log.Error("NOBODY may administer this broker by its policies; `mayflyd recover` lets somebody for a while", "error", err)
		return nil
	}
	return err
}

// exchange commits the new generation and puts the new epoch in place. The
// providers it opened are returned in any case.
//
// Opening providers may take its time; nothing waits for it. Only the commit
// and the exchange itself keep others out.
func (e *Engine) exchange(ctx context.Context, next *catalog.Snapshot, actor string) (opened []*openProvider, err error) {
	e.loading.Lock()
	defer e.loading.Unlock()
	old := e.current.Load()
	ep := &epoch{catalog: next, providers: map[string]*openProvider{}}
	if opened, err = e.openProviders(ctx, ep, old); err != nil {
		return opened, err
	}
	e.loadMu.Lock()
	defer e.loadMu.Unlock()
	if err := e.providersStay(ctx, ep); err != nil {
		return opened, err
	}
	if err := e.commitEpoch(ctx, ep, old, actor); err != nil {
		return opened, err
	}
	if old != nil {
		e.keepNeeded(ctx, old, ep)
	}
	e.current.Store(ep)
	e.startWorkers(ep)
	e.startInventories(ep)
	if old != nil {
		for _, p := range old.providers {
			p.release()
		}
	}
	return nil, nil
}

// openTimeout bounds the opening of all providers of a catalog.
const openTimeout = time.Minute

// openProviders opens the providers of a new epoch, or takes over those of the
// old one that stay as they are. It returns what it opened or took, also with
// an error.
func (e *Engine) openProviders(ctx context.Context, ep, old *epoch) (opened []*openProvider, err error) {
	ctx, cancel := context.WithTimeout(ctx, openTimeout)
	defer cancel()
	for _, pc := range ep.catalog.Providers() {
		if old != nil {
			if p := old.providers[pc.Name]; p != nil && p.driver == pc.Driver && bytes.Equal(p.raw, pc.Config) && p.acquire() {
				ep.providers[pc.Name] = p
				opened = append(opened, p)
				continue
			}
		}
		driver, ok := e.cfg.Drivers[pc.Driver]
		if !ok {
			return opened, fmt.Errorf("provider %s: there is no driver %q", pc.Name, pc.Driver)
		}
		p, err := openOne(ctx, driver, pc.Driver, providers.Config{
			Name: pc.Name, Installation: e.installation, Raw: pc.Config,
			Log: e.log.With("provider", pc.Name), Now: e.clock.early,
			Known: func(ctx context.Context, begun bool) ([]providers.Known, error) {
				return e.known(ctx, pc.Name, begun)
			},
			Cuts: func(ctx context.Context) ([]providers.Cut, error) { return e.cuts(ctx, pc.Name) },
		})
		if err != nil {
			return opened, err
		}
		ep.providers[pc.Name] = p
		opened = append(opened, p)
	}
	return opened, nil
}

// commitEpoch commits the new generation: from here on the old epoch gives
// nothing.
func (e *Engine) commitEpoch(ctx context.Context, ep, old *epoch, actor string) error {
	now := e.clock.now()
	return e.update(ctx, now, func(t store.Txn) error {
		was, _, err := get[catalogRecord](t, keyCatalog)
		if err != nil {
			return err
		}
		ep.generation = was.Generation + 1
		systems := map[string]string{}
		for name, p := range ep.providers {
			systems[name] = p.system
		}
		if err := put(t, keyCatalog, catalogRecord{Generation: ep.generation, Digest: ep.catalog.Digest(), Systems: systems}); err != nil {
			return err
		}
		if err := put(t, keySweep(sweepCatalog, "all"), sweepRecord{Actor: actor}); err != nil {
			return err
		}
		ev := audit.Event{Time: now, Type: audit.CatalogLoaded, Actor: actor,
			Details: map[string]string{"digest": ep.catalog.Digest(), "previous_digest": was.Digest, "policy_digest": ep.policies().Digest()}}
		if old != nil {
			ev.Details["difference"] = broker.Shorten(strings.Join(catalog.Diff(old.catalog, ep.catalog), "; "), 8000)
		} else if err := appendEvent(t, audit.Event{Time: now, Type: audit.BrokerStarted, Actor: audit.Broker,
			Details: map[string]string{"installation": string(e.installation)}}); err != nil {
			return err
		}
		return appendEvent(t, ev)
	})
}

// providersStay refuses a catalog in which a provider that still has leases is
// missing, or stands for another system: nobody could end them, and a system
// that does not know them would say that they are dead.
func (e *Engine) providersStay(ctx context.Context, ep *epoch) error {
	return e.store.View(ctx, func(r store.Reader) error {
		was, _, err := get[catalogRecord](r, keyCatalog)
		if err != nil {
			return err
		}
		if err := cutOffsStay(r, ep, was); err != nil {
			return err
		}
		from, to := store.Prefix(prefixDue)
		for from != "" {
			name := ""
			for entry, err := range r.Scan(from, to) {
				if err != nil {
					return err
				}
				name = strings.Split(entry.Key, "|")[1]
				break
			}
			if name == "" {
				return nil
			}
			if _, ok := ep.providers[name]; !ok {
				return broker.Refusef(broker.ReasonConflict,
					"keep the provider until its leases have ended (`mayfly leases`), then remove it",
					"provider %s is not in the catalog, but it has leases that have not ended", name)
			}
			if system := was.Systems[name]; system != "" && system != ep.providers[name].system {
				return broker.Refusef(broker.ReasonConflict,
					"give the new system a new provider name, or wait until the leases have ended (`mayfly leases`)",
					"provider %s would stand for another system, but it has leases of the present one that have not ended", name)
			}
			_, from = store.Prefix(prefixDueOf(name))
		}
		return nil
	})
}

// keepNeeded takes over the providers that the new catalog does not have but
// that got a lease after providersStay had looked, from an attempt that the old
// catalog had decided, or a cut-off: somebody must end it. After the commit of
// the new generation no more can come. The next reload is refused until they
// have ended.
func (e *Engine) keepNeeded(ctx context.Context, old, ep *epoch) {
	for name, p := range old.providers {
		if _, stays := ep.providers[name]; stays {
			continue
		}
		needed := false
		err := e.store.View(context.WithoutCancel(ctx), func(r store.Reader) error {
			needed = false
			for _, err := range r.Scan(store.Prefix(prefixDueOf(name))) {
				needed = err == nil
				return err
			}
			for rec, err := range cutOffsToWrite(r) {
				if needed = err == nil && rec.Provider == name; needed || err != nil {
					return err
				}
			}
			return nil
		})
		if (needed || err != nil) && p.acquire() {
			ep.providers[name] = p
		}
	}
}

// Introspectors are the providers whose credentials resource servers check
// with the broker, in the order of their names.
func (e *Engine) Introspectors() []providers.Introspector { return capable[providers.Introspector](e) }

// KeySets are the providers whose credentials are verified with public keys,
// in the order of their names.
func (e *Engine) KeySets() []providers.KeySet { return capable[providers.KeySet](e) }

func capable[T any](e *Engine) []T {
	ep := e.current.Load()
	var all []T
	for _, name := range slices.Sorted(maps.Keys(ep.providers)) {
		if t, ok := ep.providers[name].Provider.(T); ok {
			all = append(all, t)
		}
	}
	return all
}
