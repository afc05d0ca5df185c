package main

import (
	"errors"
	"testing"

	"github.com/mayfly-security/mayfly/broker"
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

func TestEveryReasonHasAnExitCode(t *testing.T) {
	for _, doc := range broker.Reasons() {
		if _, ok := codes[doc.Reason]; !ok {
			t.Errorf("reason %s has no exit code", doc.Reason)
		}
	}
	if len(codes) != len(broker.Reasons()) {
		t.Errorf("%d reasons have exit codes, and there are %d reasons", len(codes), len(broker.Reasons()))
	}
}
