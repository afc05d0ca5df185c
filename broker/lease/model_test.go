package lease_test

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"pgregory.net/rapid"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/lease"
	"github.com/mayfly-security/mayfly/providers/providertest"
	"github.com/mayfly-security/mayfly/store"
)

// TestModel drives the engine with random acts of agents, operators, providers
// and crashes, and compares it after each with what the words of the design
// allow (model_check_test.go).
//
// The acts of a run are drawn first, as data. They are then played in a bubble
// of time of their own, on a real store, and what is wrong comes out as text,
// so that rapid can play them again with fewer acts.
func TestModel(t *testing.T) {
	checks := flag.Lookup("rapid.checks")
	if checks.Value.String() == checks.DefValue { // not asked for
		if err := checks.Value.Set("60"); err != nil {
			t.Fatal(err)
		}
		defer checks.Value.Set(checks.DefValue)
	}
	seen := &tally{n: map[string]int{}}
	rapid.Check(t, func(rt *rapid.T) {
		// Each begins with a window. The others can each come to nothing ("pass"),
		// so that rapid can take them out.
		first := act{Kind: "open", Tools: []int{0, 1, 2, 3, 4}, For: 10 * time.Minute}
		acts := append([]act{first}, rapid.SliceOfN(rapid.Custom(drawAct), 20, 30).Draw(rt, "acts")...)
		if wrong := play(t, acts, seen); len(wrong) > 0 {
			rt.Fatalf("%s", strings.Join(wrong, "\n"))
		}
	})
	t.Logf("played: %v", seen.n)
}

// act is one step of a run. Which fields count depends on Kind.
type act struct {
	Kind    string
	Agent   int // of agentsInModel
	Tool    int // of tools
	Key     int // 0: none
	TTL     time.Duration
	Param   int // of paramsInModel
	Fault   int // of mintFaults
	Faults  []int
	Granted bool // ask for what a grant gives, if there is one
	Async   bool // go on while it is under way
	Uses    int
	For     time.Duration
	Tools   []int
	Pick    int // which grant, incident or lease, modulo how many there are
	N       int // of the Update at which the store dies
	Unknown bool
}

func (a act) String() string {
	s := a.Kind
	switch a.Kind {
	case "issue":
		s += fmt.Sprintf("(%s %s key=%d ttl=%s param=%q fault=%d async=%v)", agentsInModel[a.Agent].Path(), tools[a.Tool], a.Key, a.TTL, paramsInModel[a.Param], a.Fault, a.Async)
	case "grant":
		s += fmt.Sprintf("(%s %s for=%s uses=%d param=%q)", agentsInModel[a.Agent].Path(), tools[a.Tool], a.For, a.Uses, paramsInModel[a.Param])
	case "open":
		s += fmt.Sprintf("(%s %v for=%s)", agentsInModel[a.Agent].Path(), a.Tools, a.For)
	case "crash":
		s += fmt.Sprintf("(at=%d unknown=%v)", a.N, a.Unknown)
	case "wait":
		s += fmt.Sprintf("(%s)", a.For)
	case "trouble":
		s += fmt.Sprintf("(%v)", a.Faults)
	case "widen":
		s += fmt.Sprintf("(%s)", widening[a.Pick%len(widening)].tool)
	default:
		s += fmt.Sprintf("(%d)", a.Pick)
	}
	return s
}

