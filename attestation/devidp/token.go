package devidp

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"time"

	"github.com/go-jose/go-jose/v4"
)

const deviceGrant = "urn:ietf:params:oauth:grant-type:device_code"

// token is the token endpoint (RFC 6749, section 3.2).
func (p *Provider) token(w http.ResponseWriter, r *http.Request) {
	client, ok := p.authenticate(r)
	if !ok {
		refuse(w, http.StatusUnauthorized, "invalid_client")
		return
	}
	switch r.PostFormValue("grant_type") {
	case "authorization_code":
		p.redeem(w, r, client)
	case deviceGrant:
		p.poll(w, r, client)
	default:
		refuse(w, http.StatusBadRequest, "unsupported_grant_type")
	}
}

// authenticate tells which client asks: by Basic, in the form, or, for one
// without a secret, by its ID alone.
func (p *Provider) authenticate(r *http.Request) (Client, bool) {
	id, secret := r.PostFormValue("client_id"), r.PostFormValue("client_secret")
	if name, password, ok := r.BasicAuth(); ok {
		var err, err2 error
		name, err = url.QueryUnescape(name)
		secret, err2 = url.QueryUnescape(password)
		if err != nil || err2 != nil || id != "" && id != name {
			return Client{}, false
		}
		id = name
	}
	client, ok := p.client(id)
	if !ok || subtle.ConstantTimeCompare([]byte(secret), []byte(client.Secret)) != 1 {
		return Client{}, false
	}
	return client, true
}

func (p *Provider) redeem(w http.ResponseWriter, r *http.Request, client Client) {
	now := p.config.Now()
	p.mu.Lock()
	c, ok := p.codes.take(r.PostFormValue("code"), now) // whoever shows it wrongly spends it
	p.mu.Unlock()
	sum := sha256.Sum256([]byte(r.PostFormValue("code_verifier")))
	challenge := base64.RawURLEncoding.EncodeToString(sum[:])
	if !ok || c.client != client.ID || c.redirect != r.PostFormValue("redirect_uri") ||
		subtle.ConstantTimeCompare([]byte(challenge), []byte(c.challenge)) != 1 {
		refuse(w, http.StatusBadRequest, "invalid_grant")
		return
	}
	p.answer(w, client, c.authentication, c.scopes, c.nonce)
}

// answer gives an ID token, and an access token that opens nothing.
func (p *Provider) answer(w http.ResponseWriter, client Client, a authentication, scopes []string, nonce string) {
	access := random()
	sum := sha256.Sum256([]byte(access))
	claims := p.claims(a, client.ID, tokenTime)
	claims["at_hash"] = base64.RawURLEncoding.EncodeToString(sum[:16])
	if nonce != "" {
		claims["nonce"] = nonce
	}
	for scope, names := range map[string][]string{"email": {"email", "email_verified"}, "profile": {"name"}, "groups": {"groups"}} {
		if !slices.Contains(scopes, scope) {
			for _, name := range names {
				delete(claims, name)
			}
		}
	}
	id, err := p.sign("JWT", claims)
	if err != nil {
		refuse(w, http.StatusInternalServerError, "server_error")
		return
	}
	writeJSON(w, http.StatusOK, map[string]any{
		"access_token": access, "token_type": "Bearer", "expires_in": int(tokenTime.Seconds()), "id_token": id,
	})
}

func (p *Provider) claims(a authentication, audience string, ttl time.Duration) map[string]any {
	now := p.config.Now()
	claims := map[string]any{
		"iss": p.issuer, "sub": a.person.subject(), "aud": audience,
		"iat": now.Unix(), "exp": now.Add(ttl).Unix(), "auth_time": a.at.Unix(), "acr": a.acr,
		"email": a.person.Name, "email_verified": true, "groups": append([]string{}, a.person.Groups...),
		"mayfly_dev": true,
	}
	claims["amr"] = []string{"pwd"}
	if a.acr == ACRSecurityKey {
		claims["amr"] = []string{"pwd", "hwk"}
	}
	if a.person.FullName != "" {
		claims["name"] = a.person.FullName
	}
	return claims
}

func (p *Provider) sign(kind string, claims map[string]any) (string, error) {
	payload, err := json.Marshal(claims)
	if err != nil {
		return "", fmt.Errorf("writing a token: %w", err)
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: p.key},
		(&jose.SignerOptions{}).WithType(jose.ContentType(kind)))
	if err != nil {
		return "", fmt.Errorf("signing a token: %w", err)
	}
	signed, err := signer.Sign(payload)
	if err != nil {
		return "", fmt.Errorf("signing a token: %w", err)
	}
	return signed.CompactSerialize()
}

// Mint says what a token is to be that nobody signed in for.
type Mint struct {
	Person   string        // one of Config.People. Required
	Audience string        // empty: Config.Audience
	TTL      time.Duration // zero: 5 minutes; at most 12 hours
	AuthTime time.Time     // when the person is said to have signed in. Zero: now
	ACR      string        // empty: ACRPassword
}

// MintToken makes a JWT access token (RFC 9068) of a person: to show as a bearer
// token, or for an agent that acts on their behalf.
func (p *Provider) MintToken(m Mint) (string, error) {
	person, ok := p.person(m.Person)
	if !ok {
		return "", fmt.Errorf("minting a token: there is no person %q", m.Person)
	}
	if m.Audience == "" {
		m.Audience = p.config.Audience
	}
	if m.TTL == 0 {
		m.TTL = tokenTime
	}
	if m.AuthTime.IsZero() {
		m.AuthTime = p.config.Now()
	}
	if m.ACR == "" {
		m.ACR = ACRPassword
	}
	if m.Audience == "" || m.TTL < 0 || m.TTL > maxTokenTime {
		return "", fmt.Errorf("minting a token: it has no audience, or is to be good for %s", m.TTL)
	}
	claims := p.claims(authentication{person, m.AuthTime, m.ACR}, m.Audience, m.TTL)
	claims["jti"], claims["client_id"] = random(), "mayfly-dev"
	return p.sign("at+jwt", claims)
}

// mint is MintToken for demonstrations and shells:
//
//	curl -d person=alice@acme.example -d ttl=60 -d auth_age=3600 ISSUER/mint
//
// It gives nothing that the page of the people does not give to the same
// callers: whoever reaches it may be anybody.
func (p *Provider) mint(w http.ResponseWriter, r *http.Request) {
	ttl, ok := seconds(r, "ttl")
	age, ok2 := seconds(r, "auth_age")
	if !ok || !ok2 {
		refuse(w, http.StatusBadRequest, "invalid_request")
		return
	}
	m := Mint{Person: r.PostFormValue("person"), TTL: ttl, ACR: r.PostFormValue("acr"), AuthTime: p.config.Now().Add(-age)}
	raw, err := p.MintToken(m)
	if err != nil {
		refuse(w, http.StatusBadRequest, "invalid_request")
		return
	}
	if ttl == 0 {
		ttl = tokenTime
	}
	writeJSON(w, http.StatusOK, map[string]any{"access_token": raw, "token_type": "Bearer", "expires_in": int(ttl.Seconds())})
}

// seconds is a field of a form; zero if it is not there.
func seconds(r *http.Request, name string) (time.Duration, bool) {
	s := r.PostFormValue(name)
	if s == "" {
		return 0, true
	}
	n, err := strconv.ParseUint(s, 10, 31)
	return time.Duration(n) * time.Second, err == nil
}

func refuse(w http.ResponseWriter, status int, code string) {
	writeJSON(w, status, map[string]string{"error": code})
}

func writeJSON(w http.ResponseWriter, status int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(body) // the caller may have gone
}
