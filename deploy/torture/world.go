//go:build unix

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/deploy/testbed"
	"github.com/mayfly-security/mayfly/deploy/torture/ledger"
	"github.com/mayfly-security/mayfly/providers/vault/vaultscope"
)

// requestLimit is Vault's limit on one request, and the provider's. It is
// short, so that attempts of unknown outcome settle soon.
const requestLimit = 5 * time.Second

// settleBound is how long a lease may be minting or revoking: the attempt's
// own deadline (30 s for the token, the request's limit and 10 s for the
// credential, 10 s to end what was refused), as long again as Vault may be at
// a request, and one round of ending on a busy machine.
const settleBound = 30*time.Second + requestLimit + 10*time.Second + 10*time.Second + requestLimit + 30*time.Second

const audience = "https://vault.torture.test"

// The broker's own login at PostgreSQL. Its password guards a server that lives
// as long as the run, on loopback.
const (
	sweepLogin    = "mayfly_sweep"
	sweepPassword = "torture"
)

// world is the real Vault and PostgreSQL. Its methods may be called from many
// goroutines.
type world struct {
	dir    string
	people *people
	pg     *testbed.Postgres
	vault  *testbed.Vault
	super  *pgxpool.Pool

	mu    sync.Mutex
	known map[string]broker.LeaseID // accessors that were looked up, and their leases; empty: not ours
}

func newWorld(ctx context.Context, dir, vaultBin string, p *people) (_ *world, err error) {
	w := &world{dir: dir, people: p, known: map[string]broker.LeaseID{}}
	defer func() {
		if err != nil {
			err = errors.Join(err, w.close())
		}
	}()
	if err := os.WriteFile(w.passwordFile(), []byte(sweepPassword), 0o600); err != nil {
		return nil, err
	}
	if w.pg, err = testbed.StartPostgres(ctx, testbed.PostgresConfig{NoFsync: true}); err != nil {
		return nil, err
	}
	if w.vault, err = testbed.StartVault(ctx, testbed.VaultConfig{Binary: vaultBin, MaxRequestDuration: requestLimit, LogLevel: "error"}); err != nil {
		return nil, err
	}
	if err := testbed.VaultPostgres(ctx, w.vault, w.pg); err != nil {
		return nil, err
	}
	config, err := pgxpool.ParseConfig(w.pg.SocketDSN("postgres", "postgres"))
	if err != nil {
		return nil, err
	}
	config.MaxConns = 2
	w.super, err = pgxpool.NewWithConfig(ctx, config)
	return w, err
}

func (w *world) passwordFile() string { return filepath.Join(w.dir, "sweep-password") }

func (w *world) vaultAddr() string { return w.vault.Addr }

// providerEntry is the catalog's entry for Vault behind a proxy.
func (w *world) providerEntry(proxy string) string {
	return fmt.Sprintf(`  - name: vault
    driver: vault
    config:
      address: %s
      auth: {method: jwt, audience: %q}
      request_limit: %s
      databases:
        - {mount: database, dsn: "host=127.0.0.1 port=%d dbname=%s user=%s sslmode=disable", password_file: %q}
`, proxy, audience, requestLimit, w.pg.Port, testbed.DatabaseName, sweepLogin, w.passwordFile())
}

func (w *world) close() error {
	var errs []error
	if w.super != nil {
		w.super.Close()
	}
	if w.vault != nil {
		errs = append(errs, w.vault.Close())
	}
	if w.pg != nil {
		errs = append(errs, w.pg.Close())
	}
	return errors.Join(errs...)
}

// seen is one look at the world.
type seen struct {
	roles     []ledger.Thing
	rolesErr  error // PostgreSQL was away
	tokens    []ledger.Thing
	tokensErr error // Vault was away
	unused    int   // tokens of leases that are over, with which nothing was read: they die by themselves
}

// look reads every role and every accessor that bears the installation's name.
func (w *world) look(ctx context.Context, installation broker.InstallationID) seen {
	var s seen
	s.roles, s.rolesErr = w.roles(ctx, installation)
	s.tokens, s.tokensErr = w.tokens(ctx, installation)
	return s
}

func (w *world) roles(ctx context.Context, installation broker.InstallationID) ([]ledger.Thing, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	rows, err := w.super.Query(ctx, "SELECT rolname FROM pg_roles WHERE starts_with(rolname, $1)", vaultscope.RolePrefix(installation))
	if err != nil {
		return nil, err
	}
	names, err := pgx.CollectRows(rows, pgx.RowTo[string])
	things := make([]ledger.Thing, len(names))
	for i, name := range names {
		lease, _ := vaultscope.LeaseOfRole(installation, name) // one that is no lease's is an orphan
		things[i] = ledger.Thing{Name: name, Lease: lease}
	}
	return things, err
}

