package vault

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/mayfly-security/mayfly/providers"
)

const handleVersion = 1

// handle is all that ending a lease needs: the tool may have changed or gone.
// Whoever holds it and the broker's login can end the lease, and nothing else:
// the token itself is in no handle.
type handle struct {
	Version  int    `json:"v"`
	Class    class  `json:"class"`
	Accessor string `json:"accessor"`
	Mount    string `json:"mount"`
	// Gone is when whatever the attempt makes has died by itself, whenever in
	// the attempt it is made. Zero where Vault has no bound for it.
	Gone time.Time `json:"gone,omitzero"`
	// TTL is the longest life of what is made, counted from when it is made.
	TTL time.Duration `json:"ttl,omitempty"`

	// What follows is there once Vault has answered.

	LeaseID string    `json:"lease_id,omitempty"`
	User    string    `json:"user,omitempty"`   // the PostgreSQL role
	DiesAt  time.Time `json:"dies_at,omitzero"` // of this very credential
	Read    bool      `json:"read,omitempty"`   // Vault has answered
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
		return h, errors.New("the handle is no handle of a lease in Vault")
	}
	if h.Version > handleVersion {
		return h, fmt.Errorf("the handle has version %d and this broker reads up to %d: it was written by a newer Mayfly", h.Version, handleVersion)
	}
	if h.Version < 1 || !h.Class.known() || h.Accessor == "" || h.LeaseID != "" && !h.Read {
		return h, errors.New("the handle is no handle of a lease in Vault")
	}
	return h, nil
}
