// Package providertest holds the contract of package providers as a test
// suite, and a provider made for tests.
//
// Run is the suite: every implementation passes it in one call.
//
// System is an outside system that makes credentials and misbehaves as its
// Script says: it is slow, fails, lies about errors after it acted, cuts
// connections, acts twice, and acts after its caller died. World serves a
// System over HTTP, so that it can outlive a broker that is killed. Driver
// opens providers that use a System: over HTTP, or within the process, which
// works inside testing/synctest bubbles. Both ways are the same code but for
// the wire between.
package providertest
