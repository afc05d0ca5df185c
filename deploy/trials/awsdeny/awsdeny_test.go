//go:build unix

package awsdeny

import (
	"maps"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/deploy/examples/story"
	"github.com/mayfly-security/mayfly/providers/awssts/awsscope"
	"github.com/mayfly-security/mayfly/providers/awssts/denylist"
)

// TestAWSDenyList tells four stories of a broker with an AWS account, each with
// a broker and an account of its own.
func TestAWSDenyList(t *testing.T) {
	bin := t.TempDir()
	if err := story.Build(t.Context(), "../../..", bin, "mayfly", "mayflyd"); err != nil {
		t.Fatal(err)
	}
	t.Run("stories", func(t *testing.T) { // bin stays until they are told
		for name, tell := range map[string]func(*rig){"incident": incident, "killed": killed, "restored": restored, "away": away} {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				tell(newRig(t, bin))
			})
		}
	})
}

func leaseEntry(k keys) denylist.Entry { return denylist.Entry{Kind: denylist.Lease, ID: k.lease} }

// incident: an agent works in an incident, gives one lease back, the incident is
// closed, another agent is disabled; each is what is denied, and when the
// sessions are dead by themselves, nothing is denied any more.
func incident(r *rig) {
	t := r.t
	// Long enough for what is told here, and over before the deny lists are
	// compared with IAM for the first time, a minute after the start.
	const ttl, later = "45s", "30s"
	var opened struct{ ID string }
	r.read(&opened, "bot/pager", "incident", "open", "--title", "CRM answers slowly", "--agent", "spiffe://acme.test/agent/support", "--tool", "crm.export", "--for", "30m")
	if out := r.mayfly("agent/support", "tools"); !strings.Contains(out, "crm.export") {
		t.Fatalf("the agent's tools: %s", out)
	}
	for _, tool := range [][]string{{"crm.export", "--param", "customer=globex"}, {"crm.notify"}} {
		r.mayfly("operator/sam", append([]string{"grant", "create", "--agent", "spiffe://acme.test/agent/batch", "--tool", tool[0], "--for", "1h", "--reason", "nightly"}, tool[1:]...)...)
	}

	// What the keys can do is the tool's action on the parameter's customer.
	first := r.give("agent/support", "crm.export", ttl, acme...)
	if again := r.give("agent/support", "crm.export", ttl, acme...); again != first {
		t.Error("a second read cost a second lease")
	}
	of := append([]keys{first}, r.many(7, "agent/support", "crm.export", ttl, acme...)...)
	notify := r.give("agent/batch", "crm.notify", ttl)
	may := r.aws.May
	for what, wrong := range map[string]bool{
		"the export's own object":     !r.reads(first),
		"another customer's object":   may(first.AccessKeyID, "s3:GetObject", "arn:aws:s3:::acme-crm/globex/2026.csv"),
		"an object above":             may(first.AccessKeyID, "s3:GetObject", "arn:aws:s3:::acme-crm/acme"),
		"another action":              may(first.AccessKeyID, "s3:PutObject", acmeObject),
		"another tool's queue":        may(first.AccessKeyID, "sqs:SendMessage", queue),
		"the queue's own message":     !may(notify.AccessKeyID, "sqs:SendMessage", queue),
		"an object, with the queue's": may(notify.AccessKeyID, "s3:GetObject", acmeObject),
	} {
		if wrong {
			t.Errorf("%s: it is the other way round", what)
		}
	}
	support := awsscope.SourceIdentity(spiffeid.RequireFromString("spiffe://acme.test/agent/support"))
	if s := r.aws.Session(first.AccessKeyID); s.Source != support || s.Tags["mayfly-incident"] != opened.ID || s.Tags["mayfly-tool"] != "crm.export" {
		t.Errorf("the session is %q with the tags %v", s.Source, s.Tags)
	}
	if n := r.aws.Count("AssumeRoleWithWebIdentity"); n != 1 {
		t.Errorf("the broker logged in %d times", n)
	}

	// One lease is given back by its agent. IAM takes its time: until then the
	// session works, and nobody says anything else.
	const slow = 8 * time.Second
	r.aws.force.Store(int64(slow))
	out := r.mayfly("agent/support", "revoke", of[1].lease)
	if !r.reads(of[1]) || !strings.Contains(out, "written") || strings.Contains(out, "confirmed dead") {
		t.Errorf("while nothing is in force (it works: %t), it says: %s", r.reads(of[1]), out)
	}
	if l := r.lease("agent/support", of[1].lease); l.State != "revoking" || l.Progress != "written" {
		t.Errorf("while nothing is in force: %+v", l)
	}
	if life := r.life(of[1].lease); strings.Contains(life, "revoked") {
		t.Errorf("the evidence tells %s", life)
	}
	r.dead(of[1])
	r.aws.force.Store(0)
	if life := r.life(of[1].lease); life != "intended active revoking progressed:written revoked" {
		t.Errorf("the evidence tells %s", life)
	}
	r.aws.mu.Lock()
	written := r.aws.writes[0]
	r.aws.mu.Unlock()
	for _, e := range r.evidence("--lease", of[1].lease, "--type", "lease.revoked") {
		if took := e.Time.Sub(written); took < slow+settle {
			t.Errorf("revoked is in the evidence %s after the writing, which is in force after %s", took, slow)
		}
	}
	if got := r.aws.stands(); !got.Equal(denylist.SetOf(leaseEntry(of[1]))) {
		t.Errorf("what is denied: %v", got.Sorted())
	}
	if !r.reads(first) || !may(notify.AccessKeyID, "sqs:SendMessage", queue) {
		t.Error("others are dead, too")
	}

	// The incident is closed: one entry for all that is left of it.
	r.mayfly("bot/pager", "incident", "close", opened.ID)
	r.dead(of...)
	closed := denylist.SetOf(leaseEntry(of[1]), denylist.Entry{Kind: denylist.Incident, ID: opened.ID})
	if got := r.aws.stands(); !got.Equal(closed) {
		t.Errorf("what is denied: %v", got.Sorted())
	}
	if cmd := r.command("agent/support", "aws", "credentials", "crm.export", "--param", "customer=acme", "--no-cache"); cmd.Run() == nil {
		t.Error("there are credentials after the incident")
	}
	if !may(notify.AccessKeyID, "sqs:SendMessage", queue) {
		t.Error("another agent's lease is dead, too")
	}

	// An agent is disabled: one entry for all that it has, by its source identity.
	batch := append(r.many(8, "agent/batch", "crm.export", later, "--param", "customer=globex"), notify)
	r.setCatalog(strings.Replace(r.catalogNow, "disabled: false", "disabled: true", 1))
	if err := r.daemon.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	r.dead(batch...)
	source := awsscope.SourceIdentity(spiffeid.RequireFromString("spiffe://acme.test/agent/batch"))
	got := r.aws.stands()
	agents := 0
	for e := range got {
		if e.Kind == denylist.Agent && e.ID == source {
			agents++
			delete(got, e)
		}
	}
	if agents != 1 || !got.Equal(closed) {
		t.Errorf("%d entries of the agent, and %v", agents, got.Sorted())
	}
	for _, k := range slices.Concat(of[:1], of[2:], batch) {
		life, cause := r.life(k.lease), r.lease("operator/sam", k.lease).Cause
		if !strings.HasPrefix(life, "intended active revoking") || !strings.HasSuffix(life, " revoked") || strings.Count(life, "revoked") != 1 {
			t.Errorf("the evidence of one lease tells %s", life)
		}
		if want := map[bool]string{true: "agent_disabled", false: "incident_closed"}[slices.Contains(batch, k)]; cause != want {
			t.Errorf("it died for %s, not for %s", cause, want)
		}
	}
	r.keepsSecrets()

	// What is dead by itself is denied no more.
	last := first.Expiration
	for _, k := range batch {
		if k.Expiration.After(last) {
			last = k.Expiration
		}
	}
	r.until("nothing is denied any more", time.Until(last)+75*time.Second, func() bool {
		left := len(r.aws.Policies(role))
		if now := time.Now(); left == 0 && now.Before(first.Expiration) {
			t.Fatalf("nothing is denied %s before the first session's end", first.Expiration.Sub(now))
		}
		return left == 0
	})
	for _, k := range slices.Concat(of, batch) {
		if r.aws.May(k.AccessKeyID, "s3:GetObject", acmeObject) {
			t.Error("it lives again")
		}
	}
}

