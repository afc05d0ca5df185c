package aws

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"
	"github.com/google/go-cmp/cmp"
)

// finding is one thing that AWS's validator has to say of a template.
type finding struct {
	Rule, Severity, Message string
	Line                    int
}

// validation is what AWS's validator did with a template.
type validation struct {
	Rules, Resources int
	Findings         []finding
}

// validated is what AWS's validator says of templates.
func validated(t *testing.T, paths ...string) (all []validation) {
	t.Helper()
	dir, err := filepath.Abs("../../bin/testbed/cfn")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(dir); err != nil {
		t.Fatal("AWS's validator is not installed: run `make testbed-cfn`, which needs Node.js")
	}
	cmd := exec.CommandContext(t.Context(), "node", append([]string{"validate.mjs"}, paths...)...)
	var out, errs bytes.Buffer
	cmd.Dir, cmd.Stdout, cmd.Stderr = dir, &out, &errs
	if err := cmd.Run(); err != nil {
		t.Fatalf("AWS's validator: %v\n%s", err, errs.String())
	}
	for line := range strings.Lines(out.String()) {
		var v validation
		if err := json.Unmarshal([]byte(line), &v); err != nil {
			t.Fatalf("AWS's validator says %q: %v", line, err)
		}
		all = append(all, v)
	}
	if len(all) != len(paths) {
		t.Fatalf("%d validations of %d templates: %s", len(all), len(paths), errs.String())
	}
	return all
}

// TestCloudFormationValidate: AWS's own validator finds nothing wrong with the
// template, and does with each that is wrong.
func TestCloudFormationValidate(t *testing.T) {
	template, err := os.ReadFile("cloudformation.yaml")
	if err != nil {
		t.Fatal(err)
	}
	ours, err := filepath.Abs("cloudformation.yaml")
	if err != nil {
		t.Fatal(err)
	}
	wrong := []struct{ what, is, becomes string }{
		{"a property that there is not", "PermissionsBoundary: !Ref", "PermissionBoundary: !Ref"},
		{"a value out of bounds", "MaxSessionDuration: 3600", "MaxSessionDuration: 360"},
		{"a resource that there is not", "!GetAtt Broker.Arn", "!GetAtt Brokers.Arn"},
		{"an effect that there is not", "Effect: Allow", "Effect: Permit"},
		{"a parameter that there is not", "!Ref Audience", "!Ref Audiences"},
		{"a variable of !Sub that there is not", "${AWS::Partition}", "${AWS::Part}"},
	}
	paths, dir := []string{ours}, t.TempDir()
	for i, w := range wrong {
		text := strings.ReplaceAll(string(template), w.is, w.becomes)
		if text == string(template) {
			t.Fatalf("%s: %q is not in the template", w.what, w.is)
		}
		path := filepath.Join(dir, fmt.Sprintf("wrong%d.yaml", i))
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		paths = append(paths, path)
	}

	all := validated(t, paths...)
	if all[0].Rules < 100 || all[0].Resources != 5 {
		t.Errorf("%d rules were tried on %d resources", all[0].Rules, all[0].Resources)
	}
	for _, f := range all[0].Findings {
		t.Errorf("line %d: %s %s: %s", f.Line, f.Severity, f.Rule, f.Message)
	}
	for i, w := range wrong {
		if len(all[i+1].Findings) == 0 {
			t.Errorf("nothing is found wrong with %s", w.what)
		}
	}
}

// stack renders the functions of a CloudFormation template with values. It
// knows those that our template uses, and fails the test at any other.
type stack struct {
	t          *testing.T
	values     map[string]any    // what !Ref gives
	attributes map[string]string // what !GetAtt gives
	conditions ast.Node
}

// noValue is what AWS::NoValue gives: what has it is not there.
type noValue struct{}

// entries are a mapping's nodes by key.
func (s *stack) entries(n ast.Node) map[string]ast.Node {
	all := map[string]ast.Node{}
	m, ok := n.(ast.MapNode)
	if !ok {
		s.t.Fatalf("no mapping: %s", n)
	}
	for i := m.MapRange(); i.Next(); {
		key, ok := i.Key().(ast.ScalarNode)
		if !ok {
			s.t.Fatalf("a key that is no scalar: %s", i.Key())
		}
		all[fmt.Sprint(key.GetValue())] = i.Value()
	}
	return all
}

