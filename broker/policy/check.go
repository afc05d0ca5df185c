package policy

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/cedar-policy/cedar-go/types"
	"github.com/cedar-policy/cedar-go/x/exp/ast"
	"github.com/cedar-policy/cedar-go/x/exp/schema/resolved"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/broker"
)

// check looks at one policy. Cedar's validator says what does not fit the
// schema, but not where, and not what was probably meant: that is found here.
type check struct {
	*loader
	file   string
	tokens []token
	member *member
	names  []Name
	failed bool
}

func (c *check) fail(at Position, format string, args ...any) {
	c.failed = true
	c.errs = append(c.errs, &Error{Position: at, Message: fmt.Sprintf(format, args...)})
}

// place is where these tokens stand in a row in the policy, or where the
// policy begins.
func (c *check) place(row ...string) Position {
	if i := find(c.tokens, row...); i >= 0 {
		return c.tokenAt(i)
	}
	return c.member.at
}

func (c *check) tokenAt(i int) Position {
	return Position{File: c.file, Line: c.tokens[i].line, Column: c.tokens[i].column}
}

func (c *check) annotations() {
	for _, a := range c.member.ast().Annotations {
		at := c.place("@", string(a.Key))
		switch a.Key {
		case "description":
			c.member.description = string(a.Value)
		case "id":
			c.id(at, string(a.Value))
		default:
			c.fail(at, "there is no annotation @%s%s", a.Key, broker.Suggest(string(a.Key), "annotations", []string{"id", "description"}))
		}
	}
	if c.member.id == "" && !c.failed {
		c.fail(c.member.at, `the policy has no ID: write @id("a.name.of.its.own") before it`)
	}
}

func (c *check) id(at Position, id string) {
	switch first, twice := c.first[id]; {
	case !idForm.MatchString(id):
		c.fail(at, "ID %s must be letters, digits, '.', '_', '/' and '-', and have 1 to 128 characters", show(id))
	case strings.HasPrefix(id, builtinIDs) && !c.builtin:
		c.fail(at, "IDs that begin with %q are the built-in policies'", builtinIDs)
	case twice:
		c.fail(at, "ID %s is used here and at %s", show(id), first)
	default:
		c.first[id], c.member.id = at, id
	}
}

// expressions looks at the scope and the conditions for names that are not
// there, and for what can only be a mistake.
func (c *check) expressions() {
	p := c.member.ast()
	for _, scope := range []ast.IsScopeNode{p.Principal, p.Action, p.Resource} {
		switch s := scope.(type) {
		case ast.ScopeTypeEq:
			c.entity(s.Entity)
		case ast.ScopeTypeIn:
			c.entity(s.Entity)
		case ast.ScopeTypeInSet:
			for _, e := range s.Entities {
				c.entity(e)
			}
		case ast.ScopeTypeIs:
			c.entityType(s.Type, "is", string(s.Type))
		case ast.ScopeTypeIsIn:
			c.entityType(s.Type, "is", string(s.Type))
			c.entity(s.Entity)
		}
	}
	for _, cond := range p.Conditions {
		ast.Inspect(ast.NewNode(cond.Body), func(n ast.IsNode) bool {
			c.node(n)
			return true
		})
	}
}

func (c *check) node(n ast.IsNode) {
	switch n := n.(type) {
	case ast.NodeValue:
		if uid, ok := n.Value.(types.EntityUID); ok {
			c.entity(uid)
		}
	case ast.NodeTypeIs:
		c.entityType(n.EntityType, "is", string(n.EntityType))
	case ast.NodeTypeIsIn:
		c.entityType(n.EntityType, "is", string(n.EntityType))
		c.literalLeft(n.Left)
	case ast.NodeTypeIn:
		c.literalLeft(n.Left)
	case ast.NodeTypeHas:
		if all := c.attributes(); !slices.Contains(all, string(n.Value)) {
			c.fail(c.attributePlace(string(n.Value), "has"), "there is no attribute %s anywhere, so this is never true%s", show(string(n.Value)),
				broker.Suggest(string(n.Value), "attributes", all))
		}
	case ast.NodeTypeAccess:
		if uid, ok := literal(n.Arg); ok {
			c.fail(c.entityPlace(uid), "an attribute of a named entity cannot be read; compare principal, resource or context.agent with %s instead", uid)
		}
	case ast.NodeTypeGetTag:
		c.literalTag(n.Left)
	case ast.NodeTypeHasTag:
		c.literalTag(n.Left)
	case ast.NodeTypeEquals:
		c.compared(n.Left, n.Right)
	case ast.NodeTypeNotEquals:
		c.compared(n.Left, n.Right)
	case ast.NodeTypeContains:
		if set, ok := n.Left.(ast.NodeTypeSet); ok {
			for _, e := range set.Elements {
				c.compared(n.Right, e)
			}
		}
	}
}

