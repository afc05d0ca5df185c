package vaultscope

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"unicode"

	"github.com/mayfly-security/mayfly/broker"
)

// ToolPolicy is the text of a tool's policy: what a lease's token can do, which
// is one thing.
func (c Config) ToolPolicy(tool broker.Tool, s Scope) string {
	var b strings.Builder
	fmt.Fprintf(&b, "# Tool %s of Mayfly: what the token of one lease can do, and nothing else.\n", tool.Name)
	for _, path := range s.Paths() {
		r := rule{path: path, capabilities: []string{"read"}}
		if s.Write {
			r.capabilities = []string{"update"}
			if s.Engine == EngineOther {
				r.capabilities = []string{"create", "update"} // which of them it is, the engine decides
			}
			r.allowed, r.required = s.parameters()
		}
		r.write(&b)
	}
	return b.String()
}

// parameters are what may be written to the path, and what must be: a value
// that the catalog fixes is fixed here, too.
func (s Scope) parameters() (allowed map[string][]any, required []string) {
	allowed = map[string][]any{}
	for key, value := range s.Data {
		text, literal := value.(string)
		allowed[key] = []any{}
		if flag, is := value.(bool); is { // no number: Vault compares those of a policy and of a request by their types, which differ
			allowed[key] = []any{flag}
		}
		if literal && !strings.Contains(text, "${") && !strings.ContainsFunc(text, func(r rune) bool { return !unicode.IsPrint(r) || r == '*' }) {
			allowed[key] = []any{text}
		}
		if name := strings.TrimSuffix(strings.TrimPrefix(text, reference), "}"); !s.optional[name] || text != reference+name+"}" {
			required = append(required, key)
		}
	}
	if s.SetsTTL() {
		allowed["ttl"] = []any{}
		required = append(required, "ttl")
	}
	slices.Sort(required)
	return allowed, required
}

// BrokerPolicyText is the text of the policy of the broker's own login. With an
// installation, the tokens that it makes must bear that one's name.
func (c Config) BrokerPolicyText(tools []ScopedTool, installation broker.InstallationID) string {
	var b strings.Builder
	b.WriteString("# The broker's own login. It makes tokens through the token roles below, and\n" +
		"# ends what it made. It can write no policy and no role, make no other token,\n" +
		"# and use none of the paths for which it makes tokens.\n")
	names := []any{}
	if installation != "" {
		names = append(names, Installation(installation)+"-*")
	}
	for _, t := range tools {
		fmt.Fprintf(&b, "\n# Tool %s: a token that must end and must tell whose it is; its policies are\n# the role's, whatever is asked for.\n", t.Tool.Name)
		rule{path: c.CreatePath(t.Tool.Name), capabilities: []string{"update"},
			required: []string{"display_name", "explicit_max_ttl", "meta"},
			allowed:  map[string][]any{"display_name": names, "explicit_max_ttl": {}, "meta": {}, "ttl": {}}}.write(&b)
		if t.Scope.Leased() || t.Scope.Engine == EnginePKI {
			b.WriteString("# Its leases end, and the answer waits until they have. Without the limit on\n" +
				"# parameters a lease_id in the body would end those of other paths.\n")
			for _, path := range t.Scope.Paths() {
				rule{path: "sys/leases/revoke/" + path + "/*", capabilities: []string{"update"},
					required: []string{"sync"}, allowed: map[string][]any{"sync": {true}}}.write(&b)
			}
		}
	}
	b.WriteString("\n# Tokens end by their accessor. This is the one thing that reaches further than\n" +
		"# Mayfly's own: whoever knows an accessor, which is no secret of Mayfly's, can\n" +
		"# end its token, and nothing more.\n")
	rule{path: c.RevokeAccessorPath(), capabilities: []string{"update"}, allowed: map[string][]any{"accessor": {}}}.write(&b)
	b.WriteString("\n# \"mayflyd check --live\" reads its own roles and policies, and what it may do.\n")
	for _, t := range tools {
		rule{path: c.roleWritePath(t.Tool.Name), capabilities: []string{"read"}}.write(&b)
		rule{path: policyPath(c.Policy(t.Tool.Name)), capabilities: []string{"read"}}.write(&b)
	}
	rule{path: policyPath(c.BrokerPolicy()), capabilities: []string{"read"}}.write(&b)
	rule{path: "sys/capabilities-self", capabilities: []string{"update"}}.write(&b)
	return b.String()
}

func policyPath(name string) string { return "sys/policies/acl/" + name }

func (c Config) roleWritePath(tool string) string {
	return "auth/" + c.TokenMount + "/roles/" + c.TokenRole(tool)
}

// rule is one path of a policy.
type rule struct {
	path         string
	capabilities []string
	required     []string
	allowed      map[string][]any // nil: any parameters
}

func (r rule) write(b *strings.Builder) {
	fmt.Fprintf(b, "path %s {\n", hcl(r.path))
	lines := [][2]string{{"capabilities", hcl(r.capabilities)}}
	if len(r.required) > 0 {
		lines = append(lines, [2]string{"required_parameters", hcl(r.required)})
	}
	width := 0
	for _, l := range lines {
		width = max(width, len(l[0]))
	}
	for _, l := range lines {
		fmt.Fprintf(b, "  %-*s = %s\n", width, l[0], l[1])
	}
	if r.allowed != nil {
		b.WriteString("  allowed_parameters = {\n")
		for _, key := range slices.Sorted(maps.Keys(r.allowed)) {
			fmt.Fprintf(b, "    %s = %s\n", hcl(key), hcl(r.allowed[key]))
		}
		b.WriteString("  }\n")
	}
	b.WriteString("}\n")
}

// hcl writes a string, a number, a boolean or a list of them. HCL and JSON
// write these alike, but for "${" and "%{", which Terraform's HCL expands; see
// terraformText.
func hcl(value any) string {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(value); err != nil {
		panic(fmt.Sprintf("a value of a policy has no JSON form: %v", err)) // they are all strings and booleans
	}
	return strings.ReplaceAll(strings.TrimSpace(b.String()), `","`, `", "`)
}

var boundName = regexp.MustCompile(`"display_name" = \["[a-z0-9]{9}-\*"\]`)

// SamePolicy reports whether two texts of policies say the same: but for
// comments, for space, and for the installation that a broker's policy is
// bound to.
func SamePolicy(a, b string) bool { return bare(a) == bare(b) }

// PolicyBound reports whether the text of a broker's policy binds the tokens
// that it makes to one installation's names.
func PolicyBound(policy string) bool { return boundName.MatchString(policy) }

func bare(policy string) string {
	var words []string
	for line := range strings.Lines(boundName.ReplaceAllString(policy, `"display_name" = []`)) {
		if !strings.HasPrefix(strings.TrimSpace(line), "#") {
			words = append(words, strings.Fields(line)...)
		}
	}
	return strings.Join(words, " ")
}
