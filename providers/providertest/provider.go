package providertest

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
)

// The fields of the secret. The user name is the external name, and public.
const (
	fieldUsername = "username"
	fieldPassword = "password"
)

// outside is a provider whose credentials live in a System.
type outside struct {
	wire         wire
	mode         Mode
	installation broker.InstallationID
	traits       providers.Traits
	survives     string
	closeOnce    sync.Once
}

// planner is an outside whose handle is the external name.
type planner struct{ *outside }

func newProvider(w wire, mode Mode, installation broker.InstallationID, traits providers.Traits, survives string) providers.Provider {
	o := &outside{wire: w, mode: mode, installation: installation, traits: traits, survives: survives}
	if mode == Recorded {
		return o
	}
	return planner{o}
}

func (o *outside) Traits() providers.Traits { return o.traits }

// Plan implements providers.Planner.
func (p planner) Plan(req providers.MintRequest) (providers.Handle, error) {
	return providers.Handle(p.name(req.Lease)), nil
}

// name is the external name: the installation is part of it, so that two
// installations never end each other's.
func (o *outside) name(lease broker.LeaseID) string {
	return string(o.installation) + "-" + string(lease)
}

// Mint sends each request once: whatever may have had an effect is left to
// the engine to end.
func (o *outside) Mint(ctx context.Context, req providers.MintRequest, record func(providers.Handle) error) (providers.Minted, error) {
	name := o.name(req.Lease)
	handle, token := providers.Handle(name), ""
	if o.mode == Recorded {
		// Only the answer tells the session's token, and without it nothing can
		// be created under the session: a session that is lost is harmless, and
		// so nothing was made.
		s, err := o.wire.session(ctx, sessionRequest{Name: name, DiesAt: req.End})
		if err != nil {
			switch {
			case errors.Is(err, errRefused):
				err = fmt.Errorf("%w: %w", providers.ErrRefused, err)
			case errors.Is(err, errAway):
				err = fmt.Errorf("%w: %w", providers.ErrAway, err)
			}
			return providers.Minted{}, fmt.Errorf("%w: opening session: %w", providers.ErrNothingMade, err)
		}
		handle, token = providers.Handle(s.Accessor), s.Token
		if err := record(handle); err != nil {
			return providers.Minted{}, fmt.Errorf("%w: recording handle: %w", providers.ErrNothingMade, err)
		}
	}
	made, err := o.wire.create(ctx, createRequest{Name: name, Token: token, DiesAt: req.End})
	if err != nil {
		return providers.Minted{}, fmt.Errorf("creating credential: %w", classify(err))
	}
	minted := providers.Minted{
		Secret:   broker.NewSecret(map[string]string{fieldUsername: name, fieldPassword: made.Secret}),
		Handle:   handle,
		DiesAt:   made.DiesAt,
		Survives: o.survives,
	}
	if made.DiesAt.Before(req.End) {
		minted.Ends = made.DiesAt
	}
	return minted, nil
}

// classify adds what is certain about the outcome.
func classify(err error) error {
	switch {
	case errors.Is(err, errRefused):
		return providers.Refused(err)
	case errors.Is(err, errAway):
		return fmt.Errorf("%w: %w: %w", providers.ErrNothingMade, providers.ErrAway, err)
	case errors.Is(err, errNotSent):
		return fmt.Errorf("%w: %w", providers.ErrNothingMade, err)
	}
	return err
}

func (o *outside) Revoke(ctx context.Context, endings []providers.Ending) []providers.Death {
	return o.ask(ctx, o.wire.end, endings)
}

func (o *outside) Confirm(ctx context.Context, endings []providers.Ending) []providers.Death {
	return o.ask(ctx, o.wire.status, endings)
}

// ask sends one request for all endings and spreads the answer over them.
func (o *outside) ask(ctx context.Context, call call[handlesRequest, []statusAnswer], endings []providers.Ending) []providers.Death {
	deaths := make([]providers.Death, len(endings))
	var handles []string
	var at []int // the ending that each of handles belongs to
	for i, e := range endings {
		handle, err := o.handleOf(e)
		switch {
		case err != nil:
			deaths[i].Err = err
		case handle == "":
			deaths[i].Progress = broker.ProgressVerified
		default:
			handles, at = append(handles, handle), append(at, i)
		}
	}
	if len(handles) == 0 {
		return deaths
	}
	answers, err := call(ctx, handlesRequest{Mode: o.mode, Handles: handles})
	if errors.Is(err, errAway) {
		err = fmt.Errorf("%w: %w", providers.ErrAway, err)
	}
	if err == nil && len(answers) != len(handles) {
		err = fmt.Errorf("the outside system answered for %d of %d credentials", len(answers), len(handles))
	}
	for n, i := range at {
		if err != nil {
			deaths[i].Err = err
			continue
		}
		deaths[i] = providers.Death{Progress: answers[n].Progress, RetryAt: answers[n].RetryAt}
	}
	return deaths
}

// handleOf returns the name or accessor to ask about; it is empty where
// nothing can have been made.
func (o *outside) handleOf(e providers.Ending) (string, error) {
	if e.Handle == nil {
		if o.mode == Recorded {
			return "", nil // nothing is created before the handle is recorded
		}
		return o.name(e.Lease), nil
	}
	handle := string(e.Handle)
	if o.mode != Recorded && handle != o.name(e.Lease) {
		return "", fmt.Errorf("the handle of lease %s is of another lease or installation", e.Lease)
	}
	if o.mode == Recorded && !isAccessor(handle) {
		return "", fmt.Errorf("the handle of lease %s is no accessor", e.Lease)
	}
	return handle, nil
}

// Close closes idle connections. Calls under way go on.
func (o *outside) Close() error {
	o.closeOnce.Do(o.wire.close)
	return nil
}