// killed: the broker dies by kill -9 around its writing, and what it had begun
// is carried through by the next one.
func killed(r *rig) {
	t := r.t
	r.mayfly("operator/sam", "grant", "create", "--agent", "spiffe://acme.test/agent/support", "--tool", "crm.export", "--param", "customer=acme", "--for", "1h", "--reason", "reads")
	all := r.many(4, "agent/support", "crm.export", "30m", acme...)
	ended := denylist.Set{}
	var late *hand
	for i, kill := range []struct {
		what        string
		acted, lost bool
	}{
		{"between the record and PutRolePolicy, which is lost", false, true},
		{"right after PutRolePolicy, whose answer is lost", true, true},
		{"between the record and PutRolePolicy, which lands later", false, false},
	} {
		h := r.aws.holdWrite(kill.acted)
		revoke := r.command("agent/support", "revoke", all[i].lease)
		if err := revoke.Start(); err != nil {
			t.Fatal(err)
		}
		select {
		case <-h.holds:
		case <-time.After(30 * time.Second):
			t.Fatalf("killed %s: nothing is written", kill.what)
		}
		if denied := r.aws.stands().Has(leaseEntry(all[i])); denied != kill.acted {
			t.Errorf("killed %s: it is denied: %t", kill.what, denied)
		}
		r.kill()
		if kill.lost {
			h.open <- false
			<-h.done
		} else {
			late = h
		}
		r.start()
		_ = revoke.Wait() // it may have been told or not
		r.dead(all[i])
		ended.Add(denylist.SetOf(leaseEntry(all[i])))
		if missing := ended.Minus(r.aws.stands()); len(missing) > 0 {
			t.Errorf("killed %s: %v is not denied", kill.what, missing.Sorted())
		}
		if life := r.life(all[i].lease); !strings.HasPrefix(life, "intended active revoking") || !strings.HasSuffix(life, "revoked") || strings.Count(life, "revoked") != 1 {
			t.Errorf("killed %s: the evidence tells %s", kill.what, life)
		}
	}
	// The write of the process that is gone lands now, after all the others.
	late.open <- true
	<-late.done
	for i, k := range all {
		if works := r.reads(k); works != (i == 3) {
			t.Errorf("lease %d works: %t", i, works)
		}
	}
	if !r.aws.stands().Equal(ended) {
		t.Errorf("what is denied: %v", r.aws.stands().Sorted())
	}
	// Killed when AWS has made a session and nobody was told of it: it is denied
	// all the same. That it is dead is not said yet: the attempt might still come to
	// something.
	h := r.aws.holdMade()
	ask := r.command("agent/support", "aws", "credentials", "crm.export", "--param", "customer=acme", "--ttl", "30m", "--no-cache", "--timeout", "5s")
	if err := ask.Start(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-h.holds:
	case <-time.After(30 * time.Second):
		t.Fatal("no session is made")
	}
	r.kill()
	h.open <- false
	<-h.done
	r.start()
	if err := ask.Wait(); err == nil {
		t.Error("there are credentials of a session that was cut off")
	}
	known := map[string]bool{}
	for _, k := range all {
		known[k.lease] = true
	}
	var orphans []keys
	for _, s := range r.aws.Sessions() {
		if s.Source != "" && !known[s.Name] {
			orphans = append(orphans, keys{AccessKeyID: s.Key, lease: s.Name})
		}
	}
	if len(orphans) == 0 {
		t.Fatal("no session was made")
	}
	for _, k := range orphans {
		r.until("the session that nobody has is denied", 30*time.Second, func() bool { return !r.aws.Works(k.AccessKeyID) })
		if l := r.lease("operator/sam", k.lease); l.State != "revoking" {
			t.Errorf("the attempt that was cut off is %+v", l)
		}
	}
	// And the broker goes on.
	r.mayfly("agent/support", "revoke", all[3].lease)
	r.dead(all...)
	r.keepsSecrets()
}

