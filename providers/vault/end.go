package vault

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/failpoint"
	"github.com/mayfly-security/mayfly/providers"
)

const (
	// revokeLimit bounds the calls of one batch to Vault: a database that
	// hangs must not keep the answers for the others. Vault itself has no
	// limit for a revocation.
	revokeLimit = 10 * time.Second
	probeLimit  = 2 * time.Second
	// slice is how long one batch whose roles were dropped already may go on
	// with new calls to Vault. What is left then comes again: the access of
	// those that are due next is more urgent than Vault's books.
	slice = time.Second
)

// revokeLease ends a lease in Vault, and returns nil only when what it stands
// for is gone, or when Vault knows no such lease.
func (p *provider) revokeLease(ctx context.Context, id string) error {
	_, err := p.session.with(ctx, func(token string) (*api.Secret, error) {
		return p.client.again(ctx, request{
			what: "revoking lease " + id, path: "sys/leases/revoke/" + id, token: token, body: map[string]bool{"sync": true},
		})
	})
	return err
}

// revokeAccessor ends the token of a lease. One that is gone is no error.
func (p *provider) revokeAccessor(ctx context.Context, accessor string) error {
	_, err := p.session.with(ctx, func(token string) (*api.Secret, error) {
		return p.client.again(ctx, request{
			what: "revoking the token of a lease", path: p.config.RevokeAccessorPath(), token: token, body: map[string]string{"accessor": accessor},
		})
	})
	f := asFault(err)
	if f != nil && (f.status == http.StatusBadRequest || f.status == http.StatusForbidden || f.status == http.StatusNotFound) &&
		(f.says("invalid accessor") || f.says("token not found") || f.says("no token found")) {
		return nil
	}
	return err
}

// checkLeaseID takes a lease ID into a path only if it lies where the broker's
// policy lets it be revoked.
func (p *provider) checkLeaseID(id, path string) error {
	rest, ok := strings.CutPrefix(id, path+"/")
	if !ok || rest == "" || len(id) > 1024 || strings.ContainsFunc(rest, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && r != '.' && r != '-' && r != '_'
	}) || strings.Contains(rest, "..") {
		return fmt.Errorf("the lease in Vault has the ID %q, which does not lie below %s: the broker could not revoke it", broker.Clean(broker.Shorten(id, 200)), path)
	}
	return nil
}

// ending is one lease that is being ended.
type ending struct {
	providers.Ending
	h        handle
	settled  bool // nothing of the attempt is under way any more
	resolved bool // death is the answer
	death    providers.Death

	absent bool  // its roles were looked for at the database, and are gone
	direct error // why that is not known
}

// fails says that the lease could not be ended. Where its role is gone already,
// that much is certain.
func (e *ending) fails(err error) {
	d := providers.Death{Err: err}
	if e.absent && e.h.User != "" {
		d.Progress = broker.ProgressWritten
	}
	e.is(d)
}

func (e *ending) is(d providers.Death) { e.death, e.resolved = d, true }

// endings reads the handles, and answers for those leases that need nothing.
func (p *provider) endings(all []providers.Ending) []*ending {
	now := p.now()
	endings := make([]*ending, len(all))
	for i, each := range all {
		e := &ending{Ending: each, settled: !each.Settles.After(now)}
		endings[i] = e
		if each.Handle == nil {
			// No accessor was recorded, so nobody reads with the token, if there
			// is one: but an attempt that still runs may record one.
			if e.settled {
				e.is(providers.Death{Progress: broker.ProgressVerified})
			} else {
				e.is(providers.Death{RetryAt: each.Settles})
			}
			continue
		}
		h, err := decodeHandle(each.Handle)
		if err != nil {
			e.is(providers.Death{Err: fmt.Errorf("reading the handle of lease %s: %w", each.Lease, err)})
			continue
		}
		e.h = h
		if h.Read {
			e.settled = true // Vault has answered: nothing is under way
			if !h.revocableNow(now) {
				e.is(providers.Death{Progress: broker.ProgressVerified})
			}
		}
	}
	return endings
}

// revocableNow is false once a credential that dies by itself, and leaves
// nothing, has done so.
func (h handle) revocableNow(now time.Time) bool {
	return h.Class != classCertificate && h.Class != classFixed || now.Before(h.DiesAt)
}

func deaths(endings []*ending) []providers.Death {
	all := make([]providers.Death, len(endings))
	for i, e := range endings {
		all[i] = e.death
	}
	return all
}

// Revoke implements providers.Provider. Where the broker has a login at the
// database, access ends there first, for the whole batch at once, also while
// Vault is away. Then Vault ends each lease and says when that is done, and
// then the lease's token. Never the token first: Vault could forget the lease.
func (p *provider) Revoke(ctx context.Context, all []providers.Ending) []providers.Death {
	endings := p.endings(all)
	p.apart(endings, func(some []*ending) { p.revoke(ctx, some) })
	return deaths(endings)
}

