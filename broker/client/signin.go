package client

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	mayflyv1 "github.com/mayfly-security/mayfly/broker/api/mayfly/v1"
)

// SignInInfo says how people sign in at a broker.
type SignInInfo struct {
	Issuer string
	Device bool // by device code, too
	// Sample: it is mayflyd dev's own, with sample people. Whoever can reach it
	// is any of them.
	Sample bool
}

// Session is a person's session. Its Token is told once.
type Session struct {
	Token     broker.Secret // for Config.Token
	ID        broker.SessionID
	Person    string
	Groups    []string
	ExpiresAt time.Time
	AuthTime  time.Time // when they proved who they are
	ACR       string    // how, as a class
}

// SignInInfo tells how people sign in.
func (c *Client) SignInInfo(ctx context.Context) (SignInInfo, error) {
	m, err := call(ctx, c, c.signIn.GetSignIn, &mayflyv1.GetSignInRequest{})
	return SignInInfo{m.GetIssuer(), m.GetDevice(), m.GetSamplePeople()}, err
}

// BrowserSignIn is a sign-in by browser that is under way: authorization code
// with PKCE (RFC 7636) on loopback (RFC 8252, section 7.3).
type BrowserSignIn struct {
	URL         string // where the browser goes
	State       string // what it must bring back, unchanged
	RedirectURI string
	// Check is for the person to see: the broker's page shows it as well, and they
	// agree there only if it is the same.
	Check string
	// Verifier is for Redeem. It is exported so that it redacts itself where
	// the whole is printed.
	Verifier broker.Secret
}

// StartBrowser begins a sign-in by browser. redirectURI is where we listen,
// http://127.0.0.1:PORT/callback; need asks for a fresh or stronger sign-in. It
// asks nobody yet: Redeem does.
func (c *Client) StartBrowser(redirectURI string, need broker.StepUp) BrowserSignIn {
	verifier := rand.Text() + rand.Text() // 52 characters, 260 bits: RFC 7636 wants 43 to 128
	sum := sha256.Sum256([]byte(verifier))
	challenge := base64.RawURLEncoding.EncodeToString(sum[:])
	s := BrowserSignIn{State: rand.Text(), RedirectURI: redirectURI, Check: broker.SignInCheck(challenge), Verifier: NewToken(verifier)}
	q := url.Values{
		"redirect_uri": {redirectURI}, "state": {s.State}, "code_challenge": {challenge},
	}
	if need.MaxAge > 0 {
		// Rounded down: a sign-in that is a little fresher than it must be counts.
		q.Set("max_age", strconv.FormatInt(int64(need.MaxAge/time.Second), 10))
	}
	if len(need.ACR) > 0 {
		q.Set("acr_values", strings.Join(need.ACR, " "))
	}
	s.URL = c.addr + "/signin?" + q.Encode()
	return s
}

// Redeem turns the code that the browser brought back into a session.
func (c *Client) Redeem(ctx context.Context, s BrowserSignIn, code string) (Session, error) {
	verifier, _ := s.Verifier.Reveal(fieldToken)
	return sessionOf(call(ctx, c, c.signIn.RedeemCode, &mayflyv1.RedeemCodeRequest{Code: code, CodeVerifier: verifier, RedirectUri: s.RedirectURI}))
}

// DeviceSignIn is a sign-in by device code (RFC 8628) that is under way. It
// never counts where a fresh sign-in is needed.
type DeviceSignIn struct {
	UserCode        string // what the person types in
	VerificationURI string // and where
	// VerificationURIComplete holds the code; empty if there is none.
	VerificationURIComplete string
	ExpiresAt               time.Time
	Interval                time.Duration // between two polls; never zero
	Handle                  broker.Secret // for PollDevice
}

// defaultInterval is RFC 8628's (section 3.2).
const defaultInterval = 5 * time.Second

// StartDevice begins a sign-in by device code.
func (c *Client) StartDevice(ctx context.Context) (DeviceSignIn, error) {
	m, err := call(ctx, c, c.signIn.StartDevice, &mayflyv1.StartDeviceRequest{})
	if err != nil {
		return DeviceSignIn{}, err
	}
	s := DeviceSignIn{
		UserCode: m.GetUserCode(), VerificationURI: m.GetVerificationUri(), VerificationURIComplete: m.GetVerificationUriComplete(),
		ExpiresAt: instant(m.GetExpiresAt()), Interval: m.GetInterval().AsDuration(), Handle: NewToken(m.GetHandle()),
	}
	if s.Interval <= 0 {
		s.Interval = defaultInterval
	}
	return s, nil
}

// PollDevice asks once. Until the person has finished, it is refused with
// broker.ReasonSignInPending.
func (c *Client) PollDevice(ctx context.Context, s DeviceSignIn) (Session, error) {
	handle, _ := s.Handle.Reveal(fieldToken)
	return sessionOf(call(ctx, c, c.signIn.PollDevice, &mayflyv1.PollDeviceRequest{Handle: handle}))
}

// SignOut ends our session; with the name of a person, all of theirs, which
// operators may. It returns how many ended. reason may be empty.
func (c *Client) SignOut(ctx context.Context, person, reason string) (int, error) {
	m, err := call(ctx, c, c.signIn.SignOut, &mayflyv1.SignOutRequest{Person: personName(person), Reason: reason})
	return int(m.GetSessions()), err
}

func sessionOf(m *mayflyv1.Session, err error) (Session, error) {
	if err != nil {
		return Session{}, err
	}
	return Session{
		Token: NewToken(m.GetToken()), ID: broker.SessionID(m.GetId()), Person: personName(m.GetPerson()), Groups: m.GetGroups(),
		ExpiresAt: instant(m.GetExpiresAt()), AuthTime: instant(m.GetAuthTime()), ACR: m.GetAcr(),
	}, nil
}
