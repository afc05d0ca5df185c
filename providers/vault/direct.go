package vault

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/vault/vaultscope"
)

const (
	directLimit = 8 * time.Second // of the statements of one step, with their connection
	directConns = 4
	directLife  = 24 * time.Hour // of a connection
	dropAtOnce  = 128            // roles in one statement
	maxPassword = 1024
	maxRoles    = 100_000 // of one installation at one server
	maxKind     = 64      // bytes; the engine cuts what is longer
)

// direct is a narrow PostgreSQL login of the broker's: it finds and drops the
// roles that Vault made for this installation, and can do nothing else. What
// it does is decided by two functions at the server, which `mayfly vault
// setup` prints.
type direct struct {
	mount        string
	schema       string // quoted
	installation string // as role names have it
	pool         *pgxpool.Pool
	most         int // roles that are listed
}

// openDirect does not wait for a connection, but begins to make one: it is kept
// for as long as the provider is open, so that an agent that takes all the
// connections that the server has does not keep its own end out.
func openDirect(db vaultscope.Database, installation string) (*direct, error) {
	config, err := pgxpool.ParseConfig(db.DSN)
	if err != nil {
		return nil, fmt.Errorf("reading the dsn of mount %s: %w", db.Mount, err)
	}
	// PGPASSWORD and ~/.pgpass are somebody else's.
	config.ConnConfig.Password = ""
	config.BeforeConnect = func(_ context.Context, c *pgx.ConnConfig) error {
		if db.PasswordFile == "" {
			return nil
		}
		password, err := readPassword(db.PasswordFile)
		c.Password = password
		return err
	}
	config.MaxConns, config.MinConns = directConns, 1
	config.MaxConnIdleTime, config.MaxConnLifetime = 5*time.Minute, directLife
	// A standby can lag behind: what is not there yet is not absent.
	config.ConnConfig.ValidateConnect = pgconn.ValidateConnectTargetSessionAttrsReadWrite
	config.ConnConfig.ConnectTimeout = dialTimeout
	for name, value := range map[string]string{
		"application_name":                    "mayfly",
		"statement_timeout":                   "7000",
		"lock_timeout":                        "3000",
		"idle_in_transaction_session_timeout": "10000",
	} {
		config.ConnConfig.RuntimeParams[name] = value
	}
	pool, err := pgxpool.NewWithConfig(context.Background(), config)
	if err != nil {
		return nil, fmt.Errorf("opening the login of mount %s: %w", db.Mount, err)
	}
	return &direct{mount: db.Mount, schema: pgx.Identifier{db.Schema}.Sanitize(), installation: installation, pool: pool, most: maxRoles}, nil
}

// readPassword reads a password that only its owner can read. It is read for
// each connection, so that a new one needs no restart.
func readPassword(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", fmt.Errorf("reading password_file: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return "", fmt.Errorf("reading password_file: %w", err)
	}
	if info.Mode().Perm()&0o077 != 0 {
		return "", fmt.Errorf("reading password_file %s: its mode %04o lets others read it; make it 0600", path, info.Mode().Perm())
	}
	b, err := io.ReadAll(io.LimitReader(f, maxPassword+1))
	if err != nil || len(b) > maxPassword {
		return "", fmt.Errorf("reading password_file %s: it cannot be read, or holds more than %d bytes", path, maxPassword)
	}
	return strings.TrimRight(string(b), "\r\n"), nil
}

func (d *direct) close() { d.pool.Close() }

// failure is an error of the direct login, for operators.
func (d *direct) failure(what string, err error) error {
	return fmt.Errorf("%s at the PostgreSQL server of Vault's mount %s: %w", what, d.mount, err)
}

// role is one PostgreSQL role of the installation.
type role struct {
	name       string
	validUntil time.Time // zero: for ever
}

// roles lists the installation's roles. Where they are too many it returns some
// of them, with an error.
func (d *direct) roles(ctx context.Context) ([]role, error) {
	ctx, cancel := context.WithTimeout(ctx, directLimit)
	defer cancel()
	rows, err := d.pool.Query(ctx, `SELECT name, CASE WHEN isfinite(valid_until) THEN valid_until END FROM `+d.schema+`.roles($1) LIMIT $2`, d.installation, d.most+1)
	if err != nil {
		return nil, d.failure("listing roles", err)
	}
	found, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (role, error) {
		var name string
		var until *time.Time
		err := row.Scan(&name, &until)
		r := role{name: name}
		if until != nil {
			r.validUntil = *until
		}
		return r, err
	})
	if err != nil {
		return nil, d.failure("listing roles", err)
	}
	if len(found) > d.most {
		return found[:d.most], d.failure("listing roles", fmt.Errorf("there are more than %d", d.most))
	}
	return found, nil
}

// drop ends the sessions of roles, drops them, and returns those that are gone
// for certain: it never returns a name that the installation does not own.
func (d *direct) drop(ctx context.Context, names []string) (gone map[string]bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, directLimit)
	defer cancel()
	gone = make(map[string]bool, len(names))
	var errs []error
	for some := range slices.Chunk(names, dropAtOnce) {
		err := d.dropInto(ctx, gone, some)
		var refusal *pgconn.PgError
		if errors.As(err, &refusal) && len(some) > 1 && ctx.Err() == nil {
			// One that cannot be dropped must not keep the others.
			err = nil
			for _, name := range some {
				errs = append(errs, d.dropInto(ctx, gone, []string{name}))
			}
		}
		errs = append(errs, err)
	}
	return gone, errors.Join(errs...)
}

