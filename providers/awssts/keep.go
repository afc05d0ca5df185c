package awssts

import (
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers/awssts/awsscope"
	"github.com/mayfly-security/mayfly/providers/awssts/denylist"
)

// keepForeign is how long an entry stays that the store knows nothing of:
// after a restore from a backup the store may have forgotten a session.
const keepForeign = awsscope.SessionMax + time.Minute

// keep remembers entries that stand in IAM although neither the store nor this
// process knows what for: a store that came back from a backup has forgotten
// leases, and knows others otherwise than they had become. Such entries stay
// until the longest session has ended.
func (p *provider) keep(w *writer, leases map[broker.LeaseID]denylist.Known, cut denylist.Entry) {
	now, may := p.now(), w.list.May()
	for e := range may {
		if _, has := w.foreign[e]; has || e.Kind == denylist.Probe || w.needed.Has(e) {
			continue
		}
		switch {
		case explained(e, leases), e.Kind == denylist.CutOff && e.Before <= cut.Before:
			w.needed[e] = struct{}{} // also when the leases have died and the store knows them no more
		case e.Before != 0: // it says which sessions it denies, and how long these can live
			w.foreign[e] = earliest(now, time.Unix(e.Before, 0).Add(planSkew)).Add(keepForeign)
		default:
			w.foreign[e] = now.Add(keepForeign)
		}
	}
	w.needed = w.needed.And(may)
}

// explained reports whether the store knows of an ending for which the entry
// was written. If it has not asked for it, it asks for another one that denies
// the same sessions, or needs none any more. That it knows a lease, an incident
// or an agent alone says nothing: it may know them as they were before they ended.
func explained(e denylist.Entry, leases map[broker.LeaseID]denylist.Known) bool {
	switch e.Kind {
	case denylist.Lease:
		return leases[broker.LeaseID(e.ID)].Begun
	case denylist.Incident:
		for _, k := range leases {
			if k.Begun && k.Closed && string(k.Incident) == e.ID {
				return true
			}
		}
	case denylist.Agent:
		for _, k := range leases {
			if k.Begun && k.Disabled && k.Agent == e.ID && time.Unix(e.Before, 0).Before(k.Issued.Add(time.Second)) {
				return true
			}
		}
	}
	return false
}
