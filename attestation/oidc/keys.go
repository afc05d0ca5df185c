package oidc

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"
	"time"

	goidc "github.com/coreos/go-oidc/v3/oidc"
)

// keysFor is how long a key set that was fetched is not fetched again. The
// library fetches for every signature that no key fits, so that whoever sends
// forged tokens would have the broker ask the provider as often.
const keysFor = 5 * time.Second

// keys are the provider's public keys, fetched when one is missing.
type keys struct{ remote *goidc.RemoteKeySet }

func newKeys(client *http.Client, jwks string, now func() time.Time) *keys {
	c := *client
	c.Transport = &keyTransport{next: client.Transport, now: now}
	return &keys{goidc.NewRemoteKeySet(goidc.ClientContext(context.Background(), &c), jwks)}
}

// judgement is a KeySet for one token, and tells a signature that is wrong from
// keys that could not be fetched.
type judgement struct {
	keys     *keys
	verified bool
	away     error
}

func (j *judgement) VerifySignature(ctx context.Context, jwt string) ([]byte, error) {
	payload, err := j.keys.remote.VerifySignature(ctx, jwt)
	var a away
	switch {
	case err == nil:
		j.verified = true
	case errors.As(err, &a):
		j.away = a
	case ctx.Err() != nil:
		j.away = away{fmt.Errorf("fetching the identity provider's keys: %w", ctx.Err())}
	}
	return payload, err
}

// keyTransport fetches a key set whole, and keeps it for keysFor.
type keyTransport struct {
	next http.RoundTripper
	now  func() time.Time

	mu    sync.Mutex
	body  []byte
	until time.Time
}

func (t *keyTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if now := t.now(); !now.Before(t.until) {
		body, err := t.fetch(r)
		if err != nil {
			return nil, away{err}
		}
		t.body, t.until = body, now.Add(keysFor)
	}
	return &http.Response{
		Status: "200 OK", StatusCode: http.StatusOK, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
		Header: http.Header{"Content-Type": {"application/json"}}, Request: r,
		Body: io.NopCloser(bytes.NewReader(t.body)), ContentLength: int64(len(t.body)),
	}, nil
}

func (t *keyTransport) fetch(r *http.Request) ([]byte, error) {
	const what = "fetching the identity provider's keys"
	resp, err := t.next.RoundTrip(r)
	if err != nil {
		return nil, cause(what, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s: it answered %d", what, resp.StatusCode)
	}
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, cause(what, err)
	}
	if !json.Valid(body) {
		return nil, fmt.Errorf("%s: what it answered makes no sense", what)
	}
	return body, nil
}
