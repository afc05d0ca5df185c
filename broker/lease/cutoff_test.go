package lease_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/audit"
	"github.com/mayfly-security/mayfly/broker/lease"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/providertest"
	"github.com/mayfly-security/mayfly/store"
)

// roled is a driver whose leases are sessions of roles: that of a tool is its
// name behind "role/". What becomes of a cut-off is up to the test.
type roled struct {
	providers.Driver

	mu      sync.Mutex
	plan    func(role string) (providers.Cut, error) // nil: see planned
	came    func() providers.Death                   // nil: verified
	calls   []providers.Cut
	cuts    func(context.Context) ([]providers.Cut, error)
	holding chan struct{} // if not nil, CutOff waits for it
}

const (
	cutReach = 2 * time.Second // of a cut-off beyond the decision
	cutClear = 4 * time.Second
	cutStand = 2 * time.Hour
)

func (d *roled) Open(ctx context.Context, config providers.Config) (providers.Provider, error) {
	p, err := d.Driver.Open(ctx, config)
	if err != nil {
		return nil, err
	}
	d.mu.Lock()
	d.cuts = config.Cuts
	d.mu.Unlock()
	r := &roles{p, d, config.Now}
	if planner, ok := p.(providers.Planner); ok {
		return struct {
			*roles
			providers.Planner
		}{r, planner}, nil
	}
	return r, nil
}

func (d *roled) set(change func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	change()
}

func (d *roled) asked() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.calls)
}

type roles struct {
	providers.Provider
	d   *roled
	now func() time.Time
}

func (r *roles) Roles(tool broker.Tool) []string  { return []string{"role/" + tool.Name} }
func (r *roles) RoleOf(e providers.Ending) string { return "role/" + e.Tool }
func planned(role string, now time.Time) providers.Cut {
	return providers.Cut{Role: role, Before: now.Add(cutReach), Clear: now.Add(cutClear), Until: now.Add(cutStand), Others: "what others made"}
}

func (r *roles) PlanCutOff(_ context.Context, role string) (providers.Cut, error) {
	r.d.mu.Lock()
	defer r.d.mu.Unlock()
	if r.d.plan != nil {
		return r.d.plan(role)
	}
	return planned(role, r.now()), nil
}

func (r *roles) CutOff(ctx context.Context, cut providers.Cut) providers.Death {
	r.d.mu.Lock()
	r.d.calls = append(r.d.calls, cut)
	came, holding := r.d.came, r.d.holding
	r.d.mu.Unlock()
	if holding != nil {
		select {
		case <-holding:
		case <-ctx.Done():
			return providers.Death{Err: ctx.Err()}
		}
	}
	if came == nil {
		return providers.Death{Progress: broker.ProgressVerified, Left: "as was seen"}
	}
	return came()
}

const cloudRole = "role/cloud.read"

// cutRig is a rig whose provider "asked" has roles: that of cloud.read, and of
// cloud.write, which has another.
func cutRig(t testing.TB, options ...func(*rig)) (*rig, *roled) {
	t.Helper()
	d := &roled{}
	r := newRig(t, append([]func(*rig){func(r *rig) {
		r.yaml = strings.Replace(r.yaml, "  - name: crm.read\n", "  - name: cloud.write\n    provider: asked\n    description: writes\n    max_ttl: 15m\n    scope: {}\n  - name: crm.read\n", 1)
	}}, options...)...)
	r.stop()
	d.Driver = r.drivers["asked"]
	r.drivers["asked"] = d
	r.start()
	r.grant(support, "cloud.read", 12*time.Hour)
	r.grant(support, "cloud.write", 12*time.Hour)
	r.grant(support, "db.read", 12*time.Hour)
	return r, d
}

func (r *rig) cut(dry bool) (lease.CutOff, error) {
	return r.engine.CutOff(bg, as(sam), lease.CutOffRequest{Provider: "asked", Role: cloudRole, Reason: "SEC-9", Dry: dry})
}

func (r *rig) cutOffs() []lease.CutOff {
	r.t.Helper()
	p, err := r.engine.CutOffs(bg, as(sam), "", 0)
	if err != nil {
		r.t.Fatal(err)
	}
	return p.Items
}

// told are the types of the events of cut-offs, in order.
func (r *rig) toldOfCuts() (types []string) {
	r.t.Helper()
	for _, ev := range r.events(lease.EventFilter{}) {
		if strings.HasPrefix(string(ev.Type), "cutoff.") {
			types = append(types, strings.TrimPrefix(string(ev.Type), "cutoff."))
		}
	}
	return types
}

func (r *rig) wantCuts(want ...string) {
	r.t.Helper()
	if diff := cmp.Diff(want, r.toldOfCuts()); diff != "" {
		r.t.Errorf("the evidence of the cut-off:\n%s", diff)
	}
}

