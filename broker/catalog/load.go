package catalog

import (
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/catalog/strictyaml"
	"github.com/mayfly-security/mayfly/broker/policy"
	"github.com/mayfly-security/mayfly/providers"
)

// Limits on what a catalog may say.
const (
	maxTTL    = 24 * time.Hour
	maxOpen   = 1000
	maxLabels = 32

	// What an agent may have and do, where its entry does not say.
	defaultLeases, mostLeases   = 1000, 100_000
	defaultPerHour, mostPerHour = 3600, 1_000_000
	maxText                     = 1000 // bytes of a description, an owner or a label
	maxPattern                  = 500  // bytes of a regular expression
	maxID                       = 512  // bytes of a SPIFFE ID: it is part of the store's keys
)

var (
	nameForm = regexp.MustCompile(`^[a-z][a-z0-9._-]{0,62}$`)
	envForm  = regexp.MustCompile(`^[A-Z_][A-Z0-9_]{0,63}$`)
)

// Load reads the catalog from files, as one set: an entry of one file may name
// what another defines. The drivers are those that providers may name. The
// error is strictyaml.Errors with everything that is wrong, each with its file
// and line, unless a file cannot be read.
func Load(files []string, drivers map[string]providers.Driver) (*Snapshot, error) {
	if len(files) == 0 {
		return nil, errors.New("reading the catalog: no file is named")
	}
	l := &loader{drivers: drivers, snapshot: &Snapshot{
		agents: map[spiffeid.ID]broker.Agent{}, groups: map[string]map[spiffeid.ID]bool{},
		operators: map[spiffeid.ID]bool{}, providers: map[string]Provider{},
		tools: map[string]broker.Tool{}, scopes: map[string]providers.ScopeInfo{},
		openers: map[spiffeid.ID]policy.Opener{}, people: map[string]map[string]bool{},
		operating: map[string]bool{}, rules: map[string]broker.ApprovalRule{},
	}, at: map[string]strictyaml.Position{}}
	var sources []source
	var policies []policy.Source
	for _, name := range files {
		if isPolicies(name) {
			text, err := strictyaml.ReadRegular(name)
			if err != nil {
				return nil, fmt.Errorf("loading the catalog: %w", err)
			}
			policies = append(policies, policy.Source{Name: name, Text: string(text)})
			continue
		}
		var s source
		var errs strictyaml.Errors
		var err error
		if s.doc, err = strictyaml.ReadFile(name, &s.file); errors.As(err, &errs) {
			l.errs = append(l.errs, errs...)
		} else if err != nil {
			return nil, fmt.Errorf("loading the catalog: %w", err)
		}
		sources = append(sources, s)
	}
	if err := l.wrong(); err != nil {
		return nil, err // what could not be read would only cause more errors
	}
	// What is named comes before what names it.
	for _, step := range []func(source){l.agents, l.groups, l.operators, l.rules, l.providers, l.tools, l.openers} {
		for _, s := range sources {
			step(s)
		}
	}
	l.separation(sources)
	l.policies(policies)
	if err := l.wrong(); err != nil {
		return nil, err
	}
	l.snapshot.seal()
	return l.snapshot, nil
}

// wrong returns everything that is wrong so far, in order.
func (l *loader) wrong() error {
	if len(l.errs) == 0 {
		return nil
	}
	l.errs.Sort()
	return l.errs
}

// source is one file that was read.
type source struct {
	doc  *strictyaml.Document
	file file
}

type loader struct {
	drivers  map[string]providers.Driver
	snapshot *Snapshot
	errs     strictyaml.Errors
	at       map[string]strictyaml.Position // where each thing was first defined, by kind and name
}

func (l *loader) fail(s source, path, format string, args ...any) {
	l.errs = append(l.errs, s.doc.Errorf(path, format, args...))
}

// define notes where a thing is defined, and refuses a second definition.
func (l *loader) define(s source, path, kind, name string) bool {
	key := kind + " " + name
	if first, twice := l.at[key]; twice {
		l.fail(s, path, "%s is defined here and at %s", key, first)
		return false
	}
	l.at[key] = s.doc.At(path)
	return true
}

// name checks the name of a group, a provider, a tool or a parameter.
func (l *loader) name(s source, path, name string) bool {
	if nameForm.MatchString(name) {
		return true
	}
	if name == "" {
		l.fail(s, path, "name is missing")
		return false
	}
	l.fail(s, path, "name %s must be lowercase letters, digits, '.', '_' and '-', begin with a letter and have at most 63 characters", show(name))
	return false
}

