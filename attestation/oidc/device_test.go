package oidc_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-security/mayfly/attestation"
	"github.com/mayfly-security/mayfly/attestation/oidc"
	"github.com/mayfly-security/mayfly/attestation/oidctest"
	"github.com/mayfly-security/mayfly/broker"
)

func TestDevice(t *testing.T) {
	worlds(t, func(t *testing.T, w world) {
		for _, config := range []func(*oidc.Config){
			func(*oidc.Config) {},
			func(c *oidc.Config) { c.ClientID, c.ClientSecretFile = "public", "" },
		} {
			c := w.config
			config(&c)
			p := open(t, c)
			if !p.CanDevice() {
				t.Fatal("it takes no device codes")
			}
			d, err := p.StartDevice(t.Context(), w.now())
			if err != nil {
				t.Fatal(err)
			}
			if left := d.ExpiresAt.Sub(w.now()); left < 9*time.Minute || left > 10*time.Minute || d.Interval != 5*time.Second {
				t.Errorf("good for %s, interval %s", left, d.Interval)
			}
			secret, _ := d.DeviceCode.Reveal("device_code")
			if secret == "" || strings.Contains(fmt.Sprintf("%+v %#v", d, d), secret) {
				t.Errorf("the device code shows: %+v", d)
			}
			for range 2 { // the second is too soon for some, which is the same
				if _, err := p.PollDevice(t.Context(), d, w.now()); !errors.Is(err, attestation.ErrPending) {
					t.Fatalf("nobody has used the code: %v", err)
				}
			}
			answers := w.answers(alice, w.strong, 0)
			answers["user_code"] = d.UserCode
			page, err := oidctest.New(nil).Walk(t.Context(), d.VerificationURI, answers)
			if err != nil || page.Status != 200 {
				t.Fatalf("%+v, %v", page, err)
			}
			person, err := p.PollDevice(t.Context(), d, w.now())
			if err != nil {
				t.Fatalf("%v\n%s", err, page.Body)
			}
			if person.Name != alice || person.Method != broker.SignInDevice || len(person.Groups) != 2 {
				t.Errorf("%+v", person)
			}
			_, err = p.PollDevice(t.Context(), d, w.now())
			refused(t, err, broker.ReasonSignIn, "device code")
			hides(t, err, secret)
		}
	})
}

func TestDeviceRefused(t *testing.T) {
	worlds(t, func(t *testing.T, w world) {
		p := open(t, w.config)
		d, err := p.StartDevice(t.Context(), w.now())
		if err != nil {
			t.Fatal(err)
		}
		if d.VerificationURIComplete == "" {
			t.Fatal("there is no complete URI")
		}
		answers := w.answers(alice, w.password, 0)
		answers["how"] = "deny"
		if _, err := oidctest.New(nil).Walk(t.Context(), d.VerificationURIComplete, answers); err != nil {
			t.Fatal(err)
		}
		_, err = p.PollDevice(t.Context(), d, w.now())
		refused(t, err, broker.ReasonSignIn, "the person refused it")

		d.DeviceCode = broker.NewSecret(map[string]string{"device_code": "a-code-of-nobody"})
		_, err = p.PollDevice(t.Context(), d, w.now())
		refused(t, err, broker.ReasonSignIn, "device code")
		_, err = p.PollDevice(t.Context(), d, d.ExpiresAt)
		refused(t, err, broker.ReasonSignIn, "has expired")
		_, err = p.PollDevice(t.Context(), attestation.DeviceSignIn{ExpiresAt: d.ExpiresAt}, w.now())
		refused(t, err, broker.ReasonSignIn, "no device code")
	})
}

