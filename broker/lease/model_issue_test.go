package lease_test

import (
	"context"
	"slices"
	"testing/synctest"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/lease"
	"github.com/mayfly-security/mayfly/providers/providertest"
)

// verdict is what the model says of an issue before it is asked for.
type verdict struct {
	reasons []broker.Reason // those that may come; "" is a yes
	end     time.Time       // of a yes with a new lease
	again   *given          // a yes is this one, given again
}

func no(reasons ...broker.Reason) verdict { return verdict{reasons: reasons} }

// issue asks for a lease, and compares what comes with the verdict.
func (m *model) issue(a act) {
	agent, tool := agentsInModel[a.Agent], tools[a.Tool]
	req := lease.IssueRequest{Tool: tool, Params: m.params(a, 3)}
	if a.TTL != 0 {
		req.TTL = &a.TTL
	}
	storeKey := ""
	if a.Key > 0 {
		req.Key = "key-" + string(rune('0'+a.Key))
		storeKey = "idem|" + agent.String() + "|" + req.Key
	}
	v := m.decide(a, m.read(), storeKey)
	if fault := mintFaults[a.Fault]; fault.Op != "" && slices.Contains(outsideTools, tool) && v.again == nil && slices.Contains(v.reasons, "") {
		// Its grant may end while the attempt is under way.
		v.reasons = append(v.reasons, broker.ReasonProvider, broker.ReasonProviderRefused,
			broker.ReasonNoGrant, broker.ReasonIncidentClosed, broker.ReasonGrantSuspended)
	}
	m.mu.Lock()
	if time.Since(m.failed[tool]) < 20*time.Second && v.again == nil && slices.Contains(v.reasons, "") {
		v.reasons = append(v.reasons, broker.ReasonProvider) // its provider may be left alone for a moment
	}
	m.mint = mintFaults[a.Fault]
	m.mu.Unlock()
	fails := func() {
		if mintFaults[a.Fault].Op != "" && slices.Contains(outsideTools, tool) {
			m.failed[tool] = time.Now()
		}
	}
	defer func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		m.mint = providertest.Rule{} // it was refused before it came to the provider
		fails()
	}()

	engine, st, run := m.r.engine, m.store, m.runs
	ask := func() {
		d, err := engine.Issue(context.Background(), as(agent), req)
		m.mu.Lock()
		defer m.mu.Unlock()
		fails()
		if storeKey != "" {
			m.busyKeys[storeKey]--
		}
		if err != nil {
			reason := broker.ReasonOf(err)
			m.seen.add("refused: " + string(reason))
			if !slices.Contains(v.reasons, reason) && !st.dead() && !(a.Async && m.raced(reason)) {
				m.t.Errorf("%s: reason %q (%v); want one of %q", a, reason, err, v.reasons)
			}
			if reason == broker.ReasonSecretGone || st.dead() {
				m.lost(storeKey, st.dead())
			}
			return
		}
		m.took(a, v, d, storeKey, run)
		d.Done()
	}
	m.mu.Lock()
	if storeKey != "" {
		m.busyKeys[storeKey]++
	}
	m.mu.Unlock()
	if !a.Async {
		ask()
		return
	}
	m.under.Go(func() { ask() })
	synctest.Wait()
}

// raced reports whether a refusal is one that what happened meanwhile explains.
func (m *model) raced(r broker.Reason) bool {
	return slices.Contains([]broker.Reason{broker.ReasonProvider, broker.ReasonProviderRefused, broker.ReasonNoGrant,
		broker.ReasonIncidentClosed, broker.ReasonGrantSuspended, broker.ReasonAgentDisabled}, r)
}

// lost notes that the lease of a key is ended because its secret is gone.
func (m *model) lost(storeKey string, unsure bool) {
	for _, g := range m.given {
		if storeKey != "" && g.key == storeKey {
			g.over, g.unsure = g.over || !unsure, g.unsure || unsure
		}
	}
}

