package awssts

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/iam"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/awssts/awsscope"
	"github.com/mayfly-security/mayfly/providers/awssts/denylist"
	"github.com/mayfly-security/mayfly/providers/internal/awsaccess"
	"github.com/mayfly-security/mayfly/providers/internal/awsclient"
)

const (
	// denyPrefix begins the names of deny lists.
	denyPrefix = "mayfly-deny-"
	// landing is how long a write of IAM that was sent may still land: AWS
	// refuses a request whose signature is older than 15 minutes.
	landing = 16 * time.Minute
	// visible is how long IAM may show what was there before our own write.
	visible = time.Minute
	// keepForeign is how long an entry stays that the store knows nothing of:
	// after a restore from a backup the store may have forgotten a session.
	keepForeign = awsscope.SessionMax + time.Minute
	// maxSteps bounds the calls of one writing.
	maxSteps = 200
	// reconcileEvery is how often what is in IAM is compared with what must be.
	reconcileEvery = time.Minute
)

// writers are the deny lists of all roles that this broker writes.
type writers struct {
	mu  sync.Mutex
	all map[string]*writer   // by provider and role
	of  map[string][]*writer // by role: more than one where providers share it
	run string               // names this process in the names of policies
}

func newWriters() *writers {
	var b [4]byte
	_, _ = rand.Read(b[:]) // never fails
	return &writers{all: map[string]*writer{}, of: map[string][]*writer{}, run: hex.EncodeToString(b[:])}
}

// writer writes the deny list of one role. There is one in the process.
type writer struct {
	role   awsaccess.Role
	prefix string // of the names of our policies of the role
	turn   chan struct{}

	// Under writers.mu.
	places map[broker.LeaseID]place // leases that may have to be denied
	others int                      // characters that are not for them
	met    bool                     // it was tried to look at the role's policies
	begun  map[broker.LeaseID]denylist.Known
	cut    providers.Cut // the latest that is known; zero if there is none

	// Of whoever has the turn.
	list    denylist.List
	seen    bool
	serial  int
	needed  denylist.Set                 // entries that the store has asked for since we began: they may go when it does not any more
	foreign map[denylist.Entry]time.Time // entries that the store does not know of, kept until then
	wrote   map[string]time.Time         // when we wrote or removed a policy
	proven  map[denylist.Entry]time.Time // when entries that stand were seen to be in force
	probe   *probe
	rests   time.Time // no probe is tried before: the last one could not be made
}

// writerLocked is the writer of a role. The caller holds writers.mu.
func (p *provider) writerLocked(arn string) *writer {
	key := p.name + "|" + arn
	w := p.writers.all[key]
	if w == nil {
		role, err := awsaccess.ParseRole(arn)
		if err != nil {
			role = awsaccess.Role{ARN: arn, Name: arn[strings.LastIndexByte(arn, '/')+1:]}
		}
		sum := sha256.Sum256([]byte(p.name))
		w = &writer{
			role: role, prefix: fmt.Sprintf(denyPrefix+"%s-%s-", p.installation, hex.EncodeToString(sum[:4])), turn: make(chan struct{}, 1),
			places: map[broker.LeaseID]place{}, begun: map[broker.LeaseID]denylist.Known{},
			list:   denylist.List{Policies: map[string]*denylist.Policy{}},
			needed: denylist.Set{}, foreign: map[denylist.Entry]time.Time{},
			wrote: map[string]time.Time{}, proven: map[denylist.Entry]time.Time{},
		}
		p.writers.all[key] = w
		p.writers.of[arn] = append(p.writers.of[arn], w)
	}
	return w
}

func (p *provider) writer(arn string) *writer {
	p.writers.mu.Lock()
	defer p.writers.mu.Unlock()
	return p.writerLocked(arn)
}

// take waits for the turn.
func (w *writer) take(ctx context.Context) error {
	select {
	case w.turn <- struct{}{}:
		return nil
	default:
	}
	select {
	case w.turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("waiting to write the deny list of %s: %w", w.role.Name, ctx.Err())
	}
}

func (w *writer) leave() { <-w.turn }

// begin notes leases that must be denied from now on, whatever the store says.
func (p *provider) begin(w *writer, asked []denylist.Known) {
	p.writers.mu.Lock()
	defer p.writers.mu.Unlock()
	now := p.now()
	for lease, k := range w.begun {
		if !now.Before(k.Until) {
			delete(w.begun, lease)
		}
	}
	for _, k := range asked {
		k.Begun = true
		w.begun[k.Lease] = k
	}
}

