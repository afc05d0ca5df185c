package awssts

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/sts"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/awssts/denylist"
	"github.com/mayfly-security/mayfly/providers/awssts/fakeaws"
)

// planCut plans a cut-off and puts it into the store, as the engine does.
func (w *world) planCut(p *provider) providers.Cut {
	w.t.Helper()
	cut, err := p.PlanCutOff(w.t.Context(), arn("crm0"))
	if err != nil {
		w.t.Fatal(err)
	}
	w.store.setCuts(cut)
	return cut
}

// cutOff carries a cut-off out as the engine does, until it is verified.
func (w *world) cutOff(p *provider, cut providers.Cut) providers.Death {
	w.t.Helper()
	for range 100 {
		d := p.CutOff(w.t.Context(), cut)
		if d.Err != nil || d.Progress == broker.ProgressVerified {
			return d
		}
		w.clock.Set(d.RetryAt)
		w.clock.Advance(time.Millisecond)
	}
	w.t.Fatal("it is never verified")
	return providers.Death{}
}

// others is a session of the role that somebody else made.
func (w *world) others(p *provider) string {
	w.t.Helper()
	out, err := p.clients.sts.AssumeRole(w.t.Context(), &sts.AssumeRoleInput{RoleArn: aws.String(arn("crm0")), RoleSessionName: aws.String("bob"), DurationSeconds: aws.Int32(43200)})
	if err != nil {
		w.t.Fatal(err)
	}
	return *out.Credentials.AccessKeyId
}

// compare compares with IAM n times, which tidies.
func (w *world) compare(p *provider, n int, every time.Duration) {
	w.t.Helper()
	for range n {
		if err := p.reconcile(w.t.Context()); err != nil {
			w.t.Fatal(err)
		}
		w.clock.Advance(every)
	}
}

func (w *world) cutsIn(role string) (n int) {
	for e := range w.stored(role) {
		if e.Kind == denylist.CutOff {
			n++
		}
	}
	return n
}

// TestCutOff: every older session of the role ends, whoever made it, and is said
// to have once a probe was seen to be denied; leases are made again when they
// work, and not before.
func TestCutOff(t *testing.T) {
	w := newWorld(t, faking(func(c *fakeaws.Config) { c.Force = func(int) time.Duration { return 7 * time.Second } }))
	p := w.open()
	a, bob := w.mint(p, time.Hour, ""), w.others(p)
	cut := w.planCut(p)
	if w.cutsIn("crm0") != 0 || !w.fake.Works(a.key) {
		t.Fatal("planning did something")
	}
	if !strings.Contains(cut.Others, arn("crm0")) {
		t.Errorf("it says %q", cut.Others)
	}
	room, _ := p.roomLocked(p.writer(arn("crm0")), w.clock.Now())
	d := p.CutOff(t.Context(), cut)
	if d.Err != nil || d.Progress != broker.ProgressWritten || d.RetryAt.IsZero() || w.cutsIn("crm0") != 1 {
		t.Fatalf("%+v", d)
	}
	if left, _ := p.roomLocked(p.writer(arn("crm0")), w.clock.Now()); room-left < denylist.CutOffCost/sessionCost {
		t.Errorf("there is room for %d leases, and was for %d", left, room)
	}
	if !w.fake.Works(a.key) {
		t.Fatal("the fake has it in force already")
	}
	for w.clock.Now().Before(cut.Clear) {
		_, err := w.try(p, time.Hour, "")
		var refusal *broker.Error
		if !errors.As(err, &refusal) || refusal.Reason != broker.ReasonProvider || !strings.Contains(refusal.Next, "try again in") {
			t.Fatalf("a lease that would not work: %v", err)
		}
		w.clock.Advance(500 * time.Millisecond)
	}
	d = w.cutOff(p, cut)
	if d.Progress != broker.ProgressVerified || d.Err != nil || !strings.Contains(d.Left, "STS in eu-central-1") {
		t.Fatalf("%+v", d)
	}
	if w.fake.Works(a.key) || w.fake.Works(bob) {
		t.Error("one works after it was verified")
	}
	b := w.mint(p, time.Hour, "")
	if !w.fake.Works(b.key) || !w.fake.Works(w.others(p)) {
		t.Error("a new session is dead")
	}
	// The leases that it hit are dead with it, and need no writing of their own.
	n := w.fake.Count("PutRolePolicy")
	if d := w.revoke(p, a, broker.CauseCutOff); d.Progress != broker.ProgressVerified || d.Err != nil || w.stands(a) || w.fake.Count("PutRolePolicy") != n {
		t.Errorf("%+v, %d writes", d, w.fake.Count("PutRolePolicy")-n)
	}
	// To ask again changes nothing, and neither do comparisons.
	for range 3 {
		if d := p.CutOff(t.Context(), cut); d.Progress != broker.ProgressVerified {
			t.Errorf("%+v", d)
		}
		w.compare(p, 1, 2*time.Minute)
	}
	if got := w.fake.Count("PutRolePolicy"); got > n+1 { // the probe's entry goes
		t.Errorf("%d writes more", got-n)
	}
	if !w.fake.Works(b.key) {
		t.Error("the new lease is dead")
	}
}

