package token

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
)

const handleVersion = 1

// handle is what decides how a token ends, so that nothing of the catalog is
// needed for it: the tool may have changed or gone.
type handle struct {
	Version      int       `json:"v"`
	Verification string    `json:"verification"`
	DiesAt       time.Time `json:"dies_at"`
}

func (h handle) encode() (providers.Handle, error) {
	b, err := json.Marshal(h)
	if err != nil {
		return nil, fmt.Errorf("encoding handle: %w", err)
	}
	return b, nil
}

func decodeHandle(raw providers.Handle) (handle, error) {
	var h handle
	dec := json.NewDecoder(bytes.NewReader(raw))
	if err := dec.Decode(&h); err != nil || dec.More() {
		return h, errors.New("the handle is no handle of a token")
	}
	if h.Version > handleVersion {
		return h, fmt.Errorf("the handle has version %d and this broker reads up to %d: it was written by a newer Mayfly", h.Version, handleVersion)
	}
	if h.Version < 1 || h.Verification != introspect && h.Verification != offline || h.DiesAt.IsZero() {
		return h, errors.New("the handle is no handle of a token")
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
