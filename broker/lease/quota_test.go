package lease_test

import (
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/audit"
	"github.com/mayfly-security/mayfly/broker/lease"
	"github.com/mayfly-security/mayfly/providers/providertest"
)

// limited is an option of a rig: what the support agent may have and do.
func limited(limit string) func(*rig) {
	field, _, _ := strings.Cut(limit, ":")
	return func(r *rig) {
		i := strings.Index(r.yaml, field)
		end := i + strings.IndexByte(r.yaml[i:], '\n')
		r.yaml = r.yaml[:i] + limit + r.yaml[end:]
	}
}

func away(providertest.Call) providertest.Fault {
	return providertest.Fault{Effect: providertest.Away}
}

// TestQuota: an agent has no more leases at once than the catalog says, and one
// counts until it is dead.
func TestQuota(t *testing.T) {
	for _, tool := range []string{"crm.read", "db.read", "vault.read"} {
		t.Run(tool, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				r := newRig(t, limited("max_leases: 2"))
				r.grant(support, tool, time.Hour)
				r.grant(other, tool, time.Hour)
				a := r.mustIssue(tool, ttl(10*time.Minute))
				b := r.mustIssue(tool, ttl(5*time.Minute))
				full := func() {
					t.Helper()
					alive := len(r.world.Live())
					_, err := r.issue(tool)
					r.wantReason(err, broker.ReasonLeaseLimit)
					if now := len(r.world.Live()); now != alive {
						t.Errorf("%d are alive at the provider; there were %d", now, alive)
					}
				}
				full()
				d, err := r.engine.Issue(bg, as(other), lease.IssueRequest{Tool: tool})
				if err != nil {
					t.Fatalf("another agent: %v", err)
				}
				d.Done()
				r.restart()
				full()

				// What is given back makes room once it is dead, and only then.
				if tool != "crm.read" {
					r.world.SetScript(away)
					if _, err := r.engine.RevokeLease(bg, as(support), a.Lease.ID, ""); err != nil {
						t.Fatal(err)
					}
					if _, err := r.issue(tool); err == nil {
						t.Error("a lease was made while two had not ended")
					}
					r.world.SetScript(nil)
				} else if _, err := r.engine.RevokeLease(bg, as(support), a.Lease.ID, ""); err != nil {
					t.Fatal(err)
				}
				r.wantState(a.Lease.ID, broker.LeaseRevoked, 5*time.Minute)
				c := r.mustIssue(tool, ttl(15*time.Minute))
				full()
				r.wantState(b.Lease.ID, broker.LeaseExpired, 10*time.Minute)
				r.mustIssue(tool)
				full()
				if err := r.reload("max_leases: 2", "max_leases: 3"); err != nil {
					t.Fatal(err)
				}
				r.mustIssue(tool)
				full()
				time.Sleep(time.Hour)
				r.wantState(c.Lease.ID, broker.LeaseExpired, time.Minute)
				if left := r.keys("held|"); len(left) != 0 {
					t.Errorf("counted after their ends: %q", left)
				}
			})
		})
	}
}

// TestQuotaOfWhatWasNotMade: a mint that fails takes no place.
func TestQuotaOfWhatWasNotMade(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, limited("max_leases: 1"))
		r.grant(support, "db.read", time.Hour)
		r.world.SetScript(away)
		if _, err := r.issue("db.read"); err == nil {
			t.Fatal("a provider that is away made something")
		}
		r.world.SetScript(nil)
		time.Sleep(time.Minute)
		r.mustIssue("db.read")
	})
}

// TestQuotaInARace: of many who ask at once, exactly as many get a lease as
// there is room for.
func TestQuotaInARace(t *testing.T) {
	r := newRig(t, limited("max_leases: 5"))
	r.grant(support, "crm.read", time.Hour)
	var given, refused atomic.Int64
	var wg sync.WaitGroup
	for range 32 {
		wg.Go(func() {
			switch _, err := r.issue("crm.read"); broker.ReasonOf(err) {
			case "":
				given.Add(1)
			case broker.ReasonLeaseLimit:
				refused.Add(1)
			default:
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if given.Load() != 5 || refused.Load() != 27 {
		t.Errorf("%d were given and %d refused; want 5 and 27", given.Load(), refused.Load())
	}
}

// TestPace: leases and requests come at the pace that the catalog says.
func TestPace(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := governedRig(t, limited("max_per_hour: 4"))
		r.mustAsk("docs.search")
		r.mustIssue("docs.search", key("k"))
		r.mustIssue("docs.search", key("k")) // the same again
		r.mustIssue("docs.search")
		_, err := r.issue("crm.read") // what is refused is not counted
		r.wantReason(err, broker.ReasonNoGrant)
		r.mustIssue("docs.search")
		slow := func() {
			t.Helper()
			_, err := r.issue("docs.search")
			r.wantReason(err, broker.ReasonRateLimited)
			if err != nil && !strings.Contains(err.Error(), "15m") && !strings.Contains(err.Error(), "10m") {
				t.Errorf("it does not say when the next is given: %v", err)
			}
			_, err = r.ask("docs.search")
			r.wantReason(err, broker.ReasonRateLimited)
		}
		slow()
		time.Sleep(5 * time.Minute)
		slow()
		time.Sleep(10*time.Minute + time.Second)
		r.mustAsk("docs.search")
		slow()
		if err := r.reload("max_per_hour: 4", "max_per_hour: 400"); err != nil {
			t.Fatal(err)
		}
		r.mustIssue("docs.search") // whom an operator gives more does not wait
		// Hours without anything: no more than the pace is saved up.
		time.Sleep(3 * time.Hour)
		r.mustAsk("docs.search")
		for range 399 {
			r.mustIssue("docs.search")
		}
		_, err = r.issue("docs.search")
		r.wantReason(err, broker.ReasonRateLimited)
	})
}

// TestPaceOfOpeners: a bot opens and closes no more often than the catalog says.
func TestPaceOfOpeners(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, func(r *rig) {
			r.yaml = strings.Replace(r.yaml, "max_open: 1000\n    max_per_hour: 1000000", "max_open: 1000\n    max_per_hour: 2", 1)
		})
		for range 2 {
			in := r.open(time.Hour, "db.read")
			if _, _, err := r.engine.CloseIncident(bg, as(pager), in.ID, ""); err != nil {
				t.Fatal(err)
			}
		}
		_, err := r.engine.OpenIncident(bg, as(pager), lease.IncidentRequest{Title: "again", Agents: []spiffeid.ID{support}, Tools: []string{"db.read"}})
		r.wantReason(err, broker.ReasonRateLimited)
		time.Sleep(30*time.Minute + time.Second)
		r.open(time.Hour, "db.read")
	})
}

