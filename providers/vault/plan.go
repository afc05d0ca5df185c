package vault

import (
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/vault/vaultscope"
)

// latency is how long the making of a certificate or signed key may take
// without its end coming to lie after the lease's.
const latency = 2 * time.Second

// plan is what one Mint asks Vault for.
type plan struct {
	scope vaultscope.Scope
	path  string
	class class
	ttl   time.Duration // the longest life of what is made
}

// planOf reads the tool's scope for one request.
func (p *provider) planOf(req providers.MintRequest) (plan, error) {
	s, err := vaultscope.ParseScope(p.config, req.Tool)
	if err != nil {
		return plan{}, providers.SayRefused("the scope of tool %s cannot be read", req.Tool.Name).Because(err)
	}
	life := req.End.Sub(req.Now)
	chosen, ok := s.Class(life)
	if !ok {
		return plan{}, broker.Refusef(broker.ReasonTTL, "ask for a longer TTL, or for a grant that lasts longer",
			"the shortest lease of tool %s lives %s, and this one must be dead in %s", req.Tool.Name, s.MinTTL(), life.Round(time.Second))
	}
	planned := plan{scope: s, path: chosen.Path, class: classOf(s), ttl: chosen.TTL}
	if planned.ttl == 0 {
		planned.ttl = life
	}
	return planned, nil
}

func classOf(s vaultscope.Scope) class {
	switch {
	case s.Static():
		return classStatic
	case s.Engine == vaultscope.EngineDatabase:
		return classDatabase
	case s.Leased():
		return classLeased
	case s.Engine == vaultscope.EnginePKI:
		return classCertificate
	}
	return classFixed
}

// request is the one read of the credential.
func (m *making) request() (request, error) {
	s := m.plan.scope
	ttl := m.req.End.Sub(m.p.now())
	if s.Engine == vaultscope.EngineAWS {
		ttl = m.req.End.Sub(m.req.Now) // AWS takes no less than the least that we ask for
	} else {
		ttl = max(ttl-latency, time.Second)
	}
	body, err := s.Body(m.req.Params, ttl)
	if err != nil {
		return request{}, err
	}
	r := request{what: "reading " + m.plan.path, path: m.plan.path, token: m.token, quiet: true}
	if !s.Write {
		r.query = body
		return r, nil
	}
	if r.body = body; body == nil {
		r.body = map[string]any{}
	}
	return r, nil
}

// expires is when what was made dies by itself.
func (m *making) expires(data map[string]any, answered time.Time, duration time.Duration) (time.Time, error) {
	switch m.plan.scope.Engine {
	case vaultscope.EnginePKI:
		return notAfter(data)
	case vaultscope.EngineSSH:
		return validBefore(data)
	}
	if duration <= 0 {
		return time.Time{}, errNoEnd
	}
	return answered.Add(duration), nil
}
