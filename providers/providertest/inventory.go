package providertest

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
)

// The requests that an inventory makes of a System.
const (
	OpList   Op = "list"   // list what there is of an installation's
	OpRemove Op = "remove" // end and remove what was listed
)

// Inventoried is a Driver whose providers list what there is in their System
// (providers.Inventory). The System must be within the process.
//
// What is there is a credential that no ending has ended. One that died by
// itself stays, as a role that cannot log in does, until it is removed.
type Inventoried struct{ Driver }

var _ providers.Driver = Inventoried{}

// Open implements providers.Driver.
func (d Inventoried) Open(ctx context.Context, config providers.Config) (providers.Provider, error) {
	if d.System == nil {
		return nil, fmt.Errorf("opening provider %s: an inventory needs a system within the process", config.Name)
	}
	p, err := d.Driver.Open(ctx, config)
	if err != nil {
		return nil, err
	}
	list := lister{system: d.System, prefix: string(config.Installation) + "-", recorded: true}
	if p, ok := p.(planner); ok {
		list.recorded = false
		return struct {
			planner
			lister
		}{p, list}, nil
	}
	return struct {
		providers.Provider
		lister
	}{p, list}, nil
}

// lister is the inventory of one installation.
type lister struct {
	system   *System
	prefix   string // of every name that is the installation's
	recorded bool   // of what was made under a session, or of the rest
}

var _ providers.Inventory = lister{}

// List implements providers.Inventory.
func (l lister) List(ctx context.Context) ([]providers.Found, error) {
	s := l.system
	found, err := request(ctx, &s.faults, OpList, nil, func() ([]providers.Found, error) {
		s.mu.Lock()
		defer s.mu.Unlock()
		now := s.now()
		var found []providers.Found
		for _, c := range s.credentials {
			if strings.HasPrefix(c.Name, l.prefix) && (c.Accessor != "") == l.recorded && (c.EndedAt.IsZero() || now.Before(c.EndedAt)) {
				found = append(found, providers.Found{Name: c.Name, Kind: "credential", Lease: c.Lease(), DiesAt: c.DiesAt})
			}
		}
		return found, nil
	})
	return found, away(err)
}

// Remove implements providers.Inventory.
func (l lister) Remove(ctx context.Context, found []providers.Found) []error {
	errs := make([]error, len(found))
	var names []string
	for i, f := range found {
		if !strings.HasPrefix(f.Name, l.prefix) {
			errs[i] = fmt.Errorf("%q is another installation's", f.Name)
			continue
		}
		names = append(names, f.Name)
	}
	s := l.system
	_, err := request(ctx, &s.faults, OpRemove, names, func() (struct{}, error) {
		s.mu.Lock()
		defer s.mu.Unlock()
		now := s.now()
		for _, c := range s.credentials {
			if slices.Contains(names, c.Name) && (c.EndedAt.IsZero() || now.Before(c.EndedAt)) {
				c.EndedAt = now
				s.log(OpRemove, c.Name)
			}
		}
		return struct{}{}, nil
	})
	for i := range errs {
		if errs[i] == nil {
			errs[i] = away(err)
		}
	}
	return errs
}

func away(err error) error {
	if err != nil {
		err = fmt.Errorf("%w: %w", providers.ErrAway, err)
	}
	return err
}

// Plant makes a credential that nobody asked for through a provider: what a
// system lost track of, or what a broker that was restored does not know.
func (s *System) Plant(c Credential) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c.Secret == "" {
		c.Secret = s.unique("secret", c.Name)
	}
	if c.CreatedAt.IsZero() {
		c.CreatedAt = s.now()
	}
	s.credentials = append(s.credentials, &c)
	s.bySecret[c.Secret] = &c
	handle := c.Name
	if c.Accessor != "" {
		handle = c.Accessor
	}
	s.byHandle[handle] = append(s.byHandle[handle], &c)
}

// There reports whether there is a credential of that name that no ending has
// ended, whether it works or not.
func (s *System) There(name string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.now()
	return slices.ContainsFunc(s.credentials, func(c *Credential) bool {
		return c.Name == name && (c.EndedAt.IsZero() || now.Before(c.EndedAt))
	})
}

// NameOf is the external name of a lease's credential.
func NameOf(installation broker.InstallationID, lease broker.LeaseID) string {
	return string(installation) + "-" + string(lease)
}