// id reads an exact SPIFFE ID.
func (l *loader) id(s source, path, text string) (spiffeid.ID, bool) {
	switch {
	case text == "":
		l.fail(s, path, "a SPIFFE ID is missing")
	case strings.ContainsAny(text, "*?"):
		l.fail(s, path, "%s has a wildcard; name each identity by itself", show(text))
	default:
		if len(text) > maxID {
			l.fail(s, path, "the SPIFFE ID has %d bytes; at most %d are taken", len(text), maxID)
			break
		}
		id, err := spiffeid.FromString(text)
		if err == nil && id.Path() != "" {
			return id, true
		}
		if err == nil {
			err = errors.New("it names a trust domain and nobody in it")
		}
		l.fail(s, path, "%s is no SPIFFE ID of a workload: %v", show(text), err)
	}
	return spiffeid.ID{}, false
}

// text checks words for people.
func (l *loader) text(s source, path, what, text string, required bool) {
	if text == "" && required {
		l.fail(s, path, "%s is missing", what)
		return
	}
	if err := broker.CheckText(what, text, maxText); err != nil {
		var e *broker.Error
		errors.As(err, &e)
		l.fail(s, path, "%s", e.Message)
	}
}

// span checks a duration that a catalog must give.
func (l *loader) span(s source, path, what string, d time.Duration) {
	if d < time.Second || d > maxTTL {
		l.fail(s, path, "%s is %s; it must be between 1s and %s", what, d, maxTTL)
	}
}

func (l *loader) agents(s source) {
	for i, e := range s.file.Agents {
		path := fmt.Sprintf("agents[%d]", i)
		id, ok := l.id(s, path+".id", e.ID)
		l.text(s, path+".owner", "owner", e.Owner, true)
		l.text(s, path+".environment", "environment", e.Environment, true)
		l.labels(s, path+".labels", e.Labels)
		if ok && l.define(s, path+".id", "agent", id.String()) {
			l.snapshot.agents[id] = broker.Agent{ID: id, Owner: e.Owner, Environment: e.Environment, Labels: e.Labels, Disabled: e.Disabled,
				MaxLeases:  l.number(s, path+".max_leases", e.MaxLeases, defaultLeases, mostLeases),
				MaxPerHour: l.number(s, path+".max_per_hour", e.MaxPerHour, defaultPerHour, mostPerHour)}
		}
	}
}

// number is a number of at least one, or what it is where none is given.
func (l *loader) number(s source, path string, given *int, normal, most int) int {
	if given == nil {
		return normal
	}
	if *given < 1 || *given > most {
		l.fail(s, path, "%s is %d; it must be between 1 and %d", path[strings.LastIndexByte(path, '.')+1:], *given, most)
	}
	return *given
}

func (l *loader) labels(s source, path string, labels map[string]string) {
	if len(labels) > maxLabels {
		l.fail(s, path, "there are %d labels; at most %d are taken", len(labels), maxLabels)
	}
	for k, v := range labels {
		l.name(s, path+"."+k, k)
		l.text(s, path+"."+k, "label "+show(k), v, false)
	}
}

func (l *loader) groups(s source) {
	for i, e := range s.file.Groups {
		path := fmt.Sprintf("groups[%d]", i)
		if !l.name(s, path+".name", e.Name) || !l.define(s, path+".name", "group", e.Name) {
			continue
		}
		members := map[spiffeid.ID]bool{}
		for j, m := range e.Members {
			if id, ok := l.id(s, fmt.Sprintf("%s.members[%d]", path, j), m); ok {
				members[id] = true
			}
		}
		people := map[string]bool{}
		for j, name := range e.People {
			at := fmt.Sprintf("%s.people[%d]", path, j)
			l.person(s, at, name)
			if people[name] {
				l.fail(s, at, "%s is listed twice", show(name))
			}
			people[name] = true
		}
		l.snapshot.groups[e.Name], l.snapshot.people[e.Name] = members, people
	}
}

func (l *loader) operators(s source) {
	for i, e := range s.file.Operators {
		path := fmt.Sprintf("operators[%d]", i)
		switch {
		case (e.ID == "") == (e.Group == ""):
			l.fail(s, path, "an operator is either an id or a group")
		case e.ID != "":
			if id, ok := l.id(s, path+".id", e.ID); ok {
				l.snapshot.operators[id] = true
			}
		default:
			for id := range l.group(s, path+".group", e.Group) {
				l.snapshot.operators[id] = true
			}
			l.snapshot.operating[e.Group] = true
		}
	}
}

