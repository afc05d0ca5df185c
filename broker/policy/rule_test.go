package policy_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/policy"
)

func person(name string) broker.Person {
	return broker.Person{Name: name, Issuer: "https://id.acme.test", Subject: "sub-" + name}
}

func yes(name string, groups ...string) policy.Ballot {
	return policy.Ballot{Person: person(name), Groups: groups}
}

func voting(change ...func(*policy.Voting)) policy.Voting {
	v := policy.Voting{
		Rule: broker.ApprovalRule{Name: "payments", Need: []broker.Quorum{{Group: "finance", Count: 1}, {Group: "security", Count: 1}},
			NotRequester: true, NotOwner: true, NotUser: true, MaxDuration: time.Hour, SingleUse: true, Standing: true},
		Request: broker.Request{CreatedBy: broker.PersonPrincipal("rob"), Duration: 2 * time.Hour, MaxUses: 5,
			OnBehalfOf: &broker.User{Name: "uma", Issuer: "https://id.acme.test", Subject: "sub-uma"}},
		Owner: "olga",
	}
	for _, c := range change {
		c(&v)
	}
	return v
}

func TestEligible(t *testing.T) {
	none := func(v *policy.Voting) { v.Rule.NotRequester, v.Rule.NotOwner, v.Rule.NotUser = false, false, false }
	for name, c := range map[string]struct {
		v      policy.Voting
		p      broker.Person
		groups []string
		ok     bool
	}{
		"of finance":                {voting(), person("fay"), []string{"finance"}, true},
		"of no such group":          {voting(), person("fay"), []string{"sre"}, false},
		"of none":                   {voting(), person("fay"), nil, false},
		"without a name":            {voting(), broker.Person{}, []string{"finance"}, false},
		"requester":                 {voting(), person("rob"), []string{"finance"}, false},
		"requester, other case":     {voting(), person("ROB"), []string{"finance"}, false},
		"requester, where allowed":  {voting(none), person("rob"), []string{"finance"}, true},
		"owner":                     {voting(), person("olga"), []string{"finance"}, false},
		"owner by a group":          {voting(func(v *policy.Voting) { v.Owner = "Team-Pay" }), person("fay"), []string{"finance", "team-pay"}, false},
		"owner, where allowed":      {voting(none), person("olga"), []string{"finance"}, true},
		"no owner":                  {voting(func(v *policy.Voting) { v.Owner = "" }), person("fay"), []string{"finance", ""}, true},
		"user":                      {voting(), person("uma"), []string{"finance"}, false},
		"user by another name":      {voting(), broker.Person{Name: "u2", Issuer: "https://id.acme.test", Subject: "sub-uma"}, []string{"finance"}, false},
		"user, where allowed":       {voting(none), person("uma"), []string{"finance"}, true},
		"nobody's user":             {voting(func(v *policy.Voting) { v.Request.OnBehalfOf = nil }), person("fay"), []string{"finance"}, true},
		"a rule that needs no such": {voting(func(v *policy.Voting) { v.Rule.Need[0].Count = 0 }), person("fay"), []string{"finance"}, false},
	} {
		err := c.v.Eligible(c.p, c.groups)
		if (err == nil) != c.ok || err != nil && broker.ReasonOf(err) != broker.ReasonNotEligible {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestTally(t *testing.T) {
	twice := func(v *policy.Voting) { v.Rule.Need = []broker.Quorum{{Group: "finance", Count: 2}} }
	alias := policy.Ballot{Person: broker.Person{Name: "fay2", Issuer: "https://id.acme.test", Subject: "sub-fay"}, Groups: []string{"security"}}
	for name, c := range map[string]struct {
		v       policy.Voting
		ballots []policy.Ballot
		missing string // "" means met
	}{
		"nobody":              {voting(), nil, "1 of finance, 1 of security"},
		"one":                 {voting(), []policy.Ballot{yes("fay", "finance")}, "1 of security"},
		"one of both":         {voting(), []policy.Ballot{yes("fay", "finance", "security")}, "1 of security"},
		"two":                 {voting(), []policy.Ballot{yes("fay", "finance"), yes("sam", "security")}, ""},
		"two, swapped":        {voting(), []policy.Ballot{yes("sam", "security"), yes("fay", "finance")}, ""},
		"the one moves aside": {voting(), []policy.Ballot{yes("fay", "finance", "security"), yes("fox", "finance")}, ""},
		"two of both":         {voting(), []policy.Ballot{yes("fay", "finance", "security"), yes("sam", "finance", "security")}, ""},
		"twice the same":      {voting(twice), []policy.Ballot{yes("fay", "finance"), yes("fay", "finance")}, "1 of finance"},
		"two of one group":    {voting(twice), []policy.Ballot{yes("fay", "finance"), yes("fox", "finance")}, ""},
		"one under two names": {voting(), []policy.Ballot{yes("fay", "finance"), alias}, "1 of security"},
		"requester's alias": {voting(func(v *policy.Voting) { v.Request.CreatedBy = broker.PersonPrincipal("fay") }),
			[]policy.Ballot{yes("fay", "finance"), alias, yes("fox", "finance")}, "1 of security"},
		"not eligible":     {voting(), []policy.Ballot{yes("rob", "finance"), yes("sam", "security")}, "1 of finance"},
		"lost the group":   {voting(), []policy.Ballot{yes("fay"), yes("sam", "security")}, "1 of finance"},
		"a rule of nobody": {voting(func(v *policy.Voting) { v.Rule.Need = nil }), []policy.Ballot{yes("fay", "finance")}, "rule payments names nobody"},
		"the zero rule":    {policy.Voting{}, []policy.Ballot{yes("fay", "finance")}, "rule  names nobody"},
	} {
		tally := c.v.Tally(c.ballots)
		if got := strings.Join(tally.Missing, ", "); got != c.missing || tally.Met != (c.missing == "") {
			t.Errorf("%s: met %v, missing %q; want %q", name, tally.Met, got, c.missing)
		}
	}
	got := voting().Tally([]policy.Ballot{{Person: person("sam"), Groups: []string{"security"}, Duration: 20 * time.Minute}, yes("fay", "finance")})
	want := policy.Tally{Met: true, Duration: 20 * time.Minute, MaxUses: 1, Voters: []broker.Voter{
		{Name: "fay", Issuer: "https://id.acme.test", Subject: "sub-fay", Group: "finance", Standing: true},
		{Name: "sam", Issuer: "https://id.acme.test", Subject: "sub-sam", Group: "security", Standing: true}}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	many := voting(func(v *policy.Voting) { v.Rule.SingleUse, v.Rule.MaxDuration = false, 3*time.Hour }).Tally([]policy.Ballot{yes("sam", "security"), yes("fay", "finance")})
	if many.Duration != 2*time.Hour || many.MaxUses != 5 {
		t.Errorf("%+v", many)
	}
}

// TestNeverMoreThanAllowed: whatever ballots come, a quorum that is met has
// distinct eligible people, each in the group that they count for, one for
// each that is needed; and the grant is no longer than any bound. A quorum
// that is not met cannot be met by any choice.
func TestNeverMoreThanAllowed(t *testing.T) {
	groups := []string{"a", "b", "c"}
	met := map[bool]int{}
	rapid.Check(t, func(t *rapid.T) {
		span := func(label string) time.Duration {
			return time.Duration(rapid.Int64Range(1, int64(48*time.Hour)).Draw(t, label))
		}
		v := policy.Voting{Rule: broker.ApprovalRule{Name: "r", NotRequester: rapid.Bool().Draw(t, "requester"), NotOwner: rapid.Bool().Draw(t, "owner"),
			MaxDuration: span("maximum"), SingleUse: rapid.Bool().Draw(t, "single")},
			Request: broker.Request{CreatedBy: broker.PersonPrincipal("p0"), Duration: span("asked"), MaxUses: rapid.IntRange(0, 3).Draw(t, "uses")}, Owner: "p1"}
		for _, g := range groups {
			if n := rapid.IntRange(0, 2).Draw(t, "count of "+g); n > 0 {
				v.Rule.Need = append(v.Rule.Need, broker.Quorum{Group: g, Count: n})
			}
		}
		var ballots []policy.Ballot
		for range rapid.IntRange(0, 6).Draw(t, "ballots") {
			b := yes(fmt.Sprintf("p%d", rapid.IntRange(0, 5).Draw(t, "person")))
			for _, g := range groups {
				if rapid.Bool().Draw(t, g) {
					b.Groups = append(b.Groups, g)
				}
			}
			if rapid.Bool().Draw(t, "shorter") {
				b.Duration = span("agreed")
			}
			ballots = append(ballots, b)
		}
		tally := v.Tally(ballots)
		met[tally.Met]++
		if want := possible(v, ballots); tally.Met != want {
			t.Fatalf("met %v; want %v: %+v of %+v", tally.Met, want, v.Rule.Need, ballots)
		}
		if !tally.Met {
			if tally.Duration != 0 || tally.Voters != nil || len(tally.Missing) == 0 {
				t.Fatalf("not met: %+v", tally)
			}
			return
		}
		if tally.Duration > v.Rule.MaxDuration || tally.Duration > v.Request.Duration || tally.Duration <= 0 {
			t.Fatalf("granted for %s", tally.Duration)
		}
		if v.Rule.SingleUse && tally.MaxUses != 1 {
			t.Fatalf("granted for %d uses", tally.MaxUses)
		}
		names, count := map[string]bool{}, map[string]int{}
		for _, voter := range tally.Voters {
			if names[voter.Name] {
				t.Fatalf("%s counts twice", voter.Name)
			}
			names[voter.Name] = true
			count[voter.Group]++
			i := slices.IndexFunc(ballots, func(b policy.Ballot) bool {
				return b.Person.Name == voter.Name && slices.Contains(b.Groups, voter.Group) && (b.Duration == 0 || tally.Duration <= b.Duration)
			})
			if i < 0 || v.Eligible(ballots[i].Person, ballots[i].Groups) != nil {
				t.Fatalf("%s counts for %s", voter.Name, voter.Group)
			}
		}
		for _, n := range v.Rule.Need {
			if count[n.Group] != n.Count {
				t.Fatalf("%d of %s; need %d", count[n.Group], n.Group, n.Count)
			}
		}
	})
	if met[true] == 0 || met[false] == 0 {
		t.Errorf("only one outcome was seen: %v", met)
	}
}

// possible tries every choice of people, one after the other.
func possible(v policy.Voting, ballots []policy.Ballot) bool {
	can := map[string]map[string]bool{}
	out := map[string]bool{}
	for _, b := range ballots {
		if v.Eligible(b.Person, b.Groups) != nil {
			out[b.Person.Name] = true
		}
		if can[b.Person.Name] == nil {
			can[b.Person.Name] = map[string]bool{}
		}
		for _, g := range b.Groups {
			can[b.Person.Name][g] = true
		}
	}
	var slots []string
	for _, n := range v.Rule.Need {
		for range n.Count {
			slots = append(slots, n.Group)
		}
	}
	var try func(i int, used map[string]bool) bool
	try = func(i int, used map[string]bool) bool {
		if i == len(slots) {
			return i > 0
		}
		for name, gs := range can {
			if !used[name] && !out[name] && gs[slots[i]] {
				used[name] = true
				if try(i+1, used) {
					return true
				}
				delete(used, name)
			}
		}
		return false
	}
	return try(0, map[string]bool{})
}

func TestStepUp(t *testing.T) {
	need := broker.StepUp{MaxAge: 5 * time.Minute, ACR: []string{"phr", "phrh"}}
	for name, c := range map[string]struct {
		need   broker.StepUp
		at     time.Time
		acr    string
		method broker.SignInMethod
		ok     bool
	}{
		"fresh":                  {need, now.Add(-time.Minute), "phr", broker.SignInBrowser, true},
		"the very limit":         {need, now.Add(-5 * time.Minute), "phrh", broker.SignInBrowser, true},
		"just over":              {need, now.Add(-5*time.Minute - 1), "phr", broker.SignInBrowser, false},
		"bearer":                 {need, now.Add(-time.Minute), "phr", broker.SignInBearer, true},
		"device":                 {need, now.Add(-time.Minute), "phr", broker.SignInDevice, false},
		"device, class alone":    {broker.StepUp{ACR: []string{"phr"}}, now, "phr", broker.SignInDevice, false},
		"no time":                {need, time.Time{}, "phr", broker.SignInBrowser, false},
		"no time, class alone":   {broker.StepUp{ACR: []string{"phr"}}, time.Time{}, "phr", broker.SignInBrowser, true},
		"a bit early":            {need, now.Add(time.Minute), "phr", broker.SignInBrowser, true},
		"in the future":          {need, now.Add(time.Minute + 1), "phr", broker.SignInBrowser, false},
		"another class":          {need, now, "pwd", broker.SignInBrowser, false},
		"no class":               {need, now, "", broker.SignInBrowser, false},
		"age alone":              {broker.StepUp{MaxAge: time.Minute}, now, "", broker.SignInBrowser, true},
		"nothing asked":          {broker.StepUp{}, time.Time{}, "", broker.SignInDevice, true},
		"very long ago":          {need, time.Date(1, 1, 2, 0, 0, 0, 0, time.UTC), "phr", broker.SignInBrowser, false},
		"in the far future, acr": {broker.StepUp{ACR: []string{"phr"}}, now.Add(time.Hour), "phr", broker.SignInBrowser, false},
	} {
		err := policy.StepUp(c.need, c.at, c.acr, c.method, now)
		var e *broker.Error
		if (err == nil) != c.ok {
			t.Errorf("%s: %v", name, err)
		} else if err != nil && (!errors.As(err, &e) || e.Reason != broker.ReasonStepUp || !cmp.Equal(e.StepUp, c.need)) {
			t.Errorf("%s: %+v", name, e)
		}
	}
}
