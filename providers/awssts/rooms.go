package awssts

import (
	"context"
	"fmt"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/awssts/awsscope"
	"github.com/mayfly-security/mayfly/providers/awssts/denylist"
)

const (
	// sessionCost is what denying one session takes of a role's quota.
	sessionCost = len(`"*:l1234567890123456789012345",`)
	// reserve is what is kept of the quota: for what a document has around its
	// entries, a probe, and the room in which entries move from one policy to another.
	reserve = 840
)

// seed takes the leases that the store knows into account.
func (p *provider) seed(ctx context.Context) error {
	all, err := p.known(ctx)
	if err != nil {
		return fmt.Errorf("reading what must be denied: %w", err)
	}
	for _, k := range all {
		if h, err := decodeHandle(k.Handle); err == nil && h.Role != "" {
			p.occupy(h)
		}
	}
	return p.seedCuts(ctx)
}

// choose takes the role of the pool that has the most room in its deny list for
// the lease, and refuses if none has: a lease that could not be ended early is
// not made. A lease keeps the role that it has.
func (p *provider) choose(roles []awsscope.Role, req providers.MintRequest) (string, error) {
	if p.config.Early.Mode != awsscope.EarlyDenyList {
		return roles[int(hash(string(req.Lease))%uint64(len(roles)))].ARN, nil
	}
	now, best, most := p.now(), "", 0
	var clear time.Time // when a role that is cut off can be used again
	p.writers.mu.Lock()
	defer p.writers.mu.Unlock()
	for _, r := range roles {
		w := p.writerLocked(r.ARN)
		if _, has := w.places[req.Lease]; has {
			return r.ARN, nil
		}
		if now.Before(w.cut.Clear) {
			if clear.IsZero() || w.cut.Clear.Before(clear) {
				clear = w.cut.Clear
			}
			continue // what is made now would be dead
		}
		if room := w.roomLocked(now); room > most {
			best, most = r.ARN, room
		}
	}
	if best == "" && !clear.IsZero() {
		return "", broker.Refusef(broker.ReasonProvider, "try again in "+broker.Span(clear.Sub(now).Round(time.Second)+time.Second),
			"an operator has just ended every session of the role of tool %s (provider %s), and none that is made now would work", req.Tool.Name, p.name)
	}
	if best == "" {
		return "", broker.Refusef(broker.ReasonProvider, "try again when leases of the tool have ended; an operator may give the tool a pool of more roles (roles)",
			"tool %s has as many leases as could be ended early: the deny lists of its roles (provider %s) have room for no more", req.Tool.Name, p.name)
	}
	p.writerLocked(best).places[req.Lease] = req.End.Add(planSkew + skew)
	return best, nil
}

func hash(s string) uint64 {
	h := uint64(14695981039346656037) // FNV-1a
	for i := range len(s) {
		h = (h ^ uint64(s[i])) * 1099511628211
	}
	return h
}

// roomLocked is for how many more leases the role's list has room. The caller
// holds writers.mu.
func (w *writer) roomLocked(now time.Time) int {
	for lease, until := range w.places {
		if !now.Before(until) {
			delete(w.places, lease)
		}
	}
	return (denylist.Quota-reserve-w.others)/sessionCost - len(w.places)
}

// occupy notes until when a lease takes room.
func (p *provider) occupy(h handle) {
	if h.Role == "" || p.config.Early.Mode != awsscope.EarlyDenyList {
		return
	}
	p.writers.mu.Lock()
	defer p.writers.mu.Unlock()
	p.writerLocked(h.Role).places[broker.LeaseID(h.Session)] = h.Dies
}

// vacate gives back the room of a lease that was not made.
func (p *provider) vacate(h handle) {
	if h.Role == "" || p.config.Early.Mode != awsscope.EarlyDenyList {
		return
	}
	p.writers.mu.Lock()
	defer p.writers.mu.Unlock()
	delete(p.writerLocked(h.Role).places, broker.LeaseID(h.Session))
}
