package policy

import (
	"fmt"
	"strings"

	"github.com/mayfly-security/mayfly/broker"
)

// DeniedBy is the cause behind a refusal that a policy set decided: what the
// evidence says of it beside the message.
type DeniedBy struct{ Verdict }

func (d DeniedBy) Error() string {
	return fmt.Sprintf("policy set %s: policies %q, errors %q", d.Digest, d.Policies, d.Errors)
}

// Refusal is what whoever asked is told of a Verdict that denies: who may not
// do what, and by which policies.
func (v Verdict) Refusal(who, what string) *broker.Error {
	return v.refusal(broker.ReasonPolicy, "`mayfly policy explain` says what would allow it", who, what)
}

// AdminRefusal is Refusal for what operators do.
func (v Verdict) AdminRefusal(who string, verb Verb) *broker.Error {
	return v.refusal(broker.ReasonPermissionDenied,
		fmt.Sprintf("`mayfly policy explain administer --verb %s` says what would allow it", verb), who, fmt.Sprintf("administer (%s)", verb))
}

func (v Verdict) refusal(reason broker.Reason, next, who, what string) *broker.Error {
	return broker.Refusef(reason, next, "%s may not %s: %s (policy set %s)", who, what, v.Why(), Short(v.Digest)).Because(DeniedBy{v})
}

// Why says for people why a Verdict denies.
func (v Verdict) Why() string {
	switch {
	case len(v.Errors) > 0:
		return "a policy could not be evaluated, which denies: " + broker.Clean(broker.Shorten(listed(v.Errors), 300))
	case len(v.Policies) > 0:
		return "forbidden by " + listed(v.Policies)
	}
	return "no policy permits it"
}

// Short is a digest as people are shown it.
func Short(digest string) string { return digest[:min(12, len(digest))] }

// listed names some of many.
func listed(names []string) string {
	const most = 8
	if len(names) > most {
		return fmt.Sprintf("%s and %d more", strings.Join(names[:most], ", "), len(names)-most)
	}
	return strings.Join(names, ", ")
}