// restored: the store comes back from a backup that knows nothing of an end,
// and it stands all the same.
func restored(r *rig) {
	t := r.t
	r.mayfly("operator/sam", "grant", "create", "--agent", "spiffe://acme.test/agent/support", "--tool", "crm.export", "--param", "customer=acme", "--for", "1h", "--reason", "reads")
	known := r.give("agent/support", "crm.export", "30m", append(acme, "--no-cache")...)
	copied := filepath.Join(r.dir, "monday.db")
	if said, err := exec.Command(filepath.Join(r.bin, "mayflyd"), "backup", "--store", r.store(), copied).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, said)
	}
	forgotten := r.many(2, "agent/support", "crm.export", "30m", acme...)
	r.mayfly("agent/support", "revoke", forgotten[0].lease)
	r.dead(forgotten[0])
	before := slices.Collect(maps.Keys(r.aws.Policies(role)))
	r.stop()
	if err := os.Rename(copied, r.store()); err != nil {
		t.Fatal(err)
	}
	r.start()
	r.dead(known)
	if events := r.evidence("--lease", forgotten[0].lease); len(events) != 0 {
		t.Errorf("the store remembers %v", events)
	}
	// The new process takes over what it knows nothing of: it stands in its own
	// policy, beside what it ended itself.
	want, own := denylist.SetOf(leaseEntry(known), leaseEntry(forgotten[0])), denylist.Set{}
	for name := range r.aws.Policies(role) {
		if !slices.Contains(before, name) {
			own.Add(r.aws.policy(name))
		}
	}
	if !own.Equal(want) || !r.aws.stands().Equal(want) {
		t.Errorf("the new process denies %v, and altogether %v is denied", own.Sorted(), r.aws.stands().Sorted())
	}
	// A session that nobody had ended and the store forgot lives to its own end,
	// as the guide says.
	if r.aws.Works(forgotten[0].AccessKeyID) || !r.aws.Works(forgotten[1].AccessKeyID) {
		t.Error("what was ended lives, or what was not is dead")
	}
	r.keepsSecrets()
}