func TestPlanCutOffRefuses(t *testing.T) {
	w := newWorld(t)
	p := w.open()
	off := newWorld(t, early(`{"mode":"off"}`)).open()
	for name, c := range map[string]struct {
		p    *provider
		role string
		want broker.Reason
	}{
		"a foreign account": {p, "arn:aws:iam::999999999999:role/mayfly/x", broker.ReasonInvalidArgument},
		"no ARN":            {p, "crm0", broker.ReasonInvalidArgument},
		"nothing":           {p, "", broker.ReasonInvalidArgument},
		"another path":      {p, "arn:aws:iam::123456789012:role/admin", broker.ReasonInvalidArgument},
		"not in AWS":        {p, arn("gone"), broker.ReasonNotFound},
		"no deny list":      {off, arn("crm0"), broker.ReasonConflict},
	} {
		_, err := c.p.PlanCutOff(t.Context(), c.role)
		var refusal *broker.Error
		if !errors.As(err, &refusal) || refusal.Reason != c.want || refusal.Next == "" {
			t.Errorf("%s: %v; want %s", name, err, c.want)
		}
		if c.want == broker.ReasonNotFound {
			continue // it may be there by the time it is carried out
		}
		if d := c.p.CutOff(t.Context(), providers.Cut{Role: c.role, Before: w.clock.Now(), Until: w.clock.Now().Add(time.Hour)}); d.Err == nil || d.Progress != "" {
			t.Errorf("%s: %+v", name, d)
		}
	}
	if len(w.fake.Policies("crm0")) != 0 {
		t.Error("something was written")
	}
}

// TestCutOffRoles: a tool's roles are those of its pool; a lease's is in its handle.
func TestCutOffRoles(t *testing.T) {
	w := newWorld(t, roles(2))
	p := w.open()
	if got := p.Roles(w.tool()); len(got) != 2 || got[0] != arn("crm0") || got[1] != arn("crm1") {
		t.Errorf("%q", got)
	}
	if got := p.Roles(broker.Tool{Scope: []byte(`{}`)}); got != nil {
		t.Errorf("%q", got)
	}
	l := w.mint(p, time.Hour, "")
	if r := p.RoleOf(l.ending); r != arn("crm0") && r != arn("crm1") {
		t.Errorf("%q", r)
	}
	for _, none := range []providers.Handle{nil, []byte("x")} {
		if r := p.RoleOf(providers.Ending{Handle: none}); r != "" {
			t.Errorf("%q", r)
		}
	}
	// One role is cut off: its pool goes on with the other.
	cut := w.planCut(p)
	if d := p.CutOff(t.Context(), cut); d.Err != nil {
		t.Fatal(d.Err)
	}
	for range 4 {
		l := w.mint(p, time.Hour, "")
		if p.RoleOf(l.ending) != arn("crm1") || !w.fake.Works(l.key) {
			t.Errorf("it is of %s, and works: %v", p.RoleOf(l.ending), w.fake.Works(l.key))
		}
	}
}

