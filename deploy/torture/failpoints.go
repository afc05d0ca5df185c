//go:build unix

package main

// failpoints are the points at which the broker can be told to kill itself.
// docs/torture.md says what each stands for.
var failpoints = []string{
	"lease.intent.before", "lease.intent.after",
	"lease.record.before", "lease.record.after",
	"lease.activate.before", "lease.activate.after",
	"lease.deliver",
	"lease.fail",
	"lease.sweep.begin", "lease.sweep.told", "lease.sweep.end",
	"lease.end.ask", "lease.end.answer", "lease.end.written",
	"vault.create.before", "vault.create.after",
	"vault.read.before", "vault.read.after",
	"vault.drop.after", "vault.lease.after",
}