// TestDeviceAnswers: what is shown to a person comes from the provider, and is
// judged first.
func TestDeviceAnswers(t *testing.T) {
	t.Parallel()
	f, c := newForge(t), newClock()
	p := open(t, f.config(c))
	type m = map[string]any
	good := m{"device_code": "the-device-code", "user_code": "ABCD", "verification_uri": f.issuer + "/activate", "expires_in": 60}
	for _, a := range []struct {
		name    string
		changes m
		ok      func(attestation.DeviceSignIn) bool
	}{
		{"as it is", nil, func(d attestation.DeviceSignIn) bool {
			return d.Interval == 5*time.Second && d.ExpiresAt.Equal(c.Now().Add(time.Minute)) && d.VerificationURIComplete == ""
		}},
		{"interval", m{"interval": 7}, func(d attestation.DeviceSignIn) bool { return d.Interval == 7*time.Second }},
		{"long interval", m{"interval": 1e300}, func(d attestation.DeviceSignIn) bool { return d.Interval == time.Minute }},
		{"negative interval", m{"interval": -7}, func(d attestation.DeviceSignIn) bool { return d.Interval == 5*time.Second }},
		{"long life", m{"expires_in": 1e300}, func(d attestation.DeviceSignIn) bool { return d.ExpiresAt.Equal(c.Now().Add(time.Hour)) }},
		{"complete", m{"verification_uri_complete": f.issuer + "/activate?c=ABCD"}, func(d attestation.DeviceSignIn) bool {
			return d.VerificationURIComplete == f.issuer+"/activate?c=ABCD"
		}},
		{"complete with a script", m{"verification_uri_complete": "javascript:alert(1)"}, func(d attestation.DeviceSignIn) bool { return d.VerificationURIComplete == "" }},
		{"no life", m{"expires_in": 0}, nil},
		{"no device code", m{"device_code": nil}, nil},
		{"long device code", m{"device_code": strings.Repeat("a", 5000)}, nil},
		{"no user code", m{"user_code": ""}, nil},
		{"user code with an escape", m{"user_code": "AB\x1b[2J"}, nil},
		{"long user code", m{"user_code": strings.Repeat("A", 65)}, nil},
		{"no URI", m{"verification_uri": nil}, nil},
		{"URI of a file", m{"verification_uri": "file:///etc/passwd"}, nil},
		{"plain http elsewhere", m{"verification_uri": "http://evil.example/"}, nil},
		{"URI with bidi", m{"verification_uri": f.issuer + "/\u202e"}, nil},
		{"wrong types", m{"expires_in": "60"}, nil},
	} {
		f.answer("/device", 200, with(good, a.changes))
		d, err := p.StartDevice(t.Context(), c.Now())
		if a.ok != nil {
			if err != nil || !a.ok(d) {
				t.Errorf("%s: %+v, %v", a.name, d, err)
			}
			continue
		}
		refused(t, err, broker.ReasonSignIn, "does not work with this broker")
		if err != nil {
			hides(t, err, "the-device-code")
		}
	}
	f.answer("/device", 200, good)
	d, err := p.StartDevice(t.Context(), c.Now())
	if err != nil {
		t.Fatal(err)
	}
	for code, why := range map[string]string{
		"authorization_pending": "", "slow_down": "",
		"access_denied": "the person refused", "expired_token": "has expired", "invalid_grant": "was used", "server_error": "away",
	} {
		f.answer("/token", 400, m{"error": code, "error_description": "the-device-code is x"})
		_, err := p.PollDevice(t.Context(), d, c.Now())
		if why == "" {
			if !errors.Is(err, attestation.ErrPending) {
				t.Errorf("%s: %v", code, err)
			}
			continue
		}
		refused(t, err, broker.ReasonSignIn, why)
		hides(t, err, "the-device-code")
	}
	f.answer("/token", 200, m{"access_token": "a"})
	_, err = p.PollDevice(t.Context(), d, c.Now())
	refused(t, err, broker.ReasonSignIn, "no ID token")
	id := with(shown(f, c), m{"aud": clientID, "client_id": nil})
	f.answer("/token", 200, m{"access_token": "a", "id_token": f.sign("ES256", nil, id)})
	if person, err := p.PollDevice(t.Context(), d, c.Now()); err != nil || person.Name != alice || person.Method != broker.SignInDevice {
		t.Errorf("an ID token without a nonce: %+v, %v", person, err)
	}
	f.set("device_authorization_endpoint", nil)
	p = open(t, f.config(c))
	if p.CanDevice() {
		t.Error("it takes device codes without an endpoint")
	}
	_, err = p.StartDevice(t.Context(), c.Now())
	refused(t, err, broker.ReasonSignIn, "takes no device codes")
}