// TestCutOffClocks: whatever our clock says, sessions that were made up to the
// decision end, and those that are made once they may be do not.
func TestCutOffClocks(t *testing.T) {
	for name, behind := range map[string]time.Duration{"the same": 0, "AWS behind": 90 * time.Second, "AWS ahead": -90 * time.Second, "a little behind": 700 * time.Millisecond, "a little ahead": -700 * time.Millisecond} {
		t.Run(name, func(t *testing.T) {
			for _, part := range []time.Duration{0, 400 * time.Millisecond, 999 * time.Millisecond} {
				w := newWorld(t)
				w.clock.behind = behind
				w.clock.Advance(part)
				p := w.open()
				old := w.others(p)
				cut := w.planCut(p)
				just := w.others(p) // between the plan and the decision
				if d := w.cutOff(p, cut); d.Err != nil {
					t.Fatal(d.Err)
				}
				if w.fake.Works(old) || w.fake.Works(just) {
					t.Error("an older session works")
				}
				if hold := cut.Clear.Sub(w.clock.Now()); hold > 10*time.Second {
					t.Errorf("leases are held back for %s", hold)
				}
				w.clock.Set(cut.Clear)
				if !w.fake.Works(w.mint(p, 30*time.Minute, "").key) {
					t.Error("a new lease is dead")
				}
				// What lives longest of the old is dead by itself once it need not stand.
				if until := w.fake.Session(just).Expires.Add(behind); cut.Until.Before(until) {
					t.Errorf("it stands until %s, and a session lives until %s", cut.Until, until)
				}
			}
		})
	}
}

// TestCutOffAway: AWS cannot be reached. It is planned all the same, by our own
// clock and a minute further, and carried out when AWS is back.
func TestCutOffAway(t *testing.T) {
	fail := "Throttling"
	w := newWorld(t, faking(func(c *fakeaws.Config) {
		c.Fail = func(action string, _ int) (string, int) {
			if fail == "" || action == "AssumeRole" {
				return "", 0
			}
			return fail, 400
		}
	}))
	w.clock.behind = 30 * time.Second
	p := w.open()
	a := w.mint(p, time.Hour, "")
	cut := w.planCut(p)
	if reach := cut.Before.Sub(w.clock.Now()); reach < planSkew || reach > planSkew+time.Second || !cut.Ours {
		t.Errorf("it reaches %s further", reach)
	}
	for _, code := range []string{"Throttling", "AccessDenied", "LimitExceeded", "NoSuchEntity"} {
		fail = code
		if d := p.CutOff(t.Context(), cut); d.Err == nil || d.Progress != "" || errors.Is(d.Err, providers.ErrAway) != (code == "Throttling") {
			t.Errorf("%s: %+v", code, d)
		}
	}
	fail = ""
	if d := w.cutOff(p, cut); d.Err != nil || w.fake.Works(a.key) {
		t.Errorf("%+v", d)
	}
	if _, err := w.try(p, time.Hour, ""); err == nil {
		t.Error("a lease was made that would not work")
	}
	w.clock.Set(cut.Clear)
	if !w.fake.Works(w.mint(p, 30*time.Minute, "").key) {
		t.Error("a new lease is dead")
	}
}

// TestCutOffWithoutProbe: nobody says verified before all is dead by itself.
func TestCutOffWithoutProbe(t *testing.T) {
	w := newWorld(t, faking(func(c *fakeaws.Config) { c.NoProbe = true }))
	p := w.open()
	cut := w.planCut(p)
	for range 5 {
		if d := p.CutOff(t.Context(), cut); d.Err != nil || d.Progress != broker.ProgressWritten || !d.RetryAt.After(w.clock.Now()) {
			t.Fatalf("%+v", d)
		}
		w.clock.Advance(time.Hour)
	}
	w.clock.Set(cut.Until)
	if d := p.CutOff(t.Context(), cut); d.Err != nil || d.Progress != broker.ProgressVerified || !strings.Contains(d.Left, "by itself") {
		t.Errorf("%+v", d)
	}
}

