//go:build unix

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/client"
	"github.com/mayfly-security/mayfly/deploy/torture/ledger"
	"github.com/mayfly-security/mayfly/deploy/torture/proxy"
)

// options are what a run is started with.
type options struct {
	seed     uint64
	rounds   int           // kills; 0: as many as the duration allows
	duration time.Duration // 0: as long as the rounds take
	clients  int
	bin      string // the broker, built with the tag "failpoints"
	vault    string // the testbed's Vault
	dir      string // where everything of the run lies
	verbose  bool
	mutate   string
	stop     bool          // at the first violation
	calm     bool          // no faults of the network's and of the servers'
	bound    time.Duration // how long a lease may be minting or revoking
}

// run is one torture: a broker that is killed again and again, its world, and
// everybody who uses it.
type run struct {
	opt     options
	history *history
	say     func(format string, args ...any)

	people *people
	world  *world
	proxy  *proxy.Proxy

	addr        string // of the broker
	configPath  string
	catalogPath string
	vaultEntry  string // of the catalog
	keys        string
	log         *os.File
	rng         *rand.Rand

	current      atomic.Pointer[daemon]
	operators    *client.Client // an operator's, for looking
	bots         *client.Client // the bot's, for the end
	installation broker.InstallationID

	evidence   *ledger.Evidence
	deliveries *ledger.Deliveries
	strays     *strays
	report     *report
	asking     atomic.Int64 // agents whose request is under way

	mu     sync.Mutex
	failed error     // what ended the run before its time
	outage time.Time // the end of the last outage of Vault or PostgreSQL
	away   int       // outages under way
	stop   context.CancelFunc
}

// fatal ends the run: it can no longer tell anything.
func (r *run) fatal(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.failed == nil {
		r.failed = err
	}
	if r.stop != nil {
		r.stop()
	}
}

// found counts violations, and writes each down.
func (r *run) found(wrong ...ledger.Violation) {
	for _, v := range wrong {
		r.history.note("ledger", "VIOLATION", v.Kind, v.Lease, v.What)
		if r.report.violated(v) {
			r.say("VIOLATION %s", v)
		}
	}
}

// setUp starts everything but the broker.
func setUp(ctx context.Context, opt options, out io.Writer) (_ *run, err error) {
	r := &run{
		opt: opt, evidence: ledger.NewEvidence(), deliveries: ledger.NewDeliveries(),
		strays: &strays{planted: map[string]time.Time{}}, report: newReport(opt),
		rng: rand.New(rand.NewPCG(opt.seed, 0)),
	}
	var sayMu sync.Mutex
	r.say = func(format string, args ...any) {
		sayMu.Lock()
		defer sayMu.Unlock()
		fmt.Fprintf(out, format+"\n", args...)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, r.close())
		}
	}()
	if r.history, err = openHistory(filepath.Join(opt.dir, "history.jsonl")); err != nil {
		return nil, err
	}
	if r.log, err = os.OpenFile(filepath.Join(opt.dir, "mayflyd.log"), os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600); err != nil {
		return nil, err
	}
	if r.people, err = newPeople(ctx); err != nil {
		return nil, err
	}
	if r.keys, err = signingKey(ctx, opt.dir, opt.bin); err != nil {
		return nil, err
	}
	if r.world, err = newWorld(ctx, opt.dir, opt.vault, r.people); err != nil {
		return nil, err
	}
	rates := proxy.DefaultRates()
	if opt.calm {
		rates = nil
	}
	r.proxy, err = proxy.New(proxy.Config{Target: r.world.vaultAddr(), Seed: opt.seed, Rates: rates, Saw: func(q proxy.Request) {
		if q.Fault != proxy.None && q.Fault != proxy.Delay || q.Status >= 400 || q.Status == 0 {
			r.history.note("proxy", string(q.Fault), q.Method, q.Path, q.Status, q.Took.Milliseconds(), q.Lease)
		}
	}})
	if err != nil {
		return nil, err
	}
	r.vaultEntry = r.world.providerEntry(r.proxy.Addr())
	r.catalogPath = filepath.Join(opt.dir, "catalog.yaml")
	if err := replace(r.catalogPath, catalogText(variant{disabled: -1}, r.vaultEntry, r.keys)); err != nil {
		return nil, err
	}
	listen, err := freeAddr()
	if err != nil {
		return nil, err
	}
	r.addr = "https://" + listen
	if r.configPath, err = config(opt.dir, listen, r.people.sockets[brokerID]); err != nil {
		return nil, err
	}
	if r.operators, err = r.people.client(ctx, operatorID, r.addr); err != nil {
		return nil, err
	}
	r.bots, err = r.people.client(ctx, botID, r.addr)
	return r, err
}

