package token

import (
	"context"
	"fmt"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
)

const (
	handleVersion = 1
	handleFor     = "a token"
)

// handle is what decides how a token ends, so that nothing of the catalog is
// needed for it: the tool may have changed or gone.
type handle struct {
	Version      int       `json:"v"`
	Verification string    `json:"verification"`
	DiesAt       time.Time `json:"dies_at"`
}

func (h handle) encode() (providers.Handle, error) { return providers.EncodeHandle(h) }

func decodeHandle(raw providers.Handle) (handle, error) {
	var h handle
	if err := providers.DecodeHandle(raw, &h, &h.Version, handleVersion, handleFor); err != nil {
		return h, err
	}
	if h.Verification != introspect && h.Verification != offline || h.DiesAt.IsZero() {
		return h, providers.NoHandle(handleFor)
	}
	return h, nil
}

// Revoke implements providers.Provider; see the package's description for why
// it has nothing to do.
func (p *provider) Revoke(ctx context.Context, endings []providers.Ending) []providers.Death {
	return p.Confirm(ctx, endings)
}

// Confirm implements providers.Provider.
func (p *provider) Confirm(_ context.Context, endings []providers.Ending) []providers.Death {
	now := p.now()
	deaths := make([]providers.Death, len(endings))
	for i, e := range endings {
		deaths[i] = death(e, now)
	}
	return deaths
}

func death(e providers.Ending, now time.Time) providers.Death {
	verified := providers.Death{Progress: broker.ProgressVerified}
	if e.Handle == nil {
		return verified // nobody ever saw the token
	}
	h, err := decodeHandle(e.Handle)
	diesAt := h.DiesAt
	switch {
	case err != nil:
		// It may be a token that is verified offline; what the engine knows
		// of its death is all there is.
		err, diesAt = fmt.Errorf("reading handle of lease %s: %w", e.Lease, err), e.DiesAt
	case h.Verification == introspect:
		return verified
	}
	if !diesAt.IsZero() && !now.Before(diesAt) {
		return verified
	}
	return providers.Death{Err: err, RetryAt: diesAt}
}