func (s *stack) render(n ast.Node) any {
	switch n := n.(type) {
	case *ast.TagNode:
		return s.function(n.Start.Value, n.Value)
	case *ast.MappingNode, *ast.MappingValueNode:
		all := map[string]any{}
		for key, v := range s.entries(n) {
			if v := s.render(v); !isNoValue(v) {
				all[key] = v
			}
		}
		return all
	case *ast.SequenceNode:
		all := []any{}
		for _, v := range n.Values {
			if v := s.render(v); !isNoValue(v) {
				all = append(all, v)
			}
		}
		return all
	case *ast.LiteralNode:
		return n.Value.Value
	case ast.ScalarNode:
		return n.GetValue()
	}
	s.t.Fatalf("a template with %T: %s", n, n)
	return nil
}

func isNoValue(v any) bool { _, is := v.(noValue); return is }

func (s *stack) function(name string, n ast.Node) any {
	args := func() []ast.Node {
		l, ok := n.(*ast.SequenceNode)
		if !ok {
			s.t.Fatalf("%s of %s", name, n)
		}
		return l.Values
	}
	switch name {
	case "!Ref":
		return s.ref(s.text(n))
	case "!GetAtt":
		v, ok := s.attributes[s.text(n)]
		if !ok {
			s.t.Fatalf("!GetAtt %s", n)
		}
		return v
	case "!Sub":
		text := s.text(n)
		for {
			before, rest, ok := strings.Cut(text, "${")
			name, after, closed := strings.Cut(rest, "}")
			if !ok || !closed {
				return text
			}
			text = before + fmt.Sprint(s.ref(name)) + after
		}
	case "!If":
		a := args()
		condition, ok := s.entries(s.conditions)[s.text(a[0])]
		if !ok {
			s.t.Fatalf("no condition %s", a[0])
		}
		if s.render(condition) == true {
			return s.render(a[1])
		}
		return s.render(a[2])
	case "!Not":
		return s.render(args()[0]) != true
	case "!Equals":
		return s.render(args()[0]) == s.render(args()[1])
	case "!Join":
		var all []string
		for _, v := range s.render(args()[1]).([]any) {
			all = append(all, fmt.Sprint(v))
		}
		return strings.Join(all, s.text(args()[0]))
	}
	s.t.Fatalf("a template with the function %s", name)
	return nil
}

func (s *stack) text(n ast.Node) string {
	v, ok := s.render(n).(string)
	if !ok {
		s.t.Fatalf("no text: %s", n)
	}
	return v
}

func (s *stack) ref(name string) any {
	v, ok := s.values[name]
	if !ok {
		s.t.Fatalf("!Ref %s", name)
	}
	return v
}