// freeAddr is a free address of the loopback interface. The broker comes back
// to it after each kill.
func freeAddr() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer l.Close()
	return l.Addr().String(), nil
}

// close ends everything that was started, last things first.
func (r *run) close() error {
	var errs []error
	if d := r.current.Load(); d != nil {
		d.kill()
	}
	for _, c := range []*client.Client{r.operators, r.bots} {
		if c != nil {
			errs = append(errs, c.Close())
		}
	}
	if r.proxy != nil {
		r.proxy.Close()
	}
	if r.world != nil {
		errs = append(errs, r.world.close())
	}
	if r.people != nil {
		errs = append(errs, r.people.close())
	}
	if r.log != nil {
		errs = append(errs, r.log.Close())
	}
	if r.history != nil {
		errs = append(errs, r.history.close())
	}
	return errors.Join(errs...)
}

// start starts the broker, at best with a failpoint, and waits until it serves.
func (r *run) start(ctx context.Context, failpoint string) (*daemon, error) {
	var env []string
	if failpoint != "" {
		env = append(env, "MAYFLY_FAILPOINT="+failpoint)
	}
	if r.opt.mutate != "" {
		env = append(env, "MAYFLY_MUTATE="+r.opt.mutate)
	}
	began := time.Now()
	d, err := startDaemon(r.opt.bin, r.configPath, env, r.log)
	if err != nil {
		return nil, err
	}
	r.current.Store(d)
	limited, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	if err := d.serving(limited); err != nil {
		if errors.Is(err, errGone) && d.atFailpoint() != "" {
			return d, nil // it died on its way up, as it was told to
		}
		d.kill()
		return nil, fmt.Errorf("%w; its log is %s", err, r.log.Name())
	}
	r.history.note("driver", "started", failpoint, time.Since(began).Milliseconds())
	return d, nil
}

// torture is the whole run. An error means that it could not be carried
// through; violations are in the report.
func (r *run) torture(ctx context.Context) error {
	ctx, r.stop = context.WithCancel(ctx)
	defer r.stop()
	d, err := r.start(ctx, "")
	if err != nil {
		return err
	}
	who, err := r.operators.WhoAmI(ctx)
	if err != nil {
		return err
	}
	r.installation = who.Installation
	// The setup is made as an operator makes it: once the installation is
	// known, and for the widest of the catalogs that there will be.
	wide := filepath.Join(r.opt.dir, "widest.yaml")
	if err := replace(wide, catalogText(variant{disabled: -1, longer: true}, r.vaultEntry, r.keys)); err != nil {
		return err
	}
	if err := r.world.setUp(ctx, wide, r.installation); err != nil {
		return err
	}
	stopActors, err := r.actors(ctx)
	if err != nil {
		return err
	}
	r.report.began = time.Now()
	err = r.rounds(ctx, d)
	stopActors()
	if r.opt.stop && err == nil && r.report.count() > 0 {
		return nil
	}
	r.mu.Lock()
	if r.failed != nil { // it is why the rounds ended
		err = r.failed
	}
	r.mu.Unlock()
	if err != nil {
		return err
	}
	// The last life may have a failpoint that it has not come to yet. The end
	// is without one.
	if d := r.current.Load(); d != nil {
		d.kill()
		r.proxy.Gone()
		r.history.note("driver", "killed for the end")
	}
	if _, err := r.start(ctx, ""); err != nil {
		return err
	}
	return r.finish(ctx)
}