var (
	agentsInModel = []spiffeid.ID{support, other}
	paramsInModel = []string{"", "c-1", "c-2", "not a customer"}
	widening      = []struct{ tool, anchor string }{
		{"db.read", "name: db.read\n    provider: planned\n    description: reads\n    max_ttl: "},
		{"crm.read", "name: crm.read\n    provider: tokens\n    description: reads\n    max_ttl: "},
	}
	// mintFaults are what can happen to an attempt. Late effects stay within
	// what the providers declare: MintTimeout 10 s and LateBound 5 s.
	mintFaults = []providertest.Rule{
		{},
		{Op: providertest.OpCreate, Fault: providertest.Fault{Effect: providertest.FailBefore}},
		{Op: providertest.OpCreate, Fault: providertest.Fault{Effect: providertest.ActThenFail}},
		{Op: providertest.OpCreate, Fault: providertest.Fault{Effect: providertest.ActThenCut}},
		{Op: providertest.OpCreate, Fault: providertest.Fault{Effect: providertest.Duplicate}},
		{Op: providertest.OpCreate, Fault: providertest.Fault{Effect: providertest.Refuse}},
		{Op: providertest.OpCreate, Fault: providertest.Fault{Delay: 3 * time.Second}},
		{Op: providertest.OpCreate, Fault: providertest.Fault{Delay: time.Hour}},
		{Op: providertest.OpCreate, Fault: providertest.Fault{Late: 3 * time.Second}},
		{Op: providertest.OpCreate, Fault: providertest.Fault{Late: 12 * time.Second}},
		{Op: providertest.OpCreate, Fault: providertest.Fault{Late: 12 * time.Second, Effect: providertest.Duplicate}},
		{Op: providertest.OpSession, Fault: providertest.Fault{Effect: providertest.FailBefore}},
		{Op: providertest.OpSession, Fault: providertest.Fault{Effect: providertest.ActThenFail}},
		{Op: providertest.OpSession, Fault: providertest.Fault{Effect: providertest.Refuse}},
		{Op: providertest.OpSession, Fault: providertest.Fault{Delay: 3 * time.Second}},
		{Op: providertest.OpCreate, Fault: providertest.Fault{Effect: providertest.Away}},
		{Op: providertest.OpSession, Fault: providertest.Fault{Effect: providertest.Away}},
		// Left behind after 12 s. A broker that was killed could not have done it
		// any later, and the one that is "killed" here goes on.
		{Op: providertest.OpCreate, Fault: providertest.Fault{Deaf: 14 * time.Second}},
		{Op: providertest.OpSession, Fault: providertest.Fault{Deaf: 14 * time.Second}},
	}
	// endFaults are what can happen to a call that ends or looks.
	endFaults = []providertest.Fault{
		{Effect: providertest.FailBefore},
		{Effect: providertest.ActThenFail},
		{Effect: providertest.ActThenCut},
		{Effect: providertest.Duplicate},
		{Effect: providertest.Refuse},
		{Delay: 3 * time.Second},
		{Delay: time.Minute},
		{Late: 2 * time.Second},
		{Effect: providertest.Away},
		{Deaf: 20 * time.Second},
	}
)

func drawAct(t *rapid.T) act {
	index := func(name string, n int) int { // IntRange would like small ones best
		all := make([]int, n)
		for i := range all {
			all[i] = i
		}
		return rapid.SampledFrom(all).Draw(t, name)
	}
	span := func(name string, of ...time.Duration) time.Duration { return rapid.SampledFrom(of).Draw(t, name) }
	a := act{Kind: rapid.SampledFrom([]string{
		"pass",
		"issue", "issue", "issue", "issue", "issue", "issue", "issue", "issue", "issue", "issue", "issue", "issue",
		"again", "again", "again", "grant", "grant", "grant", "open", "open", "wait", "wait", "wait",
		"revoke", "close", "withdraw", "disable", "widen", "trouble", "trouble", "crash", "crash", "kill",
	}).Draw(t, "kind")}
	switch a.Kind {
	case "issue":
		a.Agent, a.Tool, a.Key = index("agent", 2), index("tool", len(tools)), max(0, index("key", 8)-3)
		a.TTL = span("ttl", 0, 0, 0, 0, 30*time.Second, 30*time.Second, 2*time.Minute, 4*time.Minute, -time.Second)
		a.Param = max(0, index("param", 8)-4)
		a.Granted = index("granted", 5) > 0
		a.Pick = index("pick", 8)
		a.Fault = max(0, index("fault", 2*len(mintFaults))-len(mintFaults))
		a.Async = rapid.Bool().Draw(t, "async")
	case "grant":
		a.Agent, a.Tool = index("agent", 2), index("tool", len(tools))
		a.For = span("for", 40*time.Second, 3*time.Minute, 10*time.Minute)
		a.Uses, a.Param = index("uses", 3), index("param", 3)
	case "open":
		a.Agent = index("agent", 2)
		a.Tools = rapid.SliceOfNDistinct(rapid.IntRange(0, len(tools)-1), 1, 3, rapid.ID).Draw(t, "tools")
		a.For = span("for", 40*time.Second, 3*time.Minute, 10*time.Minute)
	case "wait":
		a.For = span("for", time.Second, 4*time.Second, 11*time.Second, 31*time.Second, 125*time.Second)
	case "trouble":
		a.Faults = rapid.SliceOfN(rapid.IntRange(0, len(endFaults)-1), 1, 6).Draw(t, "faults")
	case "crash":
		a.N, a.Unknown = rapid.IntRange(1, 6).Draw(t, "at"), rapid.Bool().Draw(t, "unknown")
	default:
		a.Pick = index("pick", 8)
	}
	return a
}

