// Package broker holds the words of Mayfly as types: agents, tools, grants,
// incidents and leases, their identifiers, the errors that callers meet, and
// the Secret that never shows itself.
//
// It is a leaf: it imports the standard library and spiffeid, and nothing else
// of Mayfly. Everything here is a plain value; what acts on the values lives
// in the packages above (broker/policy decides, broker/lease does).
package broker
