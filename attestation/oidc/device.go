package oidc

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"net/url"
	"strings"
	"time"

	"golang.org/x/oauth2"

	"github.com/mayfly-security/mayfly/attestation"
	"github.com/mayfly-security/mayfly/broker"
)

const (
	deviceGrant     = "urn:ietf:params:oauth:grant-type:device_code"
	defaultInterval = 5 * time.Second // RFC 8628, section 3.2
	maxInterval     = time.Minute
	maxDevice       = time.Hour // a sign-in by device code takes no longer, whatever the provider says
	maxUserCode     = 64        // bytes
	maxCode         = 4 << 10   // bytes of a device code
)

// errPending means that the provider says: not yet.
var errPending = errors.New("pending")

// CanDevice reports whether the provider takes device codes; no while it is
// away.
func (p *Provider) CanDevice() bool {
	ctx, cancel := context.WithTimeout(context.Background(), p.config.Timeout)
	defer cancel()
	f, err := p.discover(ctx)
	return err == nil && f.device != ""
}

// StartDevice begins a sign-in by device code (RFC 8628, section 3.1). The
// requests are made here, not by the library: that one tells the provider
// neither the client's secret nor our clock.
func (p *Provider) StartDevice(ctx context.Context, now time.Time) (attestation.DeviceSignIn, error) {
	d, err := p.startDevice(ctx, now)
	if err != nil {
		return attestation.DeviceSignIn{}, signIn.refuse(err)
	}
	return d, nil
}

func (p *Provider) startDevice(ctx context.Context, now time.Time) (attestation.DeviceSignIn, error) {
	f, err := p.discover(ctx)
	if err != nil {
		return attestation.DeviceSignIn{}, err
	}
	if f.device == "" {
		return attestation.DeviceSignIn{}, fault("the identity provider takes no device codes; sign in with a browser")
	}
	body, err := p.post(ctx, f, f.device, url.Values{"scope": {strings.Join(p.scopes(f), " ")}})
	if err != nil {
		return attestation.DeviceSignIn{}, away{cause("beginning a sign-in by device code", err)}
	}
	var answer deviceAnswer
	if json.Unmarshal(body, &answer) != nil {
		return attestation.DeviceSignIn{}, away{errors.New("beginning a sign-in by device code: what it answered makes no sense")}
	}
	d, err := answer.signIn(p.checkEndpoint, now)
	if err != nil {
		return attestation.DeviceSignIn{}, away{fmt.Errorf("beginning a sign-in by device code: %w", err)}
	}
	return d, nil
}

// deviceAnswer is RFC 8628, section 3.2.
type deviceAnswer struct {
	DeviceCode string  `json:"device_code"`
	UserCode   string  `json:"user_code"`
	URI        string  `json:"verification_uri"`
	Complete   string  `json:"verification_uri_complete"`
	ExpiresIn  float64 `json:"expires_in"`
	Interval   float64 `json:"interval"`
}

// signIn judges an answer: a person is going to be shown it, and to follow it.
func (a deviceAnswer) signIn(check func(string) error, now time.Time) (attestation.DeviceSignIn, error) {
	switch {
	case a.DeviceCode == "" || len(a.DeviceCode) > maxCode:
		return attestation.DeviceSignIn{}, errors.New("its device code is missing or too long")
	case a.UserCode == "" || len(a.UserCode) > maxUserCode || unprintable(a.UserCode):
		return attestation.DeviceSignIn{}, errors.New("its user code is missing, too long or cannot be shown")
	case unprintable(a.URI) || check(a.URI) != nil:
		return attestation.DeviceSignIn{}, errors.New("its verification URI is missing or not taken")
	case !(a.ExpiresIn >= 1):
		return attestation.DeviceSignIn{}, errors.New("it does not say how long the device code is good")
	}
	if unprintable(a.Complete) || check(a.Complete) != nil {
		a.Complete = "" // it is a convenience
	}
	interval := defaultInterval
	if a.Interval > 0 {
		interval = atMost(a.Interval, maxInterval)
	}
	return attestation.DeviceSignIn{
		DeviceCode: broker.NewSecret(map[string]string{"device_code": a.DeviceCode}), UserCode: a.UserCode,
		VerificationURI: a.URI, VerificationURIComplete: a.Complete,
		ExpiresAt: now.Add(atMost(a.ExpiresIn, maxDevice)), Interval: interval,
	}, nil
}