// rendered is the account that CloudFormation would make of the template.
func rendered(t *testing.T, issuer string, g secrets) account {
	t.Helper()
	file, err := parser.ParseFile("cloudformation.yaml", 0)
	if err != nil {
		t.Fatal(err)
	}
	s := &stack{t: t}
	top := s.entries(file.Docs[0].Body)
	s.conditions = top["Conditions"]
	// What CloudFormation's reference says of each type: !Ref is the ARN of a
	// managed policy and of an OIDC provider, and the name of a role.
	s.values = map[string]any{
		"AWS::Partition": "aws", "AWS::AccountId": accountID, "AWS::NoValue": noValue{},
		"Provider": "arn:aws:iam::" + accountID + ":oidc-provider/" + issuer, "Boundary": boundaryARN, "Broker": "mayfly-broker", "Crm": "crm",
		"CrmPermissions": "arn:aws:iam::" + accountID + ":policy/mayfly/crm",
	}
	s.attributes = map[string]string{"Broker.Arn": brokerARN, "Crm.Arn": crmARN}
	given := map[string]any{"Issuer": issuer, "BrokerID": brokerID, "Bucket": bucket, "Secrets": commaDelimited(g.read), "RotatedSecrets": commaDelimited(g.rotated)}
	for name, n := range s.entries(top["Parameters"]) {
		if v, ok := given[name]; ok {
			s.values[name] = v
			delete(given, name)
			continue
		}
		d, ok := s.entries(n)["Default"]
		if !ok {
			t.Fatalf("the template wants a value of %s", name)
		}
		s.values[name] = s.render(d)
	}
	if len(given) > 0 {
		t.Fatalf("the template has no parameters %v", given)
	}

	a := account{Providers: map[string]provider{}, Policies: map[string]string{}, Roles: map[string]role{}}
	for logical, n := range s.entries(top["Resources"]) {
		r := s.render(n).(map[string]any)
		p := r["Properties"].(map[string]any)
		text := func(name string) string {
			if v, ok := p[name]; ok {
				return fmt.Sprint(v)
			}
			return ""
		}
		arn := func(kind, name string) string {
			path := text("Path")
			if path == "" {
				path = "/"
			}
			return "arn:aws:iam::" + accountID + ":" + kind + path + name
		}
		switch r["Type"] {
		case "AWS::IAM::OIDCProvider":
			a.Providers[s.values["Provider"].(string)] = provider{URL: text("Url"), Audiences: texts(p["ClientIdList"])}
		case "AWS::IAM::ManagedPolicy":
			a.Policies[arn("policy", text("ManagedPolicyName"))] = s.document(p["PolicyDocument"])
		case "AWS::IAM::Role":
			made := role{
				Trust: s.document(p["AssumeRolePolicyDocument"]), Boundary: text("PermissionsBoundary"), Session: text("MaxSessionDuration"),
				Inline: map[string]string{}, Managed: texts(p["ManagedPolicyArns"]),
			}
			inline, _ := p["Policies"].([]any)
			for _, v := range inline {
				v := v.(map[string]any)
				made.Inline[v["PolicyName"].(string)] = s.document(v["PolicyDocument"])
			}
			a.Roles[arn("role", text("RoleName"))] = made
		default:
			t.Fatalf("%s is of type %s", logical, r["Type"])
		}
	}
	return a
}

// document is a policy as CloudFormation sends it: a text of JSON is as good as
// a mapping.
func (s *stack) document(v any) string {
	if text, ok := v.(string); ok {
		return text
	}
	return jsonOf(s.t, v)
}

func texts(v any) (all []string) {
	l, _ := v.([]any)
	for _, e := range l {
		all = append(all, fmt.Sprint(e))
	}
	return all
}

// commaDelimited is a parameter of type CommaDelimitedList: one that is given
// nothing has one entry, which is empty.
func commaDelimited(values []string) (all []any) {
	for _, v := range strings.Split(strings.Join(values, ","), ",") {
		all = append(all, v)
	}
	return all
}

// TestTemplatesAgree: CloudFormation and Terraform make the same account.
func TestTemplatesAgree(t *testing.T) {
	// A document is compared by what it says: texts under these keys are JSON.
	document := cmp.FilterPath(func(p cmp.Path) bool {
		s := p.GoString()
		return strings.Contains(s, ".Policies[") || strings.Contains(s, ".Inline[") || strings.HasSuffix(s, ".Trust")
	}, cmp.Comparer(func(a, b string) bool { return sameDocument(t, a, b) }))
	for name, g := range map[string]secrets{"secrets, one rotated": both, "secrets, none rotated": plain, "no secrets": none} {
		t.Run(name, func(t *testing.T) {
			_, iam := applied(t, g)
			got := rendered(t, issuer, g)
			if diff := cmp.Diff(iam.made(), got, document); diff != "" {
				t.Errorf("Terraform's account (-) and CloudFormation's (+):\n%s", diff)
			}
			if len(got.Roles) != 2 || len(got.Policies) != 2 || len(got.Providers) != 1 {
				t.Errorf("an account of %d roles, %d policies and %d OIDC providers", len(got.Roles), len(got.Policies), len(got.Providers))
			}
			leases := got.Roles[brokerARN].Inline["leases"]
			for action, want := range map[string]bool{"secretsmanager:GetSecretValue": len(g.read) > 0, "secretsmanager:RotateSecret": len(g.rotated) > 0} {
				if strings.Contains(leases, action) != want {
					t.Errorf("%s is in it: %t\n%s", action, !want, leases)
				}
			}
		})
	}
}
