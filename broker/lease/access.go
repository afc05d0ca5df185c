package lease

import (
	"context"
	"errors"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/policy"
)

var errNotBuilt = errors.New("not built yet")

// Explanation says why an access is or is not possible.
type Explanation struct {
	Possible   bool
	Summary    string
	Verdict    policy.Verdict
	WouldAllow []string // nearest first
	Grants     []string
}

// ExplainRequest is a question about an access.
type ExplainRequest struct {
	Action    policy.Action
	Principal broker.Principal // empty: the caller
	Groups    []string         // of a person who is not the caller
	Tool      string
	Agent     spiffeid.ID
	Params    map[string]string
	Incident  broker.IncidentID
	Verb      policy.Verb
}

// Explain answers why an access is or is not possible now.
func (e *Engine) Explain(ctx context.Context, caller broker.Caller, req ExplainRequest) (Explanation, error) {
	return Explanation{}, errNotBuilt
}

// Preview is what a policy set would change.
type Preview struct {
	Problems                []string // then nothing else is filled
	Digest, Present         string
	Added, Removed, Changed []string // policy IDs
	Ends                    []PreviewGrant
	Grants                  int // open grants looked at
	Turns                   []PreviewDecision
	Decisions               int // decisions looked at
}

// PreviewGrant is an open grant that a new set would end.
type PreviewGrant struct {
	Grant  broker.Grant
	Leases int // that have not ended
	Why    string
}

// PreviewDecision is a decision that a new set would turn.
type PreviewDecision struct {
	At        time.Time
	Principal broker.Principal
	Action    policy.Action
	About     string
	Was, Now  bool
	Why       string
}

// Preview says what a policy set would change if it were loaded.
func (e *Engine) Preview(ctx context.Context, caller broker.Caller, files []policy.Source) (Preview, error) {
	return Preview{}, errNotBuilt
}
