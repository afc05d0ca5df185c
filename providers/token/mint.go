package token

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
)

// claims are the payload of a token: RFC 9068 section 2.2, RFC 8705 section
// 3.1 (cnf), and our own params, tool and incident. Times are whole seconds,
// which every verifier understands.
type claims struct {
	Issuer   string         `json:"iss"`
	Subject  string         `json:"sub"` // the agent's SPIFFE ID
	Audience string         `json:"aud"`
	Expires  int64          `json:"exp"`
	IssuedAt int64          `json:"iat"`
	ID       string         `json:"jti"`       // the lease
	ClientID string         `json:"client_id"` // the agent's SPIFFE ID
	Scope    string         `json:"scope"`
	Tool     string         `json:"tool"`
	Params   map[string]any `json:"params,omitempty"`
	Incident string         `json:"incident,omitempty"`
	Confirm  *confirmation  `json:"cnf,omitempty"`
}

type confirmation struct {
	Certificate string `json:"x5t#S256"`
}

// Mint implements providers.Provider. A token is nothing until somebody holds
// it, so whenever Mint returns an error nothing was made.
func (p *provider) Mint(_ context.Context, req providers.MintRequest, _ func(providers.Handle) error) (providers.Minted, error) {
	minted, err := p.mint(req)
	if err != nil {
		return providers.Minted{}, fmt.Errorf("%w: %w", providers.ErrNothingMade, err)
	}
	return minted, nil
}

func (p *provider) mint(req providers.MintRequest) (providers.Minted, error) {
	s, err := decodeScope(req.Tool.Scope)
	if err != nil {
		return providers.Minted{}, fmt.Errorf("%w: reading scope of tool %s: %w", providers.ErrRefused, req.Tool.Name, err)
	}
	c := claims{
		Issuer:   p.config.Issuer,
		Subject:  req.Agent.String(),
		Audience: s.Audience,
		Expires:  req.End.Add(-s.leeway).Unix(), // rounded down: never later
		IssuedAt: req.Now.Unix(),
		ID:       string(req.Lease),
		ClientID: req.Agent.String(),
		Scope:    strings.Join(s.Scopes, " "),
		Tool:     req.Tool.Name,
		Incident: string(req.Incident),
	}
	if !time.Unix(c.Expires, 0).After(req.Now) {
		return providers.Minted{}, fmt.Errorf("%w: %w", providers.ErrRefused, broker.Refusef(broker.ReasonTTL, "ask for a longer TTL",
			"a token that must be dead in %s cannot be used: it expires %s before its end", req.End.Sub(req.Now), s.leeway))
	}
	if c.Params, err = typed(req.Tool, req.Params); err != nil {
		return providers.Minted{}, fmt.Errorf("%w: %w", providers.ErrRefused, err)
	}
	if s.BindCertificate {
		if req.Certificate == [32]byte{} {
			return providers.Minted{}, fmt.Errorf("%w: %w", providers.ErrRefused, broker.Refusef(broker.ReasonProviderRefused, "connect with an X.509-SVID",
				"tokens of tool %s work only with the certificate of the agent, and it used none", req.Tool.Name))
		}
		c.Confirm = &confirmation{base64.RawURLEncoding.EncodeToString(req.Certificate[:])}
	}
	token, err := p.sign(c)
	if err != nil {
		return providers.Minted{}, err
	}
	h := handle{Version: handleVersion, Verification: s.Verification, DiesAt: req.End}
	minted := providers.Minted{
		Secret: broker.NewSecret(map[string]string{Field: token}),
		DiesAt: req.End,
	}
	if minted.Handle, err = h.encode(); err != nil {
		return providers.Minted{}, err
	}
	if s.Verification == offline {
		minted.Survives = fmt.Sprintf("verified offline: works until its own expiry at %s, whatever is revoked, and until %s at verifiers that allow for %s of clock skew",
			stamp(time.Unix(c.Expires, 0)), stamp(req.End), s.leeway)
	}
	return minted, nil
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// sign makes the token. A token that its own introspection would not take
// because of its size is an error.
func (p *provider) sign(c claims) (string, error) {
	signer := p.keys.current().signer
	if signer == nil {
		return "", fmt.Errorf("signing token: there is no usable signing key")
	}
	payload, err := json.Marshal(c)
	if err != nil {
		return "", fmt.Errorf("encoding claims: %w", err)
	}
	jws, err := signer.Sign(payload)
	if err != nil {
		return "", fmt.Errorf("signing token: %w", err)
	}
	token, err := jws.CompactSerialize()
	if err != nil {
		return "", fmt.Errorf("encoding token: %w", err)
	}
	if len(token) > maxToken {
		return "", fmt.Errorf("%w: the token is %d bytes long, and no more than %d are taken; shorten the parameters", providers.ErrRefused, len(token), maxToken)
	}
	return token, nil
}

// maxExact is the largest integer that every JSON reader gets right (RFC 7493
// section 2.2). A larger one could be a different amount to a resource server.
const maxExact = 1<<53 - 1

// typed gives the parameters their types.
func typed(tool broker.Tool, params map[string]string) (map[string]any, error) {
	if len(params) == 0 {
		return nil, nil
	}
	values := make(map[string]any, len(params))
	for name, text := range params {
		i := slices.IndexFunc(tool.Params, func(p broker.Param) bool { return p.Name == name })
		if i < 0 {
			return nil, broker.Refusef(broker.ReasonParameter, "see the tool's parameters with `mayfly tools`",
				"tool %s has no parameter %q", tool.Name, broker.Clean(broker.Shorten(name, 60)))
		}
		if err := tool.Params[i].Check(text); err != nil {
			return nil, err
		}
		switch tool.Params[i].Type {
		case broker.ParamInteger:
			n, err := strconv.ParseInt(text, 10, 64)
			if err != nil || n > maxExact || n < -maxExact {
				return nil, broker.Refusef(broker.ReasonParameter, "give a smaller number",
					"parameter %s is beyond what a token can carry exactly (2^53-1)", name)
			}
			values[name] = n
		case broker.ParamBoolean:
			values[name] = text == "true"
		default:
			values[name] = text
		}
	}
	return values, nil
}
