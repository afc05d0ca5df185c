//go:build unix

package main

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/mayfly-security/mayfly/deploy/torture/ledger"
	"github.com/mayfly-security/mayfly/deploy/torture/proxy"
)

// report is what a run counted. Its methods may be called from many goroutines.
type report struct {
	opt     options
	began   time.Time
	minting int // at the proxy, right before the kill that comes

	mu         sync.Mutex
	kills      map[string]int // by failpoint; "" is a random instant
	atProxy    []int          // attempts to mint that the proxy saw under way, at each kill
	refusals   map[string]int
	answers    map[string]int // ends of incidents and grants that were answered
	reloads    int
	looks      int
	lookErrors int
	lastLook   string
	most       ledger.Count // the most that any look found
	unused     int          // the most unused tokens that any look found
	logins     [2]int       // that did not work, and that did
	noLogin    int          // logins that could not be tried
	chaos      map[string]int
	lost       map[string]struct{} // roles of which Vault told nobody
	drain      time.Duration
	violations []ledger.Violation
	byKind     map[ledger.Kind]int
}

func newReport(opt options) *report {
	return &report{opt: opt, began: time.Now(), kills: map[string]int{}, refusals: map[string]int{}, answers: map[string]int{}, chaos: map[string]int{},
		lost: map[string]struct{}{}, byKind: map[ledger.Kind]int{}}
}

func (r *report) do(f func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	f()
}

func (r *report) killed(at string, minting int) {
	r.do(func() { r.kills[at]++; r.atProxy = append(r.atProxy, minting) })
}
func (r *report) refused(act, why string) { r.do(func() { r.refusals[act+": "+why]++ }) }
func (r *report) ended(act string)        { r.do(func() { r.answers[act]++ }) }
func (r *report) reloaded()               { r.do(func() { r.reloads++ }) }
func (r *report) disturbed(what string)   { r.do(func() { r.chaos[what]++ }) }
func (r *report) untold(role string)      { r.do(func() { r.lost[role] = struct{}{} }) }
func (r *report) drained(t time.Duration) { r.do(func() { r.drain = t }) }
func (r *report) lookFailed(err error)    { r.do(func() { r.lookErrors++; r.lastLook = err.Error() }) }
func (r *report) looked(c ledger.Count, s seen) {
	r.do(func() {
		r.looks++
		r.most.Roles = max(r.most.Roles, c.Roles)
		r.most.Tokens = max(r.most.Tokens, c.Tokens)
		r.most.Unsettled = max(r.most.Unsettled, c.Unsettled)
		r.most.Open = max(r.most.Open, c.Open)
		r.most.Revoking = max(r.most.Revoking, c.Revoking)
		r.unused = max(r.unused, s.unused)
	})
}

func (r *report) login(works bool, err error) {
	r.do(func() {
		switch {
		case err != nil:
			r.noLogin++
		case works:
			r.logins[1]++
		default:
			r.logins[0]++
		}
	})
}

// violated notes a violation and reports whether it is to be shown: each once,
// and not endlessly many.
func (r *report) violated(v ledger.Violation) (show bool) {
	r.do(func() {
		if slices.ContainsFunc(r.violations, func(w ledger.Violation) bool { return v.Kind == w.Kind && v.Lease == w.Lease && v.Lease != "" }) {
			return // the same thing, seen again
		}
		r.byKind[v.Kind]++
		if len(r.violations) < 1000 {
			r.violations = append(r.violations, v)
		}
		show = len(r.violations) <= 20
	})
	return show
}

func (r *report) count() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := 0
	for _, k := range r.byKind {
		n += k
	}
	return n
}

// line is how far a run has come.
func (r *report) line(round int, t ledger.Totals, delivered int) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return fmt.Sprintf("round %d, %s: %d leases begun, %d made, %d delivered; at most %d open, %d being ended; %d violations",
		round, time.Since(r.began).Round(time.Second), t.Intended, t.Active, delivered, r.most.Open, r.most.Revoking, len(r.violations))
}

// summary is the report as --json writes it.
type summary struct {
	Seed            uint64              `json:"seed"`
	Clients         int                 `json:"clients"`
	Mutant          string              `json:"mutant,omitempty"`
	Took            string              `json:"took"`
	Drained         string              `json:"drained"`
	Kills           int                 `json:"kills"`
	KillsRandom     int                 `json:"kills_random"`
	KillsFailpoint  map[string]int      `json:"kills_failpoint"`
	KillsWithMints  int                 `json:"kills_with_mints_in_flight"`
	MintsCut        []int               `json:"mints_in_flight_at_each_kill"`
	MintsAtProxy    []int               `json:"mints_at_the_proxy_at_each_kill"`
	Evidence        ledger.Totals       `json:"evidence"`
	Delivered       int                 `json:"delivered"`
	Looks           int                 `json:"looks"`
	LookErrors      int                 `json:"look_errors"`
	Most            ledger.Count        `json:"most_at_a_look"`
	UnusedTokens    int                 `json:"most_unused_tokens"`
	LoginsWorked    int                 `json:"logins_worked"`
	LoginsRefused   int                 `json:"logins_refused"`
	LoginsUntried   int                 `json:"logins_untried"`
	RolesUntold     int                 `json:"roles_that_vault_told_nobody_of"`
	StraysPlanted   int                 `json:"strays_planted"`
	StraysSwept     int                 `json:"strays_swept"`
	StrayLongest    string              `json:"stray_longest"`
	Answered        map[string]int      `json:"ends_answered"`
	Reloads         int                 `json:"reloads"`
	Disturbed       map[string]int      `json:"disturbed"`
	Faults          map[proxy.Fault]int `json:"faults"`
	Refusals        map[string]int      `json:"refusals"`
	Orphans         int                 `json:"orphans"`
	DeliveredLate   int                 `json:"delivered_after_close"`
	WithoutEvidence int                 `json:"changes_without_evidence"`
	ByKind          map[ledger.Kind]int `json:"violations_by_kind"`
	Violations      []ledger.Violation  `json:"violations"`
	Dir             string              `json:"dir"`
	Error           string              `json:"error,omitempty"`
}

