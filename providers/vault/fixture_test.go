package vault

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/attestation"
	"github.com/mayfly-security/mayfly/attestation/devtrust"
	"github.com/mayfly-security/mayfly/attestation/spiffe"
	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/vault/vaultscope"
)

// prepareDatabase does what an operator does before the setup: a database, and
// a role for Vault to log in as.
func prepareDatabase(pg *postgres) error {
	for db, sql := range map[string]string{"postgres": "CREATE DATABASE crm"} {
		if err := pg.exec(db, sql); err != nil {
			return err
		}
	}
	return pg.exec("postgres", "CREATE ROLE vault LOGIN CREATEROLE PASSWORD 'vault-password'")
}

var (
	trustDomain = spiffeid.RequireTrustDomainFromString("acme.test")
	brokerID    = spiffeid.RequireFromString("spiffe://acme.test/mayfly")
	agentID     = spiffeid.RequireFromString("spiffe://acme.test/agent/support")
	serial      sync.Mutex
	serials     int
)

// shortest is the shortest life of a database lease of the tests.
const shortest = 10 * time.Second

const audience = "https://vault.acme.test"

// world is one Mayfly installation at real servers: mounts, auth methods and
// names of its own, so that tests run side by side.
type world struct {
	t            testing.TB
	v            *vaultServer
	pg           *postgres
	trust        *devtrust.Server
	login        attestation.LoginSource
	installation broker.InstallationID
	id           string // part of the names of mounts
	log          *logged

	// What a test may change before it opens a provider.
	address  string
	noDirect bool
	cert     bool   // log in with the X.509-SVID
	extra    string // of the configuration, as JSON members
	now      func() time.Time
	limit    string
	long     string // what the names of mounts end with
}

type logged struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func newWorld(t testing.TB, v *vaultServer, pg *postgres) *world {
	t.Helper()
	serial.Lock()
	serials++
	n := serials
	serial.Unlock()
	w := &world{t: t, v: v, pg: pg, id: fmt.Sprintf("w%d", n), address: v.address(), log: &logged{}, now: time.Now,
		installation: broker.NewInstallationID(time.Now()), limit: "5s"}
	dir, err := os.MkdirTemp("", "mf-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if w.trust, err = devtrust.New(devtrust.Config{TrustDomain: trustDomain, Dir: filepath.Join(dir, "s")}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.trust.Close() })
	addr, err := w.trust.Add(devtrust.Identity{ID: brokerID, DNSNames: []string{"mayfly.acme.test"}})
	if err != nil {
		t.Fatal(err)
	}
	w.login = source(t, addr)

	w.mountDatabase()
	return w
}

func (w *world) mountDatabase() {
	w.t.Helper()
	w.write("sys/mounts/"+w.mount("database"), map[string]any{"type": "database"})
	w.write(w.mount("database")+"/config/mayfly", map[string]any{
		"plugin_name": "postgresql-database-plugin", "username": "vault", "password": "vault-password",
		"connection_url": fmt.Sprintf("postgresql://{{username}}:{{password}}@127.0.0.1:%d/crm?sslmode=disable", w.pg.port),
	})
}

// setup applies what `mayfly vault setup` prints for these tools.
func (w *world) setup(tools ...broker.Tool) *world {
	w.t.Helper()
	config, err := vaultscope.ParseConfig(w.config())
	if err != nil {
		w.t.Fatal(err)
	}
	o := vaultscope.Options{Broker: brokerID, Installation: w.installation}
	if config.Auth.Method == vaultscope.MethodCert {
		o.Bundle = w.bundle()
	} else {
		o.PublicKeys = w.jwtKeys()
	}
	s, err := vaultscope.NewSetup(config, tools, o)
	if err != nil {
		w.t.Fatal(err)
	}
	for _, script := range s.Scripts {
		if err := w.pg.exec("crm", script.SQL); err != nil {
			w.t.Fatal(err)
		}
	}
	if !w.noDirect {
		if err := w.pg.exec("crm", "ALTER ROLE "+w.sweep()+" PASSWORD 'sweep-password'"); err != nil {
			w.t.Fatal(err)
		}
	}
	for _, each := range s.Writes {
		if _, err := w.v.client.Logical().Write(each.Path, each.Body); err != nil && !strings.Contains(err.Error(), "path is already in use") {
			w.t.Fatalf("%s: %v", each.Path, err)
		}
	}
	return w
}

func (w *world) sweep() string { return "sweep_" + w.id }

func (w *world) bundle() string {
	var b strings.Builder
	for _, cert := range w.trust.Bundle().X509Authorities() {
		b.Write(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}))
	}
	return b.String()
}

// source is the identity that a socket gives.
func source(t testing.TB, addr string) attestation.LoginSource {
	t.Helper()
	src, err := spiffe.Open(t.Context(), spiffe.Config{Addr: addr, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { src.Close() })
	return src
}

func (w *world) mount(kind string) string { return kind + "-" + w.id + w.long }
func (w *world) prefix() string           { return w.id + "-" }
func (w *world) write(path string, data map[string]any) {
	w.t.Helper()
	if _, err := w.v.client.Logical().Write(path, data); err != nil {
		w.t.Fatalf("writing %s: %v", path, err)
	}
}

func (w *world) jwtKeys() []string {
	var keys []string
	for _, key := range w.trust.Bundle().JWTAuthorities() {
		der, err := x509.MarshalPKIXPublicKey(key)
		if err != nil {
			w.t.Fatal(err)
		}
		keys = append(keys, string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})))
	}
	return keys
}