// actors sets everybody to work and returns what stops them.
func (r *run) actors(ctx context.Context) (stop func(), err error) {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	var all []*actor
	stop = func() {
		cancel()
		wg.Wait()
		for _, a := range all {
			_ = a.api.Close() // its identity is the people's
		}
	}
	var works []func(context.Context)
	add := func(a *actor, err error, work func(*actor, context.Context)) error {
		if err != nil {
			return err
		}
		all = append(all, a)
		works = append(works, func(ctx context.Context) { work(a, ctx) })
		return nil
	}
	for i := range r.opt.clients {
		a, err2 := r.actor(ctx, fmt.Sprintf("client-%d", i), agentID(i), 100+uint64(i))
		err = errors.Join(err, add(a, err2, (*actor).agent))
	}
	for i := range 4 {
		a, err2 := r.actor(ctx, fmt.Sprintf("bot-%d", i), botID, 10+uint64(i))
		err = errors.Join(err, add(a, err2, (*actor).bot))
	}
	for i := range 2 {
		a, err2 := r.actor(ctx, fmt.Sprintf("operator-%d", i), operatorID, 20+uint64(i))
		err = errors.Join(err, add(a, err2, (*actor).operator))
	}
	a, err2 := r.actor(ctx, "reloader", operatorID, 30)
	err = errors.Join(err, add(a, err2, (*actor).reloader))
	a, err2 = r.actor(ctx, "loser", operatorID, 32)
	err = errors.Join(err, add(a, err2, (*actor).loser))
	if !r.opt.calm {
		a, err2 = r.actor(ctx, "chaos", operatorID, 31)
		err = errors.Join(err, add(a, err2, (*actor).chaos))
	}
	if err != nil {
		stop()
		return nil, err
	}
	for _, work := range works {
		wg.Go(func() { work(ctx) })
	}
	return stop, nil
}

// longLives is how rare lives are in which every end is answered.
const longLives = 15

// rounds kills the broker and starts it again, and looks at the world after
// each start.
func (r *run) rounds(ctx context.Context, d *daemon) error {
	looked := false
	failpoint := ""
	for round := 1; ; round++ {
		if r.opt.duration > 0 && time.Since(r.report.began) > r.opt.duration || r.opt.rounds > 0 && round > r.opt.rounds {
			return nil
		}
		if r.opt.stop && r.report.count() > 0 {
			r.say("found in round %d", round-1)
			return nil
		}
		if err := r.compare(ctx, false); err == nil {
			looked = true
		} else if d.alive() && ctx.Err() == nil {
			r.history.note("driver", "look failed", err.Error())
			r.report.lookFailed(err)
		}
		// A random instant, or the failpoint; whichever comes first where both
		// are to be, for a point may not be passed often enough.
		most := 150*time.Millisecond + time.Duration(r.rng.Int64N(int64(900*time.Millisecond)))
		switch {
		case failpoint != "":
			most = 2 * time.Second
		case r.rng.IntN(longLives) == 0:
			most = 6 * time.Second // longer than an end waits for leases that are not settled
		}
		if !d.within(most) {
			r.beforeKill()
			d.kill()
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		at := d.atFailpoint()
		r.report.killed(at, r.mintsAt(d, at))
		r.proxy.Gone()
		r.history.note("driver", "killed", round, at, r.asking.Load())
		if r.opt.verbose || round%25 == 0 {
			r.say("%s", r.report.line(round, r.evidence.Totals(), r.deliveries.Count()))
		}
		// A look that a failpoint cut short is made up for in the next life.
		failpoint = ""
		if looked && r.rng.IntN(2) == 0 {
			failpoint = fmt.Sprintf("%s:%d", failpoints[r.rng.IntN(len(failpoints))], 1+r.rng.IntN(25))
		}
		looked = false
		var err error
		if d, err = r.start(ctx, failpoint); err != nil {
			return err
		}
	}
}

// beforeKill and mintsAt tell how many attempts to mint are under way at a kill.
func (r *run) beforeKill() { r.report.minting = r.proxy.Minting() }

func (r *run) mintsAt(_ *daemon, failpoint string) int {
	if failpoint != "" {
		// It chose the instant itself: the proxy still holds what was under way
		// but for what the broken connections have ended already; the evidence
		// of the next life tells exactly.
		return r.proxy.Minting()
	}
	return r.report.minting
}
