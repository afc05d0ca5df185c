package lease_test

import (
	"context"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/audit"
	"github.com/mayfly-security/mayfly/broker/lease"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/providertest"
)

// inventoryRig is a rig whose providers planned and recorded list what they
// have. around, if not nil, may put something around their lists.
func inventoryRig(t testing.TB, around func(ctx context.Context, provider string, list func() ([]providers.Found, error)) ([]providers.Found, error), options ...func(*rig)) *rig {
	t.Helper()
	r := newRig(t, options...)
	r.stop()
	r.drivers["world"] = aroundDriver{providertest.Inventoried{Driver: providertest.Driver{System: r.world}}, around}
	r.start()
	return r
}

type aroundDriver struct {
	providertest.Inventoried
	around func(ctx context.Context, provider string, list func() ([]providers.Found, error)) ([]providers.Found, error)
}

func (d aroundDriver) Open(ctx context.Context, config providers.Config) (providers.Provider, error) {
	p, err := d.Inventoried.Open(ctx, config)
	if err != nil || d.around == nil {
		return p, err
	}
	a := aroundList{p.(providers.Inventory), config.Name, d}
	if planner, ok := p.(providers.Planner); ok {
		return struct {
			providers.Provider
			providers.Planner
			aroundList
		}{p, planner, a}, nil
	}
	return struct {
		providers.Provider
		aroundList
	}{p, a}, nil
}

type aroundList struct {
	providers.Inventory
	name string
	d    aroundDriver
}

func (a aroundList) List(ctx context.Context) ([]providers.Found, error) {
	return a.d.around(ctx, a.name, func() ([]providers.Found, error) { return a.Inventory.List(ctx) })
}

func (r *rig) nameOf(id broker.LeaseID) string {
	return providertest.NameOf(r.engine.InstallationID(), id)
}

func (r *rig) strays() []lease.Stray {
	r.t.Helper()
	p, err := r.engine.Strays(context.Background(), as(sam), "", 0)
	if err != nil {
		r.t.Fatal(err)
	}
	return p.Items
}

// registry has the metrics of a rig's engine, also after a restart.
type registry struct{ now *prometheus.Registry }

func (g *registry) use(r *rig) {
	r.tune = func(c *lease.Config) { g.now = prometheus.NewRegistry(); c.Metrics = g.now }
}

// gauge is the metric's values by its labels' values.
func (r *rig) gauge(reg *registry, name string) map[string]float64 {
	r.t.Helper()
	all, err := reg.now.Gather()
	if err != nil {
		r.t.Fatal(err)
	}
	values := map[string]float64{}
	for _, f := range all {
		if f.GetName() != name {
			continue
		}
		for _, m := range f.GetMetric() {
			var labels []string
			for _, l := range m.GetLabel() {
				labels = append(labels, l.GetValue())
			}
			values[strings.Join(labels, ",")] = m.GetGauge().GetValue() + m.GetCounter().GetValue()
		}
	}
	return values
}