func literal(n ast.IsNode) (types.EntityUID, bool) {
	v, ok := n.(ast.NodeValue)
	if !ok {
		return types.EntityUID{}, false
	}
	uid, ok := v.Value.(types.EntityUID)
	return uid, ok
}

func (c *check) literalLeft(left ast.IsNode) {
	if uid, ok := literal(left); ok {
		c.fail(c.entityPlace(uid), "what %s is in cannot be asked; ask it of principal or resource", uid)
	}
}

func (c *check) literalTag(left ast.IsNode) {
	if uid, ok := literal(left); ok {
		c.fail(c.entityPlace(uid), "a tag of a named entity cannot be read; compare principal, resource or context.agent with %s instead", uid)
	}
}

// compared looks at an attribute that is compared with a text.
func (c *check) compared(a, b ast.IsNode) {
	access, ok := a.(ast.NodeTypeAccess)
	if !ok {
		a, b = b, a
		if access, ok = a.(ast.NodeTypeAccess); !ok {
			return
		}
	}
	v, ok := b.(ast.NodeValue)
	if !ok {
		return
	}
	text, ok := v.Value.(types.String)
	if !ok {
		return
	}
	name := string(access.Value)
	if known, limited := values()[name]; limited && !slices.Contains(known, string(text)) {
		c.fail(c.place(quoted(string(text))), "%s is never %s%s", name, show(string(text)), broker.Suggest(string(text), "values", known))
	}
	if !slices.Contains(c.set.literals[name], string(text)) {
		c.set.literals[name] = append(c.set.literals[name], string(text))
	}
}

func quoted(s string) string { return `"` + s + `"` }

func (c *check) entityType(t types.EntityType, row ...string) bool {
	if _, ok := c.schema.Entities[t]; ok {
		return true
	}
	var known []string
	for name := range c.schema.Entities {
		known = append(known, string(name))
	}
	slices.Sort(known)
	at := c.place(row...)
	if i := find(c.tokens, row...); i >= 0 && row[0] == "is" {
		at = c.tokenAt(i + 1)
	}
	c.fail(at, "there is no entity type %s%s", show(string(t)), broker.Suggest(string(t), "types", known))
	return false
}

func (c *check) entityPlace(uid types.EntityUID) Position {
	row := append(strings.Split(string(uid.Type), "::"), quoted(string(uid.ID)))
	var tokens []string
	for i, part := range row {
		if i > 0 {
			tokens = append(tokens, "::")
		}
		tokens = append(tokens, part)
	}
	if i := find(c.tokens, tokens...); i >= 0 {
		return c.tokenAt(i)
	}
	return c.place(row[0], "::")
}

// entity looks at an entity that the policy names.
func (c *check) entity(uid types.EntityUID) {
	at := c.entityPlace(uid)
	id := string(uid.ID)
	if uid.Type == typeAction {
		if _, ok := c.schema.Actions[uid]; !ok {
			var known []string
			for _, a := range Actions() {
				known = append(known, string(a))
			}
			c.fail(at, "there is no action %s%s", show(id), broker.Suggest(id, "actions", known))
		}
		return
	}
	if !c.entityType(uid.Type, append(strings.Split(string(uid.Type), "::")[:1], "::")...) {
		return
	}
	switch uid.Type {
	case typeAgent, typeService:
		if s, err := spiffeid.FromString(id); err != nil || s.Path() == "" {
			c.fail(at, "%s names an identity by its SPIFFE ID, and %s is none of a workload", uid.Type, show(id))
		}
	case typeBroker:
		if id != BrokerName {
			c.fail(at, "the only broker is %s::%q", uid.Type, BrokerName)
		}
	case typeGroup:
		if strings.HasPrefix(id, ReservedGroups) && id != OperatorsGroup {
			c.fail(at, "there is no group %s; the only one of the broker's own is %q", show(id), OperatorsGroup)
		}
	case typeParams, typeIntegers:
		c.fail(at, "the parameters of a request have no name; read context.params and context.integers")
	}
	c.names = append(c.names, Name{Position: at, Type: string(uid.Type), ID: id, Policy: c.member.id})
}

