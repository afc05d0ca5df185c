package awssts

import (
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/awssts/denylist"
	"github.com/mayfly-security/mayfly/providers/internal/awsaccess"
)

const (
	handleVersion = 1
	handleFor     = "a session in AWS"
)

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

func (h handle) encode() (providers.Handle, error) { return providers.EncodeHandle(h) }

func decodeHandle(raw providers.Handle) (handle, error) {
	var h handle
	if err := providers.DecodeHandle(raw, &h, &h.Version, handleVersion, handleFor); err != nil {
		return h, err
	}
	if h.Session == "" || h.Dies.IsZero() {
		return h, providers.NoHandle(handleFor)
	}
	if h.Role != "" {
		if _, err := awsaccess.ParseRole(h.Role); err != nil {
			return h, providers.NoHandle(handleFor)
		}
	}
	return h, nil
}

// known is the lease as the deny list sees it.
func (h handle) known() denylist.Known {
	return denylist.Known{Lease: broker.LeaseID(h.Session), Incident: h.Incident, Agent: h.Agent, Until: h.Dies, Issued: h.Issued}
}
