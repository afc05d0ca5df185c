package awssts

import (
	"context"
	"fmt"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/awssts/awsscope"
	"github.com/mayfly-security/mayfly/providers/awssts/denylist"
	"github.com/mayfly-security/mayfly/providers/internal/awsaccess"
)

const (
	// sessionCost is what denying one session takes of a role's quota.
	sessionCost = len(`"*:l1234567890123456789012345",`)
	// kept is what is kept of the quota: for what a document has around its
	// entries, a probe, and the room in which entries move from one policy to another.
	kept = 840
)

// place is a lease in the deny list of its role, should it have to be denied.
type place struct {
	until time.Time
	// planned: it is not asked for yet, and takes no room. It bounds nothing but
	// how roles are chosen: what is planned may be refused for other reasons.
	planned bool
}

// seed takes the leases that the store knows into account.
func (p *provider) seed(ctx context.Context) error {
	all, err := p.known(ctx, false)
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
// the lease, and refuses if none has. A lease keeps the role that it has.
func (p *provider) choose(roles []awsaccess.Role, req providers.MintRequest) (string, error) {
	if p.config.Early.Mode != awsscope.EarlyDenyList {
		return roles[int(hash(string(req.Lease))%uint64(len(roles)))].ARN, nil
	}
	now, best, most := p.now(), "", -1<<31
	var clear time.Time // when a role that is cut off can be used again
	p.writers.mu.Lock()
	defer p.writers.mu.Unlock()
	for _, r := range roles {
		w := p.writerLocked(r.ARN)
		if _, has := w.places[req.Lease]; has {
			return r.ARN, nil
		}
		if until := p.cutUntilLocked(w); now.Before(until) {
			if clear.IsZero() || until.Before(clear) {
				clear = until
			}
			continue // what is made now would be dead
		}
		if room, planned := p.roomLocked(w, now); room > 0 && room-planned > most {
			best, most = r.ARN, room-planned
		}
	}
	if best == "" && !clear.IsZero() {
		return "", broker.Refusef(broker.ReasonProvider, "try again in "+broker.Span(clear.Sub(now).Round(time.Second)+time.Second),
			"an operator has just ended every session of the role of tool %s (provider %s), and none that is made now would work", req.Tool.Name, p.name)
	}
	if best == "" {
		return "", p.noRoom(req)
	}
	p.writerLocked(best).places[req.Lease] = place{until: now.Add(mintLimit + lateBound), planned: true}
	return best, nil
}

// cutUntilLocked is when sessions of the role that is cut off work again, by
// whichever of the providers that share it. The caller holds writers.mu.
func (p *provider) cutUntilLocked(w *writer) (clear time.Time) {
	for _, other := range p.writers.of[w.role.ARN] {
		clear = latest(clear, other.cut.Clear)
	}
	return clear
}

// acquaint has the role's policies looked at before its first lease is made: what
// others have put there is not known before. Where IAM does not answer, leases
// are made all the same: it is asked again every minute, and its control plane
// is not to decide whether agents can work.
func (p *provider) acquaint(ctx context.Context, role string) {
	if p.config.Early.Mode != awsscope.EarlyDenyList {
		return
	}
	p.writers.mu.Lock()
	w := p.writerLocked(role)
	first := !w.met
	w.met = true
	p.writers.mu.Unlock()
	if !first {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, mintLimit/3)
	defer cancel()
	if err := w.take(ctx); err != nil {
		return // somebody writes the list, who has looked
	}
	defer w.leave()
	if w.seen {
		return
	}
	if err := p.write(ctx, w, true, false); err != nil {
		p.log.Warn("looking at the policies of a role before its first lease", "role", role, "error", err)
	}
}

// reserve takes room for a lease that is about to be made: a lease that could
// not be ended early is not made.
func (p *provider) reserve(role string, req providers.MintRequest) error {
	if p.config.Early.Mode != awsscope.EarlyDenyList {
		return nil
	}
	p.writers.mu.Lock()
	defer p.writers.mu.Unlock()
	w := p.writerLocked(role)
	if at, has := w.places[req.Lease]; has && !at.planned {
		return nil
	}
	if room, _ := p.roomLocked(w, p.now()); room <= 0 {
		delete(w.places, req.Lease)
		return p.noRoom(req)
	}
	w.places[req.Lease] = place{until: req.End.Add(planSkew + skew)}
	return nil
}

func (p *provider) noRoom(req providers.MintRequest) error {
	return broker.Refusef(broker.ReasonProvider, "try again when leases of the tool have ended; an operator may give the tool a pool of more roles (roles)",
		"tool %s has as many leases as could be ended early: the deny lists of its roles (provider %s) have room for no more", req.Tool.Name, p.name)
}

func hash(s string) uint64 {
	h := uint64(14695981039346656037) // FNV-1a
	for i := range len(s) {
		h = (h ^ uint64(s[i])) * 1099511628211
	}
	return h
}

// roomLocked is for how many more leases the role's list has room, and how many
// are planned. Providers that share a role share its room. The caller holds
// writers.mu.
func (p *provider) roomLocked(w *writer, now time.Time) (room, planned int) {
	room = (denylist.Quota - kept - w.others) / sessionCost
	for _, other := range p.writers.of[w.role.ARN] {
		for lease, at := range other.places {
			switch {
			case !now.Before(at.until):
				delete(other.places, lease)
			case at.planned:
				planned++
			default:
				room--
			}
		}
	}
	return room, planned
}

// occupy notes until when a lease takes room.
func (p *provider) occupy(h handle) {
	if h.Role == "" || p.config.Early.Mode != awsscope.EarlyDenyList {
		return
	}
	p.writers.mu.Lock()
	defer p.writers.mu.Unlock()
	p.writerLocked(h.Role).places[broker.LeaseID(h.Session)] = place{until: h.Dies}
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
