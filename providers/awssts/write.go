package awssts

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/iam"

	"github.com/mayfly-security/mayfly/providers/awssts/denylist"
	"github.com/mayfly-security/mayfly/providers/internal/awsclient"
)

const (
	// landing is how long a write of IAM that was sent may still land: AWS
	// refuses a request whose signature is older than 15 minutes.
	landing = 16 * time.Minute
	// maxSteps bounds the calls of one writing.
	maxSteps = 200
)

// write brings the role's policies to where everything that must be denied is.
// The caller has the turn. With tidy it also compares with IAM, takes out what
// need not stand, and repairs what somebody changed. With again the list is
// written once more although nothing is missing: so that a probe can tell of it.
func (p *provider) write(ctx context.Context, w *writer, tidy, again bool) error {
	leases, unread := p.must(ctx, w)
	if unread != nil && (tidy || !w.seen) {
		return unread
	}
	cut, err := p.cutOf(ctx, w)
	if err != nil && unread == nil {
		return err
	}
	if !w.seen || tidy {
		if err := p.see(ctx, w, leases, cut); err != nil {
			return err
		}
	}
	now := p.now()
	all := slices.Collect(maps.Values(leases))
	must, _ := denylist.Required(all, cut, now)
	w.before(cut, all, now)
	w.needed.Add(must)
	w.needed.Add(w.list.Needed)
	if unread != nil { // what ends waits for no store: it is added to what stands
		p.log.Warn("a deny list is written without the store", "role", w.role.ARN, "error", unread)
		must.Add(w.list.May())
	}
	for e, until := range w.foreign {
		if now.Before(until) {
			must[e] = struct{}{}
		} else {
			delete(w.foreign, e)
			w.needed[e] = struct{}{} // it goes now, and is not kept anew if that takes long
		}
	}
	if w.probe != nil && (len(must) == 0 || !p.now().Before(w.probe.expires)) {
		w.probe = nil // it has nothing more to tell
	}
	if w.probe != nil {
		must[w.probe.entry()] = struct{}{}
	}
	for range maxSteps {
		w.list.Settle(p.now())
		fresh := fmt.Sprintf("%s%s-%d", w.prefix, p.writers.run, w.serial)
		step, err := w.list.Next(must, fresh, tidy, p.now())
		if err != nil {
			return fmt.Errorf("role %s: %w", w.role.Name, err)
		}
		if step.Policy == "" {
			if !again {
				p.tally(w, cut, all)
				return nil
			}
			again = false
			step = w.list.Again(must, w.unproven(must), fresh, denylist.Quota/4)
			if step.Policy == "" || !p.arm(ctx, w, &step, must) {
				return nil
			}
		} else if p.adds(w, step) && p.arm(ctx, w, &step, must) {
			again = false
		}
		if err := p.do(ctx, w, step); err != nil {
			return err
		}
	}
	return fmt.Errorf("role %s: the deny list does not come to rest", w.role.Name)
}

// adds reports whether a step writes something that did not stand there.
func (p *provider) adds(w *writer, step denylist.Step) bool {
	pol := w.list.Policies[step.Policy]
	return len(step.Set) > 0 && (pol == nil || len(step.Set.Minus(pol.Stands)) > 0)
}

// do makes one call to IAM and notes what came of it.
func (p *provider) do(ctx context.Context, w *writer, step denylist.Step) error {
	var err error
	what := "writing the deny list of role " + w.role.Name
	w.list.Settle(p.now())
	if len(step.Set) == 0 {
		_, err = p.clients.iam.DeleteRolePolicy(ctx, &iam.DeleteRolePolicyInput{RoleName: &w.role.Name, PolicyName: &step.Policy})
	} else {
		_, err = p.clients.iam.PutRolePolicy(ctx, &iam.PutRolePolicyInput{RoleName: &w.role.Name, PolicyName: &step.Policy, PolicyDocument: aws.String(denylist.Render(step.Set))})
	}
	err = awsclient.FaultOf(ctx, what, err)
	now := p.now()
	switch f := awsclient.AsFault(err); {
	case err == nil, len(step.Set) == 0 && f.Kind == awsclient.Missing:
		w.list.Wrote(step, now)
		w.wrote[step.Policy] = now
		switch {
		case w.probe == nil:
		case w.probe.covers == nil && step.Set.Has(w.probe.entry()):
			w.probe.covers, w.probe.wrote = maps.Clone(step.Set), now
		case !w.list.Sure().Has(w.probe.entry()):
			w.probe = nil // there was no room for it
		}
		return nil
	case f.Kind == awsclient.Full:
		w.seen = false // there is more than we knew
		w.probe = nil
		return fmt.Errorf("the quota of role %s is used up by what others wrote: %w", w.role.Name, err)
	case f.Refused():
		w.probe = nil
		return err
	}
	w.list.Lost(step, now.Add(landing))
	w.serial++ // what must stand goes into a policy that this write cannot reach
	w.probe = nil
	w.doubt()
	return err
}

// tally notes how much of the quota is not for leases that are known. What a
// cut-off denies that is in force everywhere takes no room of its own any more.
func (p *provider) tally(w *writer, cut denylist.Entry, leases []denylist.Known) {
	settled := cut.Kind == denylist.CutOff && w.list.Settled(p.now()).Has(cut)
	p.writers.mu.Lock()
	defer p.writers.mu.Unlock()
	w.others = w.list.Others + len(w.foreign)*sessionCost
	for _, pol := range w.list.Policies {
		w.others += pol.Opaque
	}
	for e := range w.list.Stands() {
		if e.Kind == denylist.CutOff {
			w.others += denylist.CutOffCost
		}
	}
	if settled {
		for _, k := range leases {
			if k.Begun && cut.Denies(k) {
				delete(w.places, k.Lease)
			}
		}
	}
}