// report is a testing.TB that keeps what is wrong as text.
type report struct {
	testing.TB
	mu       sync.Mutex
	wrong    []string
	cleanups []func()
}

func (r *report) Helper()             {}
func (r *report) Log(...any)          {}
func (r *report) Logf(string, ...any) {}
func (r *report) Cleanup(f func())    { r.cleanups = append(r.cleanups, f) }
func (r *report) Errorf(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.wrong) < 10 { // one thing that is wrong tends to be so after each act
		r.wrong = append(r.wrong, fmt.Sprintf(format, args...))
	}
}
func (r *report) Error(args ...any)                 { r.Errorf("%s", fmt.Sprint(args...)) }
func (r *report) Fatal(args ...any)                 { r.Error(args...); runtime.Goexit() }
func (r *report) Fatalf(format string, args ...any) { r.Errorf(format, args...); runtime.Goexit() }

func (r *report) failed() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.wrong) > 0
}

// tally counts what was played, for the test's log.
type tally struct {
	mu sync.Mutex
	n  map[string]int
}

func (c *tally) add(what string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.n[what]++
}

// play plays a run and returns what was wrong.
func play(t *testing.T, acts []act, seen *tally) (wrong []string) {
	synctest.Test(t, func(t *testing.T) {
		rep := &report{TB: t}
		over := make(chan struct{})
		go func() { // Fatal ends this goroutine, and not the bubble's first
			defer close(over)
			m := newModel(rep)
			m.seen = seen
			defer func() {
				m.under.Wait()
				for _, f := range slices.Backward(rep.cleanups) {
					f()
				}
			}()
			m.run(acts)
		}()
		<-over
		wrong = rep.wrong
	})
	return wrong
}

// mortal is a store that dies as a process does: from one Update on, which may
// or may not be carried out, nothing more is done for whoever holds it.
type mortal struct {
	store.Store
	mu    sync.Mutex
	gone  bool
	in    int // it dies at this Update from now; 0: not by itself
	carry bool
}

func (m *mortal) arm(n int, carry bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.in, m.carry = n, carry
}

func (m *mortal) kill() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.gone = true
}

func (m *mortal) dead() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.gone
}

func (m *mortal) View(ctx context.Context, fn func(store.Reader) error) error {
	if m.dead() {
		return store.ErrUnavailable
	}
	return m.Store.View(ctx, fn)
}

func (m *mortal) Update(ctx context.Context, fn func(store.Txn) error) error {
	m.mu.Lock()
	was := m.gone
	if m.in > 0 {
		m.in--
		m.gone = m.gone || m.in == 0
	}
	dies, carry := m.gone, m.carry
	m.mu.Unlock()
	switch {
	case was, dies && !carry:
		return store.ErrUnavailable
	case dies:
		if err := m.Store.Update(ctx, fn); err != nil {
			return err
		}
		return errors.Join(store.ErrUnavailable, store.ErrUnknown)
	}
	return m.Store.Update(ctx, fn)
}

