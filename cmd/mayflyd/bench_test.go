package main

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/mayfly-security/mayfly/broker"
	mayflyv1 "github.com/mayfly-security/mayfly/broker/api/mayfly/v1"
	"github.com/mayfly-security/mayfly/broker/catalog"
	"github.com/mayfly-security/mayfly/broker/lease"
	"github.com/mayfly-security/mayfly/store/bolt"
)

const benchCatalog = `
agents:
  - {id: "spiffe://acme.test/agent/support", owner: support, environment: production, max_leases: 100000, max_per_hour: 1000000}
operators: [{id: "spiffe://acme.test/operator/sam"}]
providers:
  - {name: token, driver: token, config: {issuer: "https://mayfly.acme.test", keys: "@KEYS@", introspectors: [{id: "spiffe://acme.test/service/crm", audiences: ["https://crm.acme.test"]}]}}
tools:
  - {name: crm.read, provider: token, description: x, max_ttl: 24h, scope: {audience: "https://crm.acme.test", scopes: [crm.read], verification: introspect}}
`

// benchDaemon is a daemon in this process, with a grant to issue under.
func benchDaemon(b *testing.B) (*daemon, *people) {
	b.Helper()
	people := newPeople(b)
	dir := b.TempDir()
	d, err := start(context.Background(), settings{
		store: filepath.Join(dir, "mayfly.db"), listen: "127.0.0.1:0", workload: people.sockets["/mayfly"],
		catalog: []string{writeCatalog(b, dir, benchCatalog)}, log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := d.close(context.Background()); err != nil {
			b.Error(err)
		}
	})
	benchGrant(b, d.engine)
	return d, people
}

func benchGrant(b *testing.B, e *lease.Engine) {
	b.Helper()
	sam := broker.Caller{ID: spiffeid.RequireFromString("spiffe://acme.test/operator/sam")}
	_, err := e.CreateGrant(context.Background(), sam, lease.GrantRequest{
		Agent: spiffeid.RequireFromString("spiffe://acme.test/agent/support"), Tool: "crm.read", For: 30 * 24 * time.Hour, Reason: "benchmark",
	})
	if err != nil {
		b.Fatal(err)
	}
}

// BenchmarkOverMTLS is what clients see, each on a connection of its own: a
// durable lease of a token (attested, decided, signed, committed with its
// evidence, delivered), and beside it a call that only attests and answers, so
// that the two can be compared whatever the machine.
func BenchmarkOverMTLS(b *testing.B) {
	d, people := benchDaemon(b)
	base := "https://" + d.ln.Addr().String()
	for _, clients := range []int{1, 32, 128} {
		apis := make([]callers, clients)
		for i := range apis {
			h := people.httpClient("/agent/support")
			apis[i] = newCallers(base, h, http.DefaultClient, http.DefaultClient)
		}
		for _, what := range []struct {
			name string
			call func(context.Context, callers) error
		}{
			{"whoami", func(ctx context.Context, c callers) error {
				_, err := c.agent.WhoAmI(ctx, connect.NewRequest(&mayflyv1.WhoAmIRequest{}))
				return err
			}},
			{"lease", func(ctx context.Context, c callers) error {
				_, err := c.agent.IssueLease(ctx, connect.NewRequest(&mayflyv1.IssueLeaseRequest{Tool: "crm.read", Ttl: durationpb.New(time.Hour)}))
				return err
			}},
		} {
			b.Run(fmt.Sprintf("clients=%d/%s", clients, what.name), func(b *testing.B) {
				var left atomic.Int64
				left.Store(int64(b.N))
				var wg sync.WaitGroup
				b.ResetTimer()
				for _, api := range apis {
					wg.Go(func() {
						for left.Add(-1) >= 0 {
							if err := what.call(b.Context(), api); err != nil {
								b.Error(err)
								return
							}
						}
					})
				}
				wg.Wait()
				b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "calls/s")
			})
		}
	}
}

// BenchmarkOpenLeases fills a store with 100,000 leases that have not ended,
// and tells how long a broker takes to start with them and how much memory it
// then has.
func BenchmarkOpenLeases(b *testing.B) {
	const open = 100_000
	people := newPeople(b)
	dir := b.TempDir()
	c := childSettings{Store: filepath.Join(dir, "mayfly.db"), Workload: people.sockets["/mayfly"], Catalog: writeCatalog(b, dir, benchCatalog)}
	empty := c
	empty.Store = filepath.Join(dir, "empty.db")
	fill(b, c, open)
	for _, run := range []struct {
		name string
		c    childSettings
	}{{"open=0", empty}, {"open=100000", c}} {
		b.Run(run.name, func(b *testing.B) {
			var took time.Duration
			var rss float64
			for range b.N {
				began := time.Now()
				ch := startChild(b, run.c)
				took += time.Since(began)
				rss = rssOf(b, ch.cmd.Process.Pid)
				ch.kill()
			}
			b.ReportMetric(float64(took.Milliseconds())/float64(b.N), "ms/start")
			b.ReportMetric(rss, "MB-RSS")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// fill issues leases straight through the engine.
func fill(b *testing.B, c childSettings, n int64) {
	b.Helper()
	db, err := bolt.Open(c.Store, bolt.Config{})
	if err != nil {
		b.Fatal(err)
	}
	defer db.Close()
	snapshot, err := catalog.Load([]string{c.Catalog}, drivers(nil))
	if err != nil {
		b.Fatal(err)
	}
	e, err := lease.New(context.Background(), lease.Config{Store: db, Catalog: snapshot, Drivers: drivers(nil), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		b.Fatal(err)
	}
	defer e.Close()
	benchGrant(b, e)
	agent := broker.Caller{ID: spiffeid.RequireFromString("spiffe://acme.test/agent/support")}
	var left atomic.Int64
	left.Store(n)
	var wg sync.WaitGroup
	for range 256 {
		wg.Go(func() {
			for left.Add(-1) >= 0 {
				d, err := e.Issue(context.Background(), agent, lease.IssueRequest{Tool: "crm.read"})
				if err != nil {
					b.Error(err)
					return
				}
				d.Done()
			}
		})
	}
	wg.Wait()
	counts, err := e.Counts(context.Background())
	if err != nil || int64(counts.ByState[broker.LeaseActive]) != n {
		b.Fatalf("the store has %v, %v; want %d active leases", counts, err, n)
	}
}

// rssOf is the memory of a process that is in RAM, in MB.
func rssOf(b *testing.B, pid int) float64 {
	b.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		b.Fatal(err)
	}
	_, rest, _ := bytes.Cut(status, []byte("VmRSS:"))
	kb, err := strconv.ParseFloat(strings.Fields(string(rest))[0], 64)
	if err != nil {
		b.Fatal(err)
	}
	return kb / 1024
}
