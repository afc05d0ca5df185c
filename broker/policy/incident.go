package policy

import (
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/broker"
)

// Opener is what one identity may do about incidents, as the catalog has it.
type Opener struct {
	ID          spiffeid.ID
	Tools       []string
	Agents      []spiffeid.ID
	MaxDuration time.Duration
	MaxOpen     int    // incidents open at once; never zero
	MaxPerHour  int    // incidents opened in an hour, and so many at once; never zero
	Closers     string // a group whose members may close too; empty means only the opener
}

// Window is what an opener asks for.
type Window struct {
	Agents   []spiffeid.ID
	Tools    []string
	Duration time.Duration
}

// OpenIncident decides whether an identity may open a window: it is an opener,
// for these tools and agents, for so long, and never for itself. How many it
// has open is decided by AnotherIncident, inside the transaction.
func OpenIncident(caller spiffeid.ID, opener Opener, isOpener bool, w Window) Decision {
	if !isOpener || opener.ID != caller {
		return Deny(broker.Refusef(broker.ReasonPermissionDenied,
			"have this identity added to `openers` in the catalog",
			"%s may not open incidents", caller))
	}
	if slices.Contains(w.Agents, caller) {
		return Deny(broker.Refusef(broker.ReasonSelfService, "let another identity open the window",
			"%s cannot open a window for itself", caller))
	}
	for _, a := range w.Agents {
		if !slices.Contains(opener.Agents, a) {
			return Deny(broker.Refusef(broker.ReasonPermissionDenied, "name agents that the catalog lists for this opener",
				"%s may not open windows for %s", caller, a))
		}
	}
	for _, t := range w.Tools {
		if !slices.Contains(opener.Tools, t) {
			return Deny(broker.Refusef(broker.ReasonPermissionDenied, "name tools that the catalog lists for this opener",
				"%s may not open windows for tool %q", caller, broker.Clean(broker.Shorten(t, 64))))
		}
	}
	if w.Duration <= 0 || w.Duration > opener.MaxDuration {
		return Deny(broker.Refusef(broker.ReasonInvalidArgument, "ask for a duration within the opener's maximum",
			"a window of %s was asked for; %s may open windows of up to %s", w.Duration, caller, opener.MaxDuration))
	}
	return Allow("opener:" + caller.String())
}

// AnotherIncident decides whether an opener that has open incidents open may
// open one more.
func AnotherIncident(opener Opener, open int) Decision {
	if open >= opener.MaxOpen {
		return Deny(broker.Refusef(broker.ReasonIncidentLimit, "close one first",
			"%s has %d incident(s) open and may have %d at once", opener.ID, open, opener.MaxOpen))
	}
	return Allow("opener:" + opener.ID.String())
}

// CloseIncident decides whether an identity may close an incident: the one
// that opened it, or a member of the closers' group that the catalog names for
// that opener. Nobody else, not even an operator, who can withdraw its grants.
//
// sees says whether the caller may know of the incident at all.
func CloseIncident(caller spiffeid.ID, incident broker.Incident, isCloser, sees bool) Decision {
	switch {
	case broker.WorkloadPrincipal(caller) == incident.OpenedBy:
		return Allow("opener:" + caller.String())
	case isCloser:
		return Allow("closer:" + caller.String())
	}
	if sees {
		return Deny(broker.Refuse(broker.ReasonPermissionDenied,
			"only the one that opened an incident, or a member of its closers' group, closes it",
			"withdraw its grants to end the access now (`mayfly grant withdraw`)"))
	}
	// Whoever may not see it learns nothing of it.
	return Deny(NotFound("incident", string(incident.ID)))
}

// NotFound is the refusal for what does not exist, and for what is another's:
// the two are not to be told apart.
func NotFound(kind, id string) *broker.Error {
	return broker.Refusef(broker.ReasonNotFound, "list what is yours and copy the ID whole", "there is no %s %s", kind, id)
}
