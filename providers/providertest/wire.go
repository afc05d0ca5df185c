package providertest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"
)

// call is one kind of request to a System.
type call[Q, A any] func(ctx context.Context, q Q) (A, error)

// wire is how a provider reaches its System.
type wire struct {
	session call[sessionRequest, sessionAnswer]
	create  call[createRequest, createAnswer]
	end     call[handlesRequest, []statusAnswer]
	status  call[handlesRequest, []statusAnswer]
	close   func()
}

// errNotSent means that the request never left, so nothing was done.
var errNotSent = errors.New("the request was not sent")

// inProcess reaches s by calls.
func inProcess(s *System) wire {
	return wire{
		session: unlessDone(s.session),
		create:  unlessDone(s.create),
		end:     unlessDone(s.end),
		status:  unlessDone(s.status),
		close:   func() {},
	}
}

// unlessDone refuses calls whose caller has left before they begin, as a
// connection would.
func unlessDone[Q, A any](c call[Q, A]) call[Q, A] {
	return func(ctx context.Context, q Q) (A, error) {
		if err := ctx.Err(); err != nil {
			var none A
			return none, fmt.Errorf("%w: %w", errNotSent, err)
		}
		return c(ctx, q)
	}
}

// overHTTP reaches the World at url.
func overHTTP(url string) wire {
	// A transport of its own, without proxies, whose connections end with the
	// provider. It repeats no POST that may have left.
	transport := &http.Transport{
		DialContext:         (&net.Dialer{Timeout: 5 * time.Second}).DialContext,
		MaxIdleConnsPerHost: 64,
	}
	client := &http.Client{Transport: transport}
	return wire{
		session: post[sessionRequest, sessionAnswer](client, url+"/session"),
		create:  post[createRequest, createAnswer](client, url+"/create"),
		end:     post[handlesRequest, []statusAnswer](client, url+"/end"),
		status:  post[handlesRequest, []statusAnswer](client, url+"/status"),
		close:   transport.CloseIdleConnections,
	}
}

func post[Q, A any](client *http.Client, url string) call[Q, A] {
	return func(ctx context.Context, q Q) (answer A, err error) {
		body, err := json.Marshal(q)
		if err != nil {
			return answer, fmt.Errorf("%w: %w", errNotSent, err)
		}
		r, err := http.NewRequestWithContext(ctx, http.MethodPost, url, bytes.NewReader(body))
		if err != nil {
			return answer, fmt.Errorf("%w: %w", errNotSent, err)
		}
		response, err := client.Do(r)
		if err != nil {
			var op *net.OpError
			if errors.As(err, &op) && op.Op == "dial" {
				return answer, fmt.Errorf("%w: %w", errNotSent, err)
			}
			return answer, fmt.Errorf("asking the outside system: %w", err)
		}
		defer response.Body.Close()
		switch response.StatusCode {
		case http.StatusOK:
		case http.StatusForbidden:
			return answer, errRefused
		case http.StatusServiceUnavailable:
			return answer, errAway
		default:
			return answer, fmt.Errorf("%w: %s", errFailed, response.Status)
		}
		if err := json.NewDecoder(io.LimitReader(response.Body, maxBody)).Decode(&answer); err != nil {
			// The decoder's error can hold a piece of the answer, and so of the secret.
			return answer, errors.New("reading the outside system's answer: it is cut or malformed")
		}
		return answer, nil
	}
}
