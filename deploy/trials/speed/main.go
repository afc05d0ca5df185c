//go:build unix

// Speed compares PostgreSQL logins through Mayfly with the same logins straight
// from Vault, in turn and in one run, on the same servers: Vault with its audit
// device, both on durable disks. It prints ratios, for machines differ and are
// noisy; see docs/benchmarks.md.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/client"
	"github.com/mayfly-security/mayfly/deploy/testbed/acme"
	"github.com/mayfly-security/mayfly/deploy/trials/trial"
)

// path is the Vault role that both read.
const path = "database/creds/crm-query-15m"

const ttl = 15 * time.Minute

// absentBound is how long logins that were ended may take to be absent.
const absentBound = 2 * time.Minute

func main() {
	bin := flag.String("bin", "bin", "directory of mayfly and mayflyd")
	clients := flag.Int("clients", 16, "clients at a time")
	rounds := flag.Int("rounds", 4, "rounds of each kind")
	each := flag.Duration("each", 8*time.Second, "how long one round lasts")
	burst := flag.Int("burst", 1000, "leases that are ended at once; 0: none are")
	noSweep := flag.Bool("no-sweep", false, "without the broker's narrow login to PostgreSQL")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	ctx, cancel := context.WithTimeout(ctx, 30*time.Minute)
	err := trial.Run(ctx, *bin, acme.Config{NoSweep: *noSweep}, func(t *trial.Trial) error {
		m := &measurement{Trial: t, clients: *clients, rounds: *rounds, each: *each, burst: *burst}
		return m.run()
	})
	cancel()
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "speed:", err)
		os.Exit(1)
	}
}

type measurement struct {
	*trial.Trial
	clients, rounds, burst int
	each                   time.Duration

	mayfly   []*client.Client
	operator *client.Client
	grant    broker.GrantID
	vault    *api.Client // with one long-lived token that can read the path
	root     *api.Client
}

func (m *measurement) run() error {
	if err := m.prepare(); err != nil {
		return err
	}
	fmt.Printf("\n%d clients, %d rounds of %s each, in turn.\n\n", m.clients, m.rounds, m.each)
	fmt.Println("| what | Mayfly, a second | Vault alone, a second | ratio | p50 / p99 of Mayfly | p50 / p99 of Vault |")
	fmt.Println("|---|---|---|---|---|---|")
	for _, what := range []struct {
		name          string
		mayfly, vault func(int) error
	}{
		{"make and end a login", m.mayflyCycle, m.vaultCycle},
		{"make a login", m.mayflyMake, m.vaultMake},
	} {
		if err := m.compare(what.name, what.mayfly, what.vault); err != nil {
			return err
		}
	}
	if m.burst == 0 {
		return nil
	}
	return m.bursts()
}

func (m *measurement) prepare() (err error) {
	if m.mayfly, err = m.Clients(trial.Agent, m.clients); err != nil {
		return err
	}
	operators, err := m.Clients(trial.Operator, 1)
	if err != nil {
		return err
	}
	m.operator = operators[0]
	grant, err := m.operator.CreateGrant(m.Ctx, client.GrantRequest{Agent: trial.Agent, Tool: acme.Tool, For: 20 * time.Hour, Reason: "measuring"})
	if err != nil {
		return err
	}
	m.grant = grant.ID
	m.root = m.World.Vault.Client()
	if err := m.root.Sys().PutPolicyWithContext(m.Ctx, "plain", `path "`+path+`" { capabilities = ["read"] }
path "sys/leases/revoke" { capabilities = ["update"] }`); err != nil {
		return err
	}
	token, err := m.root.Auth().Token().CreateWithContext(m.Ctx, &api.TokenCreateRequest{Policies: []string{"plain"}, TTL: "20h", NoParent: true})
	if err != nil {
		return err
	}
	if m.vault, err = m.root.CloneWithHeaders(); err != nil {
		return err
	}
	m.vault.SetToken(token.Auth.ClientToken)
	return nil
}

