package lease_test

import (
	"context"
	"testing"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/audit"
	"github.com/mayfly-security/mayfly/broker/lease"
)

// TestLatestEvents: the last events are those at the end of the whole list,
// for every number asked for and with a filter.
func TestLatestEvents(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t)
		g := r.grant(support, "crm.read", time.Hour)
		for range 40 {
			r.mustIssue("crm.read")
		}
		r.grant(other, "db.read", time.Hour)
		all := r.events(lease.EventFilter{})
		for _, f := range []lease.EventFilter{{}, {Grant: g.ID}, {Type: audit.GrantCreated}, {Type: audit.CatalogLoaded}, {Type: "nothing.such"}} {
			matching := r.events(f)
			for _, size := range []int{1, 2, 7, 41, 42, 100} {
				got, looked, err := r.engine.Events(context.Background(), as(sam), f, 0, size, true)
				if err != nil {
					t.Fatal(err)
				}
				want := matching[max(len(matching)-size, 0):]
				if len(got) != len(want) || len(got) > 0 && (got[0].Sequence != want[0].Sequence || got[len(got)-1].Sequence != want[len(want)-1].Sequence) {
					t.Errorf("%+v, last %d: %d events; want %d", f, size, len(got), len(want))
				}
				if end := all[len(all)-1].Sequence; looked != end {
					t.Errorf("%+v, last %d: looked as far as %d; want %d", f, size, looked, end)
				}
			}
		}
	})
}

// TestPages: a listing in pages is the same as the whole, whatever the size of
// the pages, and holds nothing twice.
func TestPages(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t)
		r.grant(support, "crm.read", time.Hour)
		made := map[broker.LeaseID]bool{}
		for range 23 {
			made[r.mustIssue("crm.read").Lease.ID] = true
		}
		for _, f := range []lease.LeaseFilter{{}, {Agent: support}, {Tool: "crm.read"}, {Agent: other}, {Tool: "db.read"}} {
			want := len(made)
			if f.Agent == other || f.Tool == "db.read" {
				want = 0
			}
			for _, size := range []int{1, 5, 23, 24, 1000} {
				seen := map[broker.LeaseID]bool{}
				for after := ""; ; {
					p, err := r.engine.Leases(context.Background(), f, after, size)
					if err != nil {
						t.Fatal(err)
					}
					for _, l := range p.Items {
						if seen[l.ID] || !made[l.ID] {
							t.Fatalf("lease %s is listed twice or is none of ours", l.ID)
						}
						seen[l.ID] = true
					}
					if after = p.Next; after == "" {
						break
					}
				}
				if len(seen) != want {
					t.Errorf("%+v in pages of %d: %d leases; want %d", f, size, len(seen), want)
				}
			}
		}
	})
}
