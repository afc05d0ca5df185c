package vault

import (
	"context"
	"net"
	"os"
	"sync"
	"testing"

	"github.com/hashicorp/vault/api"

	"github.com/mayfly-security/mayfly/deploy/testbed"
)

// postgres is a real PostgreSQL server with a database of tools and a role
// that Vault logs in as.
type postgres struct {
	*testbed.Postgres
	port int
}

func newPostgres() (*postgres, error) {
	p, err := testbed.StartPostgres(context.Background(), testbed.PostgresConfig{NoFsync: true})
	if err != nil {
		return nil, err
	}
	pg := &postgres{Postgres: p, port: p.Port}
	return pg, prepareDatabase(pg)
}

// super is how the superuser connects.
func (p *postgres) super(db string) string { return p.SocketDSN(db, "postgres") }

// exec runs statements as the superuser.
func (p *postgres) exec(db, sql string) error { return p.Exec(context.Background(), db, sql) }

// vaultServer is a real Vault, unsealed.
type vaultServer struct {
	*testbed.Vault
	root   string
	client *api.Client // of the root token
}

func newVault(config testbed.VaultConfig) (*vaultServer, error) {
	config.LogLevel = "error"
	v, err := testbed.StartVault(context.Background(), config)
	if err != nil {
		return nil, err
	}
	return &vaultServer{Vault: v, root: v.RootToken, client: v.Client()}, nil
}

func (v *vaultServer) address() string { return v.Addr }

// shared are the servers that tests use side by side. Tests that stop one have
// their own.
var shared struct {
	once sync.Once
	pg   *postgres
	v    *vaultServer
	err  error
}

func TestMain(m *testing.M) {
	code := m.Run()
	if shared.v != nil {
		shared.v.Close()
	}
	if shared.pg != nil {
		shared.pg.Close()
	}
	os.Exit(code)
}

func servers(t testing.TB) (*vaultServer, *postgres) {
	t.Helper()
	shared.once.Do(func() {
		if shared.pg, shared.err = newPostgres(); shared.err == nil {
			shared.v, shared.err = newVault(testbed.VaultConfig{})
		}
	})
	if shared.err != nil {
		t.Fatal(shared.err)
	}
	return shared.v, shared.pg
}

// ownServers are for a test that stops or seals them.
func ownServers(t testing.TB) (*vaultServer, *postgres) {
	t.Helper()
	pg, err := newPostgres()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { pg.Close() })
	v, err := newVault(testbed.VaultConfig{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { v.Close() })
	return v, pg
}

// freePort is a port on loopback at which nobody listens.
func freePort() int {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}