// TestCutOff: a cut-off hits the leases of the role and no others, each ends by
// its own way, and all of it is in the evidence. A dry run changes nothing.
func TestCutOff(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r, d := cutRig(t)
		a, b := r.mustIssue("cloud.read"), r.mustIssue("cloud.read")
		beside, foreign := r.mustIssue("cloud.write"), r.mustIssue("db.read")
		dry, err := r.cut(true)
		if err != nil || dry.Leases != 0 && dry.Leases != 2 || dry.Alive != 2 || dry.ByAgent[support.String()] != 2 || dry.ByTool["cloud.read"] != 2 ||
			dry.Progress != "" || dry.Actor != "" || dry.Cut.Others != "what others made" {
			t.Fatalf("%+v, %v", dry, err)
		}
		if d.asked() != 0 || len(r.cutOffs()) != 0 || r.lease(a.Lease.ID).State != broker.LeaseActive || len(r.toldOfCuts()) != 0 {
			t.Fatal("the dry run did something")
		}
		began := time.Now()
		c, err := r.cut(false)
		if err != nil || c.Leases != 2 || c.Alive != 0 || c.Progress != broker.ProgressVerified || c.Actor != sam.String() || c.Reason != "SEC-9" {
			t.Fatalf("%+v, %v", c, err)
		}
		if took := time.Since(began); took < 2*time.Second || took > 5*time.Second { // the leases' own settling
			t.Errorf("it took %s", took)
		}
		for _, id := range []broker.LeaseID{a.Lease.ID, b.Lease.ID} {
			if l := r.lease(id); l.State != broker.LeaseRevoked || l.Cause != broker.CauseCutOff {
				t.Errorf("%s (%s)", l.State, l.Cause)
			}
			evs := r.events(lease.EventFilter{Lease: id, Type: audit.LeaseRevoking})
			if len(evs) != 1 || evs[0].Actor != sam.String() || evs[0].Reason != "SEC-9" || evs[0].Cause != "cut_off" || evs[0].Details["policies"] == "" {
				t.Errorf("%+v", evs)
			}
		}
		for _, d := range []*lease.Delivery{beside, foreign} {
			if l := r.lease(d.Lease.ID); l.State != broker.LeaseActive {
				t.Errorf("%s is %s", l.Tool, l.State)
			}
		}
		r.wantCuts("requested", "verified")
		for _, what := range []audit.Type{audit.CutOffRequested, audit.CutOffVerified} {
			ev := r.events(lease.EventFilter{Type: what})[0]
			if ev.Provider != "asked" || ev.Details["role"] != cloudRole || ev.Reason != "SEC-9" || ev.Cause != "cut_off" || ev.Correlation == "" ||
				ev.Details["made_before"] == "" || ev.Details["until"] == "" || ev.Details["cut_off"] == "" {
				t.Errorf("%s: %+v", what, ev)
			}
			if asked := what == audit.CutOffRequested; asked != (ev.Actor == sam.String()) || asked != (ev.Details["leases"] == "2") || asked == (ev.Details["left"] == "as was seen") {
				t.Errorf("%s: %+v", what, ev)
			}
		}
		if left := r.keys("sweep|"); len(left) != 0 {
			t.Errorf("left: %q", left)
		}

		// It stands, also over a restart, until what was made before is dead by itself.
		for range 2 {
			cuts, err := d.cuts(bg)
			if err != nil || len(cuts) != 1 || cuts[0].Role != cloudRole || !cuts[0].Before.Equal(c.Cut.Before) {
				t.Fatalf("%+v, %v", cuts, err)
			}
			r.restart()
		}
		if all := r.cutOffs(); len(all) != 1 || all[0].Progress != broker.ProgressVerified || all[0].Alive != 0 || all[0].Leases != 2 {
			t.Errorf("%+v", all)
		}
		asked := d.asked()
		time.Sleep(cutStand + time.Minute)
		if cuts, err := d.cuts(bg); err != nil || len(cuts) != 0 || len(r.cutOffs()) != 0 || d.asked() != asked {
			t.Errorf("%+v, %v", cuts, err)
		}
		r.wantCuts("requested", "verified", "ended")
		if left := append(r.keys("cutoff|"), r.keys("sweep|")...); len(left) != 0 {
			t.Errorf("left: %q", left)
		}
	})
}

