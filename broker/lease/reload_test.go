package lease_test

import (
	"context"
	"testing"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
)

// slowDriver takes its time to open a provider.
type slowDriver struct {
	providers.Driver
	takes *time.Duration
}

func (d slowDriver) Open(ctx context.Context, config providers.Config) (providers.Provider, error) {
	time.Sleep(*d.takes)
	return d.Driver.Open(ctx, config)
}

// TestReloadHoldsUpNoEnding: while a reload waits for a provider to open,
// incidents close, leases end and others are given, as if there were no reload.
func TestReloadHoldsUpNoEnding(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var takes time.Duration
		r := newRig(t)
		r.stop()
		r.drivers["world"] = slowDriver{r.drivers["world"], &takes}
		r.start()
		in := r.open(time.Hour, "db.read", "crm.read")
		d := r.mustIssue("db.read")

		takes = 30 * time.Second
		loaded := make(chan error, 1)
		began := time.Now()
		go func() {
			loaded <- r.reload("{mode: recorded, mint_timeout: 10s", "{mode: recorded, mint_timeout: 11s")
		}()
		time.Sleep(time.Second)
		r.mustIssue("crm.read")
		if _, ended, err := r.engine.CloseIncident(context.Background(), as(pager), in.ID, ""); err != nil || ended.Dead != 2 {
			t.Fatalf("closing during a reload: %+v, %v", ended, err)
		}
		if took := time.Since(began); took > 5*time.Second {
			t.Errorf("the close waited for the reload: %s", took)
		}
		if l := r.lease(d.Lease.ID); l.State != broker.LeaseRevoked {
			t.Errorf("the lease is %s", l.State)
		}
		if err := <-loaded; err != nil {
			t.Error(err)
		}
		if took := time.Since(began); took < 30*time.Second {
			t.Errorf("the reload took %s: nothing was held up", took)
		}
	})
}