func (w *world) tokens(ctx context.Context, installation broker.InstallationID) ([]ledger.Thing, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	list, err := w.vault.Client().Logical().ListWithContext(ctx, "auth/token/accessors")
	if err != nil || list == nil {
		return nil, errors.Join(err, errors.New("no accessors were listed by Vault"))
	}
	keys, _ := list.Data["keys"].([]any)
	var things []ledger.Thing
	for _, key := range keys {
		accessor, _ := key.(string)
		w.mu.Lock()
		lease, known := w.known[accessor]
		w.mu.Unlock()
		if !known {
			meta, _, alive, err := w.lookup(ctx, accessor)
			if err != nil {
				return nil, err
			}
			if !alive && meta == nil {
				continue
			}
			if meta["mayfly_installation"] == string(installation) {
				lease = broker.LeaseID(meta["mayfly_lease"])
			}
			w.mu.Lock()
			w.known[accessor] = lease
			w.mu.Unlock()
		}
		if lease != "" {
			things = append(things, ledger.Thing{Name: accessor, Lease: lease})
		}
	}
	return things, nil
}

// lookup asks Vault about a token by its accessor. meta is nil if it is gone,
// and alive is false if nobody can use it any more.
func (w *world) lookup(ctx context.Context, accessor string) (meta map[string]string, uses int, alive bool, err error) {
	s, err := w.vault.Client().Auth().Token().LookupAccessorWithContext(ctx, accessor)
	var answer *api.ResponseError
	if errors.As(err, &answer) && (answer.StatusCode == 403 || answer.StatusCode == 404) {
		return nil, 0, false, nil // it is gone
	}
	if err != nil || s == nil {
		return nil, 0, false, errors.Join(err, errors.New("nothing was said by Vault of an accessor"))
	}
	meta = map[string]string{}
	if m, ok := s.Data["meta"].(map[string]any); ok {
		for k, v := range m {
			meta[k], _ = v.(string)
		}
	}
	left, err1 := number(s.Data["num_uses"])
	ttl, err2 := number(s.Data["ttl"])
	if err := errors.Join(err1, err2); err != nil {
		return nil, 0, false, fmt.Errorf("reading what Vault says of an accessor: %w", err)
	}
	// A look-up also shows tokens that Vault is about to remove, and that
	// nobody can use any more: their time is over, or they have -1 uses.
	return meta, int(left), left >= 0 && ttl > 0, nil
}

func number(v any) (int64, error) {
	n, ok := v.(json.Number)
	if !ok {
		return 0, fmt.Errorf("%v is no number", v)
	}
	return n.Int64()
}

// unusedUses is how many uses the token of a lease has before a credential is
// read with it.
const unusedUses = 2

// spent leaves of tokens whose leases are over those with which something was
// read, and counts the others: a token that nobody holds makes nothing and
// dies by itself.
func (w *world) spent(ctx context.Context, tokens []ledger.Thing, open func(broker.LeaseID) bool) (left []ledger.Thing, unused int, err error) {
	for _, t := range tokens {
		if open(t.Lease) {
			left = append(left, t)
			continue
		}
		_, uses, alive, err := w.lookup(ctx, t.Name)
		switch {
		case err != nil:
			return nil, 0, err
		case alive && uses == unusedUses:
			unused++
		case alive:
			left = append(left, t)
		}
	}
	return left, unused, nil
}

// login reports whether PostgreSQL lets somebody in. An error means that it
// could not be found out.
func (w *world) login(ctx context.Context, user, password string) (works bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	config, err := pgx.ParseConfig(w.pg.DSN(testbed.DatabaseName, user, password))
	if err != nil {
		return false, err
	}
	c, err := pgx.ConnectConfig(ctx, config)
	var refusal *pgconn.PgError
	switch {
	case err == nil:
		return true, c.Close(ctx)
	case errors.As(err, &refusal) && strings.HasPrefix(refusal.Code, "28"): // invalid authorization
		return false, nil
	}
	return false, err
}

// chaosKinds are the disturbances of the servers.
var chaosKinds = []string{"vault killed", "vault sealed", "vault frozen", "postgres restarted", "postgres killed", "postgres frozen"}

// disturb takes a server away for a while and brings it back. again is told of
// steps that failed and are tried again.
func (w *world) disturb(ctx context.Context, what string, away time.Duration, again func(error)) error {
	pause := func() error { time.Sleep(away); return nil }
	var steps []func() error
	switch what {
	case "vault killed":
		steps = []func() error{w.vault.Kill, pause, func() error { return w.vault.Start(ctx) }, func() error { return w.vault.Unseal(ctx) }}
	case "vault sealed":
		steps = []func() error{func() error { return w.vault.Seal(ctx) }, pause, func() error { return w.vault.Unseal(ctx) }}
	case "vault frozen":
		steps = []func() error{w.vault.Pause, pause, w.vault.Resume}
	case "postgres restarted":
		steps = []func() error{func() error { return w.pg.Stop(ctx) }, pause, func() error { return w.pg.Start(ctx) }}
	case "postgres killed":
		steps = []func() error{w.pg.Kill, pause, func() error { return w.pg.Start(ctx) }}
	case "postgres frozen":
		steps = []func() error{w.pg.Pause, pause, w.pg.Resume}
	default:
		return fmt.Errorf("there is no disturbance %q", what)
	}
	for i, step := range steps {
		// A server that was killed at a bad moment may not start at once: a
		// process of its own may be on its way out still.
		for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(100 * time.Millisecond) {
			err := step()
			if err == nil {
				break
			}
			if time.Now().After(deadline) {
				return fmt.Errorf("step %d: %w", i+1, err)
			}
			again(err)
		}
	}
	return nil
}