// took checks what was delivered. It is called before Done, so that whatever
// ended the grant and has returned has returned before this delivery.
func (m *model) took(a act, v verdict, d *lease.Delivery, storeKey string, run int) {
	if m.over[d.Lease.Grant] || m.off && d.Lease.Agent == support {
		m.t.Errorf("%s: delivered after the end of its grant had returned", a)
	}
	if !slices.Contains(v.reasons, "") {
		m.t.Errorf("%s: delivered; want one of %q", a, v.reasons)
	}
	secret := ""
	for _, field := range d.Secret.Names() {
		value, _ := d.Secret.Reveal(field)
		secret += field + "=" + value + " "
	}
	for _, g := range m.given {
		if g.lease.ID == d.Lease.ID {
			same := g.secret == secret || !slices.Contains(outsideTools, d.Lease.Tool) // a token is made again
			if storeKey == "" || g.key != storeKey || !same {
				m.t.Errorf("%s: lease %s was delivered twice, and not as an answer that is given again", a, d.Lease.ID)
			}
			m.seen.add("given again")
			return
		}
		if storeKey != "" && g.key == storeKey {
			m.t.Errorf("%s: its key gave lease %s, and now lease %s", a, g.lease.ID, d.Lease.ID)
		}
	}
	if v.again != nil {
		m.t.Errorf("%s: gave lease %s; want lease %s again", a, d.Lease.ID, v.again.lease.ID)
	} else if !v.end.IsZero() && mintFaults[a.Fault].Op == "" && !d.Lease.End.Equal(v.end) {
		m.t.Errorf("%s: the lease ends at %s; want %s", a, d.Lease.End, v.end)
	}
	m.seen.add("delivered: " + d.Lease.Tool)
	m.given = append(m.given, &given{lease: d.Lease, key: storeKey, secret: secret, at: time.Now(), broker: run})
}

// decide is the model's own decision, from the words of the design: it knows
// nothing of the engine but what the store says of grants and incidents.
func (m *model) decide(a act, w world, storeKey string) verdict {
	agent, tool := agentsInModel[a.Agent], tools[a.Tool]
	now := time.Now()
	if r := m.refuses(agent); r != "" {
		return no(r)
	}
	if storeKey != "" {
		m.mu.Lock()
		defer m.mu.Unlock()
		request := act{Kind: "issue", Agent: a.Agent, Tool: a.Tool, TTL: a.TTL, Param: a.Param}.String()
		if m.asked[storeKey] == nil {
			m.asked[storeKey] = map[string]bool{}
		}
		m.asked[storeKey][request] = true
		if m.busyKeys[storeKey] > 0 {
			return anything // it waits for the other; what then comes is checked when it comes
		}
		if v, used := m.replays(a, w, storeKey, now); used {
			return v
		}
	}

	longest := 3 * time.Minute
	if m.wide[tool] {
		longest = 4 * time.Minute
	}
	ttl := longest
	// What the tool takes is told only to those who have a grant for it.
	told := func(reason broker.Reason) verdict {
		for _, g := range w.grants {
			if g.Agent == agent && g.Tool == tool && g.State == broker.GrantOpen {
				return no(reason)
			}
		}
		if a.Async {
			return no(broker.ReasonNoGrant, reason)
		}
		return no(broker.ReasonNoGrant)
	}
	switch {
	case a.Param != 0 && (tool != "crm.read" || a.Param == 3):
		return told(broker.ReasonParameter)
	case a.TTL < 0 || a.TTL > longest:
		return told(broker.ReasonTTL)
	case a.TTL > 0:
		ttl = a.TTL
	}
	shortest := max(m.r.engine.Catalog().ScopeInfo(tool).MinTTL, time.Second)
	best, reason := time.Time{}, broker.ReasonNoGrant
	for _, g := range w.grants {
		if g.Agent != agent || g.Tool != tool {
			continue
		}
		end, why := m.byGrant(g, w, now.Add(ttl), a, now)
		if why == "" && end.Sub(now) < shortest {
			why = broker.ReasonTTL
		}
		switch {
		case why == "":
			if end.After(best) {
				best = end
			}
		case rankOf(why) > rankOf(reason):
			reason = why
		}
	}
	if best.IsZero() {
		if reason == broker.ReasonNoGrant {
			return no(reason, broker.ReasonIncidentClosed) // by whether the sweep has come to the grant
		}
		return no(reason)
	}
	return verdict{reasons: []broker.Reason{""}, end: best}
}

