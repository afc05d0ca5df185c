package fakeaws

import (
	"slices"
	"strings"
	"time"
)

// Quota is how many characters the inline policies of a role may have, without
// white space.
const Quota = 10240

// version is one content of a policy: empty text is none.
type version struct {
	text        string
	seen, force time.Time
}

// at is the content that counts at an instant: the last write that has come
// into its own. A later write takes the place of an earlier one that is slower.
func at(versions []version, now time.Time, when func(version) time.Time) string {
	for _, v := range slices.Backward(versions) {
		if !when(v).After(now) {
			return v.text
		}
	}
	return ""
}

func strip(text string) string { return strings.Join(strings.Fields(text), "") }

func (f *Fake) store(r *role, policy, text string) {
	f.writes++
	now := f.c.Now()
	v := version{text: text, seen: now.Add(f.c.Seen(f.writes)), force: now.Add(f.c.Force(f.writes))}
	if old := r.policies[policy]; old == nil {
		r.policies[policy] = []version{{}, v}
	} else {
		r.policies[policy] = append(old, v)
	}
	n := 0
	for _, versions := range r.policies {
		n += len(strip(versions[len(versions)-1].text))
	}
	f.most = max(f.most, n)
}

// Policies are the inline policies of a role as they are stored.
func (f *Fake) Policies(name string) map[string]string {
	f.mu.Lock()
	defer f.mu.Unlock()
	all := map[string]string{}
	for policy, versions := range f.roles[name].policies {
		if v := versions[len(versions)-1]; v.text != "" {
			all[policy] = v.text
		}
	}
	return all
}

// SetPolicy puts a policy as if somebody else had; empty text removes it.
func (f *Fake) SetPolicy(name, policy, text string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.store(f.roles[name], policy, text)
}