// TestStraysOfEndedLeases: what a provider lost track of, made or left after
// its lease was said to be over, is ended within a minute; live leases are
// left alone; each thing is in the evidence once.
func TestStraysOfEndedLeases(t *testing.T) {
	bubble(t, func(t *testing.T) {
		reg := &registry{}
		r := inventoryRig(t, nil, reg.use)
		ctx := context.Background()
		r.grant(support, "db.read", 12*time.Hour)
		r.grant(support, "vault.read", 12*time.Hour)
		alive := r.mustIssue("db.read", ttl(15*time.Minute))
		late := r.mustIssue("db.read")
		short := r.mustIssue("db.read", ttl(30*time.Second))
		if l, err := r.engine.RevokeLease(ctx, as(sam), late.Lease.ID, ""); err != nil || l.State != broker.LeaseRevoked {
			t.Fatalf("%s, %v", l.State, err)
		}
		// Something of it appears after all.
		r.world.Plant(providertest.Credential{Name: r.nameOf(late.Lease.ID), Secret: "came late", DiesAt: time.Now().Add(time.Hour)})
		r.world.Plant(providertest.Credential{Name: "another installation's", Secret: "foreign", DiesAt: time.Now().Add(time.Hour)})
		r.world.Plant(providertest.Credential{Name: string(broker.NewInstallationID(time.Now())) + "-" + string(late.Lease.ID), Secret: "neighbour", DiesAt: time.Now().Add(time.Hour)})
		time.Sleep(61 * time.Second)
		if r.world.Works("came late") {
			t.Error("what appeared after the end still works a minute later")
		}
		time.Sleep(time.Minute) // short has expired, and what is left of it is removed
		if l := r.lease(short.Lease.ID); l.State != broker.LeaseRevoked && l.State != broker.LeaseExpired {
			t.Fatalf("the short lease is %s", l.State)
		}
		if r.world.There(r.nameOf(short.Lease.ID)) {
			t.Error("what was left of an expired lease is still there")
		}
		if !r.world.Works("foreign") || !r.world.Works("neighbour") {
			t.Error("something of another's was removed")
		}
		if !r.world.Works(alive.Secret.RevealAll()["password"]) || r.lease(alive.Lease.ID).State != broker.LeaseActive {
			t.Error("a live lease was not left alone")
		}
		for _, what := range []audit.Type{audit.StrayFound, audit.StrayRemoved} {
			events := r.events(lease.EventFilter{Lease: late.Lease.ID, Type: what})
			if len(events) != 1 {
				t.Fatalf("%d events %s", len(events), what)
			}
			if ev := events[0]; ev.Actor != audit.Broker || ev.Cause != lease.StrayEnded || ev.Provider != "planned" ||
				ev.Tool != "db.read" || ev.Agent != support.String() || ev.Grant != late.Lease.Grant || ev.Details["name"] != r.nameOf(late.Lease.ID) {
				t.Errorf("%s: %+v", what, ev)
			}
		}
		if n := len(r.events(lease.EventFilter{Lease: alive.Lease.ID, Type: audit.StrayFound})); n != 0 {
			t.Errorf("a live lease was found to be a stray %d times", n)
		}
		if got := r.gauge(reg, "mayfly_strays_removed_total"); got["planned,"+lease.StrayEnded] < 1 {
			t.Errorf("removed: %v", got)
		}
		if got := r.gauge(reg, "mayfly_strays"); got["planned"] != 0 || len(got) != 2 {
			t.Errorf("strays: %v", got)
		}
		if got := r.gauge(reg, "mayfly_inventory_last_success_timestamp_seconds"); len(got) != 2 || got["planned"] < float64(time.Now().Add(-time.Minute).Unix()) {
			t.Errorf("last looks: %v", got)
		}
		if len(r.strays()) != 0 {
			t.Errorf("left: %+v", r.strays())
		}

		// One that was forgotten is ended, too, once it is found.
		r.world.SetScript(never)
		lost := r.mustIssue("db.read")
		if _, err := r.engine.RevokeLease(ctx, as(sam), lost.Lease.ID, ""); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		if _, err := r.engine.ForgetLease(ctx, as(sam), lost.Lease.ID, "no patience"); err != nil {
			t.Fatal(err)
		}
		time.Sleep(61 * time.Second)
		if r.world.There(r.nameOf(lost.Lease.ID)) {
			t.Error("what was forgotten is still there")
		}
		if l := r.lease(lost.Lease.ID); l.State != broker.LeaseLapsed {
			t.Errorf("the forgotten lease is %s", l.State)
		}
	})
}