func (m *measurement) mayflyMake(i int) error {
	_, err := m.mayfly[i].Get(m.Ctx, client.GetRequest{Tool: acme.Tool, TTL: ttl})
	return err
}

func (m *measurement) mayflyCycle(i int) error {
	c, err := m.mayfly[i].Get(m.Ctx, client.GetRequest{Tool: acme.Tool, TTL: ttl})
	if err != nil {
		return err
	}
	l, err := m.mayfly[i].Revoke(m.Ctx, c.Lease.ID, "")
	if err == nil && l.State != broker.LeaseRevoked {
		err = fmt.Errorf("the lease is %s after it was given back", l.State)
	}
	return err
}

func (m *measurement) vaultMake(int) error {
	_, err := m.vault.Logical().ReadWithContext(m.Ctx, path)
	return err
}

func (m *measurement) vaultCycle(int) error {
	s, err := m.vault.Logical().ReadWithContext(m.Ctx, path)
	if err != nil {
		return err
	}
	_, err = m.vault.Logical().WriteWithContext(m.Ctx, "sys/leases/revoke", map[string]any{"lease_id": s.LeaseID, "sync": true})
	return err
}

// rate is what one round showed.
type rate struct {
	perSecond float64
	took      []time.Duration
}

// compare runs rounds of both in turn.
func (m *measurement) compare(name string, mayfly, vault func(int) error) error {
	var a, b []rate
	for range m.rounds {
		for _, each := range []struct {
			do  func(int) error
			all *[]rate
		}{{mayfly, &a}, {vault, &b}} {
			r, err := m.round(each.do)
			if err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			*each.all = append(*each.all, r)
			if err := m.clear(); err != nil {
				return err
			}
		}
	}
	var ratios []string
	for i := range a {
		ratios = append(ratios, fmt.Sprintf("%.2f", a[i].perSecond/b[i].perSecond))
	}
	fmt.Printf("| %s | %.0f | %.0f | **%.2f** (%s) | %s | %s |\n", name, mean(a), mean(b), mean(a)/mean(b), strings.Join(ratios, ", "), quantiles(a), quantiles(b))
	return nil
}

func (m *measurement) round(do func(int) error) (rate, error) {
	ctx, cancel := context.WithTimeout(m.Ctx, m.each)
	defer cancel()
	var mu sync.Mutex
	var r rate
	var failed error
	var wg sync.WaitGroup
	began := time.Now()
	for i := range m.clients {
		wg.Go(func() {
			for ctx.Err() == nil {
				at := time.Now()
				err := do(i)
				took := time.Since(at)
				mu.Lock()
				if err != nil {
					failed = errors.Join(failed, err)
				} else {
					r.took = append(r.took, took)
				}
				mu.Unlock()
				if err != nil {
					return
				}
			}
		})
	}
	wg.Wait()
	r.perSecond = float64(len(r.took)) / time.Since(began).Seconds()
	return r, failed
}

// clear ends what is left of a round, and waits until it is gone.
func (m *measurement) clear() error {
	if _, err := m.root.Logical().WriteWithContext(m.Ctx, "sys/leases/revoke-prefix/database/creds", map[string]any{"sync": true}); err != nil {
		return err
	}
	return m.absent()
}

// absent waits until PostgreSQL has no login of the path any more.
func (m *measurement) absent() error {
	conn, err := m.World.Postgres.Superuser(m.Ctx)
	if err != nil {
		return err
	}
	defer conn.Close(m.Ctx)
	for began := time.Now(); ; {
		var n int
		if err := conn.QueryRow(m.Ctx, "SELECT count(*) FROM pg_roles WHERE rolvaliduntil IS NOT NULL").Scan(&n); err != nil {
			return err
		}
		if n == 0 {
			return nil
		}
		if time.Since(began) > absentBound {
			return fmt.Errorf("%d logins are still there after %s", n, absentBound)
		}
		select {
		case <-time.After(5 * time.Millisecond):
		case <-m.Ctx.Done():
			return m.Ctx.Err()
		}
	}
}

