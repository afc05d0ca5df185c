package client

import (
	"context"
	"iter"
	"time"

	"connectrpc.com/connect"
	"github.com/cenkalti/backoff/v4"
)

// streamOf is how one procedure that streams is followed.
type streamOf[Req, Res, T any] struct {
	open   func(context.Context, *connect.Request[Req]) (*connect.ServerStreamForClient[Res], error)
	decode func(*decoder, *Res) T
	last   func(T) bool // the stream is over with it
	// resume: where the broker goes away in the middle, the same is asked for
	// again. If not, only what was not heard at all is.
	resume bool
}

// follow walks a stream until its last message, an error, or the end of ctx.
// Where the broker is gone for a moment it tries again, for as long as one call
// may take since the broker was lost.
func follow[Req, Res, T any](ctx context.Context, c *Client, s streamOf[Req, Res, T], req *Req) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		var zero T
		pause := backoff.NewExponentialBackOff(
			backoff.WithInitialInterval(firstPause), backoff.WithMaxInterval(maxPause), backoff.WithMaxElapsedTime(c.timeout))
		heard := false
		for {
			now := false
			over, err := followOnce(ctx, c, s, req, func(v T) bool {
				now = true
				return yield(v, nil)
			})
			if over {
				return
			}
			if now {
				heard = true
				pause.Reset() // it was lost only now, however long it had been silent
			}
			wait := pause.NextBackOff()
			if wait == backoff.Stop || ctx.Err() != nil || heard && !s.resume || !again(err) {
				yield(zero, err)
				return
			}
			timer := time.NewTimer(wait)
			select {
			case <-timer.C:
			case <-ctx.Done():
				timer.Stop()
				yield(zero, c.decode(ctx, ctx.Err()))
				return
			}
		}
	}
}

// followOnce walks one stream. over says that there is nothing more to do: the
// last message came, or nobody wants more.
func followOnce[Req, Res, T any](ctx context.Context, c *Client, s streamOf[Req, Res, T], req *Req, got func(T) bool) (over bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // ends the stream at the broker, too
	stream, err := s.open(ctx, connect.NewRequest(req))
	if err != nil {
		return false, c.decode(ctx, err)
	}
	defer stream.Close() // what is left of it is of no use to anybody
	for stream.Receive() {
		d := decoder{}
		v := s.decode(&d, stream.Msg())
		if d.err != nil {
			return false, d.err
		}
		if !got(v) || s.last(v) {
			return true, nil
		}
	}
	if err := stream.Err(); err != nil {
		return false, c.decode(ctx, err)
	}
	return false, unreachable(nil, "ask again", "the broker at %s ended the answer before it was whole", c.addr)
}
