//go:build !failpoints

package lease

import (
	"context"
	"time"
)

// mutant does nothing: it is there for the torture test alone, see
// failpoint_on.go.
func (m *minter) mutant(context.Context, time.Time, time.Time) (d *Delivery, is bool, err error) {
	return nil, false, nil
}