// attributes are all attributes of all records, sorted.
func (c *check) attributes() []string {
	all := map[string]bool{}
	var add func(resolved.RecordType)
	add = func(r resolved.RecordType) {
		for name, a := range r {
			all[string(name)] = true
			if inner, ok := a.Type.(resolved.RecordType); ok {
				add(inner)
			}
		}
	}
	for _, e := range c.schema.Entities {
		add(e.Shape)
	}
	for _, a := range c.schema.Actions {
		add(a.AppliesTo.Context)
	}
	return slices.Sorted(maps.Keys(all))
}

// attributePlace is where an attribute is read.
func (c *check) attributePlace(name, before string) Position {
	for _, row := range [][]string{{before, name}, {".", name}, {"[", quoted(name)}, {before, quoted(name)}} {
		if i := find(c.tokens, row...); i >= 0 {
			return c.tokenAt(i + 1)
		}
	}
	return c.member.at
}

// validate asks Cedar's validator, and finds the places of what it says.
func (c *check) validate() {
	err := c.validator.Policy("", c.member.ast())
	if err == nil {
		return
	}
	for _, each := range flatten(err) {
		c.invalid(each.Error())
	}
}

func flatten(err error) []error {
	joined, ok := err.(interface{ Unwrap() []error })
	if !ok {
		return []error{err}
	}
	var all []error
	for _, e := range joined.Unwrap() {
		all = append(all, flatten(e)...)
	}
	return all
}

var (
	noEntityAttribute  = regexp.MustCompile("^attribute `(.+)` on entity type `(.+)` not found$")
	noEntitiesAttr     = regexp.MustCompile("^attribute `(.+)` on entity types (.+) not found$")
	noContextAttribute = regexp.MustCompile("^attribute `(.+)` in context for Action::(\".+\") not found$")
)

// invalid reports one thing that the validator says.
func (c *check) invalid(text string) {
	if m := noEntityAttribute.FindStringSubmatch(text); m != nil {
		e := c.schema.Entities[types.EntityType(m[2])]
		c.unknownAttribute(m[1], "of "+m[2], e.Shape)
		return
	}
	if m := noEntitiesAttr.FindStringSubmatch(text); m != nil {
		c.fail(c.attributePlace(m[1], "."), "there is no attribute %s of all of %s%s", show(m[1]), m[2], broker.Suggest(m[1], "attributes", c.attributes()))
		return
	}
	if m := noContextAttribute.FindStringSubmatch(text); m != nil {
		action, _ := strconv.Unquote(m[2])
		context := c.schema.Actions[actionUID(Action(action))].AppliesTo.Context
		c.unknownAttribute(m[1], "in the context of "+action, context)
		return
	}
	switch {
	case strings.HasPrefix(text, "unable to find an applicable action"):
		text = "the policy can never apply: no action has such a principal and such a resource (see the schema)"
	case strings.Contains(text, "tag"):
		text += "; ask with hasTag first"
	}
	c.fail(c.member.at, "%s", broker.Clean(broker.Shorten(text, 300)))
}

// unknownAttribute reports an attribute that a record does not have. The
// validator names one of a record within another by its last part alone, or by
// its whole path.
func (c *check) unknownAttribute(name, of string, record resolved.RecordType) {
	last := name[strings.LastIndexByte(name, '.')+1:]
	candidates := slices.Clone(keys(record))
	for outer, a := range record {
		inner, ok := a.Type.(resolved.RecordType)
		if !ok {
			continue
		}
		// The record is meant that the access goes through in the text.
		if find(c.tokens, string(outer), ".", last) >= 0 {
			candidates = keys(inner)
			of = "of " + string(outer)
		}
	}
	c.fail(c.attributePlace(last, "."), "there is no attribute %s %s%s", show(last), of, broker.Suggest(last, "attributes", candidates))
}

func keys(r resolved.RecordType) []string {
	var all []string
	for name := range r {
		all = append(all, string(name))
	}
	slices.Sort(all)
	return all
}

// show makes a word of a policy safe to print.
func show(s string) string { return fmt.Sprintf("%q", broker.Clean(broker.Shorten(s, 80))) }
