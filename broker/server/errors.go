package server

import (
	"context"
	"errors"
	"log/slog"

	"connectrpc.com/connect"

	"github.com/mayfly-security/mayfly/broker"
	mayflyv1 "github.com/mayfly-security/mayfly/broker/api/mayfly/v1"
)

// codes is the one table that maps reasons to the RPC's codes; Connect maps
// those to HTTP status. The reference of errors is made from it.
var codes = map[broker.Reason]connect.Code{
	broker.ReasonUnauthenticated:  connect.CodeUnauthenticated,
	broker.ReasonSVIDExpired:      connect.CodeUnauthenticated,
	broker.ReasonSVIDNotYetValid:  connect.CodeUnauthenticated,
	broker.ReasonSVIDMalformed:    connect.CodeUnauthenticated,
	broker.ReasonUntrusted:        connect.CodeUnauthenticated,
	broker.ReasonTrustDomain:      connect.CodeUnauthenticated,
	broker.ReasonAgentUnknown:     connect.CodePermissionDenied,
	broker.ReasonAgentDisabled:    connect.CodePermissionDenied,
	broker.ReasonPermissionDenied: connect.CodePermissionDenied,
	broker.ReasonSelfService:      connect.CodePermissionDenied,
	broker.ReasonNoGrant:          connect.CodePermissionDenied,
	broker.ReasonGrantSuspended:   connect.CodePermissionDenied,
	broker.ReasonGrantUsed:        connect.CodePermissionDenied,
	broker.ReasonIncidentClosed:   connect.CodePermissionDenied,
	broker.ReasonNotFound:         connect.CodeNotFound,
	broker.ReasonToolUnknown:      connect.CodeNotFound,
	broker.ReasonInvalidArgument:  connect.CodeInvalidArgument,
	broker.ReasonParameter:        connect.CodeInvalidArgument,
	broker.ReasonTTL:              connect.CodeInvalidArgument,
	broker.ReasonKeyReused:        connect.CodeInvalidArgument,
	broker.ReasonConflict:         connect.CodeFailedPrecondition,
	broker.ReasonSecretGone:       connect.CodeFailedPrecondition,
	broker.ReasonProviderRefused:  connect.CodeFailedPrecondition,
	broker.ReasonIncidentLimit:    connect.CodeResourceExhausted,
	broker.ReasonLeaseLimit:       connect.CodeResourceExhausted,
	broker.ReasonRateLimited:      connect.CodeResourceExhausted,
	broker.ReasonTooLarge:         connect.CodeResourceExhausted,
	broker.ReasonProvider:         connect.CodeUnavailable,
	broker.ReasonStore:            connect.CodeUnavailable,
	broker.ReasonClock:            connect.CodeUnavailable,
	broker.ReasonShuttingDown:     connect.CodeUnavailable,
	broker.ReasonInternal:         connect.CodeInternal,
	broker.ReasonPolicy:           connect.CodePermissionDenied,
	broker.ReasonPolicyInvalid:    connect.CodeInvalidArgument,
	broker.ReasonRequestLimit:     connect.CodeResourceExhausted,
	broker.ReasonRequestOver:      connect.CodeFailedPrecondition,
	broker.ReasonNotEligible:      connect.CodePermissionDenied,
	broker.ReasonStepUp:           connect.CodeUnauthenticated,
	broker.ReasonSessionOver:      connect.CodeUnauthenticated,
	broker.ReasonTokenInvalid:     connect.CodeUnauthenticated,
	broker.ReasonTokenReplayed:    connect.CodePermissionDenied,
	broker.ReasonSignIn:           connect.CodeUnauthenticated,
	broker.ReasonSignInPending:    connect.CodeFailedPrecondition,
	broker.ReasonLockout:          connect.CodeFailedPrecondition,
}

// Code is the RPC code of a reason.
func Code(r broker.Reason) connect.Code {
	if c, ok := codes[r]; ok {
		return c
	}
	return connect.CodeInternal
}

// rpcError turns an error into what the caller sees. An error that is no
// *broker.Error is told as internal, and its text goes to the log alone.
func rpcError(ctx context.Context, log *slog.Logger, correlation broker.CorrelationID, err error) *connect.Error {
	var refusal *broker.Error
	switch {
	case errors.As(err, &refusal):
		if cause := refusal.Unwrap(); cause != nil {
			level := slog.LevelWarn
			if Code(refusal.Reason) == connect.CodeUnauthenticated {
				level = slog.LevelDebug // anybody can cause these; they are counted and, within bounds, evidence
			}
			log.Log(ctx, level, "a call was refused for a cause of our own", "reason", refusal.Reason, "correlation", correlation, "error", cause)
		}
	case errors.Is(err, context.Canceled):
		refusal = broker.Refuse(broker.ReasonConflict, "the caller went away", "ask again")
	case errors.Is(err, context.DeadlineExceeded):
		refusal = broker.Refuse(broker.ReasonProvider, "the call took too long", "try again")
	default:
		log.ErrorContext(ctx, "an error without a reason", "correlation", correlation, "error", err)
		refusal = broker.Refuse(broker.ReasonInternal, "something unexpected happened",
			"give the correlation ID to an operator: "+string(correlation))
	}
	e := connect.NewError(Code(refusal.Reason), errors.New(refusal.Message))
	detail, err := connect.NewErrorDetail(&mayflyv1.ErrorDetail{
		Reason: string(refusal.Reason), Next: refusal.Next,
		CorrelationId: string(correlation), LeaseId: string(refusal.Lease),
		MaxAge: int64(refusal.StepUp.MaxAge.Seconds()), AcrValues: refusal.StepUp.ACR,
	})
	if err == nil {
		e.AddDetail(detail)
	}
	return e
}

// reasonOfCode names the reason of an error that the RPC library made itself,
// before any of our code ran: a body that is too large or cannot be read, a
// method that does not exist. message is the library's; it is passed on only
// where it speaks of the request, and not of our sockets.
func reasonOfCode(c connect.Code, message string) *broker.Error {
	message = broker.Clean(broker.Shorten(message, 300))
	switch c {
	case connect.CodeInvalidArgument, connect.CodeUnimplemented: // the latter is an encoding that is not known
		return broker.Refuse(broker.ReasonInvalidArgument, message, "compare the request with the API's definition; unknown fields are refused")
	case connect.CodeResourceExhausted:
		return broker.Refuse(broker.ReasonTooLarge, message, "send less")
	case connect.CodeNotFound:
		return broker.Refuse(broker.ReasonNotFound, message, "see the API's definition for what there is")
	case connect.CodeDeadlineExceeded, connect.CodeCanceled:
		return broker.Refuse(broker.ReasonInvalidArgument, "the request did not arrive as a whole in time", "send it at once")
	}
	return broker.Refuse(broker.ReasonInternal, "something unexpected happened", "give the correlation ID to an operator")
}