// apart does something for the leases of each mount that has a login, and for
// all the others, at the same time: a database that hangs costs those of the
// others nothing.
func (p *provider) apart(endings []*ending, do func([]*ending)) {
	groups := make(map[string][]*ending)
	for _, e := range endings {
		mount := ""
		if p.looksFor(e) {
			mount = e.h.Mount
		}
		groups[mount] = append(groups[mount], e)
	}
	var wg sync.WaitGroup
	for _, some := range groups {
		wg.Go(func() { do(some) })
	}
	wg.Wait()
}

// revoke ends leases of one mount, or of mounts without a login.
func (p *provider) revoke(ctx context.Context, endings []*ending) {
	// Leases of which Vault has not told us the role: while the attempt is
	// under way, what is there is dropped and Vault is left alone. Revoking
	// the token of a read in flight would strand what it makes.
	p.drop(ctx, endings, func(e *ending) bool { return e.h.User != "" || !e.settled })
	for _, e := range endings {
		if !e.resolved && !e.settled {
			err := e.direct
			if err == nil && !e.absent && p.looksFor(e) {
				// Somebody holds a lock on it: it is being made, or Vault drops it at
				// the same moment. It is not left there until the attempt has settled.
				err = fmt.Errorf("a role of lease %s is still there", e.Lease)
			}
			e.is(providers.Death{RetryAt: e.Settles, Err: err})
		}
	}
	p.atVault(ctx, endings, p.endAtVault)
	// The attempt has settled, and with the token gone nothing can come any
	// more: what is there now is all.
	p.drop(ctx, endings, func(e *ending) bool { return e.h.User == "" })
	for _, e := range endings {
		if !e.resolved {
			e.is(p.conclude(e))
		}
	}
}

// Confirm implements providers.Provider. It ends nothing that works: a role
// that is gone already it has Vault forget, too.
func (p *provider) Confirm(ctx context.Context, all []providers.Ending) []providers.Death {
	endings := p.endings(all)
	p.apart(endings, func(some []*ending) { p.confirm(ctx, some) })
	return deaths(endings)
}

// confirm confirms leases of one mount, or of mounts without a login.
func (p *provider) confirm(ctx context.Context, endings []*ending) {
	p.look(ctx, endings)
	now := p.now()
	for _, e := range endings {
		switch {
		case e.resolved:
		case !e.settled:
			e.is(providers.Death{RetryAt: e.Settles})
		case e.direct != nil:
			e.is(providers.Death{Err: e.direct})
		case e.h.Read && e.absent: // and below Vault is told
		case e.h.Class == classCertificate || e.h.Class == classFixed:
			e.is(p.conclude(e)) // Vault was told, or there is nothing to tell it
		case !e.h.Read && !e.gone().IsZero() && !now.Before(e.gone()) && p.directs[e.h.Mount] == nil:
			e.is(p.conclude(e))
		default:
			e.is(providers.Death{RetryAt: e.next(now)})
		}
	}
	p.atVault(ctx, endings, p.endAtVault)
	for _, e := range endings {
		if !e.resolved {
			e.is(p.conclude(e))
		}
	}
}

// next is when something may have changed by itself; zero if that is not known.
func (e *ending) next(now time.Time) time.Time {
	at := e.h.DiesAt
	if !e.h.Read {
		at = e.gone()
	}
	if !at.After(now) {
		return time.Time{}
	}
	return at
}

// gone is when whatever an attempt of unknown outcome has made is dead.
func (e *ending) gone() time.Time {
	if !e.h.Class.diesByItself() {
		return time.Time{}
	}
	if !e.Settles.IsZero() && e.h.TTL > 0 {
		return e.Settles.Add(e.h.TTL + buffer + clockSkew)
	}
	return e.h.Gone
}

// conclude is the answer for a lease whose ending brought no error.
func (p *provider) conclude(e *ending) providers.Death {
	now := p.now()
	verified := providers.Death{Progress: broker.ProgressVerified}
	switch {
	case e.direct != nil:
		return providers.Death{Err: e.direct}
	case e.h.Class == classStatic:
		return providers.Death{Progress: broker.ProgressRequested, Lapsed: true}
	case e.h.Read && e.h.Class == classCertificate:
		// Whoever asks for revocation lists is told; others go by the time.
		progress := broker.ProgressRequested
		if e.h.LeaseID != "" {
			progress = broker.ProgressWritten
		}
		return providers.Death{Progress: progress, RetryAt: e.h.DiesAt}
	case e.h.Read && e.h.Class == classFixed:
		return providers.Death{Progress: broker.ProgressRequested, RetryAt: e.h.DiesAt}
	case p.looksFor(e):
		if e.absent {
			return verified
		}
		return providers.Death{Err: fmt.Errorf("role %s of lease %s is still there, or is none of this installation's", e.h.User, e.Lease)}
	case e.h.Read:
		return verified // Vault ended the lease while we waited
	}
	// Nobody was told what was made, if anything. Its token is gone.
	gone := e.gone()
	switch {
	case gone.IsZero():
		// Vault ends what it knows of; there is nobody to ask about the rest.
		return providers.Death{Progress: broker.ProgressRequested, Lapsed: true}
	case now.Before(gone):
		return providers.Death{Progress: broker.ProgressRequested, RetryAt: gone}
	case e.h.Class == classDatabase:
		verified.Left = "perhaps a database role that cannot log in: Vault did not tell whether it made one"
	}
	return verified
}

