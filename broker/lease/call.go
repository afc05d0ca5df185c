package lease

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// errLeft means that a provider did not answer in its time, nor soon after: the
// call goes on, and nobody waits for it any more. What it came to is not known.
var errLeft = errors.New("the provider did not answer in its time, and the call was left behind")

// called makes one call to a provider under a time limit that does not trust
// it. ctx carries the limit; a provider that is deaf to it is given callGrace,
// and then the call is left behind: it goes on in its goroutine, holding its
// provider open, it is counted, and late, if not nil, gets what it came to. A
// panic is an error.
func called[T any](ctx context.Context, g *gate, p *openProvider, what string, call func(context.Context) (T, error), late func(T, error)) (T, error) {
	type outcome struct {
		value T
		err   error
	}
	var none T
	if !p.acquire() {
		return none, errors.New("the provider is closed")
	}
	answer := make(chan outcome, 1)
	go func() {
		defer p.release()
		var o outcome
		defer func() {
			if r := recover(); r != nil {
				o = outcome{err: fmt.Errorf("provider %s panicked: %v", g.provider, r)}
			}
			answer <- o
		}()
		o.value, o.err = call(ctx)
	}()
	select {
	case o := <-answer:
		return o.value, o.err
	case <-ctx.Done():
	}
	grace := time.NewTimer(callGrace)
	defer grace.Stop()
	select {
	case o := <-answer:
		return o.value, o.err
	case <-grace.C:
	}
	g.leave(what)
	go func() { // ends with the call
		o := <-answer
		g.returned(what, o.err)
		if late != nil {
			late(o.value, o.err)
		}
	}()
	return none, errLeft
}