func (w *world) config() json.RawMessage {
	var databases string
	if !w.noDirect {
		file := filepath.Join(w.t.TempDir(), "password")
		if err := os.WriteFile(file, []byte("sweep-password\n"), 0o600); err != nil {
			w.t.Fatal(err)
		}
		databases = fmt.Sprintf(`,"databases":[{"mount":%q,"dsn":"host=127.0.0.1 port=%d dbname=crm user=%s sslmode=disable","password_file":%q,"schema":%q}]`,
			w.mount("database"), w.pg.port, w.sweep(), file, "mayfly_"+w.id)
	}
	auth := fmt.Sprintf(`{"method":"jwt","mount":%q,"audience":%q}`, w.mount("jwt"), audience)
	if w.cert {
		auth = fmt.Sprintf(`{"method":"cert","mount":%q}`, w.mount("cert"))
	}
	return json.RawMessage(fmt.Sprintf(`{"address":%q,"auth":%s,"prefix":%q,"request_limit":%q%s%s}`,
		w.address, auth, w.prefix(), w.limit, databases, w.extra))
}

func (w *world) database() broker.Tool {
	return broker.Tool{Name: "crm.read", Provider: "vault", MaxTTL: 5 * time.Minute, Scope: json.RawMessage(fmt.Sprintf(
		`{"engine":"database","classes":[{"path":"%[1]s/creds/crm-read-10s","ttl":"10s"},{"path":"%[1]s/creds/crm-read-1m","ttl":"1m"},{"path":"%[1]s/creds/crm-read-5m","ttl":"5m"}]}`, w.mount("database")))}
}

func (w *world) open() *provider {
	w.t.Helper()
	p, err := Driver{Login: w.login}.Open(w.t.Context(), providers.Config{
		Name: "vault", Installation: w.installation, Raw: w.config(), Now: w.now,
		Log: slog.New(slog.NewTextHandler(w.log, nil)),
	})
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { p.Close() })
	return p.(*provider)
}

func (w *world) request(tool broker.Tool, ttl time.Duration) providers.MintRequest {
	now := w.now()
	return providers.MintRequest{Lease: broker.NewLeaseID(now), Agent: agentID, Tool: tool, Incident: broker.NewIncidentID(now), Now: now, End: now.Add(ttl)}
}

// attempt is one Mint with what it recorded.
type attempt struct {
	req      providers.MintRequest
	recorded []providers.Handle
	minted   providers.Minted
	err      error
	ended    chan struct{} // for who ends it
}

func mint(ctx context.Context, p *provider, req providers.MintRequest) *attempt {
	a := &attempt{req: req, ended: make(chan struct{})}
	a.minted, a.err = p.Mint(ctx, req, func(h providers.Handle) error {
		a.recorded = append(a.recorded, h)
		return nil
	})
	return a
}

func (w *world) mint(p *provider, tool broker.Tool, ttl time.Duration) *attempt {
	w.t.Helper()
	a := mint(w.t.Context(), p, w.request(tool, ttl))
	if a.err != nil {
		w.t.Fatalf("minting: %v", a.err)
	}
	return a
}

func (a *attempt) ending() providers.Ending {
	e := providers.Ending{Lease: a.req.Lease, Tool: a.req.Tool.Name, Handle: a.minted.Handle, DiesAt: a.minted.DiesAt}
	if e.Handle == nil && len(a.recorded) > 0 {
		e.Handle = a.recorded[0]
	}
	return e
}

// roles are the names in pg_roles that begin with prefix, looked at as nobody
// of ours.
func (w *world) roles(prefix string) []string {
	w.t.Helper()
	ctx := context.Background()
	c, err := pgx.Connect(ctx, w.pg.super("crm"))
	if err != nil {
		w.t.Fatal(err)
	}
	defer c.Close(ctx)
	rows, err := c.Query(ctx, "SELECT rolname FROM pg_roles WHERE starts_with(rolname, $1)", prefix)
	if err != nil {
		w.t.Fatal(err)
	}
	names, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		w.t.Fatal(err)
	}
	return names
}

func (w *world) rolesOf(lease broker.LeaseID) []string {
	w.t.Helper()
	return w.roles(vaultscope.LeaseRolePrefix(w.installation, lease))
}

// connects reports whether the credential is accepted by PostgreSQL.
func (w *world) connects(secret broker.Secret) bool {
	user, _ := secret.Reveal("username")
	password, _ := secret.Reveal("password")
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	config, err := pgx.ParseConfig(fmt.Sprintf("host=127.0.0.1 port=%d dbname=crm sslmode=disable", w.pg.port))
	if err != nil {
		w.t.Fatal(err)
	}
	config.User, config.Password = user, password
	c, err := pgx.ConnectConfig(ctx, config)
	if err != nil {
		return false
	}
	c.Close(ctx)
	return true
}

// tokenLives reports whether Vault knows a token by its accessor.
func (w *world) tokenLives(accessor string) bool {
	_, err := w.v.client.Auth().Token().LookupAccessor(accessor)
	return err == nil
}

func handleOf(t testing.TB, raw providers.Handle) handle {
	t.Helper()
	h, err := decodeHandle(raw)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func isNothing(err error) bool { return errors.Is(err, providers.ErrNothingMade) }
