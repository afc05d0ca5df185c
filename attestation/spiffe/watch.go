package spiffe

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/cenkalti/backoff/v4"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

// Pauses between attempts to reach the Workload API. The longest bounds how
// long we are without it after it has come back.
const (
	firstRetry = 250 * time.Millisecond
	lastRetry  = 10 * time.Second
)

// retries is the workloadapi.BackoffStrategy with these pauses.
type retries struct{}

func (retries) NewBackoff() workloadapi.Backoff { return newPauses() }

type pauses struct{ *backoff.ExponentialBackOff }

func newPauses() pauses {
	return pauses{backoff.NewExponentialBackOff(
		backoff.WithInitialInterval(firstRetry),
		backoff.WithMaxInterval(lastRetry),
		backoff.WithMaxElapsedTime(0), // zero means for ever; the default gives up after 15 minutes
	)}
}

// Next implements workloadapi.Backoff.
func (p pauses) Next() time.Duration { return p.NextBackOff() }

// watch follows the Workload API until ctx ends. WatchX509Context retries by
// itself but gives up for good where the server answers Canceled or
// InvalidArgument; a server that restarts may say either, so we go on.
func (s *Source) watch(ctx context.Context) {
	defer close(s.done)
	pause := newPauses()
	for {
		began := time.Now()
		_ = s.client.WatchX509Context(ctx, watcher{s, ctx}) // the watcher was told the error
		if time.Since(began) > lastRetry {
			pause.Reset()
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause.Next()):
		}
	}
}

// watcher takes what the Workload API says. Its methods are called from the
// watch's goroutine alone.
type watcher struct {
	s   *Source
	ctx context.Context
}

// OnX509ContextUpdate implements workloadapi.X509ContextWatcher. SVID and
// bundles change together. An answer without our identity still brings the
// bundles: what was taken out of them must not be trusted any longer.
func (w watcher) OnX509ContextUpdate(x *workloadapi.X509Context) {
	s := w.s
	s.mu.Lock()
	defer s.mu.Unlock()
	i := 0
	if !s.id.IsZero() {
		i = slices.IndexFunc(x.SVIDs, func(svid *x509svid.SVID) bool { return svid.ID == s.id })
	}
	switch {
	case i >= 0:
		s.id = x.SVIDs[i].ID
		s.current.svid = x.SVIDs[i]
		if s.failure != nil {
			s.log.Info("the Workload API is back")
			s.failure = nil
		}
		s.log.Debug("identity updated", "id", s.id, "valid_until", s.current.svid.Certificates[0].NotAfter, "trust_domains", x.Bundles.Len())
	default:
		s.failure = fmt.Errorf("the Workload API gives no SVID of %s", s.id)
		s.log.Error("the Workload API does not give our identity", "id", s.id)
	}
	if s.current.svid == nil {
		return // Open goes on waiting
	}
	s.current.bundles = x.Bundles
	close(s.updated)
	s.updated = make(chan struct{})
}

// OnX509ContextWatchError implements workloadapi.X509ContextWatcher.
func (w watcher) OnX509ContextWatchError(err error) {
	if w.ctx.Err() != nil {
		return // we ended it ourselves
	}
	s := w.s
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.failure == nil {
		s.log.Warn("the Workload API does not answer; trying again", "error", err)
	}
	s.failure = err
}
