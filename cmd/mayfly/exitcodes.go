package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/client"
)

// The exit codes. They are part of the interface: none changes its meaning.
const (
	exitOK          = 0
	exitUnexpected  = 1
	exitUsage       = 2
	exitRefused     = 3
	exitNotFound    = 4
	exitUnavailable = 5
	exitIdentity    = 6
	exitAlive       = 7
	exitNo          = 8
	exitExec        = 125
	exitCannotRun   = 126
	exitNoCommand   = 127
	exitSignal      = 128 // and the number of the signal
)

// exitCode is one line of the table of exit codes.
type exitCode struct {
	code    string
	meaning string
	reasons []broker.Reason // what the broker says when it ends so
}

// exitCodes is the one table of exit codes: what the command does, its help and
// the reference go by it. A test holds it complete.
func exitCodes() []exitCode {
	return []exitCode{
		{"0", "It is done.", nil},
		{"1", "Something unexpected happened.", []broker.Reason{broker.ReasonInternal}},
		{"2", "It was asked in a way that cannot be right: a wrong flag, argument, parameter or TTL.", []broker.Reason{
			broker.ReasonInvalidArgument, broker.ReasonParameter, broker.ReasonTTL, broker.ReasonTooLarge, broker.ReasonKeyReused,
			broker.ReasonPolicyInvalid}},
		{"3", "Refused: no permission, no grant that is good now, or the present state excludes it. Of request: it was denied, withdrawn, or is expired or void.", []broker.Reason{
			broker.ReasonPermissionDenied, broker.ReasonAgentUnknown, broker.ReasonAgentDisabled, broker.ReasonNoGrant,
			broker.ReasonGrantSuspended, broker.ReasonGrantUsed, broker.ReasonIncidentClosed, broker.ReasonIncidentLimit, broker.ReasonLeaseLimit,
			broker.ReasonSelfService, broker.ReasonConflict, broker.ReasonSecretGone, broker.ReasonProviderRefused,
			broker.ReasonPolicy, broker.ReasonRequestLimit, broker.ReasonRequestOver, broker.ReasonNotEligible,
			broker.ReasonTokenReplayed, broker.ReasonSignInPending, broker.ReasonLockout}},
		{"4", "There is no such thing, or it is not yours.", []broker.Reason{broker.ReasonNotFound, broker.ReasonToolUnknown}},
		{"5", "The broker or a provider is not available, or you ask too fast: try again later.", []broker.Reason{
			broker.ReasonProvider, broker.ReasonStore, broker.ReasonClock, broker.ReasonShuttingDown, broker.ReasonRateLimited}},
		{"6", "An identity problem: no SVID or session to come with, one that the broker does not accept, a sign-in that is too old, or a broker that is not the pinned one.", []broker.Reason{
			broker.ReasonUnauthenticated, broker.ReasonSVIDExpired, broker.ReasonSVIDNotYetValid, broker.ReasonSVIDMalformed,
			broker.ReasonUntrusted, broker.ReasonTrustDomain, broker.ReasonStepUp, broker.ReasonSessionOver,
			broker.ReasonTokenInvalid, broker.ReasonSignIn}},
		{"7", "revoke --agent, --all and the like: not everything is known to be dead. What is alive is ended as soon as that is possible.", nil},
		{"8", "The answer is no. policy explain: the access is not possible. policy test: a case failed. policy preview: grants would end, or decisions turn.", nil},
		{"125", "exec, aws exec: mayfly itself failed, for whatever reason of the above; the command was not started.", nil},
		{"126", "exec, aws exec: the command was found and could not be started.", nil},
		{"127", "exec, aws exec: the command was not found.", nil},
		{"128+n", "Ended by signal n. For exec and aws exec: the command was.", nil},
		{"other", "exec, aws exec: the command's own exit code. It is passed on as it is, so it may be one of the above.", nil},
	}
}

// reasonCode is the exit code of a refusal. A reason that this version does not
// know is unexpected.
func reasonCode(r broker.Reason) int {
	for _, e := range exitCodes() {
		if slices.Contains(e.reasons, r) {
			if n, err := strconv.Atoi(e.code); err == nil {
				return n
			}
		}
	}
	return exitUnexpected
}

