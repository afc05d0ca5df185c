package vault

import (
	"context"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/failpoint"
	"github.com/mayfly-security/mayfly/providers/vault/vaultscope"
)

// looksFor reports whether the broker has a login with which it finds and drops
// the roles of a lease by itself.
func (p *provider) looksFor(e *ending) bool {
	return e.h.Class == classDatabase && p.directs[e.h.Mount] != nil
}

// byMount are the endings that which chooses, of mounts with a login.
func (p *provider) byMount(endings []*ending, which func(*ending) bool) map[string][]*ending {
	chosen := make(map[string][]*ending)
	for _, e := range endings {
		if !e.resolved && p.looksFor(e) && which(e) {
			chosen[e.h.Mount] = append(chosen[e.h.Mount], e)
		}
	}
	return chosen
}

// drop drops the roles of leases, all of a mount's in one statement.
func (p *provider) drop(ctx context.Context, endings []*ending, which func(*ending) bool) {
	ctx, cancel := context.WithTimeout(ctx, directLimit)
	defer cancel()
	for mount, chosen := range p.byMount(endings, which) {
		d := p.directs[mount]
		names, unlisted := p.namesOf(ctx, d, chosen)
		var all []string
		for _, of := range names {
			all = append(all, of...)
		}
		gone, err := d.drop(ctx, all)
		failpoint.At("vault.drop.after")
		for _, e := range chosen {
			_, known := names[e]
			e.absent, e.direct = known, nil
			for _, name := range names[e] {
				e.absent = e.absent && gone[name]
			}
			switch {
			case !known:
				e.direct = unlisted
			case !e.absent:
				e.direct = err
			}
		}
	}
}

// namesOf are the names of each lease's roles: the one that Vault told, or
// those that bear the lease's name. With an error it has no entry for leases
// whose roles are not all known.
func (p *provider) namesOf(ctx context.Context, d *direct, chosen []*ending) (map[*ending][]string, error) {
	names := make(map[*ending][]string, len(chosen))
	var unknown []*ending
	for _, e := range chosen {
		if e.h.User != "" {
			names[e] = []string{e.h.User}
		} else {
			unknown = append(unknown, e)
		}
	}
	if len(unknown) == 0 {
		return names, nil
	}
	byLease, err := p.rolesByLease(ctx, d)
	if err != nil {
		return names, err
	}
	for _, e := range unknown {
		names[e] = byLease[e.Lease]
	}
	return names, nil
}

func (p *provider) rolesByLease(ctx context.Context, d *direct) (map[broker.LeaseID][]string, error) {
	roles, err := d.roles(ctx)
	if err != nil {
		return nil, err
	}
	byLease := make(map[broker.LeaseID][]string)
	for _, r := range roles {
		if lease, ours := vaultscope.LeaseOfRole(p.installation, r.name); ours {
			byLease[lease] = append(byLease[lease], r.name)
		}
	}
	return byLease, nil
}

// look finds out which leases have no role any more, and drops none.
func (p *provider) look(ctx context.Context, endings []*ending) {
	for mount, chosen := range p.byMount(endings, func(e *ending) bool { return e.settled }) {
		byLease, err := p.rolesByLease(ctx, p.directs[mount])
		for _, e := range chosen {
			e.absent, e.direct = err == nil && len(byLease[e.Lease]) == 0, err
		}
	}
}
