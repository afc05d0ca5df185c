//go:build !failpoints || !unix

// Package failpoint lets the torture test kill the broker at named points. It
// does something only in a build with the tag "failpoints", which nobody ships.
package failpoint

// At does nothing.
func At(string) {}

// Mutated is false.
func Mutated(string) bool { return false }