func (r *run) summary(failed error) summary {
	t := r.evidence.Totals()
	p := r.report
	p.mu.Lock()
	defer p.mu.Unlock()
	s := summary{
		Seed: r.opt.seed, Clients: r.opt.clients, Mutant: r.opt.mutate,
		Took: time.Since(p.began).Round(time.Millisecond).String(), Drained: p.drain.Round(time.Millisecond).String(),
		KillsRandom: p.kills[""], KillsFailpoint: map[string]int{}, MintsAtProxy: p.atProxy,
		Evidence: t, Delivered: r.deliveries.Count(), Looks: p.looks, LookErrors: p.lookErrors, Most: p.most, UnusedTokens: p.unused,
		LoginsRefused: p.logins[0], LoginsWorked: p.logins[1], LoginsUntried: p.noLogin,
		RolesUntold: len(p.lost), StraysPlanted: r.strays.count, StraysSwept: r.strays.swept, StrayLongest: r.strays.longest.Round(time.Millisecond).String(), Answered: p.answers, Reloads: p.reloads, Disturbed: p.chaos, Faults: r.proxy.Faults(), Refusals: p.refusals,
		Orphans: p.byKind[ledger.Orphan], DeliveredLate: p.byKind[ledger.Late], WithoutEvidence: p.byKind[ledger.NoEvidence],
		ByKind: p.byKind, Violations: p.violations, Dir: r.opt.dir,
	}
	for at, n := range p.kills {
		s.Kills += n
		if at != "" {
			s.KillsFailpoint[at] = n
		}
	}
	if len(t.Cuts) > 1 {
		s.MintsCut = t.Cuts[1:] // the first start followed no kill
	}
	for _, n := range s.MintsCut {
		if n > 0 {
			s.KillsWithMints++
		}
	}
	if failed != nil {
		s.Error = failed.Error()
	}
	return s
}

func (s summary) write(w io.Writer) {
	total := 0
	for _, n := range s.MintsCut {
		total += n
	}
	fmt.Fprintf(w, "\ntorture: seed %d, %d clients, %s and %s of draining\n", s.Seed, s.Clients, s.Took, s.Drained)
	fmt.Fprintf(w, "  kills                      %d: %d at random instants, %d at failpoints (%s)\n", s.Kills, s.KillsRandom, s.Kills-s.KillsRandom, counts(s.KillsFailpoint))
	fmt.Fprintf(w, "  with mints in flight       %d kills, %d mints in all\n", s.KillsWithMints, total)
	fmt.Fprintf(w, "  mints at each kill         %s\n", strings.Trim(fmt.Sprint(s.MintsCut), "[]"))
	fmt.Fprintf(w, "  leases                     %d begun, %d made, %d delivered\n", s.Evidence.Intended, s.Evidence.Active, s.Delivered)
	fmt.Fprintf(w, "  ended by                   %s\n", counts(s.Evidence.Ended))
	fmt.Fprintf(w, "  refusals                   %s\n", counts(s.Refusals))
	fmt.Fprintf(w, "  faults of the network      %s\n", counts(s.Faults))
	fmt.Fprintf(w, "  faults of the servers      %s\n", counts(s.Disturbed))
	fmt.Fprintf(w, "  reloads                    %d\n", s.Reloads)
	fmt.Fprintf(w, "  ends that were answered    %s\n", counts(s.Answered))
	fmt.Fprintf(w, "  looks at the world         %d whole, %d failed; at most %d roles (%d unsettled), %d leases open\n", s.Looks, s.LookErrors, s.Most.Roles, s.Most.Unsettled, s.Most.Open)
	fmt.Fprintf(w, "  logins tried               %d worked, %d were refused, %d could not be tried\n", s.LoginsWorked, s.LoginsRefused, s.LoginsUntried)
	fmt.Fprintf(w, "  roles that Vault lost      %d told to nobody, %d planted; of these %d swept, the last after %s\n", s.RolesUntold, s.StraysPlanted, s.StraysSwept, s.StrayLongest)
	fmt.Fprintf(w, "  events of evidence         %d\n\n", s.Evidence.Events)
	fmt.Fprintf(w, "  orphans                    %d\n", s.Orphans)
	fmt.Fprintf(w, "  deliveries after close     %d\n", s.DeliveredLate)
	fmt.Fprintf(w, "  changes without evidence   %d\n", s.WithoutEvidence)
	fmt.Fprintf(w, "  violations in all          %d (%s)\n", len(s.Violations), counts(s.ByKind))
	if len(s.Violations) > 0 || s.Error != "" {
		fmt.Fprintf(w, "\nFAILED: again with --seed %d --clients %d; look at %s: history.jsonl (grep a lease's ID), mayflyd.log\n", s.Seed, s.Clients, s.Dir)
	}
	if s.Error != "" {
		fmt.Fprintf(w, "the run could not be carried through: %s\n", s.Error)
	}
}

func (s summary) writeJSON(w io.Writer) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(s)
}

// counts writes a map of counts for people, in order.
func counts[K ~string](m map[K]int) string {
	if len(m) == 0 {
		return "none"
	}
	var parts []string
	for _, k := range slices.Sorted(maps.Keys(m)) {
		parts = append(parts, fmt.Sprintf("%s %d", k, m[k]))
	}
	return strings.Join(parts, ", ")
}
