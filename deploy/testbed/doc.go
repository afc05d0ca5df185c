//go:build unix

// Package testbed starts real servers for tests, demonstrations and the
// torture: HashiCorp Vault (its own core in a small main of ours, which `make
// testbed-vault` builds), Debian's PostgreSQL, and a certified OpenID provider
// on Node (which `make testbed-oidc` fetches). Each server has its own data
// folder and free ports on loopback, so that many run side by side.
//
// Programs use [StartVault], [StartPostgres] and [StartOIDC], which take a
// context and return errors; tests use [TestVault], [TestPostgres] and
// [TestOIDC]. A context given to
// a function bounds that call alone, never the server's life.
//
// Nothing stays behind. Close ends a server and removes the folder that was
// made for it. Where the process that started a server is killed, Linux ends
// the server with it, and the next process that uses this package removes the
// folders.
package testbed
