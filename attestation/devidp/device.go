package devidp

import (
	"crypto/rand"
	"math/big"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"
)

// userCodeLetters make no words and look like nothing else (RFC 8628, section 6.1).
const userCodeLetters = "BCDFGHJKLMNPQRSTVWXZ"

// device is a sign-in by device code that is under way. The provider's lock
// guards it.
type device struct {
	client         string
	userCode       string
	scopes         []string
	asked          time.Time // last
	denied         bool
	authentication *authentication // nil: nobody has used the user code yet
}

func (p *Provider) deviceAuthorization(w http.ResponseWriter, r *http.Request) {
	client, ok := p.authenticate(r)
	if !ok {
		refuse(w, http.StatusUnauthorized, "invalid_client")
		return
	}
	scopes := words(r.PostFormValue("scope"))
	if !slices.Contains(scopes, "openid") {
		refuse(w, http.StatusBadRequest, "invalid_scope")
		return
	}
	name, now := random(), p.config.Now()
	d := &device{client: client.ID, userCode: newUserCode(), scopes: scopes}
	p.mu.Lock()
	kept := p.devices.put(name, d, now, now.Add(pageTime))
	p.mu.Unlock()
	if !kept {
		refuse(w, http.StatusServiceUnavailable, "temporarily_unavailable")
		return
	}
	writeJSON(w, http.StatusOK, map[string]any{
		"device_code": name, "user_code": d.userCode, "verification_uri": p.issuer + "/device",
		"verification_uri_complete": p.issuer + "/device?" + url.Values{"user_code": {d.userCode}}.Encode(),
		"expires_in":                int(pageTime.Seconds()), "interval": int(max(time.Second, p.config.DeviceInterval).Seconds()),
	})
}

func newUserCode() string {
	var b strings.Builder
	for i := range 8 {
		if i == 4 {
			b.WriteByte('-')
		}
		n, err := rand.Int(rand.Reader, big.NewInt(int64(len(userCodeLetters))))
		if err != nil {
			panic("devidp: " + err.Error()) // crypto/rand never fails
		}
		b.WriteByte(userCodeLetters[n.Int64()])
	}
	return b.String()
}

// verification is the page where a person enters the user code.
func (p *Provider) verification(w http.ResponseWriter, r *http.Request) {
	entered := strings.ToUpper(strings.TrimSpace(r.URL.Query().Get("user_code")))
	if entered == "" {
		p.show(w, http.StatusOK, view{Title: "Sign in on another device", AskCode: true})
		return
	}
	now := p.config.Now()
	var name, client string
	p.mu.Lock()
	for n, k := range p.devices.all {
		d := k.value
		if strings.ReplaceAll(d.userCode, "-", "") == strings.ReplaceAll(entered, "-", "") && now.Before(k.until) && !d.denied && d.authentication == nil {
			name, client = n, d.client
			entered = d.userCode
		}
	}
	p.mu.Unlock()
	if name == "" {
		p.problem(w, http.StatusNotFound, "There is no such code, it was used, or it is too old.")
		return
	}
	p.choice(w, r, page{device: name}, view{Client: client, UserCode: entered})
}

// decide records what a person chose.
func (p *Provider) decide(w http.ResponseWriter, name string, with func(*device)) {
	p.mu.Lock()
	d, ok := p.devices.get(name, p.config.Now())
	if ok = ok && !d.denied && d.authentication == nil; ok {
		with(d)
	}
	p.mu.Unlock()
	if !ok {
		p.problem(w, http.StatusNotFound, "There is no such code, it was used, or it is too old.")
		return
	}
	p.show(w, http.StatusOK, view{Title: "Done", Text: "Go back to where the code was shown. This page can be closed."})
}

// poll is the token endpoint for a device code (RFC 8628, section 3.5).
func (p *Provider) poll(w http.ResponseWriter, r *http.Request, client Client) {
	name, now := r.PostFormValue("device_code"), p.config.Now()
	var refusal string
	p.mu.Lock()
	d, ok := p.devices.get(name, now)
	_, known := p.devices.all[name]
	switch {
	case known && !ok:
		refusal = "expired_token"
	case !ok || d.client != client.ID:
		refusal = "invalid_grant"
	case d.denied:
		refusal = "access_denied"
	case d.authentication == nil && !d.asked.IsZero() && now.Sub(d.asked) < p.config.DeviceInterval:
		refusal = "slow_down"
	case d.authentication == nil:
		refusal = "authorization_pending"
	default:
		p.devices.take(name, now)
	}
	if d != nil {
		d.asked = now
	}
	p.mu.Unlock()
	if refusal != "" {
		refuse(w, http.StatusBadRequest, refusal)
		return
	}
	p.answer(w, client, *d.authentication, d.scopes, "")
}