// TestStraysOfUnknownLeases: what nobody here knows is listed for a decision,
// once, and ended by nobody but an operator, with a reason, or by itself.
func TestStraysOfUnknownLeases(t *testing.T) {
	bubble(t, func(t *testing.T) {
		reg := &registry{}
		r := inventoryRig(t, nil, reg.use)
		ctx := context.Background()
		lives, dies, dead := broker.NewLeaseID(time.Now()), broker.NewLeaseID(time.Now()), broker.NewLeaseID(time.Now())
		r.world.Plant(providertest.Credential{Name: r.nameOf(lives), Secret: "lives", DiesAt: time.Now().Add(24 * time.Hour)})
		r.world.Plant(providertest.Credential{Name: r.nameOf(dies), Secret: "dies", DiesAt: time.Now().Add(5 * time.Minute)})
		r.world.Plant(providertest.Credential{Name: r.nameOf(dead), Secret: "dead", DiesAt: time.Now().Add(-time.Hour)})
		odd := string(r.engine.InstallationID()) + "-no lease | at all"
		r.world.Plant(providertest.Credential{Name: odd, Secret: "odd", DiesAt: time.Now().Add(24 * time.Hour)})
		hostile := string(r.engine.InstallationID()) + "-\x1b[2J"
		r.world.Plant(providertest.Credential{Name: hostile, Secret: "hostile", DiesAt: time.Now().Add(24 * time.Hour)})
		time.Sleep(3 * time.Minute)

		if r.world.There(r.nameOf(dead)) {
			t.Error("what had died is still there")
		}
		if n := len(r.events(lease.EventFilter{Lease: dead, Type: audit.StrayRemoved})); n != 1 {
			t.Errorf("%d events of its removal", n)
		}
		all := r.strays()
		if len(all) != 3 {
			t.Fatalf("%d strays: %+v", len(all), all)
		}
		for _, s := range all {
			if s.Provider != "planned" || s.Why != lease.StrayUnknown || s.Kind != "credential" || s.FoundAt.IsZero() || s.DiesAt.IsZero() || s.EndedBy != "" {
				t.Errorf("%+v", s)
			}
			if s.Name == r.nameOf(lives) && s.Lease != lives || s.Name == odd && s.Lease != "" {
				t.Errorf("of lease %q: %+v", s.Lease, s)
			}
		}
		// The one with the name that cannot be shown is counted, and not listed.
		if got := r.gauge(reg, "mayfly_strays"); got["planned"] != 4 {
			t.Errorf("strays: %v", got)
		}
		if n := len(r.events(lease.EventFilter{Type: audit.StrayFound})); n != 4 { // lives, dies, dead and odd
			t.Errorf("%d were found, by the evidence, after three looks", n)
		}
		for _, secret := range []string{"lives", "dies", "odd", "hostile"} {
			if !r.world.Works(secret) {
				t.Errorf("%q was ended without a decision", secret)
			}
		}
		// Pages.
		var paged []string
		for after := ""; ; {
			p, err := r.engine.Strays(ctx, as(sam), after, 1)
			if err != nil || len(p.Items) > 1 {
				t.Fatal(err, len(p.Items))
			}
			for _, s := range p.Items {
				paged = append(paged, s.Name)
			}
			if after = p.Next; after == "" {
				break
			}
		}
		if len(paged) != 3 {
			t.Errorf("page by page: %q", paged)
		}

		// Who may.
		for _, who := range []broker.Caller{as(support), as(pager)} {
			_, err := r.engine.Strays(ctx, who, "", 0)
			r.wantReason(err, broker.ReasonPermissionDenied)
			_, _, err = r.engine.EndStray(ctx, who, "planned", r.nameOf(lives), "because")
			r.wantReason(err, broker.ReasonPermissionDenied)
		}
		end := func(provider, name, reason string) (lease.Stray, bool, error) {
			return r.engine.EndStray(ctx, as(sam), provider, name, reason)
		}
		_, _, err := end("planned", r.nameOf(lives), "")
		r.wantReason(err, broker.ReasonInvalidArgument)
		for _, name := range []string{"postgres", "", strings.Repeat("x", 2000), hostile, r.nameOf(dead)} {
			_, _, err = end("planned", name, "because")
			r.wantReason(err, broker.ReasonNotFound)
		}
		for _, provider := range []string{"nobody", "recorded", "planned|x", strings.Repeat("x", 2000)} {
			_, _, err = end(provider, r.nameOf(lives), "because")
			r.wantReason(err, broker.ReasonNotFound)
		}
		_, _, err = end("tokens", r.nameOf(lives), "because")
		r.wantReason(err, broker.ReasonConflict)
		if !r.world.Works("lives") {
			t.Fatal("it was ended by a call that was refused")
		}

		s, removed, err := end("planned", r.nameOf(lives), "nobody knows it")
		if err != nil || !removed || s.EndedBy != sam.String() {
			t.Fatalf("%+v, %v, %v", s, removed, err)
		}
		if r.world.Works("lives") || r.world.There(r.nameOf(lives)) {
			t.Error("it still works")
		}
		for _, what := range []audit.Type{audit.StrayEnding, audit.StrayRemoved} {
			events := r.events(lease.EventFilter{Lease: lives, Type: what})
			if len(events) != 1 || events[0].Actor != sam.String() || events[0].Reason != "nobody knows it" || events[0].Details["name"] != r.nameOf(lives) {
				t.Errorf("%s: %+v", what, events)
			}
		}
		if _, removed, err := end("planned", odd, "odd"); err != nil || !removed || r.world.Works("odd") {
			t.Errorf("the odd one: %v, %v", removed, err)
		}

		// The decision stands while the provider is away.
		again := broker.NewLeaseID(time.Now())
		r.world.Plant(providertest.Credential{Name: r.nameOf(again), Secret: "again", DiesAt: time.Now().Add(24 * time.Hour)})
		time.Sleep(61 * time.Second)
		r.world.SetScript(providertest.Rules(1, providertest.Rule{Op: providertest.OpRemove, Fault: providertest.Fault{Effect: providertest.FailBefore}}))
		if s, removed, err := end("planned", r.nameOf(again), "later, then"); err != nil || removed || s.EndedBy == "" {
			t.Errorf("%+v, %v, %v", s, removed, err)
		}
		r.restart()
		if !r.world.Works("again") {
			t.Fatal("the test is of one that could not be removed")
		}
		r.world.SetScript(nil)
		time.Sleep(30 * time.Second)
		if r.world.Works("again") {
			t.Error("the decision was not carried out when the provider was back")
		}

		// One dies by itself, and is removed.
		time.Sleep(2 * time.Minute)
		if r.world.There(r.nameOf(dies)) || len(r.strays()) != 0 {
			t.Errorf("left: %+v", r.strays())
		}
		if n := len(r.events(lease.EventFilter{Lease: dies, Type: audit.StrayFound})); n != 1 {
			t.Errorf("it was found %d times", n)
		}

		// One that goes by other hands is resolved.
		gone := broker.NewLeaseID(time.Now())
		r.world.Plant(providertest.Credential{Name: r.nameOf(gone), Secret: "gone", DiesAt: time.Now().Add(24 * time.Hour), EndedAt: time.Now().Add(90 * time.Second)})
		time.Sleep(3 * time.Minute)
		if events := r.events(lease.EventFilter{Lease: gone, Type: audit.StrayRemoved}); len(events) != 1 || events[0].Details["how"] != "gone" {
			t.Errorf("%+v", events)
		}
	})
}

