//go:build unix

// Outage takes Vault away while leases end, sealed at first and then stopped,
// and shows what becomes of them when it is back, and of another provider
// meanwhile; see docs/benchmarks.md.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/client"
	"github.com/mayfly-security/mayfly/deploy/testbed/acme"
	"github.com/mayfly-security/mayfly/deploy/trials/trial"
)

// promised is within how long of Vault's return every lease is dead.
const promised = time.Minute

// leaseTTL is how long the leases live unless they are ended.
const leaseTTL = 5 * time.Minute

// options are what the trial is made with.
type options struct {
	leases  int
	away    time.Duration
	clients int
	sweep   bool
}

func main() {
	var o options
	bin := flag.String("bin", "bin", "directory of mayfly and mayflyd")
	flag.IntVar(&o.leases, "leases", 1000, "leases that end meanwhile")
	flag.DurationVar(&o.away, "away", 10*time.Minute, "how long Vault is away: sealed for one half of it, stopped for the other")
	flag.IntVar(&o.clients, "clients", 16, "clients that make the leases")
	flag.BoolVar(&o.sweep, "sweep", false, "with the broker's narrow login to PostgreSQL")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	ctx, cancel := context.WithTimeout(ctx, o.away+20*time.Minute)
	_, err := run(ctx, *bin, o, os.Stdout)
	cancel()
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "outage:", err)
		os.Exit(1)
	}
}

// result is what was seen.
type result struct {
	ended     int           // leases that were to end while Vault was away
	dead      time.Duration // from Vault's return until the last was confirmed dead
	gaveUp    int           // leases that ended as anything but dead
	before    times         // issuing of the other provider's leases
	meanwhile times
	refused   times // of Vault's, while it was away
}

func run(ctx context.Context, bin string, o options, out io.Writer) (r result, err error) {
	err = trial.Run(ctx, bin, acme.Config{NoSweep: !o.sweep, Tokens: true}, func(t *trial.Trial) error {
		x := &outage{Trial: t, options: o, out: out}
		err := x.run()
		r = x.result
		return err
	})
	return r, err
}

type outage struct {
	*trial.Trial
	options
	result
	out io.Writer

	agents, others []*client.Client
	bot, operator  *client.Client
	incident       broker.IncidentID
	grant          broker.GrantID
}

func (x *outage) say(format string, args ...any) { fmt.Fprintf(x.out, "   "+format+"\n", args...) }

func (x *outage) run() error {
	if err := x.prepare(); err != nil {
		return err
	}
	if err := x.many(x.leases); err != nil {
		return err
	}
	x.ended = x.leases
	x.say("%d leases are active, half of them for an incident.", x.leases)
	calm := min(20*time.Second, x.away)
	x.before = x.issueTokens(calm)
	x.say("The other provider, before: %s", x.before)

	if err := x.World.Vault.Seal(x.Ctx); err != nil {
		return err
	}
	x.say("Vault is sealed.")
	if err := x.closeIncident(); err != nil {
		return err
	}
	var wg sync.WaitGroup
	wg.Go(func() { x.meanwhile = x.issueTokens(x.away) })
	wg.Go(func() { x.refused = x.askInVain(x.away) })
	err := x.endMeanwhile()
	wg.Wait()
	if err != nil {
		return err
	}
	x.say("The other provider, meanwhile: %s (p99 %.1f times that of before)", x.meanwhile, float64(x.meanwhile.at(0.99))/float64(x.before.at(0.99)))
	x.say("Vault's own tool, meanwhile, refused: %s", x.refused)

	overdue, err := x.count(client.LeaseFilter{Overdue: true})
	if err != nil {
		return err
	}
	x.say("%d leases are overdue, and said to be.", overdue)
	if overdue != x.ended {
		return fmt.Errorf("%d leases are past their end and not confirmed dead; %d are said to be overdue", x.ended, overdue)
	}
	back := time.Now()
	if err := errors.Join(x.World.Vault.Start(x.Ctx), x.World.Vault.Unseal(x.Ctx)); err != nil {
		return err
	}
	unsealed := time.Since(back)
	back = time.Now()
	x.say("Vault is back (it took %s to start and unseal).", unsealed.Round(time.Millisecond))
	return x.await(back)
}

func (x *outage) prepare() (err error) {
	if x.agents, err = x.Clients(trial.Agent, x.clients); err != nil {
		return err
	}
	if x.others, err = x.Clients(trial.Agent, 4); err != nil {
		return err
	}
	bots, err := x.Clients(trial.Bot, 1)
	if err != nil {
		return err
	}
	operators, err := x.Clients(trial.Operator, 1)
	if err != nil {
		return err
	}
	x.bot, x.operator = bots[0], operators[0]
	_, err = x.operator.CreateGrant(x.Ctx, client.GrantRequest{Agent: trial.Agent, Tool: acme.TokenTool, For: 4 * time.Hour, Reason: "the other provider"})
	return err
}

// many makes leases: the first half for an incident, the second under a grant
// of their own.
func (x *outage) many(n int) error {
	in, err := x.bot.OpenIncident(x.Ctx, client.IncidentRequest{Title: "outage", Agents: []spiffeid.ID{trial.Agent}, Tools: []string{acme.Tool}, For: time.Hour})
	if err != nil {
		return err
	}
	x.incident = in.ID
	if err := x.make(n / 2); err != nil {
		return err
	}
	// The better grant is taken from here on: it lasts longer.
	g, err := x.operator.CreateGrant(x.Ctx, client.GrantRequest{Agent: trial.Agent, Tool: acme.Tool, For: 4 * time.Hour, Reason: "outage"})
	if err != nil {
		return err
	}
	x.grant = g.ID
	return x.make(n - n/2)
}

