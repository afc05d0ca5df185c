package awssts

import (
	"fmt"
	"math/rand/v2"
	"net/url"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/awssts/fakeaws"
)

// TestStorm: 5,000 leases (fewer with the race detector) over 20 roles, of which most are ended early at
// random moments, against an IAM that shows and enforces writes late and out of
// order, throttles, fails, and does what it does not answer. Two processes die
// in the middle of a PutRolePolicy, which lands when the next process has long
// written. No entry is lost, no quota exceeded, and every lease ends verified,
// or expires by AWS's own clock.
func TestStorm(t *testing.T) {
	const leases, pool = stormLeases, 20
	seed := uint64(20261126)
	random := rand.New(rand.NewPCG(seed, 1))
	var mu sync.Mutex // of what the fake draws
	draws := rand.New(rand.NewPCG(seed, 2))
	draw := func(n int) int {
		mu.Lock()
		defer mu.Unlock()
		return draws.IntN(n)
	}
	var rough atomic.Bool
	var holding atomic.Pointer[holder]
	w := newWorld(t, roles(pool), faking(func(c *fakeaws.Config) {
		c.Force = func(int) time.Duration { return time.Duration(draw(20_000)) * time.Millisecond }
		c.Seen = func(int) time.Duration { return time.Duration(draw(30_000)) * time.Millisecond }
		c.Fail = func(action string, _ int) (string, int) {
			if !rough.Load() {
				return "", 0
			}
			switch draw(50) {
			case 0:
				return "Throttling", 400
			case 1:
				return "ServiceFailure", 500
			}
			return "", 0
		}
		c.Quiet = func(action string, _ int) bool { return rough.Load() && action == "PutRolePolicy" && draw(60) == 0 }
		c.Hold = func(action string, form url.Values) {
			if h := holding.Load(); h != nil && action == "PutRolePolicy" {
				h.hold(form.Get("RoleName"))
			}
		}
	}))
	p := w.open()

	// Mint.
	all := make([]*lease, leases)
	incidents := []broker.IncidentID{"", "", "", broker.NewIncidentID(w.clock.Now()), broker.NewIncidentID(w.clock.Now())}
	var wg sync.WaitGroup
	gate := make(chan struct{}, 8)
	for i := range all {
		gate <- struct{}{}
		incident, ttl := incidents[random.IntN(len(incidents))], 20*time.Minute+time.Duration(random.IntN(1200))*time.Second
		wg.Go(func() {
			defer func() { <-gate }()
			l, err := w.try(p, ttl, incident)
			if err != nil {
				t.Errorf("minting: %v", err)
				return
			}
			all[i] = l
		})
	}
	wg.Wait()
	if t.Failed() {
		return
	}
	rough.Store(true)

	// The engine: what is begun is revoked, what is written is confirmed.
	type state struct {
		begun    bool
		early    bool // more than a minute before its end
		progress broker.Progress
		next     time.Time
		verified time.Time
	}
	states := make([]state, leases)
	counts, why := map[string]int{}, map[string]int{}
	work := func(p *provider) {
		now := w.clock.Now()
		var revoke, confirm []int
		for i, s := range states {
			switch {
			case !s.begun, s.progress == broker.ProgressVerified, now.Before(s.next):
			case s.progress == broker.ProgressNone:
				revoke = append(revoke, i)
			default:
				confirm = append(confirm, i)
			}
		}
		for _, batch := range []struct {
			ids  []int
			what string
		}{{revoke, "revoke"}, {confirm, "confirm"}} {
			for len(batch.ids) > 0 {
				ids := batch.ids[:min(256, len(batch.ids))]
				batch.ids = batch.ids[len(ids):]
				endings := make([]providers.Ending, len(ids))
				for k, i := range ids {
					endings[k] = all[i].ending
				}
				call := p.Confirm
				if batch.what == "revoke" {
					call = p.Revoke
				}
				for k, d := range call(t.Context(), endings) {
					i := ids[k]
					s := &states[i]
					if d.Err != nil {
						counts["failed"]++
						why[d.Err.Error()[:min(90, len(d.Err.Error()))]]++
						s.next = now.Add(time.Second)
						continue
					}
					s.progress, s.next = d.Progress, d.RetryAt
					if d.Progress == broker.ProgressVerified {
						s.verified = now
						if now.Before(all[i].minted.DiesAt) {
							counts["verified"]++
						} else if s.early {
							counts["expired though ended early"]++
						} else {
							counts["expired"]++
						}
						if w.fake.Works(all[i].key) {
							t.Fatalf("lease %d is verified, and works", i)
						}
					}
				}
			}
		}
	}
	check := func(when string) {
		for i, s := range states {
			if s.progress == broker.ProgressVerified && w.fake.Works(all[i].key) {
				t.Fatalf("%s: lease %d was verified at %s, and works at %s (role %s)", when, i, s.verified, w.clock.Now(), w.fake.Session(all[i].key).Role)
			}
		}
	}
	closed := map[broker.IncidentID]bool{}
	begin := func(i int, cause broker.Cause) {
		if !states[i].begun {
			states[i].begun, states[i].early = true, cause != broker.CauseTTL
			w.begin(all[i], cause)
		}
	}
	var stale []*holder
	for round := range 220 {
		switch {
		case round%73 == 40: // the process stops in the middle of its writes, and another takes over
			h := newHolder()
			holding.Store(h)
			for i := range 400 {
				begin((i*13+round*31)%leases, broker.CauseRevoked)
			}
			ctx, cancel := contextWith(t)
			done := make(chan struct{})
			go func() {
				defer close(done)
				var endings []providers.Ending
				for i, s := range states {
					if s.begun && s.progress == broker.ProgressNone && len(endings) < 256 {
						endings = append(endings, all[i].ending)
					}
				}
				p.Revoke(ctx, endings)
			}()
			<-h.first
			time.Sleep(50 * time.Millisecond) // more of its roles come to the same point
			cancel()
			<-done
			holding.Store(nil)
			stale = append(stale, h)
			p.Close()
			w.driver = New(nil)
			p = w.open()
		case round == 120:
			id := incidents[3]
			closed[id] = true
			for i, l := range all {
				if l.req.Incident == id {
					begin(i, broker.CauseIncidentClosed)
				}
			}
		case round < 180:
			for range 8 {
				begin(random.IntN(leases), broker.CauseRevoked)
			}
		}
		if round%73 == 60 && len(stale) > 0 { // what was held lands now
			n := stale[len(stale)-1].release()
			counts["stale writes"] += n
		}
		work(p)
		check(fmt.Sprintf("round %d", round))
		if round%12 == 11 {
			if err := p.reconcile(t.Context()); err != nil {
				counts["comparisons that failed"]++
			}
			check(fmt.Sprintf("after the comparison of round %d", round))
		}
		w.clock.Advance(5 * time.Second)
	}
	// The rest is over at its end.
	for range 60 {
		for i, l := range all {
			if !w.clock.Now().Before(l.req.End) {
				begin(i, broker.CauseTTL)
			}
		}
		work(p)
		check("in the end")
		w.clock.Advance(30 * time.Second)
	}
	for i, s := range states {
		if s.progress != broker.ProgressVerified {
			t.Errorf("lease %d is %q", i, s.progress)
		}
	}
	if most := w.fake.Most(); most > fakeaws.Quota {
		t.Errorf("the policies of a role had %d characters", most)
	}
	if counts["verified"] < leases/4 || counts["expired"] == 0 || counts["stale writes"] == 0 {
		t.Errorf("the storm was none: %v", counts)
	}
	for text, n := range why {
		t.Logf("%d endings failed: %s", n, text)
	}
	t.Logf("%v; PutRolePolicy %d, DeleteRolePolicy %d, GetRolePolicy %d, probes asked %d; at most %d of %d characters",
		counts, w.fake.Count("PutRolePolicy"), w.fake.Count("DeleteRolePolicy"), w.fake.Count("GetRolePolicy"), w.fake.Count("DecodeAuthorizationMessage"), w.fake.Most(), fakeaws.Quota)
}

// holder holds requests in the middle.
type holder struct {
	first  chan struct{}
	once   sync.Once
	resume chan struct{}
	held   atomic.Int32
	gone   sync.WaitGroup
}

func newHolder() *holder { return &holder{first: make(chan struct{}), resume: make(chan struct{})} }

func (h *holder) hold(string) {
	h.gone.Add(1)
	defer h.gone.Done()
	h.held.Add(1)
	h.once.Do(func() { close(h.first) })
	<-h.resume
}

// release lets what is held go on, and waits until it has.
func (h *holder) release() int {
	n := int(h.held.Load())
	close(h.resume)
	h.gone.Wait()
	time.Sleep(20 * time.Millisecond) // what comes after Hold is short
	return n
}
