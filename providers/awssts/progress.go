package awssts

import (
	"errors"
	"fmt"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/awssts/awsscope"
	"github.com/mayfly-security/mayfly/providers/awssts/denylist"
)

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

// judge is how far the ending of one lease has come.
func (p *provider) judge(w *writer, k denylist.Known, sure denylist.Set, failed error) providers.Death {
	if !covers(sure, k) {
		if failed == nil {
			failed = errors.New("the deny list was not written")
		}
		return providers.Death{Err: failed}
	}
	if e, ok := denying(w.proven, k); ok {
		return providers.Death{Progress: broker.ProgressVerified, Left: fmt.Sprintf(
			"the session is denied by its role's policy, as STS in %s was seen to do at %s; a service that has not taken the policy over yet may accept it until %s",
			p.config.Region, awsscope.Instant(w.proven[e]), awsscope.Instant(k.Until))}
	}
	return p.written(w, k.Until)
}

// written is what stands in the list and was not seen to be in force yet. It is
// looked at again at until, or sooner where a probe may tell.
func (p *provider) written(w *writer, until time.Time) providers.Death {
	d := providers.Death{Progress: broker.ProgressWritten, RetryAt: until}
	switch {
	case w.probe != nil && w.probe.covers != nil: // what it does not tell of, the next one does
		d.RetryAt = earliest(d.RetryAt, w.probe.next)
	case p.config.Early.Verify == awsscope.VerifyProbe:
		d.RetryAt = earliest(d.RetryAt, latest(p.now().Add(probeSlow), w.rests))
	}
	return d
}

// doubt forgets what was proven of entries that may not stand any more: when
// they are written again, that proves nothing.
func (w *writer) doubt() {
	sure := w.list.Sure()
	for e := range w.proven {
		if !sure.Has(e) {
			delete(w.proven, e)
		}
	}
}

// unproven are those that must stand and were not seen to be in force.
func (w *writer) unproven(must denylist.Set) denylist.Set {
	all := denylist.Set{}
	for e := range must {
		if _, ok := w.proven[e]; !ok {
			all[e] = struct{}{}
		}
	}
	return all
}
