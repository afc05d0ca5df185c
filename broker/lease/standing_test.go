package lease_test

import (
	"context"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
)

// standing is a driver whose providers have what ends a lease stand outside
// until it dies by itself, and what the engine gave them to ask.
type standing struct {
	providers.Driver
	known *func(context.Context, bool) ([]providers.Known, error)
}

func (d standing) Open(ctx context.Context, config providers.Config) (providers.Provider, error) {
	*d.known = config.Known
	p, err := d.Driver.Open(ctx, config)
	return stands{p, p.(providers.Planner)}, err
}

type stands struct {
	providers.Provider
	providers.Planner
}

func (s stands) Traits() providers.Traits {
	t := s.Provider.Traits()
	t.Stands = true
	return t
}

// TestKnown: a provider is told of every lease that has not ended and, until it
// is dead by itself, of every lease whose death was confirmed: also after a
// restart, and with why it ended.
func TestKnown(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t)
		var known func(context.Context, bool) ([]providers.Known, error)
		r.stop()
		r.drivers["asked"] = standing{r.drivers["asked"], &known}
		r.start()
		in := r.open(30*time.Minute, "cloud.read")
		a, b := r.mustIssue("cloud.read", ttl(10*time.Minute)), r.mustIssue("cloud.read", ttl(10*time.Minute))
		told := func() map[broker.LeaseID]providers.Known {
			t.Helper()
			all, err := known(t.Context(), false)
			if err != nil {
				t.Fatal(err)
			}
			begun, err := known(t.Context(), true)
			if err != nil {
				t.Fatal(err)
			}
			want := slices.DeleteFunc(slices.Clone(all), func(k providers.Known) bool { return !k.Begun })
			if diff := cmp.Diff(want, begun, cmpopts.EquateEmpty()); diff != "" {
				t.Errorf("those whose ending has begun (-of all +alone):\n%s", diff)
			}
			m := map[broker.LeaseID]providers.Known{}
			for _, k := range all {
				if len(k.Handle) == 0 {
					t.Errorf("%s has no handle", k.Lease)
				}
				m[k.Lease] = k
			}
			return m
		}
		if m := told(); len(m) != 2 || m[a.Lease.ID].Begun || m[b.Lease.ID].Begun {
			t.Fatalf("open: %+v", m)
		}
		if _, err := r.engine.RevokeLease(t.Context(), as(sam), a.Lease.ID, ""); err != nil {
			t.Fatal(err)
		}
		r.wantState(a.Lease.ID, broker.LeaseRevoked, time.Minute)
		for range 2 {
			m := told()
			if len(m) != 2 || !m[a.Lease.ID].Begun || m[a.Lease.ID].Cause != broker.CauseRevoked || m[b.Lease.ID].Begun {
				t.Fatalf("verified: %+v", m)
			}
			r.restart()
		}
		if _, _, err := r.engine.CloseIncident(t.Context(), as(pager), in.ID, ""); err != nil {
			t.Fatal(err)
		}
		r.wantState(b.Lease.ID, broker.LeaseRevoked, time.Minute)
		r.grant(support, "cloud.read", time.Hour)
		c := r.mustIssue("cloud.read", ttl(10*time.Minute))
		if m := told(); len(m) != 3 || m[b.Lease.ID].Cause != broker.CauseIncidentClosed || m[c.Lease.ID].Begun {
			t.Fatalf("closed: %+v", m)
		}
		time.Sleep(11 * time.Minute)
		r.wantState(c.Lease.ID, broker.LeaseExpired, time.Minute)
		if m := told(); len(m) != 0 {
			t.Errorf("dead by themselves: %+v", m)
		}
		if m := told(); len(m) != 0 { // and nothing is left in the store to be read each time
			t.Errorf("%+v", m)
		}
	})
}