// given is a lease that was delivered.
type given struct {
	lease  broker.Lease
	key    string // the store's, of its idempotency key; empty if it has none
	secret string
	at     time.Time
	broker int // the run of the broker that gave it
	// over: a call or a lost answer ended it. unsure: a crash cut such a call.
	over, unsure bool
}

// model is what is known of the world besides the store.
type model struct {
	t     *report
	seen  *tally
	r     *rig
	store *mortal   // of the present run
	runs  int       // of the broker
	began time.Time // of this run
	loads int       // catalogs that were exchanged for certain
	keyed []*act    // issues that had a key
	under sync.WaitGroup

	disabled bool            // by r.yaml
	wide     map[string]bool // by r.yaml

	mu       sync.Mutex
	given    []*given                   // in the order of their delivery
	busyKeys map[string]int             // of issues under way
	asked    map[string]map[string]bool // by key: the requests it was used for
	over     map[broker.GrantID]bool    // an end of it has returned
	off      bool                       // support's disabling has returned
	mint     providertest.Rule          // the next attempt's
	failed   map[string]time.Time       // by tool: when an attempt last failed
	ends     []providertest.Fault       // the next endings'
}

func newModel(t *report) *model {
	m := &model{t: t, wide: map[string]bool{}, busyKeys: map[string]int{}, failed: map[string]time.Time{},
		asked: map[string]map[string]bool{}, over: map[broker.GrantID]bool{}}
	m.r = newRig(t, func(r *rig) {
		r.yaml = strings.ReplaceAll(r.yaml, "max_ttl: 15m", "max_ttl: 3m")
		r.wrap = func(s store.Store) store.Store {
			m.store = &mortal{Store: s}
			return m.store
		}
	})
	m.r.world.SetScript(m.script)
	m.r.asked.SetScript(m.script)
	return m
}

func (m *model) script(c providertest.Call) providertest.Fault {
	m.mu.Lock()
	defer m.mu.Unlock()
	if c.Op == m.mint.Op {
		f := m.mint.Fault
		m.mint = providertest.Rule{}
		return f
	}
	if (c.Op == providertest.OpEnd || c.Op == providertest.OpStatus) && len(m.ends) > 0 {
		f := m.ends[0]
		m.ends = m.ends[1:]
		return f
	}
	return providertest.Fault{}
}

func (m *model) run(acts []act) {
	for i, a := range acts {
		synctest.Wait()
		m.do(a)
		if m.store.dead() {
			m.restart()
		}
		synctest.Wait()
		if m.store.dead() { // it died in the background
			m.restart()
			synctest.Wait()
		}
		m.check(m.read())
		if m.t.failed() {
			m.t.Fatalf("after act %d of %v", i+1, acts[:i+1])
		}
	}
	m.finish()
	if m.t.failed() {
		m.t.Fatalf("at the end of %v", acts)
	}
}

func (m *model) restart() {
	m.seen.add("restart")
	m.store.kill()
	m.runs++
	m.began = time.Now()
	m.r.restart()
	m.mu.Lock()
	m.off = m.disabled
	m.mu.Unlock()
}