// TestCutOffStands: over restarts, in a policy of the new process; verified anew
// when it is asked; and gone when nothing older lives.
func TestCutOffStands(t *testing.T) {
	w := newWorld(t)
	p := w.open()
	bob := w.others(p)
	cut := w.planCut(p)
	w.cutOff(p, cut)
	for range 3 {
		w.driver = New(nil)
		p.Close()
		p = w.open() // no lease of the role: the store's cut-off alone has it looked after
		w.compare(p, 4, 10*time.Minute)
		if w.fake.Works(bob) || w.cutsIn("crm0") != 1 {
			t.Fatal("it does not stand after a restart")
		}
	}
	if n := len(w.fake.Policies("crm0")); n != 1 {
		t.Errorf("%d policies", n)
	}
	// Somebody takes it away.
	w.clock.Advance(2 * visible)
	for name := range w.fake.Policies("crm0") {
		w.fake.SetPolicy("crm0", name, "")
	}
	if !w.fake.Works(bob) {
		t.Fatal("the test has taken nothing away")
	}
	w.compare(p, 1, 0)
	if w.fake.Works(bob) {
		t.Error("it was not repaired")
	}
	if d := w.cutOff(p, cut); d.Err != nil || d.Progress != broker.ProgressVerified {
		t.Errorf("%+v", d)
	}
	for w.clock.Now().Before(w.fake.Session(bob).Expires) {
		w.compare(p, 1, 20*time.Minute)
		if w.clock.Now().Before(w.fake.Session(bob).Expires) && w.fake.Works(bob) {
			t.Fatal("it does not stand any more")
		}
	}
	w.clock.Set(cut.Until)
	w.store.setCuts() // as the engine does
	w.compare(p, 3, 2*visible)
	if left := w.fake.Policies("crm0"); len(left) != 0 {
		t.Errorf("%v is left", left)
	}
}

// TestCutOffRestored: a store that came back from a backup knows nothing of a
// cut-off, or of an earlier one alone. What stands in IAM stays until whatever
// it denies has died by itself.
func TestCutOffRestored(t *testing.T) {
	for _, knows := range []bool{false, true} {
		w := newWorld(t)
		p := w.open()
		earlier := w.planCut(p)
		w.cutOff(p, earlier)
		w.clock.Advance(time.Hour)
		bob := w.others(p)
		w.clock.Advance(10 * time.Second)
		cut := w.planCut(p)
		w.cutOff(p, cut)
		w.store.setCuts()
		if knows {
			w.store.setCuts(earlier)
		}
		w.driver = New(nil)
		p.Close()
		p = w.open()
		l := w.mint(p, time.Hour, "")
		w.revoke(p, l, broker.CauseRevoked)
		for w.clock.Now().Before(w.fake.Session(bob).Expires) {
			w.compare(p, 1, 30*time.Minute)
			if w.clock.Now().Before(w.fake.Session(bob).Expires) && w.fake.Works(bob) {
				t.Fatalf("knows %v: a session that was cut off is alive again at %s", knows, w.clock.Now())
			}
		}
		w.store.setCuts()
		w.store.forget(l.req.Lease)
		w.clock.Advance(10 * time.Minute)
		w.compare(p, 4, landing+time.Second)
		if left := w.fake.Policies("crm0"); len(left) != 0 {
			t.Errorf("knows %v: %v is left, an hour after it need not be", knows, left)
		}
	}
}

