package lease

import (
	"context"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/store"
)

// UsersOf tells on whose behalf leases were given, by their grants. Grants that
// are for nobody are not in it.
func (e *Engine) UsersOf(ctx context.Context, leases ...broker.Lease) (map[broker.GrantID]broker.Principal, error) {
	users := map[broker.GrantID]broker.Principal{}
	err := e.view(ctx, func(r store.Reader) error {
		clear(users)
		for _, l := range leases {
			g, ok, err := get[broker.Grant](r, keyGrant(l.Grant))
			if err != nil {
				return err
			}
			if ok && g.OnBehalfOf != nil {
				users[l.Grant] = g.OnBehalfOf.Principal()
			}
		}
		return nil
	})
	return users, err
}