// present is an error unless PostgreSQL has as many logins as a burst ends.
func (m *measurement) present() error {
	names, err := m.World.Postgres.Roles(m.Ctx, `%`)
	n := 0
	for _, name := range names {
		if strings.HasPrefix(name, "mf_") || strings.HasPrefix(name, "v-") {
			n++
		}
	}
	if err == nil && n != m.burst {
		err = fmt.Errorf("PostgreSQL has %d logins, and %d were made", n, m.burst)
	}
	return err
}

// bursts ends many leases at once: by the close of an incident, and by Vault's
// own revocation of a prefix.
func (m *measurement) bursts() error {
	bots, err := m.Clients(trial.Bot, 1)
	if err != nil {
		return err
	}
	// What is made from here on is made for the incident.
	if _, _, err := m.operator.WithdrawGrant(m.Ctx, m.grant, ""); err != nil {
		return err
	}
	fmt.Printf("\n%d logins ended at once, until the last is absent from pg_roles:\n\n| Mayfly: close of an incident | Vault: revoke-prefix with sync | ratio |\n|---|---|---|\n", m.burst)
	for range 3 {
		closing, err := m.closeBurst(bots[0])
		if err != nil {
			return err
		}
		prefix, err := m.prefixBurst()
		if err != nil {
			return err
		}
		fmt.Printf("| %.2f s | %.2f s | **%.1f** |\n", closing.Seconds(), prefix.Seconds(), prefix.Seconds()/closing.Seconds())
	}
	return nil
}

func (m *measurement) closeBurst(bot *client.Client) (time.Duration, error) {
	in, err := bot.OpenIncident(m.Ctx, client.IncidentRequest{Title: "burst", Agents: []spiffeid.ID{trial.Agent}, Tools: []string{acme.Tool}})
	if err != nil {
		return 0, err
	}
	if err := m.many(m.mayflyMake); err != nil {
		return 0, err
	}
	if err := m.present(); err != nil {
		return 0, err
	}
	began := time.Now()
	closed := make(chan error, 1)
	go func() {
		_, _, err := bot.CloseIncident(m.Ctx, in.ID, "")
		closed <- err
	}()
	err = m.absent()
	took := time.Since(began)
	return took, errors.Join(err, <-closed)
}

func (m *measurement) prefixBurst() (time.Duration, error) {
	if err := m.many(m.vaultMake); err != nil {
		return 0, err
	}
	if err := m.present(); err != nil {
		return 0, err
	}
	began := time.Now()
	done := make(chan error, 1)
	go func() {
		_, err := m.root.Logical().WriteWithContext(m.Ctx, "sys/leases/revoke-prefix/"+path, map[string]any{"sync": true})
		done <- err
	}()
	err := m.absent()
	took := time.Since(began)
	return took, errors.Join(err, <-done)
}

// many makes as many logins as a burst has.
func (m *measurement) many(makeOne func(int) error) error {
	var left atomic.Int64
	left.Store(int64(m.burst))
	errs := make([]error, m.clients)
	var wg sync.WaitGroup
	for i := range m.clients {
		wg.Go(func() {
			for left.Add(-1) >= 0 && errs[i] == nil {
				errs[i] = makeOne(i)
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

func mean(all []rate) float64 {
	sum := 0.0
	for _, r := range all {
		sum += r.perSecond
	}
	return sum / float64(len(all))
}

func quantiles(all []rate) string {
	var took []time.Duration
	for _, r := range all {
		took = append(took, r.took...)
	}
	slices.Sort(took)
	at := func(q float64) time.Duration { return took[min(int(q*float64(len(took))), len(took)-1)] }
	return fmt.Sprintf("%.0f / %.0f ms", at(0.5).Seconds()*1000, at(0.99).Seconds()*1000)
}
