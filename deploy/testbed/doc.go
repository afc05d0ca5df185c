//go:build unix

// Package testbed starts real servers for tests, demonstrations and the
// torture: HashiCorp Vault (its own core in a small main of ours, which `make
// testbed-vault` builds) and Debian's PostgreSQL. Each server has its own data
// folder and free ports on loopback, so that many run side by side.
//
// Programs use [StartVault] and [StartPostgres], which take a context and
// return errors; tests use [TestVault] and [TestPostgres]. A context given to
// a function bounds that call alone, never the server's life.
//
// Nothing stays behind. Close ends a server and removes the folder that was
// made for it. Where the process that started a server is killed, Linux ends
// the server with it, and the next process that uses this package removes the
// folders.
package testbed