func (d *direct) dropInto(ctx context.Context, gone map[string]bool, names []string) error {
	rows, err := d.pool.Query(ctx, `SELECT * FROM `+d.schema+`.drop_roles($1, $2)`, d.installation, names)
	if err != nil {
		return d.failure("dropping roles", err)
	}
	dropped, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return d.failure("dropping roles", err)
	}
	// Gone is what has no session any more, either.
	if err := d.endSessions(ctx); err != nil {
		return err
	}
	for _, name := range dropped {
		gone[name] = true
	}
	return nil
}

// endSessions ends the sessions of roles that are not there any more: a client
// that connects again by itself can slip in while its role is being dropped.
func (d *direct) endSessions(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, directLimit)
	defer cancel()
	if _, err := d.pool.Exec(ctx, `SELECT `+d.schema+`.end_sessions()`); err != nil {
		return d.failure("ending sessions of roles that are gone", err)
	}
	return nil
}

// kind names what List found, and by which login. It is for people alone.
func (d *direct) kind() string {
	return broker.Shorten("PostgreSQL role of Vault's mount "+d.mount, maxKind-len("…"))
}

// found tells what a role is. One whose name has no lease ID in it is listed,
// too: it bears the installation's name.
func (p *provider) found(d *direct, r role) providers.Found {
	f := providers.Found{Name: r.name, Kind: d.kind()}
	if lease, ok := vaultscope.LeaseOfRole(p.installation, r.name); ok {
		f.Lease = lease
	}
	if !r.validUntil.IsZero() {
		f.DiesAt = r.validUntil.Add(clockSkew)
	}
	return f
}

var _ providers.Inventory = (*provider)(nil)

// inventory is what one login brought.
type inventory[T any] struct {
	d   *direct
	got T
	err error
}

// everywhere asks all logins at the same time: a server that hangs keeps no
// other from being asked.
func everywhere[T any](p *provider, ask func(*direct) (T, error)) []inventory[T] {
	all := make([]inventory[T], 0, len(p.directs))
	for _, d := range p.directs {
		all = append(all, inventory[T]{d: d})
	}
	var wg sync.WaitGroup
	for i := range all {
		wg.Go(func() { all[i].got, all[i].err = ask(all[i].d) })
	}
	wg.Wait()
	return all
}

// List implements providers.Inventory: the PostgreSQL roles of every mount
// that has a login under databases. Where one server does not answer, or has
// too many, it returns what it has, with an error.
func (p *provider) List(ctx context.Context) ([]providers.Found, error) {
	var all []providers.Found
	var errs []error
	for _, at := range everywhere(p, func(d *direct) ([]role, error) {
		roles, err := d.roles(ctx)
		if err == nil {
			err = d.endSessions(ctx)
		}
		return roles, err
	}) {
		errs = append(errs, at.err)
		for _, r := range at.got {
			all = append(all, p.found(at.d, r))
		}
	}
	return all, errors.Join(errs...)
}

// removal is what one login knows of names that are to go.
type removal struct {
	listed, gone map[string]bool
}

// Remove implements providers.Inventory. Which login a name belongs to is what
// the servers say: each drops those that it lists. A name that none lists is
// gone if all of them could be asked.
func (p *provider) Remove(ctx context.Context, found []providers.Found) []error {
	wanted := make(map[string]bool, len(found))
	for _, f := range found {
		if strings.HasPrefix(f.Name, vaultscope.RolePrefix(p.installation)) {
			wanted[f.Name] = true
		}
	}
	all := everywhere(p, func(d *direct) (removal, error) {
		roles, err := d.roles(ctx)
		r := removal{listed: make(map[string]bool)}
		var names []string
		for _, each := range roles {
			if wanted[each.name] {
				r.listed[each.name] = true
				names = append(names, each.name)
			}
		}
		if len(names) == 0 {
			return r, err
		}
		var dropErr error
		r.gone, dropErr = d.drop(ctx, names)
		return r, errors.Join(err, dropErr)
	})
	errs := make([]error, len(found))
	for i, f := range found {
		if !wanted[f.Name] || len(all) == 0 {
			errs[i] = fmt.Errorf("removing %s: it is none of this installation's, or the configuration has no login that could remove it", f.Name)
			continue
		}
		errs[i] = removed(f.Name, all)
	}
	return errs
}

// removed returns nil if a name is gone.
func removed(name string, all []inventory[removal]) error {
	var left, unasked []error
	listed := false
	for _, at := range all {
		switch {
		case at.got.gone[name]:
			listed = true
		case at.got.listed[name]:
			listed = true
			err := at.err
			if err == nil {
				err = at.d.failure("removing role "+name, errors.New("it is still there"))
			}
			left = append(left, err)
		case at.err != nil:
			unasked = append(unasked, at.err)
		}
	}
	if listed {
		return errors.Join(left...)
	}
	return errors.Join(unasked...)
}