var anything = verdict{reasons: []broker.Reason{"", broker.ReasonProvider, broker.ReasonProviderRefused, broker.ReasonNoGrant,
	broker.ReasonIncidentClosed, broker.ReasonGrantSuspended, broker.ReasonGrantUsed, broker.ReasonKeyReused,
	broker.ReasonSecretGone, broker.ReasonConflict, broker.ReasonParameter, broker.ReasonTTL}}

// byGrant decides for one grant: until when a lease of it would live, or why not.
func (m *model) byGrant(g *broker.Grant, w world, end time.Time, a act, now time.Time) (time.Time, broker.Reason) {
	if g.State != broker.GrantOpen || !now.Before(g.NotAfter) {
		return end, broker.ReasonNoGrant
	}
	if in := w.incident(g.Incident); g.Incident != "" && (in.State != broker.IncidentOpen || !now.Before(in.EndsAt)) {
		return end, broker.ReasonNoGrant
	}
	switch {
	case m.suspended(g):
		return end, broker.ReasonGrantSuspended
	case g.MaxUses > 0 && w.uses(g.ID) >= g.MaxUses:
		return end, broker.ReasonGrantUsed
	case g.Params["customer"] != "" && g.Params["customer"] != paramsInModel[a.Param]:
		return end, broker.ReasonNoGrant
	}
	if g.NotAfter.Before(end) {
		end = g.NotAfter
	}
	return end, ""
}

// rankOf orders reasons by how near they are to a yes: the agent is told the nearest.
func rankOf(r broker.Reason) int {
	return slices.Index([]broker.Reason{broker.ReasonNoGrant, broker.ReasonGrantUsed, broker.ReasonGrantSuspended, broker.ReasonTTL}, r)
}

// suspended reports whether the tool is not what it was when the grant was made.
func (m *model) suspended(g *broker.Grant) bool {
	tool, ok := m.r.engine.Catalog().Tool(g.Tool)
	return !ok || tool.Digest != g.ToolDigest
}

// replays decides for a key that made a lease already.
func (m *model) replays(a act, w world, storeKey string, now time.Time) (verdict, bool) {
	id, used := w.keys[storeKey]
	if !used {
		return verdict{}, false
	}
	l := w.leases[id]
	if l == nil {
		m.t.Errorf("%s: its key is of lease %s, which is nowhere", a, id)
		return anything, true
	}
	if l.Tool != tools[a.Tool] || l.Params["customer"] != paramsInModel[a.Param] {
		return no(broker.ReasonKeyReused), true
	}
	v := verdict{}
	if len(m.asked[storeKey]) > 1 { // perhaps with another TTL
		v.reasons = append(v.reasons, broker.ReasonKeyReused)
	}
	again := slices.IndexFunc(m.given, func(g *given) bool { return g.lease.ID == id })
	switch {
	case !slices.Contains(outsideTools, l.Tool) && w.usable(m, l, now): // delivered before or not
		v.reasons, v.end = append(v.reasons, ""), l.End
	case again >= 0 && w.usable(m, l, now) && m.given[again].broker == m.runs && now.Before(m.given[again].at.Add(2*time.Minute)):
		v.reasons, v.again = append(v.reasons, ""), m.given[again]
	case l.State == broker.LeaseActive:
		v.reasons = append(v.reasons, broker.ReasonSecretGone)
	case l.State == broker.LeaseMinting, l.Cause == broker.CauseMintFailed:
		v.reasons = append(v.reasons, broker.ReasonProvider)
	default:
		v.reasons = append(v.reasons, broker.ReasonConflict)
	}
	return v, true
}
