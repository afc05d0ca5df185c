package signin

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/mayfly-security/mayfly/attestation"
	"github.com/mayfly-security/mayfly/broker"
)

// Device is a sign-in by device code that has begun.
type Device struct {
	Handle broker.Secret // field "handle": who has it gets the session
	attestation.DeviceSignIn
}

// device is one that is under way.
type device struct {
	d attestation.DeviceSignIn

	mu   sync.Mutex // one question at a time
	next time.Time  // the identity provider is not asked before
	over bool
}

const (
	leastInterval = time.Second     // between two questions to the identity provider
	mostInterval  = 5 * time.Minute // that an identity provider may ask for
)

// StartDevice begins a sign-in by device code (RFC 8628). from is as Start.From.
func (m *Manager) StartDevice(ctx context.Context, from string) (Device, error) {
	if !m.cfg.Provider.CanDevice() {
		return Device{}, broker.Refuse(broker.ReasonSignIn, "the identity provider takes no device codes", "sign in with a browser: `mayfly login`")
	}
	ctx, cancel := context.WithTimeout(ctx, exchangeTime)
	defer cancel()
	now := m.cfg.Now()
	d, err := m.cfg.Provider.StartDevice(ctx, now)
	if err != nil {
		m.metrics.signIn(broker.SignInDevice, "refused")
		return Device{}, err
	}
	if latest := now.Add(flowLife); d.ExpiresAt.After(latest) || d.ExpiresAt.IsZero() {
		d.ExpiresAt = latest
	}
	d.Interval = min(max(d.Interval, leastInterval), mostInterval)
	handle := newSecret()
	m.devices.add(handle, &device{d: d, next: now}, from, now)
	return Device{Handle: broker.NewSecret(map[string]string{"handle": handle}), DeviceSignIn: d}, nil
}

// PollDevice makes the session once the person has finished. Until then it
// refuses with ReasonSignInPending. Asking faster than the interval is answered
// so without asking the identity provider.
func (m *Manager) PollDevice(ctx context.Context, handle string, correlation broker.CorrelationID) (Session, error) {
	now := m.cfg.Now()
	f, ok := m.devices.get(handle, now)
	if !ok {
		return Session{}, failed("no sign-in by device code is under way with this handle")
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	pending := broker.Refusef(broker.ReasonSignInPending, "ask again after the interval", "the person has not finished the sign-in yet")
	switch {
	case f.over:
		return Session{}, failed("this sign-in was finished before")
	case !now.Before(f.d.ExpiresAt):
		m.devices.take(handle, now)
		m.metrics.signIn(broker.SignInDevice, "expired")
		return Session{}, failed("the device code is over")
	case now.Before(f.next):
		return Session{}, pending
	}
	f.next = now.Add(f.d.Interval)
	ctx, cancel := context.WithTimeout(ctx, exchangeTime)
	defer cancel()
	p, err := m.cfg.Provider.PollDevice(ctx, f.d, now)
	if errors.Is(err, attestation.ErrPending) {
		return Session{}, pending
	}
	if err != nil && ctx.Err() != nil {
		return Session{}, err // nothing was decided: the caller may ask again
	}
	f.over = true
	m.devices.take(handle, now)
	if err == nil {
		p.Method = broker.SignInDevice
		err = m.checkPerson(p)
	}
	if err != nil {
		m.metrics.signIn(broker.SignInDevice, "refused")
		return Session{}, err
	}
	return m.start(ctx, p, correlation)
}