// TestCutOffRefusals: each refusal, with what to do, and nothing done.
func TestCutOffRefusals(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r, d := cutRig(t)
		l := r.mustIssue("cloud.read")
		for name, c := range map[string]struct {
			who  broker.Caller
			req  lease.CutOffRequest
			want broker.Reason
			says string
		}{
			"an agent":                {as(support), lease.CutOffRequest{Provider: "asked", Role: cloudRole, Reason: "x"}, broker.ReasonPermissionDenied, ""},
			"an agent, dry":           {as(support), lease.CutOffRequest{Provider: "asked", Role: cloudRole, Dry: true}, broker.ReasonPermissionDenied, ""},
			"a person":                {person("eve"), lease.CutOffRequest{Provider: "asked", Role: cloudRole, Reason: "x"}, broker.ReasonPermissionDenied, ""},
			"nobody":                  {broker.Caller{}, lease.CutOffRequest{Provider: "asked", Role: cloudRole, Reason: "x"}, broker.ReasonPermissionDenied, ""},
			"no reason":               {as(sam), lease.CutOffRequest{Provider: "asked", Role: cloudRole}, broker.ReasonInvalidArgument, "needs a reason"},
			"blanks":                  {as(sam), lease.CutOffRequest{Provider: "asked", Role: cloudRole, Reason: "  "}, broker.ReasonInvalidArgument, "needs a reason"},
			"a long reason":           {as(sam), lease.CutOffRequest{Provider: "asked", Role: cloudRole, Reason: strings.Repeat("x", 1001)}, broker.ReasonInvalidArgument, "reason"},
			"a reason with ANSI":      {as(sam), lease.CutOffRequest{Provider: "asked", Role: cloudRole, Reason: "\x1b[1m"}, broker.ReasonInvalidArgument, "reason"},
			"a dry reason with ANSI":  {as(sam), lease.CutOffRequest{Provider: "asked", Role: cloudRole, Reason: "\x1b[1m", Dry: true}, broker.ReasonInvalidArgument, "reason"},
			"no provider":             {as(sam), lease.CutOffRequest{Role: cloudRole, Reason: "x"}, broker.ReasonNotFound, "not in the catalog"},
			"an unknown provider":     {as(sam), lease.CutOffRequest{Provider: "askd", Role: cloudRole, Reason: "x"}, broker.ReasonNotFound, `did you mean "asked"?`},
			"a long provider":         {as(sam), lease.CutOffRequest{Provider: strings.Repeat("x", 65), Role: cloudRole, Reason: "x"}, broker.ReasonInvalidArgument, "provider"},
			"one without the ability": {as(sam), lease.CutOffRequest{Provider: "planned", Role: cloudRole, Reason: "x"}, broker.ReasonConflict, "no roles"},
			"an inert one":            {as(sam), lease.CutOffRequest{Provider: "tokens", Role: cloudRole, Reason: "x"}, broker.ReasonConflict, "no roles"},
			"no role":                 {as(sam), lease.CutOffRequest{Provider: "asked", Reason: "x"}, broker.ReasonNotFound, "no tool"},
			"an unknown role":         {as(sam), lease.CutOffRequest{Provider: "asked", Role: "role/cloud.raed", Reason: "x"}, broker.ReasonNotFound, `did you mean "role/cloud.read"?`},
			"another provider's role": {as(sam), lease.CutOffRequest{Provider: "asked", Role: "role/db.read", Reason: "x"}, broker.ReasonNotFound, "no tool"},
			"a role with ANSI":        {as(sam), lease.CutOffRequest{Provider: "asked", Role: "\x1b[1m", Reason: "x"}, broker.ReasonInvalidArgument, "role"},
			"a long role":             {as(sam), lease.CutOffRequest{Provider: "asked", Role: strings.Repeat("x", 1025), Reason: "x"}, broker.ReasonInvalidArgument, "role"},
		} {
			_, err := r.engine.CutOff(bg, c.who, c.req)
			var refusal *broker.Error
			if !errors.As(err, &refusal) || refusal.Reason != c.want || !strings.Contains(refusal.Message, c.says) || refusal.Next == "" {
				t.Errorf("%s: %v; want %s", name, err, c.want)
			}
		}
		_, err := r.engine.CutOffs(bg, as(support), "", 0)
		r.wantReason(err, broker.ReasonPermissionDenied)

		// The provider's own refusal is told in its words, and what it fails with is not.
		d.set(func() {
			d.plan = func(string) (providers.Cut, error) {
				return providers.Cut{}, broker.Refuse(broker.ReasonConflict, "it writes no lists", "set the mode")
			}
		})
		if _, err := r.cut(false); broker.ReasonOf(err) != broker.ReasonConflict || !strings.Contains(err.Error(), "it writes no lists") {
			t.Error(err)
		}
		d.set(func() {
			d.plan = func(string) (providers.Cut, error) { return providers.Cut{}, errors.New("upstream text") }
		})
		var refusal *broker.Error
		if _, err := r.cut(false); !errors.As(err, &refusal) || refusal.Reason != broker.ReasonProvider || strings.Contains(refusal.Message, "upstream") {
			t.Error(err)
		}
		d.set(func() { d.plan = func(role string) (providers.Cut, error) { return providers.Cut{Role: role}, nil } })
		if _, err := r.cut(false); broker.ReasonOf(err) != broker.ReasonInternal {
			t.Error("a plan that is none was taken:", err)
		}
		if d.asked() != 0 || len(r.cutOffs()) != 0 || r.lease(l.Lease.ID).State != broker.LeaseActive || len(r.toldOfCuts()) != 0 {
			t.Error("a refused call did something")
		}
		if n := len(r.events(lease.EventFilter{Type: audit.RequestRefused})); n == 0 {
			t.Error("no refusal is in the evidence")
		}
	})
}

// TestCutOffOfGoneTool: the role of an open lease can be cut off although its
// tool is gone from the catalog.
func TestCutOffOfGoneTool(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r, d := cutRig(t)
		d.set(func() { d.came = func() providers.Death { return providers.Death{Progress: broker.ProgressWritten} } })
		r.asked.SetScript(never)
		l := r.mustIssue("cloud.write")
		if err := r.reload("  - name: cloud.write\n", "  - name: cloud.rite\n"); err != nil {
			t.Fatal(err)
		}
		c, err := r.engine.CutOff(bg, as(sam), lease.CutOffRequest{Provider: "asked", Role: "role/cloud.write", Reason: "x"})
		if err != nil || c.Leases != 1 || c.Alive != 1 {
			t.Errorf("%+v, %v", c, err)
		}
		if got := r.lease(l.Lease.ID); got.State != broker.LeaseRevoking || got.Cause != broker.CauseToolChanged {
			t.Errorf("%s (%s)", got.State, got.Cause) // it was being ended already
		}
	})
}

