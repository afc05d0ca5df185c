// Package policy decides: facts and an instant go in, a verdict with its
// reasons comes out. It reads nothing and changes nothing, so that the same
// decision can be made before an act, again inside the act's transaction, for
// as long as a lease lives, and in a test.
//
// A policy set (Set) says who may do what. What is no matter of policy text is
// Go code over catalog data: what a grant stands on (GrantFacts), who must agree
// to a request (Voting), and within which bounds an opener opens (Opener).
package policy

import "github.com/mayfly-security/mayfly/broker"

// Decision is a verdict. The zero Decision allows nothing.
type Decision struct {
	// Refusal is why not; nil only in a Decision made by Allow.
	Refusal *broker.Error
	// By names what allowed it, for the evidence.
	By      string
	allowed bool
}

// Allow makes the Decision that allows, on the strength of by.
func Allow(by string) Decision { return Decision{By: by, allowed: true} }

// Deny makes the Decision that refuses.
func Deny(refusal *broker.Error) Decision { return Decision{Refusal: refusal} }

// Err returns nil if the decision allows, and the refusal otherwise.
func (d Decision) Err() error {
	switch {
	case d.allowed:
		return nil
	case d.Refusal != nil:
		return d.Refusal
	}
	return broker.Refuse(broker.ReasonPermissionDenied, "nothing allows this", "ask an operator")
}