// must are the leases of the role whose ending has begun, as the store has them,
// with what was asked for that the store may not show yet. With an error they
// are only the latter.
func (p *provider) must(ctx context.Context, w *writer) (map[broker.LeaseID]denylist.Known, error) {
	stored, failed := p.known(ctx, true)
	if failed != nil {
		failed = fmt.Errorf("reading what must be denied: %w", failed)
	}
	all := map[broker.LeaseID]denylist.Known{}
	for _, k := range stored {
		if !bytes.Contains(k.Handle, []byte(w.role.ARN)) {
			continue // most are another role's: reading them takes its time
		}
		h, err := decodeHandle(k.Handle)
		if err != nil || h.Role != w.role.ARN {
			continue
		}
		d := h.known()
		d.Begun = k.Begun
		switch k.Cause {
		case broker.CauseIncidentClosed, broker.CauseIncidentExpired:
			d.Closed = true
		case broker.CauseAgentDisabled:
			d.Disabled = true
		}
		all[d.Lease] = d
	}
	p.writers.mu.Lock()
	defer p.writers.mu.Unlock()
	for lease, k := range w.begun {
		known, ok := all[lease]
		if !ok {
			known = k
		}
		known.Begun = true
		all[lease] = known
	}
	return all, failed
}

// covers reports whether one of the entries denies a lease's session.
func covers[V any, S ~map[denylist.Entry]V](s S, k denylist.Known) bool {
	_, ok := denying(s, k)
	return ok
}

// denying is one of the entries that deny a lease's session.
func denying[V any, S ~map[denylist.Entry]V](s S, k denylist.Known) (denylist.Entry, bool) {
	for _, e := range []denylist.Entry{{Kind: denylist.Lease, ID: string(k.Lease)}, {Kind: denylist.Incident, ID: string(k.Incident)}} {
		if _, ok := s[e]; ok && e.ID != "" {
			return e, true
		}
	}
	for e := range s {
		if e.Denies(k) {
			return e, true
		}
	}
	return denylist.Entry{}, false
}

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

// see reads what is in IAM.
func (p *provider) see(ctx context.Context, w *writer, leases map[broker.LeaseID]denylist.Known, cut denylist.Entry) error {
	what := "reading the policies of role " + w.role.Name
	names := map[string]bool{}
	var marker *string
	for {
		out, err := p.clients.iam.ListRolePolicies(ctx, &iam.ListRolePoliciesInput{RoleName: &w.role.Name, Marker: marker})
		if err != nil {
			return awsclient.FaultOf(ctx, what, err)
		}
		for _, name := range out.PolicyNames {
			names[name] = true
		}
		if !out.IsTruncated || out.Marker == nil {
			break
		}
		marker = out.Marker
	}
	for name := range w.list.Policies {
		if _, listed := names[name]; !listed {
			names[name] = false
		}
	}
	now, others := p.now(), 0
	maps.DeleteFunc(w.wrote, func(_ string, at time.Time) bool { return now.Sub(at) >= visible })
	for _, name := range slices.Sorted(maps.Keys(names)) {
		text, there := "", names[name]
		if there {
			out, err := p.clients.iam.GetRolePolicy(ctx, &iam.GetRolePolicyInput{RoleName: &w.role.Name, PolicyName: &name})
			err = awsclient.FaultOf(ctx, what, err)
			switch {
			case awsclient.KindOf(err) == awsclient.Missing:
				there = false
			case err != nil:
				return err
			default:
				if text, err = url.PathUnescape(aws.ToString(out.PolicyDocument)); err != nil {
					text = aws.ToString(out.PolicyDocument)
				}
			}
		}
		if !strings.HasPrefix(name, w.prefix) {
			if there {
				others += len(strings.Join(strings.Fields(text), ""))
			}
			continue
		}
		// What we wrote a moment ago may not be seen yet.
		pol := w.list.Policies[name]
		if _, ok := w.wrote[name]; ok {
			set, err := denylist.Parse(text)
			if pol == nil && there || pol != nil && (!there || err != nil || !set.Equal(pol.Stands)) {
				continue
			}
		}
		was := denylist.Set{}
		if pol != nil {
			was = pol.Stands
		}
		if err := w.list.Saw(name, text, there, now, now.Add(landing)); err != nil {
			p.log.Error("a policy of the deny list was changed by somebody else: what must stand is written again", "role", w.role.ARN, "policy", name, "error", err)
		}
		if now := w.list.Policies[name]; now != nil && now.Own && pol != nil && !now.Stands.Equal(was) {
			w.probe = nil // what it was written with may stand no more
			p.log.Error("the deny list in IAM is not what was written: it is written again", "role", w.role.ARN, "policy", name,
				"missing", len(was.Minus(now.Stands)), "more", len(now.Stands.Minus(was)))
		}
	}
	w.list.Others, w.seen = others, true
	w.doubt()
	p.keep(w, leases, cut)
	return nil
}

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

// writeIn compares one list with what is in IAM. Endings wait for the turn, so
// it takes no longer than they would.
func (p *provider) writeIn(ctx context.Context, w *writer, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	return p.write(ctx, w, true, false)
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