// TestCutOffKeepsItsProvider: a provider stays in the catalog until it has
// written what was decided.
func TestCutOffKeepsItsProvider(t *testing.T) {
	bubble(t, func(t *testing.T) {
		reg := &registry{}
		r, d := cutRig(t, reg.use)
		d.set(func() { d.came = func() providers.Death { return providers.Death{Err: providers.ErrAway} } })
		if _, err := r.cut(false); err != nil {
			t.Fatal(err)
		}
		if got := r.gauge(reg, "mayfly_cut_offs"); len(got) != 1 || got["requested,asked"]+got["asked,requested"] != 1 {
			t.Errorf("%v", got)
		}
		whole := r.yaml
		r.yaml = without(whole)
		err := r.engine.Load(bg, r.snapshot(), "test")
		r.wantReason(err, broker.ReasonConflict)
		r.yaml = strings.Replace(whole, "config: {mode: asked,", "config: {mode: planned,", 1)
		err = r.engine.Load(bg, r.snapshot(), "test")
		r.wantReason(err, broker.ReasonConflict)
		d.set(func() { d.came = func() providers.Death { return providers.Death{Progress: broker.ProgressWritten} } })
		time.Sleep(2 * time.Minute)
		r.yaml = without(whole)
		if err := r.engine.Load(bg, r.snapshot(), "test"); err != nil {
			t.Error(err)
		}
		// It is told, and goes on when the provider is back.
		if c := r.cutOffs(); len(c) != 1 || c[0].Progress != broker.ProgressWritten {
			t.Errorf("%+v", c)
		}
		r.yaml = whole
		if err := r.engine.Load(bg, r.snapshot(), "test"); err != nil {
			t.Error(err)
		}
		d.set(func() { d.came = nil })
		time.Sleep(2 * time.Minute)
		if c := r.cutOffs(); len(c) != 1 || c[0].Progress != broker.ProgressVerified {
			t.Errorf("%+v", c)
		}
		if got := r.gauge(reg, "mayfly_cut_offs"); len(got) != 1 || got["asked,verified"]+got["verified,asked"] != 1 {
			t.Errorf("%v", got)
		}
	})
}

// TestCutOffOutlivesAJumpOfTheClock: a clock that runs ahead brings nothing back
// to life, and what need not stand goes once that is certain.
func TestCutOffOutlivesAJumpOfTheClock(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var ahead atomic.Int64
		r, d := cutRig(t, func(r *rig) {
			r.tune = func(c *lease.Config) {
				c.Wall = func() time.Time { return time.Now().Add(time.Duration(ahead.Load())) }
			}
		})
		if _, err := r.cut(false); err != nil {
			t.Fatal(err)
		}
		ahead.Store(int64(2 * cutStand))
		time.Sleep(time.Minute)
		if cuts, err := d.cuts(bg); err != nil || len(cuts) != 1 {
			t.Errorf("%+v, %v", cuts, err)
		}
		r.wantCuts("requested", "verified")
		ahead.Store(0)
		time.Sleep(cutStand + time.Minute)
		r.wantCuts("requested", "verified", "ended")
	})
}

// TestCutOffByPolicy: a person may where a policy permits the verb, and where
// one forbids it an operator may not, who may pull the kill switch.
func TestCutOffByPolicy(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r, _ := cutRig(t, func(r *rig) {
			r.cedar = openPolicies + `
@id("administer") permit (principal in Group::"mayfly:operators", action == Action::"administer", resource);
@id("no-cuts") forbid (principal, action == Action::"administer", resource) when { context.verb == "role.cut_off" } unless { principal in Group::"cutters" };
@id("cutters") permit (principal in Group::"cutters", action == Action::"administer", resource) when { context.verb == "role.cut_off" };
`
		})
		_, err := r.cut(false)
		if broker.ReasonOf(err) != broker.ReasonPermissionDenied || !strings.Contains(err.Error(), "no-cuts") {
			t.Error(err)
		}
		if _, err := r.end(lease.Selector{Owner: "nobody"}, true); err != nil {
			t.Error(err)
		}
		c, err := r.engine.CutOff(bg, person("ann", "cutters"), lease.CutOffRequest{Provider: "asked", Role: cloudRole, Reason: "x"})
		if err != nil || !strings.Contains(c.Actor, "ann") {
			t.Errorf("%+v, %v", c, err)
		}
		ev := r.events(lease.EventFilter{Type: audit.CutOffRequested})
		if len(ev) != 1 || ev[0].Details["policies"] != "cutters" || ev[0].Details["policy_digest"] == "" {
			t.Errorf("%+v", ev)
		}
	})
}

// TestCutOffHoldsNewLeasesBack: until new sessions are certain to work none is
// made, and none that was being made is handed out. Then they are made again.
func TestCutOffHoldsNewLeasesBack(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r, d := cutRig(t)
		d.set(func() { d.came = func() providers.Death { return providers.Death{Progress: broker.ProgressWritten} } })
		// One is being made when it is decided.
		r.asked.SetScript(providertest.Rules(1, providertest.Rule{Op: providertest.OpCreate, Times: 1, Fault: providertest.Fault{Delay: 3 * time.Second}}))
		type outcome struct {
			d   *lease.Delivery
			err error
		}
		flying := make(chan outcome)
		go func() { d, err := r.issue("cloud.read"); flying <- outcome{d, err} }()
		time.Sleep(time.Second)
		before := time.Now()
		ctx, cancel := context.WithTimeout(bg, time.Second)
		defer cancel()
		c, err := r.engine.CutOff(ctx, as(sam), lease.CutOffRequest{Provider: "asked", Role: cloudRole, Reason: "x"})
		if err != nil || c.Leases != 1 || c.Progress != broker.ProgressWritten {
			t.Fatalf("%+v, %v", c, err)
		}
		if o := <-flying; o.err == nil {
			t.Error("what was being made was handed out")
		}
		for time.Since(before) < cutClear {
			n := len(r.events(lease.EventFilter{Type: audit.LeaseIntended}))
			_, err := r.issue("cloud.read")
			var refusal *broker.Error
			if !errors.As(err, &refusal) || refusal.Reason != broker.ReasonProvider || !strings.Contains(refusal.Next, "try again in ") {
				t.Fatalf("after %s: %v", time.Since(before), err)
			}
			if len(r.events(lease.EventFilter{Type: audit.LeaseIntended})) != n {
				t.Fatal("an intent was recorded")
			}
			r.mustIssue("cloud.write") // another role
			time.Sleep(500 * time.Millisecond)
		}
		time.Sleep(time.Second)
		l := r.mustIssue("cloud.read")
		time.Sleep(30 * time.Second)
		if got := r.lease(l.Lease.ID); got.State != broker.LeaseActive {
			t.Errorf("a new lease is %s (%s)", got.State, got.Cause)
		}
	})
}

