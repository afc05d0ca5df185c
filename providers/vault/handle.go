package vault

import (
	"time"

	"github.com/mayfly-security/mayfly/providers"
)

const (
	handleVersion = 1
	handleFor     = "a lease in Vault"
)

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

func (h handle) encode() (providers.Handle, error) { return providers.EncodeHandle(h) }

func decodeHandle(raw providers.Handle) (handle, error) {
	var h handle
	if err := providers.DecodeHandle(raw, &h, &h.Version, handleVersion, handleFor); err != nil {
		return h, err
	}
	if !h.Class.known() || h.Accessor == "" || h.LeaseID != "" && !h.Read {
		return h, providers.NoHandle(handleFor)
	}
	return h, nil
}