// group looks a group up.
func (l *loader) group(s source, path, name string) map[spiffeid.ID]bool {
	members, ok := l.snapshot.groups[name]
	if !ok {
		l.fail(s, path, "there is no group %s%s", show(name), suggest(name, "groups", l.snapshot.groups))
	}
	return members
}

func (l *loader) openers(s source) {
	for i, e := range s.file.Openers {
		path := fmt.Sprintf("openers[%d]", i)
		id, ok := l.id(s, path+".id", e.ID)
		o := policy.Opener{ID: id, MaxDuration: e.MaxDuration, MaxOpen: e.MaxOpen, Closers: e.Closers,
			MaxPerHour: l.number(s, path+".max_per_hour", e.MaxPerHour, defaultPerHour, mostPerHour)}
		l.span(s, path+".max_duration", "max_duration", e.MaxDuration)
		if e.MaxOpen < 1 || e.MaxOpen > maxOpen {
			l.fail(s, path+".max_open", "max_open is %d; it must be between 1 and %d", e.MaxOpen, maxOpen)
		}
		if e.Closers != "" {
			l.group(s, path+".closers", e.Closers)
		}
		o.Tools = l.openerTools(s, path, e)
		o.Agents = l.openerAgents(s, path, e, id)
		if ok && l.define(s, path+".id", "opener", id.String()) {
			l.snapshot.openers[id] = o
		}
	}
}

func (l *loader) openerTools(s source, path string, e opener) []string {
	if len(e.Tools) == 0 {
		l.fail(s, path+".tools", "an opener needs at least one tool")
	}
	seen := map[string]bool{}
	for j, t := range e.Tools {
		at := fmt.Sprintf("%s.tools[%d]", path, j)
		if _, defined := l.at["tool "+t]; !defined {
			l.fail(s, at, "there is no tool %s%s", show(t), suggest(t, "tools", l.snapshot.tools))
		}
		if seen[t] {
			l.fail(s, at, "tool %s is named twice", show(t))
		}
		seen[t] = true
	}
	return e.Tools
}

func (l *loader) openerAgents(s source, path string, e opener, self spiffeid.ID) []spiffeid.ID {
	if len(e.Agents) == 0 {
		l.fail(s, path+".agents", "an opener needs at least one agent")
	}
	var agents []spiffeid.ID
	seen := map[spiffeid.ID]bool{}
	for j, a := range e.Agents {
		at := fmt.Sprintf("%s.agents[%d]", path, j)
		id, ok := l.id(s, at, a)
		if !ok {
			continue
		}
		switch _, known := l.snapshot.agents[id]; {
		case id == self:
			l.fail(s, at, "an opener cannot open windows for itself")
		case !known:
			l.fail(s, at, "there is no agent %s%s", show(a), broker.Suggest(a, "agents", l.agentIDs()))
		case seen[id]:
			l.fail(s, at, "agent %s is named twice", show(a))
		}
		seen[id] = true
		agents = append(agents, id)
	}
	return agents
}

func (l *loader) agentIDs() []string {
	var ids []string
	for _, a := range l.snapshot.Agents() {
		ids = append(ids, a.ID.String())
	}
	return ids
}

// separation keeps those who ask apart from those who give: an agent is no
// operator and no opener, so that whoever holds an agent's SVID can grant
// itself nothing.
func (l *loader) separation(sources []source) {
	for _, s := range sources {
		for i, e := range s.file.Agents {
			id, err := spiffeid.FromString(e.ID)
			if err != nil {
				continue
			}
			path := fmt.Sprintf("agents[%d].id", i)
			if l.snapshot.operators[id] {
				l.fail(s, path, "%s is an agent and an operator; an agent's SVID must not administer", id)
			}
			if _, ok := l.snapshot.openers[id]; ok {
				l.fail(s, path, "%s is an agent and an opener of incidents; let another identity open them", id)
			}
		}
	}
}

func suggest[T any](word, what string, among map[string]T) string {
	return broker.Suggest(word, what, slices.Sorted(maps.Keys(among)))
}

// show makes a word of the file safe to print.
func show(s string) string { return fmt.Sprintf("%q", broker.Clean(broker.Shorten(s, 80))) }