// TestCutOffAtActivation: a lease whose role is known only once it is made is
// not handed out either, although everything that was there had been told.
func TestCutOffAtActivation(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t)
		r.stop()
		r.drivers["world"] = &roled{Driver: r.drivers["world"]}
		r.start()
		r.grant(support, "vault.read", 12*time.Hour)
		c, err := r.engine.CutOff(bg, as(sam), lease.CutOffRequest{Provider: "recorded", Role: "role/vault.read", Reason: "x"})
		if err != nil || c.Progress != broker.ProgressVerified || c.Leases != 0 {
			t.Fatalf("%+v, %v", c, err)
		}
		if left := r.keys("sweep|"); len(left) != 0 {
			t.Fatalf("left: %q", left)
		}
		_, err = r.issue("vault.read")
		r.wantReason(err, broker.ReasonProvider)
		var refusal *broker.Error
		if !errors.As(err, &refusal) || refusal.Lease == "" || refusal.Next != "ask again in a moment" {
			t.Fatalf("%v (%+v)", err, refusal)
		}
		if l := r.wantState(refusal.Lease, broker.LeaseRevoked, time.Minute); l.Cause != broker.CauseCutOff {
			t.Errorf("for %s", l.Cause)
		}
		time.Sleep(cutClear + time.Second)
		r.mustIssue("vault.read")
	})
}

// TestCutOffGoesOn: the provider is away, and is asked again until it takes it,
// also after a restart and with the caller gone; failures are in the evidence
// once each, and nothing is called verified meanwhile.
func TestCutOffGoesOn(t *testing.T) {
	for _, how := range []string{"away", "restart", "silent"} {
		t.Run(how, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				r, d := cutRig(t)
				l := r.mustIssue("cloud.read")
				r.asked.SetScript(never)
				if how == "silent" {
					d.set(func() { d.holding = make(chan struct{}) })
				} else {
					d.set(func() {
						d.came = func() providers.Death {
							return providers.Death{Err: fmt.Errorf("secret upstream text: %w", providers.ErrAway)}
						}
					})
				}
				c, err := r.cut(false)
				if err != nil || c.Progress != "" || c.Alive != 1 || c.Failing != (how != "silent") {
					t.Fatalf("%+v, %v", c, err)
				}
				if how == "restart" {
					r.restart()
				}
				time.Sleep(3 * time.Minute)
				if c := r.cutOffs(); len(c) != 1 || c[0].Progress != "" || !c[0].Failing || c[0].Alive != 1 {
					t.Errorf("%+v", c)
				}
				if got := r.lease(l.Lease.ID); got.State != broker.LeaseRevoking || got.Cause != broker.CauseCutOff {
					t.Errorf("the lease is %s (%s)", got.State, got.Cause)
				}
				r.wantCuts("requested", "failed")
				if n := d.asked(); n < 3 || n > 40 {
					t.Errorf("the provider was asked %d times in 3 minutes", n)
				}
				if ev := r.events(lease.EventFilter{Type: audit.CutOffFailed})[0]; strings.Contains(fmt.Sprint(ev), "upstream") || ev.Details["failure"] == "" {
					t.Errorf("%+v", ev)
				}
				d.set(func() {
					d.holding = nil
					d.came = func() providers.Death {
						return providers.Death{Progress: broker.ProgressWritten, RetryAt: time.Now().Add(10 * time.Second)}
					}
				})
				time.Sleep(90 * time.Second)
				r.wantCuts("requested", "failed", "written")
				d.set(func() { d.came = nil })
				time.Sleep(15 * time.Second)
				r.wantCuts("requested", "failed", "written", "verified")
				asked := d.asked()
				r.asked.SetScript(nil)
				r.wantState(l.Lease.ID, broker.LeaseRevoked, 2*time.Minute)
				if d.asked() != asked {
					t.Error("it is asked after it was verified")
				}
			})
		})
	}
}

// TestCutOffAgain: to do it again is a decision of its own, which also ends what
// was made since; what was not finished of the one before is part of it.
func TestCutOffAgain(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r, d := cutRig(t)
		first, err := r.cut(false)
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(cutClear + time.Second)
		l := r.mustIssue("cloud.read")
		second, err := r.cut(false)
		if err != nil || second.Leases != 1 || second.Alive != 0 || !second.Cut.Before.After(first.Cut.Before) {
			t.Fatalf("%+v, %v", second, err)
		}
		if got := r.lease(l.Lease.ID); got.State != broker.LeaseRevoked {
			t.Errorf("%s", got.State)
		}
		// Twice while the provider takes none.
		d.set(func() { d.came = func() providers.Death { return providers.Death{Err: providers.ErrAway} } })
		for range 2 {
			if _, err := r.cut(false); err != nil {
				t.Fatal(err)
			}
		}
		d.set(func() { d.came = nil })
		time.Sleep(2 * time.Minute)
		r.wantCuts("requested", "verified", "requested", "verified", "requested", "failed", "requested", "failed", "verified")
		requested := r.events(lease.EventFilter{Type: audit.CutOffRequested})
		verified := r.events(lease.EventFilter{Type: audit.CutOffVerified})
		for i, ev := range requested {
			if i > 0 && ev.Details["takes_further"] != requested[i-1].Details["cut_off"] {
				t.Errorf("%d: %+v", i, ev)
			}
		}
		if verified[2].Details["cut_off"] != requested[3].Details["cut_off"] {
			t.Errorf("%+v", verified[2])
		}
		if n := len(r.keys("cutoff|")); n != 1 {
			t.Errorf("%d records", n)
		}
		// A clock of the provider's that went back takes nothing back.
		d.set(func() {
			d.plan = func(role string) (providers.Cut, error) { return planned(role, time.Now().Add(-time.Hour)), nil }
		})
		last := r.cutOffs()[0]
		if back, err := r.cut(false); err != nil || back.Cut != last.Cut {
			t.Errorf("%+v, %v", back, err)
		}
		d.set(func() { d.plan = nil })
		time.Sleep(cutStand + time.Hour)
		if types := r.toldOfCuts(); types[len(types)-1] != "ended" || strings.Count(strings.Join(types, " "), "ended") != 1 {
			t.Errorf("%q", types)
		}
		if left := append(r.keys("cutoff|"), r.keys("house|")...); strings.Contains(strings.Join(left, " "), "cutoff") {
			t.Errorf("left: %q", left)
		}
	})
}

