package providers

import (
	"context"
	"time"

	"github.com/mayfly-security/mayfly/broker"
)

// CutOff is implemented by a Provider that can end every session of a role at
// once, whoever has it: leases, and what the broker knows nothing of. It is for
// an emergency: nothing but an operator's own word begins one.
//
// What was decided is in the store, and the engine has it carried out for as
// long as it takes. A provider renders what must stand from Config.Cuts, and
// takes what CutOff gives it into account although the store may not show it.
type CutOff interface {
	// Roles are the roles whose sessions leases of a valid tool are, as the
	// catalog names them.
	Roles(tool broker.Tool) []string
	// RoleOf is the role whose session a lease is; empty if it is none's.
	RoleOf(e Ending) string
	// PlanCutOff says what a cut-off of the role comes to if it is decided now.
	// It may ask the system for its time, changes nothing, and works also while
	// the system is away. A role that the provider cannot cut off is refused
	// with a *broker.Error in the provider's own words.
	PlanCutOff(ctx context.Context, role string) (Cut, error)
	// CutOff has a cut-off stand, and tells how far it has come, as Revoke does
	// of a lease: verified is said once what was made before does not work. It
	// is idempotent.
	CutOff(ctx context.Context, cut Cut) Death
}

// Cut is one cut-off of a role.
type Cut struct {
	Role string
	// Before ends the sessions that were made up to then, by the provider's own
	// clock. It is never earlier than the decision.
	Before time.Time
	// Ours: Before was measured by Config.Now, for the provider did not tell its
	// time. The engine takes it as far as that clock may be behind.
	Ours bool `json:",omitempty"`
	// Clear is when, by the broker's clock and with skew, new sessions are
	// certain not to be among those. The engine has none made before.
	Clear time.Time
	// Until is when, by the broker's clock and with skew, whatever was made up
	// to Before is dead by itself: the cut-off need not stand any more.
	Until time.Time
	// Others tells people what else it ends than the broker's own leases.
	Others string
}
