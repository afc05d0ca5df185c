package awssts

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/awssts/awsscope"
	"github.com/mayfly-security/mayfly/providers/awssts/denylist"
)

const handleVersion = 1

// handle is all that ending a lease needs: the tool may have changed or gone.
type handle struct {
	Version  int               `json:"v"`
	Role     string            `json:"role,omitempty"` // its ARN; empty on a compatible server
	Session  string            `json:"session"`
	Agent    string            `json:"agent"` // the source identity
	Incident broker.IncidentID `json:"incident,omitempty"`
	Issued   time.Time         `json:"issued"`        // the session was made by then
	Dies     time.Time         `json:"dies"`          // the session is dead by itself then, by AWS's clock and with skew
	Key      string            `json:"key,omitempty"` // compatible: the session's access key, which is no secret; empty until it is known
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
		return h, errors.New("the handle is no handle of a session in AWS")
	}
	if h.Version > handleVersion {
		return h, fmt.Errorf("the handle has version %d and this broker reads up to %d: it was written by a newer Mayfly", h.Version, handleVersion)
	}
	if h.Version < 1 || h.Session == "" || h.Dies.IsZero() {
		return h, errors.New("the handle is no handle of a session in AWS")
	}
	if h.Role != "" {
		if _, err := awsscope.ParseRole(h.Role); err != nil {
			return h, errors.New("the handle is no handle of a session in AWS")
		}
	}
	return h, nil
}

// known is the lease as the deny list sees it.
func (h handle) known() denylist.Known {
	return denylist.Known{Lease: broker.LeaseID(h.Session), Incident: h.Incident, Agent: h.Agent, Until: h.Dies, Issued: h.Issued}
}