// TestCutOffWithoutAStore: while the store cannot be written a role is cut off
// all the same, and it is told when the store is back: the decision that was
// made first, as far as the last reaches. No lease is handed out in between.
func TestCutOffWithoutAStore(t *testing.T) {
	bubble(t, func(t *testing.T) {
		faulty := &faultyStore{}
		r, d := cutRig(t, func(r *rig) { r.wrap = faulty.wrap })
		l := r.mustIssue("cloud.read")
		synctest.Wait()
		faulty.failAll(true)
		_, err := r.cut(false)
		r.wantReason(err, broker.ReasonStore)
		time.Sleep(time.Second)
		_, err = r.engine.CutOff(bg, as(sam), lease.CutOffRequest{Provider: "asked", Role: cloudRole, Reason: "again"})
		r.wantReason(err, broker.ReasonStore)
		time.Sleep(5 * time.Second)
		if d.asked() == 0 {
			t.Fatal("the provider was not asked")
		}
		if live := r.asked.Live(); len(live) != 0 {
			t.Errorf("these live: %+v", live)
		}
		if n := len(r.toldOfCuts()); n != 0 {
			t.Errorf("%d events", n)
		}
		if _, err := r.cut(false); broker.ReasonOf(err) != broker.ReasonStore {
			t.Fatal(err)
		}
		reaches := time.Now().Add(cutReach).UTC().Format(time.RFC3339)
		synctest.Wait() // the housekeeper has tried in vain, and waits a second
		faulty.failAll(false)
		_, err = r.issue("cloud.read") // before it is told
		r.wantReason(err, broker.ReasonProvider)
		time.Sleep(30 * time.Second)
		r.wantCuts("requested", "verified")
		if ev := r.events(lease.EventFilter{Type: audit.CutOffRequested})[0]; ev.Reason != "SEC-9" || ev.Actor != sam.String() || ev.Details["made_before"] != reaches {
			t.Errorf("%+v", ev)
		}
		if got := r.wantState(l.Lease.ID, broker.LeaseRevoked, time.Minute); got.Cause != broker.CauseCutOff {
			t.Errorf("for %s", got.Cause)
		}
		asked := d.asked()
		time.Sleep(10 * time.Minute)
		if d.asked() != asked {
			t.Error("it is asked after it was verified")
		}
		r.mustIssue("cloud.read")
	})
}

// TestCutOffSurvivesTheBroker: the broker dies at each of the commits of a
// cut-off. When it is back it is carried out, or, if nothing had been decided,
// nothing is.
func TestCutOffSurvivesTheBroker(t *testing.T) {
	for n := 1; ; n++ {
		last := false
		for _, carry := range []bool{false, true} {
			t.Run(fmt.Sprintf("%d_%v", n, carry), func(t *testing.T) {
				bubble(t, func(t *testing.T) {
					var now *mortal
					r, d := cutRig(t, func(r *rig) {
						r.wrap = func(s store.Store) store.Store { now = &mortal{Store: s}; return now }
					})
					l, beside := r.mustIssue("cloud.read"), r.mustIssue("cloud.write")
					synctest.Wait()
					now.arm(n, carry)
					ctx, cancel := context.WithTimeout(bg, time.Minute)
					defer cancel()
					_, err := r.engine.CutOff(ctx, as(sam), lease.CutOffRequest{Provider: "asked", Role: cloudRole, Reason: "x"})
					last = err == nil && !now.dead()
					r.restart()
					time.Sleep(time.Minute)
					decided := len(r.events(lease.EventFilter{Type: audit.CutOffRequested}))
					if decided != 1 && (n > 1 || carry) {
						t.Errorf("%d decisions in the evidence", decided)
					}
					if n := len(r.events(lease.EventFilter{Type: audit.CutOffVerified})); n != decided {
						t.Errorf("%d decisions, and %d verified", decided, n)
					}
					want := map[int]broker.LeaseState{0: broker.LeaseActive, 1: broker.LeaseRevoked}[decided]
					if got := r.lease(l.Lease.ID); got.State != want {
						t.Errorf("the lease is %s; want %s", got.State, want)
					}
					if got := r.lease(beside.Lease.ID); got.State != broker.LeaseActive {
						t.Errorf("the lease beside it is %s", got.State)
					}
					if (d.asked() > 0) != (decided == 1) && decided == 1 {
						t.Error("the provider was never asked")
					}
					if left := r.keys("sweep|"); len(left) != 0 {
						t.Errorf("left: %q", left)
					}
				})
			})
		}
		if last || t.Failed() {
			if n < 4 {
				t.Errorf("it took %d commits only", n)
			}
			return
		}
	}
}