// TestCutOffAgain: a later cut-off takes the place of an earlier one, without a
// moment in which neither is in force, and costs no more writes after it.
func TestCutOffAgain(t *testing.T) {
	w := newWorld(t, faking(func(c *fakeaws.Config) {
		c.Force = func(n int) time.Duration { return time.Duration(n%5) * 20 * time.Second }
	}))
	p := w.open()
	bob := w.others(p)
	w.cutOff(p, w.planCut(p))
	dead := func(keys ...string) {
		t.Helper()
		for _, k := range keys {
			if w.fake.Works(k) {
				t.Fatal("one that was cut off is alive")
			}
		}
	}
	for _, restart := range []bool{false, true} {
		if restart {
			w.driver = New(nil)
			p.Close()
			p = w.open()
		}
		w.clock.Advance(10 * time.Minute)
		ann := w.others(p)
		cut := w.planCut(p)
		p.CutOff(t.Context(), cut)
		for range 200 {
			d := p.CutOff(t.Context(), cut)
			dead(bob)
			if d.Progress == broker.ProgressVerified {
				break
			}
			w.clock.Advance(time.Second)
		}
		dead(bob, ann)
		for range 300 {
			w.compare(p, 1, 5*time.Second)
			dead(bob, ann)
		}
		n := w.fake.Count("PutRolePolicy")
		w.compare(p, 10, time.Minute)
		if got := w.fake.Count("PutRolePolicy") - n; got > 0 || w.cutsIn("crm0") != 1 {
			t.Errorf("%d writes in ten minutes of rest, %d cut-offs stand", got, w.cutsIn("crm0"))
		}
	}
}

// TestCutOffOfFullList: it fits into a list that is as full as it gets, and then
// empties it: leases are made again.
func TestCutOffOfFullList(t *testing.T) {
	w := newWorld(t)
	p := w.open()
	var all []*lease
	var endings []providers.Ending
	for {
		l, err := w.try(p, time.Hour, "")
		if err != nil {
			break
		}
		all = append(all, l)
		endings = append(endings, l.ending)
	}
	for _, l := range all {
		w.begin(l, broker.CauseRevoked)
	}
	for _, d := range p.Revoke(t.Context(), endings) {
		if d.Err != nil {
			t.Fatal(d.Err)
		}
	}
	w.clock.Advance(time.Minute)
	bob := w.others(p)
	cut := w.planCut(p)
	if d := w.cutOff(p, cut); d.Err != nil || w.fake.Works(bob) {
		t.Fatalf("into a list of %d: %+v", len(all), d)
	}
	for range 10 {
		w.compare(p, 1, time.Minute)
		for _, l := range all[:5] {
			if w.fake.Works(l.key) {
				t.Fatal("a lease is alive again")
			}
		}
	}
	if n := len(w.stored("crm0")); n > 2 {
		t.Errorf("%d entries stand", n)
	}
	for i := range 200 {
		if _, err := w.try(p, 30*time.Minute, ""); err != nil {
			t.Fatalf("after %d: %v", i, err)
		}
	}
	if w.fake.Most() > denylist.Quota {
		t.Errorf("the quota was exceeded: %d", w.fake.Most())
	}
}

// TestCutOffOfASharedRole: none of the providers that share a role makes a
// lease that would be dead.
func TestCutOffOfASharedRole(t *testing.T) {
	w := newWorld(t)
	p := w.open()
	opened, err := w.driver.Open(t.Context(), w.opening("other"))
	if err != nil {
		t.Fatal(err)
	}
	defer opened.Close()
	other := opened.(*provider)
	cut := w.planCut(p)
	w.store.setCuts() // they are the first provider's
	if d := p.CutOff(t.Context(), cut); d.Err != nil {
		t.Fatal(d.Err)
	}
	for _, p := range []*provider{p, other} {
		_, err := w.try(p, time.Hour, "")
		var refusal *broker.Error
		if !errors.As(err, &refusal) || refusal.Reason != broker.ReasonProvider || !strings.Contains(refusal.Next, "try again in") {
			t.Errorf("provider %s: %v", p.name, err)
		}
	}
	w.clock.Set(cut.Clear)
	for _, p := range []*provider{p, other} {
		if !w.fake.Works(w.mint(p, 30*time.Minute, "").key) {
			t.Errorf("a new lease of provider %s is dead", p.name)
		}
	}
}
