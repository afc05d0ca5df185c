package main

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/client"
)

// Every code that a command of exec may end with is passed on, also those that
// mean something else when mayfly itself says them.
func TestExecPassesEveryCodeOn(t *testing.T) {
	for code := 1; code <= 255; code++ {
		if got := codeOf(ownFailure(&exitError{code: code})); got != code {
			t.Errorf("the command ended with %d, and exec with %d", code, got)
		}
	}
}

func TestExecsOwnFailures(t *testing.T) {
	for _, err := range []error{
		usagef("--param is wrong"),
		errors.New("unexpected"),
		broker.Refuse(broker.ReasonNoGrant, "no", "ask"),
		broker.Refuse(broker.ReasonTTL, "no", "ask"),
	} {
		if got := codeOf(ownFailure(err)); got != exitExec {
			t.Errorf("%v ends with %d", err, got)
		}
	}
	for _, code := range []int{exitCannotRun, exitNoCommand} {
		if got := codeOf(ownFailure(&exitError{code, errors.New("no command")})); got != code {
			t.Errorf("code %d became %d", code, got)
		}
	}
}

func TestEveryReasonHasOneExitCode(t *testing.T) {
	lines := map[broker.Reason]int{}
	for _, e := range exitCodes() {
		for _, r := range e.reasons {
			lines[r]++
		}
	}
	for _, doc := range broker.Reasons() {
		if lines[doc.Reason] != 1 {
			t.Errorf("reason %s is in %d lines of the table", doc.Reason, lines[doc.Reason])
		}
		delete(lines, doc.Reason)
	}
	if len(lines) != 0 {
		t.Errorf("the table has what is no reason: %v", lines)
	}
}

// Scripts rely on these.
func TestExitCodes(t *testing.T) {
	for reason, want := range map[broker.Reason]int{
		broker.ReasonInternal: exitUnexpected, "a_reason_of_tomorrow": exitUnexpected,
		broker.ReasonInvalidArgument: exitUsage, broker.ReasonParameter: exitUsage, broker.ReasonTTL: exitUsage,
		broker.ReasonPermissionDenied: exitRefused, broker.ReasonNoGrant: exitRefused, broker.ReasonAgentDisabled: exitRefused,
		broker.ReasonIncidentClosed: exitRefused, broker.ReasonPolicy: exitRefused, broker.ReasonRequestOver: exitRefused,
		broker.ReasonNotEligible: exitRefused, broker.ReasonPolicyInvalid: exitUsage,
		broker.ReasonStepUp: exitIdentity, broker.ReasonSessionOver: exitIdentity, broker.ReasonTokenInvalid: exitIdentity,
		broker.ReasonNotFound: exitNotFound, broker.ReasonToolUnknown: exitNotFound,
		broker.ReasonProvider: exitUnavailable, broker.ReasonShuttingDown: exitUnavailable,
		broker.ReasonUnauthenticated: exitIdentity, broker.ReasonUntrusted: exitIdentity,
	} {
		if got := codeOf(fmt.Errorf("asking: %w", broker.Refuse(reason, "no", "ask"))); got != want {
			t.Errorf("%s ends with %d, want %d", reason, got, want)
		}
	}
	for err, want := range map[error]int{
		client.ErrIdentity: exitIdentity, client.ErrUnreachable: exitUnavailable,
		usagef("wrong"): exitUsage, errors.New("anything"): exitUnexpected, context.Canceled: exitSignal + 2,
	} {
		if got := codeOf(err); got != want {
			t.Errorf("%v ends with %d, want %d", err, got, want)
		}
	}
}