func atMost(seconds float64, limit time.Duration) time.Duration {
	if seconds >= limit.Seconds() {
		return limit
	}
	return time.Duration(seconds * float64(time.Second))
}

// PollDevice asks once whether the person is done (RFC 8628, section 3.4). It
// returns attestation.ErrPending also where the provider finds that it was
// asked too soon.
func (p *Provider) PollDevice(ctx context.Context, d attestation.DeviceSignIn, now time.Time) (broker.Person, error) {
	person, err := p.pollDevice(ctx, d, now)
	if errors.Is(err, errPending) {
		return broker.Person{}, attestation.ErrPending
	}
	if err != nil {
		return broker.Person{}, signIn.refuse(err)
	}
	return person, nil
}

func (p *Provider) pollDevice(ctx context.Context, d attestation.DeviceSignIn, now time.Time) (broker.Person, error) {
	const expired = fault("the device code has expired before anybody used it")
	code, ok := d.DeviceCode.Reveal("device_code")
	if !ok || code == "" {
		return broker.Person{}, fault("there is no device code")
	}
	if !now.Before(d.ExpiresAt) {
		return broker.Person{}, expired
	}
	f, err := p.discover(ctx)
	if err != nil {
		return broker.Person{}, err
	}
	body, err := p.post(ctx, f, f.token, url.Values{"grant_type": {deviceGrant}, "device_code": {code}})
	var answer *oauth2.RetrieveError
	if errors.As(err, &answer) {
		switch answer.ErrorCode { // section 3.5
		case "authorization_pending", "slow_down":
			return broker.Person{}, errPending
		case "access_denied":
			return broker.Person{}, fault("the person refused it at the identity provider")
		case "expired_token":
			return broker.Person{}, expired
		case "invalid_grant":
			return broker.Person{}, fault("the identity provider does not take the device code: it was used, or has expired")
		}
	}
	if err != nil {
		return broker.Person{}, away{cause("redeeming the device code", err)}
	}
	tokens := new(oauth2.Token)
	var extra map[string]any
	if json.Unmarshal(body, tokens) != nil || json.Unmarshal(body, &extra) != nil {
		return broker.Person{}, away{errors.New("redeeming the device code: what it answered makes no sense")}
	}
	return p.tokens(ctx, f, tokens.WithExtra(extra), "", broker.SignInDevice, now)
}

// post sends a form as the client, and returns the answer's body. An answer
// that is a refusal is an *oauth2.RetrieveError without a body.
func (p *Provider) post(ctx context.Context, f *found, endpoint string, form url.Values) ([]byte, error) {
	secret, err := p.secret()
	if err != nil {
		return nil, away{err}
	}
	if f.style != oauth2.AuthStyleInHeader {
		form.Set("client_id", p.config.ClientID)
		if secret != "" {
			form.Set("client_secret", secret)
		}
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, endpoint, strings.NewReader(form.Encode()))
	if err != nil {
		return nil, err
	}
	r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	r.Header.Set("Accept", "application/json")
	if f.style == oauth2.AuthStyleInHeader { // RFC 6749, section 2.3.1
		r.SetBasicAuth(url.QueryEscape(p.config.ClientID), url.QueryEscape(secret))
	}
	resp, err := p.client.Do(r)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, err
	}
	var refusal struct {
		Code string `json:"error"`
	}
	kind, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type"))
	if resp.StatusCode == http.StatusOK && kind == "application/json" {
		return body, nil
	}
	_ = json.Unmarshal(body, &refusal) // without a code it is a refusal as well
	return nil, &oauth2.RetrieveError{Response: resp, ErrorCode: refusal.Code}
}