func (x *outage) make(n int) error {
	var left atomic.Int64
	left.Store(int64(n))
	errs := make([]error, len(x.agents))
	var wg sync.WaitGroup
	for i, c := range x.agents {
		wg.Go(func() {
			for left.Add(-1) >= 0 && errs[i] == nil {
				_, errs[i] = c.Get(x.Ctx, client.GetRequest{Tool: acme.Tool, TTL: leaseTTL})
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// closeIncident closes the incident while Vault is sealed.
func (x *outage) closeIncident() error {
	_, ended, err := x.bot.CloseIncident(x.Ctx, x.incident, "resolved")
	if err != nil {
		return err
	}
	roles, err := x.World.Postgres.Roles(x.Ctx, `mf\_%`)
	if err != nil {
		return err
	}
	x.say("The incident is closed: %d leases are said to be dead, %d logins are in PostgreSQL.", ended.Dead, len(roles))
	if !x.sweep && ended.Dead > x.leases-len(roles) {
		return errors.New("more leases are said to be dead than are")
	}
	x.ended -= ended.Dead // Vault had not quite gone
	return nil
}

// endMeanwhile stops Vault, and ends the leases that are active still, unless
// their time has come by then.
func (x *outage) endMeanwhile() error {
	half := time.After(x.away / 2)
	whole := time.After(x.away)
	<-half
	if err := x.World.Vault.Stop(x.Ctx); err != nil {
		return err
	}
	x.say("Vault is stopped.")
	if x.away < leaseTTL {
		if _, _, err := x.operator.WithdrawGrant(x.Ctx, x.grant, "outage"); err != nil {
			return err
		}
	} // else their end comes meanwhile
	<-whole
	return nil
}

// await waits until every lease has ended, and looks at how.
func (x *outage) await(back time.Time) error {
	for {
		n, err := x.count(client.LeaseFilter{Tool: acme.Tool})
		if err != nil {
			return err
		}
		x.dead = time.Since(back)
		if n == 0 {
			break
		}
		if x.dead > 3*promised {
			return fmt.Errorf("%d leases are not confirmed dead %s after Vault's return", n, x.dead.Round(time.Second))
		}
		time.Sleep(100 * time.Millisecond)
	}
	dead := 0
	for l, err := range x.operator.Leases(x.Ctx, client.LeaseFilter{All: true, Tool: acme.Tool}) {
		switch {
		case err != nil:
			return err
		case l.State == broker.LeaseRevoked || l.State == broker.LeaseExpired:
			dead++
		default:
			x.gaveUp++
		}
	}
	roles, err := x.World.Postgres.Roles(x.Ctx, `mf\_%`)
	if err != nil {
		return err
	}
	x.say("%s after the return, all are confirmed dead: %d; given up: %d; logins left in PostgreSQL: %d.", x.dead.Round(10*time.Millisecond), dead, x.gaveUp, len(roles))
	switch {
	case len(roles) > 0:
		return fmt.Errorf("PostgreSQL has %d logins whose leases are said to be dead", len(roles))
	case x.gaveUp > 0:
		return fmt.Errorf("%d leases were given up", x.gaveUp)
	case x.dead > promised:
		return fmt.Errorf("the last lease was dead %s after the return; %s is promised", x.dead.Round(time.Second), promised)
	}
	return nil
}

func (x *outage) count(f client.LeaseFilter) (n int, err error) {
	for l, err := range x.operator.Leases(x.Ctx, f) {
		if err != nil {
			return 0, err
		}
		if l.Tool == acme.Tool {
			n++
		}
	}
	return n, nil
}

// times are how long calls took.
type times []time.Duration

func (t times) at(q float64) time.Duration {
	if len(t) == 0 {
		return 0
	}
	return t[min(int(q*float64(len(t))), len(t)-1)]
}

func (t times) String() string {
	return fmt.Sprintf("%d calls, p50 %.1f ms, p99 %.1f ms", len(t), t.at(0.5).Seconds()*1000, t.at(0.99).Seconds()*1000)
}

// issueTokens has the other provider's leases issued for a while, at a
// moderate rate: what is compared is how long one takes.
func (x *outage) issueTokens(d time.Duration) times {
	return x.timed(d, x.others, 20*time.Millisecond, func(c *client.Client) error {
		_, err := c.Get(x.Ctx, client.GetRequest{Tool: acme.TokenTool, TTL: time.Minute})
		return err
	})
}

// askInVain asks for Vault's leases while it is away. Each is to be refused.
func (x *outage) askInVain(d time.Duration) times {
	return x.timed(d, x.agents[:2], 100*time.Millisecond, func(c *client.Client) error {
		ctx, cancel := context.WithTimeout(x.Ctx, 30*time.Second)
		defer cancel()
		if _, err := c.Get(ctx, client.GetRequest{Tool: acme.Tool, TTL: leaseTTL}); err == nil {
			return errors.New("a lease was given while Vault was away")
		}
		return nil
	})
}

func (x *outage) timed(d time.Duration, clients []*client.Client, pause time.Duration, do func(*client.Client) error) times {
	var mu sync.Mutex
	var all times
	end := time.Now().Add(d)
	var wg sync.WaitGroup
	for _, c := range clients {
		wg.Go(func() {
			for time.Now().Before(end) && x.Ctx.Err() == nil {
				at := time.Now()
				err := do(c)
				took := time.Since(at)
				mu.Lock()
				if err == nil {
					all = append(all, took)
				} else {
					x.say("not as expected: %v", err)
				}
				mu.Unlock()
				time.Sleep(pause)
			}
		})
	}
	wg.Wait()
	slices.Sort(all)
	return all
}
