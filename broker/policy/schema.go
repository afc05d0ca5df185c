package policy

import (
	_ "embed"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/cedar-policy/cedar-go/types"
	"github.com/cedar-policy/cedar-go/x/exp/schema"
	"github.com/cedar-policy/cedar-go/x/exp/schema/resolved"
)

//go:embed mayfly.cedarschema
var schemaText string

// SchemaText is the schema of policies, in Cedar's language: what a team gives
// to its editor or to Cedar's own tools.
func SchemaText() string { return schemaText }

// The entity types of the schema.
const (
	typeAction   = "Action"
	typeAgent    = "Agent"
	typePerson   = "Person"
	typeService  = "Service"
	typeGroup    = "Group"
	typeTool     = "Tool"
	typeProvider = "Provider"
	typeBroker   = "Broker"
	typeParams   = "Params"
	typeIntegers = "Integers"
)

// Names of entities that are the broker's own.
const (
	// BrokerName is the only Broker: what administer is about.
	BrokerName = "mayfly"
	// ReservedGroups begins the names of groups that are the broker's own. No
	// identity provider and no catalog puts anybody into one.
	ReservedGroups = "mayfly:"
	// OperatorsGroup holds whoever Subject.Operator is set for.
	OperatorsGroup = ReservedGroups + "operators"
)

// values are the only texts that some attributes can be: a policy that
// compares one with another text has a misspelling in it.
func values() map[string][]string {
	verbs := make([]string, 0, len(Verbs()))
	for _, v := range Verbs() {
		verbs = append(verbs, string(v))
	}
	return map[string][]string{
		"verb":        verbs,
		"sensitivity": {"low", "medium", "high"},
		"method":      {"browser", "device", "bearer"},
	}
}

func loadSchema() (*resolved.Schema, error) {
	var s schema.Schema
	s.SetFilename("mayfly.cedarschema")
	if err := s.UnmarshalCedar([]byte(schemaText)); err != nil {
		return nil, fmt.Errorf("reading the schema of policies: %w", err)
	}
	r, err := s.Resolve()
	if err != nil {
		return nil, fmt.Errorf("resolving the schema of policies: %w", err)
	}
	return r, nil
}

// Reference is the reference page of what policies can read, in Markdown, made
// from the schema.
func Reference() (string, error) {
	s, err := loadSchema()
	if err != nil {
		return "", err
	}
	var b strings.Builder
	b.WriteString("# What a policy can read\n\n" +
		"Policies are written in [Cedar](https://docs.cedarpolicy.com/policies/syntax-policy.html), in files that end\n" +
		"in `.cedar` and stand beside the catalog's others. This page is made from their schema,\n" +
		"[mayfly.cedarschema](mayfly.cedarschema), which an editor or Cedar's own tools can use.\n\n" +
		"- Each policy has an ID of its own: `@id(\"payments.initiate.office-hours\")`. Evidence names it. `@description` is for people.\n" +
		"- Nothing is allowed that no policy permits, and one that forbids wins over all that permit.\n" +
		"- **A policy that cannot be evaluated denies** (an integer that overflows): Cedar alone would skip it.\n" +
		"- Every attribute is always there. What does not apply is empty, `false` or, for an age, 1000000000000. Only labels and\n" +
		"  parameters need asking: `resource.hasTag(\"class\") && resource.getTag(\"class\") == \"personal\"`.\n" +
		"- A set that does not fit the schema is refused with file, line, column and the nearest valid name. So are the ID of a tool,\n" +
		"  an agent or a provider that the catalog does not have, and an unknown `verb`, `sensitivity` or `method`.\n" +
		"- A decision is quick where a policy names its tool, its agent or its group: in its scope, or at the very beginning of its first `when`.\n\n" +
		"## Actions\n\n")
	for _, a := range Actions() {
		uid := types.NewEntityUID(typeAction, types.String(a))
		action := s.Actions[uid]
		fmt.Fprintf(&b, "### `%s`\n\n%s\n\nPrincipal: %s. Resource: %s.\n\n", uid, action.Annotations["doc"],
			list(action.AppliesTo.Principals), list(action.AppliesTo.Resources))
		if a == ActionAdminister || a == ActionRequest {
			b.WriteString("| Context | Type | What it is |\n|---|---|---|\n")
			rows(&b, "context", action.AppliesTo.Context)
			b.WriteByte('\n')
		} else {
			b.WriteString("The context is that of `request`.\n\n")
		}
	}
	b.WriteString("The verbs of `administer` are ")
	for i, v := range Verbs() {
		if i > 0 {
			b.WriteString(", ")
		}
		fmt.Fprintf(&b, "`%s`", v)
	}
	b.WriteString(".\n\n## Entities\n")
	for _, name := range slices.Sorted(maps.Keys(s.Entities)) {
		e := s.Entities[name]
		fmt.Fprintf(&b, "\n### `%s`\n\n%s\n", name, e.Annotations["doc"])
		if len(e.ParentTypes) > 0 {
			fmt.Fprintf(&b, "\nIt can be in %s.\n", list(e.ParentTypes))
		}
		if e.Tags != nil {
			fmt.Fprintf(&b, "\nIts tags are of type %s.\n", typeName(e.Tags))
		}
		if len(e.Shape) > 0 {
			b.WriteString("\n| Attribute | Type | What it is |\n|---|---|---|\n")
			rows(&b, "", e.Shape)
		}
	}
	return b.String() + "\n## Without any policy\n\nA catalog without a policy file has these:\n\n```cedar\n" + builtinText + "```\n", nil
}

func list(all []types.EntityType) string {
	words := make([]string, len(all))
	for i, t := range all {
		words[i] = fmt.Sprintf("`%s`", t)
	}
	return strings.Join(words, ", ")
}

// rows writes a table's rows, a record's attributes after the record.
func rows(b *strings.Builder, prefix string, record resolved.RecordType) {
	for _, name := range slices.Sorted(maps.Keys(record)) {
		a, path := record[name], string(name)
		if prefix != "" {
			path = prefix + "." + path
		}
		fmt.Fprintf(b, "| `%s` | %s | %s |\n", path, typeName(a.Type), a.Annotations["doc"])
		if inner, ok := a.Type.(resolved.RecordType); ok {
			rows(b, path, inner)
		}
	}
}

func typeName(t resolved.IsType) string {
	switch t := t.(type) {
	case resolved.StringType:
		return "String"
	case resolved.LongType:
		return "Long"
	case resolved.BoolType:
		return "Bool"
	case resolved.ExtensionType:
		return string(t)
	case resolved.EntityType:
		return "`" + string(t) + "`"
	case resolved.RecordType:
		return "record"
	}
	return "unknown"
}