// away: IAM cannot be reached, and then takes no more requests; nobody is told
// of more than was asked, and in the end it is done.
func away(r *rig) {
	t := r.t
	// First: not everybody who says so is the broker.
	res, err := http.PostForm(r.aws.sts.URL, url.Values{"Action": {"AssumeRoleWithWebIdentity"}, "RoleArn": {"arn:aws:iam::123456789012:role/" + brokerRole}, "RoleSessionName": {"x2"}, "WebIdentityToken": {"e30.e30.x"}})
	if err != nil || res.StatusCode != http.StatusBadRequest {
		t.Fatalf("a token that is none: %v, %v", res.Status, err)
	}
	res.Body.Close()
	r.mayfly("operator/sam", "grant", "create", "--agent", "spiffe://acme.test/agent/support", "--tool", "crm.export", "--param", "customer=acme", "--for", "1h", "--reason", "reads")
	all := r.many(2, "agent/support", "crm.export", "30m", acme...)

	// Nobody was told, so there is no progress: not even that it was requested.
	nothing := func(when string) {
		t.Helper()
		l := r.lease("operator/sam", all[0].lease)
		if l.State != "revoking" || l.Progress != "" || !l.Overdue || !r.reads(all[0]) {
			t.Errorf("%s: %+v; it works: %t", when, l, r.reads(all[0]))
		}
		if out := r.mayfly("operator/sam", "leases"); !strings.Contains(out, "OVERDUE, revoking  ") {
			t.Errorf("%s: the leases are\n%s", when, out)
		}
		if life := r.life(all[0].lease); life != "intended active revoking" {
			t.Errorf("%s: the evidence tells %s", when, life)
		}
		if m := r.metrics(); !strings.Contains(m, `mayfly_leases{state="revoking"} 1`) || !strings.Contains(m, `mayfly_revoke_seconds_count{call="revoke",outcome="away",provider="aws"}`) ||
			strings.Contains(m, `mayfly_revoke_seconds_count{call="revoke",outcome="ok",provider="aws"}`) {
			t.Errorf("%s: the metrics do not tell", when)
		}
	}
	r.aws.cut()
	out := r.mayfly("agent/support", "revoke", all[0].lease)
	if !strings.Contains(out, "its death is not confirmed yet.") {
		t.Errorf("while IAM is away, it says: %s", out)
	}
	nothing("while IAM is away")
	r.aws.throttle.Store(3)
	r.aws.join()
	r.until("IAM is asked, and throttles", 60*time.Second, func() bool { return r.aws.throttle.Load() < 3 })
	nothing("while IAM throttles")
	r.dead(all[0])
	if left := r.aws.throttle.Load(); left > 0 {
		t.Errorf("IAM was asked %d times less than it throttled", left)
	}
	if !r.reads(all[1]) {
		t.Error("the other lease is dead, too")
	}
	if m := r.metrics(); !strings.Contains(m, `mayfly_leases{state="revoking"} 0`) || !strings.Contains(m, `mayfly_provider_up{provider="aws"} 1`) {
		t.Error("the metrics do not tell that it is over")
	}
	r.keepsSecrets()
}
