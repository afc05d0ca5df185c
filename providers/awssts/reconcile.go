package awssts

import (
	"context"
	"errors"
	"strings"
	"time"
)

// reconcileEvery is how often what is in IAM is compared with what must be.
const reconcileEvery = time.Minute

// reconcileForEver compares the lists with what is in IAM until ctx ends.
func (p *provider) reconcileForEver(ctx context.Context) {
	tick := time.NewTicker(reconcileEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			if err := p.reconcile(ctx); err != nil && ctx.Err() == nil {
				p.log.Warn("comparing deny lists with what is in IAM", "error", err)
			}
		}
	}
}

// reconcile compares every list of the provider with what is in IAM once.
func (p *provider) reconcile(ctx context.Context) error {
	p.writers.mu.Lock()
	var all []*writer
	for key, w := range p.writers.all {
		if strings.HasPrefix(key, p.name+"|") {
			all = append(all, w)
		}
	}
	p.writers.mu.Unlock()
	var errs []error
	for _, w := range all {
		if err := w.take(ctx); err != nil {
			return err
		}
		errs = append(errs, p.writeIn(ctx, w, revokeLimit))
		w.leave()
	}
	return errors.Join(errs...)
}

// writeIn compares one list with what is in IAM. Endings wait for the turn, so
// it takes no longer than they would.
func (p *provider) writeIn(ctx context.Context, w *writer, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	return p.write(ctx, w, true, false)
}
