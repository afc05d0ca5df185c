package main

import (
	"context"
	"time"

	"github.com/mayfly-security/mayfly/deploy/torture/ledger"
)

const settleBound = 60 * time.Second

var failpoints = []string{"intent.before", "intent.after"}

var chaosKinds = []string{"none"}

type seen struct {
	roles     []ledger.Thing
	rolesErr  error
	tokens    []ledger.Thing
	tokensErr error
	unused    int
}

type world struct{}

func newWorld(context.Context, string, *people) (*world, error) { return &world{}, nil }
func (w *world) vaultAddr() string                              { return "http://127.0.0.1:1" }
func (w *world) providerEntry(string) string                    { return "" }
func (w *world) setUp(context.Context, string) error            { return nil }
func (w *world) close() error                                   { return nil }
func (w *world) look(context.Context, string) seen              { return seen{} }
func (w *world) login(context.Context, string, string) (bool, error) {
	return false, nil
}
func (w *world) disturb(context.Context, string) error { return nil }
