package server

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/mayfly-security/mayfly/broker"
)

// streaming is an answer of many messages. Its caller is authorized anew for
// each, and every few seconds between (I10): a stream ends when the session, the
// SVID or the agent's status that it lives on does.
type streaming struct {
	s     *Server
	v     *visit
	until time.Time

	mu sync.Mutex // the caller is asked for by one at a time
}

// errStreamOver ends a stream that lasted as long as one may: without an error
// and without a last message, so that the client asks again.
var errStreamOver = errors.New("the stream lasted as long as one may")

// stream runs the body of a handler that streams, and gives its error the form
// that callers see.
func (s *Server) stream(ctx context.Context, act string, body func(st *streaming) error) error {
	v := visitOf(ctx)
	st := &streaming{s: s, v: v, until: time.Now().Add(s.limits.StreamTime)}
	err := body(st)
	if err == nil || errors.Is(err, errStreamOver) {
		return nil
	}
	if u := (unheard{}); errors.As(err, &u) {
		s.engine.Refused(ctx, v.caller, act, "", u.error)
	}
	return s.answerTo(ctx, v, err)
}

// authorize finds out anew who the caller is, and gives the answer more time.
func (st *streaming) authorize() (broker.Caller, error) {
	st.mu.Lock()
	defer st.mu.Unlock()
	select {
	case <-st.s.stopping:
		return broker.Caller{}, broker.Refuse(broker.ReasonShuttingDown, "the broker is stopping", "try again")
	default:
	}
	if !time.Now().Before(st.until) {
		return broker.Caller{}, errStreamOver
	}
	caller, err := st.v.anew()
	if err != nil {
		return broker.Caller{}, unheard{err}
	}
	if err := st.v.more(); err != nil {
		return broker.Caller{}, err
	}
	return caller, nil
}

// turn is the time until the caller is to be authorized again. It is called
// before the caller is authorized, so that no end of a session is overheard.
func (st *streaming) turn(ctx context.Context) (context.Context, context.CancelFunc) {
	var changed <-chan struct{}
	if p := st.s.people; p != nil && st.v.door.people {
		changed = p.signIn.Changed()
	}
	ctx, cancel := context.WithTimeout(ctx, st.s.limits.StreamTick)
	go func() {
		select {
		case <-changed:
		case <-st.s.stopping:
		case <-ctx.Done():
		}
		cancel()
	}()
	return ctx, cancel
}

// guarded runs what tells by itself, and ends it as soon as its caller may not
// be told any more. tell is to be called before each message.
func (st *streaming) guarded(ctx context.Context, run func(ctx context.Context, caller broker.Caller, tell func() error) error) error {
	caller, err := st.authorize()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var watching sync.WaitGroup
	watching.Go(func() {
		for ctx.Err() == nil {
			turn, end := st.turn(ctx)
			if _, err := st.authorize(); err != nil {
				cancel(err)
			} else {
				<-turn.Done()
			}
			end()
		}
	})
	err = run(ctx, caller, func() error {
		_, err := st.authorize()
		if err != nil {
			cancel(err)
		}
		return err
	})
	if cause := context.Cause(ctx); cause != nil {
		err = cause // why it was ended, and not that it was
	}
	cancel(nil)
	watching.Wait()
	return err
}