// TestStraysAreBounded: what cannot all be listed is counted.
func TestStraysAreBounded(t *testing.T) {
	bubble(t, func(t *testing.T) {
		reg := &registry{}
		r := inventoryRig(t, nil, reg.use)
		for i := range 1200 {
			r.world.Plant(providertest.Credential{Name: fmt.Sprintf("%s-%d", r.engine.InstallationID(), i), DiesAt: time.Now().Add(24 * time.Hour)})
		}
		time.Sleep(3 * time.Minute)
		if n := len(r.strays()); n != 100 { // a page
			t.Errorf("%d on a page", n)
		}
		p, err := r.engine.Strays(context.Background(), as(sam), "", 1000)
		if err != nil || len(p.Items) != 1000 || p.Next != "" {
			t.Errorf("%d listed, next %q, %v", len(p.Items), p.Next, err)
		}
		if got := r.gauge(reg, "mayfly_strays"); got["planned"] != 1200 {
			t.Errorf("strays: %v", got)
		}
	})
}

// TestALeaseThatEndsDuringALook is no stray: the list is older than its end.
func TestALeaseThatEndsDuringALook(t *testing.T) {
	bubble(t, func(t *testing.T) {
		listed, goOn := make(chan struct{}, 10), make(chan struct{})
		r := inventoryRig(t, func(_ context.Context, provider string, list func() ([]providers.Found, error)) ([]providers.Found, error) {
			found, err := list()
			if provider == "planned" && len(found) > 0 {
				listed <- struct{}{}
				<-goOn
			}
			return found, err
		})
		r.grant(support, "db.read", time.Hour)
		id := r.mustIssue("db.read").Lease.ID
		<-listed
		if l, err := r.engine.RevokeLease(context.Background(), as(sam), id, ""); err != nil || l.State != broker.LeaseRevoked {
			t.Fatalf("%s, %v", l.State, err)
		}
		close(goOn)
		time.Sleep(3 * time.Minute)
		if events := r.events(lease.EventFilter{Type: audit.StrayFound}); len(events) != 0 {
			t.Errorf("the evidence says that strays were found: %+v", events)
		}
	})
}