// without is the catalog without the provider of the roles and its tools.
func without(whole string) string {
	y := whole[:strings.Index(whole, "  - name: asked\n")] + whole[strings.Index(whole, "  - name: tokens\n"):]
	for _, tool := range []string{"cloud.read", "cloud.write"} {
		i := strings.Index(y, "  - name: "+tool+"\n")
		y = y[:i] + y[i+strings.Index(y[i:], "scope: {}\n")+len("scope: {}\n"):]
	}
	return strings.ReplaceAll(y, "cloud.read, ", "")
}

// TestCutOffOfAProviderThatGoes: a reload takes the provider out of the catalog
// while a cut-off is being decided. Either comes first: what was decided has
// somebody who carries it out, and what has nobody is not decided.
func TestCutOffOfAProviderThatGoes(t *testing.T) {
	t.Run("before the decision", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			r, d := cutRig(t)
			whole := r.yaml
			d.set(func() {
				d.plan = func(role string) (providers.Cut, error) {
					r.yaml = without(whole)
					if err := r.engine.Load(bg, r.snapshot(), "test"); err != nil {
						t.Error(err)
					}
					return planned(role, time.Now()), nil
				}
			})
			_, err := r.cut(false)
			r.wantReason(err, broker.ReasonNotFound)
			if n := len(r.cutOffs()) + len(r.keys("sweep|cutoff|")) + len(r.toldOfCuts()); n != 0 {
				t.Errorf("%+v was decided, and nobody can carry it out", r.cutOffs())
			}
		})
	})
	t.Run("after it", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			var hooked *hookedStore
			r, d := cutRig(t, func(r *rig) {
				r.wrap = func(s store.Store) store.Store { hooked = &hookedStore{Store: s}; return hooked }
			})
			d.set(func() { d.came = func() providers.Death { return providers.Death{Err: providers.ErrAway} } })
			r.yaml = without(r.yaml)
			next := r.snapshot()
			hooked.before(func() { // the reload has looked, and commits
				if _, err := r.cut(false); err != nil {
					t.Error(err)
				}
			})
			if err := r.engine.Load(bg, next, "test"); err != nil {
				t.Fatal(err)
			}
			r.wantReason(r.engine.Load(bg, next, "test"), broker.ReasonConflict)
			d.set(func() { d.came = nil })
			time.Sleep(2 * time.Minute)
			if c := r.cutOffs(); len(c) != 1 || c[0].Progress != broker.ProgressVerified {
				t.Errorf("%+v", c)
			}
			if err := r.engine.Load(bg, next, "test"); err != nil {
				t.Error(err)
			}
		})
	})
}

// TestCutOffAfterAReloadOfUnknownOutcome: the store may have another catalog
// than the broker. Nothing is given until that is clear; ending goes on.
func TestCutOffAfterAReloadOfUnknownOutcome(t *testing.T) {
	bubble(t, func(t *testing.T) {
		faulty := &faultyStore{}
		r, _ := cutRig(t, func(r *rig) { r.wrap = faulty.wrap })
		l := r.mustIssue("cloud.read")
		faulty.failNth(1, true)
		r.wantReason(r.engine.Load(bg, r.snapshot(), "test"), broker.ReasonStore)
		_, err := r.issue("cloud.write")
		r.wantReason(err, broker.ReasonConflict)
		if c, err := r.cut(false); err != nil || c.Progress != broker.ProgressVerified {
			t.Errorf("%+v, %v", c, err)
		}
		r.wantState(l.Lease.ID, broker.LeaseRevoked, time.Minute)
	})
}

// hookedStore is a store that calls something before, or after, its next commit.
type hookedStore struct {
	store.Store
	mu         sync.Mutex
	next, then func()
}

func (h *hookedStore) before(do func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.next = do
}

func (h *hookedStore) Update(ctx context.Context, fn func(store.Txn) error) error {
	h.mu.Lock()
	do, then := h.next, h.then
	h.next, h.then = nil, nil
	h.mu.Unlock()
	if do != nil {
		do()
	}
	err := h.Store.Update(ctx, fn)
	if then != nil {
		then()
	}
	return err
}

// TestCutOffAndAClockThatIsSetBack: a clock that ran ahead when a role was cut
// off does not hold new leases back for as long as it did.
func TestCutOffAndAClockThatIsSetBack(t *testing.T) {
	for name, theirs := range map[string]time.Duration{"measured by the provider's clock": 0, "by ours": 10 * time.Hour} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				w := &wall{}
				r, d := cutRig(t, func(r *rig) { r.tune = func(c *lease.Config) { c.Wall = w.now } })
				w.set(10 * time.Hour)
				r.restart()
				d.set(func() {
					d.plan = func(role string) (providers.Cut, error) {
						cut := planned(role, w.now())
						cut.Before = time.Now().Add(theirs + cutReach)
						return cut, nil
					}
				})
				if _, err := r.cut(false); err != nil {
					t.Fatal(err)
				}
				was := r.cutOffs()[0].Cut
				time.Sleep(20 * time.Second) // the mark is written
				w.set(0)
				r.stop()
				r.openStore()
				if _, err := lease.AcceptClock(bg, r.db, w.now(), "host:root", slog.New(slog.DiscardHandler)); err != nil {
					t.Fatal(err)
				}
				if err := r.db.Close(); err != nil {
					t.Fatal(err)
				}
				r.start()
				is := r.cutOffs()[0].Cut
				if !is.Before.Equal(was.Before) || !is.Until.Equal(was.Until) {
					t.Errorf("%+v; it was %+v", is, was)
				}
				r.grant(support, "cloud.read", 12*time.Hour)
				_, err := r.issue("cloud.read")
				r.wantReason(err, broker.ReasonProvider)
				time.Sleep(cutClear + time.Second)
				_, err = r.issue("cloud.read")
				if theirs == 0 && err != nil {
					t.Errorf("a session that works is not made: %v", err)
				}
				if theirs != 0 {
					r.wantReason(err, broker.ReasonProvider) // it would not work
				}
			})
		})
	}
}