// endAtVault ends the lease, if there is one, and then the token.
func (p *provider) endAtVault(ctx context.Context, e *ending) error {
	if e.h.LeaseID != "" && e.h.Class.revocable() {
		err := p.revokeLease(ctx, e.h.LeaseID)
		if kindOf(err) == denied && e.h.Class == classCertificate {
			err, e.h.LeaseID = nil, "" // it goes with its token, some time
		}
		if err != nil {
			return err
		}
	}
	failpoint.At("vault.lease.after")
	return p.revokeAccessor(ctx, e.h.Accessor)
}

// atVault makes calls for all leases that are not resolved, as many at a time
// as the configuration says, over all batches. Once one says that Vault is
// away, no more is asked.
func (p *provider) atVault(ctx context.Context, endings []*ending, call func(context.Context, *ending) error) {
	ctx, cancel := context.WithTimeout(ctx, revokeLimit)
	defer cancel()
	var wg sync.WaitGroup
	var mu sync.Mutex
	var over error // why no more is asked
	stop := func(err error) {
		mu.Lock()
		defer mu.Unlock()
		if over == nil {
			over = err
		}
	}
	stopped := func() error {
		mu.Lock()
		defer mu.Unlock()
		return over
	}
	begun := time.Now()
	endings = slices.Clone(endings)
	slices.SortStableFunc(endings, func(a, b *ending) int { return cmp.Compare(a.troubled(), b.troubled()) })
	for _, e := range endings {
		if e.resolved {
			continue
		}
		if e.absent && e.h.User != "" && time.Since(begun) > slice {
			e.is(providers.Death{Progress: broker.ProgressWritten, RetryAt: p.now().Add(slice / 4)})
			continue
		}
		troubled := e.troubled() > 0
		if !p.slot(ctx, troubled) {
			switch err := stopped(); {
			case err != nil:
				e.fails(err)
			case troubled:
				e.fails(e.direct)
			default: // the others took all the time that there is: it is no failure of this one
				e.is(providers.Death{RetryAt: p.now().Add(slice / 4)})
			}
			continue
		}
		if err := stopped(); err != nil {
			p.leave(troubled)
			e.fails(err)
			continue
		}
		wg.Go(func() {
			defer p.leave(troubled)
			if err := call(ctx, e); err != nil {
				if errors.Is(err, providers.ErrAway) {
					stop(err)
				}
				e.fails(err)
			}
		})
	}
	wg.Wait()
	p.hung(ctx, endings)
}

// troubled is 1 for a lease whose database did not do what we asked of it.
func (e *ending) troubled() int {
	if e.direct != nil {
		return 1
	}
	return 0
}

// slot waits until one more call that ends a lease may be made. Those whose
// database did not answer us will hardly get an answer from Vault: they take no
// more than half of what there is.
func (p *provider) slot(ctx context.Context, troubled bool) bool {
	if troubled {
		select {
		case p.troubled <- struct{}{}:
		case <-ctx.Done():
			return false
		}
	}
	select {
	case p.slots <- struct{}{}:
		return true
	case <-ctx.Done():
		if troubled {
			<-p.troubled
		}
		return false
	}
}

// leave gives a slot back.
func (p *provider) leave(troubled bool) {
	<-p.slots
	if troubled {
		<-p.troubled
	}
}

// hung finds out, where calls took too long, whether Vault answers at all: a
// database that hangs is one lease's matter, and a Vault that does is everyone's.
func (p *provider) hung(ctx context.Context, endings []*ending) {
	anyLate := false
	for _, e := range endings {
		anyLate = anyLate || kindOf(e.death.Err) == late
	}
	if !anyLate {
		return
	}
	err := p.probe(ctx)
	if err == nil {
		return
	}
	for _, e := range endings {
		if kindOf(e.death.Err) == late {
			e.death.Err = fmt.Errorf("%w: %w: %w", providers.ErrAway, e.death.Err, err)
		}
	}
}

// probe returns an error if Vault answers nothing at all. What it answers does
// not matter.
func (p *provider) probe(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), probeLimit)
	defer cancel()
	_, err := do(ctx, p.client.fresh, request{what: "asking Vault whether it is there", path: "sys/health"})
	switch kindOf(err) {
	case late, away, cut:
		return err
	}
	return nil
}
