package denylist

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// Quota is how many characters all inline policies of a role may have, without
// white space: of which a document has none.
const Quota = 10240

const (
	keySession   = "aws:userid"
	keyIncident  = "aws:PrincipalTag/mayfly-incident"
	keyAgent     = "aws:SourceIdentity"
	keyIssued    = "aws:TokenIssueTime"
	likeOperator = "StringLike"
	isOperator   = "StringEquals"
	notLater     = "DateLessThanEquals"
)

type statement struct {
	Sid       string                     `json:"Sid"`
	Effect    string                     `json:"Effect"`
	Action    string                     `json:"Action"`
	Resource  string                     `json:"Resource"`
	Condition map[string]map[string]list `json:"Condition"`
}

// list is one text or several, as IAM takes both.
type list []string

func (l list) MarshalJSON() ([]byte, error) {
	if len(l) == 1 {
		return json.Marshal(l[0])
	}
	return json.Marshal([]string(l))
}

func (l *list) UnmarshalJSON(raw []byte) error {
	var one string
	if json.Unmarshal(raw, &one) == nil {
		*l = list{one}
		return nil
	}
	return json.Unmarshal(raw, (*[]string)(l))
}

type document struct {
	Version   string      `json:"Version"`
	Statement []statement `json:"Statement"`
}

func denies(sid string, condition map[string]map[string]list) statement {
	return statement{Sid: sid, Effect: "Deny", Action: "*", Resource: "*", Condition: condition}
}

// Render writes the policy that denies what is in s, in a fixed order. An empty
// set has no policy: AWS takes none without a statement.
func Render(s Set) string {
	if len(s) == 0 {
		return ""
	}
	var sessions, incidents list
	agents := map[int64]list{}
	var cutOffs []int64
	for _, e := range s.Sorted() {
		switch e.Kind {
		case Lease, Probe:
			sessions = append(sessions, "*:"+e.ID)
		case Incident:
			incidents = append(incidents, e.ID)
		case Agent:
			agents[e.Before] = append(agents[e.Before], e.ID)
		case CutOff:
			cutOffs = append(cutOffs, e.Before)
		}
	}
	d := document{Version: "2012-10-17"}
	add := func(sid string, condition map[string]map[string]list) {
		d.Statement = append(d.Statement, denies(sid, condition))
	}
	if sessions != nil {
		add("MayflySession", map[string]map[string]list{likeOperator: {keySession: sessions}})
	}
	if incidents != nil {
		add("MayflyIncident", map[string]map[string]list{isOperator: {keyIncident: incidents}})
	}
	times := make([]int64, 0, len(agents))
	for before := range agents {
		times = append(times, before)
	}
	slices.SortFunc(times, cmp.Compare[int64])
	for i, before := range times {
		add(fmt.Sprintf("MayflyAgent%d", i), map[string]map[string]list{isOperator: {keyAgent: agents[before]}, notLater: {keyIssued: {stamp(before)}}})
	}
	for i, before := range cutOffs { // in their order
		sid := "MayflyCutOff"
		if i > 0 {
			sid = fmt.Sprintf("MayflyCutOff%d", i)
		}
		add(sid, map[string]map[string]list{notLater: {keyIssued: {stamp(before)}}})
	}
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(d); err != nil {
		panic(err) // texts always have a JSON form
	}
	return strings.TrimSpace(b.String())
}

func stamp(unix int64) string { return time.Unix(unix, 0).UTC().Format(time.RFC3339) }

// Size is how many characters of the quota the policy for s takes.
func Size(s Set) int { return len(Render(s)) }

// errForeign means that a policy is none that Render writes: somebody changed it.
var errForeign = errors.New("the policy is none that Mayfly writes")

// Parse reads a policy that Render wrote. Only such a one is read: what it says
// beyond that would be lost with the next writing.
func Parse(policy string) (Set, error) {
	var d document
	dec := json.NewDecoder(strings.NewReader(policy))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&d); err != nil {
		return nil, fmt.Errorf("%w: %w", errForeign, err)
	}
	s := Set{}
	for _, st := range d.Statement {
		like, is, until := st.Condition[likeOperator], st.Condition[isOperator], st.Condition[notLater]
		var before int64
		if at := until[keyIssued]; len(at) == 1 {
			t, err := time.Parse(time.RFC3339, at[0])
			if err != nil {
				return nil, errForeign
			}
			before = t.Unix()
		}
		for _, v := range like[keySession] {
			name, ok := strings.CutPrefix(v, "*:")
			if !ok || !plain(name) {
				return nil, errForeign
			}
			kind := Lease
			if IsProbe(name) {
				kind = Probe
			}
			s[Entry{Kind: kind, ID: name}] = struct{}{}
		}
		if slices.ContainsFunc(append(slices.Clone(is[keyIncident]), is[keyAgent]...), func(v string) bool { return !plain(v) }) {
			return nil, errForeign
		}
		for _, v := range is[keyIncident] {
			s[Entry{Kind: Incident, ID: v}] = struct{}{}
		}
		for _, v := range is[keyAgent] {
			s[Entry{Kind: Agent, ID: v, Before: before}] = struct{}{}
		}
		if len(like)+len(is) == 0 && before != 0 {
			s[Entry{Kind: CutOff, Before: before}] = struct{}{}
		}
	}
	// Nothing was overlooked: it is exactly what would be written for it.
	if Render(s) != compact(policy) {
		return nil, errForeign
	}
	return s, nil
}

// plain reports whether a text can be a name that Mayfly gives: no wildcard, no
// variable, nothing that stands for more than itself. What somebody else wrote
// is not kept as ours.
func plain(name string) bool {
	return name != "" && len(name) <= 64 && !strings.ContainsFunc(name, func(r rune) bool { return r != '-' && (r < '0' || r > '9') && (r < 'a' || r > 'z') })
}

func compact(policy string) string {
	var b bytes.Buffer
	if json.Compact(&b, []byte(policy)) != nil {
		return policy
	}
	return b.String()
}

// ProbePrefix begins the names of the broker's own sessions with which it sees
// that a list is in force. No lease ID begins with it.
const ProbePrefix = "mayfly-probe-"

// IsProbe reports whether a session's name is a probe's.
func IsProbe(name string) bool { return strings.HasPrefix(name, ProbePrefix) }