// TestCutOffByOurClocks: where the provider does not tell its time, a cut-off
// reaches up to now by whichever of our clocks is right; where it does, ours
// say nothing of what ends.
func TestCutOffByOurClocks(t *testing.T) {
	for name, c := range map[string]struct{ off, reach time.Duration }{
		"a step back":     {-2 * time.Hour, 0},
		"a long way back": {-20 * 365 * 24 * time.Hour, 0},
		"a step forward":  {2 * time.Hour, 2 * time.Hour},
		"one that ran":    {20 * 365 * 24 * time.Hour, 12 * time.Hour},
	} {
		for _, ours := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, ours %v", name, ours), func(t *testing.T) {
				bubble(t, func(t *testing.T) {
					w := &wall{}
					r, d := cutRig(t, func(r *rig) { r.tune = func(c *lease.Config) { c.Wall = w.now } })
					began := time.Now()
					w.set(c.off)
					d.set(func() {
						d.plan = func(role string) (providers.Cut, error) {
							cut := planned(role, began.Add(min(c.off, 0))) // by the earlier clock
							if cut.Ours = ours; !ours {
								cut.Before = began.Add(cutReach)
							}
							return cut, nil
						}
					})
					cut, err := r.cut(true)
					if err != nil {
						t.Fatal(err)
					}
					want := began.Add(cutReach)
					if ours {
						want = want.Add(c.reach)
					}
					if !cut.Cut.Before.Equal(want) {
						t.Errorf("it ends what was made up to %s; want %s", cut.Cut.Before, want)
					}
					if hold := cut.Cut.Clear.Sub(cut.Cut.Before); ours && hold != cutClear-cutReach || cut.Cut.Clear.Before(began.Add(cutClear)) {
						t.Errorf("new leases are held back until %s, which is %s later", cut.Cut.Clear, hold)
					}
				})
			})
		}
	}
}

// TestCutOffCostsNoUse: a lease that was being made when its role was cut off,
// or when somebody ended it, has cost its agent nothing of a counted grant.
func TestCutOffCostsNoUse(t *testing.T) {
	for name, end := range map[string]func(r *rig, id broker.LeaseID) error{
		"cut off": func(r *rig, _ broker.LeaseID) error { _, err := r.cut(false); return err },
		"revoked": func(r *rig, id broker.LeaseID) error {
			_, err := r.engine.RevokeLease(bg, as(sam), id, "a mistake")
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				r, _ := cutRig(t)
				r.grant(other, "cloud.read", time.Hour, func(g *lease.GrantRequest) { g.MaxUses = 1 })
				r.asked.SetScript(providertest.Rules(1, providertest.Rule{Op: providertest.OpCreate, Times: 1, Fault: providertest.Fault{Delay: 3 * time.Second}}))
				flying := make(chan error)
				issue := func() error {
					d, err := r.engine.Issue(bg, as(other), lease.IssueRequest{Tool: "cloud.read"})
					if err == nil {
						d.Done()
					}
					return err
				}
				go func() { flying <- issue() }()
				time.Sleep(time.Second)
				id := r.events(lease.EventFilter{Type: audit.LeaseIntended})[0].Lease
				if err := end(r, id); err != nil {
					t.Fatal(err)
				}
				r.wantReason(<-flying, map[string]broker.Reason{"cut off": broker.ReasonProvider, "revoked": broker.ReasonNoGrant}[name])
				r.wantState(id, broker.LeaseRevoked, time.Minute)
				time.Sleep(cutClear)
				if err := issue(); err != nil {
					t.Errorf("the use is not given back: %v", err)
				}
				r.wantReason(issue(), broker.ReasonGrantUsed)
			})
		})
	}
}

// TestCutOffHandsNothingOutAgain: from the decision on what falls under it is
// not handed out again either, although its lease was not told yet.
func TestCutOffHandsNothingOutAgain(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var hooked *hookedStore
		r, _ := cutRig(t, func(r *rig) {
			r.wrap = func(s store.Store) store.Store { hooked = &hookedStore{Store: s}; return hooked }
		})
		l := r.mustIssue("cloud.read", key("k")).Lease
		if again := r.mustIssue("cloud.read", key("k")); again.Lease.ID != l.ID {
			t.Fatal("it is not given again")
		}
		asked := false
		hooked.mu.Lock()
		hooked.then = func() {
			asked = true
			if n := len(r.keys("cutoff|")); n != 1 || r.lease(l.ID).State != broker.LeaseActive {
				t.Fatalf("%d decisions, and the lease is %s", n, r.lease(l.ID).State)
			}
			if _, usable, err := r.engine.Usable(bg, l.ID); err != nil || usable {
				t.Errorf("it is said to be usable, %v", err)
			}
			_, err := r.issue("cloud.read", key("k"))
			r.wantReason(err, broker.ReasonSecretGone)
		}
		hooked.mu.Unlock()
		if _, err := r.cut(false); err != nil {
			t.Fatal(err)
		}
		if !asked {
			t.Fatal("nobody asked")
		}
		r.wantState(l.ID, broker.LeaseRevoked, time.Minute)
	})
}
