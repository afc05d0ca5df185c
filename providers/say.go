package providers

import "github.com/mayfly-security/mayfly/broker"

// What an agent is told of a Mint that came to nothing are a provider's own words,
// never those of the system behind it: these stand in the log.

// SayLater is for what may work by itself later: the system cannot be reached, or
// does not do it at the moment.
func SayLater(format string, args ...any) *broker.Error {
	return broker.Refusef(broker.ReasonProvider, "try again later; operators see the cause in the log by correlation ID", format, args...)
}

// SayRefused is for what somebody has to set right first.
func SayRefused(format string, args ...any) *broker.Error {
	return broker.Refusef(broker.ReasonProviderRefused, "give the correlation ID to an operator", format, args...)
}