// TestAProviderThatDoesNotReturnHoldsUpNobody: its list never comes, whatever
// its time limit says; the other's strays are found, leases of both are made
// and ended, no second call is made, and the engine closes.
func TestAProviderThatDoesNotReturnHoldsUpNobody(t *testing.T) {
	bubble(t, func(t *testing.T) {
		release := make(chan struct{})
		defer close(release)
		var calls atomic.Int64
		r := inventoryRig(t, func(_ context.Context, provider string, list func() ([]providers.Found, error)) ([]providers.Found, error) {
			if provider == "recorded" {
				calls.Add(1)
				<-release
			}
			return list()
		})
		stray := broker.NewLeaseID(time.Now())
		r.world.Plant(providertest.Credential{Name: r.nameOf(stray), Secret: "s", DiesAt: time.Now().Add(24 * time.Hour)})
		time.Sleep(10 * time.Minute)
		if len(r.strays()) != 1 {
			t.Errorf("%d strays", len(r.strays()))
		}
		if n := calls.Load(); n != 1 {
			t.Errorf("%d lists were asked for, although the first has not returned", n)
		}
		for _, tool := range []string{"vault.read", "db.read"} {
			r.grant(support, tool, time.Hour)
			id := r.mustIssue(tool).Lease.ID
			if l, err := r.engine.RevokeLease(context.Background(), as(sam), id, ""); err != nil || l.State != broker.LeaseRevoked {
				t.Errorf("%s: %s, %v", tool, l.State, err)
			}
		}
		if !strings.Contains(string(r.logs.Bytes()), "did not answer in 1m0s") {
			t.Error("the log does not say that it did not answer")
		}
		// Another configuration is another provider, and is asked.
		if err := r.reload("{mode: recorded, mint_timeout: 10s", "{mode: recorded, mint_timeout: 11s"); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Minute)
		if n := calls.Load(); n != 2 {
			t.Errorf("after a reload %d lists were asked for", n)
		}
		start := time.Now()
		r.stop()
		if took := time.Since(start); took > 5*time.Second {
			t.Errorf("closing took %s", took)
		}
	})
}

// TestInventoryWhileTheStoreIsFull: what is over is ended although the store
// cannot be told; it is told when it can.
func TestInventoryWhileTheStoreIsFull(t *testing.T) {
	bubble(t, func(t *testing.T) {
		full := &faultyStore{}
		r := inventoryRig(t, nil, func(r *rig) { r.wrap = full.wrap })
		r.grant(support, "db.read", time.Hour)
		id := r.mustIssue("db.read").Lease.ID
		if l, err := r.engine.RevokeLease(context.Background(), as(sam), id, ""); err != nil || l.State != broker.LeaseRevoked {
			t.Fatalf("%s, %v", l.State, err)
		}
		full.failAll(true)
		r.world.Plant(providertest.Credential{Name: r.nameOf(id), Secret: "late", DiesAt: time.Now().Add(time.Hour)})
		time.Sleep(2 * time.Minute)
		if r.world.Works("late") {
			t.Error("it still works: ending waited for evidence")
		}
		full.failAll(false)
		time.Sleep(2 * time.Minute)
		for _, what := range []audit.Type{audit.StrayFound, audit.StrayRemoved} {
			if n := len(r.events(lease.EventFilter{Lease: id, Type: what})); n != 1 {
				t.Errorf("%d events %s", n, what)
			}
		}
	})
}