// codeOf is the exit code of an error.
func codeOf(err error) int {
	var exit *exitError
	var refusal *broker.Error
	switch {
	case err == nil:
		return exitOK
	case errors.As(err, &exit):
		return exit.code
	case errors.As(err, &refusal):
		return reasonCode(refusal.Reason)
	case errors.Is(err, client.ErrIdentity):
		return exitIdentity
	case errors.Is(err, client.ErrUnreachable):
		return exitUnavailable
	case errors.Is(err, context.Canceled):
		return exitSignal + 2 // interrupted; SIGTERM is told as SIGINT
	}
	return exitUnexpected
}

// exitError gives an error an exit code of its own.
type exitError struct {
	code int
	err  error // nil means that there is nothing to say
}

func (e *exitError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit code %d", e.code)
	}
	return e.err.Error()
}

func (e *exitError) Unwrap() error { return e.err }

// usagef is a wrong use of the command.
func usagef(format string, args ...any) error {
	return wrongUse(fmt.Errorf(format, args...))
}

// wrongUse makes err one, unless it has an exit code already.
func wrongUse(err error) error {
	if exit := (*exitError)(nil); errors.As(err, &exit) {
		return err
	}
	return &exitError{exitUsage, err}
}

func exitCodesTopic() *cobra.Command {
	var b strings.Builder
	b.WriteString("What the exit codes of mayfly mean, and the reasons of the broker that end so:\n\n")
	for _, c := range exitCodes() {
		fmt.Fprintf(&b, "  %-6s %s\n", c.code, c.meaning)
		for words := range slices.Chunk(c.reasons, 4) {
			b.WriteString("        ")
			for _, r := range words {
				b.WriteString(" " + string(r))
			}
			b.WriteByte('\n')
		}
	}
	return &cobra.Command{Use: "exit-codes", Short: "What the exit codes mean", Long: strings.TrimRight(b.String(), "\n")}
}

// environment describes every variable that mayfly reads.
func environment() []struct{ name, meaning string } {
	return []struct{ name, meaning string }{
		{client.EnvWorkload, "The Workload API that says who you are: unix:///path or tcp://ip:port."},
		{client.EnvAddr, "The broker's address. Default: " + client.DefaultAddr + "."},
		{client.EnvBrokerID, "The SPIFFE ID that the broker must have. Default: /mayfly in your own trust domain."},
		{client.EnvCert, "An X.509-SVID as a PEM file, in place of a Workload API; with the next two."},
		{client.EnvKey, "Its private key as a PEM file (PKCS #8)."},
		{client.EnvBundle, "The authorities of its trust domain as a PEM file."},
		{client.EnvPeopleAddr, "The address of the broker's listener for people. If it is set, and no workload's identity is, you come as a person."},
		{client.EnvPeopleCA, "A PEM file with the authorities of that listener's certificate, in place of the system's."},
		{client.EnvToken, "A person's token, in place of the session that mayfly login keeps."},
		{"XDG_CONFIG_HOME", "Sessions are kept in mayfly/ below it, each in a file with mode 0600. Default: ~/.config."},
		{"XDG_RUNTIME_DIR, XDG_CACHE_HOME", "aws credentials keeps leases in mayfly/aws/ below the first that is set, each in a file with mode 0600. Default: ~/.cache."},
		{envAWSConfig + ", " + envAWSCredentials, "The files that aws configure writes and looks at. Default: config and credentials in ~/.aws."},
		{"BROWSER", "The command that opens a browser; %s in it stands for the address. Default: xdg-open, or open on macOS."},
		{"HTTPS_PROXY, NO_PROXY", "As everywhere. TLS goes through the proxy from end to end."},
	}
}

func environmentTopic() *cobra.Command {
	var b strings.Builder
	b.WriteString("The environment variables that mayfly reads. Flags come before them.\n\n")
	for _, e := range environment() {
		fmt.Fprintf(&b, "  %-23s %s\n", e.name, e.meaning)
	}
	return &cobra.Command{Use: "environment", Short: "The environment variables that mayfly reads", Long: strings.TrimRight(b.String(), "\n")}
}
