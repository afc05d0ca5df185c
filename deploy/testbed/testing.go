//go:build unix

package testbed

import "context"

// TB is what the helpers for tests need of a testing.TB.
type TB interface {
	Helper()
	Cleanup(func())
	Context() context.Context
	Failed() bool
	Fatal(args ...any)
	Error(args ...any)
	Logf(format string, args ...any)
}

// TestVault is StartVault for a test: it fails the test on an error, and
// closes the Vault at its end.
func TestVault(t TB, config VaultConfig) *Vault {
	t.Helper()
	v, err := StartVault(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { finish(t, v.LogFile, v.Close) })
	return v
}

// TestPostgres is StartPostgres for a test: it fails the test on an error, and
// closes the server at its end.
func TestPostgres(t TB, config PostgresConfig) *Postgres {
	t.Helper()
	p, err := StartPostgres(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { finish(t, p.LogFile, p.Close) })
	return p
}

func finish(t TB, log string, end func() error) {
	if t.Failed() {
		t.Logf("%s", tail(log))
	}
	if err := end(); err != nil {
		t.Error(err)
	}
}
