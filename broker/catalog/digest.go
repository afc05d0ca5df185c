package catalog

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/broker"
)

// digest is the SHA-256, in hex, of v as JSON; maps are in the order of their keys.
func digest(v any) string {
	b, err := json.Marshal(v)
	if err != nil {
		panic(fmt.Sprintf("catalog: %T cannot be marshalled: %v", v, err)) // only values of our own come here
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// seal computes the digest of a snapshot that is complete.
func (s *Snapshot) seal() {
	s.digest = digest(s.entries())
}

// entries is everything in the catalog, each thing under a key that names it
// for people. It is what digests and differences are made of.
func (s *Snapshot) entries() map[string]map[string]string {
	all := map[string]map[string]string{}
	for id, a := range s.agents {
		all["agent "+id.String()] = map[string]string{"owner": a.Owner, "environment": a.Environment,
			"labels": text(a.Labels), "disabled": fmt.Sprint(a.Disabled),
			"max_leases": fmt.Sprint(a.MaxLeases), "max_per_hour": fmt.Sprint(a.MaxPerHour)}
	}
	for name, members := range s.groups {
		all["group "+name] = map[string]string{"members": joinIDs(members), "people": strings.Join(slices.Sorted(maps.Keys(s.people[name])), ", ")}
	}
	all["operators"] = map[string]string{"members": joinIDs(s.operators), "groups": strings.Join(slices.Sorted(maps.Keys(s.operating)), ", ")}
	for name, r := range s.rules {
		all["rule "+name] = ruleEntry(r)
	}
	for _, id := range s.policies.IDs() {
		all["policy "+id] = map[string]string{"text": s.policies.Text(id)}
	}
	for name, p := range s.providers {
		all["provider "+name] = map[string]string{"driver": p.Driver, "config": text(orEmpty(p.Config))}
	}
	for name, t := range s.tools {
		all["tool "+name] = map[string]string{"provider": t.Provider, "description": t.Description,
			"max_ttl": t.MaxTTL.String(), "scope": text(orEmpty(t.Scope)), "params": text(paramsForDigest(t.Params)), "env": text(t.Env),
			"labels": text(t.Labels), "sensitivity": t.Sensitivity, "approval": ruleName(t.Approval), "break_glass": ruleName(t.BreakGlass)}
	}
	for id, o := range s.openers {
		agents := map[spiffeid.ID]bool{}
		for _, a := range o.Agents {
			agents[a] = true
		}
		all["opener "+id.String()] = map[string]string{"tools": strings.Join(slices.Sorted(slices.Values(o.Tools)), ", "),
			"agents": joinIDs(agents), "max_duration": o.MaxDuration.String(), "max_open": fmt.Sprint(o.MaxOpen),
			"max_per_hour": fmt.Sprint(o.MaxPerHour), "closers": o.Closers}
	}
	return all
}

func ruleEntry(r broker.ApprovalRule) map[string]string {
	var need, never []string
	for _, n := range r.Need {
		need = append(need, fmt.Sprintf("%d of %s", n.Count, n.Group))
	}
	for who, not := range map[string]bool{"requester": r.NotRequester, "owner": r.NotOwner, "user": r.NotUser} {
		if not {
			never = append(never, who)
		}
	}
	slices.Sort(never)
	return map[string]string{"need": strings.Join(need, ", "), "never": strings.Join(never, ", "),
		"reauthenticate_within": r.StepUp.MaxAge.String(), "acr": strings.Join(r.StepUp.ACR, ", "),
		"user_reauthenticate_within": r.UserStepUp.MaxAge.String(), "user_acr": strings.Join(r.UserStepUp.ACR, ", "),
		"max_duration": r.MaxDuration.String(), "expires": r.Expires.String(), "single_use": fmt.Sprint(r.SingleUse),
		"standing": fmt.Sprint(r.Standing), "break_glass": fmt.Sprint(r.BreakGlass)}
}

func ruleName(r *broker.ApprovalRule) string {
	if r == nil {
		return ""
	}
	return r.Name
}

func text(v any) string {
	b, err := json.Marshal(v)
	if err != nil {
		panic(fmt.Sprintf("catalog: %T cannot be marshalled: %v", v, err)) // only values of our own come here
	}
	return string(b)
}

func joinIDs(ids map[spiffeid.ID]bool) string {
	var all []string
	for _, id := range slices.SortedFunc(maps.Keys(ids), compareIDs) {
		all = append(all, id.String())
	}
	return strings.Join(all, ", ")
}

// maxChanges bounds a difference: what is beyond is counted.
const maxChanges = 100

// Diff tells people what changes from old to next, a line a change, in order:
// "tool crm.read: max_ttl 15m0s -> 1h0m0s". The text is safe to show.
func Diff(old, next *Snapshot) []string {
	before, after := old.entries(), next.entries()
	names := map[string]bool{}
	for n := range before {
		names[n] = true
	}
	for n := range after {
		names[n] = true
	}
	// What gives power comes first: it must not be pushed out of a difference
	// that is cut.
	ordered := slices.SortedFunc(maps.Keys(names), func(a, b string) int {
		return cmp.Or(cmp.Compare(weight(a), weight(b)), strings.Compare(a, b))
	})
	var changes []string
	for _, n := range ordered {
		b, was := before[n]
		a, is := after[n]
		switch {
		case !was:
			changes = append(changes, n+" added")
		case !is:
			changes = append(changes, n+" removed")
		default:
			for _, field := range slices.Sorted(maps.Keys(a)) {
				if a[field] != b[field] {
					changes = append(changes, fmt.Sprintf("%s: %s %s -> %s", n, field, short(b[field]), short(a[field])))
				}
			}
		}
	}
	if extra := len(changes) - maxChanges; extra > 0 {
		changes = append(changes[:maxChanges], fmt.Sprintf("and %d more", extra))
	}
	return changes
}

// weight orders kinds of entries by how much a change of one can give.
func weight(name string) int {
	kind, _, _ := strings.Cut(name, " ")
	return slices.Index([]string{"operators", "policy", "rule", "opener", "group", "provider", "tool", "agent"}, kind)
}

func short(s string) string {
	if s == "" {
		return "(none)"
	}
	return broker.Clean(broker.Shorten(s, 200))
}
