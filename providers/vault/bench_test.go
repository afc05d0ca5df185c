package vault

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/vault/vaultscope"
)

// clients run f n times over so many goroutines.
func clients(b *testing.B, many, n int, f func()) {
	var left atomic.Int64
	left.Store(int64(n))
	var wg sync.WaitGroup
	for range many {
		wg.Go(func() {
			for left.Add(-1) >= 0 {
				f()
			}
		})
	}
	wg.Wait()
}

// enders end leases as the engine does: in batches of what is due.
func (w *world) enders(p *provider, due <-chan *attempt) *sync.WaitGroup {
	var wg sync.WaitGroup
	for range p.Traits().Concurrency {
		wg.Go(func() {
			for first := range due {
				batch := []*attempt{first}
				for more := true; more && len(batch) < p.Traits().Batch; {
					select {
					case a, ok := <-due:
						if more = ok; ok {
							batch = append(batch, a)
						}
					default:
						more = false
					}
				}
				var endings []providers.Ending
				for _, a := range batch {
					endings = append(endings, a.ending())
				}
				for i, d := range p.Revoke(context.Background(), endings) {
					if d.Progress != broker.ProgressVerified {
						w.t.Error(d)
					}
					close(batch[i].ended)
				}
			}
		})
	}
	return &wg
}

func (w *world) audited() *world {
	w.write("sys/audit/"+w.id, map[string]any{"type": "file", "options": map[string]any{"file_path": w.t.TempDir() + "/audit"}})
	w.t.Cleanup(func() { w.v.client.Sys().DisableAudit(w.id) })
	return w
}

// BenchmarkLease makes and ends database leases: through the provider, and
// straight from Vault with one token that lives long.
func BenchmarkLease(b *testing.B) {
	v, pg := servers(b)
	for _, many := range []int{1, 16} {
		for name, noDirect := range map[string]bool{"provider, direct": false, "provider, Vault alone": true} {
			b.Run(fmt.Sprintf("%s/%d", name, many), func(b *testing.B) {
				w := newWorld(b, v, pg)
				w.noDirect = noDirect
				p := w.setup(w.database()).audited().open()
				w.mint(p, w.database(), time.Minute)
				b.ResetTimer()
				due := make(chan *attempt, b.N)
				ended := w.enders(p, due)
				clients(b, many, b.N, func() {
					a := mint(context.Background(), p, w.request(w.database(), time.Minute))
					if a.err != nil {
						b.Error(a.err)
						return
					}
					due <- a
					<-a.ended // as one who gives back what it was given before it asks again
				})
				close(due)
				ended.Wait()
				b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "leases/s")
			})
		}
		b.Run(fmt.Sprintf("one token/%d", many), func(b *testing.B) {
			w := newWorld(b, v, pg)
			w.setup(w.database()).audited()
			c, err := newClient(endpoint{address: v.address()})
			if err != nil {
				b.Fatal(err)
			}
			c.keep.SetToken(v.root)
			b.ResetTimer()
			clients(b, many, b.N, func() {
				s, err := c.keep.Logical().Read(w.mount("database") + "/creds/crm-read-1m")
				if err == nil {
					_, err = c.keep.Logical().Write("sys/leases/revoke", map[string]any{"lease_id": s.LeaseID, "sync": true})
				}
				if err != nil {
					b.Error(err)
				}
			})
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "leases/s")
		})
	}
}

// BenchmarkEndMany ends 1,000 leases at a time: until each is absent from
// pg_roles, and until each is confirmed; and by revoke-prefix.
func BenchmarkEndMany(b *testing.B) {
	const many = 1000
	v, pg := servers(b)
	for name, noDirect := range map[string]bool{"direct": false, "Vault alone": true} {
		b.Run(name, func(b *testing.B) {
			w := newWorld(b, v, pg)
			w.noDirect = noDirect
			p := w.setup(w.database()).audited().open()
			var absent, confirmed time.Duration
			for range b.N {
				b.StopTimer()
				endings := make(chan []providers.Ending, many)
				var all, later []providers.Ending
				var mu sync.Mutex
				clients(b, 8, many, func() {
					if a := mint(context.Background(), p, w.request(w.database(), time.Minute)); a.err == nil {
						mu.Lock()
						defer mu.Unlock()
						all = append(all, a.ending())
					}
				})
				for i := 0; i < len(all); i += p.Traits().Batch {
					endings <- all[i:min(i+p.Traits().Batch, len(all))]
				}
				close(endings)
				b.StartTimer()
				begun := time.Now()
				gone := make(chan time.Duration, 1)
				go func() {
					for len(w.roles(vaultscope.RolePrefix(w.installation))) > 0 {
						time.Sleep(20 * time.Millisecond)
					}
					gone <- time.Since(begun)
				}()
				var wg sync.WaitGroup
				for range p.Traits().Concurrency {
					wg.Go(func() {
						for batch := range endings {
							for i, d := range p.Revoke(context.Background(), batch) {
								if d.Err != nil {
									b.Error(d)
								} else if d.Progress != broker.ProgressVerified {
									mu.Lock()
									later = append(later, batch[i])
									mu.Unlock()
								}
							}
						}
					})
				}
				wg.Wait()
				for len(later) > 0 {
					var still []providers.Ending
					for some := range slices.Chunk(later, p.Traits().Batch) {
						for i, d := range p.Confirm(context.Background(), some) {
							if d.Err != nil {
								b.Fatal(d)
							} else if d.Progress != broker.ProgressVerified {
								still = append(still, some[i])
							}
						}
					}
					later = still
				}
				confirmed += time.Since(begun)
				absent += <-gone
			}
			b.ReportMetric(absent.Seconds()/float64(b.N), "s-until-absent")
			b.ReportMetric(confirmed.Seconds()/float64(b.N), "s-until-confirmed")
		})
	}
	b.Run("revoke-prefix", func(b *testing.B) {
		w := newWorld(b, v, pg)
		w.setup(w.database()).audited()
		c, err := newClient(endpoint{address: v.address()})
		if err != nil {
			b.Fatal(err)
		}
		c.keep.SetToken(v.root)
		var took time.Duration
		for range b.N {
			b.StopTimer()
			clients(b, 8, many, func() {
				if _, err := c.keep.Logical().Read(w.mount("database") + "/creds/crm-read-1m"); err != nil {
					b.Error(err)
				}
			})
			b.StartTimer()
			begun := time.Now()
			if err := c.keep.Sys().RevokeWithOptions(&api.RevokeOptions{LeaseID: w.mount("database") + "/creds", Prefix: true, Sync: true}); err != nil {
				b.Error(err)
			}
			took += time.Since(begun)
		}
		b.ReportMetric(took.Seconds()/float64(b.N), "s-until-absent")
	})
}