func (m *model) do(a act) {
	m.seen.add(a.Kind)
	ctx := context.Background()
	switch a.Kind {
	case "issue":
		a = m.aim(a)
		if a.Key > 0 {
			m.keyed = append(m.keyed, &a)
		}
		m.issue(a)
	case "again":
		if was := pick(a, m.keyed); was != nil {
			again := *was
			again.Fault, again.Async = 0, false
			m.issue(again)
		}
	case "grant":
		req := lease.GrantRequest{Agent: agentsInModel[a.Agent], Tool: tools[a.Tool], For: a.For, MaxUses: a.Uses, Reason: "a test", Params: m.params(a, 2)}
		_, err := m.r.engine.CreateGrant(ctx, as(sam), req)
		m.want(err, m.refuses(agentsInModel[a.Agent]))
	case "open":
		req := lease.IncidentRequest{Title: "a test", Agents: []spiffeid.ID{agentsInModel[a.Agent]}, Duration: &a.For}
		for _, n := range a.Tools {
			req.Tools = append(req.Tools, tools[n])
		}
		_, err := m.r.engine.OpenIncident(ctx, as(pager), req)
		m.want(err, m.refuses(agentsInModel[a.Agent]))
	case "wait":
		time.Sleep(a.For)
	case "revoke":
		if g := pick(a, m.delivered()); g != nil {
			_, err := m.r.engine.RevokeLease(ctx, as(g.lease.Agent), g.lease.ID, "")
			m.want(err, "")
			g.over, g.unsure = g.over || err == nil, g.unsure || err != nil
		}
	case "withdraw":
		if g := pick(a, m.read().grants); g != nil {
			_, _, err := m.r.engine.WithdrawGrant(ctx, as(sam), g.ID, "")
			if m.want(err, ""); err == nil {
				m.isOver(g.ID)
			}
		}
	case "close":
		if in := pick(a, m.read().incidents); in != nil {
			_, _, err := m.r.engine.CloseIncident(ctx, as(pager), in.ID, "")
			if m.want(err, ""); err == nil {
				m.isOver(in.Grants...)
			}
		}
	case "disable":
		m.mu.Lock()
		m.off = false // while it is being undone, it is neither
		m.mu.Unlock()
		word := map[bool]string{false: "disabled: false # support", true: "disabled: true # support"}
		m.disabled = !m.disabled
		if m.load(word[!m.disabled], word[m.disabled]) {
			m.mu.Lock()
			m.off = m.disabled
			m.mu.Unlock()
		}
	case "widen":
		w := widening[a.Pick%len(widening)]
		word := map[bool]string{false: w.anchor + "3m", true: w.anchor + "4m"}
		m.wide[w.tool] = !m.wide[w.tool]
		m.load(word[!m.wide[w.tool]], word[m.wide[w.tool]])
	case "trouble":
		m.mu.Lock()
		defer m.mu.Unlock()
		for _, n := range a.Faults {
			m.ends = append(m.ends, endFaults[n])
		}
	case "crash":
		m.store.arm(a.N, a.Unknown)
	case "kill":
		m.store.kill()
	}
}

// pick chooses one of several.
func pick[V any](a act, from []*V) *V {
	if len(from) == 0 {
		return nil
	}
	return from[a.Pick%len(from)]
}

// aim lets an issue ask for what a grant gives.
func (m *model) aim(a act) act {
	grants := slices.DeleteFunc(m.read().grants, func(g *broker.Grant) bool { return g.State != broker.GrantOpen })
	if g := pick(a, grants); a.Granted && g != nil {
		a.Agent, a.Tool = slices.Index(agentsInModel, g.Agent), slices.Index(tools, g.Tool)
		if a.Param == 0 || g.Tool != "crm.read" {
			a.Param = slices.Index(paramsInModel, g.Params["customer"])
		}
	}
	return a
}

func (m *model) isOver(grants ...broker.GrantID) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, g := range grants {
		m.over[g] = true
	}
}

// load reloads the catalog with a change, and says whether it was taken.
func (m *model) load(old, new string) bool {
	err := m.r.reload(old, new)
	m.want(err, "")
	if err == nil {
		m.loads++
	}
	return err == nil
}

// refuses is why nothing can be made for an agent now.
func (m *model) refuses(agent spiffeid.ID) broker.Reason {
	if agent == support && m.disabled {
		return broker.ReasonAgentDisabled
	}
	return ""
}

// want checks why a call was refused; "" means that it was not. A crash
// excuses every refusal and no success.
func (m *model) want(err error, reasons ...broker.Reason) {
	got := broker.ReasonOf(err)
	if err == nil {
		got = ""
	}
	if slices.Contains(reasons, got) || err != nil && m.store.dead() {
		return
	}
	m.t.Errorf("reason %q (%v); want one of %q", got, err, reasons)
}

func (m *model) params(a act, below int) map[string]string {
	if a.Param == 0 || below == 2 && tools[a.Tool] != "crm.read" {
		return nil
	}
	return map[string]string{"customer": paramsInModel[a.Param]}
}