// TestRetired: records of what ended long ago are forgotten, with all that
// stands beside them, and their evidence stays.
func TestRetired(t *testing.T) {
	bubble(t, func(t *testing.T) {
		const retention = 2 * time.Hour
		r := governedRig(t, func(r *rig) { r.tune = func(c *lease.Config) { c.Retention = retention } })
		in := windowFor(r, support)
		granted := r.mustAsk("docs.search", func(q *lease.AccessRequest) { q.Key = "granted" })
		withdrawn := r.mustAsk("db.read", func(q *lease.AccessRequest) { q.Key = "withdrawn" })
		if _, err := r.engine.WithdrawRequest(bg, as(support), withdrawn.ID, "a mistake"); err != nil {
			t.Fatal(err)
		}
		expired := r.mustAsk("db.read")
		long := r.grant(support, "crm.read", 30*24*time.Hour)
		d := r.mustIssue("docs.search")
		if _, _, err := r.engine.CloseIncident(bg, as(pager), in.ID, ""); err != nil {
			t.Fatal(err)
		}

		time.Sleep(retention - time.Minute)
		for _, id := range []broker.RequestID{granted.ID, withdrawn.ID, expired.ID} {
			if _, err := r.engine.Request(bg, as(support), id); err != nil {
				t.Errorf("before the retention is over: %v", err)
			}
		}
		r.lease(d.Lease.ID)
		time.Sleep(retention + time.Hour)
		r.restart()
		for _, id := range []broker.RequestID{granted.ID, withdrawn.ID, expired.ID} {
			_, err := r.engine.Request(bg, as(support), id)
			r.wantReason(err, broker.ReasonNotFound)
			if len(r.events(lease.EventFilter{Request: id})) == 0 {
				t.Errorf("no evidence of request %s is left", id)
			}
		}
		for _, prefix := range []string{"request|", "requests|", "incident|", "leases|", "lease|", "asking|x", "waiting|", "open|"} {
			if left := r.keys(prefix); len(left) != 0 {
				t.Errorf("left in the store: %q", left)
			}
		}
		if left := r.keys("grant|"); len(left) != 1 || left[0] != "grant|"+string(long.ID) {
			t.Errorf("grants left: %q; only %s is open", left, long.ID)
		}
		if len(r.events(lease.EventFilter{Type: audit.IncidentClosed})) != 1 {
			t.Error("the evidence of the close is gone")
		}

		// A key stands for as long as what it made may, and then goes too.
		if n := len(r.keys("idem|")); n != 2 {
			t.Errorf("%d idempotency keys; want 2", n)
		}
		r.stop()
		time.Sleep(62*24*time.Hour + retention)
		r.start()
		time.Sleep(retention + time.Minute) // the grant has ended only now, for who was not there
		for _, prefix := range []string{"idem|", "ended|", "grant|"} {
			if left := r.keys(prefix); len(left) != 0 {
				t.Errorf("left in the store in the end: %q", left)
			}
		}
	})
}

// TestAGrantWithALivingLeaseIsKept: what explains a lease stays as long as it lives.
func TestAGrantWithALivingLeaseIsKept(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, func(r *rig) { r.tune = func(c *lease.Config) { c.Retention = time.Hour } })
		g := r.grant(support, "db.read", 10*time.Minute)
		d := r.mustIssue("db.read")
		r.world.SetScript(away)
		time.Sleep(3 * time.Hour)
		if got := r.keys("grant|"); len(got) != 1 {
			t.Errorf("grants: %q; %s has a lease that is overdue", got, g.ID)
		}
		r.world.SetScript(nil)
		r.wantState(d.Lease.ID, broker.LeaseExpired, 10*time.Minute)
		time.Sleep(3 * time.Hour)
		if got := r.keys("grant|"); len(got) != 0 {
			t.Errorf("left: %q", got)
		}
	})
}
